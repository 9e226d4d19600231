"""The demo: its network against definitions and finite differences, its settings, and a short run of the whole."""

import math
import subprocess
import sys

import numpy as np
import pytest

from fastopt import demo
from fastopt.__main__ import main
from fastopt.rules import registry


def import_packages():
    for module in demo.PACKAGES:
        pytest.importorskip(module, reason=f"the demo needs {demo.PACKAGES[module]}")


# --- The network


def test_initial_parameters_have_the_shapes_of_the_layers():
    shapes = {name: array.shape for name, array in demo.initial_parameters(seed=3).items()}
    weights = {"w1": (64, 100), "w2": (100, 100), "w3": (100, 10)}
    assert shapes == {**weights, "b1": (100,), "b2": (100,), "b3": (10,)}


@pytest.mark.parametrize(("name", "inputs"), [("w1", 64), ("w2", 900)])
def test_initial_weights_have_mean_zero_and_the_variance_of_he(name, inputs):
    weights = demo.initial_parameters(seed=3, layers=(64, 900, 300))[name].astype(np.float64)
    variance = 2 / inputs
    # Five standard errors: of the mean, and of the variance of a normal sample.
    assert abs(weights.mean()) < 5 * math.sqrt(variance / weights.size)
    assert abs(weights.var() - variance) < 5 * variance * math.sqrt(2 / weights.size)


def test_initial_biases_are_zero():
    params = demo.initial_parameters(seed=3)
    assert not any(params[name].any() for name in ("b1", "b2", "b3"))


