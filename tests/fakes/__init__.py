"""A GPU machine in host memory: `with install("10.16.1") as machine:` puts a fake `tensorrt` and a fake
`cuda.bindings.driver` in place.

Inside, `import tensorrt` and `from cuda.bindings import driver` find the fakes; afterwards everything is as before.
`machine.cuda` is a FakeCuda (cuda_driver.py), `machine.tensorrt` the module, `machine.library` its faults, counts and
messages.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType

from .cuda_device import Device
from .cuda_driver import FakeCuda
from .tensorrt import make_tensorrt
from .tensorrt_api import VERSIONS, Library

__all__ = ["VERSIONS", "Device", "FakeCuda", "Machine", "install", "make_tensorrt"]

REPLACED = ("tensorrt", "cuda")


@dataclass(frozen=True)
class Machine:
    cuda: FakeCuda
    tensorrt: ModuleType

    @property
    def library(self) -> Library:
        return self.tensorrt._library


@contextmanager
def install(
    version: str = "10.16.1", devices: Sequence[Device] = (Device(),), driver: bool = True, eager: bool = False
) -> Iterator[Machine]:
    """The modules of a machine with that TensorRT and these devices; the other arguments are FakeCuda's."""
    cuda = FakeCuda(devices, driver, eager)
    tensorrt, driver_module = make_tensorrt(version, cuda), cuda.module()
    package, bindings = ModuleType("cuda"), ModuleType("cuda.bindings")
    package.__path__ = bindings.__path__ = []
    package.bindings, bindings.driver, bindings.__version__ = bindings, driver_module, "13.5.0"
    for module in (tensorrt, package, bindings, driver_module):
        module.__spec__ = ModuleSpec(module.__name__, None)
    kept = {name: module for name, module in sys.modules.items() if name.split(".")[0] in REPLACED}
    for name in kept:
        del sys.modules[name]
    sys.modules |= {
        "tensorrt": tensorrt,
        "cuda": package,
        "cuda.bindings": bindings,
        "cuda.bindings.driver": driver_module,
    }
    try:
        yield Machine(cuda, tensorrt)
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] in REPLACED]:
            del sys.modules[name]
        sys.modules |= kept
