"""Families that no model has: one with an input more, one with a component less. They show that what handles a graph's
tensors reads them off the contract.

    with known(family):                         manifests may name it
        folder = build_bundle(family, source, output)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

from engine.contract import Family, Tensor
from engine.family import FAMILIES, STABLE_DIFFUSION
from export.build import build, default_shapes
from export.graphs.denoiser import Denoiser, advance, guide, inpaint
from export.graphs.recipes import RECIPES, Recipe, Recipes
from export.sources.source import Source

TINT = Tensor("tint", ("batch", STABLE_DIFFUSION.channels, "height", "width"))
"""Added to what the U-Net sees of a sample. It has a value for each loop."""


class TintedDenoiser(Denoiser):
    """The denoiser with one input more."""

    def forward(
        self,
        state: torch.Tensor,
        row_sample: torch.Tensor,
        context: torch.Tensor,
        timestep: torch.Tensor,
        mixing: torch.Tensor,
        rescale: torch.Tensor,
        update: torch.Tensor,
        blend: torch.Tensor,
        noise: torch.Tensor,
        mask: torch.Tensor,
        original: torch.Tensor,
        start_noise: torch.Tensor,
        tint: torch.Tensor,
    ) -> torch.Tensor:
        output = self.predict(state[:, 0] + tint, row_sample, context, timestep)
        next_state = advance(state, guide(output, mixing, rescale), update, noise)
        return inpaint(next_state, mask, original, start_noise, blend)


def tinted_family() -> Family:
    """Stable Diffusion whose denoiser takes TINT too."""
    denoiser = STABLE_DIFFUSION["denoiser"]
    tinted = replace(denoiser, inputs=(*denoiser.inputs, TINT))
    components = [tinted if one is denoiser else one for one in STABLE_DIFFUSION.components]
    return replace(STABLE_DIFFUSION, name="tinted", components=tuple(components))


def without_encoder_family() -> Family:
    """Stable Diffusion without the VAE's encoder."""
    components = [one for one in STABLE_DIFFUSION.components if one.name != "vae_encoder"]
    return replace(STABLE_DIFFUSION, name="without-encoder", components=tuple(components))


def recipes_of(family: Family) -> Recipes:
    """How the graphs of one of these families are made."""
    tinted = TINT in family["denoiser"].inputs
    return {**RECIPES, "denoiser": Recipe("unet", TintedDenoiser if tinted else Denoiser, fuses=True)}


@contextmanager
def known(family: Family) -> Iterator[None]:
    """Manifests that name the family can be written and read meanwhile."""
    with patch.dict(FAMILIES, {family.name: family}):
        yield


def build_bundle(family: Family, source: Source, output: Path) -> Path:
    """A bundle of a tiny model of that family, called after it: only its own graphs are traced where `output` has a
    bundle of the model. It is not verified: diffusers knows no tint."""
    named = patch.object(source, "name", f"{source.name}-{family.name}")
    with known(family), named:
        return build(
            source,
            output,
            "fp32",
            default_shapes(64),
            verify=False,
            report=lambda message: None,
            family=family,
            recipes=recipes_of(family),
        ).folder
