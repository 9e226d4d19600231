r"""
Fitting too well
================

A network with ten thousand weights can learn a hundred samples by heart, the wrong ones included. Its training loss
goes to zero, and what it says about new samples gets worse all the while. This example lets one do so, in two
dimensions where it can be seen, and then applies what keeps networks from it: L1 and L2 regularisation, decoupled
weight decay, dropout, and early stopping.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap
from sklearn.datasets import make_moons
from torch import nn

import fastopt

torch.set_num_threads(1)  # in networks as small as these, several threads only wait for each other
BLUE, VERMILION, GREEN, ORANGE, GREY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#666666"
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
# A hundred samples, some of them wrong
# -------------------------------------
#
# Two classes in the shape of two moons that overlap a little. Of the 100 training samples one label in ten is wrong, as
# in data that people have labelled. 300 validation samples tell when to stop, and 2,000 test samples what a network is
# worth.


def moons(count, seed):
    """Points, float32 of shape (count, 2), and classes, 0 or 1."""
    points, classes = make_moons(count, noise=0.3, random_state=seed)
    return torch.tensor(points, dtype=torch.float32), torch.tensor(classes, dtype=torch.float32)


points, classes = moons(100, seed=1)
wrong = torch.tensor(np.random.default_rng(5).random(100) < 0.1)
classes = torch.where(wrong, 1 - classes, classes)
validation, test = moons(300, seed=2), moons(2000, seed=3)


def network(dropout=0.0):
    """Two hidden layers of 100 units; always the same initial weights."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(2, 100),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(100, 100),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(100, 1),
    )


def loss(model, points, classes):
    """Cross-entropy of the two classes."""
    return nn.functional.binary_cross_entropy_with_logits(model(points)[:, 0], classes)


def evaluate(model, points, classes):
    """Loss, and share of points whose class is recognised, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return loss(model, points, classes).item(), ((model(points)[:, 0] > 0) == (classes > 0)).float().mean().item()


def train(model, make_optimizer, steps=1000, stopping=None):
    """Training and validation loss after every ten steps. The optimizer steps on NumPy views of PyTorch's memory."""
    views = [p.detach().numpy() for p in model.parameters()]
    opt = make_optimizer(views)
    history = []
    for step in range(1, steps + 1):
        model.train()
        loss(model, points, classes).backward()
        opt.step([p.grad.numpy() for p in model.parameters()], zero_grads=True)
        if step % 10 == 0:
            history.append((evaluate(model, points, classes)[0], evaluate(model, *validation)[0]))
            if stopping and stopping.step(history[-1][1], views):
                break
    return np.array(history)


# %%
# Six ways to train
# -----------------
#
# All with Adam at the same learning rate, from the same weights.
#
# * **Nothing** but the loss.
# * **L1** adds :math:`\lambda \lvert p \rvert` for every parameter to the loss, and :math:`\lambda
#   \operatorname{sign}(p)` to its gradient: a pull of the same strength, however small the parameter. What is not
#   needed goes to zero.
# * **L2** adds :math:`\tfrac{\lambda}{2} p^2`, and :math:`\lambda p` to the gradient: large parameters are pulled
#   harder.
# * **Decoupled weight decay** (AdamW; Loshchilov and Hutter, 2019) leaves the gradient alone and shrinks the parameter
#   itself, :math:`p \leftarrow p - \eta \lambda p`.
# * **Dropout** (Srivastava et al., 2014) sets each hidden unit to zero with probability :math:`q` in every step of the
#   training, so that none can rely on another, and divides the rest by :math:`1 - q`.
# * **Early stopping** ends the training when the validation loss has not improved for a while, and puts the parameters
#   of the best moment back in place.
#
# The rates of decay look different because they mean different things: :math:`\lambda` is multiplied by the learning
# rate in AdamW, and goes through Adam's division in L1 and L2, of which more below.

LR = 3e-3
stopping = fastopt.EarlyStopping(patience=10)
ways = {
    "nothing": (0.0, lambda views: fastopt.Adam(views, lr=LR), None),
    "L1": (0.0, lambda views: fastopt.Adam(views, lr=LR, l1=2e-3), None),
    "L2": (0.0, lambda views: fastopt.Adam(views, lr=LR, weight_decay=1e-2), None),
    "decoupled decay": (0.0, lambda views: fastopt.AdamW(views, lr=LR, weight_decay=3), None),
    "dropout": (0.7, lambda views: fastopt.Adam(views, lr=LR), None),
    "early stopping": (0.0, lambda views: fastopt.Adam(views, lr=LR), stopping),
}
models, histories, scores = {}, {}, {}
for name, (dropout, make_optimizer, stop) in ways.items():
    models[name] = network(dropout)
    histories[name] = train(models[name], make_optimizer, stopping=stop)
    scores[name] = evaluate(models[name], *test)
    trained = evaluate(models[name], points, classes)
    print(
        f"{name:15} training loss {trained[0]:.2f}, accuracy {trained[1]:.0%}; "
        f"test loss {scores[name][0]:.2f}, accuracy {scores[name][1]:.1%}"
    )

