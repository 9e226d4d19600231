"""Reading a run's `results.json`: what was measured, and how contestants of one workload compare."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import machine
from bench.ours import NAME, OTHERS, PROBE
from bench.samples import Sample, ratio
from bench.workloads import FROM_MEMORY, bytes_held

FILE = "results.json"
LARGE = 10**7
"""Parameters from which a step is held to the probe."""
GOAL = 0.95
"""Share of the probe's speed that a large step should have."""
LARGE_ON_GPU = 10**8
GOAL_ON_GPU = 0.92
"""The same on a GPU."""


@dataclass(frozen=True)
class Entry:
    """One contestant of one workload."""

    workload: str
    contestant: str
    times: tuple[float, ...]
    """Seconds a step, of every round."""
    info: dict[str, Any] = field(hash=False)

    @functools.cached_property
    def sample(self) -> Sample:
        return Sample.of(self.times)

    @property
    def gb_per_s(self) -> float:
        return float(self.info["bytes_per_parameter"] * self.info["parameters"] / self.sample.median / 1e9)

    @property
    def ns_per_parameter(self) -> float:
        return self.sample.median / self.info["parameters"] * 1e9


@dataclass(frozen=True)
class Cell:
    """One workload: fastopt, the probe and the peers that were measured."""

    workload: str
    entries: dict[str, Entry]
    caches: tuple[machine.Cache, ...] = ()
    """Of the machine."""

    @property
    def ours(self) -> Entry:
        return self.entries[NAME]

    @property
    def info(self) -> dict[str, Any]:
        return self.ours.info

    @property
    def probe(self) -> Entry | None:
        return self.entries.get(PROBE)

    @property
    def peers(self) -> dict[str, Entry]:
        """From fastest to slowest."""
        found = [entry for name, entry in self.entries.items() if name not in (NAME, *OTHERS)]
        return {entry.contestant: entry for entry in sorted(found, key=lambda entry: entry.sample.median)}

    @property
    def fastest(self) -> Entry | None:
        """The fastest peer."""
        return next(iter(self.peers.values()), None)

    def times_faster(self, peer: str) -> Sample:
        """How many times faster than `peer` fastopt is: of the rounds' ratios."""
        return ratio(self.entries[peer].times, self.ours.times)

    @property
    def share_of_probe(self) -> Sample | None:
        """fastopt's speed in bytes a second over the probe's."""
        if self.probe is None:
            return None
        bytes_ratio = self.info["bytes_per_parameter"] / self.probe.info["bytes_per_parameter"]
        return ratio(self.probe.times, self.ours.times).scaled(bytes_ratio)

    @property
    def arrays_in(self) -> str:
        """Where the arrays of the step lie: the first cache that has room, "memory", or "" where that is not known.

        They lie in memory if they fill the last cache `FROM_MEMORY` times; what is smaller is served by both.
        """
        if not self.caches or self.info.get("backend") == "cuda":
            return ""
        hypers, options = (tuple(self.info.get(name, {}).items()) for name in ("hypers", "options"))
        held = bytes_held(self.info["optimizer"], hypers, options) * self.info["parameters"]
        sizes = {f"L{one['level']}": machine.reachable(one, self.info["threads"]) for one in self.caches}
        for level, size in sizes.items():
            if held <= size:
                return level
        last = list(sizes)[-1]
        return "memory" if held >= FROM_MEMORY * sizes[last] else f"{last} and memory"

    @property
    def is_from_memory(self) -> bool:
        """Whether its figures are those of the memory, and the probe is a roof."""
        if self.info.get("backend") == "cuda":
            return bool(self.info["parameters"] >= LARGE_ON_GPU)
        return self.arrays_in == "memory"

    @property
    def shortfalls(self) -> list[str]:
        """Where fastopt is behind, in words: a faster peer, or less than the goal's share of the probe."""
        found = []
        for name in self.peers:
            faster = self.times_faster(name)
            if faster.median < 1:
                doubt = ", but within the quartiles" if faster.q3 >= 1 else ""
                found.append(f"{name} is {1 / faster.median:.2f} times as fast{doubt}")
        share = self.share_of_probe
        on_gpu = self.info.get("backend") == "cuda"
        large, goal = (LARGE_ON_GPU, GOAL_ON_GPU) if on_gpu else (LARGE, GOAL)
        if share is not None and self.info["parameters"] >= large and share.median < goal:
            found.append(f"{share.median:.0%} of the probe")
        return found

    @property
    def is_noisy(self) -> bool:
        return bool(self.info.get("disturbed")) or self.ours.sample.is_noisy


@dataclass(frozen=True)
class Results:
    """One run."""

    machine: dict[str, Any]
    run: dict[str, Any]
    entries: tuple[Entry, ...]

    @functools.cached_property
    def cells(self) -> list[Cell]:
        """Every workload that fastopt was measured in, in the order of the run."""
        grouped: dict[str, dict[str, Entry]] = {}
        for entry in self.entries:
            grouped.setdefault(entry.workload, {})[entry.contestant] = entry
        caches = tuple(self.machine["caches"])
        return [Cell(workload, entries, caches) for workload, entries in grouped.items() if NAME in entries]

    @property
    def last_level_cache(self) -> int | None:
        """Bytes that the threads of a step have together."""
        return machine.last_level_cache(self.machine["caches"], self.machine["fastopt"]["n_threads"])

    def section(self, name: str) -> list[Cell]:
        """The workloads of a section, curves by size."""
        found = [cell for cell in self.cells if cell.info["section"] == name]
        if name == "curves":
            titles = list(dict.fromkeys(cell.info["title"] for cell in found))
            found.sort(key=lambda cell: (titles.index(cell.info["title"]), cell.info["parameters"]))
        return found

    def cell(self, workload: str) -> Cell | None:
        return next((cell for cell in self.cells if cell.workload == workload), None)

    @property
    def curves(self) -> dict[str, list[Cell]]:
        """Title of an optimizer -> its sizes, ascending."""
        found: dict[str, list[Cell]] = {}
        for cell in self.section("curves"):
            found.setdefault(cell.info["title"], []).append(cell)
        return found


def load(folder: Path) -> Results:
    """The results in a folder, or in a `results.json` itself.

    Raises
    ------
    ValueError
        If there are none, or they are not of this benchmark.
    """
    path = folder / FILE if folder.is_dir() else folder
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        entries = tuple(
            Entry(
                benchmark["extra_info"]["workload"],
                benchmark["extra_info"]["contestant"],
                tuple(benchmark["stats"]["data"]),
                benchmark["extra_info"],
            )
            for benchmark in data["benchmarks"]
        )
        return Results(data["machine_info"]["fastopt"], data["run"], entries)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        kind = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: expected results of `python -m fastopt bench`, got {kind}") from None
