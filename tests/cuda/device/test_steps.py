"""The CUDA kernels: every rule and every stage has the bits of the compiled CPU kernels.

On a GPU (`pytest -m gpu`), or where there is none in Numba's simulator.
"""

import itertools
import math

import numpy as np
import pytest

import fastopt
from fastopt._formats import STATE_DTYPES
from fastopt.rules import registry
from tests.support.configs import CONFIGS, DEFAULTS, LOW_PRECISION
from tests.support.lockstep import BY_NAME, SIZES, Lockstep, arrays, host, on_device, same
from tests.support.oracle import assert_same_bits


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_rule_has_the_bits_of_the_cpu(config):
    rng = np.random.default_rng(1)
    lockstep = Lockstep(config.make, arrays(rng))
    for _ in range(2):
        lockstep.step(arrays(rng))
    lockstep.check()


@pytest.mark.covering(1)
@pytest.mark.parametrize("state_dtype", LOW_PRECISION)
@pytest.mark.parametrize("config", DEFAULTS, ids=str)
def test_states_in_low_precision_have_the_bits_of_the_cpu(config, state_dtype):
    rng = np.random.default_rng(2)
    sizes = (64, 130, 1)
    lockstep = Lockstep(config.make, arrays(rng, sizes), state_dtype=state_dtype, seed=7)
    for k in range(3):
        lockstep.step(arrays(rng, sizes, 10.0 ** (2 * k - 2)))  # scales grow
    lockstep.check()


@pytest.mark.parametrize("state_dtype", LOW_PRECISION)
def test_scales_fall_and_flags_come_and_go(state_dtype):
    rng = np.random.default_rng(3)
    lockstep = Lockstep(BY_NAME["adam"].make, arrays(rng, (150,)), state_dtype=state_dtype)
    g = arrays(rng, (150,), 100.0)[0]
    lockstep.step([g])
    g[[5, 100]] = np.inf, np.nan
    lockstep.step([g])
    for _ in range(17):  # every block is looked at once
        lockstep.step([1e-4 * np.sign(rng.standard_normal(150)).astype(np.float32)])
    lockstep.check()


