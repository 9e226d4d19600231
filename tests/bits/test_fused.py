"""The fused step: scale, clip, skip, average, copy and zero in the pass of the update, to the bit."""

import copy
import itertools
import math
import pathlib
import pickle
import sys
import tracemalloc
import weakref

import numpy as np
import pytest

import fastopt
from fastopt import backends
from fastopt.backends import compiled
from tests.support.configs import CONFIGS, DEFAULTS
from tests.support.oracle import assert_same_bits, sum_squares
from tests.support.unfused import Unfused, as_bfloat16, decoded

F32 = np.float32
TILE = backends.engine().TILE
EACH = pytest.mark.parametrize("config", DEFAULTS, ids=str)

STEP_STAGES = {
    "scaled": {"grad_scale": 0.3},
    "clipped by norm": {"max_norm": 0.7},
    "clamped": {"clip_value": 0.05},
    "checked": {"skip_nonfinite": True},
    "zeroed": {"zero_grads": True},
}
KEPT_STAGES = {
    "averaged": {"ema_decay": 0.9},
    "copied to bfloat16": {"copy_dtype": "bfloat16"},
    "copied to float16": {"copy_dtype": "float16"},
}
GRADIENTS = {"float32 gradients": F32, "float16 gradients": np.float16, "bfloat16 gradients": np.uint16}
STAGES = [*STEP_STAGES, *KEPT_STAGES, *GRADIENTS]


def together(stages):
    """Options of the optimizer and of the step for these stages, and the gradients' type; None if they conflict."""
    kept = [name for name in stages if name in KEPT_STAGES]
    types = [name for name in stages if name in GRADIENTS]
    if len(types) > 1 or sum("copied" in name for name in kept) > 1:
        return None
    options = {key: value for name in kept for key, value in KEPT_STAGES[name].items()}
    step = {key: value for name in stages if name in STEP_STAGES for key, value in STEP_STAGES[name].items()}
    dtype = GRADIENTS[types[0]] if types else F32
    if dtype == np.uint16:
        options["grad_dtype"] = "bfloat16"
    return options, step, dtype


COMBINATIONS = [
    stages
    for stages in [*((name,) for name in STAGES), *itertools.combinations(STAGES, 2), tuple(STAGES[:6])]
    if together(stages)
]


def draw(seed, n, dtype=F32):
    values = np.random.default_rng(seed).standard_normal(n).astype(F32)
    return as_bfloat16(values) if dtype == np.uint16 else values.astype(dtype)


CUTS = (5, 5, 70, TILE + 33)


def split(flat, cuts=CUTS):
    at = [0, *(min(cut, flat.size) for cut in cuts), flat.size]
    return [flat[i:j] for i, j in itertools.pairwise(at)]


def assert_equals_unfused(optimizer, params, unfused, step, gradients, info, what):
    assert_same_bits(np.concatenate(params), unfused.p, f"{what}, p")
    for name, array in unfused.arrays.items():
        if name != "p":
            assert_same_bits(np.concatenate([s[name] for s in optimizer.state]), array, f"{what}, {name}")
    if optimizer.ema_decay is not None:
        assert_same_bits(np.concatenate(optimizer.ema), unfused.ema, f"{what}, ema")
    if optimizer.copy_dtype is not None:
        halves = np.concatenate([array.view(np.uint16) for array in optimizer.params_copy])
        assert np.array_equal(halves, unfused.copy()), f"{what}, copy"
    if step.get("zero_grads"):
        assert not any(g.any() for g in gradients)
    assert info.applied is True


@pytest.mark.covering(2, each="stages")
@pytest.mark.parametrize("stages", COMBINATIONS, ids=", ".join)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.bits
def test_stages_equal_the_same_steps_done_one_after_another(config, stages):
    options, step, dtype = together(stages)
    n = 2 * TILE + 77
    params = [part.copy() for part in split(draw(0, n))]
    unfused = Unfused(config, draw(0, n), options.get("ema_decay"), options.get("copy_dtype"), CUTS)
    optimizer = config.make(params, **options)
    for seed in (1, 2):
        flat = draw(seed, n, dtype)
        gradients = [part.copy() for part in split(flat)]
        info = optimizer.step(gradients, **step)
        norm = unfused.step(flat, **{k: v for k, v in step.items() if k not in ("skip_nonfinite", "zero_grads")})
        assert info.grad_norm == (norm if {"max_norm", "skip_nonfinite"} & set(step) else None)
        assert_equals_unfused(optimizer, params, unfused, step, gradients, info, f"{config}, {', '.join(stages)}")


