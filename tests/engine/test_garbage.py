"""Whatever a manifest holds or a call is given, what comes out is right or an error with a name."""

import copy
import json
import shutil
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import Bundle, EngineError, Pipeline
from engine.errors import BackendError, BundleError, SchedulerConfigError
from engine.manifest import OPENVINO_PRECISIONS, PRECISIONS
from engine.sampling.catalog import SAMPLERS, sampler_name, step_table
from engine.sampling.schedule import Schedule
from engine.text.tokenizer import ClipTokenizer

QUICK = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
HUGE = 10**5000

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(
        [
            -1,
            0,
            1,
            8,
            16,
            64,
            "64",
            1e308,
            2**31,
            "fp32",
            "x" * 300,
            "../x",
            "/etc/passwd",
            "onnx/denoiser.onnx",
            "\0",
            "\ud800",
            "false",
            "0" * 64,
        ]
    )
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)


def places(value, path=()):
    """The ways to everything in a JSON value."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inner:
        yield from places(child, (*path, key))


@pytest.fixture(scope="module")
def good(tiny_bundles, tmp_path_factory):
    """A bundle whose manifest is changed, and the manifest as it was."""
    bundle = shutil.copytree(tiny_bundles["sd1"], tmp_path_factory.mktemp("garbage") / "sd1")
    return bundle, json.loads((bundle / "manifest.json").read_text())


def dump(manifest) -> bytes:
    """JSON with characters of any kind."""
    return json.dumps(manifest).encode("utf-8", "surrogatepass")


def use(bundle):
    """Everything that a pipeline reads of a manifest, without the graphs."""
    opened = Bundle.open(bundle, verify=False)
    schedule = Schedule.from_config(opened.scheduler)
    assert np.isfinite(step_table(sampler_name(None, schedule), schedule, 2).updates).all()
    ClipTokenizer(opened.tokenizer_file, opened.special_tokens)(["a ring"])
    assert opened.precision in PRECISIONS
    assert opened.command(height=opened.shapes.height)


@QUICK
@given(data=st.data())
def test_a_garbled_manifest_is_an_error_with_a_name_or_does_not_matter(good, data):
    bundle, manifest = good
    garbled = copy.deepcopy(manifest)
    *way, last = data.draw(st.sampled_from([path for path in places(manifest) if path]))
    owner = garbled
    for key in way:
        owner = owner[key]
    if data.draw(st.booleans()):
        owner[last] = data.draw(JSON)
    else:
        del owner[last]
    (bundle / "manifest.json").write_bytes(dump(garbled))
    with suppress(EngineError):
        use(bundle)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=200)
    | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace"))
    | JSON.map(dump)
)
def test_any_bytes_for_a_manifest_are_a_bundle_error(good, content):
    bundle, _ = good
    (bundle / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError):
        Bundle.open(bundle)


FAMILY = {
    "name": [None, 5, "", []],
    "precision": [None, "int8", ["fp32"], 32],
    "scheduler": [None, 5, "x", []],
    "openvino": [None, [], 5, "x"],
    "source": [None, "x", {"kind": "folder"}],
    "components": [None, [], {}],
    "tokenizer": [None, []],
    "verification": [None, 5, {}, {"done": "yes"}, {"done": True, "picture": 5}],
    "format": [None, True, "2", 2.5, 1, 10**30],
    "files": [None, [], {"x": 5}],
    "shapes.height": [
        None,
        [],
        [8, 8, 8],
        [1, 1, 1],
        [64.0, 64.0, 64.0],
        [64, 32, 128],
        [64, 64],
        "64",
        [64, 64, 100],
        [64, 64, 10**6],
    ],
    "shapes.batch": [[0, 1, 2], [1, 1, 10**6], [True, True, True]],
    "openvino.precision": [None, [], "fp32", {"denoiser": "int8"}, {"other": "fp32"}, {"denoiser": None}],
    "components.denoiser.onnx": [[], None, "onnx/vae_decoder.onnx", "../x"],
    "components.denoiser.opset": ["18", None, -1],
    "tokenizer.file": [[], {}, "other.json"],
    "tokenizer.start": [10**12, "a", None, 2**31, -1, 1.5, True],
    "tokenizer.pad": [None, True, [1]],
    "files.onnx/denoiser.onnx": [
        None,
        {},
        {"sha256": 5, "bytes": 1},
        {"sha256": None, "bytes": 1},
        {"sha256": "0" * 63, "bytes": 1},
        {"sha256": "0" * 64, "bytes": "1458984"},
        {"sha256": "0" * 64, "bytes": True},
    ],
    "files.\n": [{"sha256": "0" * 64, "bytes": 1}],
    f"files.{'x' * 300}": [{"sha256": "0" * 64, "bytes": 1}],
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        pytest.param(field, value, id=f"{field[:30]!r}-{i}")
        for field, values in FAMILY.items()
        for i, value in enumerate(values)
    ],
)
def test_a_garbled_field_is_named(good, field, value):
    bundle, manifest = good
    garbled = copy.deepcopy(
        {**manifest, "openvino": {"precision": dict.fromkeys(manifest["components"], OPENVINO_PRECISIONS[0])}}
    )
    *way, last = field.split(".", 1) if field.startswith("files.") else field.split(".")
    owner = garbled
    for key in way:
        owner = owner[key]
    owner[last] = value
    (bundle / "manifest.json").write_text(json.dumps(garbled))
    with pytest.raises((BundleError, SchedulerConfigError)) as raised:
        use(bundle)
    assert (
        last in str(raised.value)
        or field in str(raised.value)
        or "format" in str(raised.value)
        or repr(last) in str(raised.value)
    )


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"format": ' + b"9" * 5000 + b"}", b'{"a":' * 100_000, b"\xff\xfe", b"5", b"null"]
)
def test_json_that_no_reader_takes_is_named(good, content):
    bundle, _ = good
    (bundle / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match="build it again"):
        Bundle.open(bundle)


def table_of(config):
    schedule = Schedule.from_config(config)
    return step_table(sampler_name(None, schedule), schedule, 20)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("beta_start", "abc"),
        ("beta_start", None),
        ("beta_start", -1),
        ("beta_end", 1e308),
        ("num_train_timesteps", None),
        ("num_train_timesteps", -5),
        ("num_train_timesteps", 0),
        ("num_train_timesteps", 1000.5),
        ("trained_betas", "x"),
        ("trained_betas", ["a"]),
        ("trained_betas", [0.1]),
        ("steps_offset", "1"),
        ("steps_offset", -1),
        ("steps_offset", 1.5),
        ("set_alpha_to_one", "no"),
        ("rescale_betas_zero_snr", "false"),
        ("clip_sample", "yes"),
        ("timestep_spacing", 5),
        ("timestep_spacing", "foo"),
        ("prediction_type", None),
        ("prediction_type", "x"),
        ("beta_schedule", []),
        ("_class_name", 5),
        ("solver_order", "2"),
        ("sigma_min", -1),
        ("use_karras_sigmas", 1),
    ],
)
def test_a_garbled_scheduler_option_is_named_and_makes_no_other_picture(good, option, value):
    _, manifest = good
    config = {
        **manifest["scheduler"],
        "_class_name": "DPMSolverMultistepScheduler" if option == "solver_order" else "EulerDiscreteScheduler",
        option: value,
    }
    with pytest.raises(EngineError) as raised:
        table_of(config)
    assert option in str(raised.value) or "scheduler" in str(raised.value)


VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-5, 2000)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=5)
    | st.lists(st.integers(), max_size=3)
    | st.lists(st.text(max_size=5), max_size=3)
    | st.sampled_from(
        [
            HUGE,
            -HUGE,
            2**64,
            np.array(1),
            np.array([1, 2]),
            np.zeros((1, 4, 8, 8), np.float32),
            np.full((1, 4, 8, 8), 1e300),
            "ddim",
            "pil",
            "np",
            8,
            64,
            1.5,
            print,
            {},
            object(),
        ]
    )
)
ARGUMENTS = [
    "prompt",
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    "negative_prompt",
    "num_images_per_prompt",
    "eta",
    "seed",
    "latents",
    "output_type",
    "callback_on_step_end",
    "scheduler",
    "guidance_rescale",
    "guidance_interval",
]


@QUICK
@given(given_=st.dictionaries(st.sampled_from(ARGUMENTS), VALUES, max_size=4))
def test_any_arguments_of_a_call_are_taken_or_refused_by_name(stopped, given_):
    with pytest.raises(EngineError):
        stopped(**{"prompt": "a ring", "num_inference_steps": 1, **given_})


@pytest.fixture(scope="module")
def stopped(tiny_bundles):
    """A pipeline whose loop does not start: what gets there was taken."""
    with Pipeline.load(tiny_bundles["sd1"], backend="onnxruntime") as pipeline:
        pipeline._backend.lanes = stop
        yield pipeline


def stop(count, height, width):
    raise BackendError("nothing runs in this test")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(folder=VALUES, options=st.dictionaries(st.sampled_from(["backend", "device", "threads"]), VALUES, max_size=2))
def test_any_arguments_of_loading_are_refused_by_name(folder, options, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        with pytest.raises(EngineError):
            Pipeline.load(folder, **options)


@pytest.mark.parametrize(
    "folder",
    [None, 5, b"engines/demo", "n" * 300, "a/" * 3000, "\0", "\ud800", "~nobody-of-that-name/x", "", np.array(["a"])],
)
def test_a_folder_that_is_none_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BundleError):
        Pipeline.load(folder)


def test_a_folder_of_bundles_names_them(tiny_bundles):
    with pytest.raises(BundleError, match=r"it holds the bundles .*sd1.*: pass .*/"):
        Pipeline.load(tiny_bundles["sd1"].parent)


def test_every_sampler_refuses_garbage_in_its_schedule_by_name(good):
    _, manifest = good
    for name in SAMPLERS:
        with pytest.raises(SchedulerConfigError):
            step_table(name, Schedule.from_config({**manifest["scheduler"], "timestep_spacing": "?"}), 20)
