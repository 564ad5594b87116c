"""Changes of weights equal those that lycoris-lora and peft make."""

import copy

import numpy as np
import peft
import pytest
import torch
from lycoris import LycorisNetwork, create_lycoris
from torch import nn

from engine.adapters.change import Change, changed
from engine.errors import AdapterError, AdapterShapeError
from engine.text.tensors import Storage, StoredTensor

torch.manual_seed(0)
LINEAR, CONV, POINT = nn.Linear(24, 32), nn.Conv2d(8, 16, 3), nn.Conv2d(8, 16, 1)


def stored(tensor):
    """A tensor as a file's reader gives it."""
    array = np.ascontiguousarray(tensor.detach().numpy(), "<f4")
    return StoredTensor(Storage("F32", memoryview(array.tobytes())), array.shape)


class Model(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.to_q = layer


def base(layer):
    return layer.weight.detach().numpy().copy()


def close(ours, theirs):
    theirs = theirs.detach().numpy().reshape(ours.shape)
    assert np.abs(theirs).max() > 1e-3
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * max(1, np.abs(theirs).max()))


ALGORITHMS = [
    ("lora", {}),
    ("locon", {"use_tucker": True}),
    ("lora", {"dora_wd": True}),
    ("lora", {"dora_wd": True, "wd_on_out": False}),
    ("lora", {"rs_lora": True}),
    ("loha", {}),
    ("loha", {"use_tucker": True}),
    ("lokr", {"factor": 4}),
    ("lokr", {"factor": 2, "decompose_both": True}),
    ("lokr", {"factor": 4, "use_tucker": True}),
    ("lokr", {"factor": 4, "full_matrix": True}),
    ("ia3", {}),
    ("ia3", {"train_on_input": True}),
    ("full", {}),
    ("diag-oft", {}),
    ("diag-oft", {"rescaled": True}),
    ("diag-oft", {"constraint": 0.001}),
    ("boft", {}),
    ("boft", {"rescaled": True}),
]


def lycoris_module(layer, algorithm, options):
    """A module of LyCORIS with random weights, applied to a copy of the layer."""
    LycorisNetwork.apply_preset({"target_name": ["to_q"]})
    sizes = {"linear_dim": 4, "linear_alpha": 2, "conv_dim": 4, "conv_alpha": 2}
    network = create_lycoris(Model(copy.deepcopy(layer)), 1.0, algo=algorithm, **sizes, **options)
    network.apply_to()
    (module,) = network.loras
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return module


def changed_by_lycoris(module):
    """What its forward adds to the weight. Its `get_merged_weight` has the scale of LoHa and LoKr twice."""
    if hasattr(module, "get_weight"):
        return module.get_weight(module.shape)
    return module.get_merged_weight(1.0)[0] - module.org_weight


@pytest.mark.parametrize("layer", [LINEAR, CONV, POINT], ids=["linear", "conv", "point"])
@pytest.mark.parametrize(("algorithm", "options"), ALGORITHMS)
def test_the_change_is_lycoriss(layer, algorithm, options):
    module = lycoris_module(layer, algorithm, options)
    with torch.no_grad():
        theirs = changed_by_lycoris(module)
    state = {name: value.float() for name, value in module.state_dict().items()}
    alpha = float(state.pop("alpha")) if "alpha" in state else None
    tensors = {ROLE.get(name, name): stored(value) for name, value in state.items() if name != "diff_b"}
    close(Change("to_q", tensors, alpha).delta(base(layer)), theirs)


ROLE = {"lora_down.weight": "down", "lora_up.weight": "up", "lora_mid.weight": "mid"}


@pytest.mark.parametrize("weight", [0.0, -0.5, 0.7, 2.0])
def test_a_weight_scales_what_is_linear(weight):
    module = lycoris_module(LINEAR, "lora", {})
    state = module.state_dict()
    change = Change("to_q", {ROLE[n]: stored(v) for n, v in state.items() if n != "alpha"}, 2.0)
    np.testing.assert_allclose(change.delta(base(LINEAR), weight), weight * change.delta(base(LINEAR)), atol=1e-7)


