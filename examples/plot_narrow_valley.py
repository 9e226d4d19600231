r"""
A narrow valley
===============

Most of what separates one optimizer from another shows on the simplest surface there is: a bowl that is much steeper
one way than the other. This example looks at the bowl, at what its gradients say and do not say, and then sends every
optimizer of fastopt down the same slope.
"""

import matplotlib.pyplot as plt
import numpy as np

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

# %%
# The valley
# ----------
#
# .. math::
#
#    f(x, y) = \frac{x^2}{20} + y^2, \qquad
#    \nabla f(x, y) = \begin{pmatrix} x / 10 \\ 2 y \end{pmatrix}, \qquad
#    \nabla^2 f = \begin{pmatrix} 1/10 & 0 \\ 0 & 2 \end{pmatrix}.
#
# Its only minimum is the origin. The curvature is 2 across the valley and 1/10 along it. The ratio of the two, here
# 20, is the *condition number*: it says how narrow the valley is.

START = (-7.2, 2.0)


def f(points):
    """The height at `points`, an array whose last axis holds x and y."""
    x, y = np.moveaxis(np.asarray(points, np.float64), -1, 0)
    return x**2 / 20 + y**2


def gradient(point):
    """The gradient at one point, an array of x and y."""
    return point * np.array([0.1, 2.0], point.dtype)


x, y = np.meshgrid(np.linspace(-10, 10, 161), np.linspace(-3.2, 3.2, 81))
height = f(np.stack([x, y], axis=-1))
levels = np.geomspace(0.02, 12, 12)

figure = plt.figure(figsize=(7.2, 3.7))
panel = figure.add_subplot(projection="3d")
panel.plot_surface(x, y, height, cmap="cividis", linewidth=0, rcount=80, ccount=80)
panel.contour(x, y, height, levels=levels[levels < 5], offset=-5, cmap="cividis", linewidths=1)
panel.set(xlabel="x", ylabel="y", zlim=(-5, 15), zticks=[0, 5, 10, 15], yticks=[-3, 0, 3])
panel.set_box_aspect((2.2, 1.1, 1), zoom=1.35)
panel.view_init(elev=26, azim=-62)
figure.suptitle("A bowl twenty times as curved across as along", x=0.02, horizontalalignment="left", fontsize=10.5)

# %%
# The gradient points across the valley
# -------------------------------------
#
# Arrows show the negative gradient, the direction in which the surface falls fastest. They stand at right angles to
# the contours, and almost everywhere that means: towards the bottom line of the valley, not towards the minimum.

start = np.array(START)
downhill, homeward = -gradient(start), -start
cosine = downhill @ homeward / np.linalg.norm(downhill) / np.linalg.norm(homeward)
angle = np.degrees(np.arccos(cosine))
print(f"At {START} the direction of steepest descent misses the minimum by {angle:.0f} degrees.")

figure, panel = plt.subplots(figsize=(7.2, 3.1))
panel.contour(x, y, height, levels=levels, colors="0.75", linewidths=0.8)
coarse_x, coarse_y = np.meshgrid(np.linspace(-9, 9, 19), np.linspace(-2.8, 2.8, 9))
arrows = {"angles": "xy", "scale_units": "xy", "scale": 7, "width": 0.0026, "color": "#7FB2D9"}
panel.quiver(coarse_x, coarse_y, -coarse_x / 10, -2 * coarse_y, **arrows)
arrow = {"arrowstyle": "-|>", "linewidth": 2.2, "mutation_scale": 14, "shrinkA": 0, "shrinkB": 0}
for direction, colour in [(downhill, VERMILION), (homeward, GREEN)]:
    tip = start + 2 * direction / np.linalg.norm(direction)
    panel.annotate("", tip, start, arrowprops={**arrow, "color": colour})
