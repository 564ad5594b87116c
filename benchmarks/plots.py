"""The pictures of the results, from their JSON; needs matplotlib."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from benchmarks.errors import BenchmarkUsageError
from engine.libraries import install_command

FOLDER = "MPLCONFIGDIR"
"""The environment variable that names matplotlib's folder."""

STAGES = (("text_encoder", "text encoder"), ("denoise", "denoising"), ("vae_decoder", "VAE decoder"))


def _figure(width: float, height: float) -> tuple[Any, Any]:
    try:
        pyplot = _pyplot()
    except ImportError as error:
        raise BenchmarkUsageError(
            f"plots need matplotlib ({error}); install it: {install_command('benchmarks')}; or leave out --plot"
        ) from error
    return pyplot.subplots(figsize=(width, height), layout="constrained")


def _pyplot() -> Any:
    """matplotlib.pyplot, drawing into files. Its list of fonts goes into a temporary folder, not into the home."""
    given = os.environ.get(FOLDER)
    with TemporaryDirectory() as folder:
        os.environ[FOLDER] = given or folder
        try:
            import matplotlib

            matplotlib.use("Agg")
            from matplotlib import pyplot
        finally:
            if given is None:
                del os.environ[FOLDER]
    return pyplot


def _save(figure: Any, file: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(file, dpi=110, metadata={"Software": None} if file.suffix.lower() == ".png" else None)
    pyplot.close(figure)


def latency(content: dict[str, Any], file: Path) -> None:
    """A bar for each side and configuration: the median picture, cut into its stages, with a line from the fastest to
    p90."""
    bars = [
        (f"{found['width']} x {found['height']}, batch {found['batch']}\n{name}", side)
        for found in content["configurations"]
        for name, side in found["sides"].items()
        if "seconds" in side
    ]
    figure, axes = _figure(9, 1 + 0.5 * len(bars))
    for row, (_, side) in enumerate(bars):
        seconds, left = side["seconds"], 0.0
        parts = {"text_encoder": seconds["text_encoder"]["p50"], "vae_decoder": seconds["vae_decoder"]["p50"]}
        parts["denoise"] = seconds["total"]["p50"] - sum(parts.values())
        for number, (stage, _) in enumerate(STAGES):
            axes.barh(row, parts[stage], left=left, color=f"C{number}")
            left += parts[stage]
        axes.plot([seconds["total"]["min"], seconds["total"]["p90"]], [row, row], color="black", linewidth=1.5)
    axes.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("seconds per call; the line goes from the fastest to p90")
    axes.set_title(f"{content['bundle']}, {content['steps']} steps")
    axes.legend(
        handles=[axes.barh(0, 0, color=f"C{number}", label=label) for number, (_, label) in enumerate(STAGES)],
        fontsize=8,
    )
    _save(figure, file)


def roofline(content: dict[str, Any], file: Path) -> None:
    """FLOP/s over FLOP per byte: the roofs that were measured, and where each component stands."""
    figure, axes = _figure(8, 5)
    for number, (name, found) in enumerate(content["backends"].items()):
        bandwidth = found["bytes_per_second"]
        for precision, rate in found["flop_per_second"].items():
            ridge, ends = rate / bandwidth, (1, 3000)
            axes.plot(
                [ends[0], ridge, ends[1]],
                [ends[0] * bandwidth, rate, rate],
                color=f"C{number}",
                linestyle="-" if precision == "fp32" else "--",
                label=f"{name}: {precision} products and copying, measured",
            )
        for marker, (component, c) in zip("os^", found["components"].items()):
            axes.plot(c["flop_per_byte"], c["flop_per_second"], marker, color=f"C{number}")
            axes.annotate(
                f"{component} ({c['precision']}) {c['reached']:.0%}",
                (c["flop_per_byte"], c["flop_per_second"]),
                fontsize=8,
                xytext=(5, -10),
                textcoords="offset points",
            )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="FLOP per byte",
        ylabel="FLOP/s",
        title=f"{content['bundle']}, {content['width']} x {content['height']}",
    )
    axes.legend(fontsize=8)
    _save(figure, file)


def scaling(content: dict[str, Any], file: Path) -> None:
    """Seconds over steps, batch and pixels, on logarithmic axes."""
    figure, _ = _figure(10, 3.5)
    figure.clear()
    every = figure.subplots(1, len(content["against"]))
    for axes, (axis, found) in zip([every] if len(content["against"]) == 1 else every, content["against"].items()):
        points = found["points"]
        axes.plot([point[axis] for point in points], [point["seconds"]["p50"] for point in points], "o-")
        exponent = found["time_exponent"]
        axes.set(
            xscale="log",
            yscale="log",
            xlabel=axis,
            ylabel="seconds",
            title="" if exponent is None else f"exponent {exponent:.2f}",
        )
    _save(figure, file)


def convergence(found: Mapping[str, Sequence[tuple[Any, Sequence[float]]]], steps: Sequence[int], file: Path) -> None:
    """The errors of solvers over their steps, a panel a family, with the orders that they fall at."""
    figure, _ = _figure(15, 6)
    figure.clear()
    panels = figure.subplots(1, len(found), sharey=True)
    for axes, (family, curves) in zip(panels, found.items()):
        for number, (solver, errors) in enumerate(curves):
            axes.plot(
                steps, errors, "os^D"[number % 4] + ("-" if number < 10 else "--"), label=solver.name, markersize=4
            )
        for order in sorted({solver.order for solver, _ in curves}):
            highest = max(errors[0] for solver, errors in curves if solver.order == order)
            guide = [2 * highest * (count / steps[0]) ** -order for count in steps]
            axes.plot(steps, guide, ":", color="gray")
            axes.annotate(f"order {order}", (steps[1], guide[1]), fontsize=7, color="gray", va="bottom")
        axes.set(xscale="log", yscale="log", xlabel="steps", title=family)
        axes.title.set_fontsize(10)
        axes.minorticks_off()
        axes.set_xticks(steps, [str(count) for count in steps])
        axes.legend(fontsize=7, loc="lower left")
    panels[0].set(ylabel="error", ylim=(1e-12, 1))
    _save(figure, file)
    if file.suffix.lower() == ".png":  # a third of the bytes
        with Image.open(file) as picture:
            few = picture.convert("RGB").quantize(64)
        few.save(file, optimize=True)
