"""What a U-Net sees beside the latents: the part of a call's arguments that fills those channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from .beginnings import Begin, Encode
from .contract import Family
from .depth import Depth
from .edit import Edit
from .errors import ChannelsError
from .init_image import InitImage
from .inpainting import Inpaint, Repaint
from .sampling.schedule import Schedule
from .upscale import Upscale

if TYPE_CHECKING:
    from .request import Request

MODELS = {
    "depth": "a depth model (5 channels)",
    "low_resolution": "the x4 upscaler (7 channels)",
    "image": "InstructPix2Pix (8 channels)",
    "mask": "an inpainting model (9 channels)",
}
"""What users call the models, by what their U-Net sees beside the latents."""

NEEDED = {
    "depth": "image and depth_map",
    "low_resolution": "image, the picture to make larger",
    "image": "image, the picture to change",
    "mask": "image and mask_image",
}
"""The arguments without which such a model makes no picture."""


class Seen(Protocol):
    """Those arguments, checked."""

    def begin(self, request: Request, plane: tuple[int, ...], encode: Encode) -> Begin:
        """Where the loops of a request start, and what each row sees. `plane` is (C, h, w)."""

    def parameters(self) -> Mapping[str, Any]:
        """Its fields in a picture's parameters."""


def check_seen(
    family: Family,
    low_resolution: tuple[Schedule, int] | None,
    init: InitImage | None,
    inpaint: Inpaint | None,
    depth_map: Any = None,
    image_guidance_scale: Any = None,
    noise_level: Any = None,
) -> Seen | None:
    """What a call gives the U-Net to see; None for a model that sees latents alone. ChannelsError for an argument about
    channels that the model does not have, and for channels that the call gives nothing for. Raises what `check` of the
    models' own raises."""
    own = {"depth_map": "depth", "image_guidance_scale": "image", "noise_level": "low_resolution"}
    given = {"depth_map": depth_map, "image_guidance_scale": image_guidance_scale, "noise_level": noise_level}
    for name, value in given.items():
        if value is not None and family.joins != own[name]:
            raise ChannelsError(
                f"{name} is about channels that this model's U-Net does not have: it is for {MODELS[own[name]]}; leave "
                "it out, or take a bundle of such a model"
            )
    if family.joins is None:
        return None
    missing = init is None or (family.joins == "mask" and inpaint is None)
    if init is None or missing or (family.joins == "depth" and depth_map is None):
        raise ChannelsError(
            f"this is {MODELS[family.joins]}, which makes no picture of a text alone; pass {NEEDED[family.joins]}, or "
            "take a bundle of a text-to-image model"
        )
    if family.joins == "depth":
        return Depth.check(depth_map)
    if family.joins == "image":
        return Edit.check(image_guidance_scale)
    if low_resolution is not None:
        return Upscale.check(noise_level, *low_resolution)
    assert inpaint is not None
    return Repaint.check(inpaint, init)
