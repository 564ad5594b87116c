"""What a bundle was made of, for the sides that are not ours: the same weights as a diffusers folder, and the same sampler."""
from __future__ import annotations

from pathlib import Path

from benchmarks.errors import BenchmarkUsageError
from benchmarks.sides import SCHEDULERS
from engine.bundle import Bundle
from engine.errors import UnknownSchedulerError
from engine.samplers import sampler_name
from engine.schedule import Schedule


def model_folder(bundle: Bundle, given: Path | None, cache: Path) -> Path:
    """The diffusers folder of the bundle's model: `given`, the built-in one, or one that is written to `cache` first.

    Raises BenchmarkUsageError where only the user knows it, and the errors of export/errors.py.
    """
    if given is not None:
        return given
    origin = bundle.manifest["source"]
    if origin["kind"] not in ("built-in", "random", "hub"):
        raise BenchmarkUsageError(f"the bundle {bundle.folder} was made of the {origin['kind']} {origin['id']!r}; pass where the same model lies in the "
                                  f"diffusers layout with --model, or --against '' to measure without others")
    from export.libraries import quiet_libraries
    quiet_libraries()
    from export.checkpoint import BUILT_IN, DiffusersFolder, resolve
    if origin["kind"] == "built-in":
        return BUILT_IN
    source = resolve(origin["id"], random_weights=origin["kind"] == "random")
    if isinstance(source, DiffusersFolder):
        return source.folder
    folder = cache / f"{source.name}-{source.fingerprint('unet')[:12]}"
    if not folder.is_dir():
        unfinished = folder.with_name(f".{folder.name}.tmp")
        source.pipeline().save_pretrained(unfinished)
        unfinished.rename(folder)
    return folder


def sampler_of(bundle: Bundle) -> str:
    """The model's own sampler, DDIM where diffusers' class needs options for it."""
    try:
        name = sampler_name(None, Schedule.from_config(bundle.scheduler))
    except UnknownSchedulerError:
        return "ddim"
    return name if name in SCHEDULERS else "ddim"
