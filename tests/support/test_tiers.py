"""What `python -m pytest` leaves to the exhaustive tier is reached by what it runs."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastopt import _formats
from fastopt._instruction_sets import for_this_machine
from fastopt.backends import compiled
from tests.bits.test_fused import STAGES
from tests.support.configs import CONFIGS, DEFAULTS, LOW_PRECISION
from tests.support.operations import OPERATIONS
from tests.support.tiers import covering

ROOT = Path(__file__).resolve().parents[2]
LEAVE_SOME_OUT = (
    "bits/test_bits.py",
    "bits/test_fused.py",
    "bits/test_low_precision.py",
    "robustness/test_transactions.py",
    "codegen/test_vectorized.py",
    "cuda/test_cuda.py",
)
ISAS = compiled.available_isas()


@given(
    products=st.lists(st.tuples(*[st.integers(0, 5)] * 4), min_size=1, max_size=300, unique=True),
    strength=st.integers(1, 3),
)
def test_kept_cases_reach_every_combination_that_any_case_has(products, strength):
    def reached(names):
        return {c for name in names for c in itertools.combinations(sorted(cases[name]), strength)}

    cases = {str(values): {(str(k), str(value)) for k, value in enumerate(values)} for values in products}
    assert reached(covering(cases, strength)) == reached(cases)


def test_of_a_cross_product_few_cases_are_kept():
    cases = {str(values): set(enumerate(values)) for values in itertools.product(range(60), range(3), range(11))}
    assert len(covering(cases, 2)) < 2 * 60 * 11  # 660 is the least


def test_a_case_on_its_own_is_kept():
    assert covering({"one": {("a", "1"), ("b", "2")}}, 2) == {"one"}


@pytest.fixture(scope="module")
def default_tier():
    """Names of the tests that `python -m pytest` runs, of the files that leave some out."""
    files = [f"tests/{name}" for name in LEAVE_SOME_OUT]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", *files]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=True)
    return [line.partition("::")[2] for line in finished.stdout.splitlines() if "::" in line]


@pytest.mark.parametrize("test", ["one_tensor_has_the_bits_of_the_rule", "splitting_into_tensors_changes_no_bit"])
def test_every_kernel_of_every_instruction_set_is_compared_with_its_rule(default_tier, test):
    for config, isa in itertools.product(CONFIGS, ISAS):
        assert any(name.startswith(f"test_{test}[{config}-{isa}-") for name in default_tier), (config, isa)


def test_every_kernel_is_compared_with_every_stage(default_tier):
    test = "stages_equal_the_same_steps_done_one_after_another"
    for config in CONFIGS:
        names = [name for name in default_tier if name.startswith(f"test_{test}[{config}-")]
        for stage in STAGES:
            assert any(stage in name for name in names), (config, stage)


@pytest.mark.parametrize(
    ("test", "configs"),
    [
        ("a_step_has_the_bits_of_decoding_the_rule_and_encoding", [c for c in CONFIGS if not c.spec.trust]),
        ("threads_and_instruction_sets_change_no_bit", DEFAULTS),
    ],
)
def test_every_optimizer_is_compared_in_every_low_precision_on_every_instruction_set(default_tier, test, configs):
    names = [name.partition("[")[2] for name in default_tier if name.startswith(f"test_{test}[")]
    for config in configs:
        mine = [name.removeprefix(f"{config}-") for name in names if name.startswith(f"{config}-")]
        for value in (*LOW_PRECISION, *ISAS):
            assert any(value in name for name in mine), (config, value)
    for dtype, isa in itertools.product(LOW_PRECISION, ISAS):
        assert any(dtype in name and isa in name for name in names), (dtype, isa)


@pytest.mark.parametrize(
    ("fault", "operations"),
    [
        ("an_interrupt_at_any_bytecode", set(OPERATIONS)),
        ("a_failure_of_any_allocation", set(OPERATIONS) - {"update, refused"}),
    ],
)
def test_faults_are_injected_into_every_operation(default_tier, fault, operations):
    names = [name for name in default_tier if name.startswith(f"test_{fault}_")]
    assert {operation for operation in OPERATIONS if any(f"-{operation}-" in name for name in names)} == operations


def test_every_optimizer_is_vectorized_and_every_instruction_set(default_tier):
    names = [name for name in default_tier if name.startswith("test_every_loop_is_vectorized[")]
    cases = [name.partition("[")[2].rstrip("]").rpartition("-") for name in names]
    assert sorted(isa for isa, _, _ in cases) == sorted(row.name for row in for_this_machine())
    assert sorted(int(part) for _, _, part in cases) == list(range(len(cases)))


def test_ptx_is_made_of_every_optimizer_with_every_state_dtype_somewhere(default_tier):
    names = [name.partition("[")[2].rstrip("]") for name in default_tier if name.startswith("test_a_rule_compiles_to_")]
    if not names:
        pytest.skip("the tests of CUDA need numba-cuda")
    cases = [name.rpartition("-")[::2] for name in names]
    assert {config.kernel for config in DEFAULTS} == {rule for rule, _ in cases}
    assert {state_dtype for _, state_dtype in cases} == set(_formats.STATE_DTYPES)
