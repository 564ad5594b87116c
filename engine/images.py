"""Turns pixels into what `output_type` asks for."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from .bundle import Bundle
from .hires import Hires
from .infotext import SAMPLER_OPTIONS, Settings, parameters_text
from .picture import Picture
from .record import Model, Record
from .record_fields import plain, written
from .request import Request, Sampling
from .sampling.catalog import label_of, schedule_label
from .version import __version__


def finished_images(
    made: np.ndarray, request: Request, bundle: Bundle, backend: str, interrupted: bool, loaded: str = ""
) -> Any:
    """Pixels [B, H, W, 3] uint8 become PIL images ("pil") or float32 in 0..1 ("np"). Latents ("latent") stay as they
    are. PIL images hold their settings, with `backend` and what was `loaded` as what made them, unless the request is
    without metadata."""
    if request.output_type == "latent":
        return made
    if request.inpaint is not None and request.init is not None:
        made = request.inpaint.finish(made, request.init, request.image_of, request.mask_of)
    if request.output_type == "np":
        return made.astype(np.float32) / 255
    if not request.metadata:
        return [Image.fromarray(pixels) for pixels in made]
    model, texts = Model.of(bundle, backend, loaded), bool(bundle.family.tokenizers)
    records = Record.of_call(request, texts, model, interrupted)
    return [
        Picture.from_pixels(pixels, parameters(request, bundle, index), record.content())
        for index, (pixels, record) in enumerate(zip(made, records))
    ]


def parameters(request: Request, bundle: Bundle, index: int) -> str:
    """The parameters of picture number `index` of a call, in the form that A1111 writes."""
    seeds, text = request.seeds, index // request.images_per_prompt
    fields: dict[str, Any] = {
        "Steps": request.steps,
        **_sampling_fields(request.sampling),
        **(request.guidance.parameters() if bundle.family.tokenizers else {}),
        "Seed": seeds[index if len(seeds) > 1 else 0],
        "Size": (request.width, request.height),
        "RNG": "CPU",
        "Model": bundle.name,
        "Precision": bundle.precision,
    }
    fields |= written(request, index)
    if request.variation is not None:
        fields["Variation seed"], fields["Variation seed strength"] = request.variation.of(index)
    if request.hires is not None and request.second is not None:
        fields |= second_pass_parameters(request.hires, request, request.second, text)
    if len(seeds) == 1 and request.batch > 1:
        fields |= {"Batch size": request.batch, "Batch index": index}
    fields["Version"] = f"LatentRT {__version__}"
    return parameters_text(Settings(request.prompts[text], request.negative_prompts[text], fields))


def second_pass_parameters(hires: Hires, first: Request, second: Request, text: int) -> dict[str, Any]:
    """What A1111 writes about a second pass."""
    fields = hires.parameters()
    if "Hires upscale" not in fields:
        fields["Hires resize"] = second.width, second.height
    if second.sampling.sampler != first.sampling.sampler:
        label = label_of(second.sampling.sampler)
        fields["Hires sampler"] = label
        if second.sampling.sampler != label:
            fields["Hires scheduler"] = second.sampling.sampler
    if second.guidance.scale != first.guidance.scale:
        fields["Hires CFG Scale"] = second.guidance.scale
    for key, own, before in (
        ("Hires prompt", second.prompts, first.prompts),
        ("Hires negative prompt", second.negative_prompts, first.negative_prompts),
    ):
        if own[text] != before[text]:
            fields[key] = own[text]
    return fields


def _sampling_fields(sampling: Sampling) -> dict[str, Any]:
    """The sampler by A1111's label, and by our name where that means diffusers' sampler. A1111 has no key for a call's
    own grid."""
    label = label_of(sampling.sampler)
    fields: dict[str, Any] = {"Sampler": label}
    if sampling.schedule_type is not None:
        fields["Schedule type"] = schedule_label(sampling.schedule_type)
    if sampling.sampler != label:
        fields["Scheduler"] = sampling.sampler
    if sampling.eta:
        fields["Eta DDIM"] = sampling.eta
    options = dict(sampling.options)
    fields |= {key: plain(options[option]) for key, option in SAMPLER_OPTIONS.items() if option in options}
    for key, numbers in (("Timesteps", sampling.timesteps), ("Sigmas", sampling.sigmas)):
        if numbers is not None:
            fields[key] = " ".join(f"{number:.17g}" for number in numbers)
    return fields