def surroundings():
    """Every gradient type, option and companion at least once, with optimizers of every kind."""
    names = ("adamw", "sgd", "lamb", "lars", "lion", "nadam")
    grad_types = (np.float32, np.float16, "bfloat16")
    tails = (
        {"grad_scale": 0.5, "max_norm": 1.0},
        {"clip_value": 0.25, "zero_grads": True},
        {"grad_scale": -2.0, "max_norm": 0.5, "clip_value": 0.125, "skip_nonfinite": True, "zero_grads": True},
        {"max_norm": math.inf},
        {"max_norm": 2e-38, "skip_nonfinite": True},  # a coefficient below the normal float32
    )
    keeps = (
        {"ema_decay": 0.9, "copy_dtype": "bfloat16"},
        {"copy_dtype": "float16", "state_dtype": "8bit"},
        {"ema_decay": 0.5, "ema_warmup": True, "master": "split", "state_dtype": "bfloat16"},
    )
    for k, (name, tail) in enumerate(itertools.product(names, tails)):
        yield name, grad_types[k % 3], tail, keeps[(k + k // 3) % 3]


@pytest.mark.covering(1)
@pytest.mark.parametrize(("name", "grad_type", "tail", "keeps"), list(surroundings()))
def test_what_surrounds_a_rule_has_the_bits_of_the_cpu(name, grad_type, tail, keeps):
    rng = np.random.default_rng(4)
    params = arrays(rng)
    if "master" in keeps:
        params = [(p.view(np.uint32) >> 16).astype(np.uint16) for p in params]
    lockstep = Lockstep(BY_NAME[name].make, params, grad_dtype="bfloat16", **keeps)
    for _ in range(2):
        grads = arrays(rng)
        if grad_type == "bfloat16":
            grads = [(g.view(np.uint32) >> 16).astype(np.uint16) for g in grads]
        else:
            grads = [g.astype(grad_type) for g in grads]
        lockstep.step(grads, **tail)
    lockstep.check()


@pytest.mark.covering(1)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["adam", "nadam", "lamb"])
def test_a_step_with_a_gradient_that_is_not_finite_is_skipped(name, bad):
    rng = np.random.default_rng(5)
    lockstep = Lockstep(BY_NAME[name].make, arrays(rng), ema_decay=0.5)
    for spoiled in (False, True, True, False, False):
        grads = arrays(rng)
        if spoiled:
            grads[1][7] = bad
        lockstep.step(grads, skip_nonfinite=True, zero_grads=True)
    lockstep.check()
    assert int(lockstep.gpu.state[0]["step"]) == 3


def undecided(monkeypatch):
    """Let the host hear of no decision until it asks."""
    from fastopt.backends.cuda import plan

    monkeypatch.setattr(plan.memory.Event, "has_passed", lambda self: False)


@pytest.mark.parametrize("name", ["adam", "nadam", "radam"])
def test_steps_on_top_of_undecided_ones_take_the_scalars_that_are_true(name, monkeypatch):
    undecided(monkeypatch)
    rng = np.random.default_rng(6)
    params = arrays(rng)
    cpu_params, gpu_params = [p.copy() for p in params], [on_device(p) for p in params]
    average = {"ema_decay": 0.4, "ema_warmup": True}  # of which every step has a decay of its own, up to the sixth
    cpu = BY_NAME[name].make(cpu_params, backend="cpu", **average)
    gpu = BY_NAME[name].make(gpu_params, backend="cuda", **average)
    infos = []
    for k in range(12):  # more than may be undecided
        grads = arrays(rng)
        if k in (1, 2, 6):
            grads[0][0] = np.nan
        if k == 9:
            cpu.param_groups[0]["lr"] = gpu.param_groups[0]["lr"] = 0.5
        infos.append(gpu.step([on_device(g) for g in grads], skip_nonfinite=True))
        cpu.step(grads, skip_nonfinite=True)
    assert gpu._plan._undecided
    assert repr(infos[-1]) == "DeviceStepInfo(not known yet)"
    for a, b in zip(gpu_params, cpu_params, strict=True):
        same(a, b, "params")
    for a, b in zip(gpu.ema, cpu.ema, strict=True):
        same(a, b, "ema")
    assert int(gpu.state[0]["step"]) == int(cpu.state[0]["step"]) == 9
    assert not gpu._plan._undecided
    assert [info.applied for info in infos] == [k not in (1, 2, 6) for k in range(12)]


def test_a_step_that_cannot_skip_waits_for_undecided_ones(monkeypatch):
    undecided(monkeypatch)
    rng = np.random.default_rng(7)
    lockstep = Lockstep(BY_NAME["adam"].make, arrays(rng))
    bad = arrays(rng)
    bad[0][0] = np.inf
    lockstep.gpu.step([on_device(g) for g in bad], skip_nonfinite=True)
    lockstep.cpu.step(bad, skip_nonfinite=True)
    lockstep.step(arrays(rng), max_norm=1.0)
    lockstep.step([*arrays(rng)[:-1], None])
    lockstep.check()


def test_groups_with_kernels_of_their_own_and_missing_gradients():
    rng = np.random.default_rng(8)
    first, second = arrays(rng, (70, 5)), arrays(rng, (3, 100))

    def made(on):
        groups = [{"params": [on(p) for p in first]}, {"params": [on(p) for p in second], "weight_decay": 0.5}]
        groups[1]["lr"] = 0.25
        return groups

    cpu_groups, gpu_groups = made(np.copy), made(on_device)
    cpu, gpu = fastopt.Adam(cpu_groups), fastopt.Adam(gpu_groups)
    assert gpu.backend == "cuda"  # nobody had to say so
    for k in range(4):
        grads = [*arrays(rng, (70, 5)), *arrays(rng, (3, 100))]
        grads[k] = None
        cpu.step(grads, max_norm=0.5)
        gpu.step([None if g is None else on_device(g) for g in grads], max_norm=0.5)
    gpu.param_groups[0]["lr"] = cpu.param_groups[0]["lr"] = 1e-4
    cpu.step([None, *grads[1:2], None, None])
    gpu.step([None, on_device(grads[1]), None, None])
    for mine, theirs in zip(gpu_groups, cpu_groups, strict=True):
        for a, b in zip(mine["params"], theirs["params"], strict=True):
            same(a, b, "params")
    assert [int(s["step"]) for s in gpu.state] == [int(s["step"]) for s in cpu.state] == [3, 4, 3, 3]


def test_nothing_happens_without_a_gradient_or_an_element():
    p = on_device(np.ones(3, np.float32))
    opt = fastopt.Adam([p, on_device(np.ones((0, 4), np.float32))])
    info = opt.step([None, None], max_norm=1.0)
    assert info.applied
    assert info.grad_norm == 0.0
    opt.step([on_device(np.zeros(3, np.float32)), on_device(np.ones((0, 4), np.float32))])
    same(p, np.ones(3, np.float32), "p")


def test_a_flat_buffer_is_one_segment():
    rng = np.random.default_rng(9)
    tensors = {"a": (3, 5), "b": 7, "c": (), "d": 40}
    cpu_params, gpu_params = fastopt.FlatBuffer(tensors), fastopt.FlatBuffer(tensors, backend="cuda")
    cpu_grads, gpu_grads = cpu_params.zeros_like(), gpu_params.zeros_like()
    cpu, gpu = fastopt.AdamW(cpu_params, ema_decay=0.5), fastopt.AdamW(gpu_params, ema_decay=0.5)
    for _ in range(2):
        values = rng.standard_normal(63).astype(np.float32)
        cpu_grads.flat[:] = values
        gpu_grads.flat.copy_to_device(values)
        cpu.step(cpu_grads)
        gpu.step(gpu_grads)
    assert gpu._plan._table[0].shape[0] == 1
    same(gpu_params.flat, cpu_params.flat, "params")
    same(gpu.ema["d"], cpu.ema["d"], "ema")
    assert gpu_params["a"].shape == (3, 5)
    copied = gpu_params.copy()
    same(copied.flat, cpu_params.flat, "a copy")
    assert fastopt.FlatBuffer({"x": np.arange(3, dtype=np.float32)}, backend="cuda")["x"].copy_to_host()[2] == 2
    copied["d"] = np.arange(40, dtype=np.float32)
    copied["b"] = gpu_params["b"]
    assert copied["d"].copy_to_host()[39] == 39
    cpu_params["b"] = gpu_params["b"]
    same(copied["b"], cpu_params["b"], "values that were assigned")


def test_arrays_at_odd_addresses_have_the_same_bits():
    rng = np.random.default_rng(10)
    whole = [rng.standard_normal(90).astype(np.float32) for _ in range(2)]
    p, g = (on_device(x) for x in whole)
    expected, gradient = whole[0].copy(), whole[1]
    fastopt.Adam([p[1:]]).step([g[1:]])
    fastopt.Adam([expected[1:]]).step([gradient[1:]])
    same(p, expected, "p")


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_a_state_dict_moves_between_the_backends(state_dtype):
    rng = np.random.default_rng(11)
    options = {"state_dtype": state_dtype, "seed": 3, "ema_decay": 0.75}
    lockstep = Lockstep(BY_NAME["nadam"].make, arrays(rng), **options)
    lockstep.step(arrays(rng))
    saved = lockstep.gpu.state_dict()
    theirs = lockstep.cpu.state_dict()
    for key, entry in theirs["state"].items():
        for name, value in entry.items():
            assert np.array_equal(saved["state"][key][name], value), name
    lockstep.cpu.load_state_dict(saved)
    lockstep.gpu.load_state_dict(theirs)
    lockstep.step(arrays(rng))
    lockstep.check()
    fresh = BY_NAME["nadam"].make([on_device(p) for p in lockstep.cpu_params], **options)
    fresh.load_state_dict(lockstep.cpu.state_dict())
    same(fresh.ema[1], lockstep.cpu.ema[1], "ema")
    assert fresh.state_nbytes == lockstep.cpu.state_nbytes


def test_averages_swap_and_copies_refresh():
    rng = np.random.default_rng(12)
    lockstep = Lockstep(BY_NAME["sgd"].make, arrays(rng), ema_decay=0.5, copy_dtype="float16")
    lockstep.step(arrays(rng))
    with lockstep.gpu.swap_ema(), lockstep.cpu.swap_ema():
        for k in range(len(SIZES)):
            same(lockstep.gpu_params[k], lockstep.cpu_params[k], "averages as parameters")
            same(lockstep.gpu.params_copy[k], lockstep.cpu.params_copy[k], "copies of them")
        with pytest.raises(RuntimeError, match="swap_ema"):
            lockstep.gpu.step([None] * len(SIZES))
    lockstep.check()
    lockstep.gpu_params[0].copy_to_device(np.full(1, 3.0, np.float32))
    lockstep.gpu.refresh_params_copy()
    assert host(lockstep.gpu.params_copy[0])[0] == 3.0


def test_split_parameters_are_loaded():
    values = np.array([1.0, 1.0000001, -3.25e-5, np.nan], np.float32)
    opt = fastopt.SGD([on_device(np.zeros(4, np.uint16))], master="split")
    opt.load_master_params([values])
    assert_same_bits(opt.master_params[0], values, "master")
    opt.load_master_params([on_device(values[::-1].copy())])
    assert_same_bits(opt.master_params[0], values[::-1].copy(), "master")


def test_update_makes_state_for_new_names():
    rng = np.random.default_rng(13)
    opt, expected = fastopt.Adam(lr=0.1, backend="cuda"), fastopt.Adam(lr=0.1)
    cpu_params = {"a": arrays(rng)[3]}
    gpu_params = {"a": on_device(cpu_params["a"])}
    for k in range(3):
        if k == 1:
            cpu_params["b"] = arrays(rng)[1]
            gpu_params["b"] = on_device(cpu_params["b"])
        grads = {name: rng.standard_normal(p.shape).astype(np.float32) for name, p in cpu_params.items()}
        expected.update(cpu_params, grads)
        opt.update(gpu_params, {name: on_device(g) for name, g in grads.items()})
    for name, p in cpu_params.items():
        same(gpu_params[name], p, name)


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.name in ("defaults", "away")], ids=str)
def test_the_functional_api_takes_device_arrays(config):
    rng = np.random.default_rng(14)
    spec, values = config.spec, config.values
    names = ["p", "g", *spec.states_for(spec.flags(values))]
    cpu = {name: np.abs(rng.standard_normal(70)).astype(np.float32) for name in names}
    gpu = {name: on_device(array) for name, array in cpu.items()}
    running = {name: np.full(1, first) for name, first in spec.running.items()}
    carried = {name: array.copy() for name, array in running.items()}
    function = getattr(fastopt.functional, spec.function)
    function(**gpu, **running, step=3, **config.hypers)
    function(**cpu, **carried, step=3, **config.hypers)
    for name, array in cpu.items():
        same(gpu[name], array, name)
    assert running == carried