@pytest.mark.covering(2)
@pytest.mark.usefixtures("parallel_from_the_first_element")
@pytest.mark.parametrize("n_threads", [1, 2, 3, 7])
@pytest.mark.parametrize("isa", compiled.available_isas())
@pytest.mark.parametrize("dtype", GRADIENTS.values(), ids=GRADIENTS)
@pytest.mark.parametrize("cuts", [(), (5, 5, 70, TILE + 33), range(64, 40_000, 64)], ids=["one", "few", "many"])
@pytest.mark.parametrize("name", ["AdamW", "LAMB", "LARS"])
@pytest.mark.bits
def test_instruction_sets_threads_and_splits_change_no_bit_of_the_whole_tail(
    name, cuts, dtype, isa, n_threads, use_isa
):
    use_isa(isa)
    config = next(c for c in DEFAULTS if c.spec.name == name)
    step = {"grad_scale": 0.5, "max_norm": 0.7, "clip_value": 0.01, "skip_nonfinite": True, "zero_grads": True}
    n = 40_001
    params = split(draw(0, n), cuts)
    unfused = Unfused(config, draw(0, n), 0.99, "bfloat16", cuts)
    grad_dtype = "bfloat16" if dtype == np.uint16 else None
    optimizer = config.make(params, ema_decay=0.99, copy_dtype="bfloat16", grad_dtype=grad_dtype, n_threads=n_threads)
    for seed in (1, 2):
        flat = draw(seed, n, dtype)
        gradients = split(flat.copy(), cuts)
        info = optimizer.step(gradients, **step)
        assert info.grad_norm == unfused.step(flat, grad_scale=0.5, max_norm=0.7, clip_value=0.01)
        assert_equals_unfused(optimizer, params, unfused, step, gradients, info, f"{isa}, {n_threads} threads")


# --- The norm


@pytest.mark.usefixtures("parallel_from_the_first_element")
@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 16383, 16384, 16385, 70_001])
@pytest.mark.parametrize("n_threads", [1, 2, 7])
@pytest.mark.parametrize("isa", compiled.available_isas())
def test_the_norm_is_summed_in_the_documented_order(isa, n_threads, n, use_isa):
    use_isa(isa)
    g = draw(3, n)
    info = fastopt.SGD(np.zeros(n, F32), n_threads=n_threads).step(g, max_norm=math.inf)
    assert info.grad_norm == math.sqrt(sum_squares(g))


@pytest.mark.parametrize("offset", range(8))
def test_alignment_changes_no_bit_of_the_norm(offset):
    g = draw(3, 50_000)
    room = np.empty(50_010, F32)
    moved = room[offset : offset + g.size]
    moved[:] = g
    norms = {fastopt.SGD(np.zeros(g.size, F32)).step(x, max_norm=1.0).grad_norm for x in (g, moved)}
    assert len(norms) == 1


def test_the_norm_is_that_of_exact_arithmetic():
    g = draw(3, 100_000) * F32(10) ** np.random.default_rng(0).integers(-12, 12, 100_000).astype(F32)
    exact = math.sqrt(math.fsum(float(x) ** 2 for x in g))
    info = fastopt.SGD(np.zeros(g.size, F32)).step(g, max_norm=math.inf)
    assert abs(info.grad_norm - exact) <= 1e-14 * exact


def test_the_norm_of_huge_gradients_does_not_overflow():
    info = fastopt.SGD(np.zeros(4, F32)).step(np.full(4, F32(3e38)), max_norm=1.0)
    assert info.grad_norm == pytest.approx(6e38, rel=1e-7)


@pytest.mark.parametrize("value", [1e38, 3e38])
def test_gradients_of_any_size_are_clipped_to_the_norm(value):
    """Also where the coefficient is below the smallest normal float32."""
    p = np.zeros(2, F32)
    fastopt.SGD(p, lr=1.0).step(np.array([value, 0], F32), max_norm=1.0)
    assert p.tolist() == [pytest.approx(-1, rel=1e-6), 0]


def test_an_infinite_max_norm_leaves_the_others_alone_beside_an_infinite_gradient():
    p = np.zeros(2, F32)
    fastopt.SGD(p, lr=1.0).step(np.array([np.inf, 1], F32), max_norm=math.inf)
    assert p.tolist() == [-np.inf, -1]


