r"""
Stuck, but where?
=================

When the loss stands still, the gradient is usually small. That can mean a minimum, and the end of training, or a
saddle, where the way down is only hard to see. The gradient cannot tell the two apart. The curvature can. This example
computes both for a network of two weights, leaves a saddle along the right direction, times how long each optimizer
takes to find that direction by itself, and ends with why saddles are what large networks have to expect.
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
# A network of two weights
# ------------------------
#
# One input, one hidden unit, one output: :math:`\hat y = v \tanh(w x)`. It learns :math:`y = 1.5 \tanh(1.2 x)` on 21
# points between -2 and 2, so the best weights are known: (1.2, 1.5), and (-1.2, -1.5), which is the same function.
# With the error :math:`e = v \tanh(w x) - y`, with :math:`t = \tanh(w x)` and :math:`s = (1 - t^2)\, x`, its
# derivative by :math:`w`, and with means over the points written as :math:`\langle \cdot \rangle`,
#
# .. math::
#
#    L = \tfrac{1}{2} \langle e^2 \rangle, \qquad
#    \nabla L = \begin{pmatrix} \langle e v s \rangle \\ \langle e t \rangle \end{pmatrix}, \qquad
#    \nabla^2 L = \begin{pmatrix}
#        \langle v^2 s^2 - 2 e v t s x \rangle & \langle v s t + e s \rangle \\
#        \langle v s t + e s \rangle & \langle t^2 \rangle
#    \end{pmatrix}.

x = np.linspace(-2, 2, 21)
y = 1.5 * np.tanh(1.2 * x)


def parts(weights):
    """The error, the hidden unit's output and the derivative of that by w."""
    w, v = np.asarray(weights, np.float64)
    t = np.tanh(w * x)
    return v * t - y, t, (1 - t * t) * x


def loss(weights):
    error, _, _ = parts(weights)
    return np.mean(error**2) / 2


def gradient(weights):
    error, t, s = parts(weights)
    return np.array([np.mean(error * weights[1] * s), np.mean(error * t)])


def hessian(weights):
    error, t, s = parts(weights)
    v = weights[1]
    mixed = np.mean(v * s * t + error * s)
    return np.array([[np.mean(v * v * s * s - 2 * error * v * t * s * x), mixed], [mixed, np.mean(t * t)]])


# %%
# Where the gradient is zero
# --------------------------
#
# Descent finds minima only. Newton's method for :math:`\nabla L = 0`, which is :math:`p \leftarrow p - (\nabla^2
# L)^{-1} \nabla L`, is drawn to every point where the gradient vanishes. From a grid of starts it finds three. What
# they are, the eigenvalues of the Hessian say. Along an eigenvector with eigenvalue :math:`\lambda` the loss is
# :math:`L + \frac{1}{2} \lambda d^2` at the small distance :math:`d`:
#
# * all eigenvalues positive: up in every direction, a **minimum**;
# * some positive, some negative: up here and down there, a **saddle**;
# * all negative: a **maximum**.

points = []
for start in np.stack(np.meshgrid(np.linspace(-3, 3, 13), np.linspace(-3, 3, 13)), axis=-1).reshape(-1, 2):
    point = start
    for _ in range(60):
        point = point - np.linalg.lstsq(hessian(point), gradient(point), rcond=1e-12)[0]
        if np.abs(point).max() > 5:
            break
    else:
        if np.linalg.norm(gradient(point)) < 1e-12 and all(np.linalg.norm(point - other) > 1e-6 for other in points):
            points.append(point + 0.0)
points.sort(key=lambda point: point[0])

kinds = []
print(f"{'w':>6}{'v':>6}{'loss':>8}{'|gradient|':>12}   eigenvalues      kind")
for point in points:
    values = np.linalg.eigvalsh(hessian(point))
    kinds.append("minimum" if (values > 0).all() else "maximum" if (values < 0).all() else "saddle")
    numbers = f"{point[0]:6.2f}{point[1]:6.2f}{loss(point):8.3f}{np.linalg.norm(gradient(point)):12.0e}"
    print(f"{numbers}   {values[0]:6.3f} {values[1]:6.3f}    {kinds[-1]}")

# %%
# On the left the loss along the line from one minimum to the other, on the right its contours. The arrows say where
# descent goes near the saddle: towards it where the eigenvalue is positive, away from it where that is negative.

heights = np.vectorize(lambda w, v: loss((w, v)))
saddle = points[kinds.index("saddle")]
values, vectors = np.linalg.eigh(hessian(saddle))
down = vectors[:, 0] * np.sign(vectors[0, 0])

