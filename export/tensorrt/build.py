"""ONNX graphs of a bundle to TensorRT plans for the GPU of this machine. Needs numpy, tensorrt and cuda-bindings, no
torch."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from time import perf_counter
from traceback import clear_frames
from typing import Any

import numpy as np

from engine.backends.tensorrt import versions as versions
from engine.backends.tensorrt.cuda import Device
from engine.backends.tensorrt.runtime import TensorRtRuntime, open_log
from engine.bundle import Bundle, sha256
from engine.contract import COMPONENTS, INPUTS, OUTPUTS, VAE_FACTOR, Range, Shapes
from engine.errors import EngineError
from engine.libraries import installed
from engine.plans import BUILD, FORMAT, NEEDED, Machine, Plans, format_profile, identity, onnx_hash
from engine.version import __version__

from ..compare import Difference, as_json, compared, difference, input_shapes, random_inputs, tolerance
from ..errors import ExportError, OutputError, PlanBuildError, RoomError, UsageError, VerificationError
from ..folders import link, recover, swap
from .diagnose import every_output, mark_outputs, verdict
from .progress import Phases, monitor, watch

PIXELS_PER_DECODE = 1024 * 1024
"""Pictures that the VAE takes together: so many pixels, or one picture. More would cost memory and save no time."""

TIMED_RUNS = 20

MOST_PINNED = 0.25
"""Share of a network's layers that TensorRT 8.6 may be told to keep in float32; a U-Net needs a few of hundreds."""

BYTES_PER_PIXEL = 2048
"""Of activations, and of what the builder tries out: an estimate for the U-Net and the VAE, guidance included."""

BUILDER_BYTES = 1 << 30
"""What CUDA and the builder take besides, an estimate too."""

ORDER = ("denoiser", "text_encoder", "vae_decoder", "vae_encoder")
"""The slowest and most important first; what pictures are made without last."""

FINISHED = "finished.json"

Report = Callable[[str], None]
Shape = tuple[int, ...]


OWN_FILES = frozenset([BUILD, *(f"{component}.plan" for component in COMPONENTS)])
"""What the builder writes into a folder of plans; other files there stay."""


@dataclass(frozen=True)
class Settings:
    """What the builder is told: how long it searches (0 to 5), bytes of workspace and auxiliary streams (None: TensorRT
    decides)."""

    optimization_level: int = 3
    workspace: int | None = None
    max_aux_streams: int | None = None


@dataclass(frozen=True)
class PlanOutcome:
    """What a build did: where the plans are, build.json, and which components were built (none: they were up to
    date)."""

    folder: Path
    build: dict[str, Any]
    built: tuple[str, ...]


def with_rows(shapes: Shapes) -> list[Shapes]:
    """Profiles for the U-Net's rows with and without guidance: two for a fixed number of pictures, since fixed sizes
    are the fastest, one for a range."""
    batch = shapes.batch
    fixed, ranged = (
        [Range(n, n, n) for n in (2 * batch.opt, batch.opt)],
        [Range(batch.min, 2 * batch.opt, 2 * batch.max)],
    )
    rows = fixed if batch.static else ranged
    return [Shapes(shapes.height, shapes.width, batch, one) for one in rows]


def build_plans(
    folder: Path,
    profiles: Sequence[Shapes],
    settings: Settings = Settings(),
    *,
    components: Sequence[str] = COMPONENTS,
    gpu: int = 0,
    compare: bool = True,
    diagnose: bool = False,
    force: bool = False,
    report: Report = print,
) -> PlanOutcome:
    """Writes the plans of the bundle in `folder` for this machine's GPU, or those of some components, unless they are
    there and nothing changed.

    `compare` runs every component on ONNX Runtime too, where that is installed. Raises the errors of `Bundle.open`,
    BackendError, and those of export/errors.py; whatever happens, old plans that run stay until the new ones do, and
    finished plans are not built again."""
    bundle = Bundle.open(folder)
    trt = versions.load_tensorrt()
    if bundle.precision == "bf16" and not versions.supports_bf16(trt):
        raise UsageError(
            f"TensorRT {trt.__version__} has no bfloat16; build the bundle with --precision fp16, or use TensorRT 10 "
            "or 11"
        )
    opset = max(int(entry["opset"]) for entry in bundle.manifest["components"].values())
    if opset > versions.newest_opset(trt):
        raise UsageError(
            f"the graphs in {folder} are of opset {opset}, and TensorRT {trt.__version__} takes "
            f"{versions.newest_opset(trt)}; build the bundle "
            f"with --opset {versions.newest_opset(trt)}, or use TensorRT 10.14 or later"
        )
    device = Device(gpu)
    try:
        versions.require_driver(trt, device.driver_version)
        builder = PlanBuilder(bundle, trt, device, profiles, settings, report)
        with _locked(folder.parent / f".{folder.name}.lock"):
            return builder.build(components, compare, diagnose, force)
    finally:
        with device.closing():
            pass


