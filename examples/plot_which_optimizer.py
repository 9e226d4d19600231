r"""
Which optimizer?
================

Twelve optimizers train the same network on the same handwritten digits, from the same initial weights, with the same
batches in the same order. Each gets the learning rate that suits it. The question has three answers, which need not
agree: which is the fastest, which finds the best network, and which is the easiest to set up.
"""

import time

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits

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
threadpool_limits(1)  # one thread is the fastest at multiplying matrices as small as these

# %%
# The digits, in three parts
# --------------------------
#
# Scikit-learn brings 1,797 digits of 8 x 8 pixels. The first part trains the weights. The second, the validation set,
# chooses learning rates. The third, the test set, is looked at once, at the end: whatever a choice was based on looks
# better than it is.

pixels, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(labels))
images, labels = (pixels[order] / 16).astype(np.float32), labels[order]
parts = {"training": slice(0, 1077), "validation": slice(1077, 1437), "test": slice(1437, 1797)}
digits = {name: (images[part], labels[part]) for name, part in parts.items()}

# %%
# The network and its gradient
# ----------------------------
#
# Three hidden layers of 100 units with ReLU. Layer :math:`l` computes :math:`z_l = a_{l-1} W_l + b_l` and :math:`a_l =
# \max(z_l, 0)`. The initial weights are normal with variance :math:`2 / n` for :math:`n` inputs (He et al., 2015),
# which keeps the size of the activations through ReLU layers; the biases are zero. The last layer has no ReLU: a
# softmax turns its outputs into probabilities, and the loss is the cross-entropy. For a batch of :math:`B` digits with
# one-hot labels :math:`Y`:
#
# .. math::
#
#    P = \operatorname{softmax}(z_4), \qquad L = - \frac{1}{B} \sum Y \log P, \qquad
#    \delta_4 = \frac{P - Y}{B}, \qquad
#    \delta_{l-1} = (\delta_l W_l^\top) \odot [z_{l-1} > 0],
#
# and from :math:`\delta_l` the gradients :math:`a_{l-1}^\top \delta_l` for :math:`W_l` and the column sums of
# :math:`\delta_l` for :math:`b_l`. That is all of backpropagation.

SIZES, BATCH, EPOCHS = (64, 100, 100, 100, 10), 64, 12
LAYERS = range(1, len(SIZES))


def initial_weights(seed):
    """Weights and biases of all layers, views of one float32 buffer."""
    rng = np.random.default_rng(seed)
    shapes = {}
    for k in LAYERS:
        shapes |= {f"W{k}": (SIZES[k - 1], SIZES[k]), f"b{k}": SIZES[k]}
    params = fastopt.FlatBuffer(shapes)
    for k in LAYERS:
        params[f"W{k}"][:] = rng.normal(0, (2 / SIZES[k - 1]) ** 0.5, (SIZES[k - 1], SIZES[k]))
    return params


def forward(params, images):
    """The activations of every layer, from the images to the outputs before the softmax."""
    activations = [images]
    for k in LAYERS:
        z = activations[-1] @ params[f"W{k}"] + params[f"b{k}"]
        activations.append(z if k == LAYERS[-1] else np.maximum(z, 0))
    return activations


def log_probabilities(z):
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def backward(params, grads, images, labels):
    """Write the gradient of the cross-entropy into `grads`."""
    activations = forward(params, images)
    delta = np.exp(log_probabilities(activations[-1]))
    delta[np.arange(len(labels)), labels] -= 1
    delta /= len(labels)
    for k in reversed(LAYERS):
        np.matmul(activations[k - 1].T, delta, out=grads[f"W{k}"])
        np.sum(delta, axis=0, out=grads[f"b{k}"])
        delta = (delta @ params[f"W{k}"].T) * (activations[k - 1] > 0)


def evaluate(params, part):
    """Cross-entropy and share of right answers."""
    images, labels = digits[part]
    scores = log_probabilities(forward(params, images)[-1])
    return -scores[np.arange(len(labels)), labels].mean(), np.mean(scores.argmax(axis=1) == labels)


