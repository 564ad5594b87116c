"""What the command line says about finished pictures. Nothing in a manifest is taken for granted here: the pictures are
there already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipeline import Result


def summarize(manifest: Mapping[str, Any], description: str, results: Sequence[Result]) -> str:
    """Seeds, backend, times and how far the bundle is from diffusers, in lines. `description` is the pipeline's."""
    seeds = sorted({seed for result in results for seed in result.seeds})
    named = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    graphs = ", CUDA graph" if results[0].timings["path"] == "cuda_graph" else ""
    return "\n".join([f"{named}; {description}{graphs}", times(results), *verification(manifest, description)])


def times(results: Sequence[Result]) -> str:
    """The time of each stage, over all calls. Preparing the loop (compiling for a size, copies) is separate from its
    steps."""
    steps = [step for result in results for step in result.timings["steps"]]

    def milliseconds(stage: str) -> float:
        return 1000 * sum(result.timings[stage] for result in results)

    return (
        f"tokenize {milliseconds('tokenize'):.1f} ms, text encoder {milliseconds('text_encoder'):.1f} ms, "
        f"preparing the loop {milliseconds('prepare'):.1f} ms, "
        f"{len(steps)} steps of {1000 * sum(steps) / max(1, len(steps)):.1f} ms, VAE decoder "
        f"{milliseconds('vae_decoder'):.1f} ms, "
        f"total {milliseconds('total'):.1f} ms"
    )


def verification(manifest: Mapping[str, Any], description: str) -> list[str]:
    """The bundle's difference from diffusers when it was built, the backend that it was measured with, and whether this
    run used another."""
    entry = _part(manifest, "verification")
    if entry.get("done") is not True:
        reason = entry.get("reason")
        return [
            "this bundle was not compared with diffusers "
            f"({reason if isinstance(reason, str) and reason else 'it was built with --no-verify'})"
        ]
    backend = str(entry.get("backend", "ONNX Runtime on the CPU"))
    precision = entry.get("precision", manifest.get("precision"))
    lines = [f"when built, {backend} in {precision} made diffusers' picture{_differences(_part(entry, 'picture'))}"]
    parts = description.partition(" (")[2]
    decibels = _part(_part(manifest, "openvino"), "picture").get("psnr_db")
    if "bf16" in parts and _is_number(decibels):
        lines.append(
            f"this run was partly in bf16; against fp32, pictures had {decibels:.1f} dB PSNR that way when these parts "
            "were chosen"
        )
    elif not _same(backend, description.partition(" (")[0], "backend" in entry):
        lines.append(f"this run used {description}, which was not compared")
    return lines


def _same(measured: str, used: str, exact: bool) -> bool:
    """Whether this run used the backend that the difference was measured with. Bundles of older versions do not name
    the version of ONNX Runtime."""
    return measured == used if exact else used.startswith("ONNX Runtime") and used.endswith("on the CPU")


def _differences(picture: Mapping[str, Any]) -> str:
    formats = {
        "pixels_within_1": "{:.2%} of the values within 1 of 255",
        "psnr_db": "PSNR {:.1f} dB",
        "latents_max_abs": "latents within {:.1e}",
    }
    found = [text.format(picture[key]) for key, text in formats.items() if _is_number(picture.get(key))]
    how = [
        text.format(picture[key])
        for key, text in {"steps": "{} steps", "scheduler": "{}", "seed": "seed {}"}.items()
        if key in picture
    ]
    return (f": {', '.join(found)}" if found else "") + (f" ({', '.join(how)})" if how else "")


def _part(entry: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = entry.get(key)
    return value if isinstance(value, Mapping) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)
