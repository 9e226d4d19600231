"""The README's example of the GPU runs, on one or in the simulator; test_readme.py runs the others."""

import re
from pathlib import Path

import numpy as np
import pytest

import fastopt

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_readmes_example_steps_on_the_device():
    (block,) = re.findall(r"```py\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    namespace = {"np": np, "fastopt": fastopt}
    exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["info"].grad_norm == pytest.approx(1000**0.5)
    assert namespace["w"].copy_to_host() == pytest.approx(np.full(1000, -1e-3), rel=1e-4)
