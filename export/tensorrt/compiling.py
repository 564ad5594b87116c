"""One ONNX graph becomes one plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from traceback import clear_frames
from typing import Any

from engine.backends.tensorrt import versions as versions
from engine.backends.tensorrt.cuda import Device
from engine.backends.tensorrt.runtime import open_log
from engine.bundle import Bundle
from engine.contract import Component, Shapes, Sizes

from ..building import Report
from ..errors import PlanBuildError
from .diagnose import mark_outputs
from .files import TimingCache
from .profiles import set_profiles
from .progress import Phases, monitor, watch

MOST_PINNED = 0.25
"""Share of a network's layers that TensorRT 8.6 may be told to keep in float32; a U-Net needs a few of hundreds."""


@dataclass(frozen=True)
class Settings:
    """What the builder is told: how long it searches (0 to 5), bytes of workspace and auxiliary streams (None: TensorRT
    decides)."""

    optimization_level: int = 3
    workspace: int | None = None
    max_aux_streams: int | None = None


DEFAULT_SETTINGS = Settings()


class Compiler:
    """TensorRT's builder on one GPU, for the graphs of one bundle."""

    def __init__(
        self, bundle: Bundle, trt: Any, device: Device, settings: Settings, cache: TimingCache, report: Report
    ) -> None:
        self._bundle, self._trt, self._device = bundle, trt, device
        self.settings, self.cache, self._report = settings, cache, report

    def plan(
        self, component: Component, profiles: Sequence[Shapes], label: str, kept: Sequence[str] = ()
    ) -> tuple[bytes, Sizes]:
        """The serialized plan, and the sizes that are the model's. Tensors in `kept` become outputs."""
        with self._device:
            try:
                return self._build(component, profiles, label, kept)
            except BaseException as error:
                clear_frames(error.__traceback__)  # what TensorRT made goes while its GPU is current
                raise

    def _build(
        self, component: Component, profiles: Sequence[Shapes], label: str, kept: Sequence[str]
    ) -> tuple[bytes, Sizes]:
        trt, log = self._trt, open_log(self._trt)

        def fail(what: str) -> PlanBuildError:
            return PlanBuildError(
                f"TensorRT {trt.__version__} {what} for the {component.name}; {log.tail()}. The old plans are untouched"
            )

        def made(what: str, create: Callable[..., Any], *arguments: Any) -> Any:
            if (value := versions.none_for_null(create, *arguments)) is None:
                raise fail(f"made no {what}")
            return value

        builder = made("builder", trt.Builder, log)
        network = made("network", builder.create_network, versions.network_flags(trt))
        network.name = component.name
        parser = made("parser", trt.OnnxParser, network, log)
        graph = self._bundle.graphs[component.name]
        if not parser.parse_from_file(str(graph)):
            reasons = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
            raise fail(f"does not parse {graph} ({reasons})")
        constants = versions.replace_plugins(trt, network)
        mark_outputs(trt, network, kept)
        config = made("configuration", builder.create_builder_config)
        self._configure(config)
        self._constrain(component, network, config, label)
        sizes = set_profiles(builder, network, config, self._bundle.family, component, profiles, fail)
        plan = self._serialize(builder, network, config, label)
        del constants  # the network has read them until here
        if not plan:
            raise fail("built no plan")
        return plan, sizes

    def _serialize(self, builder: Any, network: Any, config: Any, label: str) -> bytes:
        """Builds in a thread, with progress: the plan, empty where there is none."""
        cache = self.cache.attach(config, self._report)
        phases, cancellable = Phases(), versions.has_progress(self._trt)
        if cancellable:
            watcher = monitor(self._trt, phases)
            config.progress_monitor = watcher

        def work() -> bytes:
            with self._device:
                plan = builder.build_serialized_network(network, config)
                return b"" if plan is None else bytes(memoryview(plan))

        plan = watch(work, label, phases, cancellable, self._report)
        self.cache.save(cache)
        return plan

    def _constrain(self, component: Component, network: Any, config: Any, label: str) -> None:
        """Precisions on TensorRT 8.6, where the network has none. PlanBuildError where they would reach too far."""
        pinned, layers = versions.constrain_precision(self._trt, network, config, self._bundle.precision)
        if pinned:
            self._report(f"{label}: {pinned} of {layers} layers pinned to float32")
        if pinned > MOST_PINNED * layers:
            raise PlanBuildError(
                f"{pinned} of {layers} layers of the {component.name} would be pinned to float32, which makes a plan "
                "several times slower; "
                f"at most a quarter should be. Use TensorRT 10.12 or later, or build the bundle with --precision fp32"
            )

    def _configure(self, config: Any) -> None:
        trt, settings = self._trt, self.settings
        config.builder_optimization_level = settings.optimization_level
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if settings.workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace)
        if settings.max_aux_streams is not None:
            config.max_aux_streams = settings.max_aux_streams
        versions.configure(trt, config)
