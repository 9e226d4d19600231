r"""
Three ways down a line
======================

Gradient descent needs the gradient of the mean loss over the data. It can be computed from all samples, from one, or
from a few: that is full-batch, stochastic and mini-batch descent. This example fits a line in all three ways, with the
same optimizer and the same learning rate, and looks at what the choice costs and what it buys.
"""

import time

import matplotlib.pyplot as plt
import numpy as np

import fastopt

BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
plt.rcParams.update(
    {
        "figure.dpi": 110,
        "figure.constrained_layout.use": True,
        "font.size": 10,
        "axes.titlesize": 10.5,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    }
)

# %%
# The data and the loss
# ---------------------
#
# A thousand samples of :math:`y = 3.5 x + 4`, with normal noise of standard deviation 0.5. The model is a line with
# slope :math:`w` and intercept :math:`b`, and the loss is the mean squared error:
#
# .. math::
#
#    L(w, b) = \frac{1}{n} \sum_{i=1}^{n} (w x_i + b - y_i)^2, \qquad
#    \frac{\partial L}{\partial w} = \frac{2}{n} \sum_{i=1}^{n} (w x_i + b - y_i)\, x_i, \qquad
#    \frac{\partial L}{\partial b} = \frac{2}{n} \sum_{i=1}^{n} (w x_i + b - y_i).
#
# The sums may run over all samples or over any part of them. If the part is drawn at random, the gradient is right on
# average, and the smaller the part, the more it scatters.

rng = np.random.default_rng(0)
SAMPLES, NOISE, EPOCHS, LR = 1000, 0.5, 50, 0.02
x = rng.standard_normal(SAMPLES).astype(np.float32)
y = (3.5 * x + 4 + NOISE * rng.standard_normal(SAMPLES)).astype(np.float32)


def gradient(line, x, y):
    """The gradient of the mean squared error by slope and intercept, from the samples given."""
    error = line[0] * x + line[1] - y
    return np.array([2 * (error @ x) / len(x), 2 * error.sum() / len(x)], np.float32)


def fit(batch_size, lr=LR, replace=False):
    """The line at zero and after each update of 50 epochs, and the seconds taken; `replace` draws every sample anew."""
    order = np.random.default_rng(1)
    line = np.zeros(2, np.float32)
    opt = fastopt.SGD(line, lr=lr)
    path = [line.copy()]
    start = time.perf_counter()
    for _ in range(EPOCHS):
        samples = order.choice(SAMPLES, SAMPLES, replace)
        for first in range(0, SAMPLES, batch_size):
            batch = samples[first : first + batch_size]
            opt.step(gradient(line, x[batch], y[batch]))
            path.append(line.copy())
    return np.array(path), time.perf_counter() - start


# %%
# An epoch goes over all samples once, in a new random order. In 50 epochs each way sees every sample 50 times; what
# differs is how often it updates the line on the way.

BATCHES = {"full batch": 1000, "mini-batch": 25, "stochastic": 1}
paths, seconds = {}, {}
for name, size in BATCHES.items():
    paths[name], seconds[name] = fit(size)

# %%
# For comparison, the best line there is: the loss is a quadratic function, so its minimum follows from a linear system
# (the *normal equations*), and the loss of every point on the paths from the distance to it. With the matrix :math:`A
# = \frac{1}{n} \sum_i (x_i, 1)^\top (x_i, 1)`,
#
# .. math::
#
#    L(w, b) = L(w^*, b^*) + (w - w^*, b - b^*) \, A \, (w - w^*, b - b^*)^\top .

rows = np.stack([x, np.ones_like(x)], axis=1).astype(np.float64)
best = np.linalg.lstsq(rows, y.astype(np.float64))[0]
lowest = np.mean((rows @ best - y) ** 2)
A = rows.T @ rows / SAMPLES


def excess(lines):
    """How far the loss of lines, an array of shape (n, 2), is above the lowest one."""
    away = lines - best
    return np.einsum("ni,ij,nj->n", away, A, away)


losses = {name: lowest + excess(path) for name, path in paths.items()}
print(f"{'':12}{'updates':>8}{'seconds':>9}{'slope':>8}{'intercept':>11}{'loss':>8}")
for name, path in paths.items():
    slope, intercept = path[-1]
    print(f"{name:12}{len(path) - 1:8}{seconds[name]:9.3f}{slope:8.3f}{intercept:11.3f}{losses[name][-1]:8.4f}")
print(f"{'best line':12}{'':17}{best[0]:8.3f}{best[1]:11.3f}{lowest:8.4f}")

# %%

COLOURS = {"full batch": BLUE, "mini-batch": VERMILION, "stochastic": GREEN}
STYLES = {"full batch": "-", "mini-batch": "-", "stochastic": (0, (4, 3))}
figure, panel = plt.subplots(figsize=(7.2, 3.6))
panel.plot(x, y, ".", color="0.75", markersize=3, label="samples")
ends = np.array([-3.2, 3.2])
for name, path in paths.items():
    slope, intercept = path[-1]
    label = f"{name}: y = {slope:.2f} x + {intercept:.2f}"
    panel.plot(ends, slope * ends + intercept, color=COLOURS[name], linestyle=STYLES[name], linewidth=2, label=label)
panel.set(xlabel="x", ylabel="y", xlim=ends)
panel.set_title("Fifty full-batch updates are too few; the other two lines lie on each other")
panel.legend(loc="upper left")

