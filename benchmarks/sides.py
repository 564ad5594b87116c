"""The sides of a comparison. A side is one of the contenders: one of our backends, diffusers, or optimum. Each makes
pictures in a process of its own.

It is asked first to load something, then for pictures. Started with `python -m benchmarks.sides`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.errors import SkippedSide
from benchmarks.worker import Worker, peak_bytes, serve
from engine.family import STABLE_DIFFUSION
from engine.libraries import import_library, installed

OURS = ("tensorrt", "openvino", "openvino-fp32", "onnxruntime")


@dataclass(frozen=True)
class DiffusersSettings:
    """How diffusers runs: dtype None is fp16 on a GPU and fp32 on a CPU."""

    dtype: str | None = None
    channels_last: bool = False
    compiled: bool = False


DIFFUSERS = {
    "diffusers": DiffusersSettings(),
    "diffusers-channels-last": DiffusersSettings(channels_last=True),
    "diffusers-fp32": DiffusersSettings("float32"),
    "diffusers-fp32-compile": DiffusersSettings("float32", True, True),
    "diffusers-bf16": DiffusersSettings("bfloat16", True),
    "diffusers-compile": DiffusersSettings("bfloat16", True, True),
}
THEIRS = (*DIFFUSERS, "optimum")


@dataclass(frozen=True)
class Setup:
    """What a side loads: its name, our bundle, the same model as a diffusers folder, the sampler's name in both worlds,
    threads (0 takes every core)."""

    side: str
    bundle: str
    model: str
    sampler: str
    threads: int


@dataclass(frozen=True)
class Request:
    """One call. `file` gets the pixels, [batch, H, W, 3] uint8."""

    prompt: str
    seed: int
    height: int
    width: int
    batch: int
    steps: int
    guidance_scale: float
    file: str


class Side(Worker):
    """A process that makes pictures. SkippedSide if what it needs is not installed, SideError if it fails."""

    def __init__(self, setup: Setup, python: str = sys.executable) -> None:
        started = perf_counter()
        super().__init__(setup.side, "benchmarks.sides", python)
        self.loaded = self.ask(asdict(setup))
        self.loaded["start"] = perf_counter() - started

    def picture(self, request: Request) -> dict[str, Any]:
        """Makes a picture. Returns the seconds of the stages and of the whole, the evaluations, and whether it waited
        for the device."""
        return self.ask(asdict(request))

    def finish(self) -> dict[str, Any]:
        """Ends the process. Returns its peak memory in bytes, and the device's if there is one."""
        answer = self.ask({"finish": True})
        self.close()
        return answer


class Ours:
    """Our pipeline on one backend."""

    def __init__(self, setup: Setup) -> None:
        from engine import Pipeline

        name = setup.side.removesuffix("-fp32")
        if not installed(name):
            raise SkippedSide(f"{name} is not installed")
        threads = setup.threads or None
        if setup.side == "openvino-fp32":
            from engine.backends.openvino.backend import OpenVinoBackend
            from engine.bundle import Bundle

            bundle = Bundle.open(setup.bundle)
            backend = OpenVinoBackend(bundle.graphs, bundle.shapes, threads)
            backend.load()
            self._pipeline = Pipeline(bundle, backend)
        else:
            self._pipeline = Pipeline.load(setup.bundle, backend=name, threads=threads)
        self.description = self._pipeline._backend.description
        self.precisions = dict.fromkeys(self._pipeline.bundle.graphs, self._pipeline.bundle.precision)
        self.precisions |= {
            name: "bf16"
            for name, precision in getattr(self._pipeline._backend, "precision", {}).items()
            if precision == "bf16"
        }
        self.precision = self.precisions["denoiser"]
        self._sampler = setup.sampler

    def picture(self, request: Request) -> dict[str, Any]:
        if self._pipeline._encode is not None:
            self._pipeline._encode.clear()  # every picture pays for its text, as the others' do
        started = perf_counter()
        result = self._pipeline(
            request.prompt,
            request.height,
            request.width,
            request.steps,
            request.guidance_scale,
            seed=request.seed,
            num_images_per_prompt=request.batch,
            scheduler=self._sampler,
            progress=False,
        )
        total, times = perf_counter() - started, result.timings
        np.save(request.file, np.stack([np.asarray(image) for image in result.images]))
        return {
            "total": total,
            "text_encoder": times["tokenize"] + times["text_encoder"],
            "denoise": times["prepare"] + times["denoise"],
            "vae_decoder": times["vae_decoder"],
            "steps": times["steps"],
            "evaluations": result.evaluations,
            "synchronised": True,
        }

    def device_bytes(self) -> int | None:
        return _used_on_gpu()