figure = plt.figure(figsize=(7.2, 3.6))
left = figure.add_subplot(1, 2, 1, projection="3d")
along, across = np.meshgrid(np.linspace(-3.1, 3.1, 80), np.linspace(-0.75, 0.75, 40))
w_axis, v_axis = along * down[0] + across * down[1], along * down[1] - across * down[0]
left.plot_surface(w_axis, v_axis, heights(w_axis, v_axis), cmap="cividis", linewidth=0, rcount=80, ccount=80)
left.view_init(elev=32, azim=-60)
left.set(xlabel="w", ylabel="v", zlabel="loss", xticks=[-2, 0, 2], yticks=[-2, 0, 2], zticks=[0, 0.5, 1])
left.set_box_aspect((1, 1, 0.7), zoom=0.9)
right = figure.add_subplot(1, 2, 2)
w_axis, v_axis = np.meshgrid(np.linspace(-2.4, 2.4, 97), np.linspace(-2.4, 2.4, 97))
height = heights(w_axis, v_axis)
levels = [0.01, 0.04, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.68, 0.76, 0.9, 1.2, 1.6, 2.2, 3, 4]


def draw_contours(panel):
    """Contours of the loss, and a mark for every critical point: stars for minima, a cross for the saddle."""
    panel.contour(w_axis, v_axis, height, levels=levels, colors="0.75", linewidths=0.7)
    for point, kind in zip(points, kinds, strict=True):
        panel.plot(*point, "*" if kind == "minimum" else "X", color="black", markersize=11 if kind == "minimum" else 8)
    panel.set(xlabel="w", ylabel="v", aspect="equal", xlim=(-2.4, 2.4), ylim=(-2.4, 2.4))


draw_contours(right)
for value, vector in zip(values, vectors.T, strict=True):
    for side in (1, -1):
        tip = saddle + side * 0.75 * vector
        ends = (tip, saddle) if value < 0 else (saddle, tip)
        arrow = {"arrowstyle": "-|>", "linewidth": 2, "color": VERMILION if value < 0 else BLUE, "shrinkB": 6}
        right.annotate("", *ends, arrowprops=arrow)
box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"}
right.text(0.55, 0.2, "λ < 0: away", color=VERMILION, fontweight="bold", bbox=box)
right.text(0.3, -0.85, "λ > 0: towards", color=BLUE, fontweight="bold", bbox=box)
figure.suptitle("Between two minima lies a saddle, where the gradient is zero as well", fontsize=10.5)

# %%
# Off the saddle
# --------------
#
# At the saddle itself the gradient is exactly zero, and no optimizer moves. All of fastopt's are tried, 100 steps
# each.

moved = []
for name in fastopt.optimizers.__all__:
    weights = np.zeros(2, np.float32)
    opt = getattr(fastopt, name)(weights)
    for _ in range(100):
        opt.step(gradient(weights).astype(np.float32))
    if weights.any():
        moved.append(name)
print(f"\nOf {len(fastopt.optimizers.__all__)} optimizers that start at the saddle, {len(moved)} move.")

# %%
# The eigenvector of the negative eigenvalue is the way out. A nudge of 0.01 along it is enough, and its sign decides
# in which minimum the descent ends.


def descend(name, start, steps, **hyperparameters):
    """The path of the optimizer `name` of fastopt: an array of steps + 1 pairs of weights."""
    weights = np.array(start, np.float32)
    opt = getattr(fastopt, name)(weights, **hyperparameters)
    path = [weights.copy()]
    for _ in range(steps):
        opt.step(gradient(weights).astype(np.float32))
        path.append(weights.copy())
    return np.array(path)


ways = {sign: descend("SGD", saddle + sign * 0.01 * down, 600, lr=0.1) for sign in (1, -1)}
print("\nSGD after a nudge along the eigenvector of the negative eigenvalue:")
for sign, path in ways.items():
    print(f"  {sign * 0.01:+.2f} ends at ({path[-1, 0]:+.3f}, {path[-1, 1]:+.3f}), loss {loss(path[-1]):.6f}")

# %%
# On the way the gradient is small twice: at the start, because of the saddle, and at the end, because of the minimum.
# What tells the two apart is the smallest eigenvalue of the Hessian, which is negative at first and positive in the
# end.

way = ways[1][:201]
sizes = [np.linalg.norm(gradient(weights)) for weights in way]
smallest = np.array([np.linalg.eigvalsh(hessian(weights))[0] for weights in way])

figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.5), width_ratios=(1, 1.15))
draw_contours(left)
for path in ways.values():
    left.plot(*path.T, color=VERMILION, linewidth=2)
left.set_title("Two nudges, two minima")
right.axhline(0, color="0.7", linewidth=0.8)
right.plot(sizes, color=GREY, label="size of the gradient")
right.plot(np.where(smallest < 0, smallest, np.nan), color=VERMILION, label="smallest eigenvalue, negative")
right.plot(np.where(smallest > 0, smallest, np.nan), color=BLUE, label="positive")
right.set(xlabel="step", title="The gradient is small twice")
right.legend(loc="lower right")

# %%
# How long the saddle holds
# -------------------------
#
# Nobody starts exactly at a saddle, but everyone who draws small initial weights starts near this one. Close to it
# only the distance :math:`d` along the eigenvector of the negative eigenvalue :math:`-\lambda` matters, and a step of
# gradient descent makes it larger by a constant factor. With momentum :math:`\mu` two distances count, and the factor
# is the larger root of a quadratic equation:
#
# .. math::
#
#    d_{t+1} = (1 + \gamma \lambda)\, d_t, \qquad\qquad
#    d_{t+1} = (1 + \mu + \gamma \lambda)\, d_t - \mu\, d_{t-1}
#    \;\Rightarrow\; r = \tfrac{1}{2} \left( b + \sqrt{b^2 - 4 \mu} \right), \; b = 1 + \mu + \gamma \lambda .
#
# Either way the distance grows exponentially, and the time to leave grows only with the logarithm of how close the
# start was: hence the plateau, and the sudden fall at its end. What momentum does is to make the factor much larger:
# pushes in the same direction add up. Optimizers that divide by the size of the gradient do not feel the saddle at
# all: a small gradient gives a step as long as a large one.

CURVATURE = -values[0]
START = np.array([2e-4, -1e-4])
runs = {
    "SGD": {"lr": 0.02},
    "Momentum": {"lr": 0.02, "momentum": 0.9},
    "Nesterov": {"lr": 0.02, "momentum": 0.9},
    "RMSprop": {"lr": 0.02},
    "Adam": {"lr": 0.02},
}
growth = {"SGD": 1 + 0.02 * CURVATURE}
b = 1 + 0.9 + 0.02 * CURVATURE
growth["Momentum"] = (b + (b * b - 4 * 0.9) ** 0.5) / 2

escapes = {name: descend(name, START, 600, **hyperparameters) for name, hyperparameters in runs.items()}
left_after = {}
print(f"\nfrom ({START[0]}, {START[1]}), all with lr 0.02   leaves after   factor found   predicted")
for name, path in escapes.items():
    distance = np.abs((path - saddle) @ down)
    left_after[name] = int(np.argmax(distance > 0.5))
    line = f"{name:45}{left_after[name]:7} steps"
    if name in growth:
        near = slice(int(np.argmax(distance > 1e-3)), int(np.argmax(distance > 1e-1)))
        found = (distance[near][-1] / distance[near][0]) ** (1 / (len(distance[near]) - 1))
        line += f"{found:15.4f}{growth[name]:12.4f}"
    print(line)

# %%

COLOURS = {"SGD": VERMILION, "Momentum": BLUE, "Nesterov": "#56B4E9", "RMSprop": PURPLE, "Adam": GREEN}
figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.4))
for name, path in escapes.items():
    left.plot([loss(weights) for weights in path], color=COLOURS[name], label=name)
    right.plot(np.abs((path - saddle) @ down), color=COLOURS[name])
for name, factor in growth.items():
    distance = np.abs((escapes[name] - saddle) @ down)
    steps = np.arange(left_after[name] + 1)
    half = left_after[name] // 2
    right.plot(steps, distance[half] * factor ** (steps - half), color="black", linestyle=":", zorder=3)
left.set(xlabel="step", ylabel="loss", xlim=(0, 450), title="A plateau, then a sudden fall")
right.set(xlabel="step", ylabel="distance along the way out", yscale="log", xlim=(0, 450), ylim=(2e-5, 5))
right.set_title("Growth by a constant factor (dotted)")
left.legend(loc="center", bbox_to_anchor=(0.5, 0.5))