box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"}
panel.text(-8.2, -0.5, "steepest descent", color=VERMILION, fontweight="bold", bbox=box)
panel.text(-5.1, 1.35, "to the minimum", color=GREEN, fontweight="bold", bbox=box)
panel.plot(*START, "o", color="black", markersize=5)
panel.plot(0, 0, "*", color="black", markersize=11)
panel.set(xlabel="x", ylabel="y", aspect="equal", title="Steepest descent is not the way to the minimum")

# %%
# Why plain gradient descent zigzags
# ----------------------------------
#
# A step of gradient descent with learning rate :math:`\gamma` multiplies each coordinate by a constant:
#
# .. math::
#
#    x_{t+1} = \left(1 - \tfrac{\gamma}{10}\right) x_t, \qquad y_{t+1} = (1 - 2 \gamma)\, y_t .
#
# At :math:`\gamma = 0.9` the factors are 0.91 and -0.8. The second is negative, so every step lands on the other side
# of the valley: that is the zigzag. No learning rate cures it. Above 1 the second factor is below -1 and the path
# leaves the valley; below 1/2 there is no zigzag, but the first factor is so close to 1 that the path crawls.
#
# Four optimizers, four ways to deal with that. Their learning rates are those at which the habit of each shows best:
#
# * **SGD** is gradient descent as above.
# * **Momentum** adds up gradients like a ball that rolls: pushes across the valley cancel, pushes along it accumulate.
# * **Adagrad** divides each coordinate by the root of the sum of its squared gradients. The steep coordinate is damped
#   at once; but the sum only grows, so the steps shrink.
# * **Adam** divides a running mean of the gradient by the root of a running mean of its square. Its first step is
#   :math:`\gamma` long in each coordinate, however steep.


def descend(name, steps=30, **hyperparameters):
    """The path of the optimizer `name` of fastopt from `START`: an array of steps + 1 points."""
    point = np.array(START, np.float32)
    opt = getattr(fastopt, name)(point, **hyperparameters)
    path = [point.copy()]
    for _ in range(steps):
        opt.step(gradient(point))
        path.append(point.copy())
    return np.array(path)


def draw_path(panel, path, colour):
    """The contours and a path over them, a point a step."""
    panel.contour(x, y, height, levels=levels, colors="0.8", linewidths=0.6)
    panel.plot(*path.T, "o-", color=colour, linewidth=1.2, markersize=2.8)
    panel.plot(0, 0, "*", color="black", markersize=8, zorder=3)
    panel.set(xlim=(-8.4, 4.6), ylim=(-2.4, 2.4), aspect="equal")


four = {"SGD": 0.9, "Momentum": 0.1, "Adagrad": 1.5, "Adam": 0.3}
habits = ["zigzags", "rolls past the minimum", "takes ever shorter steps", "turns into the valley"]
paths = {name: descend(name, lr=lr) for name, lr in four.items()}
figure, grid = plt.subplots(2, 2, figsize=(7.2, 3.6), sharex=True, sharey=True)
for (name, path), habit, colour, panel in zip(
    paths.items(), habits, [VERMILION, BLUE, GREEN, PURPLE], grid.flat, strict=True
):
    draw_path(panel, path, colour)
    panel.set_title(f"{name} {habit} (lr {four[name]})")

# %%
# The habits can be counted. A *turn* is a step that lands on the other side of the valley, where y has the other sign.


def turns(path):
    """How often y changes its sign."""
    return int(np.sum(path[1:, 1] * path[:-1, 1] < 0))


print(f"\n{'30 steps of':12}{'lr':>6}{'turns':>7}{'first step':>12}{'last step':>11}{'f at the end':>14}")
for name, path in paths.items():
    lengths = np.linalg.norm(np.diff(path, axis=0), axis=1)
    print(f"{name:12}{four[name]:6}{turns(path):7}{lengths[0]:12.3f}{lengths[-1]:11.3f}{f(path[-1]):14.5f}")

