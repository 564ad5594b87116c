"""ONNX graphs of a bundle to TensorRT plans for the GPU of this machine. Needs numpy, tensorrt and cuda-bindings, no
torch."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import Any

from engine.backends.tensorrt import versions as versions
from engine.backends.tensorrt.cuda import Device
from engine.bundle import Bundle, sha256
from engine.contract import Family, Shapes
from engine.errors import EngineError
from engine.plans import BUILD, FORMAT, Machine, Plans, format_profile, identity, onnx_hash
from engine.version import __version__

from ..building import Replacement, Report, beside, keep
from ..errors import OutputError, RoomError, UsageError
from .check import Checker
from .compiling import DEFAULT_SETTINGS, Compiler, Settings
from .files import TimingCache, locked, write
from .profiles import component_profiles, describe

BYTES_PER_PIXEL = 2048
"""Of activations, and of what the builder tries out: an estimate for the U-Net and the VAE, guidance included."""

BUILDER_BYTES = 1 << 30
"""What CUDA and the builder take besides, an estimate too."""

FINISHED = "finished.json"


@dataclass(frozen=True)
class PlanOutcome:
    """What a build did: where the plans are, build.json, and which components were built (none: they were up to
    date)."""

    folder: Path
    build: dict[str, Any]
    built: tuple[str, ...]


def build_plans(
    folder: Path,
    profiles: Sequence[Shapes],
    settings: Settings = DEFAULT_SETTINGS,
    *,
    components: Sequence[str] | None = None,
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
    _require_support(bundle, trt)
    asked = list(bundle.graphs) if components is None else _there(bundle, components)
    device = Device(gpu)
    try:
        versions.require_driver(trt, device.driver_version)
        machine = Machine(device.name, device.compute_capability, trt.__version__)
        cache = TimingCache(bundle.folder / "plans" / machine.folder)
        compiler = Compiler(bundle, trt, device, settings, cache, report)
        checker = Checker(bundle, device.number, compiler, compare, diagnose, report)
        builder = PlanBuilder(bundle, machine, device, profiles, compiler, checker, report)
        with locked(beside(folder, "lock")):
            return builder.build(asked, force or diagnose)
    finally:
        with device.closing():
            pass


def _require_support(bundle: Bundle, trt: Any) -> None:
    """UsageError for graphs that this TensorRT cannot take."""
    if bundle.precision == "bf16" and not versions.supports_bf16(trt):
        raise UsageError(
            f"TensorRT {trt.__version__} has no bfloat16; build the bundle with --precision fp16, or use TensorRT 10 "
            "or 11"
        )
    opset, newest = max(graph.opset for graph in bundle.contents.components.values()), versions.newest_opset(trt)
    if opset > newest:
        raise UsageError(
            f"the graphs in {bundle.folder} are of opset {opset}, and TensorRT {trt.__version__} takes {newest}; build "
            f"the bundle with --opset {newest}, or use TensorRT 10.14 or later"
        )


def _there(bundle: Bundle, components: Sequence[str]) -> list[str]:
    """The components that were asked for. UsageError for one that the bundle lacks."""
    if lacking := [name for name in components if name not in bundle.graphs]:
        raise UsageError(
            f"{bundle.folder} has no {', '.join(lacking)}; --components takes some of {', '.join(bundle.graphs)}"
        )
    return list(components)


def own_files(family: Family) -> frozenset[str]:
    """What the builder writes into a folder of plans; other files there stay."""
    return frozenset([BUILD, *map(_file, family.names)])


def _file(component: str) -> str:
    return f"{component}.plan"


class PlanBuilder:
    """One build of a bundle's plans on one GPU."""

    def __init__(
        self,
        bundle: Bundle,
        machine: Machine,
        device: Device,
        profiles: Sequence[Shapes],
        compiler: Compiler,
        checker: Checker,
        report: Report,
    ) -> None:
        self._bundle, self._machine, self._device, self._report = bundle, machine, device, report
        self._profiles, self._compiler, self._checker = profiles, compiler, checker
        self._folder = bundle.folder / "plans" / machine.folder
        self._unfinished = beside(self._folder, "building")
        self._replacement = Replacement(self._folder, own_files(bundle.family).__contains__, "publishing")
        self._components = {name: bundle.family[name] for name in bundle.graphs}

    def build(self, components: Sequence[str], again: bool) -> PlanOutcome:
        """Builds what changed, with `again` everything that is asked for; `Plans.find` describes the result. Each
        finished plan is noted beside the old plans and outlives a failure or the end of the process. Where the old
        plans do not run, it takes their place at once; where they do, they stay until all that a pipeline needs is
        there."""
        self._replacement.recover()
        old, finished = self._intact(self._folder / BUILD), self._intact(self._unfinished / FINISHED)
        renewed = set(components) if again else set()
        entries = {name: entry for name, entry in {**old, **finished}.items() if name not in renewed}
        todo = [name for name in self._order() if name in components and name not in entries]
        running = self._running()
        if not todo and running and running["profiles"] == self._wanted_profiles() and entries == old:
            self._report(f"{self._folder} is up to date")
            return PlanOutcome(self._folder, running, ())
        self._require_room(todo)
        if not finished:
            shutil.rmtree(self._unfinished, ignore_errors=True)
        try:
            self._keep([name for name in entries if name not in finished], entries)
            self._build_all(todo, entries, publish_each=not running)
        except BaseException:
            if not (self._unfinished / FINISHED).exists():
                shutil.rmtree(self._unfinished, ignore_errors=True)
            raise
        return self._conclude(todo, entries, bool(running))

    def _keep(self, unchanged: Iterable[str], entries: Mapping[str, Any]) -> None:
        """Takes plans that need not be built from the old folder."""
        self._unfinished.mkdir(parents=True, exist_ok=True)
        keep(map(_file, unchanged), self._folder, self._unfinished)
        for name in entries:
            self._report(f"{name}: unchanged")

    def _build_all(self, todo: Sequence[str], entries: dict[str, Any], publish_each: bool) -> None:
        """Builds plans one by one, and adds their entries."""
        for number, name in enumerate(todo, 1):
            entries[name] = self._component(name, f"[{number}/{len(todo)}] {name}")
            write(self._unfinished / FINISHED, json.dumps({"components": entries}).encode())
            if publish_each:
                self._publish(entries)

    def _conclude(self, todo: Sequence[str], entries: dict[str, Any], running: bool) -> PlanOutcome:
        """Publishes what was built, unless plans that run would make way for too few."""
        built = tuple(name for name in self._bundle.family.names if name in todo)
        missing = [name for name in self._bundle.family.required if name not in entries]
        needed = f"a pipeline needs the plans of {', '.join(missing)} too"
        if missing and running:
            self._report(f"{self._folder} stays as it was; for these sizes and settings {needed}")
            return PlanOutcome(self._folder, self._content(entries), built)
        content = self._publish(entries)
        shutil.rmtree(self._unfinished, ignore_errors=True)
        self._report(f"wrote {self._folder}" + (f"; {needed}" if missing else ""))
        return PlanOutcome(self._folder, content, built)

    def _publish(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Puts the finished plans in the old ones' place: build.json."""
        content = self._content(entries)
        with self._replacement.begin() as publishing:
            keep(map(_file, entries), self._unfinished, publishing)
            (publishing / BUILD).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            self._replacement.swap()
        return content

    def _content(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """build.json."""
        return {
            "format": FORMAT,
            "machine": asdict(self._machine),
            "precision": self._bundle.precision,
            "profiles": self._wanted_profiles(),
            "settings": asdict(self._compiler.settings),
            "components": {name: entries[name] for name in self._bundle.family.names if name in entries},
            "cuda_driver": self._device.driver_version,
            "latentrt": __version__,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }

    def _wanted_profiles(self) -> list[dict[str, list[int]]]:
        return [format_profile(profile) for profile in self._profiles]

    def _order(self) -> list[str]:
        """What a pipeline needs first, and of that the largest: it takes longest, and its failure is worth most."""
        return sorted(self._components, key=lambda name: (not self._components[name].required, -self._weights(name)))

    def _identity(self, component: str) -> str:
        """A hash of all that determines a plan."""
        return identity(
            onnx_hash(self._bundle, component),
            asdict(self._machine),
            self._bundle.precision,
            asdict(self._compiler.settings),
            [str(profile) for profile in component_profiles(self._components[component], self._profiles)],
        )

    def _intact(self, file: Path) -> dict[str, Any]:
        """Entries of plans that are what would be built, and whose files are those that were built; `file` is a
        build.json or a finished.json."""
        found = {}
        for name in self._components:
            with suppress(OSError, ValueError, KeyError, TypeError):
                entry = json.loads(file.read_text(encoding="utf-8"))["components"][name]
                same = entry["identity"] == self._identity(name)
                if same and entry["sha256"] == sha256(file.parent / _file(name)):
                    found[name] = entry
        return found

    def _running(self) -> dict[str, Any] | None:
        """build.json of plans that a pipeline can run."""
        if not self._folder.is_dir():
            return None
        try:
            plans = Plans.find(self._bundle, self._machine)
            for component in plans.build["components"]:
                plans.read(component)
        except EngineError as error:
            self._report(f"the plans in {self._folder} do not run and will be replaced: {error}")
            return None
        complete = plans.build["components"].keys() >= set(self._bundle.family.required)
        return dict(plans.build) if complete else None

    def _require_room(self, components: Sequence[str]) -> None:
        """RoomError or OutputError where the GPU or the disk has less than an estimate of what the build takes."""
        if not components:
            return
        weights = [self._weights(component) for component in components]
        pixels = max(profile.height.max * profile.width.max * profile.batch.max for profile in self._profiles)
        needed = 2 * max(weights) + BYTES_PER_PIXEL * pixels + BUILDER_BYTES
        with self._device:
            free, total = self._device.memory()
        if free < needed:
            raise RoomError(
                f"the build is estimated to need {needed / 2**30:.1f} GiB of the GPU's memory, and {free / 2**30:.1f} "
                f"of {total / 2**30:.1f} GiB are free on GPU {self._device.number} ({self._device.name}); close other "
                "programs there, or build for smaller sizes"
            )
        disk, space = int(1.2 * sum(weights)), shutil.disk_usage(self._bundle.folder).free
        if space < disk:
            raise OutputError(
                f"the plans are estimated to need {disk / 1e9:.2f} GB, and {space / 1e9:.2f} GB are free at "
                f"{self._bundle.folder}; free some"
            )

    def _weights(self, component: str) -> int:
        return sum(file.bytes for file in self._bundle.contents.files_of(component).values())

    def _component(self, name: str, label: str) -> dict[str, Any]:
        """Builds, checks and writes one plan: its entry in build.json."""
        component = self._components[name]
        profiles = component_profiles(component, self._profiles)
        self._report(f"{label}: building for {'; '.join(describe(component, profile) for profile in profiles)}")
        plan_identity, started = self._identity(name), perf_counter()
        plan, sizes = self._compiler.plan(component, profiles, label)
        seconds = perf_counter() - started
        saved = self._compiler.cache.note(plan_identity, seconds)
        gain = "" if saved is None else f"; the timing cache saved {max(0.0, saved):.1f} s"
        self._report(f"{label}: built in {seconds:.1f} s{gain}")
        checks = self._checker.check(component, plan, profiles, sizes)
        write(self._unfinished / _file(name), plan)
        self._report(f"{label}: {_verdict(checks)}")
        return {
            "sha256": hashlib.sha256(plan).hexdigest(),
            "bytes": len(plan),
            "onnx": onnx_hash(self._bundle, name),
            "identity": plan_identity,
            "profiles": [str(profile) for profile in profiles],
            "seconds": {
                "build": round(seconds, 2),
                "saved_by_timing_cache": None if saved is None else round(saved, 2),
            },
            "check": checks,
        }


def _verdict(checks: Mapping[str, Any]) -> str:
    """How far a plan is from ONNX Runtime and how long it takes, in words."""
    told = f"not compared ({checks['reason']})"
    if checks["compared"]:
        told = f"{checks['difference']['relative_rms']:.1e} from ONNX Runtime"
    return ", ".join([told, *(f"{one['milliseconds']:.2f} ms at {one['at']}" for one in checks["timed"])])
