"""Faults to inject into a call: an interrupt at any of its bytecodes, a failure of any of its allocations.

Run as a script in a process whose allocations can fail, it lets those of an operation fail in turn. Also here:
a process of its own for a test that may crash or run out of memory.
"""

import contextlib
import ctypes
import faulthandler
import functools
import importlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

import pytest

import fastopt

_TRACED = (str(Path(fastopt.__file__).parent) + os.sep, contextlib.__file__)
_HERE = Path(__file__).parent


def interrupted(call, at, error=KeyboardInterrupt):
    """Run `call` with `error` raised before its bytecode number `at` inside fastopt; whether it came that far."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        if event == "call":
            if not frame.f_code.co_filename.startswith(_TRACED):
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        elif event == "opcode":
            count += 1
            if count > at:
                raise error
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except error:
        pass
    finally:
        sys.settrace(before)
    return count > at


# --- Memory that runs out


@functools.cache
def failing_malloc():
    """The compiled `failing_malloc.c`, to be preloaded; skips the test where that cannot be."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not sys.platform.startswith("linux") or compiler is None:
        pytest.skip("needs Linux and a C compiler, to put another malloc in front of the C library's")
    library = _HERE / "__pycache__" / "failing_malloc.so"
    library.parent.mkdir(exist_ok=True)
    flags = ["-shared", "-fPIC", "-O2", "-Wl,-z,defs"]
    made = subprocess.run([compiler, *flags, "-o", library, _HERE / "failing_malloc.c"], capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"needs glibc, to put another malloc in front of its own: {made.stderr.strip()[-200:]}")
    return library


def starve(name, kind, backend, every=1):
    """Let each allocation of an operation, or one of `every`, fail in a process of its own; return their number."""
    library = failing_malloc()
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-m", "tests.support.faults", library, name, kind, backend, str(every)],
        env={**os.environ, "LD_PRELOAD": str(library), "PYTHONMALLOC": "malloc"},
        cwd=_HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return int(done.stdout)


class _Malloc:
    """The allocation functions of this process."""

    def __init__(self, library, at_least):
        self.library = ctypes.CDLL(library)
        self.library.fail_allocation.argtypes = ctypes.c_long, ctypes.c_size_t
        self.library.stop_failing.restype = ctypes.c_long
        self.fail, self.stop = self.library.fail_allocation, self.library.stop_failing
        self.at_least = at_least

    def starved(self, call, number):
        """Run `call`, in which allocation `number` fails; whether there were that many."""
        self.fail(number, self.at_least)
        try:
            call()
        except (MemoryError, OSError, SystemError):  # the last from NumPy, where it forgot to say why
            pass
        finally:
            n_allocations = self.stop()
        return n_allocations > number


# --- A process of its own


_SERVER = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
if hasattr(os, "fork"):
    _SERVER.set_forkserver_preload(["pytest", "fastopt"])


def _report(connection, module, name, arguments):
    """In the other process: run a test and send what went wrong, if anything did."""
    faulthandler.enable()
    warnings.simplefilter("error")
    try:
        getattr(importlib.import_module(module), name).__wrapped__(**arguments)
    except BaseException:
        connection.send(traceback.format_exc())
    else:
        connection.send("")


def alone(test):
    """Run a test in a process of its own, which may crash or run out of memory without harm."""

    @functools.wraps(test)
    def run(**arguments):
        here, there = _SERVER.Pipe(duplex=False)
        process = _SERVER.Process(target=_report, args=(there, test.__module__, test.__name__, arguments))
        process.start()
        there.close()
        try:
            failure = here.recv() if here.poll(300) else "no end after 300 seconds"
        except EOFError:  # it has ended without a word
            process.join()
            failure = f"exit status {process.exitcode}"
        process.kill()
        process.join()
        assert not failure, failure

    return run


if __name__ == "__main__":
    from tests.support import operations

    # NumPy's scalars, of which the reference makes many, are not tested for memory (double_absolute in NumPy 2.4 writes
    # through NULL): there only allocations of the size of arrays fail.
    malloc = _Malloc(sys.argv[1], at_least=0 if sys.argv[4] == "cpu" else 100)
    malloc.starved(lambda: None, 0)
    print(operations.Expected(*sys.argv[2:5]).survives(malloc.starved, every=int(sys.argv[5])))
