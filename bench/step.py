"""The promises of fastopt on speed and memory, each measured beside torch's own optimizers in one run.

A script, no test: nothing in the test suite measures time. How to run and read it is in bench/README.md.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import inspect
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastopt
from fastopt._rule import registry

Step = Callable[[], None]


@dataclass(frozen=True)
class Promise:
    """A bound that a measurement must keep."""

    bound: float
    unit: str
    at_least: bool = False

    def kept(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.bound:g} {self.unit}"


def faster(times: float) -> Promise:
    return Promise(times, "x", at_least=True)


PROMISES = {
    "same": Promise(32, "ULP between fastopt and torch after 8 steps"),
    "tiny": Promise(1.5, "us"),
    "many": Promise(60, "us"),
    "fused 1e+03": faster(30),
    "fused 1e+05": faster(2.5),
    "fused 1e+07": faster(1),
    "fused 5e+07": faster(1),
    "unfused 1e+07": faster(4),
    "import": Promise(50, "ms"),
    "memory python": Promise(0.001, "B per parameter"),
    "memory malloc": Promise(0.001, "B per parameter"),
    "memory resident": Promise(0.1, "B per parameter"),
}
"""What fastopt promises; rows name those that they are held to. "same" leaves each side 2 ULP a step: it says that
both computed the same, not how well."""

FUSED = {"adam": {}, "adamw": {}, "sgd": {"momentum": 0.9}, "adagrad": {}}
"""Optimizers that are compared with torch's fused kernels, and their hyperparameters that are no defaults."""
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "rmsprop": [{}, {"centered": True}, {"momentum": 0.9}, {"centered": True, "momentum": 0.9}],
    "nadam": [{}, {"weight_decay": 0.01, "decoupled_weight_decay": True}],
    "radam": [{}, {"weight_decay": 0.01, "decoupled_weight_decay": True}],
}
"""Hyperparameters of the optimizers that torch does not fuse, where one set is not enough."""

LARGE = 10**7
"""Parameters from which a case is measured in several places: the speed of one optimizer differs by up to 10%
between allocations, with the physical pages that they get."""
CHECKED_STEPS = 8  # RAdam rectifies from the sixth on
NOISY = 0.15
"""Spread (interquartile range over median) above which a row, and share of the machine that others took
above which the run, comes with a warning."""


# --- Timing -----------------------------------------------------------------------------------------------
#
# fastopt and torch take turns in one process: block of ours, block of theirs, and so on. What a block is made
# of was measured on two cores (fastopt 0.1.0, torch 2.13.0, Adam of 1e5 and 1e6):
# - Both link libgomp under one name, so the process has one pool of threads, whichever package came first (the
#   header lists the OpenMP runtimes; were there two, the idle pool would spin on the other's cores for some
#   milliseconds after each of its regions). With one pool the pause between blocks makes no difference, from
#   none at all to 100 ms.
# - A change of sides is felt: the first step takes 1 ms where the others take 0.06, and caches hold the other's
#   arrays for a millisecond more. Hence the warm-up.
# - A thread that loses its core to another process keeps its team spinning for whole time slices: 8 ms a step
#   where 0.025 is normal, or 16 where 5 is, and with quartiles as close as on a quiet machine. So rounds in
#   which others took processor time are run again, and short sleeps give the scheduler a chance to put the team
#   back on cores of its own, without which it was seen to stay on one.

PAUSE = 0.004
WARM_UP = 0.005
BLOCK = 0.020
READING = 0.0005
"""Seconds: sleep before a block, its unmeasured steps, its measured steps, steps between readings of the clock."""


def block(step: Step) -> float:
    """Seconds a step: the median over the readings of one block."""
    time.sleep(PAUSE)
    n_warm = 0
    start = now = time.perf_counter()
    while now - start < WARM_UP or n_warm < 1:
        step()
        n_warm += 1
        now = time.perf_counter()
    n_steps = max(1, round(READING * n_warm / (now - start)))
    readings = []
    start = last = time.perf_counter()
    while last - start < BLOCK:
        for _ in range(n_steps):
            step()
        now = time.perf_counter()
        readings.append((now - last) / n_steps)
        last = now
    return statistics.median(readings)


