"""The gallery: every example runs alone, in time, and what its text claims is true of what it computed.

Each script of `examples/` is run once; the tests look at the names it leaves behind and at what it printed and drew.
"""

import contextlib
import functools
import io
import itertools
import re
import runpy
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import fastopt

matplotlib = pytest.importorskip("matplotlib", reason="the examples draw with matplotlib")
pytest.importorskip("sklearn", reason="the examples read scikit-learn's handwritten digits")
threadpoolctl = pytest.importorskip("threadpoolctl")  # scikit-learn needs it

matplotlib.use("Agg")
plt = pytest.importorskip("matplotlib.pyplot")

SCRIPTS = sorted((Path(__file__).resolve().parents[2] / "examples").glob("plot_*.py"))
if not SCRIPTS:
    pytest.skip("the examples lie in the source checkout alone", allow_module_level=True)

pytestmark = pytest.mark.exhaustive  # a minute, and more with every example
SECONDS = 20.0
"""Processor time that one example may take."""
WIDTH = 7.5
"""Inches that a picture may be wide: 100 dots each are what a page of the documentation has room for."""


class Drawn(NamedTuple):
    """What the tests need to know of one picture after it was closed."""

    title: str
    width: float
    ink: float


class Run(NamedTuple):
    """What one example left behind."""

    found: dict[str, Any]
    printed: str
    drawn: list[Drawn]
    seconds: float


def draw(figure):
    """Render a picture, which raises what matplotlib has to complain about, and describe it."""
    figure.canvas.draw()
    titles = [figure.get_suptitle(), *(axes.get_title(where) for axes in figure.axes for where in ("left", "center"))]
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]
    ink = float((pixels != pixels[0, 0]).any(axis=2).mean())
    return Drawn(" ".join(filter(None, titles)), figure.get_figwidth(), ink)


@functools.cache
def run(name):
    """Run the example `name` once, as the command line would."""
    script = SCRIPTS[0].with_name(f"plot_{name}.py")
    if "\nimport torch" in script.read_text(encoding="utf-8"):
        pytest.importorskip("torch", reason="the example needs PyTorch")
    printed = io.StringIO()
    plt.close("all")
    # Threads of a BLAS that wait for each other would count as processor time; and examples may set how many it has.
    with (
        threadpoolctl.threadpool_limits(1),
        matplotlib.rc_context(),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(printed),
    ):
        warnings.filterwarnings("ignore", "FigureCanvasAgg is non-interactive")  # what plt.show() says without a screen
        matplotlib.rcdefaults()
        start = time.process_time()
        found = runpy.run_path(str(script), run_name="__main__")
        drawn = [draw(plt.figure(number)) for number in plt.get_fignums()]
        seconds = time.process_time() - start
    plt.close("all")
    return Run(found, printed.getvalue(), drawn, seconds)


@pytest.fixture(params=[path.stem.removeprefix("plot_") for path in SCRIPTS])
def example(request):
    return run(request.param)


# --- What all of them promise


def test_an_example_is_done_in_time(example):
    assert example.seconds < SECONDS


def test_an_example_prints_what_it_found(example):
    assert len(example.printed.splitlines()) >= 3


def test_an_example_draws(example):
    assert example.drawn
    assert all(picture.ink > 0.01 for picture in example.drawn)


def test_every_picture_has_a_title_to_be_read_in_its_place(example):
    assert all(picture.title for picture in example.drawn)


def test_every_picture_fits_on_a_page(example):
    assert all(picture.width <= WIDTH for picture in example.drawn)


def test_an_example_opens_with_a_title(example):
    title, line, *_ = example.found["__doc__"].strip().splitlines()
    assert set(line) == {"="}
    assert len(line) == len(title)


# --- A narrow valley


def test_steepest_descent_is_not_the_way_to_the_minimum():
    assert run("narrow_valley").found["angle"] > 60


def turns(path):
    """How often a path changes the side of the valley."""
    return int(np.sum(path[1:, 1] * path[:-1, 1] < 0))


def test_sgd_zigzags_at_every_step_and_no_other_of_the_four_does():
    paths = run("narrow_valley").found["paths"]
    assert turns(paths["SGD"]) == len(paths["SGD"]) - 1
    assert all(turns(paths[name]) < 6 for name in ("Momentum", "Adagrad", "Adam"))


