r"""
Classes and pictures
====================

Two questions that come up with every classifier of pictures. In which numbers does a network say "this is a seven",
and what is its loss? And why do its layers look at small patches instead of at everything? The first is answered with
two weights and error surfaces, the second with two PyTorch networks that read the same handwritten digits.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import fastopt

torch.set_num_threads(1)  # in networks as small as these, several threads only wait for each other
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
# One-hot and softmax
# -------------------
#
# A class is a name, not a quantity: a four is not halfway between a three and a five, and a network that answered with
# one number would have to say "four" when it hesitates between those two. So the label becomes a vector with a place
# for every class, which is *one-hot*: zero but for a one at the place of the class. The network answers with as many
# numbers :math:`z_k`, its *logits*, and softmax turns them into probabilities, which are positive and add up to one:
#
# .. math::
#
#    p_k = \frac{e^{z_k}}{\sum_j e^{z_j}}.

classes = ("cat", "dog", "bird")
one_hot = np.eye(3)[classes.index("dog")]
z = np.array([1.0, 3.0, 0.5])
p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()  # less the largest: the same quotient, and nothing overflows
for row in zip(classes, one_hot, z, p, strict=True):
    print("{:5} one-hot {:.0f}, logit {:4.1f}, probability {:.3f}".format(*row))

# %%
# Mean square or cross-entropy
# ----------------------------
#
# How far are the probabilities :math:`p` from the one-hot vector :math:`y`? Two candidates, and their derivatives with
# respect to a logit:
#
# .. math::
#
#    L_{\text{MSE}} = \frac{1}{2} \sum_k (p_k - y_k)^2, \quad
#    \frac{\partial L_{\text{MSE}}}{\partial z_k} = p_k \Bigl( (p_k - y_k) - \sum_j p_j (p_j - y_j) \Bigr);
#    \qquad
#    L_{\text{CE}} = -\sum_k y_k \log p_k, \quad
#    \frac{\partial L_{\text{CE}}}{\partial z_k} = p_k - y_k .
#
# The logarithm of cross-entropy undoes the exponential function of softmax, and what remains is the plain difference.
# The mean square keeps the slope of softmax, which vanishes wherever one probability is nearly one, be it that of the
# wrong class. There the network is most wrong and learns nothing.
#
# For two classes everything depends on the difference of the logits, here called :math:`z`, in favour of the right
# class.

z = np.linspace(-8, 8, 321)
p = 1 / (1 + np.exp(-z))
curves = {"mean square": ((1 - p) ** 2, -2 * p * (1 - p) ** 2, VERMILION), "cross-entropy": (-np.log(p), p - 1, BLUE)}
figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.9))
for name, (loss, slope, colour) in curves.items():
    left.plot(z, loss, color=colour, label=name)
    right.plot(z, slope, color=colour)
for panel, title in ((left, "Loss"), (right, "Its derivative")):
    panel.axvspan(-8, -4, color=GREY, alpha=0.12, linewidth=0)
    panel.set(xlabel="z, in favour of the right class", title=title, xlim=(-8, 8), xticks=[-8, -4, 0, 4, 8])
left.text(-6, 1.7, "sure and\nwrong", color=GREY, ha="center")
left.legend()
figure.suptitle("Where the answer is sure and wrong, only cross-entropy has a slope")
plt.show()

# %%
# The same as surfaces over two weights. Two clouds of points, one per class, and the simplest network there is,
# :math:`z = w_1 x_1 + w_2 x_2`. Both losses have their minimum in about the same direction, but cross-entropy is a
# bowl: its second derivatives are nowhere negative. The mean square is a terrace: flat at the height of guessing
# everything wrong, flat again at the bottom, and a slope between them. From the same start, with the same learning rate
# and number of steps, one path arrives and the other hardly leaves.

rng = np.random.default_rng(3)
points = np.concatenate([rng.normal(c, 1.0, (40, 2)) for c in ([1.0, 0.7], [-1.0, -0.7])])
sign = np.repeat([1.0, -1.0], 40)  # the class: z counts for the first and against the second
START, STEPS, LR = (-9.0, -6.0), 150, 1.0


def loss_and_gradient(name, w):
    """Mean over the points, for weights of shape (..., 2); the gradient has the shape of the weights."""
    x = points * sign[:, None]
    margin = np.clip(np.asarray(w, np.float64) @ x.T, -500, 500)
    p = 1 / (1 + np.exp(-margin))
    loss, slope = (
        (np.logaddexp(0, -margin), p - 1) if name == "cross-entropy" else ((1 - p) ** 2, -2 * p * (1 - p) ** 2)
    )
    return loss.mean(axis=-1), slope @ x / len(x)


def least_curvature(name, w, h=1e-3):
    """The smaller eigenvalue of the matrix of second derivatives, from differences of gradients."""
    columns = [loss_and_gradient(name, w + h * e)[1] - loss_and_gradient(name, w - h * e)[1] for e in np.eye(2)]
    return np.linalg.eigvalsh(np.stack(columns, axis=-1) / (2 * h))[..., 0]


def descend(name):
    """The weights after every step of SGD."""
    w = np.array(START, np.float32)
    opt = fastopt.SGD(w, lr=LR)
    path = [w.copy()]
    for _ in range(STEPS):
        opt.step(loss_and_gradient(name, w)[1].astype(np.float32))
        path.append(w.copy())
    return np.array(path)


losses = {"mean square": VERMILION, "cross-entropy": BLUE}
paths = {name: descend(name) for name in losses}
ticks = np.linspace(-12, 12, 97)
plane = np.stack(np.meshgrid(ticks, ticks), axis=-1)
figure = plt.figure(figsize=(7.2, 6.6))
for k, (name, colour) in enumerate(losses.items()):
    height = loss_and_gradient(name, plane)[0]
    way = loss_and_gradient(name, paths[name])[0]
    surface = figure.add_subplot(2, 2, k + 1, projection="3d")
    surface.plot_surface(
        *np.moveaxis(plane, -1, 0), height, cmap="cividis", rcount=60, ccount=60, alpha=0.85, linewidth=0
    )
    surface.plot(*paths[name].T, way, "o-", color=colour, markersize=2, zorder=10)
    surface.view_init(elev=28, azim=-60)
    surface.set(xlabel="$w_1$", ylabel="$w_2$", xticks=[-10, 0, 10], yticks=[-10, 0, 10])
    surface.set_title(name.capitalize(), y=0.98)
    surface.set_box_aspect((1, 1, 0.7), zoom=1.0)
    panel = figure.add_subplot(2, 2, k + 3)
    panel.contourf(*np.moveaxis(plane, -1, 0), height, 20, cmap="cividis")
    panel.plot(*paths[name].T, "o-", color="white", markersize=4, linewidth=1)
    panel.plot(*paths[name].T, "o-", color=colour, markersize=2.5, linewidth=1)
    panel.set(xlabel="$w_1$", ylabel="$w_2$", aspect="equal", title=f"loss after {STEPS} steps: {way[-1]:.2f}")
    steepness = np.linalg.norm(loss_and_gradient(name, START)[1])
    print(
        f"{name:13} slope at the start {steepness:.4f}, loss {way[0]:5.2f} -> {way[-1]:.3f}, "
        f"least curvature anywhere {least_curvature(name, plane).min():7.4f}"
    )
figure.suptitle("Cross-entropy is a bowl, the mean square a terrace")
plt.show()

# %%
# What a convolution sees
# -----------------------
#
# A dense layer multiplies every pixel with a weight of its own. It has to learn anew what a stroke is at every place,
# and would work as well if all pixels were shuffled. A convolution uses three facts about pictures:
#
# * What matters is near: an output looks at a patch of :math:`k \times k` pixels only.
# * The same thing may be anywhere: all places *share the weights* of one small filter.
# * Larger things consist of smaller ones: layers on top of each other see more and more, their *receptive field* grows.
#
# With padding :math:`p` (zeros around the edge) and stride :math:`s` (only every :math:`s`-th place), :math:`n` pixels
# become
#
# .. math::
#
#    \left\lfloor \frac{n + 2p - k}{s} \right\rfloor + 1, \qquad \text{and one output of layer } l \text{ sees } \quad
#    r_l = r_{l-1} + (k_l - 1) \prod_{i<l} s_i, \quad r_0 = 1,
#
# pixels each way.

print("pixels  filter  padding  stride  outputs")
for n, k, padding, stride in ((12, 3, 0, 1), (12, 3, 1, 1), (12, 3, 1, 2), (12, 5, 2, 2), (12, 2, 0, 2)):
    outputs = nn.Conv2d(1, 1, k, stride, padding)(torch.zeros(1, 1, n, n)).shape[-1]
    assert outputs == (n + 2 * padding - k) // stride + 1
    print(f"{n:6}{k:8}{padding:9}{stride:8}{outputs:9}")

# %%
# The receptive field can be measured: the derivative of one output with respect to every pixel is zero wherever the
# output does not look.


def receptive_field(strides, size=17):
    """Absolute derivative of the middle output with respect to every pixel, averaged over random filters."""
    torch.manual_seed(0)
    total = torch.zeros(size, size)
    for _ in range(25):
        picture = torch.zeros(1, 1, size, size, requires_grad=True)
        outputs = nn.Sequential(*[nn.Conv2d(1, 1, 3, stride, padding=1, bias=False) for stride in strides])(picture)
        outputs[0, 0, outputs.shape[2] // 2, outputs.shape[3] // 2].backward()
        total += picture.grad[0, 0].abs()
    return total.numpy()


figure, grid = plt.subplots(2, 3, figsize=(7.2, 5.0))
fields = {}
for stride, row in zip((1, 2), grid, strict=True):
    for layers, panel in zip((1, 2, 3), row, strict=True):
        field = receptive_field([stride] * layers)
        side = int((field > 0).any(axis=0).sum())
        fields[stride, layers] = side
        panel.imshow(np.where(field > 0, field / field.max(), np.nan), cmap="viridis", vmin=0)
        panel.set(xticks=np.arange(-0.5, 17), yticks=np.arange(-0.5, 17), xticklabels=[], yticklabels=[])
        panel.tick_params(length=0)
        panel.grid(color="#DDDDDD", linewidth=0.5)
        panel.spines[:].set(visible=True, color="#DDDDDD")
        panel.set_title(f"{layers} layer{'s' * (layers > 1)}, stride {stride}: {side} x {side}")
figure.suptitle("What one output sees of a picture of 17 x 17 pixels, through filters of 3 x 3")
plt.show()

# %%
# The dense and the convolutional network
# ---------------------------------------
#
# The digits of scikit-learn have 8 x 8 pixels and fill them. Here they lie in the middle of a frame of 16 x 16. One
# network is dense. The other has three convolutions, then takes the largest value of each of its 20 maps, wherever it
# was, and one dense layer makes logits of these. A third is the same, but for a stride of 2 in the middle, which saves
# most of the work.

images, labels = load_digits(return_X_y=True)
framed = nn.functional.pad(torch.tensor(images.reshape(-1, 1, 8, 8) / 16, dtype=torch.float32), (4, 4, 4, 4))
train_images, test_images, train_labels, test_labels = train_test_split(
    framed, torch.tensor(labels), test_size=450, stratify=labels, random_state=0
)


def dense():
    """One hidden layer of 50 units."""
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 50), nn.ReLU(), nn.Linear(50, 10))


def convolutional(stride):
    """Three layers of filters of 3 x 3, and the largest value of each map."""
    return nn.Sequential(
        nn.Conv2d(1, 10, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(10, 20, 3, stride, padding=1),
        nn.ReLU(),
        nn.Conv2d(20, 20, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(20, 10),
    )


def train(model, epochs=10, lr=1e-2):
    """Minimize the cross-entropy. The parameters are PyTorch's; AdamW steps on NumPy views of their memory."""
    generator = torch.Generator().manual_seed(0)
    opt = fastopt.AdamW([p.detach().numpy() for p in model.parameters()], lr=lr, n_threads=1)
    for _ in range(epochs):
        for batch in torch.randperm(len(train_images), generator=generator).split(64):
            loss = nn.functional.cross_entropy(model(train_images[batch]), train_labels[batch])
            loss.backward()
            opt.step([p.grad.numpy() for p in model.parameters()], zero_grads=True)
    return model


