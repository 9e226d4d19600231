r"""
When the learning rate is the problem
=====================================

The loss has stopped falling. It is tempting to conclude that the optimizer has arrived somewhere, in a minimum or at
a saddle point. More often it goes back and forth, because its steps are too long for the place where it is. This
example shows how to tell, and then three answers: rates that differ between parameters, rates that fall in the course
of the training, and rates that rise at its beginning.
"""

import matplotlib.pyplot as plt
import numpy as np
from threadpoolctl import threadpool_limits

import fastopt
from fastopt import demo
from fastopt.lr_scheduler import ConstantLR, LambdaLR, ReduceLROnPlateau, StepLR, WarmupLR

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
# The loss stands still, the gradient does not
# --------------------------------------------
#
# A valley whose walls are steep and nearly straight:
#
# .. math::
#
#    f(x, y) = \frac{x^2}{20} + \sqrt{1 + (10 y)^2} - 1.
#
# On a wall the slope is 10, wherever one stands, and a step of gradient descent is :math:`10 \eta` long. When that is
# more than the distance to the bottom, the next point lies on the other wall, and the one after that on the first
# again. The path comes to swing between :math:`y = \pm 10 \eta / 2`. There the loss does not change any more, but the
# norm of the gradient is still 10. At a critical point it would be zero: to look at it is how one tells.
#
# The norm costs nothing extra where gradients are clipped; ``max_norm=inf`` computes it and clips nothing. Here it is
# printed for a constant rate and for :class:`~fastopt.lr_scheduler.StepLR`, which multiplies the rate by 0.3 every 60
# steps. The shorter steps reach the bottom of the valley; along it they are slow, so a rate should not fall too early.


def loss(point):
    """The height at points, an array whose last axis holds x and y."""
    x, y = np.moveaxis(point, -1, 0)
    return x**2 / 20 + np.hypot(1, 10 * y) - 1


def descend(lr, make_schedule=None, steps=300):
    """The path of SGD from (-7.2, 2), and the norm of the gradient at each of its points."""
    point = np.array([-7.2, 2.0], np.float32)
    opt = fastopt.SGD(point, lr=lr)
    schedule = make_schedule and make_schedule(opt)
    path, norms = [], []
    for _ in range(steps):
        x, y = point
        info = opt.step(np.array([x / 10, 100 * y / np.hypot(1, 10 * y)], np.float32), max_norm=np.inf)
        path.append((x, y))
        norms.append(info.grad_norm)
        if schedule:
            schedule.step()
    return np.array(path), np.array(norms)


valley = {
    "constant": descend(0.25),
    "StepLR": descend(0.25, lambda opt: StepLR(opt, step_size=60, gamma=0.3)),
}
colours = {"constant": VERMILION, "StepLR": BLUE, "ReduceLROnPlateau": GREEN}
for name, (path, norms) in valley.items():
    print(f"valley, {name:8} rate: loss {loss(path[-1]):7.3f}, norm of the gradient {norms[-1]:6.3f}")

figure = plt.figure(figsize=(7.2, 5.0))
panels = figure.subplot_mosaic("AABB;AABB;CCDD;CCDD")
x, y = np.meshgrid(np.linspace(-8, 2, 101), np.linspace(-2.4, 2.4, 101))
height = loss(np.stack([x, y], axis=-1))
for (name, (path, norms)), key in zip(valley.items(), "AB", strict=True):
    panels[key].contour(x, y, height, 10, colors="0.8", linewidths=0.7)
    panels[key].plot(*path.T, "o-", color=colours[name], markersize=2.5, linewidth=0.4)
    panels[key].plot(0, 0, "*", color="black", markersize=9)
    panels[key].set(xlabel="x", ylabel="y", title=f"The path, {name}{' rate' * (name == 'constant')}")
    panels["C"].semilogy(loss(path), color=colours[name], label=name)
    panels["D"].semilogy(norms, color=colours[name])
panels["C"].set(xlabel="step", title="Loss")
panels["C"].legend(loc="lower left")
panels["D"].set(xlabel="step", title="Norm of the gradient")
figure.suptitle("Not stuck in a minimum, but bouncing between the walls")
plt.show()

