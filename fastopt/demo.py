"""The demo: every optimizer trains a small network on real data, once with each backend; a table, a picture.

No optimizer's math and no command line: those are in `fastopt.optimizers` and `fastopt.__main__`.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

import fastopt
from fastopt import lr_scheduler
from fastopt.rules import Spec, registry

PACKAGES = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}
"""What only the demo needs: name of the module -> name of the package."""

LAYERS = (64, 100, 100, 10)
"""Pixels, two hidden layers, digits."""
BATCH = 32
EPOCHS = 10
BACKENDS = ("reference", "cpu")
CURVES = "loss-curves.png"

SETTINGS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.1},
    "momentum": {"lr": 0.01},
    "nesterov": {"lr": 0.01},
    # Averages from the third epoch on, which is what it is for: until then it is SGD.
    "asgd": {"lr": 0.1, "t0": 100},
    "rmsprop": {"lr": 1e-3},
    # A step of lr * trust_coefficient relative to the size of each array.
    "lars": {"lr": 0.5},
    "lion": {"lr": 3e-4},
    # Made for full batches: on mini-batches signs flip all the time, so its step sizes need tighter bounds.
    "rprop": {"lr": 1e-3, "step_sizes": (1e-4, 1e-2)},
}
"""Hyperparameters where the defaults learn badly here. An optimizer that is not named runs with its own."""

SCHEDULES: dict[str, Callable[[fastopt.Optimizer, int], lr_scheduler.LRScheduler]] = {
    "step": lambda opt, n: lr_scheduler.StepLR(opt, step_size=-(-n // 3), gamma=0.3),
    "exponential": lambda opt, n: lr_scheduler.ExponentialLR(opt, gamma=0.05 ** (1 / n)),
    "linear": lambda opt, n: lr_scheduler.LinearLR(opt, start_factor=1.0, end_factor=0.0, total_iters=n),
    "polynomial": lambda opt, n: lr_scheduler.PolynomialLR(opt, total_iters=n, power=2.0),
    "cosine": lambda opt, n: lr_scheduler.CosineAnnealingLR(opt, T_max=n),
    "restarts": lambda opt, n: lr_scheduler.CosineAnnealingWarmRestarts(opt, T_0=-(-n // 7), T_mult=2),
    "cyclic": lambda opt, n: lr_scheduler.CyclicLR(
        opt, 0.1 * opt.defaults["lr"], opt.defaults["lr"], step_size_up=n / 4, cycle_momentum=False
    ),
    "onecycle": lambda opt, n: lr_scheduler.OneCycleLR(opt, opt.defaults["lr"], total_steps=n, cycle_momentum=False),
    "plateau": lambda opt, _: lr_scheduler.ReduceLROnPlateau(opt, factor=0.3, patience=1),
    "warmup": lambda opt, n: lr_scheduler.WarmupLR(lr_scheduler.CosineAnnealingLR(opt, n - n // 10), n // 10),
    "noam": lambda opt, n: lr_scheduler.InverseSquareRootLR(opt, warmup_steps=-(-n // 10)),
    "wsd": lambda opt, n: lr_scheduler.WarmupStableDecayLR(opt, n // 10, n - n // 10 - -(-n // 5), -(-n // 5)),
}
"""Schedules by their names on the command line, for `n` steps.

"plateau" steps once an epoch, the others every batch.
"""

TOLERANCE = 0.1
"""Largest relative difference of the backends' final training losses that counts as agreement.

