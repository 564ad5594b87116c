"""A model becomes a bundle: export what changed, verify, and put the new folder in the old one's place."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from engine import __version__
from engine.backends.onnxruntime import OnnxRuntimeBackend
from engine.backends.openvino.backend import OpenVinoBackend
from engine.bundle import FORMAT, MANIFEST, Bundle, sha256
from engine.contract import COMPONENTS, Range, Shapes
from engine.errors import BundleError, SchedulerConfigError
from engine.manifest import own_files
from engine.sampling.schedule import Schedule
from engine.text.tokenizer import ClipTokenizer

from . import targets
from .compare import as_json
from .errors import OutputError, UsageError
from .folders import free_name, link, recover, swap
from .graphs.modules import DTYPES, Denoiser, Float32Norm, TextEncoder, VaeDecoder, VaeEncoder
from .graphs.tracing import OPSET, example, export_onnx, fuses_attention
from .sources.checkpoint import Source
from .verify import SEED, SMALL, Reference, check_component, check_picture
from .verify import reference as torch_reference

PART_OF = {"text_encoder": "text_encoder", "denoiser": "unet", "vae_decoder": "vae", "vae_encoder": "vae"}
VERIFICATION_PICTURE = "verification.png"

Report = Callable[[str], None]


@dataclass(frozen=True)
class Graphs:
    """How all components are traced: "fp32", "fp16" or "bf16", and the version of ONNX's operators."""

    precision: str
    opset: int


@dataclass(frozen=True)
class Outcome:
    """What a build did: where the bundle is, its manifest, and which components were exported (none: it was up to
    date)."""

    folder: Path
    manifest: dict[str, Any]
    exported: tuple[str, ...]


