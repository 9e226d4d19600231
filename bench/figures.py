"""The README's figures: `python -m bench.figures` writes them from the committed run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from bench import plots, promises, report, results
from bench.ours import FLOAT32, NAME, PROBE
from bench.results import LARGE, Cell, Results
from bench.samples import seconds, short
from bench.workloads import MODELS

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
MAIN = "2-core"
"""The folder in `RESULTS` that the README shows; others are linked."""
PLACE = re.compile(r"(<!-- figures[^>]*-->\n).*?(<!-- end of figures -->)", re.DOTALL)
STEPS = [
    *(("Adam", label) for label in ("16", "1e3", "1e5", "1e7", "5e7")),
    *((title, "5e7") for title in ("AdamW", "SGD, momentum 0.9", "Adagrad")),
]


def committed() -> Results | None:
    """The run that the README shows, or None before there is one."""
    folder = RESULTS / MAIN
    return results.load(folder) if (folder / results.FILE).exists() else None


def with_figures(readme: str, run: Results) -> str:
    """The README's text with the figures of `run` between its marks."""
    if not PLACE.search(readme):
        raise ValueError("the README has no <!-- figures --> and <!-- end of figures -->")
    return PLACE.sub(lambda match: match[1] + text(run) + match[2], readme)


def text(run: Results) -> str:
    """Tables and sentences, every number of them from `run`."""
    peers = ", ".join(dict.fromkeys(part for version in run.run["peers"].values() for part in version.split(", ")))
    machine = run.machine
    intro = (
        f"{machine['cpus']} processors ({machine['processor']}, {machine['fastopt']['isa']}), "
        f"{machine['fastopt']['n_threads']} threads each, rounds interleaved on the same arrays, "
        f"medians. Peers: {peers}."
    )
    single = [cell for title, label in STEPS if (cell := run.cell(f"curves/{title}/{label}"))]
    many = [cell for name in MODELS if (cell := run.cell(f"models/Adam/{name}"))]
    unfused = [cell for cell in run.section("curves") if _is_unfused(cell)]
    tails = [cell for name in MODELS if (cell := run.cell(f"tail/AdamW/{name}"))]
    parts = [
        intro,
        _picture(run),
        _table("step", [*single, *many]),
        _table("step of 10 million parameters, not fused in torch", unfused),
        _table("whole tail: clip by norm, AdamW, average, bfloat16 copy, zero", tails, only_label=True),
        _states(run.section("states")),
        _sentence(run),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _picture(run: Results) -> str:
    title = "Adam"
    if len(run.curves.get(title, [])) < plots.FEWEST:
        return ""
    return f"![{title} over the parameter count](bench/results/{MAIN}/{plots.name_of(title)}.png)"


def _is_unfused(cell: Cell) -> bool:
    at_1e7 = cell.info["label"] == "1e7" and promises.TORCH_FUSED not in cell.entries
    return at_1e7 and any(name in cell.entries for name in promises.TORCH_UNFUSED)


def _table(what: str, cells: Sequence[Cell], only_label: bool = False) -> str:
    rows = []
    for cell in cells:
        fastest = cell.fastest
        if fastest is None:
            continue
        name = cell.info["label"] if only_label else f"{cell.info['title']}, {cell.info['label']}"
        faster = cell.times_faster(fastest.contestant).median
        times = [seconds(entry.sample.median) for entry in (cell.ours, fastest)]
        rows.append([name, times[0], f"{times[1]} ({fastest.contestant})", _factor(faster)])
    return report.table((what, NAME, "fastest peer", "times faster"), rows) if rows else ""


def _states(cells: Sequence[Cell]) -> str:
    """Steps with states in low precision beside the same with float32 states."""
    rows = []
    for cell in cells:
        if FLOAT32 not in cell.entries:
            continue
        times = [seconds(cell.ours.sample.median), seconds(cell.entries[FLOAT32].sample.median)]
        name = f"{cell.info['title']}, {cell.info['label']}"
        moved = short(cell.info["bytes_per_parameter"])
        rows.append([name, moved, *times, _factor(cell.times_faster(FLOAT32).median)])
    header = ("fewer bytes", "bytes moved a parameter", NAME, "float32 states", "times faster")
    return report.table(header, rows) if rows else ""


def _factor(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2f}"


def _sentence(run: Results) -> str:
    """The roof, and every place where fastopt is behind: a README that named only the good ones would be no use."""
    large = [cell for cell in run.section("curves") if cell.info["parameters"] >= LARGE and cell.probe]
    if not large:
        return ""
    speeds = sorted(cell.ours.gb_per_s for cell in large)
    roofs = sorted(cell.probe.gb_per_s for cell in large if cell.probe)
    shares = sorted(share.median for cell in large if (share := cell.share_of_probe))
    behind = list(dict.fromkeys(cell.workload for cell, _ in report.behind(run)))
    words = (
        f"From 10 million parameters on, steps move {short(speeds[0])} to {short(speeds[-1])} GB/s; the {PROBE}, a "
        f"kernel that moves these bytes without arithmetic, {short(roofs[0])} to {short(roofs[-1])}: fastopt reaches "
        f"{shares[0]:.0%} to {shares[-1]:.0%} of it. "
    )
    if not behind:
        return words + f"No peer was faster in any of {len(run.cells)} workloads."
    link = f"[report](bench/results/{MAIN}/{report.FILE})"
    return (
        words + f"In {len(behind)} of {len(run.cells)} workloads a peer or the probe is ahead; the {link} names each."
    )


if __name__ == "__main__":
    last = committed()
    if last is None:
        raise SystemExit(f"no {results.FILE} in {RESULTS / MAIN}")
    README.write_text(with_figures(README.read_text(encoding="utf-8"), last), encoding="utf-8")
