r"""
Where to start, and batch normalisation
=======================================

An optimizer can only follow gradients that arrive. Whether they arrive in a deep network is decided before the first
step, by the size of the random initial weights. This example looks at what numbers do on their way through the
layers, derives the size that keeps them alive, and then shows batch normalisation, a layer that makes the question
far less urgent.
"""

import copy

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

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
# What arrives at layer five
# --------------------------
#
# A thousand inputs of 100 numbers, drawn from the standard normal distribution, go through five layers of 100 units.
# A layer multiplies by a random matrix and applies its activation function: :math:`a_l = f(a_{l-1} W_l)`. Nothing is
# trained. Only two things vary: the function, and the standard deviation :math:`\sigma` of the weights. Besides two
# arbitrary ones, 1 and 0.01, there are two that depend on the number :math:`n` of inputs of the layer:
#
# .. math::
#
#    \sigma_{\text{Xavier}} = \sqrt{\frac{1}{n}}, \qquad \sigma_{\text{He}} = \sqrt{\frac{2}{n}}.
#
# The first is named after Xavier Glorot (Glorot and Bengio, 2010; they average the numbers of inputs and outputs, which
# are equal here), the second after Kaiming He (He et al., 2015).

WIDTH = 100
functions = {
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    "tanh": np.tanh,
    "ReLU": lambda z: np.maximum(z, 0),
}
deviations = {"std 1": 1.0, "std 0.01": 0.01, "Xavier": (1 / WIDTH) ** 0.5, "He": (2 / WIDTH) ** 0.5}


def activations(function, sigma, layers):
    """The outputs of every layer, for the same inputs and, up to their scale, the same weights."""
    rng = np.random.default_rng(0)
    outputs = [rng.standard_normal((1000, WIDTH))]
    for _ in range(layers):
        outputs.append(function(outputs[-1] @ rng.normal(0, sigma, (WIDTH, WIDTH))))
    return outputs[1:]


outputs = {(f, s): activations(functions[f], deviations[s], 5) for f in functions for s in deviations}

# %%
# Each panel shows five histograms, one per layer, from the first at the top to the fifth at the bottom. The axis of
# ReLU is logarithmic and leaves out the zeros, which are about half of its outputs.

bins = {"sigmoid": np.linspace(0, 1, 61), "tanh": np.linspace(-1, 1, 61), "ReLU": np.geomspace(1e-7, 1e5, 61)}
shades = plt.get_cmap("viridis")(np.linspace(0.1, 0.8, 5))
figure, grid = plt.subplots(3, 4, figsize=(7.2, 6.4), sharex="row", sharey=True)
for (f, s), panel in zip(outputs, grid.flat, strict=True):
    for layer, (values, shade) in enumerate(zip(outputs[f, s], shades, strict=True)):
        counts, edges = np.histogram(values, bins[f])
        heights = 1.5 * counts / counts.max()
        base = 4 - layer
        panel.stairs(base + heights, edges, baseline=base, fill=True, color=shade, alpha=0.95, zorder=layer)
        panel.stairs(base + heights, edges, baseline=base, color="white", linewidth=0.7, zorder=layer)
    panel.spines["left"].set_visible(False)
    panel.tick_params(axis="y", length=0)
    panel.set_yticks(np.arange(5), np.arange(5, 0, -1))
    if f == "ReLU":
        panel.set_xscale("log")
        panel.set_xticks([1e-5, 1, 1e5])
        panel.minorticks_off()
for panel, f in zip(grid[:, 0], functions, strict=True):
    panel.set_ylabel(f"{f}\nlayer")
for panel, s in zip(grid[0], deviations, strict=True):
    panel.set_title(f"{s}" + (f" (std {deviations[s]:.2g})" if s in ("Xavier", "He") else ""), loc="center")
figure.suptitle("Xavier keeps tanh alive, He keeps ReLU alive")
plt.show()

