r"""
Choosing hyperparameters
========================

Learning rate and weight decay are not learned: someone has to set them, and the right learning rate is easily a
thousand times the wrong one. A good search is simple: hold data back, draw candidates at random on a logarithmic
scale, train each for a few epochs only, and narrow the ranges around the best. This example does so for a network
that reads handwritten digits, and shows why each part of the recipe is there.
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
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
        "figure.titlesize": 11,
        "figure.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    }
)

# %%
# Three parts of the data
# -----------------------
#
# The network learns from the *training* data. Hyperparameters are chosen by the *validation* data: on the training
# data, no weight decay at all would look best. The *test* data are for one single look at the very end. A score that
# was used to choose among many candidates flatters the chosen one.

images, labels = load_digits(return_X_y=True)
images = (images / 16).astype(np.float32)
rest_images, test_images, rest_labels, test_labels = train_test_split(
    images, labels, test_size=597, stratify=labels, random_state=0
)
train_images, valid_images, train_labels, valid_labels = train_test_split(
    rest_images, rest_labels, test_size=600, stratify=rest_labels, random_state=0
)
print(len(train_images), "to train,", len(valid_images), "to validate,", len(test_images), "to test")

# %%
# What a candidate is worth
# -------------------------
#
# One hidden layer of 50 ReLU units, softmax, cross-entropy, and SGD with momentum, which takes the two hyperparameters
# of this search:
#
# .. math::
#
#    g \leftarrow \nabla L(p) + \lambda\, p, \qquad v \leftarrow 0.9\, v + g, \qquad p \leftarrow p - \eta\, v,
#
# the learning rate :math:`\eta` and the weight decay :math:`\lambda`. The score is the share of validation digits
# that are recognised.

HIDDEN, BATCH = 50, 30
ERRORS = (0.05, 0.1, 0.2, 0.5, 0.9)
one_hot = np.eye(10, dtype=np.float32)[train_labels]


def logits(params, x):
    """The hidden layer's outputs, and one number per class."""
    hidden = np.maximum(x @ params["w1"] + params["b1"], 0)
    return hidden, hidden @ params["w2"] + params["b2"]


def accuracy(params, x, y):
    """Share of recognised digits; infinities and NaN recognise nothing."""
    scores = logits(params, x)[1]
    return float(np.mean((scores.argmax(axis=1) == y) & np.isfinite(scores).all(axis=1)))


def train(lr, weight_decay, epochs):
    """The trained parameters, and the validation accuracy after each epoch. Start and batches are always the same."""
    rng = np.random.default_rng(0)
    params = fastopt.FlatBuffer({"w1": (64, HIDDEN), "b1": HIDDEN, "w2": (HIDDEN, 10), "b2": 10})
    grads = params.zeros_like()
    params["w1"][:] = rng.normal(0, (2 / 64) ** 0.5, (64, HIDDEN))
    params["w2"][:] = rng.normal(0, (2 / HIDDEN) ** 0.5, (HIDDEN, 10))
    opt = fastopt.SGD(params, lr=lr, momentum=0.9, weight_decay=weight_decay)
    accuracies = []
    for _ in range(epochs):
        for batch in rng.permutation(len(train_images)).reshape(-1, BATCH):
            x = train_images[batch]
            hidden, scores = logits(params, x)
            powers = np.exp(scores - scores.max(axis=1, keepdims=True))
            delta = (powers / powers.sum(axis=1, keepdims=True) - one_hot[batch]) / BATCH
            grads["w2"][:], grads["b2"][:] = hidden.T @ delta, delta.sum(axis=0)
            delta = (delta @ params["w2"].T) * (hidden > 0)
            grads["w1"][:], grads["b1"][:] = x.T @ delta, delta.sum(axis=0)
            opt.step(grads)
        accuracies.append(accuracy(params, valid_images, valid_labels))
    return params, accuracies


# %%
# At random, on a logarithmic scale
# ---------------------------------
#
# A grid of 5 x 5 candidates tries five learning rates. 25 random candidates try 25 of them, for the same price. When
# one hyperparameter matters more than the other, and one does not know which, this is what decides (Bergstra and
# Bengio, 2012).
#
# "At random" means: with a logarithm that is uniformly distributed. Of learning rates that are themselves uniformly
# distributed between :math:`10^{-5}` and 1, nine in ten would be above 0.1, and four powers of ten would share the
# tenth.

