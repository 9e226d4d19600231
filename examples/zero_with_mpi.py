"""A linear model on several processes, each of which keeps the optimizer state of its share alone (ZeRO-1).

Run it with ``mpiexec -n 2 python examples/zero_with_mpi.py``.
"""

import numpy as np
from mpi4py import MPI

import fastopt
from fastopt.mpi import ZeroRedundancyOptimizer

comm = MPI.COMM_WORLD
truth = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
own = np.random.default_rng(1 + comm.rank)  # every process has data of its own

params = fastopt.FlatBuffer({"w": 1000, "b": 1})
grads = params.zeros_like()
optimizer = ZeroRedundancyOptimizer(params, fastopt.AdamW, lr=0.1, weight_decay=0.0, state_dtype="bfloat16")
schedule = fastopt.lr_scheduler.CosineAnnealingLR(optimizer.optimizer, 300)

for step in range(300):
    x = own.standard_normal((64, 1000), np.float32)
    error = x @ params["w"] + params["b"] - (x @ truth + 3)
    grads["w"][:] = x.T @ error / len(x)
    grads["b"][:] = error.mean()
    optimizer.step(grads, max_norm=100.0, zero_grads=True)
    schedule.step()
    if step % 100 == 99 and comm.rank == 0:
        print(f"step {step + 1}: mean squared error {np.mean(error**2):.4f}")

same = all(other == params.flat.tobytes() for other in comm.allgather(params.flat.tobytes()))
if comm.rank == 0:
    share = optimizer.optimizer.state_nbytes
    print(f"state of this process: {share} bytes, of all {comm.size}: {4 * params.flat.size}")
    print(f"every process has the same parameters: {same}")
