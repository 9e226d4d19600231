"""What the README does, for type checkers: nothing here may be an error. Not run: the README's own examples are."""

from collections.abc import Iterator
from typing import Any

import numpy as np

import fastopt

x = np.random.default_rng(0).standard_normal((256, 8), np.float32)
y = x @ np.arange(8, dtype=np.float32) + 3
params = {"w": np.zeros(8, np.float32), "b": np.zeros((), np.float32)}
opt = fastopt.AdamW(params, lr=0.1, weight_decay=0.0)
for step in range(301):
    error = x @ params["w"] + params["b"] - y
    opt.step({"w": x.T @ error / 256, "b": error.mean()})
    if step % 100 == 0:
        print(step, float(np.mean(error**2)))

opt.param_groups[0]["lr"] = 1e-4
moment: np.ndarray = opt.state["w"]["exp_avg"]
for name, state in opt.state.items():
    print(name, state["step"].shape)
snapshot = opt.state_dict()
opt.load_state_dict(snapshot)
fastopt.Adam(lr=1e-3).update(params, {"w": np.ones(8, np.float32), "b": None})
opt.n_threads = 2

p, g, m, v = np.zeros((4, 1000), np.float32)
fastopt.functional.adam(p, g, m, v, step=1, lr=1e-3)
fastopt.reference.adam(p, g, m, v, step=2, lr=1e-3)
double = np.zeros(3)
fastopt.reference.sgd(double, np.ones(3))

weights = fastopt.FlatBuffer({"w": (64, 10), "b": 10})
weights["w"] -= 0.1 * weights["w"]
fastopt.SGD(weights, momentum=0.9, nesterov=True).step(weights.zeros_like())

w, b = np.ones((64, 10), np.float32), np.zeros(10, np.float32)
opt = fastopt.AdamW({"w": w, "b": b}, ema_decay=0.999, ema_warmup=True, copy_dtype="bfloat16")
info = opt.step(
    {"w": np.ones((64, 10), np.float16), "b": np.ones(10, np.float32)},
    grad_scale=1 / 1024,
    max_norm=1.0,
    skip_nonfinite=True,
    zero_grads=True,
)
applied: bool = info.applied
norm: float | None = info.grad_norm
copied: np.ndarray = opt.params_copy["w"]
with opt.swap_ema():
    print(opt.ema["w"].sum())
opt.accumulate({"w": w.astype(np.float16), "b": None})
opt.step(grad_scale=1 / opt.n_accumulated)

adam = fastopt.Adam(np.zeros(100_000, np.float32), state_dtype="8bit", seed=1)
adam.step(np.ones(100_000, np.float32))
print(adam.state_nbytes, adam.state_float32[0]["exp_avg"].mean(), len(adam.state))

half = np.full(1000, 0x3F80, np.uint16)
split = fastopt.AdamW([half], master="split", state_dtype="bfloat16", grad_dtype="bfloat16")
split.step([np.ones(1000, np.float16)])
split.step([np.ones(1000, np.uint16)])
split.load_master_params([split.master_params[0] + np.float32(1)])

groups = [{"params": [w], "lr": 0.1}, {"params": [b], "weight_decay": 0.0}]
grouped = fastopt.SGD(groups)
grouped.add_param_group({"params": np.zeros(3, np.float32)})
grouped.step([w, None, np.zeros(3, np.float32)])


class Tensor:
    """A parameter as PyTorch has them."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {}


def parameters() -> Iterator[Tensor]:
    yield Tensor()


on_device = fastopt.AdamW(parameters(), backend="cuda")
on_device.step([Tensor(), None], max_norm=1.0, stream=0)
fastopt.functional.adam(Tensor(), Tensor(), Tensor(), Tensor(), step=1)
print(fastopt.cuda.rules(), fastopt.cuda.ptx("adam", cc=(9, 0)))
schedule = fastopt.lr_scheduler.SequentialLR(
    opt,
    [fastopt.lr_scheduler.LinearLR(opt, 0.1), fastopt.lr_scheduler.CosineAnnealingLR(opt, T_max=10)],
    milestones=[5],
)
schedule.step()
print(schedule.get_last_lr()[0] + schedule.last_epoch, schedule.state_dict()["last_epoch"])
fastopt.lr_scheduler.WarmupLR(fastopt.lr_scheduler.ReduceLROnPlateau(opt, mode="max"), 10).step(np.float32(0.5))
stopping = fastopt.EarlyStopping(patience=3, mode="max")
if stopping.step(np.float32(0.5), {"w": w, "b": b}) and stopping.best is not None:
    print(stopping.best + 1.0, stopping.wait, stopping.stopped_step)
fastopt.set_num_threads(2)
print(fastopt.get_num_threads(), fastopt.info()["isa"], fastopt.__version__)


class Counting(fastopt.Adam):
    """A subclass with an attribute of its own."""

    def __init__(self, params: dict[str, np.ndarray]) -> None:
        super().__init__(params, lr=0.1)
        self.history: list[float] = []