def test_the_seed_fixes_the_initial_parameters():
    first, again, other = (demo.initial_parameters(seed).flat for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.fixture
def small():
    """A small network in float64 with non-zero biases, a batch and its labels."""
    rng = np.random.default_rng(5)
    params = {name: array.astype(np.float64) for name, array in demo.initial_parameters(5, (6, 7, 5, 4)).items()}
    for array in params.values():
        array += rng.normal(0, 0.1, array.shape)
    return params, rng.normal(size=(9, 6)), rng.integers(0, 4, 9)


def loss(params, images, labels):
    return demo.cross_entropy(demo.forward(params, images)[-1], labels)


def gradient(params, images, labels):
    grads = {name: np.full_like(array, np.nan) for name, array in params.items()}
    demo.backward(params, demo.forward(params, images), labels, grads)
    return grads


@pytest.mark.parametrize("name", ["w1", "b1", "w2", "b2", "w3", "b3"])
def test_the_gradient_is_that_of_finite_differences(small, name):
    params, images, labels = small
    array = params[name]
    expected = np.empty_like(array)
    h = 1e-6
    for index in np.ndindex(array.shape):
        kept = array[index]
        array[index] = kept + h
        above = loss(params, images, labels)
        array[index] = kept - h
        below = loss(params, images, labels)
        array[index] = kept
        expected[index] = (above - below) / (2 * h)
    # Losses near 1 in float64 are exact to some 1e-16, their central differences to that over h.
    np.testing.assert_allclose(gradient(*small)[name], expected, rtol=0, atol=2e-9)


def test_the_gradient_is_written_in_place_into_a_flat_buffer():
    params = demo.initial_parameters(5, (6, 7, 4))
    grads = params.zeros_like()
    images = np.random.default_rng(5).normal(size=(9, 6)).astype(np.float32)
    demo.backward(params, demo.forward(params, images), np.arange(9) % 4, grads)
    assert all(np.shares_memory(grads[name], grads.flat) and grads[name].any() for name in grads)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtypes_follow_the_inputs(small, dtype):
    params, images, _ = small
    cast = {name: array.astype(dtype) for name, array in params.items()}
    outputs = demo.forward(cast, images.astype(dtype))
    assert {output.dtype for output in [*outputs, demo.softmax(outputs[-1])]} == {np.dtype(dtype)}


def test_cross_entropy_of_equal_logits_is_the_logarithm_of_the_classes():
    assert demo.cross_entropy(np.full((3, 10), 7.0), np.array([0, 4, 9])) == pytest.approx(math.log(10), rel=1e-15)


def test_huge_logits_do_not_overflow():
    logits = np.array([[1e4, 0.0], [0.0, 1e4]], np.float32)
    assert demo.cross_entropy(logits, np.array([0, 1])) == 0
    np.testing.assert_array_equal(demo.softmax(logits), np.eye(2, dtype=np.float32))


# --- Settings and comparison


def test_settings_name_registered_optimizers_and_their_hyperparameters():
    for name, settings in demo.SETTINGS.items():
        assert settings.keys() <= registry[name].hypers.keys()


def comparison(reference, cpu):
    return demo.Comparison("Adam", demo.Training([2.0, reference], 0.5, 9.0), demo.Training([2.0, cpu], 0.5, 1.0))


def test_the_difference_is_relative_to_the_larger_loss():
    assert comparison(0.04, 0.05).difference == pytest.approx(0.2, rel=1e-14)
    assert comparison(0.0, 0.0).difference == 0


@pytest.mark.parametrize(("cpu", "agrees"), [(0.05, True), (0.0501, True), (0.06, False), (math.nan, False)])
def test_losses_agree_up_to_the_tolerance(cpu, agrees):
    assert comparison(0.05, cpu).agrees is agrees


# --- The whole


def test_the_demo_can_be_imported_without_its_packages():
    hide = "import sys; sys.modules.update(dict.fromkeys(('sklearn', 'matplotlib', 'tqdm')))"
    finished = subprocess.run([sys.executable, "-c", f"{hide}; import fastopt.demo"], timeout=120)
    assert finished.returncode == 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One epoch with two optimizers, and the folder that the run was given."""
    import_packages()
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    command = ["demo", "--epochs", "1", "--optimizers", "adamw", "Lion", "--seed", "2", "--output"]
    process = subprocess.run(
        [sys.executable, "-m", "fastopt", *command, str(folder)], capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    return process, folder


def test_the_demo_prints_a_row_for_each_optimizer(finished):
    lines = finished[0].stdout.splitlines()
    header = next(k for k, line in enumerate(lines) if line.startswith("optimizer  "))
    assert [line.split()[0] for line in lines[header + 1 : header + 3]] == ["AdamW", "Lion"]
    assert all(math.isfinite(float(cell)) for line in lines[header + 1 : header + 3] for cell in line.split()[1:])
    assert lines[header + 3] == ""


def test_the_demo_fits_a_terminal_of_80_columns(finished):
    process, folder = finished
    lines = process.stdout.splitlines()
    assert [line for line in lines if len(line) > 80 and str(folder) not in line] == []


def test_the_table_fits_a_terminal_of_80_columns_whatever_the_figures():
    slow = demo.Training([2.0, 123.456789], 0.5, 123456.7)
    lines = demo.table([demo.Comparison("Adadelta", slow, slow)]).splitlines()
    assert max(map(len, lines)) <= 80


def test_every_optimizer_has_a_panel_of_its_own_in_the_picture(tmp_path, monkeypatch):
    import_packages()
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    training = demo.Training([2.0, 1.0], 0.5, 1.0)
    demo.draw([demo.Comparison(name, training, training) for name in ("SGD", "ASGD", "Adam", "Lion", "LARS")], tmp_path)
    panels = [axes for axes in drawn[0].axes if axes.get_visible()]
    assert [panel.get_title().split(",")[0] for panel in panels] == ["SGD", "ASGD", "Adam", "Lion", "LARS"]


def test_asgd_is_judged_by_its_averages_and_told_from_sgd():
    import_packages()
    digits = demo.load_digits()
    sgd, asgd = (demo.train(registry[name], "cpu", *digits, 5, seed=0) for name in ("sgd", "asgd"))
    assert sgd.losses[:3] == pytest.approx(asgd.losses[:3], rel=1e-2)
    assert asgd.losses[5] > 1.1 * sgd.losses[5]  # averages lag behind while the loss still falls


def test_the_demo_writes_the_loss_curves_as_a_png(finished):
    process, folder = finished
    assert (folder / demo.CURVES).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert str(folder / demo.CURVES) in process.stdout


def test_the_progress_bar_stays_out_of_the_output(finished):
    assert "training/s" not in finished[0].stdout


def test_disagreeing_backends_exit_with_1_and_say_which(tmp_path, monkeypatch, capsys):
    import_packages()
    monkeypatch.setattr(demo, "TOLERANCE", -1.0)
    assert demo.run(["lion"], epochs=1, seed=0, folder=tmp_path) == 1
    assert "Lion: the final training losses of the backends" in capsys.readouterr().err


@pytest.mark.covering(1)
@pytest.mark.parametrize("backend", demo.BACKENDS)
@pytest.mark.parametrize("name", list(registry))
def test_every_optimizer_learns_with_both_backends(name, backend):
    import_packages()
    training, validation = demo.load_digits()
    result = demo.train(registry[name], backend, training, validation, demo.EPOCHS, seed=0)
    assert result.accuracy > 0.9, result


@pytest.fixture(scope="module")
def losses_at_a_constant_rate():
    import_packages()
    return demo.train(registry["sgd"], "cpu", *demo.load_digits(), 6, 0).losses


@pytest.mark.parametrize("schedule", demo.SCHEDULES)
def test_every_schedule_of_the_demo_learns_and_changes_the_learning_rate(schedule, losses_at_a_constant_rate):
    scheduled = demo.train(registry["sgd"], "cpu", *demo.load_digits(), 6, 0, schedule=schedule)
    assert scheduled.accuracy > 0.9
    if schedule != "plateau":  # which has no reason to in the first epochs
        assert scheduled.losses[1:] != losses_at_a_constant_rate[1:]


@pytest.mark.parametrize("schedule", demo.SCHEDULES)
@pytest.mark.parametrize("batches", [1, 2, 5, 44])
def test_schedules_fit_any_number_of_batches(schedule, batches):
    opt = registry["adam"].cls(np.zeros(3, np.float32))
    scheduler = demo.SCHEDULES[schedule](opt, batches)
    for _ in range(batches):
        assert 0 <= opt.param_groups[0]["lr"] <= opt.defaults["lr"]
        scheduler.step(*([1.0] if schedule == "plateau" else []))


@pytest.mark.parametrize("name", ["rmsprop", "sgd"])
def test_early_stopping_leaves_the_parameters_of_the_best_epoch(name):
    import_packages()
    digits = demo.load_digits()
    stopped = demo.train(registry[name], "cpu", *digits, 40, seed=0, patience=2)
    assert stopped.kept == len(stopped.losses) - 1 - 2 < 38
    straight = demo.train(registry[name], "cpu", *digits, stopped.kept, seed=0)
    assert straight.losses == stopped.losses[: stopped.kept + 1]
    assert (straight.loss, straight.accuracy) == (stopped.loss, stopped.accuracy)


def test_backends_are_compared_in_the_last_epoch_that_both_came_to():
    long, short = demo.Training([2.0, 1.0, 0.5], 0.5, 1.0, 1), demo.Training([2.0, 0.8], 0.5, 1.0, 1)
    assert demo.Comparison("Adam", long, short).difference == pytest.approx(0.2, rel=1e-14)


def test_the_command_line_takes_a_schedule_and_a_patience(tmp_path):
    import_packages()
    command = ["demo", "--epochs", "3", "--optimizers", "adam", "--schedule", "OneCycle", "--early-stopping", "2"]
    process = subprocess.run(
        [sys.executable, "-m", "fastopt", *command, "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    words = " ".join(process.stdout.split())
    assert "follow the schedule 'onecycle'" in words
    assert "Epochs kept, of those trained: Adam 3 of 3" in words
    assert [line for line in process.stdout.splitlines() if len(line) > 80 and str(tmp_path) not in line] == []


@pytest.mark.parametrize("arguments", [["--schedule", "sawtooth"], ["--early-stopping", "0"]])
def test_the_command_line_refuses_what_there_is_not(arguments, capsys):
    with pytest.raises(SystemExit):
        main(["demo", *arguments])
    assert f"argument {arguments[0]}" in capsys.readouterr().err
