"""Two runs side by side: what changed beyond noise."""

from __future__ import annotations

from bench.results import Entry, Results
from bench.samples import MINIMUM_CHANGE, changed, seconds


def text(before: Results, after: Results) -> str:
    """What changed from one run to the other, the largest change first."""
    old = {(entry.workload, entry.contestant): entry for entry in before.entries}
    new = {(entry.workload, entry.contestant): entry for entry in after.entries}
    common = [(old[key], new[key]) for key in old if key in new]
    lines = _differences_of_machines(before, after)
    found = [(was, now) for was, now in common if changed(was.sample, now.sample)]
    for verdict, chosen in (
        ("slower", [pair for pair in found if _factor(*pair) > 1]),
        ("faster", [pair for pair in found if _factor(*pair) < 1]),
    ):
        chosen.sort(key=lambda pair: -abs(_factor(*pair) - 1))
        lines += [f"{len(chosen)} {verdict}:" if chosen else f"nothing {verdict}"]
        lines += [f"  {_line(was, now)}" for was, now in chosen]
    lines += [
        f"{len(common) - len(found)} of {len(common)} measurements the same: medians within {MINIMUM_CHANGE:.0%}, or "
        "quartiles that overlap"
    ]
    for words, missing in (("only before", set(old) - set(new)), ("only after", set(new) - set(old))):
        if missing:
            lines.append(f"{len(missing)} measured {words}")
    return "\n".join(lines) + "\n"


def _factor(was: Entry, now: Entry) -> float:
    return now.sample.median / was.sample.median


def _line(was: Entry, now: Entry) -> str:
    return (
        f"{_factor(was, now):.2f} x  {now.workload}, {now.contestant}: {seconds(was.sample.median)} to "
        f"{seconds(now.sample.median)}"
    )


def _differences_of_machines(before: Results, after: Results) -> list[str]:
    """What else differs, and so may explain a change."""
    pairs = [
        (name, before.machine.get(name), after.machine.get(name)) for name in ("processor", "cpus", "python", "fastopt")
    ]
    pairs += [(f"peer {name}", version, after.run["peers"].get(name)) for name, version in before.run["peers"].items()]
    return [f"{name} differs: {was} and {now}" for name, was, now in pairs if was != now and None not in (was, now)]