# %%
# *Too wide.* With :math:`\sigma = 1` the sums are seven to ten in size, sigmoid and tanh sit at their ends, and there
# they are flat: the gradient is multiplied by nearly zero in every layer on its way back. ReLU grows sevenfold a layer.
#
# *Too narrow.* With 0.01 all units of a layer say the same, sigmoid's 0.5 or zero: a hundred units can do no more than
# one.
#
# *Right.* Xavier's values keep their spread through tanh, He's through ReLU.
#
# Why these? For a linear layer, the variance of a sum of :math:`n` independent products with zero mean is
#
# .. math::
#
#    \operatorname{Var}(z_l) = n \, \sigma^2 \, \operatorname{E}(a_{l-1}^2),
#
# and tanh is nearly linear around zero: :math:`n \sigma^2 = 1` keeps the variance. ReLU drops the negative half and
# with it half of :math:`\operatorname{E}(a^2)`, so that each layer multiplies the variance by :math:`n \sigma^2 / 2`:
# this is one for He. After :math:`l` layers the root of :math:`\operatorname{E}(a^2)` has changed by
#
# .. math::
#
#    \left(\frac{n \, \sigma^2}{2}\right)^{l/2}.
#
# The formula needs no fitting to describe what thirty layers of ReLU do. Gradients on their way back obey the same law.

DEPTH = 30
layers = np.arange(1, DEPTH + 1)
sizes = {s: [np.sqrt((a**2).mean()) for a in activations(functions["ReLU"], deviations[s], DEPTH)] for s in deviations}
predicted = {s: (WIDTH * sigma**2 / 2) ** (layers / 2) for s, sigma in deviations.items()}

figure, axes = plt.subplots(figsize=(7.2, 3.6))
for s, colour in zip(deviations, (VERMILION, "#E69F00", BLUE, GREEN), strict=True):
    axes.semilogy(layers, predicted[s], color=colour, linewidth=1.2)
    axes.semilogy(layers, sizes[s], "o", color=colour, markersize=4)
    axes.annotate(s, (DEPTH, predicted[s][-1]), (8, 0), textcoords="offset points", color=colour, va="center")
axes.set(xlabel="layer", ylabel="root mean square", xlim=(0, DEPTH + 0.5))
axes.set_title("Every layer multiplies by the same factor; He makes it 1", fontweight="bold")
axes.plot([], [], "o", color=GREY, markersize=4, label="measured")
axes.plot([], [], color=GREY, linewidth=1.2, label="the formula")
axes.legend(loc="lower left")
plt.show()
for s in deviations:
    print(f"{s:9} layer {DEPTH}: root mean square {sizes[s][-1]:9.2e}, by the formula {predicted[s][-1]:9.2e}")

# %%
# Batch normalisation
# -------------------
#
# If the spread of the sums is what matters, one can also set it, in every step: batch normalisation (Ioffe and Szegedy,
# 2015) takes mean and variance of each unit over the samples of the mini-batch,
#
# .. math::
#
#    \hat z = \frac{z - \mu_B}{\sqrt{\sigma_B^2 + \varepsilon}}, \qquad y = \gamma \hat z + \beta,
#
# and learns :math:`\gamma` and :math:`\beta`, so that a layer can still choose another spread if it wants one.
#
# Handwritten digits and a network with six hidden layers show what that mends. The layers are PyTorch's; the optimizer
# steps on NumPy views of their memory.

images, labels = load_digits(return_X_y=True)
parts = train_test_split(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels), random_state=0)
train_images, test_images, train_labels, test_labels = parts


