"""Finds graphs that another bundle in the same folder has, so they need not be traced."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.bundle import sha256
from engine.errors import BundleError
from engine.manifest import Graph, Manifest, read

from .folders import link


@dataclass(frozen=True)
class Made:
    """A bundle that has a component's graph already."""

    folder: Path
    manifest: Manifest
    replaced: bool = False
    """Whether it is the bundle that the new one replaces."""

    def graph(self, component: str) -> Graph:
        return self.manifest.components[component]

    def check(self, component: str) -> Any:
        """The graph's difference from torch. None if it was not measured."""
        return self.manifest.verification.components.get(component)

    def has(self, component: str, fingerprint: str) -> bool:
        """Whether its graph is the one that would be traced."""
        graph = self.manifest.components.get(component)
        return graph is not None and graph.fingerprint == fingerprint

    def take(self, component: str, folder: Path) -> bool:
        """Brings the component's files into `folder`. Returns whether they have the content that this bundle's manifest
        names; if not, none is left there. Those of a bundle that stays are copied: hard links would make two bundles
        change together, and the onnx library refuses to read weights that have several names."""
        files = self.manifest.files_of(component)
        try:
            if any((self.folder / name).is_symlink() for name in ("", "onnx", *files)):
                return False
            bring = link if self.replaced else shutil.copyfile
            for name in files:
                bring(self.folder / name, folder / name)
            if all(sha256(folder / name) == file.sha256 for name, file in files.items()):
                return True
        except FileNotFoundError:  # it is being replaced, or was damaged
            pass
        for name in files:
            (folder / name).unlink(missing_ok=True)
        return False


def siblings(target: Path) -> list[Made]:
    """The other bundles in the folder of `target`. Folders that are no bundles, and damaged bundles, are left out."""
    return list(_readable(sorted(target.parent.iterdir()), target))


def _readable(folders: Iterable[Path], target: Path) -> Iterator[Made]:
    for folder in folders:
        if folder == target or folder.name.startswith("."):
            continue
        try:
            yield Made(folder, Manifest.of(read(folder)))
        except (BundleError, OSError):
            continue
