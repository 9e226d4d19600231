"""The README's and the guide's examples of the GPU run, on one or in the simulator; other examples run elsewhere."""

import re
from pathlib import Path

import numpy as np
import pytest

import fastopt

try:
    import fastopt.backends.cuda
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

ROOT = Path(__file__).resolve().parents[3]


def run(page):
    """What the first example of the GPU leaves in its names."""
    text = (ROOT / page).read_text(encoding="utf-8")
    block = re.search(r"```py(?:thon)?\n(from numba import cuda\n.*?)```", text, re.DOTALL)[1]
    namespace = {"np": np, "fastopt": fastopt}
    exec(compile(block, page, "exec"), namespace)
    return namespace


def test_the_readmes_example_steps_on_the_device():
    left = run("README.md")
    assert left["opt"].backend == "cuda"
    assert left["info"].grad_norm == pytest.approx(1000**0.5)
    np.testing.assert_allclose(left["w"].copy_to_host(), -1e-3, rtol=1e-4)


@pytest.mark.skipif(not (ROOT / "docs").exists(), reason="the documentation lies in the source checkout alone")
def test_the_guides_example_moves_its_state_to_the_cpu():
    left = run("docs/guide/gpu.md")
    assert left["info"].applied
    for name in ("exp_avg", "exp_avg_sq"):
        np.testing.assert_array_equal(left["host"].state[0][name], left["opt"].state[0][name])
    assert left["weights"]["w"].shape == (64, 10)
