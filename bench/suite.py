"""A run of the suite: its races within the time, and the clock that pytest-benchmark reads them from."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import pytest

import fastopt
from bench import machine, ours, peers
from bench.race import Measured, Outcome, Pace, Race, cpu_seconds_of_others
from bench.samples import short
from bench.workloads import MODES, Workload, workloads

PROGRESS = "bench: "
"""Lines that the command line reads begin with it."""


class Clock:
    """The clock that pytest-benchmark reads: it stands still but for the recorded times that it is fed."""

    def __init__(self) -> None:
        self.now = 0.0
        self.times: list[float] = []

    def read(self) -> float:
        return self.now

    def set_back(self) -> None:
        self.now = 0.0

    def pass_by(self) -> None:
        self.now = self.times.pop(0)


CLOCK = Clock()


class Suite:
    """The races of a run, one after the other, as far as the time goes."""

    def __init__(self, config: pytest.Config) -> None:
        option = config.getoption
        self.mode_name = option("--bench-mode")
        self.mode = MODES[self.mode_name]
        self.says_progress = option("--bench-progress")
        self.started = time.perf_counter()
        self.others_before = cpu_seconds_of_others()
        self.pace = Pace()
        self.outcomes: dict[str, Outcome] = {}
        self.left_out: list[dict[str, str]] = []
        sizes, threads = option("--bench-sizes"), option("--bench-threads")
        self.plain = not (option("--bench-optimizers") or sizes or option("--bench-backend") == "cuda")
        counts = [int(text) for text in threads] if threads else None
        n_threads = max(counts) if counts else fastopt.get_num_threads()
        self.workloads = workloads(
            self.mode,
            option("--bench-optimizers"),
            sizes and [int(text) for text in sizes],
            counts,
            option("--bench-backend"),
            machine.last_level_cache(machine.caches(), n_threads),
            machine.memory(),
        )
        chosen = option("--bench-peers")
        self.adapters = {name: peers.load(name) for name in (peers.MODULES if chosen is None else chosen)}
        on_gpu = option("--bench-backend") == "cuda"
        self.missing = {
            name: reason
            for name, peer in self.adapters.items()
            if (reason := peer.missing() or peer.too_slow(self.mode) or (peer.missing_on_gpu() if on_gpu else None))
        }
        self.present = {name: peer for name, peer in self.adapters.items() if name not in self.missing}
        self.versions = {name: peer.version() for name, peer in self.present.items()}
        self.notes = {name: peer.note for name, peer in self.present.items() if peer.note}

    def contestants(self, workload: Workload) -> list[str]:
        """Everyone who has a part in it; who takes it is seen at the race."""
        beside = {"tail": [ours.ALONE], "states": [ours.FLOAT32]}.get(workload.section, [])
        willing = [name for name, peer in self.present.items() if peer.refuses(workload) is None]
        return [ours.NAME, ours.PROBE, *beside, *willing]

    @property
    def left_seconds(self) -> float:
        return self.mode.seconds - (time.perf_counter() - self.started)

    def outcome(self, workload: Workload) -> Outcome:
        """Of the workload's race, which is run when it is first asked for."""
        if workload.id not in self.outcomes:
            self.say(race=workload.id)
            race = Race(workload, self.present, self.mode, self.pace)
            foretold = race.foretold_seconds()
            if foretold > self.left_seconds:
                reason = f"no time left: would take about {short(foretold)} s of {self.mode.seconds:g} s in all"
                race.outcome.left_out = dict.fromkeys(self.contestants(workload), reason)
                self.left_out.append({"workload": workload.id, "contestant": "all", "reason": reason})
            else:
                race.run()
                for name, reason in race.outcome.left_out.items():
                    self.left_out.append({"workload": workload.id, "contestant": name, "reason": reason})
            self.outcomes[workload.id] = race.outcome
        return self.outcomes[workload.id]

    def say(self, **what: Any) -> None:
        if self.says_progress:
            sys.stdout.write(f"{PROGRESS}{json.dumps(what)}\n")
            sys.stdout.flush()

    def summary(self) -> dict[str, Any]:
        """What the results say of the run as a whole."""
        elapsed = time.perf_counter() - self.started
        return {
            "mode": self.mode_name,
            "seconds": elapsed,
            "others": (cpu_seconds_of_others() - self.others_before) / elapsed,
            "peers": self.versions,
            "notes": self.notes,
            "missing": self.missing,
            "left_out": self.left_out,
        }


def info_of(workload: Workload, measured: Measured) -> dict[str, Any]:
    """What `results.json` says of one contestant of a workload beside its times."""
    middle = sorted(measured.times)[len(measured.times) // 2]
    return {
        "section": workload.section,
        "optimizer": workload.function,
        "title": workload.title,
        "label": workload.label,
        "hypers": dict(workload.hypers),
        "options": dict(workload.options),
        "parameters": workload.n,
        "tensors": len(workload.shapes),
        "states": len(workload.states),
        "input": workload.input,
        "form": workload.form,
        "backend": workload.backend,
        "threads": workload.n_threads,
        "isa": fastopt.info()["isa"],
        "bytes_per_parameter": measured.bytes_per_parameter,
        "gb_per_s": measured.bytes_per_parameter * workload.n / middle / 1e9,
        "version": measured.version,
        "ulp": measured.ulp,
        "disturbed": measured.disturbed,
    }
