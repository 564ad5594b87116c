"""What OpenAI's checkpoints do not say about themselves: the flags that improved-diffusion and guided-diffusion were
run with.

A JSON file beside the checkpoint, with its name, holds them: `model.pt`, `model.json`. For the checkpoints that OpenAI
released, the flags of their README files are known.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .reading import read_object

SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
"""OpenAI's names of noise schedules -> diffusers'."""

INFERRED = {
    "in_channels",
    "out_channels",
    "model_channels",
    "num_channels",
    "channel_mult",
    "num_res_blocks",
    "attention_resolutions",
    "num_heads_upsample",
    "class_cond",
    "learn_sigma",
    "use_scale_shift_norm",
    "resblock_updown",
}
WITHOUT_EFFECT = {
    "dropout",
    "use_checkpoint",
    "use_fp16",
    "use_kl",
    "rescale_learned_sigmas",
    "timestep_respacing",
    "use_ddim",
    "clip_denoised",
    "batch_size",
    "num_samples",
    "model_path",
}
"""Flags about training, or that a request gives; INFERRED are those that follow from the shapes."""


@dataclass(frozen=True)
class Flags:
    """The flags, by OpenAI's names. None: not known. Exactly one of num_heads and num_head_channels tells how the
    attention is split."""

    image_size: int | None = None
    num_heads: int | None = None
    num_head_channels: int | None = None
    use_new_attention_order: bool = False
    noise_schedule: str | None = None
    diffusion_steps: int = 1000
    rescale_timesteps: bool = False
    predict_xstart: bool = False
    sigma_small: bool = False

    def heads(self, channels: int) -> int | None:
        """How many heads the attention has at a number of channels."""
        if self.num_head_channels is not None:
            return channels // self.num_head_channels
        return self.num_heads


_LATE_2021 = Flags(image_size=256, num_head_channels=64, noise_schedule="linear")
_RESCALED = Flags(num_heads=4, noise_schedule="cosine", diffusion_steps=4000, rescale_timesteps=True)
_LSUN_EARLY = Flags(image_size=256, num_heads=1, noise_schedule="linear")
RELEASED = {
    "64x64_diffusion": replace(_LATE_2021, image_size=64, noise_schedule="cosine", use_new_attention_order=True),
    "128x128_diffusion": Flags(image_size=128, num_heads=4, noise_schedule="linear"),
    "256x256_diffusion": _LATE_2021,
    "256x256_diffusion_uncond": _LATE_2021,
    "512x512_diffusion": replace(_LATE_2021, image_size=512),
    "lsun_bedroom": _LATE_2021,
    "lsun_cat": _LATE_2021,
    "lsun_horse": _LATE_2021,
    "lsun_horse_nodropout": _LATE_2021,
    "imagenet64_uncond_100M_1500K": replace(_RESCALED, image_size=64),
    "imagenet64_uncond_vlb_100M_1500K": replace(_RESCALED, image_size=64),
    "imagenet64_cond_270M_250K": replace(_RESCALED, image_size=64, rescale_timesteps=False),
    "cifar10_uncond_50M_500K": replace(_RESCALED, image_size=32),
    "cifar10_uncond_vlb_50M_500K": replace(_RESCALED, image_size=32),
    "lsun_uncond_100M_1200K_bs128": _LSUN_EARLY,
    "lsun_uncond_100M_2400K_bs64": _LSUN_EARLY,
}
"""By the stem of the file: the flags in the README files of openai/guided-diffusion and openai/improved-diffusion."""


def read_flags(checkpoint: Path) -> Flags:
    """The flags beside a checkpoint, else those of a released one, else none.

    Raises UnreadableModelError for a file that is no JSON object, and UsageError for a flag that does not exist or has
    a value that it cannot have.
    """
    beside = checkpoint.with_suffix(".json")
    if not beside.exists():
        return RELEASED.get(checkpoint.stem, Flags())
    given = read_object(beside)
    known = {field.name for field in fields(Flags)}
    exist = known | INFERRED | WITHOUT_EFFECT
    for name in given:
        if name not in exist:
            near = get_close_matches(name, sorted(exist), 1)
            raise UsageError(
                f"{beside} has a flag {name!r}, which neither improved-diffusion nor guided-diffusion has; "
                f"{f'did you mean {near[0]!r}? ' if near else ''}Flags that matter here: {', '.join(sorted(known))}"
            )
    flags = Flags(**{name: _checked(beside, name, value) for name, value in given.items() if name in known})
    if flags.num_heads is not None and flags.num_head_channels is not None:
        raise UsageError(f"{beside} has both num_heads and num_head_channels; keep the one that the model was run with")
    return flags


def _checked(file: Path, name: str, value: Any) -> Any:
    if name == "noise_schedule":
        allowed, right = f"one of {', '.join(SCHEDULES)}", value in SCHEDULES
    elif isinstance(getattr(Flags(), name), bool):
        allowed, right = "true or false", isinstance(value, bool)
    else:
        allowed, right = "a whole number from 1 on", type(value) is int and value >= 1
    if not right:
        raise UsageError(f"{name} in {file} is {value!r}; it must be {allowed}")
    return value


def missing(checkpoint: Path, what: str, example: str) -> UsageError:
    """The error for a flag that is needed and not known. `example` is JSON."""
    return UsageError(
        f"{checkpoint} does not say {what}: no tensor's shape tells it. Write {checkpoint.with_suffix('.json')} with "
        f"the flags that the model was trained with, for example {example}"
    )


def scheduler(checkpoint: Path, flags: Flags, learned: bool) -> dict[str, Any]:
    """The scheduler_config.json of a checkpoint of OpenAI's. Steps are spaced as by --timestep_respacing. UsageError
    where the noise schedule is not known."""
    if flags.noise_schedule is None:
        raise missing(checkpoint, "which noise schedule it was trained with", '{"noise_schedule": "cosine"}')
    shortening = 1000 / flags.diffusion_steps  # "linear" means 1e-4 to 0.02 at 1000 steps
    betas = {"beta_start": shortening * 1e-4, "beta_end": shortening * 0.02} if flags.noise_schedule == "linear" else {}
    fixed = "fixed_small" if flags.sigma_small else "fixed_large"
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": flags.diffusion_steps,
        "beta_schedule": SCHEDULES[flags.noise_schedule],
        **betas,
        "variance_type": "learned_range" if learned else fixed,
        "prediction_type": "sample" if flags.predict_xstart else "epsilon",
        "clip_sample": True,
        "timestep_spacing": "linspace",
    }
