"""The benchmark's own logic on example results: statistics, what is measured, report, comparison, README, errors.

Nothing here measures time, and no peer but NumPy's is needed.
"""

import importlib.util
import math
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pytest

from fastopt.backends import compiled
from tests.support import example_results

bench = pytest.importorskip("bench", reason="the benchmark lies in the source checkout alone")

import fastopt
from bench import compare, figures, machine, peers, plots, probe, promises, race, report
from bench import results as bench_results
from bench.buffers import Buffers, largest_difference
from bench.peers import numpy_reference
from bench.samples import Sample, changed, ratio, seconds
from bench.workloads import (
    MODELS,
    MODES,
    MOMENTUM,
    Mode,
    Workload,
    _strings,
    bytes_held,
    from_memory,
    size_name,
    workloads,
)
from fastopt import __main__ as command_line
from fastopt import backends
from fastopt.rules import registry

SMALL = Workload("curves", "adam", "256", ((256,),), fastopt.get_num_threads())
BRIEF = Mode(60, 2, (256,), (), 0.1, (), block=0.001)
needs_a_compiler = pytest.mark.skipif(
    importlib.util.find_spec("Cython") is None, reason="building the probes needs Cython"
)


@pytest.fixture(scope="module", autouse=True)
def no_probes_for_other_tests():
    """Kernels of the probes are known to the engine only while these tests run."""
    before = set(compiled._added)
    yield
    for name in set(compiled._added) - before:
        del compiled._added[name]
    probe.build.cache_clear()


def load(tmp_path, data=None):
    return bench_results.load(example_results.write(tmp_path, example_results.results() if data is None else data))


# --- Statistics


def test_a_sample_has_median_and_quartiles():
    assert Sample.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Sample(2.0, 3.0, 4.0)
    assert Sample.of([7.0]) == Sample(7.0, 7.0, 7.0)


def test_no_sample_is_made_of_nothing():
    with pytest.raises(ValueError, match="at least one value, got none"):
        Sample.of([])


def test_ratios_pair_the_rounds_and_leave_out_those_that_one_side_sat_out():
    assert ratio([2.0, 40.0], [1.0, 10.0, 5.0]).median == 3.0


def test_spread_is_the_interquartile_range_over_the_median():
    assert Sample(9.0, 10.0, 11.0).spread == pytest.approx(0.2)
    assert Sample(9.0, 10.0, 11.0).is_noisy
    assert not Sample(9.9, 10.0, 10.1).is_noisy


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (Sample(19.0, 20.0, 21.0), True),
        (Sample(10.4, 20.0, 21.0), False),  # quartiles overlap
        (Sample(10.6, 10.4, 10.7), False),  # less than the smallest change
        (Sample(4.0, 5.0, 6.0), True),
    ],
)
def test_a_change_needs_separate_quartiles_and_a_minimum(after, expected):
    assert changed(Sample(9.5, 10.0, 10.5), after) is expected


@pytest.mark.parametrize(
    ("value", "text"), [(2e-7, "200 ns"), (1.5e-6, "1.5 us"), (0.0123, "12.3 ms"), (2.0, "2 s"), (1500.0, "1,500 s")]
)
def test_times_are_written_in_a_unit_that_fits(value, text):
    assert seconds(value) == text


def test_differences_count_in_units_in_the_last_place():
    one = np.ones(3, np.float32)
    assert largest_difference([one], [one + np.float32(2**-22)]) == 2.0
    nan = np.array([np.nan, 1, 1], np.float32)
    assert largest_difference([nan], [nan]) == 0.0
    assert math.isinf(largest_difference([one], [nan]))


# --- What is measured


@pytest.mark.parametrize("mode", MODES)
def test_every_workload_has_an_id_of_its_own(mode):
    ids = [workload.id for workload in workloads(MODES[mode])]
    assert len(ids) == len(set(ids))


def test_a_full_run_has_a_curve_for_every_optimizer_of_the_registry():
    found = workloads(MODES["full"])
    sizes = {name: {w.n for w in found if w.section == "curves" and w.function == name} for name in registry}
    for name, measured in sizes.items():
        assert {16, 2**8, 1000, 2**26, 10**7} <= measured, name


def test_a_full_run_has_every_optional_state():
    found = {w.states for w in workloads(MODES["full"]) if w.function == "rmsprop"}
    assert ("square_avg", "grad_avg", "momentum_buffer") in {tuple(sorted(s, key=len)) for s in found} or any(
        len(states) == 3 for states in found
    )


def test_every_promise_is_measured_in_a_full_run():
    found = {w.id for w in workloads(MODES["full"])}
    for title in promises.FUSED:
        assert {f"curves/{title}/{label}" for label in ("16", *promises.FASTER_THAN_FUSED)} <= found
    assert {f"tail/AdamW/{model}" for model in promises.TAIL} <= found
    assert {"models/Adam/1,000 x 64", "models/Adam/1,000 x 64, FlatBuffer"} <= found


