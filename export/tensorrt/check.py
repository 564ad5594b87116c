"""A plan beside ONNX Runtime, at the size that each of its profiles is best at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from engine.backends.tensorrt.runtime import TensorRtRuntime
from engine.bundle import Bundle
from engine.contract import Component, Shapes, Sizes
from engine.errors import EngineError
from engine.libraries import installed

from ..building import Report
from ..compare import Difference, as_json, differences, not_finite, tolerance, worst_of
from ..errors import ExportError, VerificationError
from .compiling import Compiler
from .diagnose import every_output, verdict
from .profiles import describe, profile_inputs

TIMED_RUNS = 20
WARM_UP = 3


@dataclass(frozen=True)
class Checker:
    """Compares with ONNX Runtime where that is installed and `compare` asks for it; `diagnose` compares layer by layer
    whether or not a plan differs."""

    bundle: Bundle
    gpu: int
    compiler: Compiler
    compare: bool
    diagnose: bool
    report: Report

    def check(self, component: Component, plan: bytes, profiles: Sequence[Shapes], sizes: Sizes) -> dict[str, Any]:
        """Differences and times, for build.json. `sizes` are the model's. VerificationError for a plan that differs or
        gives values that are not finite."""
        reason = self._reason()
        found, timed = list[Difference](), []
        runtime = TensorRtRuntime(self.gpu, self.bundle.family)
        try:
            runtime.load([(component.name, plan)])
            for profile in profiles:
                inputs = profile_inputs(self.bundle.family, component, profile, sizes)
                outputs = runtime.run(component.name, inputs)
                self._require_finite(component, profile, inputs, outputs)
                if reason is None:
                    found.append(differences(component, outputs, self._with_onnx_runtime(component, inputs)))
                seconds = runtime.seconds(component.name, inputs, TIMED_RUNS + WARM_UP)[WARM_UP:]
                timed.append({"at": describe(component, profile), "milliseconds": round(1000 * median(seconds), 4)})
        finally:
            runtime.close()
        worst = worst_of(found) if found else None
        if worst is not None:
            inputs = profile_inputs(self.bundle.family, component, profiles[0], sizes)
            self._require_close(component, worst, profiles[0], inputs)
        return {
            "compared": reason is None,
            "reason": reason,
            "difference": None if worst is None else as_json(worst),
            "timed": timed,
        }

    def _reason(self) -> str | None:
        """Why plans are not compared, if they are not."""
        if not self.compare:
            return "--no-verify"
        return None if installed("onnxruntime") else "onnxruntime is not installed"

    def _with_onnx_runtime(self, component: Component, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        from engine.backends.onnxruntime.backend import OnnxRuntimeBackend

        return OnnxRuntimeBackend(self.bundle.graphs).run(component.name, dict(inputs))

    def _require_finite(
        self,
        component: Component,
        profile: Shapes,
        inputs: Mapping[str, np.ndarray],
        outputs: Sequence[np.ndarray],
    ) -> None:
        if (name := not_finite(component, outputs)) is not None:
            raise VerificationError(
                f"the plan of the {component.name} gives values that are not finite in {name} at "
                f"{describe(component, profile)}; build the bundle with --precision bf16 or fp32. The old plans are "
                f"untouched. {self._diagnosis(component, profile, inputs)}"
            )

    def _require_close(
        self, component: Component, worst: Difference, profile: Shapes, inputs: Mapping[str, np.ndarray]
    ) -> None:
        allowed = tolerance(component, self.bundle.precision)
        beyond = worst.relative_rms > allowed
        if not beyond and not self.diagnose:
            return
        diagnosis = self._diagnosis(component, profile, inputs, beyond)
        if beyond:
            raise VerificationError(
                f"the plan of the {component.name} differs from ONNX Runtime by {worst.relative_rms:.2e} (relative "
                f"RMS); {allowed:.0e} is allowed in {self.bundle.precision}. The old plans are untouched. {diagnosis}"
            )
        self.report(f"{component.name}: {diagnosis}")

    def _diagnosis(
        self, component: Component, profile: Shapes, inputs: Mapping[str, np.ndarray], plan_differs: bool = True
    ) -> str:
        """What a comparison layer by layer finds, for the end of a message; why there is none, where it fails."""
        name = component.name
        self.report(f"{name}: building once more with every layer's output kept, to compare them one by one")
        try:
            layers, expected = every_output(self.bundle.graphs[name], inputs)
            plan, _ = self.compiler.plan(component, [profile], f"{name}, diagnosis", list(expected))
            runtime = TensorRtRuntime(self.gpu, self.bundle.family)
            try:
                runtime.load([(name, plan)], contract=False)
                ours = dict(zip(runtime.engines[name].outputs, runtime.run(name, inputs)))
            finally:
                runtime.close()
        except (ExportError, EngineError) as error:
            return f"It could not be compared layer by layer: {error}"
        return verdict(component, self.bundle.precision, layers, ours, expected, plan_differs)
