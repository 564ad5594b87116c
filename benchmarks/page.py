"""One Markdown page of all stored results: tables, plots, and what each was measured on."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import adapters, gpu, guidance, plots, tiling
from benchmarks.errors import ResultsError
from benchmarks.report import markdown

RESULTS = Path(__file__).parent / "results"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        metavar="FOLDER",
        help="where the JSON files are (default: benchmarks/results)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default: report.md in that folder; the plots go beside it"
    )


def run(options: argparse.Namespace) -> None:
    """Writes the page and its plots."""
    output = options.output or options.results / "report.md"
    sections = [section(file.stem, read(file), output.parent) for file in sorted(options.results.glob("*.json"))]
    if not sections:
        raise ResultsError(
            f"{options.results} holds no results; make some, for example: python -m benchmarks latency --json "
            f"{options.results}/latency.json"
        )
    output.write_text(
        "\n\n".join(
            [
                "# Benchmarks",
                "Written by `python -m benchmarks report` from the JSON files in this folder; they hold every sample.",
                *sections,
            ]
        )
        + "\n",
        encoding="utf-8",
    )
    print(f"wrote {output}")


def read(file: Path) -> dict[str, Any]:
    """A stored result. ResultsError if it is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["benchmark"] not in TABLES:
            raise ResultsError(f"{file} holds a benchmark {content['benchmark']!r}; known are {', '.join(TABLES)}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResultsError(
            f"{file} is not a result of a benchmark ({type(error).__name__}: {error}); measure it again, or remove it"
        ) from error
    return dict(content)


def section(name: str, content: dict[str, Any], folder: Path) -> str:
    """A heading, the conditions, the tables, the reasons of what was refused, and a plot where there is one."""
    parts = [f"## {name}", conditions_line(content), *TABLES[content["benchmark"]](content)]
    if content.get("interrupted"):
        parts.append("Interrupted: what was complete by then.")
    if content["benchmark"] in PLOTS:
        PLOTS[content["benchmark"]](content, folder / f"{name}.png")
        parts.append(f"![{name}]({name}.png)")
    return "\n\n".join(parts)


def conditions_line(content: dict[str, Any]) -> str:
    """Hardware, clocks, driver, versions, command line and commit in one paragraph."""
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    clocks, gpu = content.get("clocks"), content.get("gpu")
    hardware = f"{content['processor']}, {content['cores']} cores"
    hardware += f" at {', '.join(map(str, clocks['cpu_mhz']))} MHz (governor {clocks['governor']})" if clocks else ""
    hardware += f"; {', '.join(f'{field} {value}' for field, value in gpu.items())}" if gpu else "; no GPU"
    return (
        f"{hardware}. {content['system']}, Python {content['python']}; {versions}. `{content['command']}` at commit "
        f"{content['commit']}, "
        f"{content['time'][:10]}."
    )


def _latency(content: dict[str, Any]) -> list[str]:
    parts = []
    for found in content["configurations"]:
        parts.append(
            f"{found['width']} x {found['height']}, batch {found['batch']}, {content['steps']} steps of "
            f"{content['scheduler']}, "
            f"guidance {content['guidance_scale']}:"
        )
        rows = []
        for name, side in found["sides"].items():
            if "seconds" in side:
                s = side["seconds"]
                peak = "" if side["peak_bytes"] is None else f"{side['peak_bytes'] / 2**30:.2f}"
                rows.append(
                    [
                        name,
                        side["precision"],
                        s["total"]["n"],
                        *(_short(s["total"][key]) for key in ("min", "p50", "p90", "p99")),
                        f"{s['total']['spread']:.0%}",
                        *(_short(s[stage]["p50"]) for stage in ("text_encoder", "step", "vae_decoder")),
                        side["evaluations"],
                        _short(side["pictures_per_second"]),
                        peak,
                        _short(side["first_picture_s"]),
                        _short(side["load_s"]),
                    ]
                )
        parts.append(
            markdown(
                [
                    "side",
                    "precision",
                    "pictures",
                    "min s",
                    "p50 s",
                    "p90 s",
                    "p99 s",
                    "spread",
                    "text s",
                    "step s",
                    "VAE s",
                    "U-Net calls",
                    "pictures/s",
                    "peak GiB",
                    "first picture s",
                    "load s",
                ],
                rows,
            )
        )
        ratios = [
            [
                f"{r['theirs']} / {r['ours']}",
                "refused" if r["ratio"] is None else f"{r['ratio']['p50']:.2f}",
                "" if r["ratio"] is None else f"{r['ratio']['spread']:.0%}",
                f"{r['psnr_db']:.1f}",
            ]
            for r in found["ratios"]
        ]
        if ratios:
            parts.append(markdown(["time of", "ratio, pair by pair", "spread", "worst PSNR dB"], ratios))
        parts += [
            f"Refused: {reason}." for part in (*found["sides"].values(), *found["ratios"]) for reason in part["refused"]
        ]
        if found.get("disturbed"):
            parts.append(f"{found['disturbed']} turns were disturbed by other programs and are not counted.")
        parts += [f"Skipped: {reason}." for reason in found["skipped"].values()]
    return parts