def train(name, lr, epochs, seed):
    """Losses after every epoch, (epochs, 2) for training and validation; the weights; microseconds of a median step."""
    params = initial_weights(seed)
    grads = params.zeros_like()
    opt = getattr(fastopt, CONTESTANTS[name][0])(params, lr=lr, **CONTESTANTS[name][1])
    images, labels = digits["training"]
    shuffle = np.random.default_rng(seed)
    losses, nanoseconds = [], []
    for epoch in range(epochs):
        opt.param_groups[0]["lr"] = lr * (1 - epoch / epochs)
        for batch in np.array_split(shuffle.permutation(len(labels)), len(labels) // BATCH):
            backward(params, grads, images[batch], labels[batch])
            start = time.perf_counter_ns()
            opt.step(grads)
            nanoseconds.append(time.perf_counter_ns() - start)
        losses.append([evaluate(params, part)[0] for part in ("training", "validation")])
    return np.array(losses), params, np.median(nanoseconds) / 1000


CONTESTANTS = {
    "SGD": ("SGD", {}),
    "SGD, momentum": ("SGD", {"momentum": 0.9}),
    "Nesterov": ("Nesterov", {}),
    "Adagrad": ("Adagrad", {}),
    "RMSprop": ("RMSprop", {}),
    "Adam": ("Adam", {}),
    "Adamax": ("Adamax", {}),
    "NAdam": ("NAdam", {}),
    "AdamW": ("AdamW", {}),
    "RAdam": ("RAdam", {}),
    "Lion": ("Lion", {}),
    "LAMB": ("LAMB", {}),
}

# %%
# A fair learning rate for each
# -----------------------------
#
# The rate matters more than the optimizer, and means something else for each: a step of Lion has the length of its
# rate in every weight, a step of SGD is the rate times the gradient. So each tries the same nine for three epochs. The
# best two then run all twelve, and the one with the lower loss on the validation set is chosen. In every run the rate
# falls linearly to zero, so that all come to rest. The other hyperparameters stay at their defaults, which is the
# usual case and the limit of this comparison.

RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1]
searched, chosen = {}, {}
with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # some rates are too large, and losses overflow
    for name in CONTESTANTS:
        losses = [train(name, lr, 3, seed=0)[0][-1, 1] for lr in RATES]
        searched[name] = np.nan_to_num(losses, nan=np.inf)
        finalists = [RATES[k] for k in np.argsort(searched[name])[:2]]
        chosen[name] = min(finalists, key=lambda lr: train(name, lr, EPOCHS, seed=0)[0][:, 1].min())

figure, panel = plt.subplots(figsize=(7.2, 4.3))
table = np.array(list(searched.values()))
panel.imshow(np.clip(table, 0.08, 2.3), cmap="cividis_r", norm=LogNorm(0.08, 2.3), aspect="auto")
for row, losses in enumerate(table):
    for column, value in enumerate(losses):
        text = f"{value:.2f}" if value < 10 else "> 10"
        colour = "white" if value > 0.6 else "black"
        panel.text(column, row, text, color=colour, ha="center", va="center", fontsize=9)
for row, lr in enumerate(chosen.values()):
    corner = RATES.index(lr) - 0.48, row - 0.46
    panel.add_patch(plt.Rectangle(corner, 0.96, 0.92, fill=False, color=VERMILION, linewidth=2.5))
panel.set_xticks(range(len(RATES)), [f"{rate:g}" for rate in RATES])
panel.set_yticks(range(len(searched)), searched)
panel.tick_params(length=0)
panel.spines[:].set_visible(False)
panel.set(xlabel="learning rate", title="Validation loss after three epochs, and the rate chosen for each")

# %%
# The best rates lie a factor of a hundred apart. A row with much light colour is an optimizer that forgives a wrong
# one.
#
# The runs
# --------
#
# Twelve epochs at the chosen rates, from three new random starts. The pictures show the mean loss on the training set
# and on the validation set; the training losses of all others are in grey. On the training set it falls until the rate
# is zero. On the validation set it stops early, most often between 0.06 and 0.1: from there on the network learns the
# digits of the training set, not digits.

SEEDS = (1, 2, 3)
curves, accuracy, microseconds = {}, {}, {}
for name, lr in chosen.items():
    runs = [train(name, lr, EPOCHS, seed) for seed in SEEDS]
    curves[name] = np.mean([losses for losses, _, _ in runs], axis=0)
    accuracy[name] = np.array([evaluate(params, "test")[1] for _, params, _ in runs])
    microseconds[name] = np.mean([time for _, _, time in runs])