# %%
# The same work, seen twice
# -------------------------
#
# By epoch, which is by samples seen, stochastic descent is the fastest: after a single epoch it has made a thousand
# updates. By update the three start alike: early on, a gradient from one sample is nearly as good as one from a
# thousand, and costs a thousandth. That is the case for small batches.
#
# In the end they differ in the other direction. Stochastic descent does not come to rest: near the minimum the
# gradient of one sample is mostly noise, and every update moves the line by some of it.

figure, (by_epoch, by_update) = plt.subplots(1, 2, figsize=(7.2, 3.3), sharey=True)
for name, path in paths.items():
    above = excess(path)
    by_epoch.plot(above[:: len(path) // EPOCHS], color=COLOURS[name])
    some = np.unique(np.geomspace(1, len(path) - 1, 150).astype(int))
    width = 4 if name == "full batch" else 1.5  # so that it shows beneath the others
    by_update.plot(some, above[some], color=COLOURS[name], label=name, linewidth=width)
by_epoch.set(xlabel="epoch", ylabel="loss above the lowest", yscale="log", ylim=(1e-7, 60), title="By epoch")
by_update.set(xlabel="update", xscale="log", title="By update")
by_update.legend(loc="lower left")
for panel in (by_epoch, by_update):
    panel.grid(color="0.92")
    panel.set_axisbelow(True)
figure.suptitle("Small batches learn more from an epoch, and end in noise", fontsize=10.5)

# %%
# The noise at the bottom
# -----------------------
#
# How loud is it? Near the minimum each update removes the share :math:`2 \gamma` of the distance and adds noise of
# variance :math:`4 \gamma^2 \sigma^2 / B` to each of the two parameters (the inputs have variance 1; :math:`B` is the
# batch size). The two balance where the variance of a parameter is about :math:`\gamma \sigma^2 / B`, which lifts the
# loss by
#
# .. math::
#
#    \mathbb{E}[L] - L^* \approx 2 \, \frac{\gamma \sigma^2}{B} .
#
# The formula takes every sample as drawn anew. Going through a shuffled order instead, as everyone does, is quieter:
# what one part of the data pushes to one side, the rest of the epoch pushes back. That helps where an update is
# remembered until its epoch is over. The memory lasts about :math:`1 / (2 \gamma) = 25` updates, which is most of an
# epoch of 40 mini-batches, and nothing beside an epoch of a thousand single samples.

drawn_anew, _ = fit(BATCHES["mini-batch"], replace=True)
print("\nloss above the lowest, mean over the last 25 epochs    found  formula")
noise = {}
for name, path, size in [
    ("stochastic", paths["stochastic"], BATCHES["stochastic"]),
    ("mini-batch, samples drawn anew", drawn_anew, BATCHES["mini-batch"]),
    ("mini-batch, shuffled", paths["mini-batch"], BATCHES["mini-batch"]),
]:
    noise[name] = excess(path[len(path) // 2 :]).mean(), 2 * LR * NOISE**2 / size
    print(f"{name:50}{noise[name][0]:9.5f}{noise[name][1]:9.5f}")

# %%
# There are two ways to be quiet: a larger batch, or a smaller learning rate. That is why stochastic training ends with
# a schedule that lets the rate fall; and why a full batch, which has no such noise, can take a much larger rate. To
# compare the three at the same rate, as above, is not fair to it:

fast, _ = fit(BATCHES["full batch"], lr=0.45)
enough = int(np.argmax(excess(fast) < 1e-6))
print(f"full batch with lr 0.45: y = {fast[enough, 0]:.3f} x + {fast[enough, 1]:.3f} after {enough} updates")

# %%
# The paths of slope and intercept, with the best line as a star: the full batch goes straight there, an epoch a step,
# and is still on its way at the end. Mini-batches arrive and stay in a small cloud, single samples in a large one.

grid_w, grid_b = np.meshgrid(np.linspace(-0.5, 5, 120), np.linspace(-0.5, 5, 120))
height = excess(np.stack([grid_w.ravel(), grid_b.ravel()], axis=1)).reshape(grid_w.shape)
figure, (whole, magnified) = plt.subplots(1, 2, figsize=(7.2, 4.1))
for panel in (whole, magnified):
    panel.contour(grid_w, grid_b, height, levels=np.geomspace(0.003, 30, 12), colors="0.8", linewidths=0.7)
    for name in ("stochastic", "mini-batch", "full batch"):
        style = {"marker": "o", "markersize": 3} if name == "full batch" else {"linewidth": 0.6}
        panel.plot(*paths[name].T, color=COLOURS[name], **style)
    panel.plot(*best, "*", color="black", markersize=11, zorder=3)
    panel.set(xlabel="slope", aspect="equal")
whole.set(ylabel="intercept", xlim=(-0.3, 4.8), ylim=(-0.3, 4.8), title="From zero")
magnified.set(xlim=(3.18, 3.88), ylim=(3.65, 4.35), title="Around the best line")
for name, where in [("full batch", (2.1, 1.6)), ("mini-batch", (2.1, 1.1)), ("stochastic", (2.1, 0.6))]:
    whole.text(*where, name, color=COLOURS[name], fontweight="bold")
figure.suptitle("Single samples never let the line come to rest", fontsize=10.5)
plt.show()
