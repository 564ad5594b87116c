"""The families of models, as data.

text_encoder  a text's tokens become its embedding
denoiser      one whole step: the U-Net on slot 0 of the state, row by row; guidance (`mixing` combines the rows'
              outputs per sample, `rescale` brings back the standard deviation of one); the sampler,
              `next_state = update @ [state; output; noise]`
vae_decoder   latents become pixels. `magnitude` is a sum over the absolute values before they are clamped: it is finite
              if they all are, which pixels cannot tell
vae_encoder   pixels become the mean and the standard deviation of latents
"""

from __future__ import annotations

from .contract import PROMPT_TOKENS, SLOTS, Component, Family, Tensor

LATENT_CHANNELS = 4
VAE_FACTOR = 8


def _autoencoder(channels: int, factor: int) -> tuple[Component, Component]:
    """A VAE's two graphs."""
    latents = ("batch", channels, "height", "width")
    pixels = ("batch", f"{factor}*height", f"{factor}*width", 3)
    decoder = Component(
        "vae_decoder",
        inputs=(Tensor("latents", latents),),
        outputs=(Tensor("image", pixels, "uint8"), Tensor("magnitude", ("batch",))),
    )
    encoder = Component(
        "vae_encoder",
        inputs=(Tensor("image", pixels, "uint8", below=256),),
        outputs=(Tensor("mean", latents), Tensor("std", latents)),
        required=False,
    )
    return decoder, encoder


def _denoiser(channels: int) -> Component:
    plane = (channels, "height", "width")
    state = ("batch", SLOTS, *plane)
    return Component(
        "denoiser",
        inputs=(
            Tensor("state", state, changes="step", fed_by="next_state"),
            Tensor("row_sample", ("rows",), "int32", below="batch"),
            Tensor("context", ("rows", "tokens", "context_size")),
            Tensor("timestep", ("batch",), changes="step", below=1000, exact=True),
            Tensor("mixing", ("batch", "rows"), changes="step", solver=True),
            Tensor("rescale", ("batch", "rows"), below=1, solver=True),
            Tensor("update", ("batch", SLOTS, SLOTS + 2), changes="step", solver=True),
            Tensor("noise", ("batch", *plane), changes="step", solver=True),
        ),
        outputs=(Tensor("next_state", state),),
    )


STABLE_DIFFUSION = Family(
    "stable-diffusion",
    components=(
        Component(
            "text_encoder",
            inputs=(Tensor("input_ids", ("rows", PROMPT_TOKENS), "int32", below=256),),
            outputs=(Tensor("context", ("rows", PROMPT_TOKENS, "context_size")),),
            halves=False,  # it takes a thousandth of a picture's time, and every step sees its errors
        ),
        _denoiser(LATENT_CHANNELS),
        *_autoencoder(LATENT_CHANNELS, VAE_FACTOR),
    ),
    channels=LATENT_CHANNELS,
    factor=VAE_FACTOR,
)
"""Stable Diffusion 1.x and 2.x."""

FAMILIES = {family.name: family for family in (STABLE_DIFFUSION,)}
"""By the name in the manifest."""