def special_values():
    tiny = np.finfo(np.float32).tiny
    values = [0.0, -0.0, tiny, -tiny, tiny / 4, -tiny / 2, np.nextafter(tiny, 0, dtype=np.float32), 1e-45, 1.5 * tiny]
    values += [np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 1e-20, -1e20, 1.0, -1.0]
    return np.array(values, np.float32)


@pytest.mark.parametrize("spec", list(registry.values()), ids=lambda spec: spec.name)
def test_subnormal_infinite_and_undefined_values(spec):
    values = special_values()
    pairs = np.array(list(itertools.product(values, values)), np.float32)
    lockstep = Lockstep(spec.cls, [pairs[:, 0].copy()])
    lockstep.step([pairs[:, 1].copy()])
    lockstep.step([pairs[::-1, 1].copy()])
    lockstep.check()


# --- Micro-batches


@pytest.mark.parametrize("name", ["adamw", "lamb", "lars", "nadam"])
def test_accumulated_gradients_have_the_bits_of_the_cpu(name):
    rng = np.random.default_rng(20)
    lockstep = Lockstep(BY_NAME[name].make, arrays(rng), ema_decay=0.5, grad_dtype="bfloat16", state_dtype="bfloat16")
    for _ in range(2):
        lockstep.accumulate(arrays(rng))
        lockstep.accumulate([None, *[g.astype(np.float16) for g in arrays(rng)[1:]]])
        lockstep.accumulate([(g.view(np.uint32) >> 16).astype(np.uint16) for g in arrays(rng)])
        lockstep.step_of_sums(grad_scale=1 / 3, max_norm=0.5, skip_nonfinite=True)
        lockstep.step(arrays(rng))
        lockstep.accumulate([arrays(rng)[0], None, None, None])
        lockstep.step_of_sums()
    lockstep.check()


