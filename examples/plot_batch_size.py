r"""
Small batches, large batches
============================

A batch of one digit gives a gradient that is nearly noise, a batch of all digits one that is exact and costs hundreds
of times as much. This example measures both sides, time and noise, finds how the learning rate has to follow the
batch, and asks whether the batch decides what a network has learned in the end.
"""

import time

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits

import fastopt

BLUE, VERMILION, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"
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
# Digits and a network
# --------------------
#
# 512 handwritten digits to learn from and 1,285 to test with; a network with one hidden layer of 50 ReLUs, softmax and
# cross-entropy; plain SGD, so that nothing stands between the gradient and the step. With :math:`h = \max(x W_1 + b_1,
# 0)`, probabilities :math:`P = \operatorname{softmax}(h W_2 + b_2)` and one-hot labels :math:`Y`, the gradient of the
# mean over a batch :math:`\mathcal{B}` of :math:`B` digits starts from :math:`\delta = (P - Y) / B`.

pixels, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(labels))
images, labels = (pixels[order] / 16).astype(np.float32), labels[order]
SAMPLES = 512
training, test = (images[:SAMPLES], labels[:SAMPLES]), (images[SAMPLES:], labels[SAMPLES:])


def initial_weights(seed):
    rng = np.random.default_rng(seed)
    params = fastopt.FlatBuffer({"W1": (64, 50), "b1": 50, "W2": (50, 10), "b2": 10})
    params["W1"][:] = rng.normal(0, (2 / 64) ** 0.5, (64, 50))
    params["W2"][:] = rng.normal(0, (2 / 50) ** 0.5, (50, 10))
    return params


def forward(params, images):
    """The hidden layer and the logarithms of the probabilities."""
    hidden = np.maximum(images @ params["W1"] + params["b1"], 0)
    z = hidden @ params["W2"] + params["b2"]
    z -= z.max(axis=1, keepdims=True)
    return hidden, z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def backward(params, grads, images, labels):
    """Write the gradient of the mean cross-entropy into `grads`."""
    hidden, scores = forward(params, images)
    delta = np.exp(scores)
    delta[np.arange(len(labels)), labels] -= 1
    delta /= len(labels)
    np.matmul(hidden.T, delta, out=grads["W2"])
    np.sum(delta, axis=0, out=grads["b2"])
    delta = (delta @ params["W2"].T) * (hidden > 0)
    np.matmul(images.T, delta, out=grads["W1"])
    np.sum(delta, axis=0, out=grads["b1"])


def evaluate(params, images, labels):
    """Cross-entropy and share of right answers."""
    _, scores = forward(params, images)
    return -scores[np.arange(len(labels)), labels].mean(), np.mean(scores.argmax(axis=1) == labels)


