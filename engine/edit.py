"""InstructPix2Pix (arXiv 2211.09800): a U-Net that sees the picture that it changes, and is guided by text and
picture. StableDiffusionInstructPix2PixPipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .beginnings import Begin, Encode, Encoded, from_noise, seeing
from .checks import MAX_GUIDANCE, check_number
from .job import Row, Texts, guided

if TYPE_CHECKING:
    from .request import Request

DEFAULT_SCALE = 1.5


@dataclass(frozen=True)
class Edit:
    """How closely the pictures of a call follow the image that they are made of."""

    scale: float

    @classmethod
    def check(cls, image_guidance_scale: Any) -> Edit:
        """GuidanceError for what is no number from 1 up; without one it is DEFAULT_SCALE."""
        if image_guidance_scale is None:
            return cls(DEFAULT_SCALE)
        most, usual = MAX_GUIDANCE, "1.2 to 2 are usual; guidance_scale=1 is without guidance"
        return cls(check_number(image_guidance_scale, "image_guidance_scale", 1.0, most, usual))

    def rows(
        self, prompts: Sequence[tuple[Texts, float]], negative: Texts | None, scales: np.ndarray, rescale: float = 0.0
    ) -> tuple[Row, ...]:
        """The rows of one picture: of neither image nor text, of the image, and of both. The guided output is
        none + s_I (image - none) + s_T (both - image), equation 3. Where scales[i] is 1 only both are evaluated."""
        if negative is None:
            return guided(prompts, None, scales, rescale)
        image, *both = guided(prompts, negative, scales, rescale)
        whole = scales > 1
        none = np.where(whole, 1 - self.scale, 0.0)
        return Row(negative, none, blind=True), Row(negative, image.weight - none), *both

    def begin(self, request: Request, plane: tuple[int, ...], encode: Encode) -> Begin:
        """See `Seen`. The U-Net sees the mean of the image's latents, as in diffusers."""
        assert request.init is not None
        encoded = Encoded.of_images(request.init, request.height, request.width, request.image_of, encode)
        return seeing(from_noise(request.table, plane), [{"concat": encoded.mean[image]} for image in encoded.of])

    def parameters(self) -> Mapping[str, Any]:
        """See `Seen`."""
        return {"Image CFG scale": self.scale}