@pytest.mark.parametrize(("model", "n", "tensors"), [("GPT-2 small", 124_439_808, 148), ("ResNet-50", 25_557_032, 161)])
def test_models_have_the_tensors_of_their_papers(model, n, tensors):
    assert (sum(math.prod(shape) for shape in MODELS[model]), len(MODELS[model])) == (n, tensors)


def test_optimizers_and_sizes_choose_curves_alone():
    found = workloads(MODES["quick"], ["lion", "sgd"], [2**10, 1000])
    assert [w.id for w in found] == [
        "curves/Lion/1e3",
        "curves/Lion/2^10",
        "curves/SGD, momentum 0.9/1e3",
        "curves/SGD, momentum 0.9/2^10",
    ]


@pytest.mark.parametrize("mode", MODES)
def test_on_a_gpu_curves_go_up_by_powers_of_ten(mode):
    found = workloads(MODES[mode], backend="cuda")
    assert {w.backend for w in found} == {"cuda"}
    assert {w.section for w in found} == {"curves", "models", "tail", "states"}
    sizes = {w.n for w in found if w.section == "curves" and w.function == "adam" and not w.hypers}
    assert sizes == set(MODES[mode].gpu_sizes)
    if mode == "full":
        assert sizes == {10**k for k in range(3, 10)}
        assert {w.function for w in found if w.section == "curves" and w.n == 10**8} == set(registry)


def test_threads_scale_up_to_the_largest_given():
    found = workloads(MODES["quick"], threads=[1, 3])
    assert {w.n_threads for w in found if w.section == "threads"} == {1, 3}
    assert {w.n_threads for w in found if w.section == "curves"} == {3}


def test_low_precision_states_come_from_the_options_type():
    literal = typing.Literal["float32", "bfloat16", "8bit"] | None
    assert _strings(literal) == ["float32", "bfloat16", "8bit"]
    assert _strings(int | None) == []
    assert _strings(None) == []


@pytest.mark.parametrize(("n", "name"), [(16, "16"), (256, "2^8"), (1000, "1e3"), (5 * 10**7, "5e7"), (12345, "12345")])
def test_sizes_have_short_names(n, name):
    assert size_name(n) == name


@pytest.mark.parametrize(("function", "hypers", "moved"), [("sgd", (), 12), ("sgd", MOMENTUM, 20), ("lamb", (), 40)])
def test_bytes_are_those_of_the_kernel(function, hypers, moved):
    workload = Workload("curves", function, "1", ((1,),), 1, hypers)
    assert workload.bytes_per_parameter == moved


# --- The probe


@pytest.mark.parametrize("moved", [12, 20, 28, 36, 40])
def test_probes_move_just_the_bytes_of_a_rule(moved):
    assert sum(map(probe.bytes_of, probe.passes(moved))) == moved


@pytest.mark.parametrize("moved", [16.03, 20.1, 46])
def test_probes_move_nearly_the_bytes_of_what_is_no_sum_of_streams(moved):
    assert 0.74 * moved <= sum(map(probe.bytes_of, probe.passes(moved))) <= moved


@needs_a_compiler
@pytest.mark.parametrize("n_states", range(4))
def test_a_probe_reads_and_writes_every_value(n_states):
    """What comes out is what went in, passed round: a compiler that had left out a load could not know it."""
    probe.build()
    rng = np.random.default_rng(n_states)
    cls = probe.PROBES[n_states]
    p, g, *states = rng.standard_normal((2 + n_states, 70_001)).astype(np.float32)
    optimizer = cls(p)
    for name, values in zip(cls.spec.states, states, strict=True):
        optimizer.state[0][name][:] = values
    expected = cls.reference(p.copy(), g, *states, step=1)
    optimizer.step(g)
    found = [p, *(optimizer.state[0][name] for name in cls.spec.states)]
    for one, other in zip(found, expected, strict=True):
        assert one.tobytes() == other.tobytes()


def test_a_probe_does_nothing_but_move_and_add():
    for cls in probe.PROBES:
        text = probe.source("test").split(f"{cls.__name__.lower()}_span(")[1].split("cdef void")[0]
        assert "*" not in text.replace("cdef", "")
        assert text.count(" + ") == 1


# --- Races


class Liar(numpy_reference.Adapter):
    """A peer that takes a step and adds a little."""

    def prepare(self, workload, buffers):
        contestant = super().prepare(workload, buffers)
        honest = contestant.step

        def step():
            honest()
            buffers.params[0][0] += 1

        contestant.step = step
        return contestant


class Broken(numpy_reference.Adapter):
    """A peer that fails."""

    def prepare(self, workload, buffers):
        raise OSError("no ninja\nsecond line")


def run_race(adapters, workload=SMALL, mode=BRIEF, pace=None):
    return race.Race(workload, adapters, mode, pace or race.Pace()).run()