def test_sums_of_subnormal_infinite_and_undefined_values_have_the_bits_of_the_cpu():
    values = special_values()
    pairs = np.array(list(itertools.product(values, values)), np.float32)
    lockstep = Lockstep(fastopt.SGD, [np.ones(len(pairs), np.float32)], lr=1.0)
    lockstep.accumulate([pairs[:, 0].copy()])
    lockstep.accumulate([pairs[:, 1].copy()])
    lockstep.step_of_sums()
    lockstep.check()


def test_gradients_at_odd_addresses_are_added_up_alike():
    rng = np.random.default_rng(21)
    whole = rng.standard_normal(90).astype(np.float32)
    p, expected, g = on_device(np.zeros(89, np.float32)), np.zeros(89, np.float32), on_device(whole)
    for optimizer, gradient in ((fastopt.Adam([p]), g[1:]), (fastopt.Adam([expected]), whole[1:])):
        optimizer.accumulate([gradient])
        optimizer.accumulate([gradient])
        optimizer.step()
    same(p, expected, "p")


def test_a_skipped_step_clears_the_sums_before_anybody_knows_of_it(monkeypatch):
    undecided(monkeypatch)
    rng = np.random.default_rng(22)
    lockstep = Lockstep(BY_NAME["adam"].make, arrays(rng))
    infos = []
    for bad in (False, True, False, True, False):
        for optimizer, on in ((lockstep.gpu, on_device), (lockstep.cpu, np.copy)):
            grads = [np.full(n, np.nan if bad else 0.5, np.float32) for n in SIZES]
            optimizer.accumulate([on(g) for g in grads])
            infos.append(optimizer.step(skip_nonfinite=True))
    assert [info.applied for info in infos[::2]] == [info.applied for info in infos[1::2]]
    lockstep.check()