figure, grid = plt.subplots(4, 3, figsize=(7.2, 7.2), sharex=True, sharey=True)
epochs = np.arange(1, EPOCHS + 1)
for name, panel in zip(curves, grid.flat, strict=True):
    for losses in curves.values():
        panel.plot(epochs, losses[:, 0], color="0.88", linewidth=0.8)
    panel.plot(epochs, curves[name][:, 0], color=BLUE, linewidth=1.8, label="training")
    panel.plot(epochs, curves[name][:, 1], color=VERMILION, linewidth=1.8, linestyle=(0, (3, 1.5)), label="validation")
    panel.set(yscale="log", ylim=(5e-4, 3), title=f"{name}, lr {chosen[name]:g}")
for panel in grid[-1]:
    panel.set_xlabel("epoch")
grid[0, 0].legend(loc="lower left", fontsize=9)
figure.suptitle("The training loss goes on falling where the validation loss has long stopped", fontsize=10.5)
figure.supylabel("loss", fontsize=10)

# %%
# The table
# ---------
#
# *Speed* is the epochs until the mean training loss is below 0.1. *Quality* is the lowest mean loss on the validation
# set, and the share of right answers on the test set, with the lowest and the highest of the three runs. *Price* is
# the time of one step for the 27,710 weights.


def epochs_to(level, losses):
    """When the loss falls below `level` for the first time: in epochs, interpolated on the logarithmic scale."""
    k = int(np.argmax(losses < level))
    if losses[k] >= level:
        return np.inf
    return k + np.log(losses[k - 1] / level) / np.log(losses[k - 1] / losses[k]) if k else 1.0


speed = {name: epochs_to(0.1, losses[:, 0]) for name, losses in curves.items()}
quality = {name: losses[:, 1].min() for name, losses in curves.items()}
ranking = sorted(curves, key=speed.get)
print(f"{'':13}{'lr':>6}{'epochs to 0.1':>15}{'validation loss':>17}{'test accuracy':>15}{'us a step':>21}")
for name in ranking:
    right = f"{accuracy[name].mean():9.3f} ({accuracy[name].min():.3f} to {accuracy[name].max():.3f})"
    print(f"{name:13}{chosen[name]:6g}{speed[name]:15.1f}{quality[name]:17.3f}{right}{microseconds[name]:9.1f}")

# %%

figure, (fast, good, cheap) = plt.subplots(1, 3, figsize=(7.2, 4.2), sharey=True)
rows = np.arange(len(ranking))[::-1]
fast.plot([speed[name] for name in ranking], rows, "o", color=BLUE)
good.plot([accuracy[name].mean() for name in ranking], rows, "o", color=BLUE)
ends = [(accuracy[name].min(), accuracy[name].max()) for name in ranking]
good.hlines(rows, *zip(*ends, strict=True), color=BLUE, linewidth=2)
cheap.plot([microseconds[name] for name in ranking], rows, "o", color=BLUE)
fast.set_yticks(rows, ranking)
fast.set(xlabel="epochs", xlim=(0, None), title="Until the loss is 0.1")
good.set(xlabel="test accuracy", title="Right answers")
cheap.set(xlabel="microseconds", xlim=(0, None), title="One step")
for panel in (fast, good, cheap):
    panel.grid(axis="y", color="0.9")
    panel.set_axisbelow(True)
    panel.tick_params(axis="y", length=0)
    panel.spines["left"].set_visible(False)
figure.suptitle("Large differences in speed, small ones in quality", fontsize=10.5)
plt.show()

# %%
# SGD without momentum takes about twice as many epochs as Adam. Quality is nearly a tie: with 360 test digits, a share
# of 0.98 has a standard error of :math:`\sqrt{0.98 \cdot 0.02 / 360} = 0.007`, so most differences in that column are
# luck.
#
# So which one? On a problem such as this, any of them whose rate was searched. Adam and its relatives have the
# advantage that the step does not depend on the scale of the loss, so that their rates carry over from one network to
# the next. Schmidt, Schneider and Hennig (2021) compared fifteen optimizers on eight problems and came to the same: to
# tune one's optimizer helps about as much as to choose among untuned ones.
