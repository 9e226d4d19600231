"""A run in words and tables: `report.md`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from bench import plots, promises
from bench.ours import ALONE, FLOAT32, NAME, OTHERS, PROBE
from bench.results import GOAL, GOAL_ON_GPU, LARGE, LARGE_ON_GPU, Cell, Results
from bench.samples import NOISY, Sample, seconds, short
from bench.workloads import FROM_MEMORY, size_name

FILE = "report.md"


def text(results: Results) -> str:
    """The whole report, in Markdown."""
    parts = [
        "# fastopt beside its peers and the machine",
        _machine(results),
        _noise(results),
        _behind(results),
        _promises(results),
        _curves(results),
        _steps("Models: one Adam step over the tensors of a network", results.section("models")),
        _tail(results),
        _states(results),
        _hard(results),
        _steps("Threads", results.section("threads")),
        _cold(results),
        _memory(results),
        _left_out(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown, numbers to the right."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|--:" * (len(header) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def spread(sample: Sample, scale: float = 1.0, unit: str = "") -> str:
    low, middle, high = (short(value * scale) for value in (sample.q1, sample.median, sample.q3))
    return f"{middle}{unit} ({low}..{high})"


def times(sample: Sample) -> str:
    """A step's time, quartiles behind the median."""
    value, unit = seconds(sample.median).split(" ")
    scale = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}[unit]
    return f"{value} {unit} ({short(sample.q1 * scale)}..{short(sample.q3 * scale)})"


def _machine(results: Results) -> str:
    machine, run = results.machine, results.run
    caches = ", ".join(
        f"L{cache['level']} {cache['bytes'] // 1024:,} KiB for {cache['shared_by']}" for cache in machine["caches"]
    )
    memory = machine["memory_bytes"]
    lines = [
        f"- {machine['processor']}, {machine['cpus']} processors; caches: {caches or 'unknown'}; "
        f"memory: {f'{memory / 2**30:.0f} GiB' if memory else 'unknown'}",
        f"- {machine['system']}, Python {machine['python']}",
        f"- fastopt {machine['fastopt']['version']}, {machine['fastopt']['isa']}, {machine['fastopt']['n_threads']} "
        f"threads; OpenMP runtimes in the process: {', '.join(machine['openmp']) or 'unknown'}",
        *(f"- {key}: {value}" for key, value in machine.get("gpu", {}).items()),
        f"- mode {run['mode']}, {run['seconds']:.0f} s; other processes took {run['others']:.0%} of one processor",
        *(
            f"- {name}: {version}" + (f" ({run['notes'][name]})" if name in run["notes"] else "")
            for name, version in run["peers"].items()
        ),
        *(f"- {name}: left out, {reason}" for name, reason in run["missing"].items()),
    ]
    roof = (
        "the device's own copy of as many bytes, half of them read and half written"
        if "gpu" in machine
        else "a kernel that moves the same bytes with at most one addition, through the same engine"
    )
    words = (
        "Every figure is a median over rounds in which all contestants take turns on the same arrays; behind it in "
        "brackets the quartiles. `times faster` is the median of the rounds' ratios. `of the probe` is the speed in "
        f"bytes a second over that of {roof}, in the same rounds. A peer's time counts only after its results agreed "
        "with fastopt's. " + _roof_words(results)
    )
    return "\n".join([*lines, "", words])


def _roof_words(results: Results) -> str:
    """Where the probe is a roof."""
    if "gpu" in results.machine:
        return f"It is the roof from {size_name(LARGE_ON_GPU)} parameters on."
    cache = results.last_level_cache
    if cache is None:
        return "The caches of this machine are not known, so no figure here is said to be one of memory."
    need = (
        f"The arrays of a step lie in memory if they fill the last-level cache, {_mebibytes(cache)} for these threads, "
        f"{FROM_MEMORY} times: only there is the probe a roof. In a cache it is one more kernel, which waits for its "
        "loads in its own way, and a step may be faster."
    )
    if not any(cell.is_from_memory for cell in results.section("curves")):
        need += " **No curve of this run got that far: it says nothing of steps from memory.**"
    return need


def _mebibytes(n: int) -> str:
    return f"{n / 2**20:,.0f} MiB"


def noisy(results: Results) -> list[str]:
    """Warnings about the machine."""
    found = []
    cells = [
        cell.workload for cell in results.cells if cell.is_noisy and cell.info["section"] not in ("cold", "memory")
    ]
    if cells:
        found.append(
            f"in {len(cells)} of {len(results.cells)} workloads fastopt's rounds spread by more than {NOISY:.0%} or "
            f"most were disturbed by other processes: {_some(cells)}"
        )
    if results.run["others"] > NOISY:
        found.append(
            f"other processes took {results.run['others']:.0%} of one processor; figures of a busy machine say little"
        )
    return found