def test_tensors_without_a_gradient_do_not_count_in_the_norm():
    optimizer = fastopt.SGD([np.zeros(3, F32), np.zeros(4, F32), np.zeros(2, F32)])
    info = optimizer.step([np.full(3, F32(2)), None, np.ones(2, F32)], max_norm=1.0)
    assert info.grad_norm == math.sqrt(14)


def test_an_infinite_max_norm_only_computes_the_norm():
    p, q, g = draw(0, 100), draw(0, 100), draw(1, 100)
    assert fastopt.Adam(p).step(g, max_norm=math.inf).grad_norm > 0
    fastopt.Adam(q).step(g)
    assert_same_bits(p, q, "p")


# --- Codecs


def every_upper_half():
    """Every sign, exponent and leading fraction of float32, with tails around a tie."""
    upper = np.arange(65536, dtype=np.uint32)[:, None] << 16
    return (
        (upper | np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)).ravel().view(F32)
    )


@pytest.mark.parametrize("isa", compiled.available_isas())
def test_the_copy_in_bfloat16_is_rounded_to_nearest_even_for_every_input(isa, use_isa):
    use_isa(isa)
    p = every_upper_half().copy()
    optimizer = fastopt.SGD(p, copy_dtype="bfloat16")
    actual = optimizer.params_copy[0].view(np.uint16)
    expected = as_bfloat16(p)
    nan = np.isnan(p)
    assert np.array_equal(actual[~nan], expected[~nan])
    assert np.isnan(decoded(actual[nan])).all()


@pytest.mark.parametrize("isa", compiled.available_isas())
def test_the_copy_in_float16_is_rounded_to_nearest_even_for_every_input(isa, use_isa):
    use_isa(isa)
    p = every_upper_half().copy()
    actual = fastopt.SGD(p, copy_dtype="float16").params_copy[0]
    with np.errstate(over="ignore", invalid="ignore"):
        expected = p.astype(np.float16)
    nan = np.isnan(p)
    assert np.array_equal(actual[~nan].view(np.uint16), expected[~nan].view(np.uint16))
    assert np.isnan(actual[nan]).all()


def test_the_copy_in_bfloat16_is_that_of_ml_dtypes():
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="compares with ml_dtypes")
    p = every_upper_half().copy()
    (actual,) = fastopt.SGD(p, copy_dtype="bfloat16").params_copy
    assert actual.dtype == ml_dtypes.bfloat16
    with np.errstate(all="ignore"):
        expected = p.astype(ml_dtypes.bfloat16)
    nan = np.isnan(p)
    assert np.array_equal(actual[~nan].view(np.uint16), expected[~nan].view(np.uint16))


@pytest.mark.parametrize("isa", compiled.available_isas())
@pytest.mark.parametrize("dtype", [np.float16, np.uint16], ids=["float16", "bfloat16"])
def test_every_gradient_in_low_precision_is_decoded_exactly(dtype, isa, use_isa):
    use_isa(isa)
    g = np.arange(65536, dtype=np.uint16).view(dtype)
    expected = decoded(g)
    tiny = np.abs(expected) < np.finfo(F32).tiny  # only bfloat16 has those; they count as zero
    expected = np.where(tiny, F32(0), expected)
    p = np.zeros(65536, F32)
    fastopt.SGD(p, lr=1.0, grad_dtype="bfloat16" if dtype == np.uint16 else None).step(g)
    with np.errstate(invalid="ignore"):
        assert_same_bits(0 - p, 0 + expected, "decoded")


def test_gradients_in_the_type_of_ml_dtypes_are_taken():
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="takes gradients of ml_dtypes")
    g = draw(1, 1000)
    p, q = np.zeros(1000, F32), np.zeros(1000, F32)
    fastopt.SGD(p).step(g.astype(ml_dtypes.bfloat16))
    fastopt.SGD(q, grad_dtype="bfloat16").step(as_bfloat16(g))
    assert_same_bits(p, q, "p")


def test_tensors_may_have_gradients_of_different_types():
    p = [np.zeros(3, F32) for _ in range(3)]
    fastopt.SGD(p, lr=1.0, grad_dtype="bfloat16").step(
        [np.ones(3, F32), np.ones(3, np.float16), np.full(3, 0x3F80, np.uint16)]
    )
    assert [q.tolist() for q in p] == [[-1.0] * 3] * 3


# --- Skipping


