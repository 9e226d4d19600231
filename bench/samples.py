"""Medians and quartiles of rounds, their ratios, and what counts as noise. No clock."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

NOISY = 0.15
"""Interquartile range over median from which a measurement comes with a warning; share of one processor that
others took from which the run does."""


@dataclass(frozen=True)
class Sample:
    """Median and quartiles of one number over the rounds."""

    q1: float
    median: float
    q3: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Sample:
        """Of at least one value; quartiles interpolate between neighbours."""
        if not values:
            raise ValueError("a sample needs at least one value, got none")
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(q1, median, q3)

    @property
    def spread(self) -> float:
        """Interquartile range over median."""
        return (self.q3 - self.q1) / abs(self.median) if self.median else 0.0

    @property
    def is_noisy(self) -> bool:
        return self.spread > NOISY

    def scaled(self, factor: float) -> Sample:
        return Sample(self.q1 * factor, self.median * factor, self.q3 * factor)


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Sample:
    """Of the ratios of two contestants' rounds, paired: who drifts, drifts in both.

    A slow contestant sits out the last rounds; they are left out here.
    """
    return Sample.of([a / b for a, b in zip(numerators, denominators, strict=False)])


MINIMUM_CHANGE = 0.05
"""Smallest relative change of a median that a comparison of two runs calls one: two runs on the same machine differ
by some percent with the physical pages that their arrays got."""


def changed(before: Sample, after: Sample) -> bool:
    """Whether two samples differ beyond noise: interquartile ranges apart, and medians by `MINIMUM_CHANGE`."""
    apart = before.q3 < after.q1 or after.q3 < before.q1
    return apart and abs(after.median / before.median - 1) >= MINIMUM_CHANGE


def short(value: float) -> str:
    """Three digits, none after the point from 100 on."""
    if value != value:
        return "NaN"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def seconds(value: float) -> str:
    """A time in the unit that keeps it between 1 and 1000."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale:
            return f"{short(value / scale)} {unit}"
    return f"{short(value / 1e-9)} ns"
