"""The command line, run as users run it: `info`, help and the errors that stop a command before its work."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

import fastopt
from fastopt._formats import STATE_DTYPES
from fastopt.rules import registry


def run(*arguments, **environment):
    """`python -m fastopt` with the arguments, and with these environment variables on top."""
    return subprocess.run(
        [sys.executable, "-m", "fastopt", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def assert_one_line_error(finished, *mentioned):
    assert finished.returncode == 2, finished
    assert finished.stdout == ""
    assert len(finished.stderr.splitlines()) == 1, finished.stderr
    for text in mentioned:
        assert text in finished.stderr


def test_info_prints_every_key_of_info():
    finished = run("info")
    assert finished.returncode == 0, finished.stderr
    rows, *_ = finished.stdout.split("\n\n")
    assert [line.split()[0] for line in rows.splitlines()] == list(fastopt.info())


def test_info_prints_every_value_of_info_in_one_column():
    lines = run("info").stdout.split("\n\n")[0].splitlines()
    code = "import json, fastopt; print(json.dumps(fastopt.info()))"  # in this process, tests chose the threads
    info = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=120).stdout)
    column = max(map(len, info)) + 2
    shown = [", ".join(value) if isinstance(value, list) else str(value) for value in info.values()]
    assert [line[column:] for line in lines] == shown


def test_info_tells_the_memory_of_every_optimizer_and_state_dtype():
    title, header, *rows = run("info").stdout.split("\n\n")[1].splitlines()
    assert title == "state, bytes per parameter"
    assert header.split() == list(STATE_DTYPES)
    assert [row.split()[0] for row in rows] == [spec.name for spec in registry.values()]
    n = 64_000
    for row in rows:
        name, *sizes = row.split()
        for state_dtype, size in zip(header.split(), sizes, strict=True):
            optimizer = getattr(fastopt, name)(np.zeros(n, np.float32), state_dtype=state_dtype)
            assert optimizer.state_nbytes / n == pytest.approx(float(size), rel=1e-3)


def test_info_shows_the_instruction_set_of_the_environment():
    assert re.search(r"^isa +baseline$", run("info", FASTOPT_ISA="baseline").stdout, re.MULTILINE)


def test_help_names_every_command():
    finished = run("--help")
    assert finished.returncode == 0
    assert "info " in finished.stdout
    assert "demo " in finished.stdout


def test_help_of_the_demo_names_every_optimizer():
    words = run("demo", "--help").stdout.replace(",", " ").split()
    assert set(registry) <= set(words)


def test_without_a_command_the_help_is_printed():
    finished = run()
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout == run("--help").stdout
    assert "--version" in finished.stdout


def test_an_unknown_command_is_an_error_that_shows_the_usage():
    finished = run("inof")
    assert finished.returncode == 2
    assert finished.stderr.startswith("usage: python -m fastopt")


def test_version_is_printed():
    finished = run("--version")
    assert (finished.returncode, finished.stdout) == (0, f"fastopt {fastopt.__version__}\n")


def test_an_unknown_instruction_set_is_a_one_line_error():
    assert_one_line_error(run("info", FASTOPT_ISA="foo"), "FASTOPT_ISA", "'foo'")


def test_an_unknown_backend_is_a_one_line_error():
    assert_one_line_error(run("info", FASTOPT_BACKEND="foo"), "FASTOPT_BACKEND", "'foo'")


def test_a_broken_number_of_threads_is_a_one_line_error():
    assert_one_line_error(run("info", FASTOPT_NUM_THREADS="foo"), "FASTOPT_NUM_THREADS", "'foo'")


def test_the_demo_refuses_a_broken_environment_before_it_trains():
    assert_one_line_error(run("demo", FASTOPT_ISA="foo"), "FASTOPT_ISA", "'foo'")


def test_the_demo_refuses_an_unknown_optimizer():
    finished = run("demo", "--optimizers", "foo")
    assert finished.returncode == 2
    assert "invalid choice: 'foo'" in finished.stderr


def test_the_demo_refuses_zero_epochs():
    finished = run("demo", "--epochs", "0")
    assert finished.returncode == 2
    assert "argument --epochs: must be at least 1, got 0" in finished.stderr


def test_a_missing_package_is_a_one_line_error_that_says_how_to_install_it():
    hide = "import runpy, sys; sys.modules['sklearn'] = None; sys.argv = ['fastopt', 'demo']"
    start = "runpy.run_module('fastopt', run_name='__main__')"
    finished = subprocess.run([sys.executable, "-c", f"{hide}; {start}"], capture_output=True, text=True, timeout=120)
    assert_one_line_error(finished, "scikit-learn", 'python -m pip install "fastopt[demo]"')