@pytest.mark.covering(2)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan], ids=str)
@pytest.mark.parametrize("where", [0, 20_000, -1])
@pytest.mark.parametrize("dtype", GRADIENTS.values(), ids=GRADIENTS)
@EACH
@pytest.mark.bits
def test_a_nonfinite_gradient_changes_nothing(config, dtype, where, bad):
    n = 40_000
    p = [draw(0, 10), draw(1, n)]
    grad_dtype = "bfloat16" if dtype == np.uint16 else None
    optimizer = config.make(p, ema_decay=0.9, copy_dtype="bfloat16", grad_dtype=grad_dtype)
    optimizer.step([draw(2, 10, dtype), draw(3, n, dtype)])
    before = [a.tobytes() for a in p], pickle.dumps(optimizer.state_dict()), optimizer.params_copy[1].tobytes()
    g = [draw(4, 10, dtype), draw(5, n, dtype)]
    g[1][where] = as_bfloat16(np.array([bad], F32))[0] if dtype == np.uint16 else bad
    info = optimizer.step(g, skip_nonfinite=True, max_norm=1.0)
    assert info.applied is False
    assert not math.isfinite(info.grad_norm)
    after = [a.tobytes() for a in p], pickle.dumps(optimizer.state_dict()), optimizer.params_copy[1].tobytes()
    assert after == before


def test_a_gradient_that_its_scale_makes_infinite_is_skipped():
    p = np.ones(3, F32)
    info = fastopt.SGD(p).step(np.full(3, F32(1e30)), grad_scale=1e20, skip_nonfinite=True)
    assert info.applied is False
    assert p.tolist() == [1, 1, 1]


def test_a_skipped_step_still_zeroes_the_gradients_if_asked():
    p, g = np.ones(3, F32), np.array([1, np.nan, 2], F32)
    assert fastopt.SGD(p).step(g, skip_nonfinite=True, zero_grads=True) == (False, pytest.approx(math.nan, nan_ok=True))
    assert p.tolist() == [1, 1, 1]
    assert g.tolist() == [0, 0, 0]


def test_the_step_after_a_skipped_one_is_as_if_it_had_not_been():
    p, q = draw(0, 100), draw(0, 100)
    skipped, plain = fastopt.Adam(p), fastopt.Adam(q)
    skipped.step(np.full(100, F32(np.inf)), skip_nonfinite=True)
    for optimizer in (skipped, plain):
        optimizer.step(draw(1, 100), skip_nonfinite=True)
    assert_same_bits(p, q, "p")


def test_without_skipping_nan_is_not_hidden():
    p = np.ones(3, F32)
    info = fastopt.SGD(p).step(np.array([1, np.nan, 2], F32), max_norm=1.0)
    assert info.applied is True
    assert np.isnan(p).all()


# --- Averages and copies


def test_averages_and_copies_start_from_the_parameters():
    p = draw(0, 10)
    optimizer = fastopt.SGD([p], ema_decay=0.9, copy_dtype="float16")
    assert_same_bits(optimizer.ema[0], p, "ema")
    assert optimizer.params_copy[0].tolist() == p.astype(np.float16).tolist()
    assert not np.shares_memory(optimizer.ema[0], p)


def test_averages_and_copies_have_the_names_of_the_parameters():
    optimizer = fastopt.SGD({"w": np.ones((2, 3), F32)}, ema_decay=0.9, copy_dtype="bfloat16")
    assert optimizer.ema["w"].shape == optimizer.params_copy["w"].shape == (2, 3)


def test_bytes_of_the_average_and_the_copy():
    optimizer = fastopt.SGD(np.ones(1000, F32), ema_decay=0.9, copy_dtype="bfloat16")
    assert (optimizer.ema[0].nbytes, optimizer.params_copy[0].nbytes) == (4000, 2000)


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("isa", compiled.available_isas())
@pytest.mark.usefixtures("parallel_from_the_first_element")
@EACH
def test_an_average_that_warms_up_is_that_of_separate_steps(config, isa, n_threads, use_isa):
    use_isa(isa)
    n = 2 * TILE + 77
    params = split(draw(0, n))
    unfused = Unfused(config, draw(0, n), 0.25, cuts=CUTS, ema_warmup=True)
    optimizer = config.make(params, ema_decay=0.25, ema_warmup=True, n_threads=n_threads)
    for seed in range(1, 5):  # 2/11, 3/12, then 1/4
        unfused.step(draw(seed, n), clip_value=0.1)
        optimizer.step(split(draw(seed, n)), clip_value=0.1)
        assert_same_bits(np.concatenate(params), unfused.p, f"step {seed}, p")
        assert_same_bits(np.concatenate(optimizer.ema), unfused.ema, f"step {seed}, ema")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_first_decays_of_a_warm_up_are_two_elevenths_three_twelfths_four_thirteenths(backend):
    p = np.zeros(3, F32)
    optimizer = fastopt.SGD([p], lr=1.0, ema_decay=0.3, ema_warmup=True, backend=backend)
    average = 0.0
    for t in (1, 2, 3, 4):
        optimizer.step([np.ones(3, F32)])
        decay = {1: 2 / 11, 2: 3 / 12, 3: 0.3, 4: 0.3}[t]
        average = decay * average + (1 - decay) * -t
        assert optimizer.ema[0].tolist() == [pytest.approx(average, rel=1e-6)] * 3