def accuracy(model, pictures):
    """Share of the test digits that are recognised."""
    with torch.no_grad():
        return float((model(pictures).argmax(1) == test_labels).float().mean())


networks = {}
for name, make in {
    "dense": dense,
    "stride 2": lambda: convolutional(2),
    "convolutional": lambda: convolutional(1),
}.items():
    torch.manual_seed(0)
    networks[name] = train(make())
    count = sum(p.numel() for p in networks[name].parameters())
    print(f"{name:13} {count:5} parameters, test accuracy {accuracy(networks[name], test_images):.1%}")

# %%
# On digits where they belong, all are good. Now the test digits, and only these, move within the frame. To the dense
# network a digit two pixels further on is something that it has never seen. The filters of the others are the same
# everywhere: if the picture moves, the maps move along, and their largest values stay what they were. With stride 2
# that is true of even shifts only: after an odd one the second layer looks at the places in between, which it has never
# seen (Zhang, 2019).

shifts = range(-2, 3)
moved = {
    name: np.array([[accuracy(model, test_images.roll((dy, dx), (2, 3))) for dx in shifts] for dy in shifts])
    for name, model in networks.items()
}
figure, panels = plt.subplots(1, 3, figsize=(7.2, 3.0), sharey=True)
for (name, values), panel in zip(moved.items(), panels, strict=True):
    cells = panel.imshow(values, cmap="cividis", vmin=0, vmax=1, extent=(-2.5, 2.5, 2.5, -2.5))
    for dy, row in zip(shifts, values, strict=True):
        for dx, value in zip(shifts, row, strict=True):
            colour = "black" if value > 0.5 else "white"
            panel.text(dx, dy, f"{100 * value:.0f}", ha="center", va="center", color=colour)
    panel.set(xlabel="pixels to the right", xticks=shifts, yticks=shifts)
    panel.set_title(f"{name.capitalize()}: mean {values.mean():.0%}")
    panel.spines[:].set_visible(False)
