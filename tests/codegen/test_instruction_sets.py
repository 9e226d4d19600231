"""Which kernels are built, and which of them this processor runs."""

import pytest

from fastopt import backends
from fastopt._instruction_sets import INSTRUCTION_SETS, for_this_machine
from fastopt.backends import compiled

FEATURES = sorted({feature for row in for_this_machine() for feature in row.features})


@pytest.fixture
def processor(monkeypatch):
    """Say what the processor has: `processor(features)` -> the instruction sets that are then available."""

    def with_features(features):
        answers = {feature: feature in features for feature in FEATURES}
        monkeypatch.setattr(backends.engine(), "supported_features", lambda: answers)
        return compiled.available_isas.__wrapped__()

    return with_features


def test_the_processor_is_asked_for_every_feature_that_an_instruction_set_needs():
    assert set(FEATURES) <= set(backends.engine().supported_features())


def test_the_baseline_needs_nothing(processor):
    assert INSTRUCTION_SETS["baseline"].features == ()
    assert processor(()) == ("baseline",)


@pytest.mark.parametrize("lacking", FEATURES)
def test_an_instruction_set_needs_each_of_its_features(processor, lacking):
    available = processor([feature for feature in FEATURES if feature != lacking])
    assert not [isa for isa in available if lacking in INSTRUCTION_SETS[isa].features]
    assert {isa for isa in processor(FEATURES) if lacking not in INSTRUCTION_SETS[isa].features} == set(available)


def test_one_that_was_not_built_is_not_available(processor, monkeypatch):
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: name if name.endswith("baseline") else None)
    assert processor(FEATURES) == ("baseline",)


def test_each_has_a_module_of_its_own():
    assert len({row.module for row in INSTRUCTION_SETS.values()}) == len(INSTRUCTION_SETS)