def _noise(results: Results) -> str:
    return "\n\n".join(f"> **Noisy machine:** {warning}." for warning in noisy(results))


def behind(results: Results) -> list[tuple[Cell, str]]:
    """Every workload where a peer is faster, or, from `LARGE` parameters on, the probe by more than the goal."""
    sections = ("curves", "models", "tail", "hard", "threads", "states")
    return [
        (cell, shortfall) for cell in results.cells if cell.info["section"] in sections for shortfall in cell.shortfalls
    ]


def summary(results: Results) -> str:
    """The first curve, the models, the tail and the states as a table for a terminal of 80 columns.

    Times of fastopt, also in ns a parameter, and how many times faster it is than the fastest peer.
    """
    curve = next(iter(results.curves.values()), [])
    cells = [*curve, *(cell for name in ("models", "tail", "states") for cell in results.section(name))]
    rows: list[Sequence[str]] = [("a step of", "takes", "ns", "faster", "than")]
    for cell in cells:
        name = "whole tail" if cell.info["section"] == "tail" else cell.info["title"]
        words = f"{name}, {cell.info['label']}".replace("state_dtype ", "").replace(", FlatBuffer", ", flat")
        other = FLOAT32 if FLOAT32 in cell.entries else cell.fastest.contestant if cell.fastest else None
        beside = [short(cell.times_faster(other).median), other.removeprefix(f"{NAME}, ")] if other else ["", ""]
        rows.append((words, seconds(cell.ours.sample.median), short(cell.ours.ns_per_parameter), *beside))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            text.rjust(width) if 0 < k < 4 else text.ljust(width)
            for k, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _behind(results: Results) -> str:
    found = behind(results)
    large, least = (LARGE_ON_GPU, GOAL_ON_GPU) if "gpu" in results.machine else (LARGE, GOAL)
    share = f"from {size_name(large)} parameters on at {least:.0%} of the probe or more"
    goal = f"ahead of the fastest peer everywhere, and {share}"
    if not found:
        return f"## Where fastopt is behind\n\nNowhere. The goal: {goal}."
    rows = [(cell.workload + (" (noisy)" if cell.is_noisy else ""), shortfall) for cell, shortfall in found]
    return f"## Where fastopt is behind\n\nThe goal: {goal}.\n\n" + table(("workload", "behind"), rows)


def _promises(results: Results) -> str:
    found = promises.verdicts(results)
    short_of = [verdict for verdict in found if not verdict.kept]
    head = (
        f"## Promises\n\n{len(found) - len(short_of)} of {len(found)} measurements keep what `{promises.FILE}` promises"
    )
    return head + ("; fell short:\n\n" + "\n".join(f"- {verdict}" for verdict in short_of) if short_of else ".")


def _row(cell: Cell, name: str) -> list[str]:
    ours, share, fastest = cell.ours, cell.share_of_probe, cell.fastest
    faster = [spread(cell.times_faster(fastest.contestant)), fastest.contestant] if fastest else ["", ""]
    return [
        name,
        times(ours.sample),
        short(ours.ns_per_parameter),
        short(ours.gb_per_s),
        cell.arrays_in,
        spread(share, 100, "%") if share else "",
        *faster,
    ]


_HEADER = ("", "fastopt", "ns/parameter", "GB/s", "arrays in", "of the probe", "times faster", "than the fastest peer")


def _steps(title: str, cells: Sequence[Cell]) -> str:
    if not cells:
        return ""
    rows = [_row(cell, f"{cell.info['title']}, {cell.info['label']}") for cell in cells]
    return f"## {title}\n\n" + table(_HEADER, rows)


def _curves(results: Results) -> str:
    parts = ["## Over the parameter count"] if results.curves else []
    for title, cells in results.curves.items():
        moved = cells[0].info["bytes_per_parameter"]
        name = plots.name_of(title)
        picture = f"![{title}]({name}.png)\n\n" if len(cells) >= plots.FEWEST else ""
        rows = [_row(cell, cell.info["label"]) for cell in cells]
        parts.append(
            f"### {title}: {moved:g} bytes a parameter\n\n{picture}" + table(("parameters", *_HEADER[1:]), rows)
        )
        names = list(dict.fromkeys(name for cell in cells for name in cell.entries if name not in (NAME, *OTHERS)))
        if names:
            columns = [NAME, PROBE, *names]
            for unit, value in (("ns per parameter", "ns_per_parameter"), ("GB/s", "gb_per_s")):
                body = [[cell.info["label"], *(_of(cell, column, value) for column in columns)] for cell in cells]
                parts.append(table((unit, *columns), body))
    return "\n\n".join(parts)