@needs_a_compiler
def test_a_peer_counts_only_after_its_results_agreed():
    outcome = run_race({"numpy": numpy_reference.Adapter(), "liar": Liar()})
    assert set(outcome.measured) == {"fastopt", "numpy", "probe"}
    assert re.fullmatch(r"disagrees: .* ULP from fastopt, 32 allowed", outcome.left_out["liar"])


@needs_a_compiler
def test_a_peer_that_fails_is_left_out_with_its_reason():
    outcome = run_race({"broken": Broken()})
    assert outcome.left_out == {"broken": "failed: OSError: no ninja"}


@needs_a_compiler
def test_states_in_low_precision_run_beside_float32():
    kept = Workload("states", "adam", "test", ((256,),), 1, options=(("copy_dtype", "bfloat16"),))
    assert set(run_race({}, kept).measured) == {"fastopt", "probe", "fastopt, float32 states"}


def test_an_option_of_states_that_optimizers_refuse_is_left_out_with_the_reason():
    refused = Workload("states", "adam", "test", ((256,),), 1, options=(("no_such_option", "8bit"),))
    assert run_race({}, refused).left_out["fastopt"].startswith("failed: TypeError: Adam: unknown arguments")


@needs_a_compiler
def test_contestants_take_turns(monkeypatch):
    order = []
    monkeypatch.setattr(race, "cpu_seconds_of_others", lambda: 0.0)
    monkeypatch.setattr(race, "block", lambda contestant, *_: order.append(contestant) or 1e-6)
    run_race({"numpy": numpy_reference.Adapter()})
    assert len(order) == 6
    assert order[:3] == order[3:]
    assert len({id(contestant) for contestant in order}) == 3


@needs_a_compiler
def test_rounds_disturbed_by_others_are_run_again(monkeypatch):
    clock = iter([0.0, 9.0, 9.0, 9.0, 9.0, 9.0])  # the first round's others take nine seconds
    times = iter([5e-6, 5e-6, 1e-6, 1e-6, 1e-6, 1e-6])
    monkeypatch.setattr(race, "cpu_seconds_of_others", lambda: next(clock))
    monkeypatch.setattr(race, "block", lambda *_: next(times))
    measured = run_race({}).measured["fastopt"]
    assert measured.times == [1e-6, 1e-6]
    assert not measured.disturbed


def test_a_step_that_would_take_too_long_is_left_out_with_the_reason():
    pace = race.Pace()
    pace.note("numpy", Workload("curves", "adam", "1e5", ((10**5,),), 1), 0.01)
    large = Workload("curves", "adam", "1e7", ((10**7,),), 1)
    contest = race.Race(large, {"numpy": numpy_reference.Adapter()}, BRIEF, pace)
    contest.foretold_seconds()
    assert contest.outcome.left_out == {"numpy": "a step would take about 1 s, over this run's limit of 0.1 s"}


def test_large_steps_foretell_small_ones_in_proportion():
    pace = race.Pace()
    pace.note("numpy", Workload("curves", "adam", "1e7", ((10**7,),), 1), 1.0)
    pace.note("numpy", Workload("curves", "adam", "1e5", ((10**5,),), 1), 5.0)
    assert pace.foretold("numpy", Workload("curves", "adam", "1e6", ((10**6,),), 1)) == pytest.approx(0.1)


def test_many_tensors_foretell_nothing():
    pace = race.Pace()
    pace.note("numpy", Workload("models", "adam", "many", ((64,),) * 1000, 1), 0.03)
    assert pace.foretold("numpy", Workload("curves", "adam", "1e7", ((10**7,),), 1)) is None


def test_small_steps_foretell_nothing():
    pace = race.Pace()
    pace.note("numpy", Workload("curves", "adam", "1e3", ((1000,),), 1), 1e-3)
    assert pace.foretold("numpy", Workload("curves", "adam", "1e7", ((10**7,),), 1)) is None


@pytest.mark.parametrize("form", ["list", "FlatBuffer"])
def test_buffers_are_as_before_the_first_step_after_a_reset(form):
    workload = Workload("models", "adagrad", "test", ((3, 4), (5,)), 1, form=form)
    buffers = Buffers(workload)
    before = [array.copy() for array in (*buffers.params, *buffers.grads, *buffers.states["sum"])]
    for array in (*buffers.params, *buffers.grads, *buffers.states["sum"]):
        array += 1
    buffers.reset()
    for one, other in zip((*buffers.params, *buffers.grads, *buffers.states["sum"]), before, strict=True):
        assert one.tobytes() == other.tobytes()


# --- Peers


@pytest.mark.parametrize("name", ["torch-fused", "torch-foreach"])
def test_torch_keeps_its_states_in_the_buffers(name):
    pytest.importorskip("torch")
    workload = Workload("curves", "adam", "256", ((256,),), 1)
    buffers = Buffers(workload)
    contestant = peers.load(name).prepare(workload, buffers)
    contestant.step()
    contestant.adopt()
    buffers.reset()
    contestant.step()
    assert np.allclose(buffers.states["exp_avg"][0], 0.1 * buffers.grads[0])


