"""The families of models, as data.

text_encoder  the vectors of a text's tokens become its embedding: `skip` last layers are left out, each token's vector
              is multiplied with its `emphasis`, and where `restore` is 1 the embedding's mean is what it was
denoiser      one whole step: the U-Net on slot 0 of the state, row by row; guidance (`mixing` combines the rows'
              outputs per sample, `rescale` brings back the standard deviation of one); the sampler,
              `next_state = update @ [state; output; noise]`; inpainting: where `mask` is 0, slot 0 of the next state
              becomes `blend[0] original + blend[1] start_noise`
vae_decoder   latents become pixels. `magnitude` is a sum over the absolute values before they are clamped: it is finite
              if they all are, which pixels cannot tell
vae_encoder   pixels in -1..1 become the mean and the standard deviation of latents

Some U-Nets see more channels than the latents have: inpainting, depth, InstructPix2Pix, the x4 upscaler. `concat` joins
them row by row, and `class_labels` says the noise level of what the upscaler sees. Which channels these are, and the
factor, is the model's own.

Models without texts (DDPM, Improved DDPM, unconditional latent diffusion) have a denoiser of their own:

    next_state = update @ [state; output; noise; clipped]

`clipped` is the predicted clean sample within a range. With a learned variance the U-Net chooses the deviation of
`noise`, element by element. Their channels, factor and classes are the model's own, so the manifest says them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .contract import JOINS, PROMPT_TOKENS, SLOTS, Component, Family, Tensor

LATENT_CHANNELS = 4
VAE_FACTOR = 8


def _pixels(factor: int) -> tuple[int | str, ...]:
    """The dimensions of pictures."""
    return ("batch", f"{factor}*height", f"{factor}*width", 3) if factor > 1 else ("batch", "height", "width", 3)


def _decoder(channels: int, factor: int) -> Component:
    return Component(
        "vae_decoder",
        inputs=(Tensor("latents", ("batch", channels, "height", "width")),),
        outputs=(Tensor("image", _pixels(factor), "uint8"), Tensor("magnitude", ("batch",))),
    )


def _encoder(channels: int, factor: int) -> Component:
    latents = ("batch", channels, "height", "width")
    return Component(
        "vae_encoder",
        inputs=(Tensor("image", _pixels(factor), below=1),),
        outputs=(Tensor("mean", latents), Tensor("std", latents)),
        required=False,
    )


def _text_encoder() -> Component:
    return Component(
        "text_encoder",
        inputs=(
            Tensor("embeddings", ("rows", PROMPT_TOKENS, "text_width")),
            Tensor("emphasis", ("rows", PROMPT_TOKENS), below=2),
            Tensor("restore", ("rows",), "int32", below=2),
            Tensor("skip", ("rows",), "int32", below=2),
        ),
        outputs=(Tensor("context", ("rows", PROMPT_TOKENS, "context_size")),),
        halves=False,  # it takes a thousandth of a picture's time, and every step sees its errors
        adapted="text_encoder",
    )


def _guided_step(state: tuple[int | str, ...]) -> tuple[Tensor, ...]:
    """The inputs of every step that is guided by texts."""
    return (
        Tensor("state", state, changes="step", fed_by="next_state"),
        Tensor("row_sample", ("rows",), "int32", below="batch"),
        Tensor("context", ("rows", "tokens", "context_size")),
        Tensor("timestep", ("batch",), changes="step", below=1000, exact=True),
        Tensor("mixing", ("batch", "rows"), changes="step", solver=True),
        Tensor("rescale", ("batch", "rows"), below=1, solver=True),
        Tensor("update", ("batch", SLOTS, SLOTS + 2), changes="step", solver=True),
    )


def _denoiser(channels: int) -> Component:
    plane = (channels, "height", "width")
    state = ("batch", SLOTS, *plane)
    return Component(
        "denoiser",
        inputs=(
            *_guided_step(state),
            Tensor("blend", ("batch", 2), changes="step", below=1, default=0.0, solver=True),
            Tensor("noise", ("batch", *plane), changes="step", solver=True),
            Tensor("mask", ("batch", 1, "height", "width"), below=1, default=1.0, solver=True),
            Tensor("original", ("batch", *plane), default=0.0, solver=True),
            Tensor("start_noise", ("batch", *plane), default=0.0, solver=True),
        ),
        outputs=(Tensor("next_state", state),),
        adapted="unet",
    )


def _joined_denoiser(channels: int, concat: int, noise_levels: int | None) -> Component:
    """The denoiser of a U-Net that sees `concat` in each row beside the sample."""
    plane = (channels, "height", "width")
    state = ("batch", SLOTS, *plane)
    labels = () if noise_levels is None else (Tensor("class_labels", ("rows",), "int32", below=noise_levels),)
    return Component(
        "denoiser",
        inputs=(
            *_guided_step(state),
            Tensor("noise", ("batch", *plane), changes="step", solver=True),
            Tensor("concat", ("rows", concat, "height", "width")),
            *labels,
        ),
        outputs=(Tensor("next_state", state),),
        adapted="unet",
    )


def _textless_denoiser(channels: int, classes: int | None, learned_variance: bool) -> Component:
    """The denoiser of a UNet2DModel. clip: p, q and r of clamp(p x + q output, -r, r). variance: the largest and the
    smallest logarithm that the U-Net may choose for the variance of a step."""
    plane = (channels, "height", "width")
    state = ("batch", SLOTS, *plane)
    labels = () if classes is None else (Tensor("class_labels", ("rows",), "int32", below=classes),)
    variance = (Tensor("variance", ("batch", 2), changes="step", solver=True),) if learned_variance else ()
    return Component(
        "denoiser",
        inputs=(
            Tensor("state", state, changes="step", fed_by="next_state"),
            Tensor("row_sample", ("rows",), "int32", below="batch"),
            Tensor("timestep", ("batch",), changes="step", below=1000, exact=True),
            Tensor("mixing", ("batch", "rows"), changes="step", solver=True),
            Tensor("rescale", ("batch", "rows"), below=1, solver=True),
            Tensor("update", ("batch", SLOTS, SLOTS + 3), changes="step", solver=True),
            Tensor("noise", ("batch", *plane), changes="step", solver=True),
            Tensor("clip", ("batch", 3), changes="step", solver=True),
            *labels,
            *variance,
        ),
        outputs=(Tensor("next_state", state),),
    )


STABLE_DIFFUSION = Family(
    "stable-diffusion",
    components=(
        _text_encoder(),
        _denoiser(LATENT_CHANNELS),
        _decoder(LATENT_CHANNELS, VAE_FACTOR),
        _encoder(LATENT_CHANNELS, VAE_FACTOR),
    ),
    channels=LATENT_CHANNELS,
    factor=VAE_FACTOR,
)
"""Stable Diffusion 1.x and 2.x, and latent diffusion with a text: other parts, the same graphs."""

FAMILIES = {family.name: family for family in (STABLE_DIFFUSION,)}
"""Those whose sizes are the same for every model, by the name in the manifest."""


@dataclass(frozen=True)
class Traits:
    """What differs between the models of a kind: channels of a latent, pixels per latent element, the number of classes
    if they have some, whether the U-Net predicts the variance too, the channels that are joined to each row, and the
    number of noise levels if the U-Net is told one."""

    channels: int
    factor: int
    classes: int | None = None
    learned_variance: bool = False
    concat: int = 0
    noise_levels: int | None = None

    @property
    def join(self) -> bool:
        """Whether these are those of a U-Net that sees more than latents: the upscaler's alone knows noise levels."""
        return self.concat in JOINS and (JOINS[self.concat] == "low_resolution") == (self.noise_levels is not None)

    @classmethod
    def of(cls, family: Family) -> Traits:
        return cls(
            family.channels,
            family.factor,
            family.classes,
            family.learned_variance,
            family.concat,
            family.noise_levels,
        )


