"""The model of a bundle for the sides that are not ours: a diffusers folder with the same weights, and the same
sampler."""

from __future__ import annotations

import atexit
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp

from benchmarks.errors import BenchmarkUsageError
from benchmarks.options import check_room
from benchmarks.sides import SCHEDULERS
from engine.bundle import Bundle
from engine.errors import UnknownSchedulerError
from engine.sampling.catalog import sampler_name
from engine.sampling.schedule import Schedule


def model_folder(bundle: Bundle, given: Path | None, cache: Path | None) -> Path:
    """The diffusers folder of the bundle's model: `given`, the built-in one, or one that is written first: to `cache`,
    or without one to a temporary folder that is removed at the end of the process.

    Raises BenchmarkUsageError where only the user knows it, and the errors of export/errors.py.
    """
    if given is not None:
        return given
    origin = bundle.manifest["source"]
    if origin["kind"] not in ("built-in", "random", "hub"):
        raise BenchmarkUsageError(
            f"the bundle {bundle.folder} was made of the {origin['kind']} {origin['id']!r}; pass the same "
            "model's folder in the diffusers layout with --model, or --against '' to measure without others"
        )
    from export.libraries import quiet_libraries

    quiet_libraries()
    from export.sources.checkpoint import BUILT_IN, DiffusersFolder, resolve

    if origin["kind"] == "built-in":
        return BUILT_IN
    source = resolve(origin["id"], random_weights=origin["kind"] == "random")
    if isinstance(source, DiffusersFolder):
        return source.folder
    folder = (cache or temporary_folder()) / f"{source.name}-{source.fingerprint('unet')[:12]}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        width = 2 if bundle.precision == "fp32" else 4
        check_room(
            folder.parent,
            width * sum(file.stat().st_size for file in bundle.folder.glob("onnx/*")) // 2,
            f"the model {source.name} in float32",
            "name a folder with --cache",
        )
        unfinished = folder.with_name(f".{folder.name}.tmp")
        source.pipeline().save_pretrained(unfinished)
        unfinished.rename(folder)
    return folder


def temporary_folder() -> Path:
    """A folder that is removed at the end of the process."""
    folder = mkdtemp()
    atexit.register(rmtree, folder, ignore_errors=True)
    return Path(folder)


def sampler_of(bundle: Bundle) -> str:
    """The model's own sampler, DDIM where diffusers' class needs options for it."""
    try:
        name = sampler_name(None, Schedule.from_config(bundle.scheduler))
    except UnknownSchedulerError:
        return "ddim"
    return name if name in SCHEDULERS else "ddim"
