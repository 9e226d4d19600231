"""Two tiers of tests: of a cross product, `python -m pytest` runs cases that together reach everything.

The others are marked `exhaustive` and run too with `python -m pytest -m ""`.
"""

import itertools
import zlib

import pytest


def covering(cases, strength):
    """Names of cases that together have every value, or with a `strength` of 2 every pair of values, that any case has.

    `cases` gives the set of values of each name. They are gone through in an order that looks random but depends on the
    names alone: new cases change little about which of the others are kept, and no value is preferred for being first.
    """
    reached, kept = set(), set()
    for name in sorted(cases, key=lambda name: (zlib.crc32(name.encode()), name)):
        combinations = set(itertools.combinations(sorted(cases[name]), strength))
        if not combinations <= reached:
            reached |= combinations
            kept.add(name)
    return kept


def values(item, each=None):
    """Names and values of a test's parameters; of the parameter `each`, every element of its value."""
    params = item.callspec.params
    found = {(name, str(value)) for name, value in params.items() if name != each}
    return found | {(each, str(element)) for element in params.get(each, ())}


def mark_exhaustive(items):
    """Mark what the default tier leaves out of tests marked `covering`; what is marked already covers nothing."""
    products = {}
    for item in items:
        marker = item.get_closest_marker("covering")
        if marker is not None and item.get_closest_marker("exhaustive") is None:
            products.setdefault((item.parent, item.originalname), []).append(item)
    for product in products.values():
        marker = product[0].get_closest_marker("covering")
        cases = {item.name: values(item, marker.kwargs.get("each")) for item in product}
        kept = covering(cases, *marker.args)
        for item in product:
            if item.name not in kept:
                item.add_marker(pytest.mark.exhaustive)