def test_a_parameter_warms_up_by_its_own_steps():
    """Neither a missing gradient nor a skipped step counts."""
    p = [np.zeros(3, F32), np.zeros(3, F32)]
    optimizer = fastopt.SGD(p, lr=1.0, ema_decay=0.9, ema_warmup=True)
    optimizer.step([np.ones(3, F32), None])
    optimizer.step([np.ones(3, F32), np.full(3, F32(np.nan))], skip_nonfinite=True)
    optimizer.step([None, np.ones(3, F32)], skip_nonfinite=True)
    assert optimizer.ema[0].tolist() == optimizer.ema[1].tolist() == [pytest.approx(-9 / 11, rel=1e-6)] * 3


def test_resuming_a_warm_up_changes_no_bit():
    p = draw(0, 30)
    optimizer = fastopt.Adam([p], ema_decay=0.9, ema_warmup=True)
    optimizer.step([draw(1, 30)])
    pickled = pickle.loads(pickle.dumps(optimizer))
    loaded = fastopt.Adam([p.copy()], ema_decay=0.9, ema_warmup=True)
    loaded.load_state_dict(optimizer.state_dict())
    assert pickled.ema_warmup is True
    for other in (optimizer, pickled, loaded):
        other.step([draw(2, 30)])
    for other in (pickled, loaded):
        assert_same_bits(other.ema[0], optimizer.ema[0], "ema")


def test_a_warm_up_without_an_average_is_refused():
    with pytest.raises(ValueError, match=r"SGD: ema_warmup=True needs ema_decay, got None"):
        fastopt.SGD(np.ones(3, F32), ema_warmup=True)


def test_swapping_puts_the_averages_in_and_the_parameters_back():
    p = draw(0, 50)
    optimizer = fastopt.Adam(p, ema_decay=0.5, copy_dtype="float16", lr=0.1)
    for seed in (1, 2):
        optimizer.step(draw(seed, 50))
    trained, average = p.copy(), optimizer.ema[0].copy()
    with optimizer.swap_ema():
        assert_same_bits(p, average, "inside")
        assert optimizer.params_copy[0].tolist() == average.astype(np.float16).tolist()
    assert_same_bits(p, trained, "after")
    assert_same_bits(optimizer.ema[0], average, "ema after")
    assert optimizer.params_copy[0].tolist() == trained.astype(np.float16).tolist()
    optimizer.step(draw(3, 50))


def test_an_exception_puts_the_parameters_back():
    p = np.zeros(3, F32)
    optimizer = fastopt.SGD(p, lr=1.0, ema_decay=0.5)
    optimizer.step(np.ones(3, F32))
    with pytest.raises(KeyError), optimizer.swap_ema():
        raise KeyError
    assert p.tolist() == [-1, -1, -1]


def test_no_step_is_made_while_the_averages_are_in():
    optimizer = fastopt.SGD(np.ones(3, F32), ema_decay=0.5)
    optimizer.step(np.ones(3, F32))
    with optimizer.swap_ema(), pytest.raises(RuntimeError, match="inside swap_ema"):
        optimizer.step(np.ones(3, F32))
    with optimizer.swap_ema(), pytest.raises(RuntimeError, match="inside swap_ema"), optimizer.swap_ema():
        pass


