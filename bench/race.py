"""A race: every contestant of one workload in turn, round after round, so that a drifting machine favours none.

Results are compared before any time counts. What a block of steps is made of was measured on two cores (fastopt
0.1.0, torch 2.13, Adam of 1e5 and 1e6):

- fastopt, torch and DeepSpeed link libgomp under one name, so a process has one pool of threads for all of them.
  Another pool (XLA's) sleeps through the others' blocks; libgomp's spins for some milliseconds after each of its
  regions and would take the other's core. Hence the pause.
- A change of sides is felt: the first step takes 1 ms where the others take 0.06, and caches hold the other's
  arrays for a millisecond more. Hence the warm-up.
- A thread that loses its core to another process keeps its team spinning for whole time slices: 8 ms a step where
  0.025 is normal, or 16 where 5 is, and with quartiles as close as on a quiet machine. So rounds in which others
  took processor time are run again, as far as the time goes.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

from bench import ours, probe
from bench.buffers import Buffers, largest_difference
from bench.peers import Contestant, Peer
from bench.samples import seconds
from bench.workloads import Mode, Workload, bytes_moved

PAUSE = 0.004
WARM_UP = 0.005
READING = 0.0005
"""Seconds: sleep before a block, its unmeasured steps, steps between readings of the clock."""
LONGEST_FADE = 300
"""Steps of a block at most where gradients are used up: Adam's mean would fade into the subnormals after 800."""
CHECKED_STEPS = 8
"""RAdam rectifies from the sixth on."""
CHECKED_STEPS_LARGE = 2
LARGE = 2 * 10**6
"""Parameters from which two steps are compared."""
MOST_ULP = 32.0
"""Difference in ULP of a parameter after the checked steps from which times do not count: 2 for either side and step
say that both computed the same, not how well."""
SLOW_STEP = 0.1
SLOW_ROUNDS = 3
"""A contestant whose step takes longer than that many seconds sits out the rounds after so many."""


@dataclass
class Measured:
    """What one contestant did in a race."""

    times: list[float]
    """Seconds a step, one for every round that it took part in."""
    version: str
    bytes_per_parameter: float
    ulp: float | None = None
    """Largest difference from fastopt after the checked steps."""
    disturbed: bool = False
    """Whether others took processor time in most rounds."""


@dataclass
class Outcome:
    """Of one race: who was measured, and why others were not."""

    measured: dict[str, Measured] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