RANGES = {"lr": (1e-5, 1e0), "weight_decay": (1e-6, 1e0)}
rng = np.random.default_rng(1)


def draw(ranges, count):
    """Candidates whose logarithms are uniformly distributed: an array of shape (count, 2)."""
    low, high = np.log10(list(ranges.values())).T
    return 10 ** rng.uniform(low, high, (count, 2))


def lay_out(ranges, side):
    """A grid of side x side candidates, which starts anywhere within its first cell."""
    low, high = np.log10(list(ranges.values())).T
    places = (np.stack(np.meshgrid(*2 * [np.arange(side)]), axis=-1).reshape(-1, 2) + rng.uniform(size=2)) / side
    return 10 ** (low + places * (high - low))


@threadpool_limits.wrap(limits=1)  # several threads only delay the BLAS on matrices as small as these
def validate(candidates, epochs):
    """Validation accuracy of each candidate after some epochs."""
    with np.errstate(
        over="ignore", invalid="ignore"
    ):  # too large a learning rate overflows, and that is an answer, too
        return np.array([train(lr, weight_decay, epochs)[1][-1] for lr, weight_decay in candidates])


searches = {
    "Grid": [(c, validate(c, epochs=2)) for c in (lay_out(RANGES, 5) for _ in range(12))],
    "Random": [(c, validate(c, epochs=2)) for c in (draw(RANGES, 25) for _ in range(12))],
}
for name, found in searches.items():
    best = np.array([accuracies.max() for _, accuracies in found])
    print(f"{name:6} search of 25, best candidate: mean {best.mean():.1%}, worst of 12 searches {best.min():.1%}")

# %%
# The lower panels show one search of each kind, the upper ones what it learned about the learning rate. The grid may
# hit or miss the peak; random candidates leave no gap as wide as the grid's.

colours = {"cmap": "cividis_r", "norm": LogNorm(0.04, 0.9)}
figure, panels = plt.subplots(2, 2, figsize=(7.2, 4.8), sharex=True, sharey="row", height_ratios=(1, 1.6))
for (edge, panel), (name, found) in zip(panels.T, searches.items(), strict=True):
    candidates, accuracies = found[0]
    edge.vlines(candidates[:, 0], 0, accuracies, color=GREY, linewidth=0.5, zorder=0)
    edge.scatter(candidates[:, 0], accuracies, c=1 - accuracies, s=20, **colours)
    points = panel.scatter(*candidates.T, c=1 - accuracies, s=45, edgecolor="white", **colours)
    panel.loglog()
    panel.set(xlim=RANGES["lr"], ylim=RANGES["weight_decay"], xlabel="learning rate")
    panel.minorticks_off()
    edge.set_title(f"{name}: {len(np.unique(candidates[:, 0]))} learning rates")
panels[1, 0].set_ylabel("weight decay")
panels[0, 0].set(ylabel="accuracy", ylim=(0, 1.05))
error_bar = figure.colorbar(points, ax=panels, label="validation error", aspect=40)
error_bar.set_ticks(ERRORS, labels=[f"{error:.0%}" for error in ERRORS])
error_bar.minorticks_off()
figure.suptitle("For the same price, a random search sees five times as many learning rates")
plt.show()

# %%
# Narrowed twice
# --------------
#
# The search proper: 40 candidates for two epochs each. The ranges shrink to what the best fifth spans; 40 more from
# there, for four epochs; once more, for eight. Hopeless candidates show early, and later rounds spend their time where
# it counts. The price: short trainings favour what is fast, so the ranges must not be narrowed to a point.


def narrowed(candidates, accuracies, share=0.2):
    """The ranges that the best candidates span."""
    best = candidates[np.argsort(-accuracies, kind="stable")[: int(share * len(accuracies))]]
    return dict(zip(RANGES, zip(best.min(axis=0), best.max(axis=0), strict=True), strict=True))