def network(sigma, batch_norm):
    """Six hidden layers of 100 units with normally distributed weights."""
    torch.manual_seed(0)
    parts = []
    for inputs, outputs in zip((64, *[WIDTH] * 6), (*[WIDTH] * 6, 10), strict=True):
        linear = torch.nn.Linear(inputs, outputs)
        torch.nn.init.normal_(linear.weight, std=sigma)
        torch.nn.init.zeros_(linear.bias)
        parts += [linear, torch.nn.BatchNorm1d(outputs), torch.nn.ReLU()] if batch_norm else [linear, torch.nn.ReLU()]
    return torch.nn.Sequential(*parts[: -2 if batch_norm else -1])  # the last layer gives the logits


def sizes_by_layer(model):
    """Root mean square of what each hidden layer hands on, for all training images."""
    outputs, sizes = train_images, []
    with torch.no_grad():
        for layer in model:
            outputs = layer(outputs)
            if isinstance(layer, torch.nn.ReLU):
                sizes.append(outputs.square().mean().sqrt().item())
    return sizes


hidden_sizes = {(sigma, kind): sizes_by_layer(network(sigma, kind)) for sigma in (0.01, 1) for kind in (False, True)}
for (sigma, batch_norm), values in hidden_sizes.items():
    kind = "with   " if batch_norm else "without"
    print(f"std {sigma:<4} {kind} batch normalisation:", *(f"{size:8.2g}" for size in values))

# %%
# Before any training, the size of the activations is already what ReLU makes of a standard normal distribution,
# :math:`\sqrt{1/2} = 0.71`, in every layer and for any :math:`\sigma`. Now the training, from ten starts.


def train(model, epochs=5, lr=0.02):
    """The loss of every step."""
    generator = torch.Generator().manual_seed(1)
    opt = fastopt.SGD([p.detach().numpy() for p in model.parameters()], lr=lr, momentum=0.9, n_threads=1)
    losses = []
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(train_images), generator=generator).split(64)[:-1]:
            loss = torch.nn.functional.cross_entropy(model(train_images[batch]), train_labels[batch])
            loss.backward()
            opt.step([p.grad.numpy() for p in model.parameters()], zero_grads=True)
            losses.append(loss.item())
    return losses


sigmas = np.geomspace(0.01, 1, 9)
he = (2 / WIDTH) ** 0.5
starts = sorted({*sigmas, he})
runs = {(sigma, batch_norm): train(network(sigma, batch_norm)) for sigma in starts for batch_norm in (False, True)}

# %%
# A network that guesses has a loss of log 10 = 2.3. Without batch normalisation only the neighbourhood of He's value
# learns: with smaller weights no gradient arrives, with larger ones the gradients are so large that the first steps
# overflow. With batch normalisation every start learns.


