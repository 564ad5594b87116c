"""The running averages (EMA) of a CompVis checkpoint: `model_ema.*`, whose names have lost their dots."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from ..errors import UnreadableModelError, UsageError
from .compvis import UNET

AVERAGES = "model_ema."
COUNTERS = {"decay", "num_updates"}
"""What LitEma keeps beside its averages."""

PAIRS = ("input_blocks", "output_blocks", "label_emb")
"""Lists of lists: the last digit is the place in the inner one, which has fewer than ten entries."""

WORDS = (
    *PAIRS,
    *("time_embed", "middle_block", "in_layers", "out_layers", "emb_layers", "skip_connection", "transformer_blocks"),
    *("attn1", "attn2", "to_q", "to_k", "to_v", "to_out", "proj_in", "proj_out", "proj", "norm1", "norm2", "norm3"),
    *("norm", "ff", "net", "conv", "op", "out", "weight", "bias"),
)
"""The names of modules and parameters in CompVis' U-Net; a name comes before those that it begins with."""

TOKEN = re.compile("|".join((*WORDS, r"\d+")))


def apply(weights: dict[str, Tensor], file: Path, asked: bool) -> dict[str, Tensor]:
    """The weights with the running averages as the U-Net's, where they are `asked` for or the file holds no others.

    UsageError if they are asked for and not there, UnreadableModelError if some are missing.
    """
    averages = {name for name in weights if name.startswith(AVERAGES)} - {AVERAGES + one for one in COUNTERS}
    own = [name for name in weights if name.startswith(UNET)]
    if asked and not averages:
        raise UsageError(
            f"--ema: {file} has no running averages ({AVERAGES}*); leave --ema out (a file called emaonly holds the "
            f"averages as its {UNET}* already)"
        )
    if not averages or (own and not asked):
        return weights
    chosen = {average_of(name): name for name in own} or {name: spelled(name, file) for name in averages}
    missing = sorted(set(chosen) - averages)
    if missing:
        raise UnreadableModelError(
            f"{file} lacks {len(missing)} of the U-Net's running averages, for example {missing[0]}; leave --ema out, "
            "or download the file again"
        )
    rest = {name: value for name, value in weights.items() if not name.startswith(AVERAGES)}
    return rest | {name: weights[average] for average, name in chosen.items()}


def average_of(name: str) -> str:
    """The name of a weight's average: LitEma drops `model.` and every dot."""
    return AVERAGES + name.removeprefix("model.").replace(".", "")


def spelled(name: str, file: Path) -> str:
    """The weight's name that an average's is of. UnreadableModelError for a name that is not of CompVis' U-Net."""
    flat = name.removeprefix(AVERAGES + "diffusion_model")
    tokens = TOKEN.findall(flat)
    if "".join(tokens) != flat or name == flat:
        raise UnreadableModelError(f"{file} has an average {name}, which is not of Stable Diffusion's U-Net")
    parts = []
    for before, token in zip(("", *tokens), tokens):
        parts.append(f"{token[:-1]}.{token[-1]}" if before in PAIRS and len(token) > 1 else token)
    return UNET + ".".join(parts)