# %%
# The more weights, the more saddles
# ----------------------------------
#
# With two weights a saddle is one of three critical points. With many weights nearly all critical points are saddles.
# A model shows why (Bray and Dean, 2007; Dauphin et al., 2014): let every weight have a curvature of 1 of its own, and
# every pair of weights a random curvature in common, normal with standard deviation :math:`\sigma = 0.3`. In few
# dimensions the curvature of its own wins and all eigenvalues are positive. But the eigenvalues of the random part
# spread over :math:`\pm 2 \sigma \sqrt{N}`, along Wigner's semicircle; with growing :math:`N` more and more of them
# fall below -1 and stay negative after 1 is added. In the limit the share of negative eigenvalues is
#
# .. math::
#
#    \frac{1}{2} - \frac{1}{\pi} \left( u \sqrt{1 - u^2} + \arcsin u \right), \qquad
#    u = \frac{1}{2 \sigma \sqrt{N}} \le 1 ,
#
# which goes to one half: half of all directions lead down. A minimum needs all of them to lead up.

SIGMA = 0.3
rng = np.random.default_rng(0)
dimensions = [1, 2, 3, 4, 6, 8, 12, 16, 32, 128]
share, chance = [], []
for n in dimensions:
    trials = max(20, min(4000, 40000 // n**2))
    noise = rng.normal(0, SIGMA / 2**0.5, (trials, n, n))
    eigenvalues = np.linalg.eigvalsh(np.eye(n) + noise + noise.transpose(0, 2, 1))
    share.append(np.mean(eigenvalues < 0))
    chance.append(np.mean((eigenvalues > 0).all(axis=1)))

# %%
# A model is not a network. So here are the Hessians of real ones: 4 inputs, 1 to 32 hidden units with tanh, one
# output, random weights, mean squared error to the output of another random network, differentiated numerically. The
# size of the share differs, the direction does not.


def negative_share(units, rng):
    """The share of negative eigenvalues in the Hessian of a network with that many hidden units, at random weights."""
    inputs = rng.standard_normal((200, 4))
    targets = np.tanh(inputs @ rng.normal(0, 0.5, (4, 8))) @ rng.normal(0, 0.7, 8)

    def gradient(weights):
        first, second = weights[: 4 * units].reshape(4, units), weights[4 * units :]
        hidden = np.tanh(inputs @ first)
        error = (hidden @ second - targets) / len(targets)
        back = inputs.T @ (error[:, None] * second * (1 - hidden**2))
        return np.concatenate([back.ravel(), hidden.T @ error])

    weights = np.concatenate([rng.normal(0, 0.5, 4 * units), rng.normal(0, units**-0.5, units)])
    steps = 1e-5 * np.eye(len(weights))
    rows = np.array([(gradient(weights + step) - gradient(weights - step)) / 2e-5 for step in steps])
    return np.mean(np.linalg.eigvalsh((rows + rows.T) / 2) < 0)


widths = [1, 2, 4, 8, 16, 32]
in_networks = [np.mean([negative_share(units, rng) for _ in range(40)]) for units in widths]

print("\nshare of negative eigenvalues, and how often there is none, with the number of weights")
for n, mean, alone in zip(dimensions, share, chance, strict=True):
    print(f"{n:6} weights, random matrix:{mean:7.3f}{alone:8.3f}")
for units, mean in zip(widths, in_networks, strict=True):
    print(f"{5 * units:6} weights, network:      {mean:7.3f}")

# %%

figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.3))
many = np.geomspace(1 / (4 * SIGMA**2), 200, 200)
u = 1 / (2 * SIGMA * np.sqrt(many))
left.plot(many, 0.5 - (u * np.sqrt(1 - u * u) + np.arcsin(u)) / np.pi, color=BLUE, linewidth=1, label="its limit")
left.plot(dimensions, share, "o", color=BLUE, markersize=5, label="random matrix")
left.plot([5 * units for units in widths], in_networks, "s", color=VERMILION, markersize=5, label="network")
left.axhline(0.5, color="0.7", linewidth=0.8, linestyle="--")
left.set(xlabel="weights", xscale="log", ylim=(-0.02, 0.6), title="Share of negative eigenvalues")
left.legend(loc="lower right")
right.bar(np.arange(len(dimensions)), chance, color=BLUE, width=0.7)
right.set_xticks(np.arange(len(dimensions)), dimensions)
right.set(xlabel="weights", ylim=(0, 1.05), title="Chance that no direction leads down")
figure.suptitle("With more weights, more directions lead down, and minima become rare", fontsize=10.5)
plt.show()

# %%
# That is good news. A critical point of high loss is almost certainly a saddle, and saddles can be left: by the noise
# of small batches, which pushes off the point of balance, and by momentum or rates per coordinate, which make the most
# of a small push.