def final(sigma, batch_norm):
    """Mean loss of the last epoch; where it overflowed, that of guessing."""
    loss = np.mean(runs[sigma, batch_norm][-(len(train_images) // 64) :])
    return loss if np.isfinite(loss) else np.log(10)


kinds = {False: ("without", VERMILION, 1.75), True: ("with", BLUE, 0.25)}
figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.4), sharey=True)
for batch_norm, (name, colour, height) in kinds.items():
    for sigma, style in ((sigmas[0], ":"), (he, "-"), (sigmas[-1], "--")):
        left.plot(np.minimum(runs[sigma, batch_norm], 5), style, color=colour, linewidth=1.2)
    right.semilogx(starts, [final(s, batch_norm) for s in starts], "o-", color=colour, markersize=4)
    right.text(sigmas[0], height, f"{name} batch\nnormalisation", color=colour)
for style, name in ((":", "std 0.01"), ("-", "He"), ("--", "std 1")):
    left.plot([], [], style, color=GREY, label=name)
right.axvline(he, color=GREY, linewidth=0.8, zorder=0)
right.annotate("He", (he, 2.9), (4, 0), textcoords="offset points", color=GREY)
left.set(xlabel="step", ylabel="training loss", ylim=(-0.05, 3.2), title="Three starts")
right.set(xlabel="standard deviation of the initial weights", title="Loss of the fifth epoch, by start")
left.legend(loc="upper right", ncols=3, columnspacing=1, handlelength=1.5)
figure.suptitle("Batch normalisation learns from every start")
plt.show()
for batch_norm, (name, *_) in kinds.items():
    learned = sum(final(sigma, batch_norm) < 0.5 for sigma in sigmas)
    print(f"{name:7} batch normalisation: {learned} of {len(sigmas)} starts end below a loss of 0.5")

# %%
# Train and eval
# --------------
#
# In training a sample's output depends on the other samples of its batch. That is unwelcome afterwards: the same digit
# should get the same answer in any company, and alone. So the layer also keeps running averages,
#
# .. math::
#
#    \mu \leftarrow 0.9\,\mu + 0.1\,\mu_B, \qquad \sigma^2 \leftarrow 0.9\,\sigma^2 + 0.1\,\sigma_B^2,
#
# and uses these once ``model.eval()`` was called. Forgetting that call is the usual mistake with this layer. It costs
# twice: answers depend on the batch, and every look at test data moves the averages.

model = network(he, batch_norm=True)
train(model)
model.eval()
with torch.no_grad():
    probabilities = model(test_images).softmax(1)[torch.arange(len(test_labels)), test_labels]
digit = int(torch.argmin((probabilities - 0.9).abs()))  # recognised, but not beyond doubt
rng = np.random.default_rng(2)
others = np.delete(np.arange(len(test_images)), digit)


def probability_in_company(mode, size):
    """The probability of the digit's label in 200 batches with others, in train or eval mode."""
    answers = []
    for _ in range(200):
        batch = [digit, *rng.choice(others, size - 1, replace=False)]
        again = copy.deepcopy(model).train(mode == "train")
        with torch.no_grad():
            answers.append(float(again(test_images[batch]).softmax(1)[0, test_labels[digit]]))
    return np.array(answers)


company = {mode: probability_in_company(mode, 16) for mode in ("train", "eval")}
for mode, answers in company.items():
    print(f"{mode:5} mode, 200 batches of 16: probability from {answers.min():.4f} to {answers.max():.4f}")
try:
    copy.deepcopy(model).train()(test_images[digit : digit + 1])
except ValueError as error:
    print("train mode, a batch of one:", error)

# %%


def accuracy(mode, size):
    """Share of test digits that are recognised in batches of a size."""
    again = copy.deepcopy(model).train(mode == "train")
    batches = [b for b in torch.arange(len(test_images)).split(size) if len(b) == size]
    with torch.no_grad():
        return np.mean([(again(test_images[b]).argmax(1) == test_labels[b]).float().mean().item() for b in batches])


batch_sizes = [2, 4, 8, 16, 32, 64]
accuracies = {mode: [accuracy(mode, size) for size in batch_sizes] for mode in ("train", "eval")}
figure, (picture, left, right) = plt.subplots(1, 3, figsize=(7.2, 3.0), width_ratios=(0.7, 1.3, 1.3))
picture.imshow(test_images[digit].reshape(8, 8).numpy(), cmap="gray_r")
picture.set_title(f"a {test_labels[digit]}", loc="center")
picture.axis("off")
left.hist(company["train"], np.linspace(0, 1, 26), color=VERMILION, alpha=0.8)
left.axvline(company["eval"][0], color=BLUE, linewidth=2)
left.set(xlabel=f"probability of {test_labels[digit]}", ylabel="batches", title="One digit in 200 batches of 16")
for mode, colour in (("train", VERMILION), ("eval", BLUE)):
    right.semilogx(batch_sizes, accuracies[mode], "o-", base=2, color=colour, markersize=4, label=f"{mode} mode")
right.set(xlabel="batch size", title="Test accuracy", ylim=(0, 1.03))
right.set_xticks(batch_sizes, batch_sizes)
right.legend(loc="lower right")
figure.suptitle("Evaluate in eval mode: the answer no longer depends on the company")
plt.show()