def textless(traits: Traits) -> Family:
    """Models without texts: DDPM and Improved DDPM (factor 1), unconditional latent diffusion."""
    channels, factor = traits.channels, traits.factor
    denoiser = _textless_denoiser(channels, traits.classes, traits.learned_variance)
    return Family("textless", (denoiser, _decoder(channels, factor)), channels, factor, 0, traits.classes)


def joined(traits: Traits) -> Family:
    """Stable Diffusion with a U-Net that sees more than latents. The upscaler's sees pixels, so it has no encoder."""
    channels, factor, concat = traits.channels, traits.factor, traits.concat
    denoiser = _joined_denoiser(channels, concat, traits.noise_levels)
    components = [_text_encoder(), denoiser, _decoder(channels, factor)]
    if traits.noise_levels is None:
        components.append(_encoder(channels, factor))
    return Family(
        "stable-diffusion-joined",
        tuple(components),
        channels,
        factor,
        concat=concat,
        noise_levels=traits.noise_levels,
    )


KINDS: Mapping[str, Callable[[Traits], Family]] = {"textless": textless, "stable-diffusion-joined": joined}
"""Families that depend on the model, by the name in the manifest."""

COMPONENTS = frozenset(STABLE_DIFFUSION.names)
"""The names of the components of all families."""