panels[0].set_ylabel("pixels down")
figure.suptitle("Shared weights recognise a digit that has moved (test accuracy in %)")
plt.show()
for name, values in moved.items():
    print(
        f"{name:13} {values[2, 2]:.1%} in the middle, {values.mean():.1%} over all shifts, {values.min():.1%} at worst"
    )

# %%
# What the first layer has learned: ten filters, and the map that each makes of one digit. Some answer to edges of one
# direction, others to strokes or to plain ink.

five = test_images[test_labels == 5][:1]
first = networks["convolutional"][:2]
weights = first[0].weight.detach()[:, 0].numpy()
with torch.no_grad():
    maps, moved_maps = first(five)[0].numpy(), first(five.roll((1, 1), (2, 3)))[0].numpy()
figure = plt.figure(figsize=(7.2, 1.9))
grid = figure.add_gridspec(2, 12)
panels = [figure.add_subplot(grid[:, :2])]
panels[0].imshow(five[0, 0].numpy(), cmap="gray_r")
for k in range(10):
    panels += [figure.add_subplot(grid[row, 2 + k]) for row in (0, 1)]
    panels[-2].imshow(weights[k], cmap="PuOr", vmin=-abs(weights).max(), vmax=abs(weights).max())
    panels[-1].imshow(maps[k], cmap="viridis", vmin=0)
panels[1].set_ylabel("filter")
panels[2].set_ylabel("its map")
for panel in panels:
    panel.set(xticks=[], yticks=[])
    panel.spines[:].set(visible=True, color="#DDDDDD")
figure.suptitle("Ten filters of nine weights, each used at all 256 places")
plt.show()
inner = slice(2, -2)  # away from the frame's edge
difference = abs(moved_maps[:, 3:-1, 3:-1] - maps[:, inner, inner]).max()
print(f"A digit that moves by one pixel moves its maps by one pixel: the largest difference is {difference}.")
