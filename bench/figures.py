"""Figures of README and documentation: `python -m bench.figures` writes them there from the committed run.

The README has one table and what is promised of it; the page `docs/benchmark.md` has every table. What a table of the
report looks like is `report.py`'s.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import plots, promises, report, results
from bench.ours import FLOAT32, NAME, PROBE
from bench.results import GOAL, LARGE, Cell, Results
from bench.samples import NOISY, short
from bench.workloads import FROM_MEMORY, LARGEST, MODELS, SECTIONS, size_name

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGE = ROOT / "docs" / "benchmark.md"
RESULTS = ROOT / "bench" / "results"
MAIN = "2-core"
"""The folder in `RESULTS` that the README shows; others are linked."""
PLACE = re.compile(r"(<!-- figures[^>]*-->\n).*?(<!-- end of figures -->)", re.DOTALL)
STEPS = [("Adam", label) for label in ("16", "1e3", "1e5", "1e7")]
STEP = "step, of so many parameters or of a model"
TAIL = "clip by norm, AdamW, average, bfloat16 copy, zero"
"""What the whole tail is made of."""
LARGE_STEPS = ("Adam", "AdamW", "SGD, momentum 0.9", "Adagrad")
"""Optimizers that are also shown from `LARGEST` parameters on."""


def committed() -> Results | None:
    """The run that the README shows, or None before there is one."""
    folder = RESULTS / MAIN
    return results.load(folder) if (folder / results.FILE).exists() else None


def with_figures(text: str, figures: str) -> str:
    """A page's text with `figures` between its marks."""
    if not PLACE.search(text):
        raise ValueError("the page has no <!-- figures --> and <!-- end of figures -->")
    return PLACE.sub(lambda match: match[1] + figures + match[2], text)


def in_short(run: Results) -> str:
    """The README's: a picture, one table, and what is kept of the promises; every number from `run`."""
    cells, tails = [*_adam(run), *_models(run)], _tails(run)
    words = f"1,000 x 64 are a thousand arrays of 64. The whole tail is {TAIL}."
    return _paragraphs(
        f"{_setting(run)} {_memory(run)}",
        _picture(run),
        _table(STEP, [*_rows(cells), *_rows(tails, "whole tail")]),
        " ".join(filter(None, (words, _noise([*cells, *tails]), _sentence(run)))),
    )


def in_tables(run: Results) -> str:
    """The documentation's: all tables, every number from `run`."""
    single = [cell for cell in run.section("curves") if _is_shown(cell)]
    unfused = [cell for cell in run.section("curves") if _is_unfused(cell)]
    states = run.section("states")
    return _paragraphs(
        f"{_setting(run)} {_memory(run)}",
        _table(STEP, _rows([*single, *_models(run)])),
        _table("step of 10 million parameters, not fused in torch", _rows(unfused)),
        _table(f"whole tail: {TAIL}", _rows(_tails(run), "")),
        _states(states),
        _noise([*single, *_models(run), *unfused, *_tails(run), *states]),
    )


WRITTEN: dict[Path, Callable[[Results], str]] = {README: in_short, PAGE: in_tables}
"""Files with figures between marks, and which."""