def default_shapes(sample_size: int) -> Shapes:
    """Sizes around the one that a model was trained at. Ranges cost nothing here: the graphs are dynamic."""
    side = Range(min(64, sample_size // 16 * 8), sample_size, 2 * sample_size)
    return Shapes(height=side, width=side, batch=Range(1, 1, 8))


def build(
    source: Source,
    output: Path,
    precision: str,
    shapes: Shapes,
    *,
    opset: int = OPSET,
    openvino: bool = False,
    verify: bool = True,
    force: bool = False,
    report: Report = print,
) -> Outcome:
    """Writes `output`/`source.name`, unless it is there already and nothing changed. With `openvino` it is also
    measured which components may run in bf16 there.

    Raises the errors of export/errors.py; whatever happens, the old bundle stays until the new one is complete.
    """
    if precision == "bf16" and verify:
        raise UsageError(
            "ONNX Runtime's CPU provider has no bf16 kernels, so a bf16 bundle can neither be verified nor run here; "
            "use --precision "
            "fp32 or fp16, or --no-verify to export bf16 graphs for another machine"
        )
    if openvino:
        if not verify:
            raise UsageError(
                "--backend openvino measures which components may run in bf16, so it does not go with --no-verify; a "
                "bundle without these "
                "measurements runs on OpenVINO in fp32"
            )
        OpenVinoBackend({})  # BackendError now rather than after the export
    target = targets.place(output, source.name, source.inputs)
    with _as_output_errors(output), targets.locked(target, report):
        return _build_locked(source, target, Graphs(precision, opset), shapes, openvino, verify, force, report)


def _build_locked(
    source: Source,
    target: Path,
    graphs: Graphs,
    shapes: Shapes,
    openvino: bool,
    verify: bool,
    force: bool,
    report: Report,
) -> Outcome:
    unfinished, replaced = (target.with_name(f".{target.name}.{state}") for state in ("building", "replaced"))
    recover(target, unfinished, replaced, own_files().__contains__)
    there = targets.examine(target)
    wanted = _wanted(source, graphs.precision, shapes)
    targets.require_same_model(target, there, wanted["source"], report)
    prints = {component: _fingerprint(source, component, graphs) for component in COMPONENTS}
    old = None if force or there.broken else _usable(target, report)
    kept = {c: old for c in COMPONENTS if old and old["components"][c]["fingerprint"] == prints[c]} if old else {}
    if (
        old
        and len(kept) == len(COMPONENTS)
        and all(old[key] == value for key, value in wanted.items())
        and (old["verification"]["done"] or not verify)
        and ("openvino" in old or not openvino)
    ):
        report(f"{target} is up to date")
        return Outcome(target, old, ())
    source.check()
    try:
        (unfinished / "onnx").mkdir(parents=True)
        files: dict[str, Any] = {}
        checks: dict[str, Any] = {c: old["verification"]["components"].get(c) for c in kept} if old else {}
        details: dict[str, Any] = {}
        for number, component in enumerate(COMPONENTS, 1):
            label = f"[{number}/{len(COMPONENTS)}] {component}"
            if component in kept:
                details[component] = _link(target, unfinished, kept[component], component, files)
                report(f"{label}: unchanged")
            else:
                details[component], checks[component] = _export(
                    source, component, graphs, unfinished, verify, label, report
                )
                details[component]["fingerprint"] = prints[component]
        manifest = {
            "format": FORMAT,
            "name": source.name,
            **wanted,
            "components": details,
            "tokenizer": _write_tokenizer(source, unfinished),
            "verification": {"done": False, "reason": "--no-verify", "components": {}},
        }
        _write_manifest(unfinished, manifest, files)
        if verify:
            manifest["verification"] = _verify_picture(source, unfinished, graphs.precision, checks, report)
            _write_manifest(unfinished, manifest, files)
            if openvino:
                manifest["openvino"] = _measure_openvino(source, unfinished, graphs.precision, report)
                _write_manifest(unfinished, manifest, files)
        if there.broken:
            aside = free_name(target.with_name(f"{target.name}.broken"), "older")
            target.rename(aside)
            report(f"{target} had no manifest that can be read ({there.broken}); it was moved to {aside}")
        swap(target, unfinished, replaced, there.named.__contains__)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    report(f"wrote {target}")
    return Outcome(target, manifest, tuple(c for c in COMPONENTS if c not in kept))


def _wanted(source: Source, precision: str, shapes: Shapes) -> dict[str, Any]:
    """What a manifest says besides the components; a bundle that differs in it is not up to date."""
    sides = {
        side: [r.min, r.opt, r.max]
        for side, r in (("height", shapes.height), ("width", shapes.width), ("batch", shapes.batch))
    }
    weights = hashlib.sha256(
        "".join(source.fingerprint(part) for part in sorted(set(PART_OF.values()))).encode()
    ).hexdigest()
    origin = {
        **source.origin,
        "tokenizer": source.fingerprint("tokenizer"),
        "weights": weights,
        "options": source.options,
    }
    return {"source": origin, "precision": precision, "shapes": sides, "scheduler": source.scheduler_config()}


def _fingerprint(source: Source, component: str, graphs: Graphs) -> str:
    """A hash of all that determines a component's graph: weights, precision, our tracing code, the libraries."""
    code = [sha256(Path(__file__).with_name("graphs") / name) for name in ("modules.py", "tracing.py")]
    libraries = [f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "onnx", "onnxscript")]
    parts = [source.fingerprint(PART_OF[component]), component, graphs.precision, str(graphs.opset), *code, *libraries]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _usable(target: Path, report: Report) -> dict[str, Any] | None:
    """The manifest of an existing bundle whose files are all right."""
    if not target.is_dir() or not any(target.iterdir()):
        return None
    try:
        bundle = Bundle.open(target)
        Schedule.from_config(bundle.scheduler)
        ClipTokenizer(bundle.tokenizer_file, bundle.special_tokens)
        return dict(bundle.manifest)
    except (BundleError, SchedulerConfigError) as error:
        report(f"the old bundle is not usable and will be replaced: {error}")
        return None


def modules(source: Source, component: str) -> tuple[type[nn.Module], Any, int]:
    """The graph's class, the model that it wraps, and the size of the text's embeddings (0 where there is no text)."""
    if component == "text_encoder":
        return TextEncoder, source.text_encoder(), 0
    if component == "denoiser":
        unet = source.unet()
        return Denoiser, unet, int(unet.config.cross_attention_dim)
    return (VaeDecoder if component == "vae_decoder" else VaeEncoder), source.vae(), 0


def _export(
    source: Source, component: str, graphs: Graphs, folder: Path, verify: bool, label: str, report: Report
) -> tuple[dict[str, Any], Any]:
    """Traces one component into `folder` and compares it with torch: its manifest entry and the differences."""
    started, precision = perf_counter(), graphs.precision
    kind, model, context_size = modules(source, component)
    _require_disk(folder, sum(p.numel() for p in model.parameters()) * DTYPES[precision].itemsize)
    report(f"{label}: tracing {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters in {precision}")
    expected = None
    if verify:
        _round_weights(model, DTYPES[precision])
        expected = torch_reference(component, kind(model, torch.float32), context_size)
    name = f"onnx/{component}.onnx"
    module = kind(model, DTYPES[precision], fuses_attention(component, precision, graphs.opset))
    export_onnx(component, module, example(component, context_size), folder / name, graphs.opset)
    del module
    del model
    gc.collect()
    exported = perf_counter()
    found = None
    if expected is not None:
        found = check_component(component, OnnxRuntimeBackend({component: folder / name}), expected, precision)
    seconds = {"export": round(exported - started, 2), "check": round(perf_counter() - exported, 2)}
    verdict = "not verified" if found is None else f"{found.relative_rms:.1e} from torch"
    report(f"{label}: exported in {seconds['export']:.1f} s, {verdict}")
    return {
        "onnx": name,
        "opset": graphs.opset,
        "ir_version": _ir_version(folder / name),
        "seconds": seconds,
    }, found and as_json(found)


def _round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Weights as they will be in the graph, so that only its arithmetic is compared. Norms and timestep stay in
    float32."""
    if dtype == torch.float32:
        return
    exact = {
        id(p)
        for m in model.modules()
        if isinstance(m, (nn.GroupNorm, nn.LayerNorm, Float32Norm))
        for p in m.parameters()
    }
    exact |= {id(p) for p in getattr(model, "time_embedding", nn.Module()).parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) not in exact:
                parameter.copy_(parameter.to(dtype).float())


def _ir_version(file: Path) -> int:
    import onnx

    return int(onnx.load(str(file), load_external_data=False).ir_version)


def _write_tokenizer(source: Source, folder: Path) -> dict[str, Any]:
    tokenizer = source.tokenizer()
    (folder / "tokenizer").mkdir()
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    return {
        "file": "tokenizer/tokenizer.json",
        "start": tokenizer.bos_token_id,
        "end": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
    }


def _write_manifest(folder: Path, manifest: dict[str, Any], files: dict[str, Any]) -> None:
    """manifest.json with the hash of every other file; those in `files` are known already, and the others are added to
    it."""
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and name not in files and name != MANIFEST:
            files[name] = {"sha256": sha256(file), "bytes": file.stat().st_size}
    manifest["files"] = dict(sorted(files.items()))
    manifest["created"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    manifest["versions"] = {
        "latentrt": __version__,
        **{name: version(name) for name in ("torch", "diffusers", "onnx", "onnxruntime")},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _verify_picture(
    source: Source, folder: Path, precision: str, checks: dict[str, Any], report: Report
) -> dict[str, Any]:
    started = perf_counter()
    report("comparing the pictures of two prompts with diffusers")
    found, picture = check_picture(source, folder, precision)
    picture.save(folder / VERIFICATION_PICTURE)
    report(
        f"picture: {found.pixels_within_1:.2%} of the values within 1 of 255, PSNR {found.psnr_db:.1f} dB, latents "
        "within "
        f"{found.latents_max_abs:.1e} ({perf_counter() - started:.1f} s)"
    )
    return {
        "done": True,
        "backend": OnnxRuntimeBackend({}).description,
        "precision": precision,
        "components": checks,
        "picture": as_json(found),
    }


def _measure_openvino(source: Source, folder: Path, precision: str, report: Report) -> dict[str, Any]:
    from .openvino import choose_precision

    def reference(component: str) -> Reference:
        kind, model, context_size = modules(source, component)
        _round_weights(model, DTYPES[precision])
        return torch_reference(component, kind(model, torch.float32), context_size)

    parameters = sum(file.stat().st_size for file in folder.glob("onnx/denoiser.onnx*")) // DTYPES[precision].itemsize
    small = parameters <= SMALL
    return choose_precision(folder, reference, 20 if small else 2, range(4) if small else [SEED], report)


def _link(old: Path, new: Path, manifest: dict[str, Any], component: str, files: dict[str, Any]) -> dict[str, Any]:
    """Takes over the files of an unchanged component, as hard links where the file system has them, and their hashes:
    its manifest entry."""
    for name, entry in manifest["files"].items():
        if name.startswith(f"onnx/{component}.onnx"):
            link(old / name, new / name)
            files[name] = entry
    return dict(manifest["components"][component])


def _require_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < 1.1 * needed:
        raise OutputError(
            f"{folder.parent} has {megabytes(free)} free; the next component needs {megabytes(needed)}. Free some, or "
            "pass another --output"
        )


def megabytes(count: int) -> str:
    """Bytes for people."""
    unit, name = next(((size, name) for size, name in ((1e9, "GB"), (1e6, "MB")) if count >= size), (1e3, "kB"))
    return f"{count / unit:.1f} {name}"


@contextmanager
def _as_output_errors(output: Path) -> Iterator[None]:
    """OSErrors become named errors about the file that they are about."""
    try:
        yield
    except OSError as error:
        file = Path(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes, os.PathLike)) else output
        if error.errno == errno.ENOSPC:
            raise OutputError(
                f"the disk of {output} is full; nothing was changed. Free some space, or pass another --output"
            ) from error
        if error.errno == errno.EFBIG:
            raise OutputError(
                f"{output} may not take files of that size (ulimit -f); nothing was changed. Raise it, or pass another "
                "--output"
            ) from error
        inside = output.absolute() in [file.absolute(), *file.absolute().parents]
        cure = "pass another --output" if inside else "let this user read it"
        raise OutputError(
            f"{file} cannot be {'written or read' if inside else 'read'} ({error.strerror or error}); {cure}"
        ) from error