@pytest.mark.parametrize(
    "call",
    [
        lambda o: o.state_dict(),
        lambda o: o.load_state_dict({}),
        lambda o: o.update({"a": np.ones(3, F32)}, {"a": None}),
        lambda o: o.add_param_group({"params": {"b": np.ones(3, F32)}}),
        lambda o: pickle.dumps(o),
        copy.deepcopy,
    ],
)
def test_nothing_is_saved_loaded_or_added_while_the_averages_are_in(call):
    p = {"a": np.ones(3, F32)}
    optimizer = fastopt.SGD(p, ema_decay=0.5, lr=1.0)
    optimizer.step({"a": np.ones(3, F32)})
    before = p["a"].copy(), optimizer.ema["a"].copy()
    with optimizer.swap_ema(), pytest.raises(RuntimeError, match="inside swap_ema"):
        call(optimizer)
    assert_same_bits(p["a"], before[0], "p")
    assert_same_bits(optimizer.ema["a"], before[1], "ema")


@pytest.mark.skipif(sys.platform != "linux", reason="reads the size of the process from /proc")
def test_a_swap_that_is_entered_again_and_again_needs_no_more_memory():
    def nbytes():
        return 4096 * int(pathlib.Path("/proc/self/statm").read_text().split()[1])

    optimizer = fastopt.SGD(list(np.ones((20_000, 1), np.float32)), ema_decay=0.5)
    swap = optimizer.swap_ema()
    for k in range(130):
        if k == 30:
            before = nbytes()
        with swap:
            pass
    assert nbytes() - before < 100 * 20_000 * 8 / 2  # a pointer for each tensor, for half of the entries


def test_a_parameter_that_cannot_be_swapped_swaps_none():
    p = [np.ones(3, F32), np.ones(3, F32)]
    optimizer = fastopt.SGD(p, ema_decay=0.5, lr=1.0)
    optimizer.step([np.ones(3, F32), np.ones(3, F32)])
    p[1].flags.writeable = False
    with pytest.raises(ValueError, match=r"params\[1\] must be writable"), optimizer.swap_ema():
        pass
    assert p[0].tolist() == [0, 0, 0]


def test_a_copy_follows_a_parameter_written_between_steps_when_asked():
    p = np.zeros(3, F32)
    optimizer = fastopt.SGD(p, copy_dtype="float16")
    p[:] = 2
    optimizer.refresh_params_copy()
    assert optimizer.params_copy[0].tolist() == [2, 2, 2]


@EACH
def test_resuming_with_averages_changes_no_bit(config):
    p = [draw(0, 30), draw(1, 5)]
    optimizer = config.make(p, ema_decay=0.9, copy_dtype="bfloat16")
    optimizer.step([draw(2, 30), draw(3, 5)])
    other = pickle.loads(pickle.dumps(optimizer))
    loaded = config.spec.cls(copy.deepcopy(p), ema_decay=0.9, copy_dtype="bfloat16")
    loaded.load_state_dict(optimizer.state_dict())
    for o in (optimizer, other, loaded):
        o.step([draw(4, 30), draw(5, 5)], max_norm=1.0)
    for o in (other, loaded):
        assert_same_bits(o.ema[0], optimizer.ema[0], "ema")
        assert_same_bits(o.param_groups[0]["params"][0], p[0], "p")
        assert np.array_equal(o.params_copy[0].view(np.uint16), optimizer.params_copy[0].view(np.uint16))


def test_a_state_dict_without_averages_is_refused_by_an_optimizer_that_keeps_them():
    plain, averaged = fastopt.SGD([np.ones(3, F32)]), fastopt.SGD([np.ones(3, F32)], ema_decay=0.9)
    with pytest.raises(ValueError, match="lacks averages"):
        averaged.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="has averages"):
        plain.load_state_dict(averaged.state_dict())


def test_update_takes_the_options_of_a_step():
    p, g = {"w": np.zeros(2, F32)}, {"w": np.array([3, 4], F32)}
    optimizer = fastopt.SGD(lr=1.0, ema_decay=0.5)
    info = optimizer.update(p, g, max_norm=2.5, zero_grads=True)
    assert info.grad_norm == 5
    assert np.allclose(p["w"], [-1.5, -2], rtol=1e-6)
    assert np.allclose(optimizer.ema["w"], [-0.75, -1], rtol=1e-6)
    assert g["w"].tolist() == [0, 0]


def test_a_tensor_without_a_gradient_keeps_its_average_and_copy():
    optimizer = fastopt.SGD([np.ones(3, F32), np.ones(2, F32)], lr=1.0, ema_decay=0.5)
    optimizer.step([np.ones(3, F32), np.ones(2, F32)])
    before = optimizer.ema[1].copy()
    optimizer.step([np.ones(3, F32), None])
    assert_same_bits(optimizer.ema[1], before, "ema")