def _roofline(content: dict[str, Any]) -> list[str]:
    parts = []
    for name, found in content["backends"].items():
        rates = ", ".join(
            f"{precision} {rate / 1e9:.0f} GFLOP/s" for precision, rate in found["flop_per_second"].items()
        )
        parts.append(
            f"{name}: matrix products {rates}; copying {found['bytes_per_second'] / 1e9:.1f} GB/s, both measured in "
            "this run."
        )
        rows = [
            [
                component,
                c["precision"],
                _short(c["flop"] / 1e9),
                _short(c["bytes"] / 1e9),
                _short(1e3 * c["floor"]),
                _short(1e3 * c["seconds"]["p50"]),
                f"{c['reached']:.0%}",
            ]
            for component, c in found["components"].items()
        ]
        p = found["picture"]
        rows.append(
            [
                f"picture, {p['evaluations']} U-Net calls",
                "",
                _short(p["flop"] / 1e9),
                "",
                _short(1e3 * p["floor"]),
                _short(1e3 * p["seconds"]["p50"]),
                f"{p['reached']:.0%}",
            ]
        )
        parts.append(markdown(["", "precision", "GFLOP", "GB", "floor ms", "measured ms", "reached"], rows))
        parts += [f"Refused: {reason}." for reason in found["refused"]]
    return parts


def _scaling(content: dict[str, Any]) -> list[str]:
    parts = [
        f"{content['backend']}, around {content['base']['width']} x {content['base']['height']}, batch "
        f"{content['base']['batch']}, "
        f"{content['base']['steps']} steps."
    ]
    for axis, found in content["against"].items():
        parts.append(
            markdown(
                [axis, "p50 s", "spread", "peak GiB", "refused"],
                [
                    [
                        point[axis],
                        _short(point["seconds"]["p50"]),
                        f"{point['seconds']['spread']:.0%}",
                        f"{point['peak_bytes'] / 2**30:.2f}",
                        "; ".join(point["refused"]),
                    ]
                    for point in found["points"]
                ],
            )
        )
        if found["time_exponent"] is not None:
            parts.append(
                f"Time grows with {axis} to the power {found['time_exponent']:.2f}, peak memory "
                f"{found['memory_exponent']:.2f}."
            )
    return parts


def _parity(content: dict[str, Any]) -> list[str]:
    rows = [
        [name, side["precision"], f"{side['psnr_min_db']:.1f}", f"{side['psnr_median_db']:.1f}", side["max_difference"]]
        for name, side in content["sides"].items()
    ]
    return [
        f"{content['pictures']} pictures, {content['width']} x {content['height']}, {content['steps']} steps of "
        f"{content['scheduler']}, beside diffusers "
        f"in float32:",
        markdown(["side", "precision", "worst PSNR dB", "median PSNR dB", "largest difference of 255"], rows),
    ]


def _guidance(content: dict[str, Any]) -> list[str]:
    return [
        f"{content['pictures']} scenes, one picture a call, {content['steps']} steps, guidance scale "
        f"{content['guidance_scale']:g}, {content['backend']}. Seconds and PSNR are beside guidance at every step:",
        markdown(*guidance.table(content)),
    ]


def _adapters(content: dict[str, Any]) -> list[str]:
    return [
        f"A random LoRA of rank {content['rank']} for {content['layers']} layers of {content['bundle']}. load, on and "
        "off include the next picture of one step:",
        markdown(*adapters.table(content["backends"])),
    ]


def _tiling(content: dict[str, Any]) -> list[str]:
    return [markdown(tiling.HEADER, content["rows"])]


def _overhead(content: dict[str, Any]) -> list[str]:
    parts = [
        f"Host time of one more step outside the U-Net call, {content['latents']} latents:",
        markdown(["scheduler", "ours, µs", "diffusers, µs", "ratio"], [list(row.values()) for row in content["rows"]]),
        f"Guidance and sampler inside our graph take {content['sampler_in_graph_us']} µs a step more.",
    ]
    return [
        *parts,
        markdown(
            ["", "ours", "diffusers", "ratio", "lowest", "highest"],
            [list(row.values()) for row in content["processes"]],
        ),
        markdown(["installed", "packages", "MiB"], [list(row.values()) for row in content["installed"]]),
    ]


def _memory(content: dict[str, Any]) -> list[str]:
    return [markdown(["SD 1.5 architecture, random weights, fp32", "seconds", "peak GiB"], content["rows"])]


def _settings(content: dict[str, Any]) -> list[str]:
    return [
        markdown(list(rows[0]), [[_short(value) for value in row.values()] for row in rows])
        for rows in content["tables"]
    ]


def _short(value: Any) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 1000
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )


TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "gpu": lambda content: [markdown(gpu.HEADER, gpu.summary(content)), *gpu.verdicts(content)],
    "latency": _latency,
    "roofline": _roofline,
    "scaling": _scaling,
    "parity": _parity,
    "guidance": _guidance,
    "adapters": _adapters,
    "tiling": _tiling,
    "overhead": _overhead,
    "memory": _memory,
    "settings": _settings,
}
PLOTS: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "latency": plots.latency,
    "roofline": plots.roofline,
    "scaling": plots.scaling,
}
