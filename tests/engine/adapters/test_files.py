"""Whatever a file holds, it is an adapter, or an error says by name what is wrong with it."""

import json
import warnings
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from engine.adapters.change import changed
from engine.adapters.files import PEFT_CONFIG, files_of, read_adapter
from engine.adapters.fitting import fit
from engine.adapters.names import ENDINGS
from engine.errors import AdapterError, TensorFileError
from engine.weights import Weight

SHAPES = {"down.attn1.to_q": (6, 4), "down.attn2.to_k": (4, 5), "conv": (4, 3, 3, 3), "norm": (4,)}
NAMES = ["lora_unet_down_attn1_to_q", "unet.down.attn2.to_k", "conv", "norm", "lora_te_x", "unet.down.attn1.to_q"]


def table():
    rng = np.random.default_rng(0)
    found = {}
    for module, shape in SHAPES.items():
        for kind, size in (("weight", shape), ("bias", shape[:1])):
            values = rng.standard_normal(size).astype("<f4")
            name = f"{module}.{kind}"
            found[name] = (Weight(name, name, False, size, "float32", values.reshape(-1).view(np.uint8)),)
    return found


TABLES = {"unet": table()}
KEYS = st.one_of(
    st.builds(lambda name, ending: f"{name}.{ending[0]}", st.sampled_from(NAMES), st.sampled_from(ENDINGS)),
    st.sampled_from(["unet:0:up", "unet:0:down", "unet:1:up", "surprise", "bundle_emb.x.y"]),
)
SIZES = st.lists(st.integers(0, 6), max_size=4).map(tuple)
TYPES = st.sampled_from(["float32", "float16", "float64", "int64", "bool"])


def used(path):
    """Reads an adapter and computes all that it changes."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        for (_, parameter), change in fit(read_adapter(path), TABLES).changes.items():
            base = TABLES["unet"][parameter][0].read()
            assert changed(base, [(change, 0.5, 2)]).shape == base.shape


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(KEYS, st.tuples(SIZES, TYPES), min_size=1, max_size=8), st.booleans())
def test_tensors_of_any_name_shape_and_type_fit_or_are_named(place, drawn, numbered):
    tensors = {key: np.ones(shape, dtype) for key, (shape, dtype) in drawn.items()}
    metadata = {"unet": json.dumps(["CrossAttention"])} if numbered else {}
    (place / "a.safetensors").write_bytes(save(tensors, metadata))
    with suppress(AdapterError, TensorFileError):
        used(place / "a.safetensors")


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["a.safetensors", "a.pt", "a.bin"]))
def test_bytes_that_are_no_adapter_are_named(place, content, name):
    (place / name).write_bytes(content)
    with pytest.raises((AdapterError, TensorFileError), match=r"\.(safetensors|pt|bin)"):
        read_adapter(place / name)


VALUES = st.one_of(st.none(), st.integers(-2, 9), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=2))


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(
            ["r", "lora_alpha", "alpha", "use_rslora", "rank_pattern", "alpha_pattern", "feedforward_modules"]
        ),
        st.one_of(VALUES, st.dictionaries(st.sampled_from(["to_q", ".*", "(", ""]), VALUES, max_size=2)),
    )
)
def test_any_configuration_of_peft_is_read_or_named(place, config):
    tensors = {
        "base_model.model.down.attn1.to_q.lora_A.weight": np.ones((2, 4), np.float32),
        "base_model.model.down.attn1.to_q.lora_B.weight": np.ones((6, 2), np.float32),
        "base_model.model.down.attn2.to_k.ia3_l": np.ones((1, 5), np.float32),
    }
    (place / "adapter_model.safetensors").write_bytes(save(tensors))
    (place / PEFT_CONFIG).write_text(json.dumps(config))
    with suppress(AdapterError, TensorFileError):
        used(place)


def test_what_is_read_is_named_for_fingerprints(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(save({"a.lora_A.weight": np.ones((2, 2), np.float32)}))
    assert files_of(tmp_path) == (tmp_path / "adapter_model.safetensors",)
    (tmp_path / PEFT_CONFIG).write_text('{"r": 2}')
    assert files_of(tmp_path) == (tmp_path / "adapter_model.safetensors", tmp_path / PEFT_CONFIG)