# %%
# How much momentum can gain
# --------------------------
#
# On a quadratic the best constants are known. With the smallest and largest curvature :math:`\mu` and :math:`L` and
# :math:`\kappa = L / \mu`, gradient descent is fastest at :math:`\gamma = 2 / (\mu + L)`; with momentum the best pair
# is Polyak's (1964):
#
# .. math::
#
#    \gamma = \frac{4}{(\sqrt{L} + \sqrt{\mu})^2}, \qquad
#    \text{momentum} = \left( \frac{\sqrt{\kappa} - 1}{\sqrt{\kappa} + 1} \right)^2 .
#
# In the long run the distance to the minimum then shrinks by :math:`(\kappa - 1) / (\kappa + 1)` a step without
# momentum and by :math:`(\sqrt{\kappa} - 1) / (\sqrt{\kappa} + 1)` with it. Narrow valleys are where the root makes
# the difference.

flattest, steepest = 0.1, 2.0
root = (steepest / flattest) ** 0.5
plain = descend("SGD", lr=2 / (flattest + steepest))
polyak = descend("Momentum", lr=4 / (steepest**0.5 + flattest**0.5) ** 2, momentum=((root - 1) / (root + 1)) ** 2)
print("\nWith the best constants, 30 steps bring the distance from the minimum down to")
for name, path, factor in [
    ("SGD", plain, (root**2 - 1) / (root**2 + 1)),
    ("Momentum", polyak, (root - 1) / (root + 1)),
]:
    print(f"{np.linalg.norm(path[-1]):9.1e} with {name}; each step shrinks it by {factor:.3f} in the long run.")

# %%
# Every optimizer
# ---------------
#
# Learning rates of different optimizers mean different things, so the same number for all would be no comparison. Here
# each gets the one that is best for it: of 61 from 0.001 to 1,000, evenly spaced on a logarithmic scale, the one with
# the lowest mean height along its own path. All other hyperparameters are the defaults.

rates = np.geomspace(1e-3, 1e3, 61)
best = {}
with np.errstate(over="ignore", invalid="ignore"):  # at some of the rates a path leaves the valley for good
    for name in fastopt.optimizers.__all__:
        tried = [descend(name, lr=rate) for rate in rates]
        scores = np.array([f(path).mean() for path in tried])
        best[name] = rates[np.nanargmin(scores)], tried[np.nanargmin(scores)]

ranking = sorted(best, key=lambda name: f(best[name][1]).mean())
print(f"\n{'optimizer':12}{'best lr':>9}{'mean f':>9}{'f at the end':>14}")
for name in ranking:
    rate, path = best[name]
    print(f"{name:12}{rate:9.3g}{f(path).mean():9.3f}{f(path[-1]):14.2e}")

columns = 4
rows = -(-len(best) // columns)
figure, grid = plt.subplots(rows, columns, figsize=(7.2, 0.4 + 1.02 * rows), sharex=True, sharey=True)
for panel in grid.flat[len(best) :]:
    panel.set_visible(False)
for name, panel in zip(ranking, grid.flat, strict=False):
    rate, path = best[name]
    draw_path(panel, path, BLUE)
    panel.set_title(f"{name}, lr {rate:.3g}", fontsize=9)
    panel.set(xticks=[], yticks=[])
    panel.spines[:].set(visible=True, color="0.8")
figure.suptitle("Every optimizer at its best learning rate, lowest mean height first", fontsize=10.5)
plt.show()

# %%
# Those that divide each coordinate by the size of its own gradients lead: to them the valley is almost round. SGD
# zigzags at its best rate, too, and ASGD follows it (what it averages is beside the path). The momentum of 0.9 that is
# the usual default is too much for 30 steps: those balls are still rolling about. RAdam starts with five steps of
# plain momentum, at a rate that suits the later ones, and leaves the picture.
#
# Do not read the order as a ranking of optimizers. There is no noise here, the valley lies along the axes, which is
# what a rate per coordinate needs, and there are two parameters. :doc:`plot_which_optimizer` asks again on real data.