# %%
# One rate for all is not enough
# ------------------------------
#
# In text or clicks, some features are there in every sample and others in one of a hundred. A rate that suits the
# frequent ones is too small for the rare, which have few occasions to learn; and a rate that falls with the number of
# steps has fallen before a rare feature is seen at all. AdaGrad (Duchi, Hazan and Singer, 2011) keeps an account for
# each parameter,
#
# .. math::
#
#    s \leftarrow s + g^2, \qquad p \leftarrow p - \frac{\eta}{\sqrt{s} + \varepsilon}\, g.
#
# What counts is how often *this* parameter had a gradient. A rare feature stands still for long, and then moves in a
# burst that is as long as a first step.
#
# Twenty features, present with probabilities from 1 down to 0.01, one sample a step. Each optimizer has the best of
# nine learning rates, chosen by other data than those shown.

FREQUENCIES = np.geomspace(1, 0.01, 20)
RARE = 18


def learn_sparse(make_optimizer, lr, make_schedule=None, seed=0, steps=1000):
    """The weights minus the true ones after every step, and where the rare feature was present."""
    rng = np.random.default_rng(seed)
    true = rng.choice([-1, 1], 20)
    w = np.zeros(20, np.float32)
    opt = make_optimizer(w, lr=lr)
    schedule = make_schedule and make_schedule(opt)
    errors, present = [], []
    for step in range(steps):
        x = rng.choice([-1, 1], 20) * (rng.random(20) < FREQUENCIES)
        residual = x @ (w - true) - rng.normal(0, 0.25)
        opt.step((residual * x).astype(np.float32))
        errors.append(w - true)
        if x[RARE]:
            present.append(step)
        if schedule:
            schedule.step()
    return np.array(errors), present


contestants = {
    "SGD": (fastopt.SGD, None, VERMILION),
    "SGD, decaying": (fastopt.SGD, lambda opt: LambdaLR(opt, lambda step: (step + 1) ** -0.5), ORANGE),
    "Adagrad": (fastopt.Adagrad, None, BLUE),
}
sparse = {}
with np.errstate(over="ignore", invalid="ignore"):  # some rates diverge
    for name, (optimizer, schedule, _) in contestants.items():
        tried = {
            lr: np.mean([abs(learn_sparse(optimizer, lr, schedule, seed)[0][-1]) for seed in (1, 2, 3)])
            for lr in np.geomspace(0.02, 2, 9)
        }
        best = min(tried, key=lambda lr: tried[lr] if np.isfinite(tried[lr]) else np.inf)
        finals = [abs(learn_sparse(optimizer, best, schedule, seed)[0][-1]) for seed in range(4, 12)]
        path, present = learn_sparse(optimizer, best, schedule)
        sparse[name] = {"lr": best, "errors": np.mean(finals, axis=0), "path": path[:, RARE]}
        print(f"{name:13} at its best rate {best:.2f}: mean error of the weights {np.mean(finals):.3f}")

figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.3))
for name, found in sparse.items():
    left.plot(abs(found["path"]), color=contestants[name][2], label=name)
    right.loglog(FREQUENCIES, found["errors"], "o-", color=contestants[name][2], markersize=4)
left.plot(present, np.full(len(present), -0.04), "|", color=GREY, markersize=8, label="the feature is present")
left.set(xlabel="step", ylabel="error of the weight")
left.set_title(f"A feature in {FREQUENCIES[RARE]:.1%} of samples")
left.legend(loc="upper right")
right.set(xlabel="frequency of the feature", title="All features, after 1,000 steps")
right.set_yticks([0.02, 0.05, 0.1, 0.2, 0.5], [0.02, 0.05, 0.1, 0.2, 0.5])
right.minorticks_off()
figure.suptitle("Adagrad gives rare features long steps when they come")
plt.show()

# %%
# Rates that fall
# ---------------
#
# Now a training. The network, its gradient and the handwritten digits are those of ``python -m fastopt demo``; one
# label in ten is wrong, so that the loss cannot become zero and mini-batches disagree. The learning rate of 0.2 is far
# too large for momentum 0.9. Two schedules mend that. StepLR follows a plan: a fifth of the rate after every ten
# epochs. :class:`~fastopt.lr_scheduler.ReduceLROnPlateau` looks at what happens: a fifth of the rate when the
# validation loss was not better than its best in more than two epochs in a row.