class Run:
    """One training: a network, its optimizer and its batches."""

    def __init__(self, batch_size, lr, seed=0):
        self.params = initial_weights(seed)
        self.grads = self.params.zeros_like()
        self.opt = fastopt.SGD(self.params, lr=lr)
        self.batch_size, self.shuffle = batch_size, np.random.default_rng(seed)

    def epoch(self):
        """Update once with every batch of a new order, and yield after each."""
        images, labels = training
        for batch in np.split(self.shuffle.permutation(SAMPLES), SAMPLES // self.batch_size):
            backward(self.params, self.grads, images[batch], labels[batch])
            self.opt.step(self.grads)
            yield


def train(run, epochs):
    for _ in range(epochs):
        for _ in run.epoch():
            pass
    return run.params


# %%
# Time: an epoch of large batches is cheaper
# ------------------------------------------
#
# An update costs something that does not depend on the batch (calls, the step itself) and something for every sample.
# With :math:`n` samples in an epoch, and therefore :math:`n / B` updates,
#
# .. math::
#
#    T_{\text{epoch}}(B) = \frac{n}{B} \, (c_{\text{update}} + c_{\text{sample}} B)
#                        = n \left( \frac{c_{\text{update}}}{B} + c_{\text{sample}} \right) .

BATCHES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
seconds = np.full(len(BATCHES), np.inf)
for _ in range(5):  # rounds, of which the fastest counts
    for k, size in enumerate(BATCHES):
        run = Run(size, lr=0.01)
        start = time.process_time()  # of this process alone, whatever else the machine does
        train(run, 1)
        seconds[k] = min(seconds[k], time.process_time() - start)
# The two constants: least squares of the time of an epoch, each divided by itself so that all count alike.
terms = SAMPLES * np.stack([1 / np.array(BATCHES), np.ones(len(BATCHES))], axis=1)
per_update, per_sample = np.linalg.lstsq(terms / seconds[:, None], np.ones(len(BATCHES)))[0]
print(f"{1e6 * per_update:.0f} us for an update and {1e6 * per_sample:.1f} us for each of its samples:")
for size in (1, 32, 512):
    print(f"{1e3 * seconds[BATCHES.index(size)]:6.1f} ms for an epoch in batches of {size}")

# %%
# Noise: a gradient of small batches is rougher
# ---------------------------------------------
#
# If the gradients of single samples scatter around the mean gradient :math:`G` with covariance :math:`\Sigma`, then
# the error of the gradient of a batch has the expected squared length :math:`\operatorname{tr} \Sigma / B`: to halve
# the error takes four times the batch. It is as large as the gradient itself at the batch size
#
# .. math::
#
#    B_{\text{noise}} = \frac{\operatorname{tr} \Sigma}{|G|^2} ,
#
# the *gradient noise scale* (McCandlish et al., 2018). Well below it, batches twice as large make twice the progress;
# well above, the gradient is good enough, and more samples are work for nothing. In training the mean gradient shrinks
# and the scatter does not, so the scale grows.


def gradient(params, batch):
    grads = params.zeros_like()
    backward(params, grads, training[0][batch], training[1][batch])
    return grads.flat.astype(np.float64)


rng = np.random.default_rng(0)
noise, scale = {}, {}
for epochs in (0, 2, 10):
    params = train(Run(16, lr=0.1), epochs)
    single = np.array([gradient(params, [k]) for k in range(SAMPLES)])
    mean = single.mean(axis=0)
    size_of_mean = np.linalg.norm(mean)
    scale[epochs] = single.var(axis=0).sum() / size_of_mean**2
    noise[epochs] = []
    for size in BATCHES[:-2]:
        batches = [rng.integers(0, SAMPLES, size) for _ in range(max(100, 2000 // size))]
        errors = [np.sum((single[batch].mean(axis=0) - mean) ** 2) for batch in batches]
        noise[epochs].append((np.mean(errors) ** 0.5) / size_of_mean)
    print(f"after {epochs:2} epochs the noise is as large as the gradient in batches of {scale[epochs]:.1f}")

# %%

COLOURS = {0: GREEN, 2: BLUE, 10: VERMILION}
figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.4))
left.loglog(BATCHES, 1e3 * seconds, "o", color=BLUE, label="measured")
left.loglog(BATCHES, 1e3 * terms @ [per_update, per_sample], color=BLUE, linewidth=1, label="formula")
left.axhline(1e3 * SAMPLES * per_sample, color=GREY, linewidth=1, linestyle="--", label="samples alone")
left.set(xlabel="batch size", ylabel="milliseconds", title="An epoch takes less time")
for epochs, ratios in noise.items():
    right.loglog(BATCHES[:-2], ratios, "o", color=COLOURS[epochs], label=f"after {epochs} epochs")
    right.loglog(BATCHES, (scale[epochs] / np.array(BATCHES)) ** 0.5, color=COLOURS[epochs], linewidth=1)
right.axhline(1, color=GREY, linewidth=1, linestyle="--")
right.set(xlabel="batch size", ylabel="noise / gradient", title="A gradient is less noisy")
for panel in (left, right):
    panel.set_xticks([1, 4, 16, 64, 256], [1, 4, 16, 64, 256])
    panel.legend()
figure.suptitle("What large batches buy", fontsize=10.5)

# %%
# The path
# --------
#
# The first 100 updates in batches of 1, 16 and 512, at the same learning rate, seen from two directions: the one in
# which the full batch goes on the whole, and the one in which that path bends most. Batches of 16 follow the exact
# path with a tremble. Single digits are pushed about so much that they get only half as far: most of what one step
# gains the next ones undo. At this rate, that is.

paths = {}
for size in (1, 16, 512):
    run, path = Run(size, lr=0.1), []
    path.append(run.params.flat.copy())
    while len(path) <= 100:
        for _ in run.epoch():
            path.append(run.params.flat.copy())
            if len(path) > 100:
                break
    paths[size] = np.array(path, np.float64)

ahead = paths[512][-1] - paths[512][0]
ahead /= np.linalg.norm(ahead)
away = paths[512] - paths[512][0]
sideways = np.linalg.svd(away - np.outer(away @ ahead, ahead), full_matrices=False)[2][0]
detour = {}
for size, path in paths.items():
    length = np.linalg.norm(np.diff(path, axis=0), axis=1).sum()
    detour[size] = length / np.linalg.norm(path[-1] - path[0])
    print(f"batches of {size:3}: the path is {detour[size]:.1f} times as long as the way from its start to its end")

figure, panel = plt.subplots(figsize=(7.2, 3.4))
for (size, path), colour, width in zip(paths.items(), (VERMILION, BLUE, "black"), (0.9, 1.2, 2.2), strict=True):
    steps = path - path[0]
    label = f"batches of {size}: {detour[size]:.1f} times the direct way"
    panel.plot(steps @ ahead, steps @ sideways, color=colour, linewidth=width, label=label)
    panel.plot(*(steps[-1] @ np.stack([ahead, sideways], axis=1)), "o", color=colour, markersize=5)
panel.set(
    xlabel="ahead", ylabel="sideways", title="Batches of 16 follow the exact path, single digits are pushed about"
)
panel.legend()

# %%
# The rate has to follow the batch
# --------------------------------
#
# Noise averages out over several steps just as well as within one batch, as long as the steps are short. So :math:`k`
# small steps with batches of :math:`B` do what one step with a batch of :math:`kB` and a rate :math:`k` times as large
# does. This is the *linear scaling rule* (Goyal et al., 2017). It must end where the rate becomes too large for the
# curvature, however exact the gradient.
#
# After 20 epochs each: at a rate of 0.1 for all, large batches have made too few updates. With a rate of :math:`0.1 \,
# B / 16` all batches up to 64 are at the same loss; then the rule breaks.

final = {"same rate": {}, "rate in proportion": {}}
for size in (1, 4, 16, 64, 256, 512):
    for rule, lr in [("same rate", 0.1), ("rate in proportion", 0.1 * size / 16)]:
        losses = [evaluate(train(Run(size, lr, seed), 20), *training)[0] for seed in (0, 1)]
        final[rule][size] = float(np.mean(losses))
print(f"\n{'training loss, batches of':28}" + "".join(f"{size:8}" for size in final["same rate"]))
for rule, losses in final.items():
    print(f"{rule:28}" + "".join(f"{loss:8.3f}" for loss in losses.values()))

# %%
# What is learned in the end
# --------------------------
#
# Large batches have the reputation of generalising worse (Keskar et al., 2017). It was found where all batches got the
# same number of epochs, and most of it went away when they got as many updates (Hoffer et al., 2017). To separate the
# batch from the progress, every run here goes on until the training loss is below 0.02, with a rate in proportion to
# the batch up to 0.5, where it stays.

reached = {}
for size in (1, 4, 16, 64, 512):
    for seed in (0, 1):
        run = Run(size, min(0.03 * size, 0.5), seed)
        history, epochs, every = [], 0, max(1, size // 16)
        while not history or history[-1][1] > 0.02:
            train(run, every)
            epochs += every
            history.append((epochs, evaluate(run.params, *training)[0], *evaluate(run.params, *test)))
        reached.setdefault(size, []).append(np.array(history))

print("\nuntil the training loss is 0.02, in batches of")
print(f"{'epochs':>14}{'updates':>9}{'seconds':>9}{'test loss':>11}{'test accuracy':>15}")
summary = {}
for size, histories in reached.items():
    epochs, _, test_loss, right = np.mean([history[-1] for history in histories], axis=0)
    cost = epochs * seconds[BATCHES.index(size)]
    summary[size] = {"epochs": epochs, "seconds": cost, "test loss": test_loss, "right": right}
    print(f"{size:4}{epochs:10.0f}{epochs * SAMPLES / size:9.0f}{cost:9.3f}{test_loss:11.3f}{right:15.3f}")

# %%

figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.5))
for (rule, losses), colour in zip(final.items(), (VERMILION, BLUE), strict=True):
    left.loglog(list(losses), list(losses.values()), "o-", color=colour, label=rule)
left.set_xticks([1, 4, 16, 64, 256], [1, 4, 16, 64, 256])
left.minorticks_off()
left.set(xlabel="batch size", ylabel="training loss", title="After 20 epochs")
left.legend()
for (size, histories), colour in zip(reached.items(), (VERMILION, "#E69F00", GREEN, BLUE, PURPLE), strict=True):
    _, training_loss, test_loss, _ = histories[0].T
    right.loglog(training_loss, test_loss, "-", color=colour, linewidth=1.5, label=f"batches of {size}")
right.set(xlabel="training loss", ylabel="test loss", title="On the way to a loss of 0.02", xlim=(1, 0.015))
right.set_xticks([1, 0.3, 0.1, 0.03], [1, 0.3, 0.1, 0.03])
right.set_yticks([1, 0.5, 0.3, 0.2, 0.15], [1, 0.5, 0.3, 0.2, 0.15])
right.minorticks_off()
right.legend(fontsize=9)
figure.suptitle("The rate follows the batch; what is learned does not depend on it", fontsize=10.5)
plt.show()

# %%
# At the same training loss the test loss is the same, for batches of 1 and of 512. On these digits it is the progress
# that counts, not the noise on the way. Large networks and data sets can differ; but compare them at equal progress,
# too.
#
# What remains is time, and for that the batch is chosen: the number of epochs grows with the batch once it nears the
# noise scale, the time of an epoch falls until the samples alone count, and the product is lowest in between. On
# hardware that computes many samples at once this minimum lies further up.
