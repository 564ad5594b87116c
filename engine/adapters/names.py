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
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_magnitude_vector.default.weight": "magnitude",
    "lora.alpha": "alpha",
    "lora_linear_layer.alpha": "alpha",
    "w_norm": "diff",
    "b_norm": "diff_b",
}
SAME = (
    "alpha scale dora_scale diff diff_b hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2 lokr_w1 lokr_w1_a "
    "lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2 oft_blocks rescale scalar on_input weight ia3_l"
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
FIRST_RESNETS = re.compile(r"down_blocks\.0\.resnets\.(\d+)\.conv1")
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
    resnets = sum(1 for module in known if FIRST_RESNETS.fullmatch(module))
    crossed = frozenset(module.split(".attentions.")[0] for module in known if ".attentions." in module)
    found: dict[str, str] = {}
    for module in known:
        for name in (module, _compvis(module, resnets + 1, crossed), _text_model(module)):
            found.setdefault(name, module)
            found.setdefault(name.replace(".", "_"), module)
    return found


def _text_model(module: str) -> str:
    """transformers 5 has dropped the prefix of a text encoder's names."""
    bare = module.removeprefix("text_model.")
    return bare if bare != module else f"text_model.{module}"


def _compvis(module: str, steps: int, crossed: frozenset[str]) -> str:
    """kohya's names after CompVis's, which count a block's layers and its change of size as steps. crossed: the blocks
    with attention."""
    if module in TOP:
        return TOP[module]
    parts = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", module)
    if parts:
        way, block, kind, place_in_block, rest = parts.groups()
        number = steps * int(block)
        if kind == "downsamplers":
            return f"input_blocks_{number + steps}_0_op"
        if kind == "upsamplers":
            return f"output_blocks_{number + steps - 1}_{2 if f'up_blocks.{block}' in crossed else 1}_conv"
        number += int(place_in_block)
        side = f"input_blocks_{number + 1}" if way == "down" else f"output_blocks_{number}"
        return f"{side}_{0 if kind == 'resnets' else 1}_{RESNET.get(rest, rest)}"
    middle = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", module)
    if middle:
        kind, j, rest = middle.groups()
        place = 2 * int(j) if kind == "resnets" else 1
        return f"middle_block_{place}_{RESNET.get(rest, rest)}"
    return module
