"""The command line, `python -m fastopt info | demo | bench`: arguments and error messages. The work is elsewhere."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fastopt
from fastopt import _formats, backends, demo
from fastopt import _info as _info_of
from fastopt.rules import registry

FAILED = 2
"""Exit code for what argparse exits with 2 for too: the work could not start."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command in `arguments` (those of the process if None) and return its exit code."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    if parsed.run is None:
        parser.print_help()
        return 0
    try:
        _check_environment()
    except (ImportError, ValueError) as error:
        return _fail(str(error))
    return parsed.run(parsed)


def _parser() -> argparse.ArgumentParser:
    """Each command adds a parser of its own, whose default `run` does the work and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fastopt", description="fastopt from the command line.")
    parser.add_argument("--version", action="version", version=f"fastopt {fastopt.__version__}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_info(commands)
    _add_demo(commands)
    _add_bench(commands)
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
    print(" " * width + "".join(f"{state_dtype:>10}" for state_dtype in _formats.STATE_DTYPES))
    for spec in registry.values():
        sizes = [_info_of.state_bytes(spec, state_dtype) for state_dtype in _formats.STATE_DTYPES]
        print(f"{spec.name:<{width}}" + "".join(f"{size:>10.4g}" for size in sizes))
    print("\ncuda")
    found = _info_of.cuda()
    width = max(map(len, found))
    for key, value in found.items():
        print(f"{key:<{width}}  {value}")
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
    names = f"of the learning rate, one of {', '.join(demo.SCHEDULES)} (default: none)"
    add("--schedule", type=str.lower, choices=tuple(demo.SCHEDULES), metavar="NAME", help=names)
    stopping = "end after so many epochs without a better validation loss, and keep the best (default: never)"
    add("--early-stopping", type=_at_least(1), metavar="EPOCHS", help=stopping)
    parser.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    missing = demo.missing_packages()
    if missing:
        return _fail(f'the demo needs {", ".join(missing)}: python -m pip install "fastopt[demo]"')
    try:
        return demo.run(
            arguments.optimizers,
            arguments.epochs,
            arguments.seed,
            arguments.output,
            arguments.schedule,
            arguments.early_stopping,
        )
    except OSError as error:
        return _fail(str(error))


# --- bench ------------------------------------------------------------------------------------------------

BENCH_PACKAGES = {
    "pytest": "pytest",
    "pytest_benchmark": "pytest-benchmark",
    "matplotlib": "matplotlib",
    "tqdm": "tqdm",
    "Cython": "cython",
    "setuptools": "setuptools",
}
"""What only the benchmark needs: name of the module -> name of the package."""
SOURCES = Path(fastopt.__file__).resolve().parents[1]
"""The source checkout, where fastopt is installed from one in place."""


def _add_bench(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure every optimizer beside its peers and the machine's bandwidth",
        description="Measure steps over the parameter count, models, the whole tail, hard inputs and threads, beside "
        "every peer that is installed and a probe that moves the same bytes; write results.json, report.md and plots.",
    )
    add = parser.add_argument
    default = " (default: %(default)s)"
    add(
        "--output",
        type=Path,
        default=Path("fastopt-bench"),
        metavar="DIR",
        help=f"folder to write{default}",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", dest="mode", action="store_const", const="quick", help="two minutes instead of ten")
    length.add_argument("--full", dest="mode", action="store_const", const="full", help="everything, half an hour")
    names = f"the curves of these alone, of {', '.join(registry)}"
    add("--optimizers", nargs="+", type=str.lower, choices=tuple(registry), metavar="NAME", help=names)
    add("--sizes", nargs="+", type=_size, metavar="N", help="the curves at these numbers of parameters alone, as 2^16")
    add("--peers", nargs="*", type=str.lower, metavar="NAME", help="these alone (default: every one that is installed)")
    add("--threads", nargs="+", type=_threads, metavar="N", help="the largest everywhere, all of them for the scaling")
    add("--backend", default="cpu", choices=("cpu", "cuda"), help=f"of fastopt{default}")
    add("--check", action="store_true", help="exit code 1 if a promise of fastopt fell short")
    parser.set_defaults(run=lambda arguments: _bench(arguments, parser), mode="default")
    compare = parser.add_subparsers(title="commands", metavar="COMMAND").add_parser(
        "compare", help="say what changed from one run to another", description="Compare two runs of the benchmark."
    )
    for which in ("before", "after"):
        compare.add_argument(which, type=Path, metavar=which.upper(), help="folder with results.json")
    compare.set_defaults(run=_compare)


def _bench(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if arguments.backend == "cuda" and arguments.threads:
        parser.error("argument --threads: is of the backend cpu alone")
    try:
        runner = _runner()
        if unknown := [name for name in arguments.peers or () if name not in runner.PEERS]:
            parser.error(f"argument --peers: invalid choice: {unknown[0]!r} (choose from {', '.join(runner.PEERS)})")
        return runner.run(
            arguments.mode,
            arguments.output,
            arguments.optimizers,
            arguments.sizes,
            arguments.peers,
            arguments.threads,
            arguments.backend,
            arguments.check,
        )
    except (ImportError, OSError, RuntimeError) as error:
        return _fail(str(error))


def _compare(arguments: argparse.Namespace) -> int:
    try:
        return _runner().compare_folders(arguments.before, arguments.after)
    except (ImportError, ValueError) as error:
        return _fail(str(error))


def _runner() -> Any:
    """The module `bench.run` of the source checkout; ImportError says what to do where it cannot run."""
    if not (SOURCES / "bench" / "run.py").exists():
        raise ImportError(
            "the benchmark is no part of the installed package: clone fastopt's repository and run "
            '`python -m pip install -e ".[bench]"` in it'
        )
    missing = [package for module, package in BENCH_PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(f'the benchmark needs {", ".join(missing)}: python -m pip install -e "{SOURCES}[bench]"')
    sys.path.insert(0, str(SOURCES))
    return importlib.import_module("bench.run")


LARGEST_SIZE = 1 << 33


def _size(text: str) -> int:
    """A number of parameters: 65536, 2^16 or 1e5."""
    if found := re.fullmatch(r"(\d+)(?:\^|\*\*)(\d{1,2})", text):
        value = int(found[1]) ** int(found[2])
    elif re.fullmatch(r"\d+(\.\d+)?[eE]\+?\d{1,2}", text) and float(text).is_integer():
        value = int(float(text))
    elif text.isdigit():
        value = int(text)
    else:
        raise argparse.ArgumentTypeError(f"must be a number such as 65536, 2^16 or 1e5, got {text!r}")
    if not 1 <= value <= LARGEST_SIZE:
        raise argparse.ArgumentTypeError(f"must be between 1 and 2^33, got {text}")
    return value


def _threads(text: str) -> int:
    value = _at_least(1)(text)
    if value > 4096:
        raise argparse.ArgumentTypeError(f"must be at most 4096, got {value}")
    return value


def _at_least(low: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {value}")
        return value

    return integer


if __name__ == "__main__":
    sys.exit(main())
