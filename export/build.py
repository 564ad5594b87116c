"""A model becomes a bundle: export what changed, verify, and put the new folder in the old one's place."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path, PurePath
from time import perf_counter
from typing import Any

from engine import __version__
from engine.backends.onnxruntime.backend import OnnxRuntimeBackend
from engine.backends.openvino.backend import OpenVinoBackend
from engine.bundle import Bundle, sha256
from engine.contract import Family, Range, Shapes
from engine.errors import BundleError, SchedulerConfigError
from engine.manifest import (
    MANIFEST,
    PICTURE,
    TOKENIZER,
    File,
    Graph,
    Manifest,
    Origin,
    SpecialTokens,
    Verification,
    own_files,
    write,
)
from engine.text.tokenizer import ClipTokenizer

from . import targets
from .building import Replacement, Report
from .compare import as_json
from .component import Exporter, GraphFormat, timed
from .disk import as_output_errors
from .errors import UsageError
from .folders import free_name
from .graphs.recipes import Recipes
from .graphs.tracing import OPSET
from .reuse import Made, siblings
from .sources.source import Models, Source
from .verify import Pictures, Reference, check_picture, seeds_of, subjects_of, with_diffusers

UNVERIFIED = Verification(done=False, reason="--no-verify")


@dataclass(frozen=True)
class Options:
    """What a bundle is built for and how: with `openvino` it is also measured which components may run in bf16 there;
    `force` exports what is unchanged too."""

    shapes: Shapes
    openvino: bool
    verify: bool
    force: bool


@dataclass(frozen=True)
class Outcome:
    """What a build did: where the bundle is, its manifest, and which components were traced (none: it was up to date,
    or other bundles had them)."""

    folder: Path
    manifest: dict[str, Any]
    exported: tuple[str, ...]


def default_shapes(sample_size: int) -> Shapes:
    """Sizes around the one that a model was trained at. Ranges cost nothing here: the graphs are dynamic."""
    side = Range(min(64, sample_size // 16 * 8), sample_size, 2 * sample_size)
    return Shapes(height=side, width=side, batch=Range(1, 1, 8))


def shapes_of(source: Source) -> Shapes:
    """The default sizes of a model's bundle: those of `default_shapes`, or for a model without texts, as in diffusers,
    the one that it was trained at."""
    size = source.sample_size()
    if source.family.tokenizers:
        return default_shapes(size)
    return Shapes(Range(size, size, size), Range(size, size, size), Range(1, 1, 8))


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
    family: Family | None = None,
    recipes: Recipes | None = None,
) -> Outcome:
    """Writes `output`/`source.name`, unless it is there already and nothing changed. With `openvino` it is also
    measured which components may run in bf16 there. `family` says which components there are, `recipes` how their
    graphs are made; None is what the source says.

    Raises the errors of export/errors.py; whatever happens, the old bundle stays until the new one is complete.
    """
    _check_options(precision, openvino, verify)
    target = targets.place(output, source.name, source.inputs)
    options, form = Options(shapes, openvino, verify, force), GraphFormat(precision, opset)
    with as_output_errors(output), targets.locked(target, report):
        family, recipes = family or source.family, recipes or source.recipes
        return BundleBuilder(source, target, family, recipes, form, options, report).build()


def _check_options(precision: str, openvino: bool, verify: bool) -> None:
    """UsageError or BackendError now rather than after the export."""
    if precision == "bf16" and verify:
        raise UsageError(
            "ONNX Runtime's CPU provider has no bf16 kernels, so a bf16 bundle can neither be verified nor run here; "
            "use --precision fp32 or fp16, or --no-verify to export bf16 graphs for another machine"
        )
    if openvino and not verify:
        raise UsageError(
            "--backend openvino measures which components may run in bf16, so it does not go with --no-verify; a "
            "bundle without these measurements runs on OpenVINO in fp32"
        )
    if openvino:
        OpenVinoBackend({})


@dataclass
class Progress:
    """What of a new bundle is there: graphs, how far each is from torch, hashes of files, and which were traced."""

    graphs: dict[str, Graph]
    checks: dict[str, Any]
    files: dict[str, File]
    references: dict[str, Reference]
    exported: list[str]


class BundleBuilder:
    """One build of a bundle."""

    def __init__(
        self,
        source: Source,
        target: Path,
        family: Family,
        recipes: Recipes,
        form: GraphFormat,
        options: Options,
        report: Report,
    ) -> None:
        self._source, self._target, self._family, self._form = source, target, family, form
        self._options, self._report = options, report
        self._exporters = {
            name: Exporter(source, family[name], recipe, form)
            for name, recipe in recipes.items()
            if name in family.names
        }
        self._models = Models(source)

    def build(self) -> Outcome:
        """Recovers, keeps what is unchanged, exports the rest beside the old bundle, verifies, and exchanges them."""
        replacement = Replacement(self._target, own_files(self._family).__contains__)
        replacement.recover()
        there, origin = targets.examine(self._target), self._origin()
        targets.require_same_model(self._target, there, origin, self._report)
        old = None if self._options.force or there.broken else self._usable()
        prints = {name: exporter.fingerprint() for name, exporter in self._exporters.items()}
        if old is not None and self._is_up_to_date(old.manifest, origin, prints):
            self._report(f"{self._target} is up to date")
            return Outcome(self._target, old.manifest.content(), ())
        self._source.check(self._models)
        with replacement.begin() as folder:
            for name in {PurePath(file).parent for file in own_files(self._family)} - {PurePath()}:
                (folder / name).mkdir()
            theirs = self._diffusers_pictures() if self._options.verify else None
            progress = self._components(folder, prints, [] if old is None else [old])
            written = self._finish(folder, origin, progress, theirs)
            if there.broken:
                self._move_aside(there.broken)
            replacement.swap(there.named.__contains__)
        self._report(f"wrote {self._target}")
        return Outcome(self._target, written, tuple(name for name in self._family.names if name in progress.exported))

    def _origin(self) -> Origin:
        """What the manifest says about the model."""
        parts = sorted({exporter.recipe.part for exporter in self._exporters.values()})
        weights = hashlib.sha256("".join(self._source.fingerprint(part) for part in parts).encode()).hexdigest()
        tokenizer = self._source.fingerprint("tokenizer") if self._family.tokenizers else None
        return Origin(**self._source.origin, tokenizer=tokenizer, weights=weights, options=self._source.options)

    def _usable(self) -> Made | None:
        """The existing bundle, if all its files are right."""
        if not self._target.is_dir() or not any(self._target.iterdir()):
            return None
        try:
            bundle = Bundle.open(self._target)
            bundle.schedule()
            if bundle.family.tokenizers:
                ClipTokenizer(bundle.tokenizer_file, bundle.special_tokens)
            return Made(self._target, bundle.contents, replaced=True)
        except (BundleError, SchedulerConfigError) as error:
            self._report(f"the old bundle is not usable and will be replaced: {error}")
            return None

    def _is_up_to_date(self, old: Manifest, origin: Origin, prints: Mapping[str, str]) -> bool:
        same = {name: graph.fingerprint for name, graph in old.components.items()} == dict(prints)
        source = self._source
        model = (self._family, source.scheduler_config(), source.low_resolution())
        wanted = (origin, *model, self._form.precision, self._options.shapes)
        found = (old.source, old.family, old.scheduler, old.low_resolution, old.precision, old.shapes)
        verified = old.verification.done or not self._options.verify
        measured = old.openvino is not None or not self._options.openvino
        return same and wanted == found and verified and measured

    def _diffusers_pictures(self) -> Pictures:
        """Made first: the models have their own weights until then, and the memory is free again when graphs are
        traced."""
        self._report(f"making the pictures of {subjects_of(self._family)} with diffusers")
        height, width = self._options.shapes.height.opt, self._options.shapes.width.opt
        return with_diffusers(self._source.pipeline(self._models), height, width)

    def _components(self, folder: Path, prints: Mapping[str, str], made: list[Made]) -> Progress:
        """Every component's graph in `folder`: taken from a bundle that has it, or exported."""
        progress = Progress({}, {}, {}, {}, [])
        if not self._options.force:
            made = [*made, *siblings(self._target)]
        for number, (name, exporter) in enumerate(self._exporters.items(), 1):
            label = f"[{number}/{len(self._exporters)}] {name}"
            having = [one for one in made if one.has(name, prints[name])]
            taken = next((one for one in having if one.take(name, folder)), None)
            if taken is None:
                self._export(name, exporter, folder, label, progress)
            else:
                self._keep(name, exporter, taken, folder, label, progress)
        return progress

    def _release(self, name: str) -> None:
        """Frees the part of the model that a component is made of, if it is the last one of that part."""
        part = self._exporters[name].recipe.part
        same = [other for other, exporter in self._exporters.items() if exporter.recipe.part == part]
        if name == same[-1]:
            self._models.release(part)

    def _keep(self, name: str, exporter: Exporter, taken: Made, folder: Path, label: str, progress: Progress) -> None:
        """Notes a graph that was taken over. It is compared with torch where nobody has done so."""
        progress.graphs[name], progress.checks[name] = taken.graph(name), taken.check(name)
        progress.files |= taken.manifest.files_of(name)
        words = "unchanged" if taken.folder == self._target else f"the same as in {taken.folder}"
        self._report(f"{label}: {words}")
        unchecked = self._options.verify and taken.check(name) is None
        if unchecked or self._options.openvino:
            progress.references[name] = exporter.reference(self._models)
        self._release(name)
        if unchecked:
            progress.checks[name] = exporter.check(progress.references[name], folder)

    def _export(self, name: str, exporter: Exporter, folder: Path, label: str, progress: Progress) -> None:
        """Traces a component and compares it with torch."""
        if self._options.verify:
            progress.references[name] = exporter.reference(self._models)
        graph = exporter.export(self._models, folder, label, self._report)
        self._release(name)
        started, verdict = perf_counter(), "not verified"
        progress.checks[name] = None
        if self._options.verify:
            progress.checks[name] = exporter.check(progress.references[name], folder)
            verdict = f"{progress.checks[name]['relative_rms']:.1e} from torch"
        progress.graphs[name] = timed(graph, perf_counter() - started)
        progress.exported.append(name)
        self._report(f"{label}: exported in {graph.seconds['export']:.1f} s, {verdict}")

    def _finish(self, folder: Path, origin: Origin, progress: Progress, theirs: Pictures | None) -> dict[str, Any]:
        """Writes the tokenizer and the manifest, and compares pictures: the manifest's content."""
        tokens = self._write_tokenizer(folder)
        manifest = Manifest(
            self._source.name,
            self._family,
            origin,
            self._form.precision,
            self._options.shapes,
            self._source.scheduler_config(),
            {name: progress.graphs[name] for name in self._family.names if name in progress.graphs},
            tokens,
            UNVERIFIED,
            None,
            _hashed(folder, progress.files),
            datetime.now(timezone.utc).isoformat(timespec="seconds"),
            {
                "latentrt": __version__,
                **{name: version(name) for name in ("torch", "diffusers", "onnx", "onnxruntime")},
            },
            self._source.text_layers(),
            self._source.low_resolution(),
        )
        content = write(folder, manifest)
        if theirs is None:
            return content
        checks = {name: progress.checks[name] for name in manifest.components}
        verification = verify_picture(folder, self._form.precision, checks, theirs, self._report)
        manifest = replace(manifest, verification=verification, files=_hashed(folder, manifest.files))
        content = write(folder, manifest)
        if self._options.openvino:
            content = write(folder, replace(manifest, openvino=self._measure_openvino(folder, progress, theirs)))
        return content

    def _write_tokenizer(self, folder: Path) -> SpecialTokens | None:
        if not self._family.tokenizers:
            return None
        tokenizer = self._source.tokenizer()
        tokenizer.backend_tokenizer.save(str(folder / TOKENIZER))
        start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        if start is None:  # BERT's words for the same
            start, end = tokenizer.cls_token_id, tokenizer.sep_token_id
        return SpecialTokens(start, end, tokenizer.pad_token_id)

    def _measure_openvino(self, folder: Path, progress: Progress, theirs: Pictures) -> dict[str, Any]:
        from .openvino import choose_precision

        return choose_precision(folder, progress.references, theirs.steps, seeds_of(theirs), self._report)

    def _move_aside(self, reason: str) -> None:
        aside = free_name(self._target.with_name(f"{self._target.name}.broken"), "older")
        self._target.rename(aside)
        self._report(f"{self._target} had no manifest that can be read ({reason}); it was moved to {aside}")


def verify_picture(
    folder: Path, precision: str, checks: Mapping[str, Any], theirs: Pictures, report: Report
) -> Verification:
    """Compares the pictures of the bundle in `folder` with diffusers', and keeps the first one there."""
    started = perf_counter()
    found, picture = check_picture(theirs, folder, precision)
    picture.save(folder / PICTURE)
    report(
        f"picture: {found.pixels_within_1:.2%} of the values within 1 of 255, PSNR {found.psnr_db:.1f} dB, latents "
        f"within {found.latents_max_abs:.1e} ({perf_counter() - started:.1f} s)"
    )
    return Verification(
        done=True,
        backend=OnnxRuntimeBackend({}).description,
        precision=precision,
        components=checks,
        picture=as_json(found),
    )


def _hashed(folder: Path, known: Mapping[str, File]) -> dict[str, File]:
    """The files of a bundle that is being built. Those that are known are not read again."""
    names = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]
    return {name: known.get(name) or _file(folder / name) for name in names if name != MANIFEST}


def _file(file: Path) -> File:
    return File(sha256(file), file.stat().st_size)