def take_turns(steps: dict[str, Step], rounds: int) -> tuple[dict[str, list[float]], bool]:
    """Seconds a step of each of `steps` in each round, and whether other processes disturbed most of the rounds.

    At most as many rounds again take the place of disturbed ones, after waiting half a second a round at most
    for the others to finish.
    """
    quiet: list[dict[str, float]] = []
    disturbed: list[dict[str, float]] = []
    patience = 0.5 * rounds
    gc.collect()
    gc.disable()
    try:
        while len(quiet) < rounds and len(quiet) + len(disturbed) < 2 * rounds:
            start, before = time.perf_counter(), cpu_seconds_of_others()
            taken = {name: block(step) for name, step in steps.items()}
            end = time.perf_counter()
            if cpu_seconds_of_others() - before < 0.02 + 0.05 * (end - start):  # the kernel counts in steps of 0.01
                quiet.append(taken)
            else:
                disturbed.append(taken)
                wait_for_quiet(patience)
                patience -= time.perf_counter() - end
    finally:
        gc.enable()
    mostly_disturbed = 2 * len(quiet) < rounds
    chosen = quiet + disturbed if mostly_disturbed else quiet
    return {name: [taken[name] for taken in chosen] for name in steps}, mostly_disturbed


def wait_for_quiet(limit: float) -> None:
    """Sleep until no other process runs, for `limit` seconds at most."""
    end = time.perf_counter() + limit
    while time.perf_counter() < end:
        before = cpu_seconds_of_others()
        time.sleep(0.2)
        if cpu_seconds_of_others() - before < 0.02:
            break


@dataclass(frozen=True)
class Sample:
    """Median and quartiles of one number over the rounds."""

    q1: float
    median: float
    q3: float

    @classmethod
    def of(cls, values: list[float], scale: float = 1.0) -> Sample:
        return cls(*(float(q) * scale for q in np.percentile(values, (25, 50, 75))))

    @property
    def spread(self) -> float:
        return (self.q3 - self.q1) / abs(self.median) if self.median else 0.0

    def __str__(self) -> str:
        return "{} ({}..{})".format(*map(short, (self.median, self.q1, self.q3)))


def short(value: float) -> str:
    """Three digits, none after the point from 100 on."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


# --- The two sides ----------------------------------------------------------------------------------------


def aligned(n: int) -> np.ndarray:
    """`n` float32 on a cache line, touched. NumPy asks for huge pages from 4 MiB on: both sides get the same."""
    raw = np.zeros(4 * n + 64, np.uint8)
    start = -raw.ctypes.data % 64
    array = raw[start : start + 4 * n].view(np.float32)
    array.fill(0)
    return array


@functools.cache
def pattern() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    return rng.uniform(1, 2, 1 << 16).astype(np.float32), rng.standard_normal(1 << 16, np.float32)


def parameters_and_gradients(shapes: list[int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Arrays of their own for every tensor: parameters in [1, 2), normal gradients, the same at each call."""
    made: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for arrays, values in zip(made, pattern(), strict=True):
        for n in shapes:
            arrays.append(aligned(n))
            for start in range(0, n, values.size):
                arrays[-1][start : start + values.size] = values[: n - start]
    return made


@dataclass
class Side:
    """One library's optimizer over arrays of its own."""

    step: Step
    arrays: list[np.ndarray]


def ours(function: str, shapes: list[int], form: str, hypers: dict[str, Any]) -> Side:
    """fastopt's optimizer over one "array", a "list" of arrays, or a "FlatBuffer"."""
    params, grads = parameters_and_gradients(shapes)
    p: Any = params
    g: Any = grads
    if form == "array":
        (p,), (g,) = params, grads
    elif form == "FlatBuffer":
        p, g = (fastopt.FlatBuffer({f"t{k}": a for k, a in enumerate(arrays)}) for arrays in (params, grads))
        params = list(p.values())
    optimizer = registry[function].cls(p, **hypers)
    return Side(lambda: optimizer.step(g), params)


