"""TensorRT plans of a bundle: where they lie, what they are for, and whether this machine may run them.

    <bundle>/plans/<gpu>-sm<cc>-trt<version>/build.json        what the plans were built from, for and with; their
    SHA-256 <bundle>/plans/<gpu>-sm<cc>-trt<version>/<component>.plan
    <bundle>/plans/<gpu>-sm<cc>-trt<version>.timing.cache      what the next build need not measure again

A plan is executable code for one GPU and one version of TensorRT. Everything that is known about it is compared with
this machine and this bundle before a byte of it is deserialized, and bytes whose SHA-256 is not that of build.json
never are.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .bundle import Bundle
from .commands import builder
from .contract import Range, Shapes
from .errors import PlanDamagedError, PlanError, PlanMismatchError, PlanNotFoundError

FORMAT = 3
"""Version of build.json. It changes whenever an older runtime would misread a newer one, or the builder makes other
plans.
2: without TF32; on TensorRT 8.6 without plugins, and with fewer layers constrained to float32.
3: profiles have chunks."""

BUILD = "build.json"


@dataclass(frozen=True)
class Machine:
    """The GPU and the version of TensorRT that a plan is bound to."""

    gpu: str
    compute_capability: str
    tensorrt: str

    @property
    def folder(self) -> str:
        """The name of the folder of its plans."""
        gpu = re.sub(r"[^A-Za-z0-9.]+", "_", self.gpu).strip("_")
        return f"{gpu}-sm{self.compute_capability.replace('.', '')}-trt{self.tensorrt}"


@dataclass(frozen=True)
class Plans:
    """Plans whose build.json fits a bundle and a machine. `build` is its content."""

    folder: Path
    build: Mapping[str, Any]
    profiles: tuple[Shapes, ...]

    @classmethod
    def find(cls, bundle: Bundle, machine: Machine) -> Plans:
        """The plans of `bundle` for `machine`. PlanNotFoundError, PlanMismatchError or PlanDamagedError say why there
        are none and what builds them."""
        folder = bundle.folder / "plans" / machine.folder
        if not folder.is_dir():
            raise PlanNotFoundError(_absent(bundle, machine))
        build = read_build(folder, bundle)
        if differences := mismatches(build, bundle, machine):
            raise PlanMismatchError(
                f"the plans in {folder} are not for this bundle on this machine: {'; '.join(differences)}. "
                f"Build them again: {plans_command(bundle.folder)}"
            )
        for component, entry in build["components"].items():
            file = folder / f"{component}.plan"
            if not file.is_file() or file.is_symlink() or file.stat().st_size != entry["bytes"]:
                state = (
                    f"has {file.stat().st_size} bytes instead of {entry['bytes']}" if file.is_file() else "is missing"
                )
                raise PlanDamagedError(f"{file} {state}; build it again: {plans_command(bundle.folder)}")
        return cls(folder, build, tuple(parse_profile(profile) for profile in build["profiles"]))

    def read(self, component: str) -> bytes:
        """The plan of a component, if its SHA-256 is that of build.json. PlanDamagedError otherwise."""
        file, entry = self.folder / f"{component}.plan", self.build["components"].get(component)
        again = f"build the plans again: {plans_command(self.folder.parents[1])}"
        if entry is None:
            raise PlanNotFoundError(f"{self.folder} has no plan of the {component}; {again}")
        try:
            content = file.read_bytes()
        except OSError as error:
            raise PlanDamagedError(f"{file} is not readable ({error.strerror}); {again}") from error
        actual = hashlib.sha256(content).hexdigest()
        if actual != entry["sha256"]:
            raise PlanDamagedError(
                f"{file} has SHA-256 {actual[:12]}... instead of {entry['sha256'][:12]}... and was not executed; "
                f"{again}"
            )
        return content


def plans_command(folder: Path) -> str:
    """The command that builds the plans of the bundle in `folder`."""
    return f"{builder()} --backend tensorrt --bundle {shlex.quote(str(folder))}"


def read_build(folder: Path, bundle: Bundle) -> dict[str, Any]:
    """The content of build.json, with everything that this module uses. PlanDamagedError or PlanMismatchError
    otherwise."""
    file = folder / BUILD
    try:
        build = json.loads(file.read_text(encoding="utf-8"))
        if build["format"] != FORMAT:
            raise PlanMismatchError(
                f"{file} has format {build['format']!r}, not {FORMAT}; build the plans again: "
                f"{plans_command(bundle.folder)}"
            )
        known = [build["machine"][field] for field in ("gpu", "compute_capability", "tensorrt")] + [build["precision"]]
        known += [
            entry[field]
            for entry in build["components"].values()
            for field in ("sha256", "bytes", "onnx", "identity", "profiles")
        ]
        known += [build["settings"]]
        _ = [parse_profile(profile) for profile in build["profiles"]]
        if not build["profiles"] or not build["components"].keys() <= set(bundle.family.names):
            raise ValueError("profiles or components")
    except OSError as error:
        raise PlanDamagedError(
            f"{file} is not readable ({error.strerror}); build the plans again: {plans_command(bundle.folder)}"
        ) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PlanDamagedError(
            f"{file} has a missing or wrong field: {error}; build the plans again: {plans_command(bundle.folder)}"
        ) from error
    return dict(build)


def mismatches(build: Mapping[str, Any], bundle: Bundle, machine: Machine) -> list[str]:
    """Each difference between what plans were built for and this bundle and machine, as text."""
    built, here = build["machine"], asdict(machine)
    words = {"gpu": "GPU", "compute_capability": "compute capability", "tensorrt": "TensorRT"}
    found = [
        f"{words[field]} {built[field]} there, {here[field]} here" for field in here if built[field] != here[field]
    ]
    if build["precision"] != bundle.precision:
        found.append(f"precision {build['precision']} there, {bundle.precision} in the bundle")
    changed = [
        component for component, entry in build["components"].items() if entry["onnx"] != onnx_hash(bundle, component)
    ]
    if changed:
        found.append(f"the ONNX graphs of {', '.join(changed)} have changed since")
    other = [
        component
        for component, entry in build["components"].items()
        if component not in changed
        and entry["identity"]
        != identity(entry["onnx"], built, build["precision"], build["settings"], entry["profiles"])
    ]
    if other:
        found.append(f"profiles or builder settings in {BUILD} are not those that {', '.join(other)} were built with")
    return found


def identity(
    onnx: str, machine: Mapping[str, str], precision: str, settings: Mapping[str, Any], profiles: Sequence[str]
) -> str:
    """A hash of everything that a plan depends on: graph and weights, machine, precision, the builder's settings and
    version, sizes."""
    parts = {
        "format": FORMAT,
        "onnx": onnx,
        "machine": dict(machine),
        "precision": precision,
        "settings": dict(settings),
        "profiles": list(profiles),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def onnx_hash(bundle: Bundle, component: str) -> str:
    """A hash of a component's graph and weights, made from the manifest's hashes of the files."""
    parts = [file.sha256 for _, file in sorted(bundle.contents.files_of(component).items())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _absent(bundle: Bundle, machine: Machine) -> str:
    """The message for a machine without plans. It lists the plans for other machines and how they differ."""
    here = f"{machine.gpu}, compute capability {machine.compute_capability}, TensorRT {machine.tensorrt}"
    others = []
    for file in sorted((bundle.folder / "plans").glob(f"[!.]*/{BUILD}")):
        try:
            differences = mismatches(read_build(file.parent, bundle), bundle, machine)
        except PlanError:
            continue
        others.append(f"{file.parent.name} ({'; '.join(differences)})")
    known = f"those that it has are for other machines: {', '.join(others)}" if others else "it has none at all"
    return (
        f"{bundle.folder} has no TensorRT plans for this machine ({here}); {known}. "
        f"Build them: {plans_command(bundle.folder)}, or pass backend='onnxruntime'"
    )


def parse_profile(profile: Mapping[str, Any]) -> Shapes:
    """A profile in build.json: [min, opt, max] of height, width, batch, rows and chunks of 77 tokens."""
    return Shapes(**{side: Range(*profile[side]) for side in ("height", "width", "batch", "rows", "chunks")})


def format_profile(shapes: Shapes) -> dict[str, list[int]]:
    """A profile as build.json has it; see `parse_profile`."""
    sides = {"height": shapes.height, "width": shapes.width, "batch": shapes.batch, "rows": shapes.rows}
    sides["chunks"] = shapes.chunks or Range(1, 1, 1)
    return {name: [side.min, side.opt, side.max] for name, side in sides.items() if side is not None}