def test_accumulated_gradients_are_neither_lost_nor_left_out_on_the_gpu():
    p, g = on_device(np.zeros(4, np.float32)), on_device(np.ones(4, np.float32))
    opt = fastopt.SGD([p], lr=1.0)
    with pytest.raises(RuntimeError, match="needs grads"):
        opt.step()
    opt.accumulate([g])
    for call in (
        lambda: opt.step([g]),
        opt.state_dict,
        lambda: opt.add_param_group({"params": [on_device(np.ones(2))]}),
    ):
        with pytest.raises(RuntimeError, match="while gradients are accumulated"):
            call()
    with pytest.raises(TypeError, match=r"grads\[0\] must be an array on the GPU"):
        opt.accumulate([np.ones(4, np.float32)])
    opt.discard_accumulated()
    opt.accumulate([g])
    assert opt.n_accumulated == 1
    opt.step()
    same(p, np.full(4, -1.0, np.float32), "p")


# --- What attacks found


@pytest.mark.parametrize("keeps", [{}, {"master": "split"}], ids=str)
def test_subnormal_parameters_are_copied_as_they_are(keeps):
    p = np.array([1e-40, -3e-39, 1.0, 1e-45], np.float32)
    params = [(p.view(np.uint32) >> 16).astype(np.uint16)] if keeps else [p]
    lockstep = Lockstep(fastopt.SGD, params, ema_decay=0.5, copy_dtype="bfloat16", **keeps)
    lockstep.check()
    with lockstep.gpu.swap_ema(), lockstep.cpu.swap_ema():
        lockstep.check()
    lockstep.gpu.refresh_params_copy()
    lockstep.cpu.refresh_params_copy()
    lockstep.check()