class Pace:
    """Seconds a step that contestants took so far, to foretell larger sizes."""

    SMALL = 50_000
    """Parameters under which a step is mostly overhead, and says nothing of larger ones."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, str], tuple[int, float]] = {}

    def note(self, name: str, workload: Workload, step_seconds: float) -> None:
        """What was measured; of one tensor, for many are mostly overhead, too."""
        n, _ = self.known.get((name, workload.title), (self.SMALL, 0.0))
        if len(workload.shapes) == 1 and workload.n >= n:
            self.known[name, workload.title] = (workload.n, step_seconds)

    def foretold(self, name: str, workload: Workload) -> float | None:
        """Seconds of a step, in proportion to the largest size so far; None where nothing is known."""
        known = self.known.get((name, workload.title))
        return known and known[1] * workload.n / known[0]


def block(contestant: Contestant, buffers: Buffers, length: float) -> float:
    """Seconds a step: the median over the readings of one block."""
    step = contestant.step
    fades = contestant.uses_up_gradients
    if fades:
        buffers.reset_gradients()
    time.sleep(PAUSE)
    most = LONGEST_FADE // 3 if fades else 1 << 62
    n_warm = 0
    start = now = time.perf_counter()
    while (now - start < WARM_UP and n_warm < most) or n_warm < 1:
        step()
        n_warm += 1
        if not n_warm & (n_warm - 1):  # rarely: waiting for a GPU costs more than a step
            buffers.wait()
        now = time.perf_counter()
    buffers.wait()
    now = time.perf_counter()
    n_steps = max(1, round(READING * n_warm / (now - start)))
    if fades:
        buffers.reset_gradients()
        n_steps = min(n_steps, LONGEST_FADE // 10)
    readings = []
    taken = 0
    start = last = time.perf_counter()
    while last - start < length and taken < LONGEST_FADE if fades else last - start < length:
        for _ in range(n_steps):
            step()
        buffers.wait()
        now = time.perf_counter()
        readings.append((now - last) / n_steps)
        last = now
        taken += n_steps
    return statistics.median(readings)


def cpu_seconds_of_others() -> float:
    """Seconds that the processors have spent on other processes and other machines; 0 where Linux does not tell."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            fields = file.readline().split()[1:]
    except OSError:
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def available_memory() -> float:
    """Bytes that can still be had; infinite where Linux does not tell."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(1024.0 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float("inf")


def _failure(error: Exception) -> str:
    """Its first line, for the report."""
    text = str(error).strip().splitlines() or [""]
    return f"failed: {type(error).__name__}: {text[0][:200]}"


class Race:
    """One workload, its contestants and their rounds."""

    def __init__(self, workload: Workload, peers: Mapping[str, Peer], mode: Mode, pace: Pace) -> None:
        self.workload = workload
        self.peers = peers
        self.mode = mode
        self.pace = pace
        self.outcome = Outcome()

    def foretold_seconds(self) -> float:
        """How long the race will take, roughly."""
        n = self.workload.n
        own = n * self.workload.bytes_per_parameter / (1e12 if self._is_on_gpu else 20e9)
        total = 0.2 + n * (1e-10 if self._is_on_gpu else 8e-9)
        for name in [ours.NAME, ours.PROBE, *self._willing()]:
            step = self.pace.foretold(name, self.workload) or own * 1.5
            rounds = self._rounds_of(step)
            total += rounds * (PAUSE + max(WARM_UP, step) + max(self.mode.block, step)) + CHECKED_STEPS_LARGE * step
        return total

    def _rounds_of(self, step_seconds: float) -> int:
        return min(SLOW_ROUNDS, self.mode.rounds) if step_seconds > SLOW_STEP else self.mode.rounds

    def _willing(self) -> list[str]:
        """Peers that take part, as far as can be told before; reasons of those who would but cannot are noted."""
        willing = []
        for name, peer in self.peers.items():
            if peer.refuses(self.workload) is not None:
                continue
            step = self.pace.foretold(name, self.workload)
            if step is not None and step > self.mode.step_limit:
                limit = f"{self.mode.step_limit:g} s"
                self.outcome.left_out[name] = (
                    f"a step would take about {seconds(step)}, over this run's limit of {limit}"
                )
            else:
                willing.append(name)
        return willing

    def run(self) -> Outcome:
        """Measure; a contestant that fails or disagrees is left out with its reason."""
        willing = self._willing()
        need = self.workload.footprint * 2.5
        if need > 0.8 * self._available_memory():
            reason = f"needs {need / 2**30:.1f} GiB of memory"
            self.outcome.left_out |= dict.fromkeys([ours.NAME, ours.PROBE, *willing], reason)
            return self.outcome
        gc.collect()  # the arrays of the race before
        buffers = self._buffers()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                mine, moved = ours.prepare(self.workload, buffers)
            except (TypeError, ValueError) as error:
                if self.workload.section != "states":
                    raise
                self.outcome.left_out[ours.NAME] = _failure(error)  # an option that does not go with these arrays
                return self.outcome
            contestants = self._prepare(mine, moved, willing, buffers)
            buffers.reset()
            self._take_turns(contestants, buffers)
        return self.outcome

    @property
    def _is_on_gpu(self) -> bool:
        return self.workload.backend == "cuda"

    def _buffers(self) -> Buffers:
        if not self._is_on_gpu:
            return Buffers(self.workload)
        from bench import device

        return device.DeviceBuffers(self.workload)

    def _available_memory(self) -> float:
        if not self._is_on_gpu:
            return available_memory()
        from bench import device

        gc.collect()
        device.release()
        return device.available_memory()

    def _probe(self, buffers: Buffers) -> tuple[Contestant, float]:
        if not self._is_on_gpu:
            return probe.prepare(self.workload, buffers)
        from bench import device

        return device.probe(self.workload)

    # --- Before the start

    def _prepare(self, mine: Contestant, moved: float, willing: list[str], buffers: Buffers) -> dict[str, Contestant]:
        """Contestants whose results agree with those of fastopt, `mine`."""
        workload = self.workload
        expected = self._steps(mine, buffers)
        contestants = {ours.NAME: mine}
        self.outcome.measured[ours.NAME] = Measured([], ours.version(workload), moved)
        for name in willing:
            peer = self.peers[name]
            buffers.reset()
            try:
                peer.set_threads(workload.n_threads)
                contestant = peer.prepare(workload, buffers)
                ulp = largest_difference(expected, self._steps(contestant, buffers))
                contestant.adopt()
                version = peer.version()
            except Exception as error:  # a peer's failure is its own
                self.outcome.left_out[name] = _failure(error)
                continue
            if ulp > MOST_ULP:
                self.outcome.left_out[name] = f"disagrees: {ulp:.3g} ULP from fastopt, {MOST_ULP:g} allowed"
                continue
            contestants[name] = contestant
            self.outcome.measured[name] = Measured([], version, workload.bytes_per_parameter, ulp)
        beside = {"tail": ours.ALONE, "states": ours.FLOAT32}.get(workload.section)
        if beside is not None:
            contestants[beside] = ours.prepare_alone(workload, buffers)
            alone = bytes_moved(workload.function, workload.hypers)
            self.outcome.measured[beside] = Measured([], ours.version(workload), alone)
        buffers.reset()
        try:
            contestants[ours.PROBE], moved_by_probe = self._probe(buffers)
            self.outcome.measured[ours.PROBE] = Measured([], ours.version(workload), moved_by_probe)
        except Exception as error:  # no compiler: setuptools has an exception for every kind
            self.outcome.left_out[ours.PROBE] = _failure(error)
        return contestants

    def _steps(self, contestant: Contestant, buffers: Buffers) -> list:
        """A sample of the parameters after the checked steps."""
        for _ in range(CHECKED_STEPS if self.workload.n < LARGE else CHECKED_STEPS_LARGE):
            if contestant.uses_up_gradients:
                buffers.reset_gradients()
            contestant.step()
        return buffers.sample(contestant.params())

    # --- The rounds

    def _take_turns(self, contestants: dict[str, Contestant], buffers: Buffers) -> None:
        rounds: list[tuple[bool, dict[str, float]]] = []
        last: dict[str, float] = {}
        gc.collect()
        gc.disable()
        try:
            while self._goes_on(rounds):
                start, before = time.perf_counter(), cpu_seconds_of_others()
                taken = {}
                for name, contestant in contestants.items():
                    if last.get(name, 0.0) > SLOW_STEP and len(rounds) >= SLOW_ROUNDS:
                        continue
                    if self.workload.section == "hard":  # who flushes subnormals leaves the next one none
                        buffers.reset()
                    taken[name] = last[name] = block(contestant, buffers, self.mode.block)
                    if contestant.leaves_garbage:
                        buffers.reset()
                    elif contestant.uses_up_gradients:
                        buffers.reset_gradients()
                others = cpu_seconds_of_others() - before
                quiet = others < 0.02 + 0.05 * (time.perf_counter() - start)  # the kernel counts in steps of 0.01
                rounds.append((quiet, taken))
        finally:
            gc.enable()
        quiet_ones = [taken for quiet, taken in rounds if quiet]
        disturbed = 2 * len(quiet_ones) < self.mode.rounds
        chosen = [taken for _, taken in rounds] if disturbed else quiet_ones
        for name, measured in self.outcome.measured.items():
            measured.times = [taken[name] for taken in chosen if name in taken]
            if not measured.times:  # it sat out all quiet rounds
                measured.times = [taken[name] for _, taken in rounds if name in taken]
            measured.disturbed = disturbed
            self.pace.note(name, self.workload, min(measured.times))

    def _goes_on(self, rounds: list[tuple[bool, dict[str, float]]]) -> bool:
        """Until enough rounds were quiet; at most half as many again take the place of others."""
        quiet = sum(was_quiet for was_quiet, _ in rounds)
        return quiet < self.mode.rounds and len(rounds) < self.mode.rounds * 3 // 2