# %%
# The boundaries show it. Alone, the network draws islands around wrong labels, and is sure of them: the colours are
# saturated. Each of the others draws the two moons.

two_classes = LinearSegmentedColormap.from_list("two classes", [VERMILION, "white", BLUE])
ticks_x, ticks_y = np.linspace(-1.9, 2.7, 161), np.linspace(-1.5, 1.9, 121)
plane = torch.tensor(np.stack(np.meshgrid(ticks_x, ticks_y), axis=-1).reshape(-1, 2), dtype=torch.float32)


def picture(model):
    """Probability of the second class over the plane."""
    with torch.no_grad():
        return model(plane)[:, 0].sigmoid().reshape(len(ticks_y), len(ticks_x)).numpy()


def draw_points(panel):
    """The training samples; crosses are wrong."""
    for kind, marker in ((~wrong, "o"), (wrong, "X")):
        colours = np.where(classes[kind].numpy() > 0, BLUE, VERMILION)
        panel.scatter(
            *points[kind].numpy().T, c=colours, marker=marker, s=18, edgecolor="white", linewidth=0.5, zorder=3
        )


figure, grid = plt.subplots(2, 3, figsize=(7.2, 4.6), sharex=True, sharey=True)
for (name, model), panel in zip(models.items(), grid.flat, strict=True):
    panel.contourf(ticks_x, ticks_y, picture(model), np.linspace(0, 1, 21), cmap=two_classes, alpha=0.6)
    panel.contour(ticks_x, ticks_y, picture(model), [0.5], colors="black", linewidths=1.2)
    draw_points(panel)
    panel.set(xticks=[], yticks=[])
    panel.set_title(f"{name.capitalize()}: {scores[name][1]:.0%}")
figure.suptitle("Six ways to train the same network, and their test accuracy")
plt.show()

# %%
# When to stop
# ------------
#
# Without a brake the training loss falls on and on, but the validation loss turns after eighty steps: everything from
# there on is learning by heart. :class:`fastopt.EarlyStopping` keeps a copy of the best parameters, waits for
# ``patience`` looks without an improvement, says stop, and has put the best parameters back. The others need no such
# care: their validation loss turns late or not at all.

print(stopping)
restored = evaluate(models["early stopping"], *validation)[0]
print(f"validation loss of the restored network {restored:.4f}, best of its training {stopping.best:.4f}")

tones = dict(zip(ways, (GREY, ORANGE, GREEN, BLUE, "#CC79A7", VERMILION), strict=True))
figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.4))
looks = 10 * np.arange(1, 101)
left.plot(looks, histories["nothing"][:, 0], color=GREY, linestyle="--", label="training")
left.plot(looks, histories["nothing"][:, 1], color=GREY, label="validation")
best, stopped = 10 * (stopping.best_step + 1), 10 * (stopping.stopped_step + 1)
left.axvspan(best, stopped, color=VERMILION, alpha=0.15, linewidth=0, label="patience")
left.plot(best, stopping.best, "o", color=VERMILION, label="best, restored")
left.set(xlabel="step", title="Nothing: loss", ylim=(0, 2.4))
left.legend(loc="upper left")
for name, history in histories.items():
    right.plot(10 * np.arange(1, len(history) + 1), history[:, 1], color=tones[name], label=name, linewidth=1.4)
right.set(xlabel="step", title="Validation loss of all six", ylim=(0.3, 1.2))
right.legend(loc="upper right", ncols=2, columnspacing=1, handlelength=1.5)
figure.suptitle("What the training loss does not tell, the validation loss does")
plt.show()

# %%
# What L1 and L2 do to the weights
# --------------------------------
#
# Both make weights small, but not the same ones. L2 pulls large weights harder and small ones less and less; it prefers
# many middling weights to one large one. L1 pulls all of them alike: a weight stays only if it earns its keep. (The
# others end next to zero, not at it. A step of Adam is as long as the learning rate allows, so a weight that L1 holds
# at zero trembles around it. That the smallest weights of L2 are smaller still is Adam's doing, too: see below.)


def hidden_weights(name):
    """Sizes of the 10,000 weights between the two hidden layers, largest first."""
    return np.sort(models[name][3].weight.detach().abs().numpy().ravel())[::-1]