Kernels and reference round in a different order, so a step differs in last bits (for SGD, Momentum, Lion and
Rprop it does not, subnormal gradients aside). Training multiplies that: sooner or later such a bit switches
a ReLU on or off for one sample, and from there the two runs part; with tanh in its place they stay within 5e-5
for 20 epochs. Measured relative differences, 24 seeds of 14 optimizers: after one epoch at most 3e-4; after ten,
half below 4e-8, 99% below 5e-3, all below 1.3e-2. Nudging a single initial weight by one bit does as much with
one backend alone: up to 1.3e-2. Longer trainings part further, 5e-2 was seen after 50 epochs. What does fail is a
wrong update: a momentum of 0.8 for 0.9 is 24% to 41%. Equality to the bit is for the tests.
"""


# --- Data -------------------------------------------------------------------------------------------------


class Digits(NamedTuple):
    """Images, float32 in [0, 1] of shape (n, 64), and labels, integers of shape (n,)."""

    images: np.ndarray
    labels: np.ndarray


def load_digits() -> tuple[Digits, Digits]:
    """scikit-learn's handwritten digits, 8 x 8 pixels: 1437 for training, 360 for validation."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]

    pixels, labels = load_digits(return_X_y=True)
    images = (pixels / 16).astype(np.float32)
    parts = train_test_split(images, labels, test_size=360, stratify=labels, random_state=0)
    train_images, valid_images, train_labels, valid_labels = parts
    return Digits(train_images, train_labels), Digits(valid_images, valid_labels)


# --- The network: dtypes follow the parameters and the images -----------------------------------------------


