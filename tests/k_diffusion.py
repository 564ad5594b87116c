"""k-diffusion's samplers, for tests. The package wants torchvision, kornia, wandb and more at its import. The samplers
need none of that, so the modules are imported without the package's `__init__`."""

import importlib
import importlib.metadata
import sys
from types import ModuleType


def _import_sampling() -> ModuleType:
    package = ModuleType("k_diffusion")
    package.__path__ = [str(importlib.metadata.distribution("k-diffusion").locate_file("k_diffusion"))]
    functional = ModuleType("torchvision.transforms.functional")  # k_diffusion.utils imports it and we don't call that
    transforms = ModuleType("torchvision.transforms")
    transforms.functional = functional
    stand_ins = {
        "k_diffusion": package,
        "torchvision": ModuleType("torchvision"),
        "torchvision.transforms": transforms,
        "torchvision.transforms.functional": functional,
    }
    missing = {name: module for name, module in stand_ins.items() if name not in sys.modules}
    sys.modules.update(missing)
    try:
        return importlib.import_module("k_diffusion.sampling")
    finally:
        for name in missing:
            if name.startswith("torchvision"):
                del sys.modules[name]


sampling = _import_sampling()
