"""Which layer of a model a key of an adapter's file means.

Kohya's names have underscores for dots, so they can't be split. They are looked up among the model's own names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

ROLES = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_A.default.weight": "down",
    "lora_B.default.weight": "up",
    "lora_magnitude_vector": "dora_scale",
    "lora_magnitude_vector.weight": "dora_scale",
    "w_norm": "diff",
    "b_norm": "diff_b",
}
SAME = (
    "alpha scale dora_scale diff diff_b hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2 lokr_w1 lokr_w1_a lokr_w1_b "
    "lokr_w2 lokr_w2_a lokr_w2_b lokr_t2 oft_blocks on_input weight"
)
ENDINGS = sorted([*ROLES.items(), *((name, name) for name in SAME.split())], key=lambda ending: -len(ending[0]))
PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
}
RESNET = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "norm1": "in_layers_0",
    "norm2": "out_layers_0",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}
TOP = {
    "conv_in": "input_blocks_0_0",
    "time_embedding.linear_1": "time_embed_0",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
    "add_embedding.linear_2": "label_emb_0_2",
    "conv_norm_out": "out_0",
    "conv_out": "out_2",
}


def split(key: str) -> tuple[str, str] | None:
    """A key's layer and the role of its tensor, or None for a key of no known format."""
    processor = re.fullmatch(r"(.*)\.processor\.(to_\w+)_lora\.(down|up)\.weight", key)
    if processor:
        parent, name, role = processor.groups()
        return f"{parent}.{'to_out.0' if name == 'to_out' else name}", role
    for ending, role in ENDINGS:
        if key.endswith(f".{ending}"):
            return key[: -len(ending) - 1], role
    return None


def component(layer: str) -> tuple[str, str]:
    """The component of a layer and the layer's name in it. Without a prefix, as in peft's files, it is the U-Net."""
    bare = layer.removeprefix("base_model.model.")
    for prefix, name in PREFIXES.items():
        if bare.startswith(prefix):
            return name, bare.removeprefix(prefix)
    return "unet", bare


def aliases(modules: Iterable[str]) -> dict[str, str]:
    """Every name that a file may use for each module of a model -> the module."""
    known = list(modules)
    found = {}
    for module in known:
        for name in (module, _compvis(module, known), _text_model(module)):
            found.setdefault(name, module)
            found.setdefault(name.replace(".", "_"), module)
    return found


def _text_model(module: str) -> str:
    """transformers 5 has dropped the prefix of a text encoder's names."""
    bare = module.removeprefix("text_model.")
    return bare if bare != module else f"text_model.{module}"


def _compvis(module: str, modules: list[str]) -> str:
    if module in TOP:
        return TOP[module]
    parts = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", module)
    if parts:
        return _block(*parts.groups(), modules)
    middle = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", module)
    if middle:
        kind, j, rest = middle.groups()
        place = 2 * int(j) if kind == "resnets" else 1
        return f"middle_block_{place}_{RESNET.get(rest, rest)}"
    return module


def _block(way: str, block: str, kind: str, place: str, rest: str, modules: list[str]) -> str:
    """kohya's map of diffusers' blocks to CompVis's; both count a block's layers and its change of size as steps."""
    i, j = int(block), int(place)
    pattern = re.compile(r"down_blocks\.0\.resnets\.(\d+)\.conv1")
    steps = sum(1 for module in modules if pattern.fullmatch(module)) + 1
    if kind == "downsamplers":
        return f"input_blocks_{steps * (i + 1)}_0_op"
    if kind == "upsamplers":
        attentions = any(module.startswith(f"up_blocks.{i}.attentions.") for module in modules)
        return f"output_blocks_{steps * (i + 1) - 1}_{2 if attentions else 1}_conv"
    step = steps * i + j + (1 if way == "down" else 0)
    place_in_step = 0 if kind == "resnets" else 1
    return f"{'input' if way == 'down' else 'output'}_blocks_{step}_{place_in_step}_{RESNET.get(rest, rest)}"