def _paragraphs(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


def _setting(run: Results) -> str:
    """On what and against whom it was measured."""
    peers = ", ".join(dict.fromkeys(part for version in run.run["peers"].values() for part in version.split(", ")))
    machine = run.machine
    return (
        f"{machine['cpus']} processors ({machine['processor']}, {machine['fastopt']['isa']}), "
        f"{machine['fastopt']['n_threads']} threads each, rounds interleaved on the same arrays: medians, with the "
        f"quartiles in brackets. Peers: {peers}."
    )


def _models(run: Results) -> list[Cell]:
    return [cell for name in MODELS if (cell := run.cell(f"models/Adam/{name}"))]


def _tails(run: Results) -> list[Cell]:
    return [cell for name in MODELS if (cell := run.cell(f"tail/AdamW/{name}"))]


def _adam(run: Results) -> list[Cell]:
    return [cell for cell in run.section("curves") if _is_shown(cell) and cell.info["title"] == "Adam"]


def _is_shown(cell: Cell) -> bool:
    """Whether a cell of the curves is in the first table."""
    title, label = cell.info["title"], cell.info["label"]
    return (title, label) in STEPS or (title in LARGE_STEPS and cell.info["parameters"] >= LARGEST and "^" not in label)


def _memory(run: Results) -> str:
    """What the figures say of memory."""
    cache = run.last_level_cache
    if cache is None:
        return "The caches of this machine are not known, so none of these figures is said to be one of memory."
    words = (
        f"Here the last-level cache has {cache / 2**20:,.0f} MiB; a figure is one of memory where the arrays of a step "
        f"fill it at least {FROM_MEMORY} times. `arrays in` says where they lie."
    )
    if not any(cell.is_from_memory for cell in run.cells if cell.info["section"] in SECTIONS):
        words += " **In this run they nowhere did: no figure below is one of memory.**"
    return words


def _picture(run: Results) -> str:
    title = "Adam"
    if len(run.curves.get(title, [])) < plots.FEWEST:
        return ""
    return (
        f"![{title}: fastopt and its peers over the parameter count](bench/results/{MAIN}/{plots.name_of(title)}.png)"
    )


def _is_unfused(cell: Cell) -> bool:
    at_1e7 = cell.info["label"] == "1e7" and promises.TORCH_FUSED not in cell.entries
    return at_1e7 and any(name in cell.entries for name in promises.TORCH_UNFUSED)


def _rows(cells: Sequence[Cell], title: str | None = None) -> list[list[str]]:
    """Cells beside their fastest peer, under their optimizer's title or another."""
    rows = []
    for cell in cells:
        fastest = cell.fastest
        if fastest is None or cell.is_noisy:
            continue
        name = ", ".join(filter(None, (cell.info["title"] if title is None else title, cell.info["label"])))
        faster = report.spread(cell.times_faster(fastest.contestant))
        peer = f"{report.times(fastest.sample)} {fastest.contestant}"
        rows.append([name, cell.arrays_in, report.times(cell.ours.sample), peer, faster])
    return rows


def _table(what: str, rows: Sequence[Sequence[str]]) -> str:
    return report.table((what, "arrays in", NAME, "fastest peer", "times faster"), rows) if rows else ""


def _states(cells: Sequence[Cell]) -> str:
    """Steps with states in low precision beside the same with float32 states."""
    rows = []
    for cell in cells:
        if FLOAT32 not in cell.entries or cell.is_noisy:
            continue
        times = [report.times(entry.sample) for entry in (cell.ours, cell.entries[FLOAT32])]
        name = f"{cell.info['title']}, {cell.info['label']}"
        moved = short(cell.info["bytes_per_parameter"])
        rows.append([name, cell.arrays_in, moved, *times, report.spread(cell.times_faster(FLOAT32))])
    header = ("fewer bytes", "arrays in", "bytes moved a parameter", NAME, "float32 states", "times faster")
    return report.table(header, rows) if rows else ""


def _noise(cells: Sequence[Cell]) -> str:
    left_out = list(dict.fromkeys(cell.workload for cell in cells if cell.is_noisy))
    if not left_out:
        return ""
    return f"Left out here, because the rounds spread by more than {NOISY:.0%}: {'; '.join(left_out)}."


def _sentence(run: Results) -> str:
    """Promises, the roof, and where fastopt is behind: a README that named only the good ones would be no use."""
    found = promises.verdicts(run)
    kept = sum(verdict.kept for verdict in found)
    words = f"{kept} of {len(found)} measurements keep what [promises.py]({promises.FILE}) promises. "
    cells = [cell for cell in run.section("curves") if cell.is_from_memory and not cell.is_noisy]
    shares = sorted((share for cell in cells if (share := cell.share_of_probe)), key=lambda share: share.median)
    if shares:
        speeds = sorted(cell.ours.gb_per_s for cell in cells if cell.probe)
        words += (
            f"From memory steps move {short(speeds[0])} to {short(speeds[-1])} GB/s, {shares[0].median:.0%} to "
            f"{shares[-1].median:.0%} of what the {PROBE} does, a kernel that moves the same bytes without arithmetic. "
        )
        above = sum(share.q1 > 1 for share in shares)
        if above:
            words += f"In {above} of {len(shares)} the {PROBE} is no roof: the step is faster, beyond the quartiles. "
    else:
        words += (
            "No curve of this run is one of memory, so none is held to a roof: that of the "
            f"{PROBE}, a kernel that moves the same bytes without arithmetic. "
        )
    behind = list(dict.fromkeys(cell.workload for cell, _ in report.behind(run)))
    if not behind:
        return words + f"No peer was faster in any of {len(run.cells)} workloads."
    link = f"[report](bench/results/{MAIN}/{report.FILE})"
    return (
        words
        + f"In {len(behind)} of {len(run.cells)} workloads a peer is ahead, or from {size_name(LARGE)} parameters on "
        f"the {PROBE} by more than {1 - GOAL:.0%}; the {link} names each."
    )


if __name__ == "__main__":
    last = committed()
    if last is None:
        raise SystemExit(f"no {results.FILE} in {RESULTS / MAIN}")
    for path, figures in WRITTEN.items():
        path.write_text(with_figures(path.read_text(encoding="utf-8"), figures(last)), encoding="utf-8")