def test_momentum_alone_of_the_four_rolls_past_the_minimum():
    paths = run("narrow_valley").found["paths"]
    assert [name for name, path in paths.items() if path[-1, 0] > 0.5] == ["Momentum"]


def test_the_steps_of_adagrad_shrink():
    lengths = np.linalg.norm(np.diff(run("narrow_valley").found["paths"]["Adagrad"], axis=0), axis=1)
    assert (np.diff(lengths) < 0).all()


def test_the_first_step_of_adam_is_as_long_as_its_learning_rate_in_each_coordinate():
    path = run("narrow_valley").found["paths"]["Adam"]
    np.testing.assert_allclose(np.abs(path[1] - path[0]), 0.3, rtol=1e-6)


def test_the_best_momentum_gains_what_the_formula_says():
    found = run("narrow_valley").found
    plain, polyak = (np.linalg.norm(found[name][-1]) for name in ("plain", "polyak"))
    assert plain == pytest.approx(np.linalg.norm(found["START"]) * (19 / 21) ** 30, rel=1e-3)
    assert polyak < plain / 1000


def test_every_optimizer_goes_down_the_valley():
    best = run("narrow_valley").found["best"]
    assert set(best) == set(fastopt.optimizers.__all__)
    assert all(np.linalg.norm(path[-1]) < 3 for _, path in best.values())


def test_rates_per_coordinate_lead_in_a_valley_along_the_axes():
    ranking = run("narrow_valley").found["ranking"]
    assert {"RMSprop", "Adagrad", "NAdam", "Adadelta"} <= set(ranking[:6])
    assert ranking.index("SGD") > 8


def test_sgd_zigzags_at_its_best_rate_too():
    _, path = run("narrow_valley").found["best"]["SGD"]
    assert turns(path) == len(path) - 1


# --- Three ways down a line


@pytest.mark.parametrize(("way", "updates"), [("full batch", 50), ("mini-batch", 2000), ("stochastic", 50_000)])
def test_the_batch_decides_how_many_updates_50_epochs_make(way, updates):
    example = run("three_ways_down_a_line")
    assert len(example.found["paths"][way]) - 1 == updates
    assert re.search(rf"{way} +{updates} ", example.printed)


@pytest.mark.parametrize(("way", "near"), [("mini-batch", 0.05), ("stochastic", 0.2)])
def test_the_fitted_lines_are_near_the_true_one(way, near):
    np.testing.assert_allclose(run("three_ways_down_a_line").found["paths"][way][-1], [3.5, 4], atol=near)


def test_a_full_batch_is_on_its_way_after_50_updates_and_there_after_5_at_a_larger_rate():
    found = run("three_ways_down_a_line").found
    assert np.linalg.norm(found["paths"]["full batch"][-1] - [3.5, 4]) > 0.5
    np.testing.assert_allclose(found["fast"][5], found["best"], atol=2e-3)