# --- Agreement with the reference backend and with torch


@pytest.mark.parametrize("stages", [c for c in COMBINATIONS if len(c) != 2], ids=", ".join)
@EACH
def test_the_reference_backend_does_the_same(config, stages):
    options, step, dtype = together(stages)
    results = []
    for backend in ("cpu", "reference"):
        p = split(draw(0, 5000))
        optimizer = config.make(p, backend=backend, **options)
        for seed in (1, 2):
            info = optimizer.step(split(draw(seed, 5000, dtype)), **step)
        kept = [np.concatenate(p), *([np.concatenate(optimizer.ema)] if optimizer.ema_decay else [])]
        results.append((kept, info))
    for a, b in zip(results[0][0], results[1][0], strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)
    norms = [info.grad_norm for _, info in results]
    assert norms == [None, None] or norms[0] == pytest.approx(norms[1], rel=1e-12)


def test_the_reference_backend_skips_alike():
    p = np.ones(3, F32)
    optimizer = fastopt.Adam(p, backend="reference", ema_decay=0.5)
    assert optimizer.step(np.full(3, F32(np.nan)), skip_nonfinite=True).applied is False
    assert p.tolist() == [1, 1, 1]
    assert int(optimizer.state[0]["step"]) == 0


def test_the_whole_tail_is_that_of_torchs_separate_calls():
    torch = pytest.importorskip("torch", reason="compares with torch")
    shapes = [(50, 40), (40,), (7, 3, 3)]
    ours = [draw(k, math.prod(shape)).reshape(shape) for k, shape in enumerate(shapes)]
    theirs = [torch.nn.Parameter(torch.tensor(p)) for p in ours]
    averages = [p.detach().clone() for p in theirs]
    optimizer = fastopt.AdamW(ours, lr=1e-2, ema_decay=0.9, copy_dtype="bfloat16")
    adamw = torch.optim.AdamW(theirs, lr=1e-2)
    n_steps = 5
    for seed in range(n_steps):
        gradients = [draw(seed + k, p.size).reshape(p.shape) for k, p in enumerate(ours)]
        for p, g in zip(theirs, gradients, strict=True):
            p.grad = torch.tensor(g)
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        adamw.step()
        torch._foreach_lerp_(averages, [p.detach() for p in theirs], 1 - 0.9)
        info = optimizer.step(gradients, max_norm=0.5, zero_grads=True)
        assert info.grad_norm == pytest.approx(float(norm), rel=1e-6)
        assert not any(g.any() for g in gradients)
    for p, q, e, f, c in zip(ours, theirs, optimizer.ema, averages, optimizer.params_copy, strict=True):
        ulp = np.spacing(np.maximum(np.abs(p), F32(1e-2)))
        assert (np.abs(p - q.detach().numpy()) <= 4 * n_steps * ulp).all()
        assert (np.abs(e - f.numpy()) <= 4 * n_steps * ulp).all()
        same = decoded(c.view(np.uint16)) == q.detach().bfloat16().float().numpy()
        assert same.mean() > 0.99  # a last bit of float32 can tip a tie


# --- Misuse


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"grad_scale": math.nan}, ValueError),
        ({"grad_scale": math.inf}, ValueError),
        ({"grad_scale": "1"}, TypeError),
        ({"grad_scale": None}, TypeError),
        ({"max_norm": -1.0}, ValueError),
        ({"max_norm": math.nan}, ValueError),
        ({"max_norm": "1"}, TypeError),
        ({"clip_value": -1.0}, ValueError),
        ({"clip_value": math.inf}, ValueError),
        ({"clip_value": True}, TypeError),
        ({"skip_nonfinite": 1}, TypeError),
        ({"zero_grads": "yes"}, TypeError),
    ],
    ids=str,
)
def test_a_bad_option_of_a_step_is_refused_before_anything_is_written(options, error):
    p, g = np.ones(3, F32), np.ones(3, F32)
    optimizer = fastopt.SGD(p)
    with pytest.raises(error, match=f"SGD: {next(iter(options))} must be"):
        optimizer.step(g, **options)
    assert p.tolist() == g.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"ema_decay": 1.5}, ValueError),
        ({"ema_decay": "0.9"}, TypeError),
        ({"ema_warmup": 1, "ema_decay": 0.9}, TypeError),
        ({"copy_dtype": "float8"}, ValueError),
        ({"copy_dtype": np.float16}, ValueError),
        ({"grad_dtype": "float16"}, ValueError),
    ],
    ids=str,
)
def test_a_bad_option_of_an_optimizer_is_refused(options, error):
    with pytest.raises(error, match=f"SGD: {next(iter(options))} must be"):
        fastopt.SGD(np.ones(3, F32), **options)


