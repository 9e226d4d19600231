"""The benchmark: throughput over the parameter count, beside every peer and the machine's own limit.

Run by `python -m fastopt bench` or `python -m pytest bench/ --benchmark-only`; no part of the installed package.
"""