def torchs(function: str, shapes: list[int], kind: str, hypers: dict[str, Any]) -> Side:
    """torch's optimizer of the same name, "fused", "foreach" or the plain "loop"."""
    params, grads = parameters_and_gradients(shapes)
    tensors = [torch.from_numpy(p).requires_grad_() for p in params]
    for tensor, g in zip(tensors, grads, strict=True):
        tensor.grad = torch.from_numpy(g)
    chosen = {"foreach": False} if kind == "loop" else {kind: True}
    return Side(getattr(torch.optim, registry[function].cls.__name__)(tensors, **chosen, **hypers).step, params)


def is_in_torch(function: str, fused: bool) -> bool:
    """Whether torch has the optimizer, and has or has not a fused kernel for it."""
    cls = getattr(torch.optim, registry[function].cls.__name__, None)
    return cls is not None and ("fused" in inspect.signature(cls).parameters) == fused


def add_probe(nbytes: int) -> Step:
    """torch's ``a.add_(b)`` over `nbytes` of memory in all: reads a and b and writes a, 12 bytes for 8.

    A stand-in for the memory roof of a rule with the same footprint, nothing more: the bytes are moved by
    torch's own loop, with the same number of threads.
    """
    a, b = (torch.from_numpy(aligned(max(nbytes // 8, 1))) for _ in range(2))
    return lambda: a.add_(b)


# --- Rows -------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One measurement: ours, the fastest peer, and the promises with the values that are held to them."""

    section: str
    what: str
    ours_us: Sample | None = None
    peer: str = ""
    peer_us: Sample | None = None
    ratio: Sample | None = None
    ns_per_parameter: float | None = None
    gb_per_s: float | None = None
    probe_gb_per_s: float | None = None
    note: str = ""
    disturbed: bool = False
    held_to: dict[str, float] = field(default_factory=dict)

    @property
    def noisy(self) -> bool:
        return self.disturbed or any(
            sample is not None and sample.spread > NOISY for sample in (self.ours_us, self.peer_us)
        )

    def short_of(self) -> list[str]:
        """The promises that this row does not keep, each with by how much."""
        lines = []
        for name, value in self.held_to.items():
            promise = PROMISES[name]
            if not promise.kept(value):
                off = f", {abs(value / promise.bound - 1):.1%} off" if value == value and promise.bound else ""
                lines.append(f"{self.section}, {self.what}: {value:.4g}, promised {promise}{off}")
        return lines


@dataclass(frozen=True)
class Case:
    """One optimizer over tensors of some shapes, against torch's of the given kinds."""

    section: str
    promise: str
    detail: str
    function: str
    hypers: dict[str, Any]
    shapes: list[int]
    form: str = "array"
    kinds: tuple[str, ...] = ("fused",)

    @property
    def what(self) -> str:
        return f"{name_of(self.function, self.hypers)}, {self.detail}"

    @property
    def n(self) -> int:
        return sum(self.shapes)

    @property
    def n_states(self) -> int:
        spec = registry[self.function]
        defaults = {name: hyper.default for name, hyper in spec.hypers.items()}
        return len(spec.states_for(spec.flags(defaults | self.hypers)))


@dataclass
class Taken:
    """What the rounds of a case gave: seconds a step, the largest difference in ULP."""

    peer: str
    times: dict[str, list[float]]
    ulp: float
    disturbed: bool


def take(case: Case, rounds: int) -> Taken:
    """Make both sides anew, check that they compute the same, and let ours and torch's fastest take turns."""
    mine = ours(case.function, case.shapes, case.form, case.hypers)
    peers = {kind: torchs(case.function, case.shapes, kind, case.hypers) for kind in case.kinds}
    for _ in range(CHECKED_STEPS):
        mine.step()
    first = {kind: [seconds(side.step) for _ in range(CHECKED_STEPS)] for kind, side in peers.items()}
    ulp = max(largest_difference(mine.arrays, side.arrays) for side in peers.values())
    peer = min(first, key=lambda kind: statistics.median(first[kind]))
    steps = {"fastopt": mine.step, "torch": peers[peer].step}
    if case.n >= 100_000:
        steps["probe"] = add_probe(4 * (2 + case.n_states) * case.n)
    times, disturbed = take_turns(steps, rounds)
    return Taken(peer, times, ulp, disturbed)


def compare(case: Case, rounds: int) -> Row:
    """Measure a case; where buffers are large, in three places in memory."""
    places = min(3, rounds // 3) if case.n >= LARGE else 1
    taken = []
    for _ in range(places):
        taken.append(take(case, -(-rounds // places)))
        case = replace(case, kinds=(taken[0].peer,))
    times = {name: [t for one in taken for t in one.times[name]] for name in taken[0].times}
    row = Row(case.section, case.what, Sample.of(times["fastopt"], 1e6), taken[0].peer, Sample.of(times["torch"], 1e6))
    row.disturbed = any(one.disturbed for one in taken)
    row.ratio = Sample.of([b / a for a, b in zip(times["fastopt"], times["torch"], strict=True)])
    a_step = statistics.median(times["fastopt"])
    row.ns_per_parameter = a_step / case.n * 1e9
    if "probe" in times:
        row.gb_per_s = 4 * (2 * (1 + case.n_states) + 1) * case.n / a_step / 1e9  # reads p, g, states; writes p, states
        row.probe_gb_per_s = 6 * (2 + case.n_states) * case.n / statistics.median(times["probe"]) / 1e9
    value = row.ratio.median if PROMISES[case.promise].at_least else row.ours_us.median
    row.held_to = {"same": max(one.ulp for one in taken), case.promise: value}
    return row


def seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def largest_difference(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    """The largest difference in ULP of float32, over at most some 100,000 elements of a tensor.

    Parameters that came near 0 count as if still at 1, where they started and had their rounding errors.
    """
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        every = max(1, a.size // 100_000)
        x, y = a[::every].astype(np.float64), b[::every].astype(np.float64)
        ulp = np.spacing(np.maximum(1, np.maximum(np.abs(x), np.abs(y))).astype(np.float32))
        worst = max(worst, float(np.max(np.abs(x - y) / ulp)))
    return worst


def name_of(function: str, hypers: dict[str, Any]) -> str:
    words = [name if value is True else f"{name} {value:g}" for name, value in hypers.items()]
    return ", ".join([registry[function].cls.__name__, *words])


# --- Sections ---------------------------------------------------------------------------------------------


def tiny(quick: bool) -> Iterator[Row]:
    """One step of 16 parameters."""
    for function in ("adam", "adamw", "sgd"):
        for form, detail in (("array", "one array"), ("list", "list of one")):
            yield compare(Case("tiny", "tiny", detail, function, FUSED[function], [16], form), 5 if quick else 15)


def many(quick: bool) -> Iterator[Row]:
    """1,000 tensors of 64."""
    for form in ("list", "FlatBuffer"):
        case = Case("many", "many", form, "adam", {}, [64] * 1000, form, ("fused", "foreach"))
        yield compare(case, 5 if quick else 15)


def fused(quick: bool) -> Iterator[Row]:
    """Against torch's fused kernels."""
    for n in (10**3, 10**5, 10**7) if quick else (10**3, 10**5, 10**7, 5 * 10**7):
        for function, hypers in FUSED.items():
            yield compare(Case("fused", f"fused {n:.0e}", f"{n:.0e}", function, hypers, [n]), 6 if quick else 21)


def unfused(quick: bool) -> Iterator[Row]:
    """Every optimizer that torch has and does not fuse, against its faster way."""
    n = 10**7
    for function in registry:
        if is_in_torch(function, fused=False):
            for hypers in VARIANTS.get(function, [{}]):
                case = Case("unfused", f"unfused {n:.0e}", f"{n:.0e}", function, hypers, [n], kinds=("foreach", "loop"))
                yield compare(case, 3 if quick else 9)


def imports(quick: bool) -> Iterator[Row]:
    """Whole processes that import NumPy alone, with fastopt, and with torch; bytecode cached, as installed."""
    texts = {"numpy": "import numpy", "fastopt": "import numpy, fastopt", "torch": "import numpy, torch"}
    times: dict[str, list[float]] = {name: [] for name in texts}
    with tempfile.TemporaryDirectory() as cache:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        environment["PYTHONPYCACHEPREFIX"] = cache
        for k in range(-1, 5 if quick else 21):
            for name, text in texts.items():
                if name == "torch" and k > (0 if quick else 4):
                    continue
                start = time.perf_counter()
                subprocess.run([sys.executable, "-c", text], env=environment, check=True)
                if k >= 0:
                    times[name].append(time.perf_counter() - start)
    added = Sample.of([b - a for a, b in zip(times["numpy"], times["fastopt"], strict=True)], 1e3)
    row = Row("import", "import fastopt, after NumPy", held_to={"import": added.median})
    base, torch_ms = (1e3 * statistics.median(times[name]) for name in ("numpy", "torch"))
    row.note = f"adds {added} ms to {base:.0f} ms; torch adds {torch_ms - base:.0f} ms"
    yield row


def memory(quick: bool) -> Iterator[Row]:
    """What steps allocate: the peak during steps at two sizes, and how it grows between them."""
    sizes = (10**6, 10**7)
    for function in ("adam", "sgd", "rmsprop") if quick else registry:
        hypers = FUSED.get(function, {})
        mine = [allocated(ours(function, [n], "array", hypers).step) for n in sizes]
        row = Row("memory", f"{name_of(function, hypers)}, {sizes[0]:.0e} to {sizes[1]:.0e}")
        growth = {
            kind: (mine[1][kind] - mine[0][kind]) / (sizes[1] - sizes[0])
            for kind in mine[0]
            if mine[0][kind] is not None
        }
        row.held_to = {f"memory {kind}": value for kind, value in growth.items()}
        peaks = [f"{kind} {a[0]} and {a[1]}" for kind in growth for a in [[human(m[kind]) for m in mine]]]
        row.note = "peaks: " + ", ".join(peaks)
        for kind in ("fused", "loop"):
            if "resident" in growth and is_in_torch(function, fused=kind == "fused"):
                theirs = allocated(torchs(function, [sizes[1]], kind, hypers).step)["resident"]
                row.note += f"; torch {kind} resident {human(theirs)}"
        yield row


SECTIONS = {"tiny": tiny, "many": many, "fused": fused, "unfused": unfused, "import": imports, "memory": memory}


# --- Memory -----------------------------------------------------------------------------------------------


def allocated(step: Step) -> dict[str, float | None]:
    """Bytes beyond those before that steps took: Python's peak, the process's peak, malloc's in use after.

    None for what this system does not tell (the last two need Linux and glibc). The process's peak is exact
    to some 256 KiB: the kernel counts pages in batches.
    """
    tracemalloc.start()
    for _ in range(3):
        step()
    gc.collect()
    in_use, resident = malloc_in_use(), resident_now(reset_peak=True)
    tracemalloc.reset_peak()
    python = tracemalloc.get_traced_memory()[0]
    for _ in range(3):
        step()
    python = tracemalloc.get_traced_memory()[1] - python
    tracemalloc.stop()
    return {
        "python": python,
        "malloc": None if in_use is None else (malloc_in_use() or 0) - in_use,
        "resident": None if resident is None else (resident_now(reset_peak=False) or 0) - resident,
    }


def resident_now(reset_peak: bool) -> int | None:
    """Resident bytes of this process after setting the peak back to it, or else the peak since then."""
    try:
        if reset_peak:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(rf"{'VmRSS' if reset_peak else 'VmHWM'}:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else None


class _MallInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "k")
    ]


def malloc_in_use() -> int | None:
    """Bytes that malloc has handed out, mapped blocks included."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        return None
    mallinfo2.restype = _MallInfo
    now = mallinfo2()
    return now.uordblks + now.hblkhd


def human(nbytes: float) -> str:
    for size, unit in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if abs(nbytes) >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes:.0f} B"


# --- The machine ------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    model = openmp = ""
    try:
        found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
        model = found[1] if found else ""
        maps = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "omp" in line}
        openmp = ", ".join(sorted(path for path in maps if re.search(r"lib[gi]?omp[^/]*$", path)))
    except OSError:  # not Linux
        pass
    return {
        "processor": model or platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": fastopt.get_num_threads(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "fastopt": fastopt.info(),
        "openmp": openmp,
    }


def cpu_seconds_of_others() -> float:
    """Seconds that the processors have spent on other processes and other machines; 0 where Linux does not tell."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


# --- Report -----------------------------------------------------------------------------------------------

COLUMNS = "{:<56}{:>23}{:>24} {:<8}{:>20}{:>8}{:>7}{:>7}  {}"
HEADER = ("", "fastopt us", "torch us", "", "ratio", "ns/par", "GB/s", "probe", "promise")


def line(row: Row) -> str:
    """One line of the table."""
    verdicts = [
        f"{PROMISES[name]}{'' if PROMISES[name].kept(value) else ' FELL SHORT'}"
        for name, value in row.held_to.items()
        if name != "same" or not PROMISES[name].kept(value)
    ]
    tail = ", ".join(verdicts) + (" (disturbed)" if row.disturbed else " (noisy)" if row.noisy else "")
    if row.ours_us is None or row.peer_us is None or row.ratio is None:
        return f"{row.what:<56}{row.note}\n{'':<56}{tail}"
    numbers = (row.ns_per_parameter, row.gb_per_s, row.probe_gb_per_s)
    texts = ["" if x is None else short(x) for x in numbers]
    return COLUMNS.format(row.what, *map(str, (row.ours_us, row.peer_us, row.peer, row.ratio)), *texts, tail)


def report(rows: list[Row], others: float) -> list[str]:
    """Print warnings and what fell short; return the latter."""
    noisy = [f"{row.section}, {row.what}" for row in rows if row.noisy]
    if noisy:
        print(
            f"\nwarning: rounds spread by more than {NOISY:.0%} or were disturbed in {len(noisy)} rows: "
            + "; ".join(noisy)
        )
    if others > NOISY:
        print(f"\nwarning: other processes took {others:.0%} of one processor; figures of a busy machine say little")
    fell_short = [text for row in rows for text in row.short_of()]
    n_held = sum(len(row.held_to) for row in rows)
    n_kept = n_held - len(fell_short)
    print(f"\n{n_kept} of {n_held} measurements keep their promise" + ("; fell short:" if fell_short else "."))
    for text in fell_short:
        print(f"  {text}")
    return fell_short


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds and sizes, under a minute")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    arguments = parser.parse_args()
    torch.set_num_threads(fastopt.get_num_threads())
    about = machine()
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    rows: list[Row] = []
    started, others_before = time.perf_counter(), cpu_seconds_of_others()
    for name in arguments.only:
        print(f"\n{name}: {SECTIONS[name].__doc__}", flush=True)
        if name not in ("import", "memory"):
            print(COLUMNS.format(*HEADER))
        for row in SECTIONS[name](arguments.quick):
            rows.append(row)
            print(line(row), flush=True)
    elapsed = time.perf_counter() - started
    others = (cpu_seconds_of_others() - others_before) / elapsed
    fell_short = report(rows, others)
    print(f"\n{elapsed:.0f} s; other processes took {others:.0%} of one processor")
    if arguments.json:
        result = {"machine": about, "rows": [asdict(row) for row in rows], "fell_short": fell_short, "others": others}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if fell_short else 0


if __name__ == "__main__":
    sys.exit(main())