@pytest.mark.parametrize("what", ["ema", "params_copy"])
def test_what_was_not_asked_for_is_an_error_that_names_the_option(what):
    option = {"ema": "ema_decay", "params_copy": "copy_dtype"}[what]
    with pytest.raises(ValueError, match=f"SGD: needs {option}= at construction"):
        getattr(fastopt.SGD(np.ones(3, F32)), what)


def test_gradients_that_cannot_be_zeroed_are_refused_before_anything_is_written():
    p = [np.ones(3, F32), np.ones(3, F32)]
    g = [np.ones(3, F32), np.ones(3, F32)]
    g[1].flags.writeable = False
    with pytest.raises(ValueError, match=r"grads\[1\] must be writable for zero_grads"):
        fastopt.SGD(p).step(g, zero_grads=True)
    assert [a.tolist() for a in (*p, *g)] == [[1, 1, 1]] * 4


def test_one_gradient_for_two_parameters_cannot_be_zeroed():
    p, g = [np.ones(3, F32), np.ones(3, F32)], np.ones(3, F32)
    optimizer = fastopt.SGD(p)
    optimizer.step([g, g])
    with pytest.raises(ValueError, match=r"grads\[0\] and grads\[1\] overlap in memory"):
        optimizer.step([g, g], zero_grads=True)
    assert g.tolist() == [1, 1, 1]


def test_gradients_that_overlap_in_another_step_are_still_refused():
    """The same addresses, but of other tensors: what was found to be disjoint before is not now."""
    p, b = [np.zeros(4, F32), np.zeros(8, F32), np.zeros(4, F32)], np.ones(12, F32)
    optimizer = fastopt.SGD(p, lr=1.0)
    optimizer.step([b[0:4], None, b[4:8]], zero_grads=True)
    b[:] = 1
    with pytest.raises(ValueError, match=r"grads\[1\] and grads\[2\] overlap"):
        optimizer.step([None, b[0:8], b[4:8]], zero_grads=True)


def test_gradients_are_let_go_after_the_step():
    g = np.ones(3, F32)
    kept = weakref.ref(g)
    optimizer = fastopt.SGD([np.ones(3, F32)])
    optimizer.step([g], zero_grads=True, max_norm=1.0)
    del g
    assert kept() is None


def test_uint16_gradients_need_a_word():
    with pytest.raises(TypeError, match="grad_dtype='bfloat16'"):
        fastopt.SGD(np.ones(3, F32)).step(np.ones(3, np.uint16))


@pytest.mark.parametrize("kept", ["ema", "params_copy"])
def test_a_gradient_that_overlaps_an_average_or_a_copy_is_refused(kept):
    optimizer = fastopt.SGD([np.ones(8, F32)], ema_decay=0.9, copy_dtype="float16")
    g = optimizer.ema[0] if kept == "ema" else optimizer.params_copy[0]
    with pytest.raises(ValueError, match=r"grads\[0\] overlaps the (average|copy) of params\[0\]"):
        optimizer.step([g])


@EACH
def test_a_step_with_options_allocates_nothing_that_grows_with_n(config):
    peaks = []
    for n in (1_000, 3_000_000):
        p, g = np.ones(n, F32), np.ones(n, F32)
        optimizer = config.make(p, ema_decay=0.9, copy_dtype="bfloat16")
        options = {"grad_scale": 0.5, "max_norm": 1.0, "clip_value": 1.0, "skip_nonfinite": True, "zero_grads": True}
        optimizer.step(g, **options)
        tracemalloc.start()
        optimizer.step(g, **options)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 10_000


@pytest.mark.parametrize("value", [1e-20, 1e-40, 3e38, np.inf, np.nan], ids=str)
def test_no_input_makes_a_step_with_options_slow(value):
    import statistics
    import time

    def median(fill):
        g = np.full(100_000, F32(fill))
        optimizer = fastopt.Adam(np.full(100_000, F32(fill)), ema_decay=0.9, copy_dtype="bfloat16", n_threads=1)
        times = []
        for _ in range(15):
            start = time.perf_counter()
            optimizer.step(g, max_norm=1.0, clip_value=1.0)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    assert median(value) < 3 * median(0.1)
