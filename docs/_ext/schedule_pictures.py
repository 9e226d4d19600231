"""One picture of all schedules: the learning rate over the epochs, drawn from what each of them really sets."""

from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure

import fastopt
from fastopt import lr_scheduler

FILE = Path(__file__).resolve().parents[1] / "guide" / "schedules.svg"
EPOCHS = 100
SCHEDULES = """
LambdaLR(opt, lambda epoch: 1 / (1 + 0.05 * epoch))
MultiplicativeLR(opt, lambda epoch: 0.97)
StepLR(opt, step_size=25, gamma=0.5)
MultiStepLR(opt, milestones=[50, 80], gamma=0.3)
ConstantLR(opt, factor=0.3, total_iters=30)
LinearLR(opt, start_factor=1.0, end_factor=0.1, total_iters=80)
ExponentialLR(opt, gamma=0.96)
PolynomialLR(opt, total_iters=100, power=2)
CosineAnnealingLR(opt, T_max=100)
CosineAnnealingWarmRestarts(opt, T_0=15, T_mult=2)
CyclicLR(opt, base_lr=0.1, max_lr=1.0, step_size_up=15)
OneCycleLR(opt, max_lr=1.0, total_steps=101)
ReduceLROnPlateau(opt, factor=0.5, patience=5)
SequentialLR(opt, [LinearLR(opt, 0.1, total_iters=20), ExponentialLR(opt, gamma=0.97)], milestones=[20])
ChainedScheduler([ExponentialLR(opt, gamma=0.98), StepLR(opt, step_size=40, gamma=0.5)])
WarmupLR(CosineAnnealingLR(opt, T_max=80), warmup_steps=20)
InverseSquareRootLR(opt, warmup_steps=20)
WarmupStableDecayLR(opt, warmup_steps=15, stable_steps=55, decay_steps=30)
""".strip().splitlines()
"""How each is made, with an optimizer `opt` whose learning rate is 1."""


def rates(text):
    """The learning rates that the schedule made by `text` sets in EPOCHS epochs."""
    opt = fastopt.SGD(np.zeros(1, np.float32), lr=1.0, momentum=0.9)
    schedule = eval(text, vars(lr_scheduler) | {"opt": opt})
    found = []
    for epoch in range(EPOCHS):
        found.append(opt.param_groups[0]["lr"])
        loss = max(0.5, 1 - epoch / 30)  # stops improving after 15 epochs
        schedule.step(*([loss] if isinstance(schedule, lr_scheduler.ReduceLROnPlateau) else []))
    return found


def draw(_):
    with style.context(["default", {"svg.hashsalt": "fastopt", "svg.fonttype": "none", "font.size": 8}]):
        figure = Figure(figsize=(8, 8.4), layout="constrained")
        grid = figure.subplots(6, 3, sharex=True, sharey=True)
        for axes, text in zip(grid.flat, SCHEDULES, strict=True):
            axes.step(range(EPOCHS), rates(text), where="post", color="#0072b2", linewidth=1.5)
            axes.set_title(text.partition("(")[0], fontsize=8.5)
            axes.grid(color="0.92")
            axes.spines[["top", "right"]].set_visible(False)
        for axes in grid[-1]:
            axes.set_xlabel("epoch")
        for axes in grid[:, 0]:
            axes.set_ylabel("lr")
        figure.savefig(FILE, metadata={"Date": None})


def setup(app):
    app.connect("builder-inited", draw)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