def _of(cell: Cell, contestant: str, attribute: str) -> str:
    entry = cell.entries.get(contestant)
    return short(getattr(entry, attribute)) if entry else ""


def _tail(results: Results) -> str:
    cells = results.section("tail")
    if not cells:
        return ""
    rows = []
    for cell in cells:
        alone = cell.entries.get(ALONE)
        rows.append([*_row(cell, cell.info["label"]), times(alone.sample) if alone else ""])
    head = "## The whole tail: clip by norm, AdamW, moving average, bfloat16 copy, zero the gradients"
    return f"{head}\n\n" + table((*_HEADER, "AdamW alone"), rows)


def _states(results: Results) -> str:
    rows = []
    for cell in results.section("states"):
        base = cell.entries.get(FLOAT32)
        faster = [times(base.sample), spread(cell.times_faster(FLOAT32))] if base else ["", ""]
        moved = f"{cell.info['bytes_per_parameter']:.4g}"
        rows.append([*_row(cell, f"{cell.info['title']}, {cell.info['label']}")[:6], moved, *faster])
    header = (*_HEADER[:6], "bytes/parameter", "float32 states", "times faster than those")
    return "## States in low precision\n\n" + table(header, rows) if rows else ""


def _hard(results: Results) -> str:
    cells = results.section("hard")
    if not cells:
        return ""
    normal = {cell.info["title"]: cell for cell in cells if cell.info["input"] == "normal"}
    names = list(dict.fromkeys(name for cell in cells for name in cell.peers))
    rows = []
    for cell in cells:
        base = normal.get(cell.info["title"])
        slower = []
        for name in (NAME, *names):
            entry = cell.entries.get(name)
            usual = base.entries.get(name) if base else None
            factor = f", {entry.sample.median / usual.sample.median:.2f} x" if entry and usual else ""
            slower.append(seconds(entry.sample.median) + factor if entry else "")
        rows.append([f"{cell.info['title']}, {cell.info['label']}", *slower])
    words = "Behind each time, how many times the same contestant's time on normal numbers it is."
    return f"## Inputs that make steps slow\n\n{words}\n\n" + table(("", NAME, *names), rows)


def _cold(results: Results) -> str:
    cells = results.section("cold")
    names = list(dict.fromkeys(name for cell in cells for name in cell.entries))
    rows = [
        [cell.info["title"], *(times(cell.entries[name].sample) if name in cell.entries else "" for name in names)]
        for cell in cells
    ]
    words = "What an import, and import with one step of 1e5 parameters, add to a process that imports NumPy."
    return f"## Cold start\n\n{words}\n\n" + table(("", *names), rows) if rows else ""


def _memory(results: Results) -> str:
    rows = []
    kinds = list(promises.MEMORY)
    for cell in results.section("memory"):
        growth: dict[str, Any] = cell.info["growth"]
        rows.append([cell.info["title"], *(f"{growth[kind]:.4f}" if kind in growth else "" for kind in kinds)])
    words = "Bytes a parameter by which what three steps allocate grows from 1e6 to 1e7 parameters."
    return f"## Memory of a step\n\n{words}\n\n" + table(("", *kinds), rows) if rows else ""


def left_out(results: Results) -> list[str]:
    """What was not measured: contestants and reasons, workloads counted and the first few named."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for one in results.run["left_out"]:
        grouped.setdefault((one["contestant"], _kind(one["reason"])), []).append(one["workload"])
    lines = []
    for (contestant, reason), workloads in grouped.items():
        lines.append(f"{contestant}: {reason} ({_some(workloads)})")
    return lines


def _some(names: Sequence[str], most: int = 4) -> str:
    """The first few of many."""
    return "; ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _kind(reason: str) -> str:
    """A reason without its figures, where they differ from workload to workload."""
    kinds = {
        "no time left": "no time left",
        "a step would take": "a step would take too long for this run",
        "disagrees": f"its results differ from fastopt's by more than {promises.ULP:g} ULP",
    }
    return next((kind for start, kind in kinds.items() if reason.startswith(start)), reason)


def _left_out(results: Results) -> str:
    lines = left_out(results)
    counted = Counter(one["contestant"] for one in results.run["left_out"])
    if not lines:
        return ""
    head = f"## Left out\n\n{sum(counted.values())} measurements:\n\n"
    return head + "\n".join(f"- {line}" for line in lines)
