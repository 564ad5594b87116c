"""Which libraries are here, without importing them, and how a missing one is installed."""
from __future__ import annotations

import shlex
from importlib.util import find_spec

REQUIREMENTS: dict[str, tuple[str, ...]] = {
    "runtime": ("numpy>=1.26", "pillow>=10", "tokenizers>=0.21", "tqdm>=4.66"),
    "cpu": ("onnxruntime>=1.20",),
    "openvino": ("openvino>=2025.2",),
    "cuda": ("onnxruntime-gpu>=1.21",),
    "tensorrt": ("tensorrt>=10.12,<12", "cuda-bindings>=12.8", "onnxruntime>=1.20", "polygraphy>=0.49"),
    "export": ("torch>=2.9", "diffusers>=0.35", "transformers>=5", "safetensors>=0.5", "onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.20",
               "huggingface_hub>=1", "filelock>=3.16"),
    "benchmarks": ("matplotlib>=3.8", "psutil>=6"),
}
"""pyproject.toml's extras, and as "runtime" its dependencies. Messages name these and not `latentrt[...]`: no index has a package of that name."""


def install_command(*extras: str) -> str:
    """The command that installs what extras of this package need; it works from any folder."""
    wanted = dict.fromkeys(requirement for extra in extras for requirement in REQUIREMENTS[extra])
    return "python -m pip install " + " ".join(shlex.quote(requirement) for requirement in wanted)


def installed(module: str) -> bool:
    """Whether `import module` would find something."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False
