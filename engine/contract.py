"""What the exporter and the runtime agree on: the graphs, their inputs and outputs, and the sizes they are good for.

    text_encoder  input_ids [rows, 77] int32                         -> context [rows, 77, C]
    denoiser      state [batch, K, 4, height, width], row_sample [rows] int32, context [rows, tokens, C],
                  timestep [rows], mixing [batch, rows], update [batch, K, K+2], noise [batch, 4, height, width]
                                                                     -> next_state [batch, K, 4, height, width]
    vae_decoder   latents [batch, 4, height, width]                  -> image [batch, 8 height, 8 width, 3] uint8,
                  magnitude [batch]
    vae_encoder   image [batch, 8 height, 8 width, 3] uint8          -> mean, std [batch, 4, height, width]

float32 unless said otherwise; height and width are those of the latents. The denoiser is one whole step: it evaluates
the U-Net on slot 0 of the state, row by row, combines the rows' outputs per sample (guidance) and applies the sampler,
`next_state = update @ [state; output; noise]`. `magnitude` is a sum over the decoder's absolute values: it is finite if
they all are, which pixels cannot tell. The rows of a sample have one timestep, so that what does not depend on the text
may be computed once for them.
"""

from __future__ import annotations

from dataclasses import dataclass

SLOTS = 4
"""K: how many latent-sized tensors a sampler may remember. Slot 0 is the latent itself, scaled to unit variance
(VP)."""

LATENT_CHANNELS = 4
VAE_FACTOR = 8
"""Pixels per latent element, in both directions."""

PROMPT_TOKENS = 77
MAX_STEPS = 1000

COMPONENTS = ("text_encoder", "denoiser", "vae_decoder", "vae_encoder")

INPUTS: dict[str, tuple[str, ...]] = {
    "text_encoder": ("input_ids",),
    "denoiser": ("state", "row_sample", "context", "timestep", "mixing", "update", "noise"),
    "vae_decoder": ("latents",),
    "vae_encoder": ("image",),
}
OUTPUTS: dict[str, tuple[str, ...]] = {
    "text_encoder": ("context",),
    "denoiser": ("next_state",),
    "vae_decoder": ("image", "magnitude"),
    "vae_encoder": ("mean", "std"),
}

INTEGERS = {"input_ids": "int32", "row_sample": "int32", "image": "uint8"}
"""The tensors that are not float32."""


def dtype(tensor: str) -> str:
    """The type of an input's or output's elements."""
    return INTEGERS.get(tensor, "float32")


@dataclass(frozen=True)
class Range:
    """Sizes that a bundle was built for, ends included; `opt` is the one that it is best at."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise ValueError(f"a range is MIN <= OPT <= MAX from 1 up, not {self.min}:{self.opt}:{self.max}")

    def __contains__(self, value: int) -> bool:
        return self.min <= value <= self.max

    def __str__(self) -> str:
        return str(self.opt) if self.static else f"{self.min}:{self.opt}:{self.max}"

    @property
    def static(self) -> bool:
        return self.min == self.max


@dataclass(frozen=True)
class Shapes:
    """Height and width in pixels and number of pictures per call that a bundle or a plan serves; `rows` are the U-Net's
    rows for one call (with guidance twice the pictures), None where every number is served."""

    height: Range
    width: Range
    batch: Range
    rows: Range | None = None

    def __str__(self) -> str:
        rows = "" if self.rows is None else f", {self.rows} U-Net rows"
        return f"{self.height} x {self.width}, batch {self.batch}{rows}"

    def allows(self, height: int, width: int, batch: int, rows: int) -> bool:
        """Whether one call of these sizes is served."""
        return (
            height in self.height
            and width in self.width
            and batch in self.batch
            and (self.rows is None or rows in self.rows)
        )

    def static(self) -> dict[str, int]:
        """The graphs' dimensions that never change, by name."""
        sizes = {"height": (self.height, VAE_FACTOR), "width": (self.width, VAE_FACTOR), "batch": (self.batch, 1)}
        return {name: side.opt // unit for name, (side, unit) in sizes.items() if side.static}
