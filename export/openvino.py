"""Which components of a bundle may run in bfloat16 on OpenVINO: measured on this CPU, once, and written into the
manifest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine import Pipeline
from engine.backends.openvino.backend import OpenVinoBackend
from engine.bundle import Bundle
from engine.contract import COMPONENTS

from . import verify
from .compare import as_json
from .errors import VerificationError

PICTURE_PSNR = 35.0
"""dB, the least that a picture with components in bfloat16 must have beside the same one in float32."""

HALVED = ("denoiser", "vae_decoder", "vae_encoder")
"""What may run in bfloat16. The text encoder takes a thousandth of a picture's time, and every step sees its errors."""

Report = Callable[[str], None]


def choose_precision(
    folder: Path, reference: Callable[[str], verify.Reference], steps: int, seeds: Sequence[int], report: Report
) -> dict[str, Any]:
    """The manifest's entry "openvino" for the bundle in `folder`.

    Every component must equal torch within the tolerance of the bundle's precision, or VerificationError. bfloat16 is
    chosen for those that stay within its own tolerance, as long as pictures with them keep PICTURE_PSNR beside
    float32's; the component whose picture is worst goes first. `reference` computes a component's inputs and outputs
    with torch.
    """
    bundle = Bundle.open(folder, verify=False)
    backend = OpenVinoBackend(bundle.graphs)
    has_bf16 = backend.has_bf16()
    entry: dict[str, Any] = {
        "library": backend.description.split(" (")[0],
        "processor": backend.processor(),
        "components": {},
        "precision": dict.fromkeys(COMPONENTS, "fp32"),
    }
    for component in COMPONENTS:
        expected = reference(component)
        found = {
            "fp32": as_json(
                verify.check_component(component, OpenVinoBackend(bundle.graphs), expected, bundle.precision)
            )
        }
        if has_bf16 and component in HALVED:
            try:
                halved = OpenVinoBackend(bundle.graphs, precision={component: "bf16"})
                found["bf16"] = as_json(verify.check_component(component, halved, expected, "bf16"))
                entry["precision"][component] = "bf16"
            except VerificationError as error:
                report(f"openvino: {component} stays in fp32: {error}")
        entry["components"][component] = found
    entry["picture"] = _check_pictures(bundle, entry["precision"], steps, seeds)
    words = ", ".join(f"{component} {precision}" for component, precision in entry["precision"].items())
    report(f"openvino: {words}; PSNR {entry['picture']['psnr_db']} dB beside fp32's picture")
    return entry


def _check_pictures(bundle: Bundle, precision: dict[str, str], steps: int, seeds: Sequence[int]) -> dict[str, Any]:
    """Takes bfloat16 from components, the worst first, until the pictures are right: the PSNRs."""
    exact = _pictures(bundle, {}, steps, seeds)
    alone = {
        component: _psnr(exact, _pictures(bundle, {component: "bf16"}, steps, seeds))
        for component in ("denoiser", "vae_decoder")
        if precision[component] == "bf16"
    }
    together = 99.0
    for component in [None, *sorted(alone, key=lambda name: alone[name])]:
        if component:
            precision[component] = "fp32"
        together = _psnr(exact, _pictures(bundle, precision, steps, seeds))
        if together >= PICTURE_PSNR:
            break
    return {"steps": steps, "seeds": list(seeds), "psnr_db": together, "psnr_db_of_each_alone": alone}


def _pictures(bundle: Bundle, precision: dict[str, str], steps: int, seeds: Sequence[int]) -> list[np.ndarray]:
    """Pixels of parity's picture from each seed. The components are loaded at the bundle's best size."""
    backend = OpenVinoBackend(bundle.graphs, bundle.shapes, precision=precision)
    with Pipeline(bundle, backend) as pipeline:
        scheduler = verify.scheduler_of(bundle)
        return [
            np.asarray(image)
            for seed in seeds
            for image in pipeline(
                verify.PROMPT,
                num_inference_steps=steps,
                guidance_scale=verify.GUIDANCE,
                num_images_per_prompt=bundle.shapes.batch.min,
                seed=seed,
                scheduler=scheduler,
                progress=False,
            ).images
        ]


def _psnr(exact: Sequence[np.ndarray], pictures: Sequence[np.ndarray]) -> float:
    """The worst of several pictures, in dB."""
    return round(min(verify.psnr(actual, expected) for actual, expected in zip(pictures, exact)), 1)
