"""The curves as pictures: ns per parameter and GB/s over the parameter count, one line for each contestant."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import machine
from bench.ours import NAME, PROBE
from bench.results import Cell, Results
from bench.workloads import size_name

FEWEST = 3
"""Sizes that a curve needs."""
STYLES = {
    NAME: ("#000000", "-", "o"),
    PROBE: ("#888888", "--", ""),
    "torch-fused": ("#d55e00", "-", "s"),
    "torch-foreach": ("#e69f00", "-", "v"),
    "torch-loop": ("#e69f00", ":", "^"),
    "torch-compile": ("#d55e00", ":", "D"),
    "deepspeed": ("#0072b2", "-", "P"),
    "optax": ("#009e73", "-", "X"),
    "thinc": ("#cc79a7", "-", "<"),
    "scikit-learn": ("#cc79a7", ":", ">"),
    "numba-loop": ("#56b4e9", "-", "d"),
    "numpy": ("#56b4e9", ":", "."),
}
"""Okabe and Ito's colours, which colour-blind readers can tell apart; a marker each, for print."""


def name_of(title: str) -> str:
    """Name of the picture of an optimizer, without suffix."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def draw_all(results: Results, folder: Path) -> list[Path]:
    """Write a PNG and an SVG for every curve; return their paths."""
    written = []
    for title, cells in results.curves.items():
        if len(cells) >= FEWEST:
            written += draw(title, cells, results, folder)
    return written


def draw(title: str, cells: Sequence[Cell], results: Results, folder: Path) -> list[Path]:
    """One curve."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    info = cells[0].info
    with mpl.rc_context({"svg.hashsalt": "fastopt", "svg.fonttype": "none"}):
        figure = Figure(figsize=(13, 6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for axes, attribute, label in (
            (left, "ns_per_parameter", "ns per parameter (lower is better)"),
            (right, "gb_per_s", "effective GB/s (higher is better)"),
        ):
            draw_lines(axes, cells, attribute)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlabel("parameters")
            axes.set_ylabel(label)
            axes.grid(color="0.92")
            axes.spines[["top", "right"]].set_visible(False)
        for axes, place in ((left, "top"), (right, "bottom")):  # where no curve runs
            _mark_caches(axes, results, 4 * (2 + info["states"]), info["threads"], place)
        _mark_roof(right, cells)
        handles, labels = right.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
        where = f"{info['threads']} threads, {info['isa']}, {results.machine['processor']}"
        if "gpu" in results.machine:
            where = results.machine["gpu"]["GPU"]
        figure.suptitle(f"{title}: one step, {info['bytes_per_parameter']:g} bytes a parameter, {where}")
        paths = [folder / f"{name_of(title)}.{suffix}" for suffix in ("png", "svg")]
        figure.savefig(paths[0], dpi=130)
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def draw_lines(axes: Any, cells: Sequence[Cell], attribute: str) -> None:
    """One line for each contestant of a curve: `attribute` of its entries over the parameter count."""
    present = {name for cell in cells for name in cell.entries}
    for name, (colour, line, marker) in STYLES.items():
        if name in present:
            points = [cell.entries[name] for cell in cells if name in cell.entries]
            x = [entry.info["parameters"] for entry in points]
            y = [getattr(entry, attribute) for entry in points]
            width = 2.6 if name == NAME else 1.3
            label = "probe (the same bytes, no arithmetic)" if name == PROBE else name
            order = 3 if name == NAME else 2
            look = {"color": colour, "linestyle": line, "marker": marker, "linewidth": width, "markersize": 5}
            axes.plot(x, y, label=label, zorder=order, **look)


def roof(cells: Sequence[Cell]) -> tuple[int, float] | None:
    """The largest number of parameters, and GB/s of the probe there; None unless the arrays lay in memory."""
    return max(((c.info["parameters"], c.probe.gb_per_s) for c in cells if c.probe and c.is_from_memory), default=None)


def _mark_roof(axes: Any, cells: Sequence[Cell]) -> None:
    found = roof(cells)
    if found is not None:
        n, height = found
        label = f"roof: the probe at {size_name(n)}, {height:.0f} GB/s"
        axes.axhline(height, color="#b00020", linestyle="--", linewidth=1.2, label=label, zorder=1)


def _mark_caches(axes: Any, results: Results, bytes_per_parameter: int, n_threads: int, place: str) -> None:
    low, high = axes.get_xlim()
    for cache in results.machine["caches"]:
        size = machine.reachable(cache, n_threads)
        n = size / bytes_per_parameter
        if low < n < high:
            axes.axvline(n, color="0.7", linewidth=1, linestyle=(0, (1, 2)), zorder=1)
            words = (
                f"L{cache['level']} {size // 1024} KiB" if size < 2**20 else f"L{cache['level']} {size / 2**20:.0f} MiB"
            )
            axes.annotate(
                words,
                (n, float(place == "top")),
                xycoords=("data", "axes fraction"),
                xytext=(2, -3 if place == "top" else 3),
                textcoords="offset points",
                rotation=90,
                va=place,
                fontsize=8,
                color="0.4",
            )