rounds, ranges = [], RANGES
for epochs in (2, 4, 8):
    candidates = draw(ranges, 40)
    accuracies = validate(candidates, epochs)
    rounds.append((ranges, candidates, accuracies))
    print(
        f"{epochs} epochs, lr {ranges['lr'][0]:.1e} to {ranges['lr'][1]:.1e}, "
        f"weight decay {ranges['weight_decay'][0]:.1e} to {ranges['weight_decay'][1]:.1e}: "
        f"median {np.median(accuracies):.1%}, best {accuracies.max():.1%}"
    )
    ranges = narrowed(candidates, accuracies)

# %%
# Each panel is the frame of the one before, enlarged.

figure, panels = plt.subplots(1, 3, figsize=(7.2, 3.2))
for k, (panel, (ranges, candidates, accuracies)) in enumerate(zip(panels, rounds, strict=True)):
    points = panel.scatter(
        *candidates.T, c=1 - accuracies, s=36, edgecolor="white", linewidth=0.6, clip_on=False, **colours
    )
    panel.loglog()
    panel.set(xlim=ranges["lr"], ylim=ranges["weight_decay"], xlabel="learning rate")
    panel.set_title(f"Round {k + 1}: median {np.median(accuracies):.0%}")
    for axis, name in ((panel.xaxis, "lr"), (panel.yaxis, "weight_decay")):
        axis.set_ticks(ranges[name], labels=[f"{value:.2g}" for value in ranges[name]])
        axis.set_ticks([], minor=True)
        low, high = axis.get_ticklabels()
        if axis is panel.xaxis:
            low.set_horizontalalignment("left"), high.set_horizontalalignment("right")
        else:
            low.set(rotation=90, verticalalignment="bottom"), high.set(rotation=90, verticalalignment="top")
    if k < 2:
        (left, right), (bottom, top) = rounds[k + 1][0]["lr"], rounds[k + 1][0]["weight_decay"]
        panel.plot([left, right, right, left, left], [bottom, bottom, top, top, bottom], color=VERMILION, linewidth=1.5)
panels[0].set_ylabel("weight decay")
error_bar = figure.colorbar(points, ax=panels, label="validation error", aspect=30)
error_bar.set_ticks(ERRORS, labels=[f"{error:.0%}" for error in ERRORS])
error_bar.minorticks_off()
figure.suptitle("Each round looks where the last one found something")
plt.show()

# %%
# One look at the test data
# -------------------------
#
# The winner of the last round is trained to the end. Only now the test data are read, once. If test and validation
# score differ by much more than chance, the search has fitted the validation data. Chance is: of :math:`n` digits, a
# share :math:`q` that is recognised varies by
#
# .. math::
#
#    \sqrt{\frac{q\,(1 - q)}{n}}.

_, candidates, accuracies = rounds[-1]
lr, weight_decay = candidates[accuracies.argmax()]
params, history = train(lr, weight_decay, epochs=40)
valid_accuracy, test_accuracy = history[-1], accuracy(params, test_images, test_labels)
chance = (test_accuracy * (1 - test_accuracy) / len(test_labels)) ** 0.5
print(f"chosen: learning rate {lr:.3f}, weight decay {weight_decay:.1e}")
print(f"validation {valid_accuracy:.1%}, test {test_accuracy:.1%} (give or take {chance:.1%})")

figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.2))
for k, (_, _, accuracies) in enumerate(rounds):
    colour = (GREY, BLUE, VERMILION)[k]
    left.plot(
        np.arange(1, 41),
        np.sort(accuracies)[::-1],
        "o-",
        color=colour,
        markersize=3,
        linewidth=1,
        label=f"round {k + 1}",
    )
left.set(
    xlabel="rank of the candidate",
    ylabel="validation accuracy",
    ylim=(0, 1.03),
    title="Every round is better as a whole",
)
left.legend(loc="lower left")
right.plot(np.arange(1, 41), history, color=BLUE, label="validation")
right.errorbar(40, test_accuracy, chance, fmt="o", color=VERMILION, markersize=5, capsize=4, label="test, once")
right.set(xlabel="epoch", ylabel="accuracy", title="The winner, trained to the end")
right.legend(loc="lower right")
figure.suptitle("The test score confirms what validation promised")
plt.show()
