"""Every contestant of every workload: measured in one race, entered into pytest-benchmark one by one."""

import pytest

from bench.suite import CLOCK, info_of

pytestmark = pytest.mark.benchmark(timer=CLOCK.read)


def test_race(workload, contestant, suite, record):
    outcome = suite.outcome(workload)
    if contestant not in outcome.measured:
        pytest.skip(outcome.left_out.get(contestant, "left out"))
    measured = outcome.measured[contestant]
    record(workload.id, contestant, measured.times, info_of(workload, measured))