class PlanBuilder:
    """One build of a bundle's plans on one GPU."""

    def __init__(
        self, bundle: Bundle, trt: Any, device: Device, profiles: Sequence[Shapes], settings: Settings, report: Report
    ) -> None:
        self._bundle, self._trt, self._device, self._profiles, self._settings, self._report = (
            bundle,
            trt,
            device,
            profiles,
            settings,
            report,
        )
        self._machine = Machine(device.name, device.compute_capability, trt.__version__)
        self._folder = bundle.folder / "plans" / self._machine.folder
        self._cache = TimingCache(self._folder)

    def build(self, components: Sequence[str], compare: bool, diagnose: bool, force: bool) -> PlanOutcome:
        """Builds what changed; `Plans.find` describes the result. Each finished plan is noted beside the old plans and
        outlives a failure or the end of the process. Where the old plans do not run, it takes their place at once;
        where they do, they stay until all that a pipeline needs is there."""
        recover(self._folder, self._beside("publishing"), self._beside("replaced"), OWN_FILES.__contains__)
        wanted = [format_profile(profile) for profile in self._profiles]
        old, finished = self._intact(self._folder / BUILD), self._intact(self._unfinished / FINISHED)
        entries = {
            component: entry
            for component, entry in {**old, **finished}.items()
            if not ((force or diagnose) and component in components)
        }
        todo = [component for component in ORDER if component in components and component not in entries]
        running = self._running()
        if not todo and running and running["profiles"] == wanted and entries == old:
            self._report(f"{self._folder} is up to date")
            return PlanOutcome(self._folder, running, ())
        self._require_room(todo)
        build: dict[str, Any] = {
            "format": FORMAT,
            "machine": asdict(self._machine),
            "precision": self._bundle.precision,
            "profiles": wanted,
            "settings": asdict(self._settings),
            "components": entries,
            "cuda_driver": self._device.driver_version,
            "latentrt": __version__,
        }
        worth_keeping = bool(finished)
        try:
            self._unfinished.mkdir(parents=True, exist_ok=True)
            for component in entries:
                if component not in finished:
                    (self._unfinished / f"{component}.plan").unlink(missing_ok=True)
                    link(self._folder / f"{component}.plan", self._unfinished / f"{component}.plan")
                self._report(f"{component}: unchanged")
            for number, component in enumerate(todo, 1):
                entries[component] = self._component(
                    component, self._unfinished, f"[{number}/{len(todo)}] {component}", compare, diagnose
                )
                _write(self._unfinished / FINISHED, json.dumps({"components": entries}).encode())
                worth_keeping, build["components"] = True, entries
                if not running:
                    self._publish(build)
        except BaseException:
            if not worth_keeping:
                shutil.rmtree(self._unfinished, ignore_errors=True)
            raise
        outcome = PlanOutcome(self._folder, build, tuple(component for component in COMPONENTS if component in todo))
        missing = [component for component in NEEDED if component not in entries]
        if missing and running:
            self._report(
                f"{self._folder} stays as it was; for these sizes and settings a pipeline needs the plans of "
                f"{', '.join(missing)} too"
            )
            return outcome
        self._publish(build)
        shutil.rmtree(self._unfinished, ignore_errors=True)
        self._report(
            f"wrote {self._folder}" + (f"; a pipeline needs the plans of {', '.join(missing)} too" if missing else "")
        )
        return outcome

    def _beside(self, state: str) -> Path:
        return self._folder.with_name(f".{self._folder.name}.{state}")

    @property
    def _unfinished(self) -> Path:
        """Plans that are built, while others are not, and their entries in FINISHED."""
        return self._beside("building")

    def _publish(self, build: dict[str, Any]) -> None:
        """Puts the finished plans in the old ones' place."""
        publishing = self._beside("publishing")
        publishing.mkdir()
        for component in build["components"]:
            link(self._unfinished / f"{component}.plan", publishing / f"{component}.plan")
        build["components"] = {
            component: build["components"][component] for component in COMPONENTS if component in build["components"]
        }
        build["created"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        (publishing / BUILD).write_text(json.dumps(build, indent=1) + "\n", encoding="utf-8")
        swap(self._folder, publishing, self._beside("replaced"), OWN_FILES.__contains__)

    def _identity(self, component: str) -> str:
        """A hash of all that determines a plan."""
        profiles = [str(profile) for profile in component_profiles(component, self._profiles)]
        return identity(
            onnx_hash(self._bundle, component),
            asdict(self._machine),
            self._bundle.precision,
            asdict(self._settings),
            profiles,
        )

    def _intact(self, file: Path) -> dict[str, Any]:
        """Entries of plans that are what would be built, and whose files are those that were built; `file` is a
        build.json or a finished.json."""
        found = {}
        for component in COMPONENTS:
            with suppress(OSError, ValueError, KeyError, TypeError):
                entry = json.loads(file.read_text(encoding="utf-8"))["components"][component]
                if entry["identity"] == self._identity(component) and entry["sha256"] == sha256(
                    file.parent / f"{component}.plan"
                ):
                    found[component] = entry
        return found

    def _running(self) -> dict[str, Any] | None:
        """build.json of plans that a pipeline can run."""
        if not self._folder.is_dir():
            return None
        try:
            plans = Plans.find(self._bundle, self._machine)
            for component in plans.build["components"]:
                plans.read(component)
            return dict(plans.build) if plans.build["components"].keys() >= set(NEEDED) else None
        except EngineError as error:
            self._report(f"the plans in {self._folder} do not run and will be replaced: {error}")
            return None

    def _require_room(self, components: Sequence[str]) -> None:
        """RoomError or OutputError where the GPU or the disk has less than an estimate of what the build takes."""
        if not components:
            return
        weights = {component: self._weights(component) for component in components}
        pixels = max(profile.height.max * profile.width.max * profile.batch.max for profile in self._profiles)
        needed = 2 * max(weights.values()) + BYTES_PER_PIXEL * pixels + BUILDER_BYTES
        with self._device:
            free, total = self._device.memory()
        if free < needed:
            raise RoomError(
                f"the build is estimated to need {needed / 2**30:.1f} GiB of the GPU's memory, and {free / 2**30:.1f} "
                f"of {total / 2**30:.1f} GiB "
                f"are free on GPU {self._device.number} ({self._device.name}); close other programs there, or build "
                "for smaller sizes"
            )
        disk, space = int(1.2 * sum(weights.values())), shutil.disk_usage(self._bundle.folder).free
        if space < disk:
            raise OutputError(
                f"the plans are estimated to need {disk / 1e9:.2f} GB, and {space / 1e9:.2f} GB are free at "
                f"{self._bundle.folder}; free some"
            )

    def _weights(self, component: str) -> int:
        name, files = self._bundle.manifest["components"][component]["onnx"], self._bundle.manifest["files"]
        return sum(int(files[file]["bytes"]) for file in (name, f"{name}.data") if file in files)

    def _component(self, component: str, folder: Path, label: str, compare: bool, diagnose: bool) -> dict[str, Any]:
        """Builds, checks and writes one plan: its entry in build.json."""
        profiles = component_profiles(component, self._profiles)
        self._report(f"{label}: building for {'; '.join(describe(component, profile) for profile in profiles)}")
        plan_identity, started = self._identity(component), perf_counter()
        plan, channels = self._plan(component, profiles, label)
        seconds = perf_counter() - started
        saved = self._cache.note(plan_identity, seconds)
        self._report(
            f"{label}: built in {seconds:.1f} s"
            + ("" if saved is None else f"; the timing cache saved {max(0.0, saved):.1f} s")
        )
        entry = {
            "sha256": hashlib.sha256(plan).hexdigest(),
            "bytes": len(plan),
            "onnx": onnx_hash(self._bundle, component),
            "identity": plan_identity,
            "profiles": [str(profile) for profile in profiles],
            "seconds": {
                "build": round(seconds, 2),
                "saved_by_timing_cache": None if saved is None else round(saved, 2),
            },
        }
        checks = self._check(component, plan, profiles, channels, compare, diagnose)
        _write(folder / f"{component}.plan", plan)
        told = (
            f"{checks['difference']['relative_rms']:.1e} from ONNX Runtime"
            if checks["compared"]
            else f"not compared ({checks['reason']})"
        )
        self._report(
            f"{label}: {told}, " + ", ".join(f"{one['milliseconds']:.2f} ms at {one['at']}" for one in checks["timed"])
        )
        return {**entry, "check": checks}

    def _plan(
        self, component: str, profiles: Sequence[Shapes], label: str, kept: Sequence[str] = ()
    ) -> tuple[bytes, int]:
        """The serialized plan, and the size of the text's embeddings (0 where there is no text). Tensors in `kept`
        become outputs."""
        with self._device:
            try:
                return self._build(component, profiles, label, kept)
            except BaseException as error:
                clear_frames(error.__traceback__)  # what TensorRT made goes while its GPU is current
                raise

    def _build(self, component: str, profiles: Sequence[Shapes], label: str, kept: Sequence[str]) -> tuple[bytes, int]:
        trt, log = self._trt, open_log(self._trt)

        def fail(what: str) -> PlanBuildError:
            return PlanBuildError(
                f"TensorRT {trt.__version__} {what} for the {component}; {log.tail()}. The old plans are untouched"
            )

        def made(what: str, create: Callable[..., Any], *arguments: Any) -> Any:
            if (value := versions.none_for_null(create, *arguments)) is None:
                raise fail(f"made no {what}")
            return value

        builder = made("builder", trt.Builder, log)
        network = made("network", builder.create_network, versions.network_flags(trt))
        network.name = component
        parser = made("parser", trt.OnnxParser, network, log)
        if not parser.parse_from_file(str(self._bundle.graphs[component])):
            reasons = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
            raise fail(f"does not parse {self._bundle.graphs[component]} ({reasons})")
        constants = versions.replace_plugins(trt, network)
        mark_outputs(trt, network, kept)
        config = made("configuration", builder.create_builder_config)
        self._configure(config)
        self._constrain(component, network, config, label)
        channels = set_profiles(builder, network, config, component, profiles, fail)
        cache = self._cache.attach(config, self._report)
        phases, cancellable = Phases(), versions.has_progress(trt)
        if cancellable:
            watcher = monitor(trt, phases)
            config.progress_monitor = watcher

        def work() -> bytes:
            with self._device:
                plan = builder.build_serialized_network(network, config)
                return b"" if plan is None else bytes(memoryview(plan))

        plan = watch(work, label, phases, cancellable, self._report)
        del constants  # the network has read them until here
        self._cache.save(cache)
        if not plan:
            raise fail("built no plan")
        return plan, channels

    def _constrain(self, component: str, network: Any, config: Any, label: str) -> None:
        """Precisions on TensorRT 8.6, where the network has none. PlanBuildError where they would reach too far."""
        pinned, layers = versions.constrain_precision(self._trt, network, config, self._bundle.precision)
        if pinned:
            self._report(f"{label}: {pinned} of {layers} layers pinned to float32")
        if pinned > MOST_PINNED * layers:
            raise PlanBuildError(
                f"{pinned} of {layers} layers of the {component} would be pinned to float32, which makes a plan "
                "several times slower; "
                f"at most a quarter should be. Use TensorRT 10.12 or later, or build the bundle with --precision fp32"
            )

    def _configure(self, config: Any) -> None:
        trt, settings = self._trt, self._settings
        config.builder_optimization_level = settings.optimization_level
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if settings.workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace)
        if settings.max_aux_streams is not None:
            config.max_aux_streams = settings.max_aux_streams
        versions.configure(trt, config)

    def _check(
        self, component: str, plan: bytes, profiles: Sequence[Shapes], channels: int, compare: bool, diagnose: bool
    ) -> dict[str, Any]:
        """Runs a plan at the size that each profile is best at: differences from ONNX Runtime, finite values, time."""
        reason = "--no-verify" if not compare else None if installed("onnxruntime") else "onnxruntime is not installed"
        found, timed = list[Difference](), []
        if reason is None:
            from engine.backends.onnxruntime import OnnxRuntimeBackend

            reference = OnnxRuntimeBackend(self._bundle.graphs)
        runtime = TensorRtRuntime(self._device.number)
        try:
            runtime.load([(component, plan)])
            for profile in profiles:
                inputs = profile_inputs(component, profile, channels)
                outputs = runtime.run(component, inputs)
                for name, value in zip(OUTPUTS[component], outputs):
                    if not np.isfinite(value.astype(np.float32)).all():
                        raise VerificationError(
                            f"the plan of the {component} gives values that are not finite in {name} at "
                            f"{describe(component, profile)}; build the bundle "
                            "with --precision bf16 or fp32. The old plans are untouched. "
                            f"{self._diagnosis(component, profile, inputs)}"
                        )
                if reason is None:
                    expected = reference.run(component, inputs)
                    found += [
                        difference(compared(component, name, a), compared(component, name, b))
                        for name, a, b in zip(OUTPUTS[component], outputs, expected)
                    ]
                seconds = runtime.seconds(component, inputs, TIMED_RUNS + 3)[3:]
                timed.append({"at": describe(component, profile), "milliseconds": round(1000 * median(seconds), 4)})
        finally:
            runtime.close()
        checks: dict[str, Any] = {"compared": reason is None, "reason": reason, "difference": None, "timed": timed}
        if reason is None:
            worst = Difference(max(d.max_abs for d in found), max(d.relative_rms for d in found))
            checks["difference"] = as_json(worst)
            allowed = tolerance(component, self._bundle.precision)
            if worst.relative_rms > allowed or diagnose:
                beyond = worst.relative_rms > allowed
                diagnosis = self._diagnosis(
                    component, profiles[0], profile_inputs(component, profiles[0], channels), beyond
                )
                if beyond:
                    raise VerificationError(
                        f"the plan of the {component} differs from ONNX Runtime by {worst.relative_rms:.2e} (relative "
                        f"RMS); {allowed:.0e} "
                        f"is allowed in {self._bundle.precision}. The old plans are untouched. {diagnosis}"
                    )
                self._report(f"{component}: {diagnosis}")
        return checks

    def _diagnosis(
        self, component: str, profile: Shapes, inputs: Mapping[str, np.ndarray], plan_differs: bool = True
    ) -> str:
        """What a comparison layer by layer finds, for the end of a message; why there is none, where it fails."""
        self._report(f"{component}: building once more with every layer's output kept, to compare them one by one")
        try:
            layers, expected = every_output(self._bundle.graphs[component], inputs)
            plan, _ = self._plan(component, [profile], f"{component}, diagnosis", list(expected))
            runtime = TensorRtRuntime(self._device.number)
            try:
                runtime.load([(component, plan)], contract=False)
                ours = dict(zip(runtime.engines[component].outputs, runtime.run(component, inputs)))
            finally:
                runtime.close()
        except (ExportError, EngineError) as error:
            return f"It could not be compared layer by layer: {error}"
        return verdict(component, self._bundle.precision, layers, ours, expected, plan_differs)