def test_steps_that_may_never_be_do_not_refuse_one_that_is(monkeypatch):
    undecided(monkeypatch)
    p, g = np.ones(3, np.float32), np.full(3, 0.5, np.float32)
    options = {"lr": 1.0, "lambd": 1.0, "alpha": -100.0}  # the third step's eta is over float32
    lockstep = Lockstep(fastopt.ASGD, [p], **options)
    for value in (np.nan, np.nan, np.nan, 0.5):
        lockstep.gpu.step([on_device(np.full(3, value, np.float32))], skip_nonfinite=True)
        lockstep.cpu.step([np.full(3, value, np.float32)], skip_nonfinite=True)
    lockstep.check()
    lockstep.gpu.step([on_device(g)])
    with pytest.raises(ValueError, match="step"):
        lockstep.gpu.step([on_device(g)])


def test_host_scalars_overflow_as_in_c():
    p = np.ones(3, np.float32)
    lockstep = Lockstep(fastopt.ASGD, [p], lr=1.0, lambd=1000.0, alpha=1e10)  # a power is inf, what is divided by it 0
    for _ in range(3):
        lockstep.step([p])
    lockstep.check()


def test_a_step_count_that_a_user_sets_counts_for_the_next_step(monkeypatch):
    undecided(monkeypatch)
    rng = np.random.default_rng(15)
    lockstep = Lockstep(BY_NAME["adam"].make, arrays(rng))
    counts = [optimizer.state[0]["step"] for optimizer in (lockstep.cpu, lockstep.gpu)]
    for k in range(4):
        if k == 2:
            for count in counts:
                count[...] = 100
        grads = arrays(rng)
        lockstep.gpu.step([on_device(g) for g in grads], skip_nonfinite=True)
        lockstep.cpu.step(grads, skip_nonfinite=True)
        if k == 1:
            assert int(lockstep.gpu.state[0]["step"]) == 2
    lockstep.check()


def test_undecided_steps_keep_the_hyperparameters_that_they_were_taken_with(monkeypatch):
    undecided(monkeypatch)
    rng = np.random.default_rng(16)
    lockstep = Lockstep(BY_NAME["nadam"].make, arrays(rng))
    for k in range(4):
        for optimizer in (lockstep.cpu, lockstep.gpu):
            optimizer.param_groups[0]["momentum_decay"] = 0.1 * (k + 1)
        grads = arrays(rng)
        lockstep.gpu.step([on_device(g) for g in grads], skip_nonfinite=True)
        lockstep.cpu.step(grads, skip_nonfinite=True)
    lockstep.check()


@pytest.mark.parametrize(
    "wrap", [iter, lambda items: (x for x in items), lambda items: dict(enumerate(items)).values()]
)
def test_auto_looks_into_whatever_holds_the_arrays(wrap):
    for params in (wrap([on_device(np.ones(3, np.float32))]), [{"params": wrap([on_device(np.ones(3, np.float32))])}]):
        opt = fastopt.SGD(params, lr=1.0)
        assert opt.backend == "cuda"
        opt.step([on_device(np.ones(3, np.float32))])
        same(opt.param_groups[0]["params"][0], np.zeros(3, np.float32), "p")


def test_update_takes_the_backend_of_the_first_arrays():
    opt, p = fastopt.SGD(lr=1.0), on_device(np.ones(3, np.float32))
    opt.update({"p": p}, {"p": on_device(np.ones(3, np.float32))})
    assert opt.backend == "cuda"
    same(p, np.zeros(3, np.float32), "p")


def test_what_does_not_fit_is_refused_by_name():
    p, g = on_device(np.ones(4, np.float32)), np.ones(4, np.float32)
    opt = fastopt.SGD([p])
    with pytest.raises(TypeError, match=r"grads\[0\].* an array on the GPU, .* got a NumPy array"):
        opt.step([g])
    with pytest.raises(ValueError, match="shape"):
        opt.step([on_device(np.ones(5, np.float32))])
    with pytest.raises(TypeError, match="stream must be"):
        opt.step([on_device(g)], stream="fast")
    with pytest.raises(ValueError, match="memory"):
        opt.step([p])
    with pytest.raises(TypeError, match="must be a NumPy array|NumPy"):
        fastopt.SGD([p], backend="cpu")
    with pytest.raises(RuntimeError, match="no step was captured"):
        opt.prepare_replay()
    same(p, np.ones(4, np.float32), "p")
    info = opt.step([on_device(g)], max_norm=1.0)
    applied, norm = info
    assert (applied, norm) == (True, 2.0)
