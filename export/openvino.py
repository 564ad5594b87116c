"""Measures on this CPU which components of a bundle may run in bfloat16 on OpenVINO, for the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine import Pipeline
from engine.backends.openvino.backend import OpenVinoBackend
from engine.bundle import Bundle

from . import oracles, verify
from .building import Report
from .compare import as_json
from .errors import VerificationError
from .verify import Reference

PICTURE_PSNR = 35.0
"""The least PSNR in dB of pictures with components in bfloat16 against the same pictures in float32."""


def choose_precision(
    folder: Path, references: Mapping[str, Reference], steps: int, seeds: Sequence[int], report: Report
) -> dict[str, Any]:
    """The manifest's entry "openvino" for the bundle in `folder`.

    Every component must equal torch within the tolerance of the bundle's precision, or VerificationError. bfloat16 is
    chosen for those that stay within its own tolerance, as long as pictures with them keep PICTURE_PSNR beside
    float32's; the component whose picture is worst goes first. `references` has inputs and outputs of each component
    that is there.
    """
    bundle = Bundle.open(folder, verify=False)
    backend = OpenVinoBackend(bundle.graphs, family=bundle.family)
    found, precision, has_bf16 = {}, dict.fromkeys(bundle.graphs, "fp32"), backend.has_bf16()
    for name in bundle.graphs:
        found[name] = _check_both(bundle, name, references[name], has_bf16, report)
        if "bf16" in found[name]:
            precision[name] = "bf16"
    picture = _check_pictures(bundle, precision, steps, seeds)
    words = ", ".join(f"{component} {chosen}" for component, chosen in precision.items())
    report(f"openvino: {words}; PSNR {picture['psnr_db']} dB against fp32's picture")
    return {
        "library": backend.description.split(" (")[0],
        "processor": backend.processor(),
        "components": found,
        "precision": precision,
        "picture": picture,
    }


def _check_both(
    bundle: Bundle, name: str, expected: Reference, has_bf16: bool, report: Report
) -> dict[str, dict[str, Any]]:
    """The difference between a component and torch in float32, and in bfloat16 if that is within its tolerance."""
    component = bundle.family[name]
    exact = verify.check_component(
        component, OpenVinoBackend(bundle.graphs, family=bundle.family), expected, bundle.precision
    )
    found = {"fp32": as_json(exact)}
    if has_bf16 and component.halves:
        halved = OpenVinoBackend(bundle.graphs, precision={name: "bf16"}, family=bundle.family)
        try:
            found["bf16"] = as_json(verify.check_component(component, halved, expected, "bf16"))
        except VerificationError as error:
            report(f"openvino: {name} stays in fp32: {error}")
    return found


def _check_pictures(bundle: Bundle, precision: dict[str, str], steps: int, seeds: Sequence[int]) -> dict[str, Any]:
    """Sets components back to float32, the worst first, until the pictures are within the tolerance. Returns the
    PSNRs."""
    exact = _pictures(bundle, {}, steps, seeds)
    alone = {
        component: _psnr(exact, _pictures(bundle, {component: "bf16"}, steps, seeds))
        for component in bundle.family.required
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
    """Pixels of the verification's prompt for each seed, at the bundle's best size."""
    backend = OpenVinoBackend(bundle.graphs, bundle.shapes, precision=precision, family=bundle.family)
    with Pipeline(bundle, backend) as pipeline:
        scheduler, subjects = verify.scheduler_of(bundle), verify.subjects_of(bundle.family)
        height, width = bundle.shapes.height.opt, bundle.shapes.width.opt
        return [
            np.asarray(image)
            for seed in seeds
            for image in pipeline(
                **subjects.call([subjects.values[0]] * bundle.shapes.batch.min),
                **oracles.beside_text(bundle.family.joins, height, width, bundle.shapes.batch.min),
                num_inference_steps=steps,
                seed=seed,
                scheduler=scheduler,
                progress=False,
            ).images
        ]


def _psnr(exact: Sequence[np.ndarray], pictures: Sequence[np.ndarray]) -> float:
    """The lowest PSNR of several pictures, in dB."""
    return round(min(verify.psnr(actual, expected) for actual, expected in zip(pictures, exact)), 1)