def test_no_peer_is_imported_before_it_is_asked_for():
    text = (
        "import sys, bench.run\nfrom bench.peers import MODULES, load\n"
        "for name in MODULES: load(name).missing()\n"
        "print([m for m in ('torch', 'jax', 'optax', 'deepspeed', 'thinc', 'numba', 'sklearn') if m in sys.modules])"
    )
    root = Path(bench.__file__).resolve().parents[1]
    finished = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, cwd=root, timeout=120)
    assert finished.stdout == "[]\n", finished.stderr


@pytest.mark.parametrize("name", peers.MODULES)
def test_a_peer_that_is_not_installed_says_how_to_install_it(name, monkeypatch):
    adapter = peers.load(name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    packages = list(adapter.requires.values())
    assert adapter.missing() == (f"not installed: python -m pip install {' '.join(packages)}" if packages else None)


@pytest.mark.parametrize("name", peers.MODULES)
def test_every_peer_has_a_part_in_the_curve_of_adam(name):
    assert peers.load(name).refuses(SMALL) is None


def test_the_plots_have_a_style_for_every_peer():
    assert set(plots.STYLES) == {"fastopt", "probe", *peers.MODULES}


# --- The machine


def test_caches_are_read_from_linux(tmp_path):
    levels = [("1", "Data", "48K", "0"), ("1", "Instruction", "32K", "0"), ("3", "Unified", "32M", "0-3,8")]
    for k, values in enumerate(levels):
        folder = tmp_path / f"index{k}"
        folder.mkdir()
        for name, value in zip(("level", "type", "size", "shared_cpu_list"), values, strict=True):
            (folder / name).write_text(value + "\n")
    assert machine.caches(tmp_path) == [
        {"level": 1, "bytes": 48 << 10, "shared_by": 1},
        {"level": 3, "bytes": 32 << 20, "shared_by": 5},
    ]
    assert machine.caches(tmp_path / "nothing") == []


def test_threads_reach_the_caches_of_their_cores():
    assert machine.reachable({"level": 2, "bytes": 100, "shared_by": 1}, 4) == 400
    assert machine.reachable({"level": 3, "bytes": 100, "shared_by": 4}, 6) == 200


# --- The report


def test_the_report_names_every_place_where_fastopt_is_behind(tmp_path):
    found = [(cell.workload, shortfall) for cell, shortfall in report.behind(load(tmp_path))]
    assert found == [("curves/Adam/1e7", "optax is 1.25 times as fast"), ("curves/Adam/1e7", "90% of the probe")]


def test_a_peer_that_is_ahead_within_the_quartiles_is_named_as_that(tmp_path):
    ours = example_results.entry("curves/Adam/1e3", "fastopt", [1.0e-6, 1.0e-6, 1.0e-6, 1.0e-6])
    peer = example_results.entry("curves/Adam/1e3", "optax", [0.98e-6, 0.98e-6, 0.99e-6, 1.05e-6])
    (cell,) = load(tmp_path, example_results.results([ours, peer])).cells
    assert cell.shortfalls == ["optax is 1.02 times as fast, but within the quartiles"]


def test_the_report_has_speed_share_and_the_fastest_peer_by_name(tmp_path):
    text = report.text(load(tmp_path))
    assert "| 1e5 | 20 us (19.8..20.2) | 0.2 | 140 | L2 | 90% (90..90) | 2 (2..2) | torch-fused |" in text
    assert "| 1e7 | 5 ms (4.95..5.05) | 0.5 | 56 | memory | 90% (90..90) | 0.8 (0.8..0.8) | optax |" in text


def test_the_report_says_where_the_probe_is_a_roof(tmp_path):
    assert "the last-level cache, 32 MiB for these threads, 4 times: only there is the probe a roof" in report.text(
        load(tmp_path)
    )
    data = example_results.results()
    data["machine_info"]["fastopt"]["caches"][2]["bytes"] = 480 << 20
    assert "it says nothing of steps from memory" in report.text(load(tmp_path, data))
    data["machine_info"]["fastopt"]["caches"] = []
    assert "The caches of this machine are not known" in report.text(load(tmp_path, data))


@pytest.mark.parametrize(
    ("n", "where"),
    [(10**3, "L1"), (10**5, "L2"), (2 * 10**6, "L3"), (8 * 10**6, "L3 and memory"), (9 * 10**6, "memory")],
)
def test_arrays_lie_in_memory_from_four_times_the_last_level_cache_on(tmp_path, n, where):
    (cell,) = load(
        tmp_path, example_results.results([example_results.entry("curves/Adam/n", "fastopt", [1.0], parameters=n)])
    ).cells
    assert (cell.arrays_in, cell.is_from_memory) == (where, where == "memory")


@pytest.mark.parametrize(
    ("options", "held"),
    [((), 16), ((("state_dtype", "bfloat16"),), 12), ((("ema_decay", 0.9), ("copy_dtype", "bfloat16")), 22)],
    ids=str,
)
def test_held_bytes_are_those_of_the_arrays(options, held):
    n = 64_000
    optimizer = fastopt.Adam(np.zeros(n, np.float32), **dict(options))
    extra = n * (4 * ("ema_decay" in dict(options)) + 2 * ("copy_dtype" in dict(options)))
    assert bytes_held("adam", (), options) * n == held * n == 8 * n + optimizer.state_nbytes + extra


@pytest.mark.parametrize(
    ("cache", "memory", "n"),
    [
        (32 << 20, 64 << 30, 5 * 10**7),
        (480 << 20, 64 << 30, 2 * 10**8),
        (480 << 20, 8 << 30, 10**8),
        (None, None, 5 * 10**7),
        (480 << 20, 1 << 30, 5 * 10**7),
    ],
)
def test_the_largest_steps_fill_the_last_level_cache_four_times(cache, memory, n):
    assert from_memory(16, cache, memory) == n
    found = {w.n for w in workloads(MODES["full"], cache=cache, memory=memory) if w.id.startswith("curves/Adam/")}
    assert max(found) == max(n, 2**26)


def test_the_report_says_what_was_left_out_and_why(tmp_path):
    text = report.text(load(tmp_path))
    assert "- thinc: left out, not installed: python -m pip install thinc" in text
    assert "- numpy: a step would take too long for this run (curves/Adam/1e7)" in text
    assert "optax: optax 8.8 (allocates its own arrays)" in text


def test_promises_on_a_gpu_are_others():
    def verdicts(title, label, **times):
        workload = f"curves/{title}/{label}"
        benchmarks = [
            example_results.entry(
                workload, name.replace("_", "-"), [t] * 3, backend="cuda", parameters=int(float(label))
            )
            for name, t in times.items()
        ]
        entries = {
            one["extra_info"]["contestant"]: bench_results.Entry(
                workload, one["extra_info"]["contestant"], tuple(one["stats"]["data"]), one["extra_info"]
            )
            for one in benchmarks
        }
        found = promises._on_gpu(bench_results.Cell(workload, entries))
        return [(round(v.value, 2), v.bound, v.kept) for v in found]

    fused = verdicts("Adam", "1e8", fastopt=1.0, probe=0.9, torch_fused=1.1, torch_foreach=0.5)
    assert fused == [(0.9, 0.92, False), (1.1, 1.0, True), (1.0, 32.0, True)]
    unfused = verdicts("RMSprop", "1e8", fastopt=1.0, probe=0.95, torch_foreach=4.0, torch_compile=2.5)
    assert unfused == [(0.95, 0.92, True), (2.5, 3.0, False), (1.0, 32.0, True)]
    assert verdicts("Adam", "1e3", fastopt=1.0, probe=0.1, torch_fused=0.9) == [(0.9, 1.0, False), (1.0, 32.0, True)]


def test_the_report_names_promises_that_fell_short(tmp_path):
    text = report.text(load(tmp_path))
    assert "- Adam, 1e3: 2 x torch fused, bench/promises.py promises >= 30" in text
    assert "5 of 6 measurements" not in text  # 1e3 and 1e5 fall short of their factors
    assert "4 of 6 measurements keep what `bench/promises.py` promises; fell short:" in text


def test_a_quiet_run_has_no_warning_and_a_noisy_one_has(tmp_path):
    assert report.noisy(load(tmp_path)) == []
    noisy = [example_results.entry("curves/Adam/1e3", "fastopt", [1e-6, 2e-6, 3e-6])]
    warnings = report.noisy(load(tmp_path, example_results.results(noisy, others=0.5)))
    assert "in 1 of 1 workloads" in warnings[0]
    assert "curves/Adam/1e3" in warnings[0]
    assert "took 50% of one processor" in warnings[1]
    assert "**Noisy machine:**" in report.text(load(tmp_path, example_results.results(noisy, others=0.5)))


def test_a_report_of_fastopt_alone_has_no_peers_to_name(tmp_path):
    alone = [example_results.entry("curves/Adam/1e3", "fastopt", [1e-6] * 3)]
    text = report.text(load(tmp_path, example_results.results(alone, peers={}, notes={}, missing={}, left_out=[])))
    assert "| 1e3 | 1 us (1..1) | 1 | 28 | L1 |  |  |  |" in text
    assert "Nowhere." in text


def test_every_section_of_a_run_is_in_the_report(tmp_path):
    entries = [
        *example_results.curve(),
        example_results.entry("models/Adam/1,000 x 64", "fastopt", [50e-6]),
        example_results.entry("tail/AdamW/small MLP", "fastopt", [20e-6]),
        example_results.entry("tail/AdamW/small MLP", "torch-fused", [60e-6]),
        example_results.entry("tail/AdamW/small MLP", "fastopt, update alone", [8e-6]),
        example_results.entry("hard/Adam/normal, 1e5", "fastopt", [20e-6]),
        example_results.entry("hard/Adam/NaN gradients, 1e5", "fastopt", [60e-6], input="NaN gradients"),
        example_results.entry("states/Adam/state_dtype bfloat16, 1e7", "fastopt", [4e-3], bytes_per_parameter=20.0),
        example_results.entry("states/Adam/state_dtype bfloat16, 1e7", "fastopt, float32 states", [5e-3]),
        example_results.entry("states/Adam/state_dtype 8bit, 5e7", "fastopt", [20e-3], parameters=5 * 10**7),
        example_results.entry("states/Adam/state_dtype 8bit, 5e7", "fastopt, float32 states", [24e-3]),
        example_results.entry("threads/Adam/1e7, 2 threads", "fastopt", [5e-3]),
        example_results.entry("cold/import/after NumPy", "fastopt", [0.06]),
        example_results.entry("memory/Adam/1e6 to 1e7", "fastopt", [5e-3], growth={"python": 0.0, "resident": 0.2}),
    ]
    text = report.text(load(tmp_path, example_results.results(entries)))
    assert "| Adam, NaN gradients, 1e5 | 60 us, 3.00 x |" in text
    assert "- whole tail, small MLP: 3 x torch's calls, bench/promises.py promises >= 4" in text
    assert "- import fastopt after NumPy: 60 ms, bench/promises.py promises <= 50" in text
    assert "- Adam, memory of a step (resident): 0.2 B per parameter, bench/promises.py promises <= 0.1" in text
    assert "| 20 | 5 ms (5..5) | 1.25 (1.25..1.25) |" in text
    assert "- Adam, state_dtype 8bit, 5e7: 1.2 x float32 states, bench/promises.py promises >= 1.3" in text
    assert "state_dtype bfloat16, 1e7: 1.25 x" not in text
    for heading in (
        "Models",
        "States in low precision",
        "The whole tail",
        "Inputs that make steps slow",
        "Threads",
        "Cold start",
        "Memory",
    ):
        assert f"\n## {heading}" in text


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"machine_info": {}, "benchmarks": []}'])
def test_what_is_no_result_is_refused_by_name(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=r"results\.json: expected results of `python -m fastopt bench`"):
        bench_results.load(tmp_path)


