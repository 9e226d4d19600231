"""What fastopt promises on speed and memory, and what a run says of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bench.ours import FLOAT32
from bench.results import LARGE_ON_GPU, Cell, Results
from bench.samples import short
from bench.workloads import LARGEST

TORCH_FUSED = "torch-fused"
TORCH_UNFUSED = ("torch-foreach", "torch-loop")
FUSED = {"Adam", "AdamW", "SGD, momentum 0.9", "Adagrad"}
FILE = "bench/promises.py"
"""Whose text it is that a run is held to."""
FASTER_THAN_FUSED = {"1e3": 30.0, "1e5": 2.5, "1e7": 1.0}
"""Parameters -> how many times faster than torch's fused step, at least."""
FASTER_THAN_FUSED_LARGE = 1.0
"""The same from `LARGEST` parameters on."""
FASTER_THAN_UNFUSED = 4.0
"""The same for optimizers that torch does not fuse, at 1e7, against the faster of its ways."""
TAIL = {"GPT-2 small": 1.8, "ResNet-50": 1.8, "small MLP": 4.0, "1,000 x 64": 60.0}
"""Model -> how many times faster than torch's separate calls, at least."""
STATES = {"state_dtype bfloat16": 1.25, "state_dtype 8bit": 1.3}
"""Adam's states in low precision from `LARGEST` parameters on -> how many times faster than in float32, at least."""
STATES_ANYWHERE = 0.8
"""The same at any other size."""
TINY_US = 1.5
MANY_US = 60.0
IMPORT_MS = 50.0
MEMORY = {"python": 0.001, "malloc": 0.001, "resident": 0.1}
"""Bytes a parameter that a step allocates, at most."""
ULP = 32.0


@dataclass(frozen=True)
class Verdict:
    """One promise and what was measured."""

    what: str
    value: float
    bound: float
    unit: str
    at_least: bool = False

    @property
    def kept(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        return f"{self.what}: {short(self.value)} {self.unit}, {FILE} promises {sign} {self.bound:g}"


def verdicts(results: Results) -> list[Verdict]:
    """Every promise that the run has a measurement for."""
    found: list[Verdict] = []
    for cell in results.cells:
        found += _of(cell)
    return found


GPU_SHARE = 0.92
"""Of the device's copy bandwidth, from 1e8 parameters on, for every rule."""
GPU_FUSED = {"Adam", "AdamW", "SGD, momentum 0.9"}
GPU_FASTER_THAN_FUSED = 1.0
"""Times faster than torch's fused step, at every size."""
GPU_FASTER_THAN_UNFUSED = 3.0
"""Than torch's fastest, from 1e8 on, for optimizers that it does not fuse."""
GPU_TORCH = ("torch-fused", "torch-foreach", "torch-compile")


def _on_gpu(cell: Cell) -> Iterator[Verdict]:
    info = cell.info
    title, label, share = info["title"], info["label"], cell.share_of_probe
    what = f"{title}, {label}"
    if info["section"] != "curves":
        return
    if info["parameters"] >= LARGE_ON_GPU and share is not None:
        yield Verdict(what, share.median, GPU_SHARE, "of the copy's bandwidth", True)
    if title in GPU_FUSED and TORCH_FUSED in cell.entries:
        yield Verdict(what, cell.times_faster(TORCH_FUSED).median, GPU_FASTER_THAN_FUSED, "x torch fused", True)
    others = [name for name in GPU_TORCH if name in cell.entries]
    if info["parameters"] >= LARGE_ON_GPU and others and TORCH_FUSED not in others:
        value = min(cell.times_faster(name).median for name in others)
        yield Verdict(what, value, GPU_FASTER_THAN_UNFUSED, "x torch's fastest", True)
    ulps = [cell.entries[name].info["ulp"] for name in others]
    if ulps:
        yield Verdict(f"{what}, difference from torch", max(ulps), ULP, "ULP")


def _of(cell: Cell) -> Iterator[Verdict]:
    info = cell.info
    if info.get("backend") == "cuda":
        yield from _on_gpu(cell)
        return
    section, title, label = info["section"], info["title"], info["label"]
    what = f"{title}, {label}"
    microseconds = cell.ours.sample.median * 1e6
    if section == "curves":
        if label == "16" and title in FUSED:
            yield Verdict(what, microseconds, TINY_US, "us")
        is_large = info["parameters"] >= LARGEST
        if title in FUSED and (is_large or label in FASTER_THAN_FUSED) and TORCH_FUSED in cell.entries:
            bound = FASTER_THAN_FUSED.get(label, FASTER_THAN_FUSED_LARGE)
            yield Verdict(what, cell.times_faster(TORCH_FUSED).median, bound, "x torch fused", True)
        unfused = [name for name in TORCH_UNFUSED if name in cell.entries]
        if label == "1e7" and unfused and title not in FUSED and TORCH_FUSED not in cell.entries:
            value = min(cell.times_faster(name).median for name in unfused)
            yield Verdict(what, value, FASTER_THAN_UNFUSED, "x torch's fastest", True)
        ulps = [cell.entries[name].info["ulp"] for name in (TORCH_FUSED, *unfused) if name in cell.entries]
        if ulps:
            yield Verdict(f"{what}, difference from torch", max(ulps), ULP, "ULP")
    if section == "models" and label.startswith("1,000 x 64"):
        yield Verdict(what, microseconds, MANY_US, "us")
    if section == "tail" and label in TAIL and TORCH_FUSED in cell.entries:
        value = cell.times_faster(TORCH_FUSED).median
        yield Verdict(f"whole tail, {label}", value, TAIL[label], "x torch's calls", True)
    if section == "states" and title == "Adam" and label.startswith("state_dtype") and FLOAT32 in cell.entries:
        large = STATES.get(label.partition(", ")[0], STATES_ANYWHERE)
        bound = large if info["parameters"] >= LARGEST else STATES_ANYWHERE
        yield Verdict(what, cell.times_faster(FLOAT32).median, bound, "x float32 states", True)
    if section == "cold" and title == "import":
        yield Verdict("import fastopt after NumPy", microseconds / 1e3, IMPORT_MS, "ms")
    if section == "memory":
        for kind, bound in MEMORY.items():
            if kind in info["growth"]:
                yield Verdict(f"{title}, memory of a step ({kind})", info["growth"][kind], bound, "B per parameter")
