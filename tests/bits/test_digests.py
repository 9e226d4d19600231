"""The bits of twenty steps, recorded: moving code about must not change one of them.

`python -m tests.bits.test_digests` records anew, after a change that is meant to change bits (CHANGELOG says so then).
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from fastopt import _formats
from tests.support.configs import CONFIGS

RECORDED = Path(__file__).parent / "digests.json"
STEPS = 20
SHAPES = ((40, 61), (17,), ())
TAILS = {
    "alone": ({}, {}),
    "surrounded": (
        {"ema_decay": 0.75, "ema_warmup": True, "copy_dtype": "bfloat16"},
        {"grad_scale": 0.5, "max_norm": 3.0, "clip_value": 0.25, "skip_nonfinite": True},
    ),
}
CASES = {
    f"{config}-{state_dtype}-{tail}": (config, state_dtype, tail)
    for config in CONFIGS
    if config.name == "defaults" or config.name.startswith("away")
    for state_dtype in _formats.STATE_DTYPES
    for tail in TAILS
}


def numbers(rng, shape):
    """Float32 numbers that every NumPy makes alike: integers over a power of two."""
    return (rng.integers(-(1 << 20), 1 << 20, shape) / (1 << 20)).astype(np.float32)


def digest(config, state_dtype, tail):
    """A hash of everything that an optimizer has after its steps."""
    options, step_options = TAILS[tail]
    rng = np.random.default_rng(5)
    params = [np.asarray(numbers(rng, shape)) for shape in SHAPES]
    optimizer = config.make(params, state_dtype=state_dtype, **options)
    hashed = hashlib.sha256()
    for step in range(STEPS):
        grads = [np.asarray(numbers(rng, shape)) for shape in SHAPES]
        if step % 3 == 2:
            grads[1] = None
        info = optimizer.step(grads, **step_options)
        hashed.update(repr(info).encode())
    kept = [array for state in optimizer.state for array in state.values()]
    beside = [*optimizer.ema, *optimizer.params_copy] if options else []
    for array in [*params, *kept, *beside]:
        hashed.update(array.tobytes())
    return hashed.hexdigest()[:16]


@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_have_the_recorded_bits(case):
    assert digest(*CASES[case]) == json.loads(RECORDED.read_text(encoding="utf-8"))[case]


def test_every_case_is_recorded():
    assert json.loads(RECORDED.read_text(encoding="utf-8")).keys() == CASES.keys()


if __name__ == "__main__":
    recorded = {case: digest(*what) for case, what in CASES.items()}
    RECORDED.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