def test_curves_are_drawn_as_png_and_svg(tmp_path):
    pytest.importorskip("matplotlib")
    written = plots.draw_all(load(tmp_path), tmp_path)
    assert [path.name for path in written] == ["adam.png", "adam.svg"]
    assert written[0].read_bytes().startswith(b"\x89PNG")
    svg = written[1].read_text()
    assert "roof: the probe at 1e7, 62 GB/s" in svg
    assert "L2 2 MiB" in svg


# --- Comparison


def test_a_comparison_names_what_changed_beyond_noise(tmp_path):
    before = example_results.results()
    after = example_results.results()
    after["benchmarks"][0]["stats"]["data"] = [2e-6, 2.04e-6, 1.96e-6]  # fastopt at 1e3
    after["benchmarks"][5]["stats"]["data"] = [9e-6, 9e-6, 9e-6]  # the probe at 1e5
    after["benchmarks"][4]["stats"]["data"] = [20.4e-6, 20.8e-6, 20.2e-6]  # fastopt at 1e5, by 2%
    text = compare.text(load(tmp_path / "a", before), load(tmp_path / "b", after))
    assert text == (
        "1 slower:\n  2.00 x  curves/Adam/1e3, fastopt: 1 us to 2 us\n"
        "1 faster:\n  0.50 x  curves/Adam/1e5, probe: 18 us to 9 us\n"
        "10 of 12 measurements the same: medians within 5%, or quartiles that overlap\n"
    )


