"""Turns pixels into what `output_type` asks for."""

from __future__ import annotations

from typing import Any

import numpy as np

from .bundle import Bundle
from .hires import Hires
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
    if request.init is not None and not bundle.family.begins_with_noise:
        fields["Denoising strength"] = request.init.strength
    if request.seen is not None:
        fields |= request.seen.parameters()
    if request.variation is not None:
        fields["Variation seed"], fields["Variation seed strength"] = request.variation.of(index)
    if request.hires is not None and request.second is not None:
        fields |= second_pass_parameters(request.hires, request, request.second, text)
    label = request.class_labels[text]
    if label is not None:
        fields["Class"] = label
    if len(seeds) == 1 and index > 0:
        fields["Batch index"] = index
    fields["Version"] = f"LatentRT {__version__}"
    return parameters_text(Settings(request.prompts[text], request.negative_prompts[text], fields))


def second_pass_parameters(hires: Hires, first: Request, second: Request, text: int) -> dict[str, Any]:
    """What A1111 writes about a second pass."""
    fields = hires.parameters()
    if "Hires upscale" not in fields:
        fields["Hires resize"] = second.width, second.height
    if second.sampling.sampler != first.sampling.sampler:
        fields["Hires sampler"] = label_of(second.sampling.sampler)
    if second.guidance.scale != first.guidance.scale:
        fields["Hires CFG Scale"] = second.guidance.scale
    for key, own, before in (
        ("Hires prompt", second.prompts, first.prompts),
        ("Hires negative prompt", second.negative_prompts, first.negative_prompts),
    ):
        if own[text] != before[text]:
            fields[key] = own[text]
    return fields