EPOCHS, BATCH = 30, 16
training, validation = demo.load_digits()
rng = np.random.default_rng(0)
wrong = rng.random(len(training.labels)) < 0.1
labels = np.where(wrong, rng.integers(0, 10, len(wrong)), training.labels)


@threadpool_limits.wrap(limits=1)  # several threads only delay the BLAS on matrices as small as these
def train(make_schedule):
    """After each epoch: training loss, share of recognised validation digits, learning rate, norm of the gradient."""
    rng = np.random.default_rng(1)
    params = demo.initial_parameters(seed=0, layers=(64, 100, 10))
    grads = params.zeros_like()
    opt = fastopt.SGD(params, lr=0.2, momentum=0.9)
    schedule = make_schedule and make_schedule(opt)
    history = []
    for _ in range(EPOCHS):
        for batch in rng.permutation(len(labels))[: len(labels) // BATCH * BATCH].reshape(-1, BATCH):
            demo.backward(params, demo.forward(params, training.images[batch]), labels[batch], grads)
            opt.step(grads)
        outputs = demo.forward(params, training.images)
        demo.backward(params, outputs, labels, grads)
        validation_loss, accuracy = demo.evaluate(params, validation)
        norm = np.linalg.norm(grads.flat)
        history.append((demo.cross_entropy(outputs[-1], labels), accuracy, opt.param_groups[0]["lr"], norm))
        if isinstance(schedule, ReduceLROnPlateau):
            schedule.step(validation_loss)
        elif schedule:
            schedule.step()
    return np.array(history)


histories = {
    "constant": train(None),
    "StepLR": train(lambda opt: StepLR(opt, step_size=10, gamma=0.2)),
    "ReduceLROnPlateau": train(lambda opt: ReduceLROnPlateau(opt, factor=0.2, patience=2)),
}
for name, history in histories.items():
    final_loss, accuracy, rate, norm = history[-1]
    print(f"{name:17} loss {final_loss:.2f}, accuracy {accuracy:.1%}, rate {rate:.5f}, norm of the gradient {norm:.3f}")

# %%
# With the constant rate the loss falls no further, while the gradient of the whole training set is still large: the
# sign from above. Each of the first reductions lets both fall at once. ReduceLROnPlateau goes on reducing when there is
# nothing more to be had: that does no harm, and could as well end the training.

figure, panels = plt.subplots(2, 2, figsize=(7.2, 4.6), sharex=True)
for (name, history), style in zip(histories.items(), ("-", "-", "--"), strict=True):
    for panel, values in zip(panels.flat, history.T, strict=True):
        panel.plot(np.arange(1, EPOCHS + 1), values, style, color=colours[name], label=name, linewidth=1.5)
for panel, title in zip(
    panels.flat, ("Training loss", "Validation accuracy", "Learning rate", "Norm of the gradient"), strict=True
):
    panel.set_title(title)
panels[1, 0].set_yscale("log")
panels[1, 1].set_yscale("log")
panels[1, 1].set_yticks([0.03, 0.1, 0.3, 1], [0.03, 0.1, 0.3, 1])
panels[1, 1].minorticks_off()
panels[1, 0].legend(loc="lower left")
panels[1, 0].set_xlabel("epoch")
panels[1, 1].set_xlabel("epoch")
figure.suptitle("The loss stood still because the rate was too large")
plt.show()

# %%
# Rates that rise first
# ---------------------
#
# Adam divides the mean of the gradients by the root of the mean of their squares. In its first step both are made of
# one gradient, the quotient is 1 or -1, and every parameter moves by the full :math:`\eta`, even where the gradient is
# nothing but noise. Later, noise averages out: of independent gradients with mean zero, the quotient has a root mean
# square of
#
# .. math::
#
#    \sqrt{\frac{1 - \beta_1}{1 + \beta_1}} = 0.23.
#
# So Adam takes its longest steps when it knows least. *Warm-up* multiplies the rate by a line from 0 to 1; Ma and
# Yarats (2021) suggest :math:`2 / (1 - \beta_2)` steps, here 2,000. *RAdam* (Liu et al., 2020) derives a factor from
# the variance of the second moment instead. With :math:`\rho_\infty = 2 / (1 - \beta_2) - 1` and :math:`\rho_t =
# \rho_\infty - 2 t \beta_2^t / (1 - \beta_2^t)`, from the step on at which :math:`\rho_t > 5` it is
#
# .. math::
#
#    r_t = \sqrt{\frac{(\rho_t - 4)(\rho_t - 2)\, \rho_\infty}{(\rho_\infty - 4)(\rho_\infty - 2)\, \rho_t}},
#
# and before that it steps by the mean of the gradients, undivided.


def warm_up(opt):
    """2,000 steps of warm-up, then a constant rate."""
    return WarmupLR(ConstantLR(opt, factor=1.0), warmup_steps=2000)


starts = {"Adam": (fastopt.Adam, None), "Adam, warm-up": (fastopt.Adam, warm_up), "RAdam": (fastopt.RAdam, None)}
tones = {"Adam": VERMILION, "Adam, warm-up": ORANGE, "RAdam": BLUE}


def steps_in_noise(make_optimizer, make_schedule, steps=2000):
    """Root mean square of each step over 5,000 parameters, in learning rates; gradients are noise of size 0.01."""
    rng = np.random.default_rng(0)
    p = np.zeros(5000, np.float32)
    opt = make_optimizer(p, lr=1e-3)
    schedule = make_schedule and make_schedule(opt)
    lengths = []
    for _ in range(steps):
        before = p.copy()
        opt.step(rng.normal(0, 0.01, p.size).astype(np.float32))
        lengths.append(np.sqrt(np.mean((p - before) ** 2)) / 1e-3)
        if schedule:
            schedule.step()
    return np.array(lengths)


@threadpool_limits.wrap(limits=1)
def loss_after(make_optimizer, make_schedule, lr, steps=250):
    """Mean loss of the last 50 of some steps in a network with eight hidden layers."""
    rng = np.random.default_rng(0)
    params = demo.initial_parameters(seed=0, layers=(64, *[100] * 8, 10))
    grads = params.zeros_like()
    opt = make_optimizer(params, lr=lr, n_threads=1)
    schedule = make_schedule and make_schedule(opt)
    losses = []
    for _ in range(steps):
        batch = rng.integers(0, len(labels), 32)
        outputs = demo.forward(params, training.images[batch])
        demo.backward(params, outputs, training.labels[batch], grads)
        opt.step(grads)
        losses.append(demo.cross_entropy(outputs[-1], training.labels[batch]))
        if schedule:
            schedule.step()
    return np.mean(losses[-50:])


noise = {name: steps_in_noise(*start) for name, start in starts.items()}
rates = np.geomspace(1e-3, 3e-2, 6)
ends = {name: [loss_after(*start, lr) for lr in rates] for name, start in starts.items()}
for name in starts:
    print(
        f"{name:13} noise: first step {noise[name][0]:.3f}, last {noise[name][-1]:.3f} rates; "
        f"loss {min(ends[name]):.2f} at the best rate, {ends[name][-1]:.2f} at {rates[-1]}"
    )

# %%
# On the right, what that means for a deep network: loss after 250 steps. At small rates nothing is won, and a warm-up
# as long as this one costs time. At large rates Adam's first steps do damage, and the other two forgive.

figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.3))
for name, colour in tones.items():
    left.semilogx(np.arange(1, 2001), noise[name], color=colour, label=name)
    right.loglog(rates, ends[name], "o-", color=colour, markersize=4, label=name)
left.axhline((0.1 / 1.9) ** 0.5, color=GREY, linewidth=0.8, linestyle=":")
left.annotate("0.23", (1, (0.1 / 1.9) ** 0.5), (2, 4), textcoords="offset points", color=GREY)
left.set(xlabel="step", title="Length of steps in pure noise")
right.set(xlabel="learning rate", title="Loss of a deep network")
right.legend()
figure.suptitle("Adam takes its longest steps when it knows least")
plt.show()
