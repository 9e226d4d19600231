"""A page for every optimizer of the registry, and two tables of all of them: text and pictures, before Sphinx reads.

What is known of an optimizer stands in its own file (`fastopt/optimizers/`): what is not in the registry is read from
its docstring. Nothing here knows one of them by name.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import numpy as np
from formulas import formula
from matplotlib import style
from matplotlib.figure import Figure

from bench import figures, plots
from fastopt import _codegen, _formats, _info
from fastopt.rules import docstrings, registry

FOLDER = Path(__file__).resolve().parents[1] / "optimizers"
START = (-7.2, 2.0)
CENTRE, REACH = (-2.0, 0.0), (7.0, 3.0)
"""Of the pictures."""
STEPS = 40
RATES = [digit * 10.0**power for power in range(-3, 2) for digit in range(1, 10)]
KINDS = {
    "signed": "numbers of either sign",
    "unsigned": "numbers that are never negative",
    "weights": "averaged parameters",
}


# --- The valley


def valley(points):
    """f(x, y) = x^2 / 20 + y^2 of an array whose last axis is (x, y)."""
    return points[..., 0] ** 2 / 20 + points[..., 1] ** 2


def path(cls, lr):
    """Where an optimizer with learning rate `lr` goes from START: STEPS + 1 points."""
    p = np.array(START, np.float32)
    optimizer = cls([p], lr=lr)
    points = [p.copy()]
    for _ in range(STEPS):
        with np.errstate(over="ignore"):  # a learning rate that is too large leaves float32
            gradient = p * np.array([0.1, 2.0], np.float32)
        optimizer.step([gradient])
        points.append(p.copy())
    return np.array(points, np.float64)


def best_path(cls):
    """(lr, points) of the learning rate in RATES that stays in the picture and whose last ten points lie lowest."""
    paths = {lr: path(cls, lr) for lr in RATES}
    inside = {lr: points for lr, points in paths.items() if (np.abs(points - CENTRE) <= REACH).all()}
    best = min(inside, key=lambda lr: valley(inside[lr][-10:]).mean())
    return best, inside[best]


def drawing():
    """Settings of matplotlib's own, whatever the examples of the gallery have left."""
    return style.context(["default", {"svg.hashsalt": "fastopt", "svg.fonttype": "none"}])


def trace(axes, points):
    """The contours and a path over them."""
    low, high = np.subtract(CENTRE, REACH), np.add(CENTRE, REACH)
    x, y = np.meshgrid(np.linspace(low[0], high[0], 141), np.linspace(low[1], high[1], 121))
    levels = [0.02, 0.1, 0.3, 0.7, 1.4, 2.5, 4, 6, 9]
    axes.contour(x, y, valley(np.stack([x, y], -1)), levels=levels, colors="0.8", linewidths=0.8)
    axes.plot(*points.T, "o-", color="#0072b2", markersize=3, linewidth=1.2)
    axes.plot(*START, "o", color="#d55e00", markersize=6)
    axes.plot(0, 0, "+", color="black", markersize=9)
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))


def draw_path(name, lr, points, file):
    with drawing():
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        trace(left, points)
        left.set(xlabel="x", ylabel="y", title=f"{name}, lr {lr:g}: the path")
        right.semilogy(np.maximum(valley(points), 1e-12), color="#0072b2")
        right.set(xlabel="step", title="f")
        right.grid(color="0.92")
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(file, metadata={"Date": None})