class Diffusers:
    """diffusers, used as its documentation shows, with one of the settings in DIFFUSERS."""

    def __init__(self, setup: Setup) -> None:
        _require("torch", "diffusers")
        from export.libraries import quiet_libraries

        quiet_libraries()
        import diffusers
        import torch

        self._torch, self._gpu = torch, torch.cuda.is_available()
        if setup.threads:
            torch.set_num_threads(setup.threads)
        settings = DIFFUSERS[setup.side]
        dtype = getattr(torch, settings.dtype or ("float16" if self._gpu else "float32"))
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
            setup.model, torch_dtype=dtype, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
        pipeline.scheduler = getattr(diffusers, SCHEDULERS[setup.sampler]).from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        if self._gpu:
            pipeline.to("cuda")
        if settings.channels_last:
            pipeline.unet.to(memory_format=torch.channels_last)
            pipeline.vae.to(memory_format=torch.channels_last)
        if settings.compiled:
            pipeline.unet.compile()
            pipeline.vae.decode = torch.compile(pipeline.vae.decode)
        self._pipeline = pipeline
        self.precision = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
        self.precisions = dict.fromkeys(STABLE_DIFFUSION.names, self.precision)
        how = ", channels_last" * settings.channels_last + ", compiled" * settings.compiled
        place = torch.cuda.get_device_name() if self._gpu else f"the CPU, {torch.get_num_threads()} threads"
        self.description = (
            f"diffusers {diffusers.__version__}, torch {torch.__version__} on {place}, {self.precision}{how}"
        )

    def _now(self) -> float:
        if self._gpu:
            self._torch.cuda.synchronize()
        return perf_counter()

    def picture(self, request: Request) -> dict[str, Any]:
        marks: list[float] = []
        pipeline, torch = self._pipeline, self._torch
        encode = pipeline.encode_prompt

        def encode_prompt(*arguments: Any, **options: Any) -> Any:
            encoded = encode(*arguments, **options)
            marks.append(self._now())
            return encoded

        def mark(_: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            marks.append(self._now())
            return tensors

        pipeline.encode_prompt = encode_prompt
        started = self._now()
        made = pipeline(
            request.prompt,
            height=request.height,
            width=request.width,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance_scale,
            num_images_per_prompt=request.batch,
            generator=torch.Generator().manual_seed(request.seed),
            callback_on_step_end=mark,
        )
        ended = self._now()
        pipeline.encode_prompt = encode
        np.save(request.file, np.stack([np.asarray(image) for image in made.images]))
        steps = [b - a for a, b in pairwise(marks)]
        return {
            "total": ended - started,
            "text_encoder": marks[0] - started,
            "denoise": marks[-1] - marks[0],
            "vae_decoder": ended - marks[-1],
            "steps": steps,
            "evaluations": len(steps),
            "synchronised": True,
        }

    def device_bytes(self) -> int | None:
        return int(self._torch.cuda.max_memory_reserved()) if self._gpu else None


class Optimum:
    """optimum's pipeline on ONNX Runtime, exported by optimum itself."""

    def __init__(self, setup: Setup) -> None:
        _require("optimum.onnxruntime", "diffusers")
        from export.libraries import quiet_libraries

        quiet_libraries()
        import diffusers
        import torch

        onnxruntime = import_library("onnxruntime")
        from optimum.onnxruntime import ORTStableDiffusionPipeline

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = setup.threads
        self._torch = torch
        with tempfile.TemporaryDirectory() as folder:
            model = for_transformers_4(Path(setup.model), Path(folder))
            self._pipeline = ORTStableDiffusionPipeline.from_pretrained(
                str(model), export=True, session_options=options
            )
        self._pipeline.scheduler = getattr(diffusers, SCHEDULERS[setup.sampler]).from_config(
            self._pipeline.scheduler.config
        )
        self._pipeline.set_progress_bar_config(disable=True)
        self.precisions = dict.fromkeys(STABLE_DIFFUSION.names, "fp32")
        self.precision, self.description = "fp32", f"optimum-onnx, ONNX Runtime {onnxruntime.__version__} on the CPU"

    picture = Diffusers.picture

    def _now(self) -> float:
        return perf_counter()

    def device_bytes(self) -> int | None:
        return None


SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "pndm": "PNDMScheduler",
}
"""diffusers' classes by our names, for samplers that from_config makes equal."""


def for_transformers_4(model: Path, folder: Path) -> Path:
    """The model as transformers 4 reads it, `folder` if something had to be changed: the names of the text encoder's
    weights begin with text_model there. transformers 5 writes them without, and transformers 4 quietly takes random
    weights for those it doesn't find."""
    from safetensors.torch import load_file, save_file

    weights = model / "text_encoder" / "model.safetensors"
    if not weights.is_file():
        return model
    tensors = load_file(weights)
    if any(name.startswith("text_model.") for name in tensors):
        return model
    for file in (*model.iterdir(), *weights.parent.iterdir()):
        copy = folder / file.relative_to(model)
        if file == weights.parent:
            copy.mkdir()
        elif file == weights:
            save_file({f"text_model.{name}": tensor for name, tensor in tensors.items()}, copy, {"format": "pt"})
        else:
            copy.symlink_to(file.resolve())
    return folder


def _require(*modules: str) -> None:
    for module in modules:
        if not installed(module):
            raise SkippedSide(f"{module.split('.')[0]} is not installed")


def _used_on_gpu() -> int | None:
    """Bytes that this process has on the GPU, by nvidia-smi; None without one."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    used = [line.split(",") for line in done.stdout.splitlines()]
    return sum(int(mib) for pid, mib in used if int(pid) == os.getpid()) * 2**20 or None


class Service:
    """The answers of a side's process."""

    def __init__(self) -> None:
        self._side: Any = None

    def __call__(self, question: dict[str, Any]) -> dict[str, Any]:
        if self._side is None:
            setup, started = Setup(**question), perf_counter()
            self._side = (Ours if setup.side in OURS else Optimum if setup.side == "optimum" else Diffusers)(setup)
            return {
                "load": perf_counter() - started,
                "description": self._side.description,
                "precision": self._side.precision,
                "precisions": self._side.precisions,
            }
        if "finish" in question:
            return {"peak_bytes": peak_bytes(), "device_bytes": self._side.device_bytes()}
        return dict(self._side.picture(Request(**question)))


if __name__ == "__main__":
    serve(Service())