def test_stochastic_descent_has_learned_most_after_one_epoch():
    found = run("three_ways_down_a_line").found
    after = {way: found["excess"](path)[(len(path) - 1) // 50] for way, path in found["paths"].items()}
    assert after["stochastic"] < after["mini-batch"] / 10 < after["full batch"] / 10


@pytest.mark.parametrize("way", ["stochastic", "mini-batch, samples drawn anew"])
def test_the_noise_at_the_bottom_is_that_of_the_formula(way):
    measured, formula = run("three_ways_down_a_line").found["noise"][way]
    assert measured == pytest.approx(formula, rel=0.2)


def test_a_shuffled_order_is_quieter_than_samples_drawn_anew():
    noise = run("three_ways_down_a_line").found["noise"]
    assert noise["mini-batch, shuffled"][0] < 0.6 * noise["mini-batch, samples drawn anew"][0]


# --- Stuck, but where?


@pytest.mark.parametrize("point", [(0.3, -0.8), (1.5, 2.0), (-0.7, 0.4)])
def test_gradient_and_hessian_of_the_two_weights_are_those_of_finite_differences(point):
    found = run("stuck_but_where").found
    point, h = np.array(point), 1e-5
    for function, derivative in [("loss", "gradient"), ("gradient", "hessian")]:
        f = found[function]
        expected = [(f(point + h * axis) - f(point - h * axis)) / (2 * h) for axis in np.eye(2)]
        np.testing.assert_allclose(found[derivative](point), expected, rtol=1e-7, atol=1e-9)


def test_the_eigenvalues_tell_two_minima_from_a_saddle():
    found = run("stuck_but_where").found
    assert found["kinds"] == ["minimum", "saddle", "minimum"]
    np.testing.assert_allclose(found["points"], [(-1.2, -1.5), (0, 0), (1.2, 1.5)], atol=1e-9)


def test_no_optimizer_moves_where_the_gradient_is_zero():
    assert run("stuck_but_where").found["moved"] == []
    assert (
        f"{len(fastopt.optimizers.__all__)} optimizers that start at the saddle, 0 move"
        in run("stuck_but_where").printed
    )


@pytest.mark.parametrize("sign", [1, -1])
def test_a_nudge_along_the_eigenvector_leaves_the_saddle_for_the_minimum_on_its_side(sign):
    np.testing.assert_allclose(run("stuck_but_where").found["ways"][sign][-1], [sign * 1.2, sign * 1.5], atol=0.02)


def test_on_the_way_the_gradient_is_small_twice_and_the_smallest_eigenvalue_changes_its_sign_once():
    found = run("stuck_but_where").found
    assert max(found["sizes"]) > 10 * max(found["sizes"][0], found["sizes"][-1])
    signs = np.sign(found["smallest"])
    assert signs[0] == -1
    assert np.count_nonzero(np.diff(signs)) == 1


@pytest.mark.parametrize("name", ["SGD", "Momentum"])
def test_the_distance_from_the_saddle_grows_by_the_predicted_factor(name):
    found = run("stuck_but_where").found
    distance = np.abs((found["escapes"][name] - found["saddle"]) @ found["down"])
    near = distance[(distance > 1e-3) & (distance < 1e-1)]
    assert np.mean(near[1:] / near[:-1]) == pytest.approx(found["growth"][name], rel=1e-3)


def test_every_optimizer_leaves_the_saddle_and_sgd_last():
    left_after = run("stuck_but_where").found["left_after"]
    assert all(steps > 0 for steps in left_after.values())
    assert left_after["SGD"] > 4 * left_after["Momentum"]
    assert max(left_after["Adam"], left_after["RMSprop"]) < left_after["Nesterov"] <= left_after["Momentum"]


def test_the_share_of_negative_eigenvalues_grows_with_dimension():
    found = run("stuck_but_where").found
    assert found["share"] == sorted(found["share"])
    assert found["share"][0] < 0.02 < 0.4 < found["share"][-1]
    assert found["in_networks"][0] < 0.4 < 0.45 < min(found["in_networks"][-3:])


def test_minima_become_rare_with_dimension():
    chance = run("stuck_but_where").found["chance"]
    assert chance == sorted(chance, reverse=True)
    assert chance[0] > 0.98
    assert chance[-1] == 0


# --- Which optimizer?


def test_the_gradient_of_the_network_is_that_of_finite_differences():
    found = run("which_optimizer").found
    rng = np.random.default_rng(0)
    params = {name: array.astype(np.float64) for name, array in found["initial_weights"](0).items()}
    images, labels = rng.random((5, 64)), rng.integers(0, 10, 5)
    grads = {name: np.empty_like(array) for name, array in params.items()}
    found["backward"](params, grads, images, labels)

    def loss():
        scores = found["log_probabilities"](found["forward"](params, images)[-1])
        return -scores[np.arange(5), labels].mean()

    for name, array in params.items():
        index = tuple(rng.integers(array.shape))
        before, h = array[index], 1e-6
        array[index] = before + h
        above = loss()
        array[index] = before - h
        below = loss()
        array[index] = before
        assert grads[name][index] == pytest.approx((above - below) / (2 * h), rel=1e-6, abs=1e-9), name


def test_best_learning_rates_lie_a_factor_of_100_apart():
    chosen = run("which_optimizer").found["chosen"]
    assert max(chosen.values()) / min(chosen.values()) >= 90


def test_no_best_learning_rate_is_at_the_end_of_those_tried():
    found = run("which_optimizer").found
    assert all(found["RATES"][0] < rate < found["RATES"][-1] for rate in found["chosen"].values())


def test_every_optimizer_trains_the_network():
    found = run("which_optimizer").found
    assert len(found["curves"]) == 12
    assert all(losses[-1, 0] < 0.1 for losses in found["curves"].values())
    assert all(right.mean() > 0.94 for right in found["accuracy"].values())


def test_sgd_without_momentum_is_among_the_slowest():
    found = run("which_optimizer").found
    assert found["ranking"].index("SGD") >= 9
    assert found["speed"]["SGD"] > 1.5 * max(found["speed"]["Adam"], found["speed"]["Nesterov"])


def test_the_training_loss_goes_on_falling_where_the_validation_loss_has_stopped():
    for losses in run("which_optimizer").found["curves"].values():
        halfway, end = losses[6], losses[-1]
        assert end[0] / halfway[0] < end[1] / halfway[1]
        assert end[1] > 1.4 * end[0]


def test_most_differences_in_quality_are_luck():
    right = sorted(accuracy.mean() for accuracy in run("which_optimizer").found["accuracy"].values())
    assert right[-1] - right[len(right) // 2] < 0.01


def test_the_table_has_a_line_for_every_optimizer():
    example = run("which_optimizer")
    for name, rate in example.found["chosen"].items():
        assert re.search(rf"^{name} +{rate:g} +\d", example.printed, re.MULTILINE), name


# --- Small batches, large batches


def test_time_for_an_epoch_falls_with_the_batch_as_the_formula_says():
    found = run("batch_size").found
    seconds = dict(zip(found["BATCHES"], found["seconds"], strict=True))
    assert seconds[1] > 4 * seconds[8] > 12 * seconds[128]
    assert found["per_update"] > 5 * found["per_sample"]


def test_noise_falls_with_the_root_of_the_batch():
    found = run("batch_size").found
    sizes = found["BATCHES"][:-2]
    for ratios in found["noise"].values():
        slope, _ = np.polyfit(np.log(sizes), np.log(ratios), 1)
        assert slope == pytest.approx(-0.5, abs=0.03)


def test_the_noise_scale_is_where_noise_and_gradient_are_level_and_grows_in_training():
    found = run("batch_size").found
    assert found["scale"][0] < found["scale"][2] < found["scale"][10]
    for epochs, ratios in found["noise"].items():
        assert ratios[-1] == pytest.approx((found["scale"][epochs] / 128) ** 0.5, rel=0.1)


def test_paths_of_small_batches_make_detours():
    found = run("batch_size").found
    assert found["detour"][1] > 8
    assert found["detour"][512] < 1.2
    assert found["detour"][1] > 2 * found["detour"][16] > 4 * found["detour"][512]


def test_batches_of_16_follow_the_exact_path_and_single_digits_get_half_as_far():
    found = run("batch_size").found
    ahead = {size: (path[-1] - path[0]) @ found["ahead"] for size, path in found["paths"].items()}
    assert ahead[16] == pytest.approx(ahead[512], rel=0.05)
    assert ahead[1] < 0.65 * ahead[512]


def test_at_the_same_rate_large_batches_learn_less_in_as_many_epochs():
    losses = list(run("batch_size").found["final"]["same rate"].values())
    assert losses == sorted(losses)
    assert losses[-1] > 1000 * losses[0]


def test_a_rate_in_proportion_to_the_batch_makes_them_level_until_it_is_too_large():
    losses = run("batch_size").found["final"]["rate in proportion"]
    for size in (1, 4, 64):
        assert losses[size] == pytest.approx(losses[16], rel=0.1)
    assert losses[256] > 3 * losses[16]


def test_at_the_same_training_loss_the_batch_does_not_matter_for_new_digits():
    summary = run("batch_size").found["summary"].values()
    right, losses = [row["right"] for row in summary], [row["test loss"] for row in summary]
    assert max(right) - min(right) < 0.01
    assert max(losses) < 1.2 * min(losses)


def test_the_time_to_get_there_is_lowest_for_batches_in_between():
    summary = run("batch_size").found["summary"]
    assert min(summary, key=lambda size: summary[size]["seconds"]) in (16, 64)
    assert summary[512]["epochs"] > 10 * summary[16]["epochs"]


# --- Where to start, and batch normalisation


@pytest.mark.parametrize("function", ["sigmoid", "tanh"])
def test_wide_weights_leave_the_activations_at_their_ends(function):
    values = run("initialisation").found["outputs"][function, "std 1"][-1]
    low, high = {"sigmoid": (0, 1), "tanh": (-1, 1)}[function]
    assert np.mean(np.minimum(values - low, high - values) < 0.05) > 0.6


@pytest.mark.parametrize("function", ["sigmoid", "tanh", "ReLU"])
def test_narrow_weights_let_all_units_of_a_layer_say_the_same(function):
    assert run("initialisation").found["outputs"][function, "std 0.01"][-1].std() < 0.03


@pytest.mark.parametrize(("function", "start", "share"), [("tanh", "Xavier", 0.45), ("ReLU", "He", 0.8)])
def test_the_right_start_keeps_the_spread_through_five_layers(function, start, share):
    spreads = [values.std() for values in run("initialisation").found["outputs"][function, start]]
    assert share < spreads[-1] / spreads[0] < 1.3


def test_the_formula_tells_the_size_after_thirty_layers():
    found = run("initialisation").found
    for start, sizes in found["sizes"].items():
        assert abs(np.log2(sizes[-1] / found["predicted"][start][-1])) < 1


def test_batch_normalisation_gives_the_activations_the_same_size_in_every_layer_from_any_start():
    for (_, batch_norm), sizes in run("initialisation").found["hidden_sizes"].items():
        if batch_norm:
            np.testing.assert_allclose(sizes, 0.5**0.5, rtol=0.03)
        else:
            assert abs(np.log10(sizes[-1] / sizes[0])) > 4


def test_batch_normalisation_learns_from_every_start_and_without_it_only_the_neighbourhood_of_he_does():
    found = run("initialisation").found
    assert max(found["final"](sigma, True) for sigma in found["starts"]) < 0.5
    learned = [sigma for sigma in found["starts"] if found["final"](sigma, False) < 1]
    assert found["he"] in learned
    assert max(learned) / min(learned) < 4


def test_in_eval_mode_the_answer_is_the_same_in_any_company():
    company = run("initialisation").found["company"]
    assert np.ptp(company["eval"]) < 1e-5
    assert np.ptp(company["train"]) > 0.5


def test_in_train_mode_small_batches_cost_accuracy():
    accuracies = run("initialisation").found["accuracies"]
    assert accuracies["train"][0] < 0.6
    assert min(accuracies["eval"]) > 0.95


# --- Choosing hyperparameters


def test_training_validation_and_test_data_share_no_picture():
    found = run("hyperparameters").found
    parts = [found[f"{name}_images"] for name in ("train", "valid", "test")]
    assert len(np.unique(np.concatenate(parts), axis=0)) == len(np.unique(found["images"], axis=0)) == 1797


def test_candidates_are_uniformly_distributed_on_the_logarithmic_scale():
    found = run("hyperparameters").found
    drawn = np.log10(found["draw"]({"lr": (1e-5, 1.0), "weight_decay": (1e-6, 1.0)}, 10_000))
    low, high = np.array([-5.0, -6.0]), 0.0
    assert (drawn >= low).all()
    assert (drawn <= high).all()
    quarters = np.quantile(drawn, [0.25, 0.5, 0.75], axis=0)
    np.testing.assert_allclose(quarters, [low + share * (high - low) for share in (0.25, 0.5, 0.75)], atol=0.15)


def test_a_random_search_sees_five_times_as_many_learning_rates_as_a_grid_and_finds_more():
    searches = run("hyperparameters").found["searches"]
    for name, rates in (("Grid", 5), ("Random", 25)):
        assert all(len(np.unique(candidates[:, 0])) == rates for candidates, _ in searches[name])
    best = {name: np.mean([accuracies.max() for _, accuracies in found]) for name, found in searches.items()}
    assert best["Random"] > best["Grid"]


def test_each_round_is_better_than_the_one_before():
    medians = [np.median(accuracies) for _, _, accuracies in run("hyperparameters").found["rounds"]]
    assert medians == sorted(medians)
    assert medians[0] < 0.5 < 0.9 < medians[-1]


def test_each_round_lies_within_the_one_before():
    ranges = [ranges for ranges, _, _ in run("hyperparameters").found["rounds"]]
    for outer, inner in itertools.pairwise(ranges):
        assert all(outer[name][0] <= inner[name][0] < inner[name][1] <= outer[name][1] for name in outer)


def test_the_test_score_is_near_the_validation_score():
    found = run("hyperparameters").found
    assert abs(found["test_accuracy"] - found["valid_accuracy"]) < 3 * found["chance"]
    assert found["test_accuracy"] > 0.94


# --- Classes and pictures


@pytest.mark.parametrize("name", ["mean square", "cross-entropy"])
def test_the_gradients_on_the_error_surfaces_are_those_of_finite_differences(name):
    f = run("classes_and_pictures").found["loss_and_gradient"]
    w, h = np.array([0.7, -1.3]), 1e-6
    expected = [(f(name, w + h * axis)[0] - f(name, w - h * axis)[0]) / (2 * h) for axis in np.eye(2)]
    np.testing.assert_allclose(f(name, w)[1], expected, rtol=1e-6)


def test_where_the_answer_is_sure_and_wrong_only_cross_entropy_has_a_gradient():
    found = run("classes_and_pictures").found
    steep = {name: np.linalg.norm(found["loss_and_gradient"](name, found["START"])[1]) for name in found["losses"]}
    assert steep["cross-entropy"] > 100 * steep["mean square"]


def test_cross_entropy_arrives_and_the_mean_square_hardly_leaves():
    found = run("classes_and_pictures").found
    f, paths = found["loss_and_gradient"], found["paths"]
    assert np.linalg.norm(f("cross-entropy", paths["cross-entropy"][-1])[1]) < 1e-2
    assert np.linalg.norm(paths["mean square"][-1] - paths["mean square"][0]) < 1


def test_cross_entropy_is_convex_and_the_mean_square_is_not():
    found = run("classes_and_pictures").found
    least = {name: found["least_curvature"](name, found["plane"]).min() for name in found["losses"]}
    assert least["cross-entropy"] > 0
    assert least["mean square"] < -0.1


def test_receptive_fields_are_those_of_the_formula():
    fields = run("classes_and_pictures").found["fields"]
    assert fields == {(1, 1): 3, (1, 2): 5, (1, 3): 7, (2, 1): 3, (2, 2): 7, (2, 3): 15}


def test_all_three_networks_read_digits_that_are_where_they_belong():
    assert min(values[2, 2] for values in run("classes_and_pictures").found["moved"].values()) > 0.9


def test_shared_weights_recognise_a_digit_that_has_moved():
    moved = run("classes_and_pictures").found["moved"]
    assert np.ptp(moved["convolutional"]) < 0.02
    assert moved["dense"].mean() < 0.4


def test_stride_2_recognises_even_shifts_better_than_odd_ones():
    values = run("classes_and_pictures").found["moved"]["stride 2"]
    assert values[::2, ::2].min() > values[1::2].max()


def test_a_picture_that_moves_moves_its_maps():
    assert run("classes_and_pictures").found["difference"] == 0


# --- When the learning rate is the problem


def test_the_loss_stands_still_between_the_walls_while_the_gradient_does_not_vanish():
    path, norms = run("learning_rate").found["valley"]["constant"]
    np.testing.assert_allclose(abs(path[-50:, 1]), 10 * 0.25 / 2, rtol=0.03)
    assert norms.min() > 9.5


def test_a_smaller_rate_reaches_the_bottom_of_the_valley():
    path, norms = run("learning_rate").found["valley"]["StepLR"]
    assert abs(path[-1, 1]) < 1e-3
    assert norms[-1] < 0.1


def test_adagrad_learns_rare_features_and_rates_for_all_do_not():
    sparse = run("learning_rate").found["sparse"]
    rare = {name: found["errors"][-4:].mean() for name, found in sparse.items()}
    assert 2 * rare["Adagrad"] < rare["SGD"] < rare["SGD, decaying"]


def test_no_best_rate_for_sparse_features_is_at_the_end_of_those_tried():
    sparse = run("learning_rate").found["sparse"]
    assert all(0.03 < found["lr"] < 1.5 for found in sparse.values())


def test_a_rare_parameter_moves_only_when_its_feature_is_present_and_first_by_the_full_rate():
    found = run("learning_rate").found
    path, present = found["sparse"]["Adagrad"]["path"], found["present"]
    moved = np.flatnonzero(np.diff(path)) + 1
    np.testing.assert_array_equal(moved, [step for step in present if step])
    assert abs(path[present[0]] - path[0]) == pytest.approx(found["sparse"]["Adagrad"]["lr"], rel=1e-3)


@pytest.mark.parametrize("name", ["StepLR", "ReduceLROnPlateau"])
def test_lower_rates_let_the_loss_fall_where_a_constant_one_stands_still(name):
    histories = run("learning_rate").found["histories"]
    assert histories["constant"][-10:, 0].mean() > 0.9 * histories["constant"][1:11, 0].mean()
    assert histories[name][-1, 0] < 0.7 * histories["constant"][-10:, 0].mean()
    assert histories[name][-1, 3] < 0.2 * histories["constant"][-10:, 3].mean()


def test_reduce_lr_on_plateau_lowers_the_rate_when_the_validation_loss_stands_still():
    rates = run("learning_rate").found["histories"]["ReduceLROnPlateau"][:, 2]
    falls = rates[1:] / rates[:-1]
    assert set(np.round(falls, 6)) == {1.0, 0.2}
    assert rates[5] == 0.2


def test_adam_takes_its_longest_steps_first_and_ends_at_those_of_the_formula():
    noise = run("learning_rate").found["noise"]
    assert noise["Adam"][0] == max(noise["Adam"]) == pytest.approx(1, rel=1e-3)
    assert noise["Adam"][-500:].mean() == pytest.approx((0.1 / 1.9) ** 0.5, rel=0.02)


def test_warm_up_and_radam_take_short_steps_first():
    noise = run("learning_rate").found["noise"]
    assert max(noise["Adam, warm-up"][:100].max(), noise["RAdam"][:100].max()) < 0.1


def test_the_steps_of_radam_are_those_of_adam_times_the_factor_of_the_paper():
    noise = run("learning_rate").found["noise"]
    t = np.arange(10, 2001)
    most = 2 / (1 - 0.999) - 1
    rho = most - 2 * t * 0.999**t / (1 - 0.999**t)
    factor = np.sqrt((rho - 4) * (rho - 2) * most / ((most - 4) * (most - 2) * rho))
    np.testing.assert_allclose(noise["RAdam"][9:], factor * noise["Adam"][9:], rtol=1e-3)


def test_warm_up_and_radam_forgive_large_rates():
    ends = run("learning_rate").found["ends"]
    assert max(ends["Adam, warm-up"][-1], ends["RAdam"][-1]) < 0.6 * ends["Adam"][-1]


# --- Fitting too well


def test_a_network_alone_learns_wrong_labels_by_heart():
    found = run("overfitting").found
    model = found["models"]["nothing"]
    assert found["evaluate"](model, found["points"], found["classes"])[1] == 1
    assert found["histories"]["nothing"][-1, 1] > 4 * found["histories"]["nothing"][:, 1].min()


@pytest.mark.parametrize("way", ["L1", "L2", "decoupled decay", "dropout", "early stopping"])
def test_every_brake_makes_the_network_better_on_new_samples(way):
    scores = run("overfitting").found["scores"]
    assert scores[way][0] < 0.5 * scores["nothing"][0]
    assert scores[way][1] > scores["nothing"][1] + 0.02


def test_the_restored_parameters_are_those_of_the_best_moment():
    found = run("overfitting").found
    losses = found["histories"]["early stopping"][:, 1]
    assert found["stopping"].best_step == losses.argmin() == len(losses) - 1 - found["stopping"].patience
    assert found["restored"] == losses.min()


def test_l1_keeps_few_weights_and_l2_keeps_none_large():
    weights = {name: run("overfitting").found["hidden_weights"](name) for name in ("nothing", "L1", "L2")}
    assert np.sum(weights["L1"] > 0.01) < 50 < np.sum(weights["L2"] > 0.01) < 2000 < np.sum(weights["nothing"] > 0.01)
    assert weights["L2"][0] < weights["L1"][0] < weights["nothing"][0]


def test_decoupled_decay_shrinks_all_weights_alike_and_l2_does_not():
    found = run("overfitting").found
    expected = (1 - found["ETA"] * found["LAMBDA"]) ** found["STEPS"]
    for part in np.split(found["shrunk"]["decoupled decay"], 10):
        assert part.mean() == pytest.approx(expected, abs=0.02)
    assert found["shrunk"]["L2"][:100].mean() < 0.1
    assert found["shrunk"]["L2"][-100:].mean() > 0.9


def test_dropout_draws_in_training_and_is_off_in_evaluation():
    answers = run("overfitting").found["answers"]
    assert not answers["training"][0].equal(answers["training"][1])
    assert answers["evaluation"][0].equal(answers["evaluation"][1])