def test_a_comparison_says_when_machines_and_versions_differ(tmp_path):
    after = example_results.results(
        example_results.curve()[:4], peers={"torch-fused": "torch 10", "optax": "optax 8.8"}
    )
    after["machine_info"]["fastopt"]["cpus"] = 4
    text = compare.text(load(tmp_path / "a"), load(tmp_path / "b", after))
    assert "cpus differs: 2 and 4\n" in text
    assert "peer torch-fused differs: torch 9.9 and torch 10\n" in text
    assert "nothing slower\nnothing faster\n" in text
    assert "8 measured only before\n" in text


# --- The command line


def run(*arguments, **environment):
    """`python -m fastopt bench` with the arguments, and with these environment variables on top."""
    command = [sys.executable, "-m", "fastopt", "bench", *arguments]
    environment = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizers", "foo"], "argument --optimizers: invalid choice: 'foo'"),
        (["--sizes", "many"], "argument --sizes: must be a number such as 65536, 2^16 or 1e5, got 'many'"),
        (["--sizes", "0"], "argument --sizes: must be between 1 and 2^33, got 0"),
        (["--sizes", "2^40"], "argument --sizes: must be between 1 and 2^33, got 2^40"),
        (["--sizes", "1.5e0"], "argument --sizes: must be a number such as"),
        (["--threads", "0"], "argument --threads: must be at least 1, got 0"),
        (["--threads", "9999"], "argument --threads: must be at most 4096, got 9999"),
        (["--quick", "--full"], "not allowed with argument"),
        (["--backend", "tpu"], "argument --backend: invalid choice: 'tpu'"),
        (["--backend", "cuda", "--threads", "2"], "argument --threads: is of the backend cpu alone"),
        (["compare", "one"], "the following arguments are required: AFTER"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        command_line.main(["bench", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "n"), [("65536", 65536), ("2^16", 65536), ("2**3", 8), ("1e5", 10**5), ("5e7", 5 * 10**7)]
)
def test_sizes_are_numbers_powers_and_exponents(text, n):
    assert command_line._size(text) == n


def test_the_installed_package_says_where_the_benchmark_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command_line, "SOURCES", tmp_path)
    assert command_line.main(["bench"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastopt: the benchmark is no part of the installed package: clone")
    assert len(error.splitlines()) == 1


def test_a_missing_package_is_named_with_how_to_install_it(monkeypatch, capsys):
    if not (command_line.SOURCES / "bench").exists():
        pytest.skip("fastopt is not installed from its sources")
    monkeypatch.setitem(command_line.BENCH_PACKAGES, "no_such_module", "no-such-package")
    assert command_line.main(["bench"]) == 2
    assert "the benchmark needs" in (error := capsys.readouterr().err)
    assert "no-such-package: python -m pip install -e" in error


@pytest.fixture
def runner():
    """`python -m fastopt bench` can start."""
    for module in command_line.BENCH_PACKAGES:
        pytest.importorskip(module)
    if not (command_line.SOURCES / "bench").exists():
        pytest.skip("fastopt is not installed from its sources")


def test_an_unknown_peer_is_refused_with_those_there_are(runner):
    finished = run("--peers", "foo")
    assert finished.returncode == 2
    assert "argument --peers: invalid choice: 'foo' (choose from torch-fused, " in finished.stderr


def test_comparing_what_is_not_there_is_a_one_line_error(runner, tmp_path):
    finished = run("compare", str(tmp_path / "a"), str(tmp_path / "b"))
    assert finished.returncode == 2
    assert re.fullmatch(r"fastopt: .*a: No such file or directory\n", finished.stderr)


@pytest.mark.exhaustive
def test_a_run_on_the_gpu_of_the_simulator(runner, tmp_path):
    """The whole way with arrays on the device; the simulator's times mean nothing."""
    try:
        backends.resolve("cuda")
    except ImportError as error:
        pytest.skip(str(error))
    arguments = ("--quick", "--backend", "cuda", "--sizes", "16", "100", "--optimizers", "adam", "--output", tmp_path)
    finished = run(*arguments, NUMBA_ENABLE_CUDASIM="1", FASTOPT_CACHE_DIR=str(tmp_path / "kernels"))
    assert finished.returncode == 0, finished.stderr
    found = bench_results.load(tmp_path)
    assert [cell.workload for cell in found.cells] == ["curves/Adam/16", "curves/Adam/100"]
    assert {entry.contestant for entry in found.entries} == {"fastopt", "probe"}
    assert {entry.info["backend"] for entry in found.entries} == {"cuda"}
    text = (tmp_path / "report.md").read_text()
    assert "- GPU: Numba's simulator" in text
    assert "the device's own copy of as many bytes" in text
    assert "peer numpy: left out, runs on the CPU" in finished.stdout


def test_without_a_gpu_its_benchmark_ends_with_one_line(runner, tmp_path):
    finished = run("--backend", "cuda", "--output", tmp_path / "no", CUDA_VISIBLE_DEVICES="")
    assert finished.returncode == 2
    assert re.fullmatch(r"fastopt: backend 'cuda' (cannot run here|needs Numba's CUDA target).*\n", finished.stderr)
    assert not (tmp_path / "no").exists()


def test_a_run_leaves_results_report_and_plots(runner, tmp_path):
    """The whole way through pytest-benchmark, on sizes that take no time."""
    finished = run(
        "--quick", "--sizes", "16", "100", "2^8", "--optimizers", "adam", "--peers", "numpy", "--output", tmp_path
    )
    assert finished.returncode == 0, finished.stderr
    found = bench_results.load(tmp_path)
    assert [cell.workload for cell in found.cells] == [f"curves/Adam/{label}" for label in ("16", "100", "2^8")]
    assert {entry.contestant for entry in found.entries} == {"fastopt", "probe", "numpy"}
    for entry in found.entries:
        assert 1e-8 < entry.sample.median < 1
        assert {"parameters", "bytes_per_parameter", "gb_per_s", "isa", "threads"} <= set(entry.info)
    names = {"results.json", "report.md", "adam.png", "adam.svg", "log.txt"}
    assert names == {path.name for path in tmp_path.iterdir()}
    assert "peer numpy: numpy" in finished.stdout
    assert re.search(r"^Adam, 2\^8 +\S+ [nu]s ", finished.stdout, re.MULTILINE)


# --- The README


@pytest.mark.parametrize("path", figures.WRITTEN, ids=lambda path: path.name)
def test_the_figures_of_readme_and_documentation_are_those_of_the_committed_run(path):
    run = figures.committed()
    if run is None:
        pytest.skip("no run is committed yet")
    text = path.read_text(encoding="utf-8")
    assert figures.with_figures(text, figures.WRITTEN[path](run)) == text, "run `python -m bench.figures`"


@pytest.mark.parametrize("made", figures.WRITTEN.values())
def test_figures_come_from_the_results_alone(tmp_path, made):
    text = made(load(tmp_path))
    assert text.startswith("2 processors (A processor, x86-64-v3), 2 threads each")
    assert "Peers: torch 9.9, optax 8.8." in text
    assert "Here the last-level cache has 32 MiB" in text
    assert "| Adam, 1e5 | L2 | 20 us (19.8..20.2) | 40 us (39.6..40.4) torch-fused | 2 (2..2) |" in text
    assert "| Adam, 1e7 | memory | 5 ms (4.95..5.05) | 4 ms (3.96..4.04) optax | 0.8 (0.8..0.8) |" in text


def test_the_readme_says_what_is_kept_of_the_promises_and_where_a_peer_is_ahead(tmp_path):
    text = figures.in_short(load(tmp_path))
    assert "4 of 6 measurements keep what [promises.py](bench/promises.py) promises." in text
    assert "From memory steps move 56 to 56 GB/s, 90% to 90% of what the probe does" in text
    assert "In 1 of 3 workloads a peer is ahead, or from 1e7 parameters on the probe by more than 5%" in text


def test_figures_say_that_none_is_of_memory_where_the_cache_holds_everything(tmp_path):
    data = example_results.results()
    data["machine_info"]["fastopt"]["caches"][2]["bytes"] = 480 << 20
    text = figures.in_short(load(tmp_path, data))
    assert "In this run they nowhere did: no figure below is one of memory." in text
    assert "| Adam, 1e7 | L3 |" in text
    assert "so none is held to a roof" in text
    assert "GB/s" not in text


def test_a_probe_that_is_slower_than_a_step_is_called_no_roof(tmp_path):
    data = example_results.results()
    for one in data["benchmarks"]:
        if one["extra_info"]["contestant"] == "probe":
            one["stats"]["data"] = [1.5 * t for t in one["stats"]["data"]]
    assert "In 1 of 1 the probe is no roof: the step is faster" in figures.in_short(load(tmp_path, data))


@pytest.mark.parametrize("made", figures.WRITTEN.values())
def test_no_noisy_cell_is_among_the_figures(tmp_path, made):
    data = example_results.results()
    data["benchmarks"][4]["stats"]["data"] = [10e-6, 20e-6, 40e-6]  # fastopt at 1e5
    text = made(load(tmp_path, data))
    assert "| Adam, 1e5 |" not in text
    assert "Left out here, because the rounds spread by more than 15%: curves/Adam/1e5." in text


def test_the_terminal_gets_a_table_of_80_columns(tmp_path):
    header, *rows = report.summary(load(tmp_path)).splitlines()
    assert header.split() == ["a", "step", "of", "takes", "ns", "faster", "than"]
    assert rows[1].split() == ["Adam,", "1e5", "20", "us", "0.2", "2", "torch-fused"]
    committed = figures.committed()
    assert committed is None or max(map(len, report.summary(committed).splitlines())) <= 80


def test_figures_show_low_precision_states_beside_float32(tmp_path):
    label = "states/Adam/state_dtype 8bit, 5e7"
    entries = [example_results.entry(label, "fastopt", [20e-3], bytes_per_parameter=16.125)]
    entries.append(example_results.entry(label, "fastopt, float32 states", [30e-3]))
    text = figures.in_tables(load(tmp_path, example_results.results([*example_results.curve(), *entries])))
    where = "L1"  # of the 1,000 parameters that the entry has
    assert (
        f"| Adam, state_dtype 8bit, 5e7 | {where} | 16.1 | 20 ms (20..20) | 30 ms (30..30) | 1.5 (1.5..1.5) |" in text
    )


def test_figures_go_between_their_marks_and_nowhere_else():
    before = "above\n<!-- figures: words -->\nold\n<!-- end of figures -->\nbelow\n"
    after = figures.with_figures(before, "new\n")
    assert after == "above\n<!-- figures: words -->\nnew\n<!-- end of figures -->\nbelow\n"
    assert figures.with_figures(after, "new\n") == after


def test_a_page_without_marks_is_refused():
    with pytest.raises(ValueError, match="no <!-- figures -->"):
        figures.with_figures("text", "new\n")