CONFIGS = [
    peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q"]),
    peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["to_q"]),
    peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["to_q"]),
    peft.LoHaConfig(r=4, alpha=6, target_modules=["to_q"]),
    peft.LoKrConfig(r=4, alpha=6, target_modules=["to_q"]),
    peft.LoKrConfig(r=2, alpha=6, decompose_both=True, decompose_factor=2, target_modules=["to_q"]),
    peft.IA3Config(target_modules=["to_q"], feedforward_modules=[]),
    peft.IA3Config(target_modules=["to_q"], feedforward_modules=["to_q"]),
]


@pytest.mark.parametrize("layer", [LINEAR, CONV], ids=["linear", "conv"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_a_folder_of_peft_changes_what_peft_does(tmp_path, layer, config):
    from engine.adapters.files import read_adapter

    before = base(layer)
    wrapped = peft.get_peft_model(Model(nn.Sequential(layer)[0]), config)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in wrapped.named_parameters():
        if "base_layer" not in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(str(tmp_path))
    bias = layer.bias.detach().clone()
    try:
        merged = wrapped.merge_and_unload().to_q
        theirs, shifted = merged.weight.detach() - torch.from_numpy(before), merged.bias.detach() - bias
    finally:
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(before))
            layer.bias.copy_(bias)
    (found,) = read_adapter(tmp_path).layers
    assert (found.part, found.name) == ("unet", "to_q")
    close(found.change.delta(before), theirs)
    if found.bias is not None:
        close(found.bias.delta(bias.numpy()), shifted)
    else:
        assert not shifted.any()


def test_several_are_each_computed_from_the_first_weight():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((6, 4), np.float32)
    full = [Change("a", {"diff": stored(torch.from_numpy(rng.standard_normal((6, 4), np.float32)))}) for _ in range(2)]
    dora = Change("b", {**full[0].tensors, "dora_scale": stored(torch.ones(6, 1))})
    some = [(full[0], 0.5, None), (dora, 1.0, None), (full[1], -1.0, None)]
    np.testing.assert_allclose(changed(weight, some), changed(weight, some[::-1]), atol=1e-6)


def test_the_first_ranks_alone_may_count():
    rng = np.random.default_rng(0)
    up, down = rng.standard_normal((6, 4), np.float32), rng.standard_normal((4, 5), np.float32)
    tensors = {"up": stored(torch.from_numpy(up)), "down": stored(torch.from_numpy(down))}
    ours = Change("a", tensors, alpha=8).delta(np.zeros((6, 5), np.float32), 1.0, dyn=2)
    np.testing.assert_allclose(ours, 2 * up[:, :2] @ down[:2], rtol=1e-5)


def test_the_first_convolution_of_an_inpainting_model_takes_a_plain_models_change():
    change = Change("conv_in", {"diff": stored(torch.ones(8, 4, 3, 3))})
    delta = change.delta(np.zeros((8, 9, 3, 3), np.float32))
    assert delta[:, :4].all()
    assert not delta[:, 4:].any()


@pytest.mark.parametrize(
    ("tensors", "shape"),
    [
        ({"up": (6, 2), "down": (2, 5)}, (6, 4)),
        ({"up": (6, 3), "down": (2, 5)}, (6, 5)),
        ({"diff": (6, 5)}, (5, 6)),
        ({"diff": (6, 5), "dora_scale": (4, 1)}, (6, 5)),
        ({"weight": (7,), "on_input": ()}, (6, 5)),
        ({"ia3_out": (7, 1)}, (6, 5)),
        ({"oft_blocks": (2, 2, 2)}, (6, 5)),
    ],
)
def test_a_change_that_does_not_fit_names_the_layer_and_the_shapes(tensors, shape):
    change = Change("down.attn1.to_q", {name: stored(torch.ones(size)) for name, size in tensors.items()})
    with pytest.raises(AdapterShapeError, match=r"down\.attn1\.to_q .*\d"):
        change.delta(np.ones(shape, np.float32))


def test_half_a_layer_is_named():
    with pytest.raises(AdapterError, match=r"to_q has only \['down'\]"):
        Change("to_q", {"down": stored(torch.ones(2, 3))}).kind  # noqa: B018