figure, axes = plt.subplots(figsize=(7.2, 3.2))
for name in ("nothing", "L2", "L1"):
    sizes = hidden_weights(name)
    axes.loglog(np.arange(1, len(sizes) + 1), sizes, color=tones[name], linewidth=2, label=name)
    print(f"{name:8} {np.sum(sizes > 0.01):5} of {len(sizes)} weights are above 0.01, the largest is {sizes[0]:.2f}")
axes.set(xlabel="rank of the weight", ylabel="size", ylim=(1e-5, 5))
axes.legend(loc="lower left")
axes.set_title("L1 keeps a dozen of 10,000 weights", fontweight="bold")
plt.show()

# %%
# Why decay is decoupled
# ----------------------
#
# For SGD, adding :math:`\lambda p` to the gradient and shrinking the parameter by :math:`\eta \lambda` are the same.
# For Adam they are not: what is added to the gradient gets divided by the root of its mean square, along with the rest.
# Weights with large gradients then hardly decay, and those with small ones decay all the faster. To see it without a
# network: a thousand weights of 1 whose gradients are noise of different sizes. Decoupled, all of them should shrink to
# about
#
# .. math::
#
#    (1 - \eta \lambda)^{n} = (1 - 10^{-3} \cdot 0.5)^{2000} = 0.37.

STEPS, ETA, LAMBDA = 2000, 1e-3, 0.5
noise_sizes = np.geomspace(0.1, 1000, 1000)
shrunk = {}
for name, optimizer in (("L2", fastopt.Adam), ("decoupled decay", fastopt.AdamW)):
    rng = np.random.default_rng(0)
    weights = np.ones(1000, np.float32)
    opt = optimizer(weights, lr=ETA, weight_decay=LAMBDA)
    for _ in range(STEPS):
        opt.step((rng.normal(size=1000) * noise_sizes).astype(np.float32))
    shrunk[name] = weights
    print(f"Adam, {name:15}: small gradients {weights[:100].mean():.2f}, large ones {weights[-100:].mean():.2f}")

figure, axes = plt.subplots(figsize=(7.2, 3.0))
for name, weights in shrunk.items():
    axes.semilogx(noise_sizes, weights, ".", color=tones[name], markersize=3, alpha=0.7, label=f"Adam, {name}")
axes.axhline((1 - ETA * LAMBDA) ** STEPS, color="black", linewidth=1, linestyle="--", label="the formula")
axes.set(xlabel="size of the gradients", ylabel="weight after 2,000 steps")
axes.legend(loc="upper left", markerscale=3)
axes.set_title("With L2, Adam hardly shrinks weights whose gradients are large", fontweight="bold")
plt.show()

# %%
# Dropout: on in training, off in evaluation
# ------------------------------------------
#
# Each step of the training has drawn other units to drop, so it has trained another network; all of them share their
# weights. Evaluation uses all units at once, which is about the average of these networks. Because the remaining units
# were divided by :math:`1 - q` in training, nothing needs to be rescaled. ``model.eval()`` turns dropout off, and
# forgetting it makes every answer a draw of lots.

model = models["dropout"]


def thinned(model):
    """The plane as seen by what is left of the network after one draw; the same units are dropped for all points."""
    kept = [nn.functional.dropout(torch.ones(100), 0.7) for _ in range(2)]  # 0, or 1 / (1 - 0.7)
    with torch.no_grad():
        hidden = model[3](model[0](plane).relu() * kept[0]).relu() * kept[1]
        return model[6](hidden)[:, 0].sigmoid().reshape(len(ticks_y), len(ticks_x)).numpy()


torch.manual_seed(1)
answers = {}
with torch.no_grad():
    for mode in ("training", "evaluation"):
        model.train(mode == "training")
        answers[mode] = [model(test[0]) for _ in range(2)]
        changed = ((answers[mode][0] > 0) != (answers[mode][1] > 0)).float().mean()
        print(f"{mode} mode, asked twice: {changed:.1%} of the test samples change their class")

figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.1), sharex=True, sharey=True)
for _ in range(25):
    left.contour(ticks_x, ticks_y, thinned(model), [0.5], colors="black", linewidths=0.6, alpha=0.6)
right.contourf(ticks_x, ticks_y, picture(model), np.linspace(0, 1, 21), cmap=two_classes, alpha=0.6)
right.contour(ticks_x, ticks_y, picture(model), [0.5], colors="black", linewidths=1.5)
for panel, title in ((left, "Training: 25 draws"), (right, "Evaluation: always this one")):
    draw_points(panel)
    panel.set(xticks=[], yticks=[], title=title)
figure.suptitle("Dropout trains many networks and evaluates their mean")
plt.show()