def component_profiles(component: str, profiles: Sequence[Shapes]) -> list[Shapes]:
    """The profiles of a component, without doublets: the text encoder takes 1 text up to all prompts and negative
    prompts, the VAE what `PIXELS_PER_DECODE` allows together."""
    if component == "denoiser":
        return list(profiles)
    one = Range(1, 1, 1)
    if component == "text_encoder":
        most = max(profile.batch.max for profile in profiles)
        return [Shapes(one, one, one, Range(1, 2 * profiles[0].batch.opt, 2 * most))]
    made = []
    for profile in profiles:
        most = max(1, PIXELS_PER_DECODE // (profile.height.opt * profile.width.opt))
        batch = Range(*(min(most, size) for size in (profile.batch.min, profile.batch.opt, profile.batch.max)))
        made.append(Shapes(profile.height, profile.width, batch, one))
    return list(dict.fromkeys(made))


def describe(component: str, profile: Shapes) -> str:
    """What a component's profile serves, in words."""
    if component == "text_encoder":
        return f"{profile.rows} texts"
    return str(profile) if component == "denoiser" else f"{profile.height} x {profile.width}, batch {profile.batch}"


def profile_shapes(component: str, profile: Shapes, channels: int, which: str) -> dict[str, Shape]:
    """Input shapes at a profile's "min", "opt" or "max"."""
    assert profile.rows is not None
    batch, rows, height, width = (
        getattr(side, which) for side in (profile.batch, profile.rows, profile.height, profile.width)
    )
    return input_shapes(component, batch, rows, height // VAE_FACTOR, width // VAE_FACTOR, channels)


def profile_inputs(component: str, profile: Shapes, channels: int) -> dict[str, np.ndarray]:
    """Random inputs of the size that a profile is best at."""
    assert profile.rows is not None
    return random_inputs(
        component,
        profile.batch.opt,
        profile.rows.opt,
        profile.height.opt // VAE_FACTOR,
        profile.width.opt // VAE_FACTOR,
        channels,
    )


def set_profiles(
    builder: Any,
    network: Any,
    config: Any,
    component: str,
    profiles: Sequence[Shapes],
    fail: Callable[[str], Exception],
) -> int:
    """Tells the builder the sizes. A dimension that is the same everywhere is fixed in the network itself, which makes
    a faster plan than a profile whose minimum is its maximum. Returns the size of the text's embeddings, 0 where there
    is no text."""
    inputs = {network.get_input(i).name: network.get_input(i) for i in range(network.num_inputs)}
    if set(inputs) != set(INPUTS[component]):
        raise fail(f"found the inputs {sorted(inputs)} instead of {sorted(INPUTS[component])}")
    channels = int(inputs["context"].shape[2]) if "context" in inputs else 0
    limits = [
        [profile_shapes(component, profile, channels, which) for which in ("min", "opt", "max")] for profile in profiles
    ]
    for name, tensor in inputs.items():
        sizes = [set(values) for values in zip(*(shapes[name] for profile in limits for shapes in profile))]
        tensor.shape = tuple(values.pop() if len(values) == 1 else -1 for values in sizes)
    for profile in limits:
        added = builder.create_optimization_profile()
        accepted = all(
            versions.accepted(added.set_shape, name, *(shapes[name] for shapes in profile)) for name in inputs
        )
        if not accepted or config.add_optimization_profile(added) < 0:
            raise fail(f"refused the profile {profile}")
    return channels


class TimingCache:
    """What TensorRT measured in earlier builds on this machine, kept beside the plans, with the seconds of the builds
    without it."""

    def __init__(self, folder: Path) -> None:
        self._file, self._log = (
            folder.with_name(f"{folder.name}.timing.cache"),
            folder.with_name(f"{folder.name}.timing.json"),
        )

    def attach(self, config: Any, report: Report) -> Any:
        """The cache in a builder's configuration; a new one where there is none, or none that this machine can use."""
        content = self._file.read_bytes() if self._file.is_file() else b""
        cache = config.create_timing_cache(content)
        if content and (cache is None or not config.set_timing_cache(cache, False)):
            report(f"{self._file} is not usable here and will be replaced")
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, False)
        elif not content:
            config.set_timing_cache(cache, False)
        return cache

    def save(self, cache: Any) -> None:
        """Writes it, whether or not the build succeeded."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        _write(self._file, bytes(memoryview(cache.serialize())))

    def note(self, key: str, seconds: float) -> float | None:
        """Seconds that a build was faster than the first of the same plan; None if it was the first."""
        try:
            first = json.loads(self._log.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            first = {}
        if key in first:
            return float(first[key]) - seconds
        _write(self._log, json.dumps({**first, key: round(seconds, 2)}).encode())
        return None


def _write(file: Path, content: bytes) -> None:
    unfinished = file.with_name(f".{file.name}.tmp")
    unfinished.write_bytes(content)
    os.replace(unfinished, file)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """The lock of the bundle's builder, which takes it with the library filelock; that is not installed where plans are
    built."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_LOCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
