"""Random LoRAs for the small models, in the layouts that the field's tools write."""

import json

import numpy as np
import torch
from safetensors.torch import save_file

from engine.adapters.names import aliases

RANK = 4


def layers(model, names, seed):
    """Random factors for each linear layer and convolution of the model whose name has one of these ends: name ->
    (down, up)."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, module in model.named_modules():
        if not hasattr(module, "weight") or module.weight is None or not any(name.endswith(end) for end in names):
            continue
        rows, columns, *kernel = module.weight.shape
        down = torch.randn(RANK, columns, *kernel, generator=generator) * 0.05
        up = torch.randn(rows, RANK, *(1 for _ in kernel), generator=generator) * 0.5
        made[name] = (down, up)
    return made


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
CONVOLUTIONS = ("conv1", "conv2", "time_emb_proj", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def random_lora(pipeline, seed=0, convolutions=False):
    """For U-Net and text encoder: part -> module -> (down, up)."""
    names = ATTENTION + (CONVOLUTIONS if convolutions else ())
    text = layers(pipeline.text_encoder, TEXT, seed + 1)
    return {
        "unet": layers(pipeline.unet, names, seed),
        "text_encoder": {name.removeprefix("text_model."): value for name, value in text.items()},
    }


def kohya(file, lora, alpha=2.0, text="text_model.", compvis=None):
    """kohya's, and with convolutions LoCon's. compvis: the U-Net's modules, to name its layers as CompVis does."""
    prefixes = {"unet": ("lora_unet_", ""), "text_encoder": ("lora_te_", text)}
    other = {}
    if compvis is not None:
        for alias, module in aliases(compvis).items():
            if alias.startswith(("input_blocks_", "output_blocks_", "middle_block_")):
                other[module] = alias
    tensors = {}
    for part, found in lora.items():
        prefix, inner = prefixes[part]
        for name, (down, up) in found.items():
            key = prefix + other.get(name, f"{inner}{name}".replace(".", "_"))
            tensors |= {
                f"{key}.lora_down.weight": down,
                f"{key}.lora_up.weight": up,
                f"{key}.alpha": torch.tensor(alpha),
            }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return file


def peft_keys(file, lora):
    """diffusers' of today, without alphas: lora_A and lora_B."""
    tensors = {}
    for part, found in lora.items():
        inner = "text_model." if part == "text_encoder" else ""
        for name, (down, up) in found.items():
            tensors |= {f"{part}.{inner}{name}.lora_A.weight": down, f"{part}.{inner}{name}.lora_B.weight": up}
    save_file(tensors, file)
    return file


def processors(file, lora):
    """diffusers' old one of attention processors, for the U-Net's attentions only."""
    tensors = {}
    for name, (down, up) in lora["unet"].items():
        parent, _, layer = name.rpartition(".") if not name.endswith("to_out.0") else (name[:-9], "", "to_out")
        if layer in ("to_q", "to_k", "to_v", "to_out"):
            key = f"unet.{parent}.processor.{layer}_lora"
            tensors |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
    save_file(tensors, file)
    return file


def cloneofsimo(file, lora, order):
    """cloneofsimo's numbered layers of the U-Net. order: its modules in the file's order."""
    tensors = {}
    for number, name in enumerate(order):
        down, up = lora["unet"][name]
        tensors |= {f"unet:{number}:up": up, f"unet:{number}:down": down}
    rank = {f"unet:{number}:rank": str(RANK) for number in range(len(order))}
    save_file(tensors, file, metadata={"unet": json.dumps(["CrossAttention", "Attention", "GEGLU"]), **rank})
    return file


def low_rank(delta, rank):
    """The factors of the best approximation of that rank: (down, up)."""
    u, s, v = np.linalg.svd(np.asarray(delta, np.float64), full_matrices=False)
    root = np.sqrt(s[:rank])
    down, up = root[:, None] * v[:rank], u[:, :rank] * root
    return torch.from_numpy(down.astype(np.float32)), torch.from_numpy(np.ascontiguousarray(up, np.float32))
