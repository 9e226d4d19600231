"""The command line, `python -m fastopt info | demo`: arguments and error messages. The work is done elsewhere."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fastopt
from fastopt import _codecs, backends, demo
from fastopt import _info as _info_of
from fastopt._rule import registry

FAILED = 2
"""Exit code for what argparse exits with 2 for too: the work could not start."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command in `arguments` (those of the process if None) and return its exit code."""
    parsed = _parser().parse_args(arguments)
    try:
        _check_environment()
    except (ImportError, ValueError) as error:
        return _fail(str(error))
    return parsed.run(parsed)


def _parser() -> argparse.ArgumentParser:
    """Each command adds a parser of its own, whose default `run` does the work and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fastopt", description="fastopt from the command line.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_info(commands)
    _add_demo(commands)
    return parser


def _check_environment() -> None:
    """Raise ValueError for environment variables of fastopt that name what is not there."""
    fastopt.info()
    backends.resolve("auto")


def _fail(message: str) -> int:
    print(f"fastopt: {message}", file=sys.stderr)
    return FAILED


# --- info -------------------------------------------------------------------------------------------------


def _add_info(commands: Any) -> None:
    summary = "print what was built and what runs here"
    parser = commands.add_parser("info", help=summary, description=f"{summary.capitalize()}.")
    parser.set_defaults(run=_info)


def _info(_: argparse.Namespace) -> int:
    rows = fastopt.info().items()
    width = max(len(key) for key, _ in rows)
    for key, value in rows:
        print(f"{key:<{width}}  {', '.join(value) if isinstance(value, list) else value}")
    print("\nstate, bytes per parameter")
    width = max(len(spec.name) for spec in registry.values())
    print(" " * width + "".join(f"{state_dtype:>10}" for state_dtype in _codecs.STATE_DTYPES))
    for spec in registry.values():
        sizes = [_info_of.state_bytes(spec, state_dtype) for state_dtype in _codecs.STATE_DTYPES]
        print(f"{spec.name:<{width}}" + "".join(f"{size:>10.4g}" for size in sizes))
    return 0


# --- demo -------------------------------------------------------------------------------------------------


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="train a small network with every optimizer",
        description="Train a small network on handwritten digits with every optimizer, with the compiled kernels "
        f"and with the NumPy reference; print a table and write the loss curves to {demo.CURVES}. Exit code 1 if "
        "the two disagree.",
    )
    add = parser.add_argument
    default = " (default: %(default)s)"
    add("--epochs", type=_at_least(1), default=demo.EPOCHS, metavar="N", help=f"passes over the data{default}")
    add("--output", type=Path, default=Path("fastopt-demo"), metavar="DIR", help=f"for the picture{default}")
    names = f"of {', '.join(registry)} (default: all)"
    add("--optimizers", nargs="+", type=str.lower, choices=tuple(registry), metavar="NAME", help=names)
    add("--seed", type=_at_least(0), default=0, metavar="N", help=f"of initial weights and batches{default}")
    parser.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    missing = demo.missing_packages()
    if missing:
        return _fail(f'the demo needs {", ".join(missing)}: python -m pip install "fastopt[demo]"')
    try:
        return demo.run(arguments.optimizers, arguments.epochs, arguments.seed, arguments.output)
    except OSError as error:
        return _fail(str(error))


def _at_least(low: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {value}")
        return value

    return integer


if __name__ == "__main__":
    sys.exit(main())
