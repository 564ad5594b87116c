"""Turns pixels into what `output_type` asks for."""

from __future__ import annotations

from typing import Any

import numpy as np

from .bundle import Bundle
from .infotext import Settings, parameters_text
from .picture import Picture
from .request import Request
from .sampling.catalog import label_of, schedule_label
from .version import __version__


def finished_images(made: np.ndarray, request: Request, bundle: Bundle) -> Any:
    """Pixels [B, H, W, 3] uint8 become PIL images ("pil") or float32 in 0..1 ("np"). Latents ("latent") stay as they
    are."""
    if request.output_type == "latent":
        return made
    if request.inpaint is not None and request.init is not None:
        made = request.inpaint.finish(made, request.init, request.image_of, request.mask_of)
    if request.output_type == "np":
        return made.astype(np.float32) / 255
    return [Picture.from_pixels(pixels, parameters(request, bundle, i)) for i, pixels in enumerate(made)]


def parameters(request: Request, bundle: Bundle, index: int) -> str:
    """The parameters of picture number `index` of a call, in the form that A1111 writes."""
    seeds, text = request.seeds, index // request.images_per_prompt
    fields: dict[str, Any] = {
        "Steps": request.steps,
        "Sampler": label_of(request.sampling.sampler),
        **(request.guidance.parameters() if bundle.family.tokenizers else {}),
        "Seed": seeds[index if len(seeds) > 1 else 0],
        "Size": (request.width, request.height),
        "RNG": "CPU",
        "Model": bundle.name,
        "Precision": bundle.precision,
    }
    if request.sampling.schedule_type is not None:
        fields["Schedule type"] = schedule_label(request.sampling.schedule_type)
    if request.init is not None:
        fields["Denoising strength"] = request.init.strength
    label = request.class_labels[text]
    if label is not None:
        fields["Class"] = label
    if len(seeds) == 1 and index > 0:
        fields["Batch index"] = index
    fields["Version"] = f"LatentRT {__version__}"
    return parameters_text(Settings(request.prompts[text], request.negative_prompts[text], fields))