def draw_paths(paths, file):
    """All of them: name -> (lr, points)."""
    with drawing():
        rows = -(-len(paths) // 4)
        figure = Figure(figsize=(8, 1.5 * rows), layout="constrained")
        grid = figure.subplots(rows, 4, sharex=True, sharey=True, squeeze=False)
        for axes in grid.flat[len(paths) :]:
            axes.set_visible(False)
        for axes, (name, (lr, points)) in zip(grid.flat, paths.items(), strict=False):
            trace(axes, points)
            axes.set_title(f"{name}, lr {lr:g}", fontsize=9)
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(file, metadata={"Date": None})


# --- The speed


def curve_of(function, results):
    """The cells of an optimizer's longest curve, ascending; empty if it was not measured."""
    found = [cells for cells in results.curves.values() if cells[0].info["optimizer"] == function]
    return max(found, key=len, default=[])


def draw_speed(cells, file):
    with drawing():
        figure = Figure(figsize=(8, 4.2), layout="constrained")
        axes = figure.subplots()
        plots.draw_lines(axes, cells, "ns_per_parameter")
        axes.set(xscale="log", yscale="log", xlabel="parameters", title=cells[0].info["title"])
        axes.set_ylabel("ns per parameter (lower is better)")
        axes.grid(color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
        figure.savefig(file, metadata={"Date": None})


def speed_in_words(cells):
    """Where the curve begins and ends, for those who do not see it."""
    words = []
    for cell in (cells[0], cells[-1]):
        text = f"{cell.ours.ns_per_parameter:.3g} ns per parameter at {cell.info['parameters']:,} parameters"
        if cell.fastest:
            text += f" ({cell.fastest.contestant}: {cell.fastest.ns_per_parameter:.3g})"
        words.append(text)
    return f"A step takes {' and '.join(words)}."


# --- The text


def list_table(header, rows, widths):
    """A table in reStructuredText."""
    lines = [".. list-table::", "   :header-rows: 1", f"   :widths: {' '.join(map(str, widths))}", ""]
    for row in [header, *rows]:
        for k, cell in enumerate(row):
            lines.append(f"   {'* -' if k == 0 else '  -'} {cell}")
    return "\n".join(lines)


def heading(text, mark="-"):
    return f"{text}\n{mark * len(text)}"


def picture(file, alt, caption):
    return f".. figure:: {file}\n   :alt: {alt}\n   :width: 100%\n\n   {caption}"


def explanation(text):
    """What a docstring says of the optimizer, its formulas as mathematics where they can be."""

    def typeset(match):
        code = textwrap.dedent(match[1])
        try:
            return ":\n\n.. math::\n\n" + textwrap.indent(formula(code), "   ")
        except ValueError:
            return "::\n\n" + textwrap.indent(code, "   ")

    return re.sub(r"::\n\n((?:    .*(?:\n|$)|\n(?=    ))+)", lambda match: typeset(match) + "\n", text)


def hyperparameters(spec):
    """Every hyperparameter with type, bounds and default, and under it what it means."""
    entries = [(head.partition(" : "), words) for head, words in docstrings.hyperparameters(spec)]
    return "\n\n".join(f"``{name}`` : {described}\n   {words}" for (name, _, described), words in entries)


def states(spec):
    """What is kept for every parameter, and its bytes under every `state_dtype`."""
    rows = []
    for state, first in spec.states.items():
        initial = f"`{first}`" if isinstance(first, str) else f"{first:g}"
        words = f"{KINDS[spec.kinds[state]]}, {initial} before the first step"
        if state in spec.optional_states:
            words += f"; only with ``{spec.needed_when(state)}``"
        rows.append([f"``{state}``", words, ", ".join(sizes(spec, state))])
    header = ("array", "holds", f"bytes in {', '.join(_formats.STATE_DTYPES)}")
    return list_table(header, rows, (28, 44, 28)) if rows else "It keeps no state."


def sizes(spec, state):
    """Bytes of a state for every parameter, under every `state_dtype`."""
    codecs = [_formats.codec(dtype, spec.kinds[state]) for dtype in _formats.STATE_DTYPES]
    return [f"{codec.bytes_per_element:.3g}" for codec in codecs]


def memory(spec):
    """Bytes that a step with default hyperparameters keeps and moves."""
    kernel = default_kernel(spec)
    kept = [_info.state_bytes(spec, dtype) for dtype in _formats.STATE_DTYPES]
    text = f"With the defaults a step moves {kernel.bytes_moved} bytes for every parameter, with states in float32."
    if any(kept):
        in_each = zip(kept, _formats.STATE_DTYPES, strict=True)
        text += f" The states take {', '.join(f'{size:.3g} in {dtype}' for size, dtype in in_each)}."
    if spec.running:
        text += (
            f" Beside them there is one float64 number for every array: {', '.join(f'`{n}`' for n in spec.running)}."
        )
    if kernel.gives_update:
        text += " The update takes 4 bytes of workspace for every parameter."
    return text


def default_kernel(spec):
    flags = spec.flags({name: hyper.default for name, hyper in spec.hypers.items()})
    return next(k for k in _codegen.kernels(spec) if k.name == spec.kernel_name(flags, False))


def page(spec, lr, points, cells):
    """The page of an optimizer, in reStructuredText."""
    said = docstrings.sections(spec.cls)
    signature = ", ".join(["params=None", *(f"{name}={hyper.default!r}" for name, hyper in spec.hypers.items())])
    end = valley(points[-1])
    parts = [
        ".. made by docs/_ext/optimizer_pages.py",
        heading(spec.name, "="),
        ".. currentmodule:: fastopt",
        f".. py:class:: {spec.name}({signature}, **options)\n\n   {docstrings.summary(spec.cls)}",
        explanation(said[""].partition("\n\n")[2]),
        f"``options`` are those of every :class:`~fastopt.Optimizer`. One step on arrays that you hold is "
        f":func:`fastopt.functional.{spec.function}`, in NumPy :func:`fastopt.reference.{spec.function}`.",
        heading("Hyperparameters"),
        hyperparameters(spec),
        heading("State"),
        states(spec),
        memory(spec),
        heading("Its path through a narrow valley"),
        picture(
            f"{spec.function}-path.svg",
            f"Contours of the valley with the path of {spec.name} from {START}, and f at every step",
            f"f(x, y) = x²/20 + y² from {START} in {STEPS} steps, at learning rate {lr:g}: of 0.001, 0.002 and so on "
            f"to 90 it stays in the picture and ends lowest. At the end f is {end:.2g}.",
        ),
        heading("When to choose it"),
        said["Notes"],
        relatives(said["See Also"]),
    ]
    if cells:
        parts += [
            heading("Speed"),
            picture(f"{spec.function}-speed.svg", speed_in_words(cells), speed_in_words(cells)),
            "The :doc:`benchmark </benchmark>` has the quartiles, and what else was measured.",
        ]
    parts += [
        f".. minigallery:: fastopt.{spec.name}\n   :add-heading: Examples with {spec.name}\n   :heading-level: -",
        heading("References"),
        said["References"],
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def relatives(section):
    """Other optimizers and how they differ, one a line."""
    found = [head.partition(" : ") for head, _ in docstrings.entries(section)]
    return "\n\n".join(f":class:`~fastopt.{name}`\n   {words}" for name, _, words in found)


def overview():
    """All optimizers: what each keeps and moves."""
    rows = []
    for spec in registry.values():
        kept = ", ".join(f"{_info.state_bytes(spec, dtype):.3g}" for dtype in _formats.STATE_DTYPES)
        more = [
            f"+{', '.join(sizes(spec, state))} with ``{spec.needed_when(state)}``" for state in spec.optional_states
        ]
        kernel = default_kernel(spec)
        more += ["+4 of workspace"] * kernel.gives_update
        summary = docstrings.summary(spec.cls)
        words = summary.partition(": ")[2] or summary
        rows.append([link(spec), words, "; ".join([kept, *more]), kernel.bytes_moved])
    header = ("optimizer", "in one sentence", "state: float32, bfloat16, 8bit", "moved")
    return list_table(header, rows, (14, 50, 24, 12)) + "\n"


def defaults():
    """All optimizers: their functions and hyperparameters, with defaults."""
    rows = [
        [
            link(spec),
            f":func:`~fastopt.functional.{spec.function}`",
            ", ".join(f"``{name}={hyper.default!r}``" for name, hyper in spec.hypers.items()),
        ]
        for spec in registry.values()
    ]
    return list_table(("optimizer", "function", "hyperparameters"), rows, (14, 14, 72)) + "\n"


def link(spec):
    return f":doc:`{spec.name} <{spec.function}>`"


# --- Sphinx


def write(path, text):
    """Write `text` unless it is there: Sphinx reads again what is newer than its last build."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def write_pages(_):
    results = figures.committed()
    paths = {spec.name: best_path(spec.cls) for spec in registry.values()}
    draw_paths(paths, FOLDER / "paths.svg")
    for spec in registry.values():
        lr, points = paths[spec.name]
        draw_path(spec.name, lr, points, FOLDER / f"{spec.function}-path.svg")
        cells = curve_of(spec.function, results) if results else []
        if cells:
            draw_speed(cells, FOLDER / f"{spec.function}-speed.svg")
        write(FOLDER / f"{spec.function}.rst", page(spec, lr, points, cells))
    write(FOLDER / "overview.txt", overview())
    write(FOLDER / "defaults.txt", defaults())


def setup(app):
    app.connect("builder-inited", write_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