def initial_parameters(seed: int, layers: Sequence[int] = LAYERS) -> fastopt.FlatBuffer:
    """Weights ``w1, w2, ...`` after He et al., normal with variance 2 / (inputs), and zero biases ``b1, ...``."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, int | tuple[int, ...]] = {}
    for k in range(1, len(layers)):
        shapes |= {f"w{k}": (layers[k - 1], layers[k]), f"b{k}": layers[k]}
    params = fastopt.FlatBuffer(shapes)
    for k in range(1, len(layers)):
        weights = params[f"w{k}"]
        weights[:] = rng.normal(0, math.sqrt(2 / layers[k - 1]), weights.shape)
    return params


def forward(params: Mapping[str, np.ndarray], images: np.ndarray) -> list[np.ndarray]:
    """The images, the output of each hidden layer after its ReLU, and the logits."""
    last = len(params) // 2
    outputs = [images]
    for k in range(1, last + 1):
        z = outputs[-1] @ params[f"w{k}"] + params[f"b{k}"]
        outputs.append(z if k == last else np.maximum(z, 0))
    return outputs


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probability of each class."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean of -log(probability of the label)."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_sums = np.log(np.exp(shifted).sum(axis=1))
    return float(np.mean(log_sums - shifted[np.arange(len(labels)), labels]))


def backward(
    params: Mapping[str, np.ndarray], outputs: Sequence[np.ndarray], labels: np.ndarray, grads: Mapping[str, np.ndarray]
) -> None:
    """Write the gradient of the cross-entropy into `grads`; `outputs` are those of `forward`."""
    delta = softmax(outputs[-1])
    delta[np.arange(len(labels)), labels] -= 1
    delta /= len(labels)
    for k in range(len(outputs) - 1, 0, -1):
        inputs = outputs[k - 1]
        np.matmul(inputs.T, delta, out=grads[f"w{k}"])
        np.sum(delta, axis=0, out=grads[f"b{k}"])
        if k > 1:
            delta = (delta @ params[f"w{k}"].T) * (inputs > 0)


def evaluate(params: Mapping[str, np.ndarray], digits: Digits) -> tuple[float, float]:
    """Loss, summed in float64, and the share of digits that are recognised."""
    logits = forward(params, digits.images)[-1]
    recognised = logits.argmax(axis=1) == digits.labels
    return cross_entropy(logits.astype(np.float64), digits.labels), float(recognised.mean())


# --- Training ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """What came out of one training."""

    losses: list[float]
    """On the full training set: before the first epoch and after each."""
    accuracy: float
    """On the validation set, after the last epoch."""
    step_us: float
    """Median time of ``opt.step(grads)`` in microseconds."""
    kept: int = -1
    """Where in `losses` that of the parameters is with which it ended; early stopping brings the best ones back."""

    @property
    def loss(self) -> float:
        """On the training set, of the parameters with which it ended."""
        return self.losses[self.kept]


def train(
    spec: Spec,
    backend: str,
    training: Digits,
    validation: Digits,
    epochs: int,
    seed: int,
    state_dtype: Literal["float32", "bfloat16", "8bit"] = "float32",
    schedule: str | None = None,
    patience: int | None = None,
) -> Training:
    """Train the network with one optimizer. The seed fixes initial weights and batches for all of them.

    An optimizer that averages the parameters is judged by its averages. With a `patience` the best epoch by the loss on
    the validation set is kept, and training ends after so many epochs without a better one.
    """
    params = initial_parameters(seed)
    grads = params.zeros_like()
    opt = spec.cls(params, backend=backend, state_dtype=state_dtype, **SETTINGS.get(spec.function, {}))
    rng = np.random.default_rng(seed)
    n = len(training.labels)
    losses = [evaluate(params, training)[0]]
    averages = next((state for state, kind in spec.kinds.items() if kind == "weights"), None)
    judged: Mapping[str, np.ndarray] = params
    nanoseconds = []
    scheduler = None if schedule is None else SCHEDULES[schedule](opt, epochs * (n // BATCH))
    stopping = None if patience is None else fastopt.EarlyStopping(patience)
    for _ in range(epochs):
        for batch in np.array_split(rng.permutation(n), n // BATCH):
            labels = training.labels[batch]
            backward(params, forward(params, training.images[batch]), labels, grads)
            start = time.perf_counter_ns()
            opt.step(grads)
            nanoseconds.append(time.perf_counter_ns() - start)
            if scheduler is not None and not isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                scheduler.step()
        if averages is not None:
            judged = {name: state[averages] for name, state in opt.state_float32.items()}
        losses.append(evaluate(judged, training)[0])
        watched = evaluate(judged, validation)[0]
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(watched)
        if stopping is not None and stopping.step(watched, judged):
            break
    kept = epochs
    if stopping is not None:
        stopping.restore(judged)
        kept = 1 + (stopping.best_step or 0)
    return Training(losses, evaluate(judged, validation)[1], statistics.median(nanoseconds) / 1e3, kept)


class Comparison(NamedTuple):
    """The trainings of one optimizer with both backends."""

    name: str
    reference: Training
    cpu: Training

    @property
    def difference(self) -> float:
        """Relative difference of the training losses after the last epoch that both came to."""
        last = min(len(self.reference.losses), len(self.cpu.losses)) - 1
        a, b = self.reference.losses[last], self.cpu.losses[last]
        return 0.0 if a == b else abs(a - b) / max(a, b)

    @property
    def agrees(self) -> bool:
        """False also if a loss is NaN."""
        return self.difference <= TOLERANCE


def compare(
    names: Sequence[str], epochs: int, seed: int, schedule: str | None = None, patience: int | None = None
) -> list[Comparison]:
    """Train with every optimizer in `names` and both backends, under a progress bar."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    training, validation = load_digits()
    comparisons = []
    with tqdm(total=len(names) * len(BACKENDS), unit="training", leave=False) as bar:
        for name in names:
            spec = registry[name]
            trainings = {}
            for backend in BACKENDS:
                bar.set_description(f"{spec.name}, {backend}")
                trainings[backend] = train(
                    spec, backend, training, validation, epochs, seed, schedule=schedule, patience=patience
                )
                bar.update()
            comparisons.append(Comparison(spec.name, **trainings))
    return comparisons


# --- What is shown ----------------------------------------------------------------------------------------


