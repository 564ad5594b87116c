"""Inpainting. With models of four channels, which were not made for it: after each step all that is outside of the
mask becomes the original again, with the noise of that step. With those of nine, which were: the U-Net sees the mask,
and latents of what it leaves of the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .beginnings import Begin, Beginning, DrawnOnce, Encode, Encoded, FirstNoise, Masked, begun
from .contract import Family
from .errors import ImageError, MaskError, MaskSizeError, OutputTypeError, shown
from .init_image import DEFAULT_STRENGTH as IMAGE_STRENGTH
from .init_image import InitImage
from .manifest import LARGEST_SIDE
from .masks import Crop, as_bytes, read_masks, whitened
from .sampling.noise import TorchGenerator
from .sampling.table import StepTable

if TYPE_CHECKING:
    from .request import Request

DEFAULT_STRENGTH = 1.0


@dataclass(frozen=True, eq=False)
class Inpaint:
    """What of the images of a call is repainted, checked.

    masks: each [H, W] uint8, of the images' size. composite: what is not white stays pixel for pixel. padding: that of
    the part around the mask, if that part alone is painted.
    """

    masks: tuple[np.ndarray, ...]
    composite: bool
    padding: int | None

    @classmethod
    def check(
        cls,
        family: Family,
        init: InitImage | None,
        mask_image: Any,
        composite: Any = False,
        padding_mask_crop: Any = None,
        output_type: Any = "pil",
    ) -> Inpaint | None:
        """Those arguments of a call; None without a mask. MaskError, MaskSizeError, ImageError or OutputTypeError."""
        if mask_image is None:
            _refuse_without_mask(composite, padding_mask_crop)
            return None
        if init is None:
            raise MaskError("mask_image says which part of an image is repainted; pass image too, or leave it out")
        if "mask" not in (family.joins, *family["denoiser"].input_names):
            which = "models of this kind" if family.tokenizers else "models without texts"
            raise MaskError(f"mask_image is given, and {which} repaint no part of an image; leave it out")
        masks = tuple(read_masks(mask_image))
        _require_size(masks, init.full_size(family.factor))
        if not isinstance(composite, (bool, np.bool_)):
            raise MaskError(f"composite is {shown(composite)}; it must be True or False")
        padding = _checked_padding(padding_mask_crop, max(len(init), len(masks)))
        for what, given in (("composite", composite), ("padding_mask_crop", padding is not None)):
            if given:
                _require_pixels(what, init, output_type)
        return cls(masks, bool(composite), padding)

    def crop(self, height: int, width: int) -> Crop | None:
        """The part that is painted at that size, None for all. MaskError for a black mask."""
        return None if self.padding is None else Crop.around(self.masks[0], self.padding, height, width)

    def pixels(self, init: InitImage, height: int, width: int) -> np.ndarray:
        """What is painted of the images as the VAE encoder takes it, [n, height, width, 3] float32 in -1..1."""
        crop = self.crop(height, width)
        if crop is None:
            return init.pixels(height, width)
        cut = np.stack([crop.cut(as_bytes(picture)) for picture in init.pictures])
        return 2 * (cut.astype(np.float32) / np.float32(255)) - 1

    def encoded(self, init: InitImage, height: int, width: int, of: tuple[int, ...], encode: Encode) -> Encoded:
        """What is painted of the images, through the VAE encoder."""
        if init.latents is not None:
            return Encoded(init.latents, None, of)
        return Encoded(*encode(self.pixels(init, height, width)), of)

    def begin(self, request: Request, plane: tuple[int, ...], encode: Encode) -> Begin:
        """Where the loops of a model of four channels start. `plane` is (C, h, w)."""
        init, height, width = request.init, request.height, request.width
        assert init is not None
        encoded = self.encoded(init, height, width, request.image_of, encode)
        masks = self.latent_masks(height, width, height // plane[1])
        return Masked(request.table, DrawnOnce(encoded), masks, request.mask_of, init.strength == 1)

    def white(self, height: int, width: int) -> np.ndarray:
        """Where what is painted is white, [m, height, width] bool."""
        crop = self.crop(height, width)
        cut = self.masks if crop is None else [crop.cut(mask) for mask in self.masks]
        return np.stack([whitened(mask, height, width) for mask in cut])

    def latent_masks(self, height: int, width: int, factor: int) -> np.ndarray:
        """The masks of latents, [m, 1, h, w] float32, 1 where they are repainted. The first pixel of each square of
        `factor` pixels decides, as in diffusers."""
        return self.white(height, width)[:, np.newaxis, ::factor, ::factor].astype(np.float32)

    def finish(
        self, painted: np.ndarray, init: InitImage, image_of: Sequence[int], mask_of: Sequence[int]
    ) -> np.ndarray:
        """The pictures of a call [B, H, W, 3] uint8, from what was painted and the image and the mask of each."""
        _, height, width, _ = painted.shape
        crop, made = self.crop(height, width), painted
        if crop is not None:
            wholes, masks = [as_bytes(picture) for picture in init.pictures], self.masks
            made = np.stack([crop.put_back(one, wholes[i], masks[m]) for one, i, m in zip(painted, image_of, mask_of)])
        if not self.composite:
            return made
        _, height, width, _ = made.shape
        originals = np.round((init.pixels(height, width) + 1) * 127.5).astype(np.uint8)[list(image_of)]
        white = np.stack([whitened(self.masks[m], height, width) for m in mask_of])
        return np.where(white[..., np.newaxis], made, originals)


@dataclass(frozen=True, eq=False)
class Repaint:
    """What a model of nine channels sees. As in StableDiffusionInpaintPipeline, an image's latents are drawn only if
    the loop begins with them, and those of a masked image after the noise; each once, by the first seed that needs it.
    """

    inpaint: Inpaint
    init: InitImage

    @classmethod
    def check(cls, inpaint: Inpaint, init: InitImage) -> Repaint:
        """ImageError for latents: the masked image's must be encoded."""
        _require_pixels("a model of nine channels", init, None)
        return cls(inpaint, init)

    def begin(self, request: Request, plane: tuple[int, ...], encode: Encode) -> Begin:
        """See `Seen`."""
        inpaint, height, width = self.inpaint, request.height, request.width
        pairs = list(dict.fromkeys(zip(request.image_of, request.mask_of)))
        of = tuple(pairs.index(pair) for pair in zip(request.image_of, request.mask_of))
        pixels, white = inpaint.pixels(self.init, height, width), inpaint.white(height, width)
        masked = np.stack([np.where(white[mask][..., np.newaxis], 0, pixels[image]) for image, mask in pairs])
        originals = None
        if self.init.strength < 1:
            originals = DrawnOnce(Encoded(*encode(pixels), request.image_of))
        masks = inpaint.latent_masks(height, width, height // plane[1])
        drawn = DrawnOnce(Encoded(*encode(masked.astype(np.float32)), of))
        return Repainting(request.table, plane, originals, drawn, masks[[mask for _, mask in pairs]])

    def parameters(self) -> Mapping[str, Any]:
        """See `Seen`."""
        return {}


@dataclass(frozen=True, eq=False)
class Repainting:
    """Loops of a model of nine channels. originals: None for loops that begin with noise alone; masked: the masked
    images; masks [n, 1, h, w]: those of these."""

    table: StepTable
    plane: tuple[int, ...]
    originals: DrawnOnce | None
    masked: DrawnOnce
    masks: np.ndarray

    def __call__(self, generator: TorchGenerator, pictures: range, noise: FirstNoise) -> list[Beginning]:
        original = np.zeros((len(pictures), *self.plane), np.float32)
        if self.originals is not None:
            original = self.originals.draw(generator, pictures)
        latents = begun(self.table, original, noise(original.shape), self.originals is None)
        left = self.masked.draw(generator, pictures)
        masks = [self.masks[self.masked.encoded.of[picture]] for picture in pictures]
        seen = [{"concat": np.concatenate(one)} for one in zip(masks, left)]
        return [Beginning(start, seen=one) for start, one in zip(latents, seen)]


def check_beginning(
    family: Family,
    image: Any,
    strength: Any,
    mask_image: Any,
    composite: Any,
    padding_mask_crop: Any,
    output_type: Any = "pil",
) -> tuple[InitImage | None, Inpaint | None]:
    """What a call starts from and what of it is repainted, by its arguments. Raises what both `check` methods raise."""
    part = mask_image is not None or family.begins_with_noise
    default = DEFAULT_STRENGTH if part else IMAGE_STRENGTH
    init = InitImage.check(image, strength, family, default)
    return init, Inpaint.check(family, init, mask_image, composite, padding_mask_crop, output_type)


def _refuse_without_mask(composite: Any, padding: Any) -> None:
    if padding is not None or composite is not False:
        given = "composite" if padding is None else "padding_mask_crop"
        raise MaskError(
            f"{given} is about a mask; pass mask_image, of which the white part is repainted, or leave it out"
        )


def _require_size(masks: Sequence[np.ndarray], size: tuple[int, int]) -> None:
    for mask in masks:
        if mask.shape != size:
            raise MaskSizeError(
                f"mask_image is {mask.shape[1]} x {mask.shape[0]} pixels and image {size[1]} x {size[0]}; make the "
                "mask as large as the image"
            )


def _require_pixels(what: str, init: InitImage, output_type: Any) -> None:
    """`what` puts the image's pixels back, so there must be some."""
    if init.latents is not None:
        raise ImageError(f"{what} needs the image's pixels, and image holds latents; pass the picture")
    if output_type == "latent":
        raise OutputTypeError(f"{what} puts the image's pixels back, and output_type is 'latent'; take 'pil' or 'np'")


def _checked_padding(value: Any, count: int) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value <= LARGEST_SIDE:
        raise MaskError(f"padding_mask_crop is {shown(value)}; it must be an integer from 0 to {LARGEST_SIDE}")
    if count > 1:
        raise MaskError(f"padding_mask_crop takes one image and one mask, and here are {count}; make a call for each")
    return int(value)