def table(comparisons: Sequence[Comparison]) -> str:
    """One line for each optimizer, numbers to the right."""
    rows = [("optimizer", "loss", "reference", "apart", "accuracy", "us", "reference", "ratio")]
    for comparison in comparisons:
        cpu, reference = comparison.cpu, comparison.reference
        losses = (f"{cpu.loss:.6f}", f"{reference.loss:.6f}", f"{comparison.difference:.1e}")
        times = (f"{cpu.step_us:.1f}", f"{reference.step_us:.1f}", f"{reference.step_us / cpu.step_us:.1f}")
        rows.append((comparison.name, *losses, f"{cpu.accuracy:.3f}", *times))
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *numbers in rows:
        cells = [name.ljust(first), *(number.rjust(width) for number, width in zip(numbers, others, strict=True))]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def draw(comparisons: Sequence[Comparison], path: Path) -> None:
    """Write the loss curves as a PNG: a panel for each optimizer, with those of the others behind, in grey.

    The curve is the backend "cpu"'s, the dots are the "reference"'s. Curves that nearly coincide, as Adam's and AdamW's
    do, could not be told apart in one panel.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = min(4, len(comparisons))
    rows = -(-len(comparisons) // columns)
    figure = Figure(figsize=(2.6 * columns + 0.6, 2.1 * rows + 0.8), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for panel, own in zip(panels, comparisons, strict=False):
        for other in comparisons:
            panel.plot(other.cpu.losses, color="0.85", linewidth=0.8)
        panel.plot(own.cpu.losses, color="#0072b2", linewidth=1.8)
        panel.plot(own.reference.losses, "o", color="#d55e00", markersize=3)
        panel.set_title(f"{own.name}, {own.cpu.loss:.2g}", fontsize=10)
        panel.set_yscale("log")
        panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(comparisons) :]:
        panel.set_visible(False)
    figure.suptitle("Handwritten digits: lines are the compiled kernels, dots the NumPy reference", fontsize=10)
    figure.supxlabel("epoch", fontsize=10)
    figure.supylabel("loss on the training set", fontsize=10)
    figure.savefig(path, dpi=150)


# --- The whole --------------------------------------------------------------------------------------------


def missing_packages() -> list[str]:
    """Packages that the demo needs and that are not installed."""
    return [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]


def run(
    names: Sequence[str] | None = None,
    epochs: int = EPOCHS,
    seed: int = 0,
    folder: Path = Path(),
    schedule: str | None = None,
    patience: int | None = None,
) -> int:
    """Train, print the table, write the picture.

    Parameters
    ----------
    names
        Optimizers by their names in `fastopt.functional`; None for all.
    epochs : int >= 1
        Passes over the training set.
    seed : int >= 0
        Of the initial weights and of the batches.
    folder
        Where the picture is written; made if it does not exist.
    schedule
        Of the learning rates, a name in `SCHEDULES`; None leaves them constant.
    patience : int >= 1 or None
        Epochs without a better loss on the validation set after which a training ends; None for none.

    Returns
    -------
    int
        Exit code: 0, or 1 if the backends disagree.
    """
    folder.mkdir(parents=True, exist_ok=True)
    built = fastopt.info()
    words = (
        f"fastopt {built['version']} on {built['isa']}: a perceptron of {'-'.join(map(str, LAYERS))} learns "
        f"handwritten digits in {epochs} epochs with batches of {BATCH}, seed {seed}. loss: on the training set, with "
        "the compiled kernels and with the NumPy reference; apart: their relative difference; accuracy: on the "
        "validation set; us: median microseconds of one optimizer step, compiled and reference; ratio: times faster."
    )
    if schedule is not None:
        words += f" The learning rates follow the schedule {schedule!r}."
    if patience is not None:
        words += f" Trainings end after {patience} epochs without a better validation loss and keep the best epoch."
    print(textwrap.fill(words, 79) + "\n")
    comparisons = compare(list(names or registry), epochs, seed, schedule, patience)
    print(table(comparisons))
    if patience is not None:
        ends = (f"{name} {cpu.kept} of {len(cpu.losses) - 1}" for name, _, cpu in comparisons)
        print("\n" + textwrap.fill(f"Epochs kept, of those trained: {', '.join(ends)}", 79))
    path = folder / CURVES
    draw(comparisons, path)
    print(f"\nLoss curves: {path}")
    disagreeing = [comparison for comparison in comparisons if not comparison.agrees]
    for name, reference, cpu in disagreeing:
        print(
            f"{name}: the final training losses of the backends, {cpu.losses[-1]:.6g} (cpu) and "
            f"{reference.losses[-1]:.6g} (reference), differ by more than {TOLERANCE:.0%}",
            file=sys.stderr,
        )
    return 1 if disagreeing else 0
