"""States in bfloat16 and 8 bits, parameters in two halves: the bits, the codecs, and what training makes of them."""

import argparse
import itertools
import pickle
import typing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import fastopt
from fastopt import _formats, backends, demo
from fastopt._core.options import Options
from fastopt._formats import CODE_BLOCK, FLAGGED, STATE_DTYPES, Bfloat16, EightBit, Random
from fastopt.backends import compiled
from fastopt.rules import registry
from tests.support.configs import CONFIGS, DEFAULTS, LOW_PRECISION
from tests.support.oracle import Oracle, assert_same_bits

TILE = backends.engine().TILE
SIGNED, UNSIGNED = EightBit(True), EightBit(False)
CODECS = {"bfloat16": Bfloat16(), "signed": SIGNED, "unsigned": UNSIGNED}
EACH_CODEC = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)


# --- The step, decoded and encoded around the rule: to the bit


class Kept:
    """The states of one flat array as they must be kept: NumPy codecs around the oracle of the rule."""

    def __init__(self, config, p, state_dtype, seed, offset=0):
        self.oracle, self.seed, self.offset = Oracle(config, p), seed, offset
        self.codecs = {s: _formats.codec(state_dtype, config.spec.kinds[s]) for s in self.oracle.kernel.states}
        self.kept = {s: codec.encode(self.oracle.arrays[s]) for s, codec in self.codecs.items()}

    def step(self, g):
        for state, codec in self.codecs.items():
            self.oracle.arrays[state] = codec.decode(*self.kept[state])
        self.oracle.step(g)
        for position, (state, codec) in enumerate(self.codecs.items()):
            random = Random(self.seed, self.oracle.steps, self.offset, position)
            self.kept[state] = codec.encode(self.oracle.arrays[state], random, self.kept[state][1])

    def check(self, p, state, what):
        assert_same_bits(p, self.oracle.arrays["p"], what)
        for name, (codes, scales) in self.kept.items():
            np.testing.assert_array_equal(state[name].view(codes.dtype), codes, f"{what}, {name}")
            if scales.size:
                np.testing.assert_array_equal(state[f"{name}_scale"], scales, f"{what}, scales of {name}")


def gradients(n, n_steps=20):
    """Over many magnitudes, and changing between steps, so that scales rise and fall."""
    rng = np.random.default_rng(n)
    for k in range(n_steps):
        size = 10.0 ** (3 * np.sin(k / 3) + rng.integers(-4, 4, n))
        yield np.where(rng.random(n) < 0.1, 0, rng.standard_normal(n) * size).astype(np.float32)


@pytest.mark.covering(2)
@pytest.mark.usefixtures("parallel_from_the_first_element")
@pytest.mark.parametrize("n", [1, CODE_BLOCK - 1, CODE_BLOCK, CODE_BLOCK + 1, 3 * TILE + 100])
@pytest.mark.parametrize("isa", compiled.available_isas())
@pytest.mark.parametrize("state_dtype", LOW_PRECISION)
@pytest.mark.parametrize("config", [c for c in CONFIGS if not c.spec.trust], ids=str)
@pytest.mark.bits
def test_a_step_has_the_bits_of_decoding_the_rule_and_encoding(config, state_dtype, isa, n, use_isa):
    use_isa(isa)
    p = np.random.default_rng(1).standard_normal(n).astype(np.float32)
    kept = Kept(config, p, state_dtype, seed=3)
    optimizer = config.make(p, state_dtype=state_dtype, seed=3, n_threads=3)
    for k, g in enumerate(gradients(n)):
        optimizer.step(g)
        kept.step(g)
        kept.check(p, optimizer.state[0], f"{config}, step {k + 1}")


def stepped(config, cuts, state_dtype, isa, n_threads, monkeypatch, neighbours=False, **options):
    """Everything that is kept after some steps of arrays cut at `cuts`, flat, as bytes."""
    monkeypatch.setenv("FASTOPT_ISA", isa)
    n = cuts[-1]
    flat = np.random.default_rng(0).standard_normal(n).astype(np.float32)
    params = [flat[i:j] if neighbours else flat[i:j].copy() for i, j in itertools.pairwise([0, *cuts])]
    optimizer = config.make(params, state_dtype=state_dtype, n_threads=n_threads, **options)
    for g in gradients(n, 18):
        optimizer.step([g[i:j] for i, j in itertools.pairwise([0, *cuts])])
    states = [s[name].tobytes() for name in optimizer.state_float32[0] for s in optimizer.state]
    return b"".join(p.tobytes() for p in params), b"".join(states)


@pytest.mark.covering(2)
@pytest.mark.usefixtures("parallel_from_the_first_element")
@pytest.mark.parametrize("isa", compiled.available_isas())
@pytest.mark.parametrize("n_threads", [1, 2, 3, 7])
@pytest.mark.parametrize("state_dtype", LOW_PRECISION)
@pytest.mark.parametrize("config", DEFAULTS, ids=str)
@pytest.mark.bits
def test_threads_and_instruction_sets_change_no_bit(config, state_dtype, n_threads, isa, monkeypatch):
    cuts = [21 * TILE + 17, 21 * TILE + 17 + 5 * CODE_BLOCK]
    expected = stepped(config, cuts, state_dtype, "baseline", 1, monkeypatch)
    assert stepped(config, cuts, state_dtype, isa, n_threads, monkeypatch) == expected


@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("state_dtype", LOW_PRECISION)
@pytest.mark.parametrize("config", [c for c in DEFAULTS if not c.spec.trust], ids=str)
@pytest.mark.bits
def test_splits_change_no_bit(config, state_dtype, neighbours, monkeypatch):
    """In 8 bits at whole blocks, the last array may end anywhere; in bfloat16 at any element."""
    n = 5 * TILE + 33
    cuts = [CODE_BLOCK, 7 * CODE_BLOCK, TILE + 3 * CODE_BLOCK, 4 * TILE, n]
    if state_dtype == "bfloat16":
        cuts = [1, 2, 65, 1000, TILE + 7, n]
    whole = stepped(config, [n], state_dtype, compiled.isa(), 2, monkeypatch)
    assert stepped(config, cuts, state_dtype, compiled.isa(), 2, monkeypatch, neighbours) == whole


@pytest.mark.parametrize("state_dtype", LOW_PRECISION)
def test_the_seed_decides_the_rounding(state_dtype, monkeypatch):
    config = next(c for c in DEFAULTS if c.spec.name == "Adam")
    runs = [stepped(config, [TILE], state_dtype, compiled.isa(), 1, monkeypatch, seed=s) for s in (0, 0, 1, 2**64 - 1)]
    assert runs[0] == runs[1]
    assert len(set(runs)) == 3


@pytest.mark.parametrize("state_dtype", LOW_PRECISION)
@pytest.mark.parametrize("config", DEFAULTS, ids=str)
def test_the_reference_backend_keeps_states_in_the_same_form(config, state_dtype):
    """Its rule rounds in another order, so codes may differ by one here and there."""
    p = np.random.default_rng(1).standard_normal(500).astype(np.float32)
    ours, reference = p.copy(), p.copy()
    optimizers = [
        config.make(p, state_dtype=state_dtype, backend=b) for p, b in ((ours, "cpu"), (reference, "reference"))
    ]
    for g in gradients(500, 5):
        for optimizer in optimizers:
            optimizer.step(g)
    np.testing.assert_allclose(ours, reference, rtol=1e-3, atol=1e-3)
    for name, array in optimizers[0].state[0].items():
        assert array.dtype == optimizers[1].state[0][name].dtype
        np.testing.assert_allclose(
            array.view(np.uint16 if array.dtype.name == "bfloat16" else array.dtype).astype(float),
            optimizers[1].state[0][name].view(np.uint16 if array.dtype.name == "bfloat16" else array.dtype),
            rtol=0,
            atol=1 if name != "step" else 0,
        )


@pytest.mark.parametrize("state_dtype", LOW_PRECISION)
@pytest.mark.parametrize("name", ["LAMB", "LARS"])
def test_a_trust_ratio_takes_states_in_low_precision(name, state_dtype):
    """Norms are of float32 numbers; only states are rounded: the first step is float32's."""
    p = np.random.default_rng(0).standard_normal(3 * TILE + 7).astype(np.float32)
    low, full = p.copy(), p.copy()
    cls = getattr(fastopt, name)
    for array, dtype in ((low, state_dtype), (full, "float32")):
        cls(array, lr=0.1, state_dtype=dtype).step(next(gradients(p.size)))
    assert_same_bits(low, full, name)
    assert not np.array_equal(low, p)


@pytest.mark.parametrize("state_dtype", LOW_PRECISION)
@pytest.mark.parametrize("config", DEFAULTS, ids=str)
def test_the_fused_step_takes_states_in_low_precision(config, state_dtype):
    """Clipped, averaged, copied and zeroed in one call: the bits of doing it one after another."""
    p = np.random.default_rng(0).standard_normal(2 * TILE + 70).astype(np.float32)
    fused, plain = p.copy(), p.copy()
    a = config.make(fused, state_dtype=state_dtype, ema_decay=0.9, copy_dtype="bfloat16")
    b = config.make(plain, state_dtype=state_dtype)
    for g in gradients(p.size, 5):
        clipped = np.clip(np.float32(0.5) * g, np.float32(-0.1), np.float32(0.1))
        a.step(g, grad_scale=0.5, clip_value=0.1, zero_grads=True)
        b.step(clipped)
        assert not g.any()
    assert_same_bits(fused, plain, str(config))


# --- The codecs alone


def a_step_that_keeps(codec, codes, scales, random):
    """What a compiled step makes of the state `codes`: it decodes, multiplies by 1, adds 0, and encodes."""
    cls, hypers, name = fastopt.Momentum, {"lr": 0.0, "momentum": 1.0}, "velocity"
    if codec is UNSIGNED:
        cls, hypers, name = fastopt.RMSprop, {"lr": 0.0, "alpha": 1.0}, "square_avg"
    state_dtype = "bfloat16" if isinstance(codec, Bfloat16) else "8bit"
    optimizer = cls(np.zeros(codes.size, np.float32), state_dtype=state_dtype, seed=random.seed, **hypers)
    saved = optimizer.state_dict()
    saved["state"][0] |= {"step": random.step - 1, name: codes}
    if codec.has_scales:
        saved["state"][0][f"{name}_scale"] = scales
    optimizer.load_state_dict(saved)
    optimizer.step(np.zeros(codes.size, np.float32))
    state = optimizer.state[0]
    return state[name].view(codec.dtype), state.get(f"{name}_scale", np.zeros(0, np.uint16))


def every_code(codec):
    """Every code under every scale, flagged or not."""
    if not codec.has_scales:
        return np.arange(2**16, dtype=np.uint16), np.zeros(0, np.uint16)
    scales = np.arange(codec.smallest_scale, 255, dtype=np.uint16)
    scales = np.repeat(np.concatenate([scales, scales | FLAGGED]), 256 // CODE_BLOCK)
    return np.tile(np.arange(256, dtype=np.uint8), scales.size * CODE_BLOCK // 256), scales


@EACH_CODEC
def test_every_code_survives_decoding_and_encoding(codec):
    codes, scales = every_code(codec)
    values = codec.decode(codes, scales)
    again, _ = codec.encode(values, None, scales)
    decoded_again = codec.decode(again, codec.encode(values, None, scales)[1])
    finite = np.isfinite(values)
    close = np.abs(decoded_again[finite].astype(np.float64) - values[finite]) <= np.abs(values[finite]) * 2.0**-3
    tiny = np.abs(values[finite]) < 1e-30
    kept_scale = np.repeat(scales & FLAGGED == 0, CODE_BLOCK) if codec.has_scales else np.ones(codes.size, bool)
    same = again == codes
    if codec is SIGNED:
        same |= codes == 0x80  # -0 may be kept, or not
    if isinstance(codec, Bfloat16):
        same |= np.isnan(values) | (values == 0)  # one NaN; subnormals are zero
    assert same[kept_scale].all()
    assert (close | tiny).all()
    np.testing.assert_array_equal(np.isnan(decoded_again), np.isnan(values))
    np.testing.assert_array_equal(np.isinf(decoded_again), np.isinf(values))


@pytest.mark.parametrize("step", [1, 7, 16])
@pytest.mark.parametrize("isa", compiled.available_isas())
@EACH_CODEC
def test_the_compiled_codec_is_the_reference_over_its_whole_code_space(codec, isa, step, use_isa):
    use_isa(isa)
    codes, scales = every_code(codec)
    random = Random(5, step, 0, 0)
    expected = codec.encode(codec.decode(codes, scales), random, scales)
    made = a_step_that_keeps(codec, codes, scales, random)
    np.testing.assert_array_equal(made[0], expected[0])
    np.testing.assert_array_equal(made[1], expected[1])


SPECIAL = [0.0, -0.0, 1.0, -1.5, np.inf, -np.inf, np.nan, 1e-45, -1e-40, 1.1754944e-38, 3.4028235e38, -3.4028235e38]
ANY = arrays(
    np.float32,
    st.integers(1, 200),
    elements=st.one_of(st.floats(width=32), st.sampled_from([np.float32(x) for x in SPECIAL])),
)


@given(values=ANY)
def test_any_block_is_encoded_as_the_reference_does(values):
    """The state becomes the gradient: exp_avg = 0 * 0 + 1 * g."""
    optimizer = fastopt.Lion(np.zeros(values.size, np.float32), lr=0.0, betas=(0.0, 0.0), state_dtype="8bit")
    fresh = SIGNED.encode(np.zeros(values.size, np.float32))[1]
    with np.errstate(all="ignore"):
        optimizer.step(values)
        flushed = np.where(np.abs(values) < np.finfo(np.float32).tiny, np.float32(0), values)
        codes, scales = SIGNED.encode(np.float32(0) + flushed, Random(0, 1, 0, 0), fresh)
    state = optimizer.state[0]
    signs = 0x7F if np.isnan(values).any() else 0xFF  # a NaN's sign is not promised
    np.testing.assert_array_equal(state["exp_avg"] & signs, codes & signs)
    np.testing.assert_array_equal(state["exp_avg_scale"], scales)


@given(values=ANY)
@EACH_CODEC
def test_inf_and_nan_survive_and_errors_are_below_a_unit(codec, values):
    values = np.abs(values) if codec is UNSIGNED else values
    codes, scales = codec.encode(values, Random(1, 1, 0, 0))
    decoded = codec.decode(codes, scales)
    np.testing.assert_array_equal(np.isnan(decoded), np.isnan(values))
    infinite = np.isinf(values)
    np.testing.assert_array_equal(decoded[infinite], values[infinite])
    if not codec.has_scales:
        large = np.abs(values) > 3.38e38
        assert np.isfinite(decoded[np.isfinite(values) & ~large]).all()
        return
    finite = np.isfinite(values)
    assert np.isfinite(decoded[finite]).all()
    limit = np.repeat(scales & 0xFF == 254, CODE_BLOCK)[: values.size]  # the largest may be cut off there
    unit = np.repeat(np.ldexp(1.0, (scales & 0xFF).astype(int) - 127 - codec.binades), CODE_BLOCK)[: values.size]
    x = np.where(finite, values, 0).astype(np.float64)
    error = np.abs(np.where(finite, decoded, 0) - x)
    assert (error <= (np.abs(x) + unit) / 8 * 1.001)[~limit].all()


def test_zeros_stay_zeros_and_neighbours_of_an_outlier_keep_their_precision():
    values = np.zeros(2 * CODE_BLOCK, np.float32)
    codes, scales = SIGNED.encode(values, Random(0, 1, 0, 0))
    assert not SIGNED.decode(codes, scales).any()
    assert not UNSIGNED.decode(*UNSIGNED.encode(values, Random(0, 1, 0, 0))).any()
    values[:CODE_BLOCK] = 1e-3
    values[5] = 1.0
    decoded = SIGNED.decode(*SIGNED.encode(values))
    np.testing.assert_allclose(decoded[:CODE_BLOCK], values[:CODE_BLOCK], rtol=0.125)
    assert not decoded[CODE_BLOCK:].any()


def test_a_second_moment_beside_larger_ones_never_becomes_zero():
    values = np.array([1.0, 1e-20, 0.0], np.float32)
    decoded = UNSIGNED.decode(*UNSIGNED.encode(values, Random(0, 1, 0, 0)))
    assert 0 < decoded[1] < 1e-9


@EACH_CODEC
def test_rounding_is_right_on_average(codec):
    """Over 4,000 steps the mean of an encoded number is the number, within 5 standard deviations of the mean."""
    values = (10.0 ** np.linspace(-3, 0, CODE_BLOCK)).astype(np.float32)
    fresh = codec.encode(values)[1]
    draws = np.array([codec.decode(*codec.encode(values, Random(9, t, 0, 0), fresh)) for t in range(4000)])
    deviation = draws.std(axis=0) / np.sqrt(len(draws))
    assert (np.abs(draws.mean(axis=0, dtype=np.float64) - values) <= 5 * deviation + 1e-7 * values).all()


# --- Averages


@pytest.mark.parametrize("state_dtype", LOW_PRECISION)
def test_the_second_moment_is_right_after_20000_noisy_steps(state_dtype):
    """Each element's own size, over five orders of magnitude: the mean of v / E(g^2) is 1 within 2%."""
    n = 4096
    rng = np.random.default_rng(0)
    size = (10.0 ** np.repeat(rng.uniform(-4, 1, n // CODE_BLOCK), CODE_BLOCK)).astype(np.float32)
    noise = rng.standard_normal(1_000_000, np.float32)
    ratios = {}
    for dtype in ("float32", state_dtype):
        optimizer = fastopt.Adam(np.zeros(n, np.float32), lr=0.0, state_dtype=dtype)
        starts = np.random.default_rng(1).integers(0, noise.size - n, 20_000)
        for start in starts:
            optimizer.step(size * noise[start : start + n])
        ratios[dtype] = np.mean(optimizer.state_float32[0]["exp_avg_sq"] / np.square(size, dtype=np.float64))
    assert ratios[state_dtype] == pytest.approx(ratios["float32"], rel=0.02)
    assert ratios["float32"] == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("state_dtype", LOW_PRECISION)
def test_the_second_moment_decays_when_gradients_stop(state_dtype):
    n = 4096
    optimizers = [fastopt.Adam(np.zeros(n, np.float32), lr=0.0, state_dtype=d) for d in ("float32", state_dtype)]
    g = np.random.default_rng(0).standard_normal(n).astype(np.float32)
    for k in range(5000):
        for optimizer in optimizers:
            optimizer.step(g if k < 100 else 0 * g)
        if k in (500, 1000, 2000, 4999):
            full, low = (o.state_float32[0]["exp_avg_sq"].mean(dtype=np.float64) for o in optimizers)
            assert low == pytest.approx(full, rel=0.05 if k < 2000 else 0.25)
    for _ in range(90_000):
        optimizers[1].step(0 * g)
    assert not optimizers[1].state_float32[0]["exp_avg_sq"].any()
    assert not optimizers[1].state_float32[0]["exp_avg"].any()


# --- Training


@pytest.mark.exhaustive
@pytest.mark.parametrize("state_dtype", LOW_PRECISION)
@pytest.mark.parametrize("name", ["adam", "adamw", "lion", "rmsprop", "momentum"])
def test_the_demos_network_learns_as_well(name, state_dtype):
    pytest.importorskip("sklearn", reason="the demo's data needs scikit-learn")
    data = demo.load_digits()
    accuracy = {
        dtype: np.mean([demo.train(registry[name], "cpu", *data, 8, seed, dtype).accuracy for seed in range(3)])
        for dtype in ("float32", state_dtype)
    }
    assert accuracy[state_dtype] == pytest.approx(accuracy["float32"], abs=0.01)
    assert accuracy["float32"] > 0.93


def test_sgd_with_momentum_learns_as_well():
    """The demo trains SGD without; this is the same with the default of most who use it."""
    pytest.importorskip("sklearn", reason="the demo's data needs scikit-learn")
    training, validation = demo.load_digits()
    accuracy = {}
    for dtype in ("float32", *LOW_PRECISION):
        params = demo.initial_parameters(0)
        grads = params.zeros_like()
        opt = fastopt.SGD(params, lr=0.05, momentum=0.9, state_dtype=dtype)
        rng = np.random.default_rng(0)
        for _ in range(8):
            for batch in np.array_split(rng.permutation(len(training.labels)), len(training.labels) // 32):
                outputs = demo.forward(params, training.images[batch])
                demo.backward(params, outputs, training.labels[batch], grads)
                opt.step(grads)
        accuracy[dtype] = demo.evaluate(params, validation)[1]
    assert accuracy["bfloat16"] == pytest.approx(accuracy["float32"], abs=0.01)
    assert accuracy["8bit"] == pytest.approx(accuracy["float32"], abs=0.01)


def character_loss(make, n_steps=800):
    """Loss in nats on text not trained on, of a small character-level model with embeddings.

    Eight characters are looked up in a table (rows not looked up have zero gradients, as in large models), go
    through a hidden layer, and predict the ninth.
    """
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    alphabet, codes = np.unique(list(text), return_inverse=True)
    windows = np.lib.stride_tricks.sliding_window_view(codes, 9)
    windows = windows[np.random.default_rng(0).permutation(len(windows))]
    held_out, training = windows[:4000], windows[4000:]
    rng = np.random.default_rng(1)
    size, width, hidden = len(alphabet), 16, 128
    params = {
        "table": rng.standard_normal((size, width)).astype(np.float32),
        "w1": (rng.standard_normal((8 * width, hidden)) / np.sqrt(8 * width)).astype(np.float32),
        "b1": np.zeros(hidden, np.float32),
        "w2": (rng.standard_normal((hidden, size)) / np.sqrt(hidden)).astype(np.float32),
        "b2": np.zeros(size, np.float32),
    }
    opt = make(params)

    def forward(batch):
        looked_up = params["table"][batch[:, :8]].reshape(len(batch), -1)
        active = np.tanh(looked_up @ params["w1"] + params["b1"])
        return looked_up, active, active @ params["w2"] + params["b2"]

    for k in range(n_steps):
        batch = training[k * 64 % (len(training) - 64) :][:64]
        looked_up, active, logits = forward(batch)
        delta = demo.softmax(logits)
        delta[np.arange(len(batch)), batch[:, 8]] -= 1
        delta /= np.float32(len(batch))
        back = (delta @ params["w2"].T) * (1 - active * active)
        table = np.zeros_like(params["table"])
        np.add.at(table, batch[:, :8].ravel(), (back @ params["w1"].T).reshape(-1, width))
        grads = {"table": table, "w1": looked_up.T @ back, "b1": back.sum(0)}
        opt.step({**grads, "w2": active.T @ delta, "b2": delta.sum(0)})
    return demo.cross_entropy(forward(held_out)[2].astype(np.float64), held_out[:, 8])


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "lr"), [("Adam", 3e-3), ("AdamW", 3e-3), ("Lion", 5e-4), ("RMSprop", 2e-3), ("Momentum", 0.1)]
)
def test_a_character_model_learns_as_well(name, lr):
    losses = {
        dtype: character_loss(lambda params, dtype=dtype: getattr(fastopt, name)(params, lr=lr, state_dtype=dtype))
        for dtype in ("float32", *LOW_PRECISION)
    }
    assert losses["float32"] < 2.8  # 4.6 before training
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.01)
    assert losses["8bit"] == pytest.approx(losses["float32"], rel=0.01)


# --- Memory, state dicts, misuse


@pytest.mark.parametrize("n", [1000, 65_536])
def test_state_takes_as_many_bytes_as_promised(n):
    per_parameter = [
        fastopt.Adam(np.zeros(n, np.float32), state_dtype=d).state_nbytes / n for d in ("float32", *LOW_PRECISION)
    ]
    assert per_parameter[:2] == [8, 4]
    assert per_parameter[2] <= 2.1


@pytest.mark.parametrize("state_dtype", LOW_PRECISION)
@pytest.mark.parametrize("config", DEFAULTS, ids=str)
def test_a_state_dict_resumes_with_the_same_bits(config, state_dtype):
    n = 1000
    p = np.random.default_rng(0).standard_normal(n).astype(np.float32)
    going_on = config.make(p, state_dtype=state_dtype, seed=11)
    early, late = list(gradients(n, 6)), list(gradients(n, 10))[6:]
    for g in early:
        going_on.step(g)
    q = p.copy()
    resumed = config.make(q, state_dtype=state_dtype)
    resumed.load_state_dict(pickle.loads(pickle.dumps(going_on.state_dict())))
    assert resumed.seed == 11
    for g in late:
        going_on.step(g)
        resumed.step(g)
    assert_same_bits(q, p, str(config))
    for name, array in going_on.state[0].items():
        assert resumed.state[0][name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("config", DEFAULTS, ids=str)
def test_state_is_converted_between_types_on_load(config):
    n = 1000
    optimizers = {
        d: config.make(np.ones(n, np.float32), state_dtype=d, seed=k) for k, d in enumerate(_formats.STATE_DTYPES)
    }
    for g in gradients(n, 5):
        optimizers["float32"].step(g)
    saved = optimizers["float32"].state_dict()
    for dtype in LOW_PRECISION:
        optimizers[dtype].load_state_dict(saved)
        for name, values in optimizers["float32"].state_float32[0].items():
            codec = _formats.codec(dtype, config.spec.kinds[name])
            decoded = optimizers[dtype].state_float32[0][name]
            assert_same_bits(decoded, codec.decode(*codec.encode(values)), name)
            error = np.abs(decoded - values)
            top = np.abs(values).reshape(-1, 8).max()
            assert (error <= np.abs(values) / (256 if dtype == "bfloat16" else 15) + 2.0**-16 * top).all()
        back = config.make(np.ones(n, np.float32))
        back.load_state_dict(optimizers[dtype].state_dict())
        for name, values in optimizers[dtype].state_float32[0].items():
            assert_same_bits(back.state[0][name], values, name)


def test_a_dict_that_is_seen_later_takes_its_converted_state():
    p = {"a": np.ones(100, np.float32)}
    source = fastopt.Adam(p, state_dtype="8bit")
    source.step({"a": np.full(100, 0.5, np.float32)})
    late = fastopt.Adam(state_dtype="bfloat16")
    late.load_state_dict(source.state_dict())
    assert late.state_dict()["state"][0]["exp_avg"].dtype == np.uint16
    late.update({"a": p["a"].copy()}, {"a": np.zeros(100, np.float32)})
    assert int(late.state["a"]["step"]) == 2
    np.testing.assert_allclose(late.state_float32["a"]["exp_avg"], 0.045, rtol=0.08)


@pytest.mark.parametrize("state_dtype", LOW_PRECISION)
def test_an_optimizer_pickles_with_its_state_in_low_precision(state_dtype):
    p = np.ones(200, np.float32)
    optimizer = fastopt.Adam(p, state_dtype=state_dtype, seed=4)
    optimizer.step(np.full(200, 0.1, np.float32))
    again = pickle.loads(pickle.dumps(optimizer))
    assert (again.state_dtype, again.seed) == (state_dtype, 4)
    for name, values in optimizer.state_float32[0].items():
        assert_same_bits(again.state_float32[0][name], values, name)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: s["state"][0].pop("exp_avg_scale"), KeyError, r"missing \['exp_avg_scale'\]"),
        (lambda s: s["state"][0].update(exp_avg=np.zeros(100, np.float32)), TypeError, "must be uint8 of shape"),
        (lambda s: s["state"][0].update(exp_avg_scale=np.zeros(2, np.uint16)), ValueError, r"exponents in \[19, 254\]"),
        (lambda s: s["state"][0].update(exp_avg_scale=np.zeros(3, np.uint16)), TypeError, r"uint16 of shape \(2,\)"),
        (lambda s: s.update(state_dtype="4bit"), ValueError, "state_dtype of the state_dict must be one of"),
        (lambda s: s.update(seed=-1), ValueError, "seed must be an integer"),
        (lambda s: s["offsets"].update({0: -1}), ValueError, "offsets of the state_dict must be integers"),
        (lambda s: s["state"][0].update(max_exp_avg_sq_scale=1), KeyError, r"unknown \['max_exp_avg_sq_scale'\]"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused_unchanged(change, error, message):
    optimizer = fastopt.Adam(np.ones(100, np.float32), state_dtype="8bit")
    optimizer.step(np.ones(100, np.float32))
    before = pickle.dumps(optimizer.state_dict())
    saved = optimizer.state_dict()
    change(saved)
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(saved)
    assert pickle.dumps(optimizer.state_dict()) == before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"state_dtype": "int8"}, ValueError, "state_dtype must be 'float32' or 'bfloat16' or '8bit', got 'int8'"),
        ({"state_dtype": None}, ValueError, "state_dtype must be"),
        ({"seed": -1}, ValueError, "seed must be an integer in"),
        ({"seed": 1.0}, ValueError, "seed must be an integer in"),
        ({"seed": 2**64}, ValueError, "seed must be an integer in"),
        ({"master": "float32"}, ValueError, "master must be None or 'split'"),
        ({"master": "split"}, TypeError, "bfloat16 with master='split', must be uint16, got float32"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        fastopt.Adam(np.ones(3, np.float32), **options)


@pytest.mark.parametrize("state_dtype", LOW_PRECISION)
def test_names_in_another_order_resume_with_the_same_bits(state_dtype):
    """The rounding goes by element, and an element keeps its number."""
    g = next(gradients(100))
    first = {"a": np.ones(100, np.float32), "b": np.ones(100, np.float32)}
    optimizer = fastopt.Adam(first, state_dtype=state_dtype)
    optimizer.step({"a": g, "b": -g})
    second = {"b": first["b"].copy(), "a": first["a"].copy()}
    resumed = fastopt.Adam(second, state_dtype=state_dtype)
    resumed.load_state_dict(optimizer.state_dict())
    late = fastopt.Adam(state_dtype=state_dtype)
    late.load_state_dict(pickle.loads(pickle.dumps(resumed.state_dict())))
    third = {"b": first["b"].copy(), "a": first["a"].copy()}
    for _ in range(3):
        optimizer.step({"a": g, "b": -g})
        resumed.step({"a": g, "b": -g})
        late.update(third, {"a": g, "b": -g})
    for name in first:
        assert_same_bits(second[name], first[name], name)
        assert_same_bits(third[name], first[name], name)


def test_codes_of_every_array_begin_at_a_word():
    """Neighbours in memory have neighbouring states; codes are read as words of four."""
    buffer = fastopt.FlatBuffer({"a": 33, "b": 200, "c": (7, 100), "d": 1, "e": 128, "f": 64})
    optimizer = fastopt.Adam(buffer, state_dtype="8bit")
    for state in optimizer.state.values():
        assert state["exp_avg"].ctypes.data % CODE_BLOCK == 0
    e, f = optimizer.state["e"]["exp_avg"], optimizer.state["f"]["exp_avg"]
    assert f.ctypes.data == e.ctypes.data + e.nbytes


def test_a_parameter_must_not_lie_in_scales():
    optimizer = fastopt.Adam({"a": np.ones(256, np.float32)}, state_dtype="8bit")
    scales = optimizer.state["a"]["exp_avg_sq_scale"].view(np.float32)
    with pytest.raises(ValueError, match="scales of state 'exp_avg_sq'"):
        optimizer.add_param_group({"params": {"x": scales}})


# --- Parameters in two halves


def halves(values):
    high, low = np.empty(values.shape, np.uint16), np.empty(values.shape, np.uint16)
    _formats.split(values, high, low)
    return high, low


def nearest_bfloat16(values):
    """Rounded by float64 arithmetic, halfway cases away from zero."""
    with np.errstate(all="ignore"):
        _, exponent = np.frexp(values.astype(np.float64))
        unit = np.ldexp(1.0, np.maximum(exponent, -125) - 8)
        rounded = np.copysign(np.floor(np.abs(values) / unit + 0.5) * unit, values).astype(np.float32)
    return np.where(np.isfinite(values), rounded, values)


def test_the_halves_are_the_number():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 4_000_000, dtype=np.uint64).astype(np.uint32)
    edges = (
        np.arange(2**16, dtype=np.uint32)[:, None] << 16 | np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    ).ravel()
    values = np.concatenate([bits, edges.astype(np.uint32)]).view(np.float32)
    high, low = halves(values)
    assert_same_bits(_formats.join(high, low), values, "joined")
    seen = (high.astype(np.uint32) << 16).view(np.float32)
    assert_same_bits(seen, nearest_bfloat16(values), "the upper half")


@pytest.mark.parametrize("isa", compiled.available_isas())
@pytest.mark.parametrize("n", [1, 64, 3 * TILE + 7])
@pytest.mark.parametrize("config", DEFAULTS, ids=str)
@pytest.mark.bits
def test_split_training_is_float32_training_seen_through_its_upper_half(config, n, isa, use_isa):
    use_isa(isa)
    p = np.random.default_rng(0).standard_normal(n).astype(np.float32)
    high = np.zeros(n, np.uint16)
    optimizer = config.make([high], master="split", ema_decay=0.9, copy_dtype="float16", n_threads=2)
    optimizer.load_master_params([p])
    full = config.make([p], ema_decay=0.9, copy_dtype="float16")
    optimizer.ema[0][...] = full.ema[0]
    for g in gradients(n, 6):
        optimizer.step([g])
        full.step([g])
        assert_same_bits(optimizer.master_params[0], p, str(config))
        assert_same_bits((high.astype(np.uint32) << 16).view(np.float32), nearest_bfloat16(p), "what the model reads")
    assert_same_bits(optimizer.ema[0], full.ema[0], "the average")
    np.testing.assert_array_equal(optimizer.params_copy[0].view(np.uint16), full.params_copy[0].view(np.uint16))


def test_split_parameters_may_be_of_ml_dtypes():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    high = np.ones(100, ml_dtypes.bfloat16)
    optimizer = fastopt.SGD([high], lr=1 / 1024, master="split")
    for _ in range(8):  # each below half a unit of bfloat16
        optimizer.step([np.ones(100, np.float32)])
    np.testing.assert_array_equal(optimizer.master_params[0], np.float32(1 - 8 / 1024))
    np.testing.assert_array_equal(high.astype(np.float32), np.float32(1 - 8 / 1024))


def test_split_nan_is_seen():
    high = np.zeros(4, np.uint16)
    optimizer = fastopt.SGD([high], lr=1.0, master="split")
    optimizer.step([np.array([np.inf, -np.inf, np.nan, 1], np.float32)])
    np.testing.assert_array_equal(
        (high.astype(np.uint32) << 16).view(np.float32), np.array([-np.inf, np.inf, np.nan, -1], np.float32)
    )


@pytest.mark.parametrize("state_dtype", _formats.STATE_DTYPES)
def test_split_parameters_resume_with_the_same_bits(state_dtype):
    high = np.full(500, 0x3F80, np.uint16)
    optimizer = fastopt.AdamW({"w": high}, master="split", state_dtype=state_dtype)
    for g in gradients(500, 5):
        optimizer.step({"w": g})
    copy = high.copy()
    resumed = fastopt.AdamW({"w": copy}, master="split", state_dtype=state_dtype)
    resumed.load_state_dict(optimizer.state_dict())
    pickled = pickle.loads(pickle.dumps(optimizer))
    for g in gradients(500, 3):
        for one in (optimizer, resumed, pickled):
            one.step({"w": g})
    for one in (resumed, pickled):
        assert_same_bits(one.master_params["w"], optimizer.master_params["w"], "resumed")
    np.testing.assert_array_equal(copy, high)


def test_split_parameters_swap_with_their_average():
    high = np.full(10, 0x3F80, np.uint16)
    optimizer = fastopt.SGD([high], lr=0.001, master="split", ema_decay=0.5)
    optimizer.step([np.ones(10, np.float32)])
    before = optimizer.master_params[0], optimizer.ema[0].copy()
    with optimizer.swap_ema():
        assert_same_bits(optimizer.master_params[0], before[1], "swapped")
    assert_same_bits(optimizer.master_params[0], before[0], "swapped back")
    assert_same_bits(optimizer.ema[0], before[1], "swapped back")


def test_split_parameters_may_be_of_both_types_and_of_no_dimension():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    params = [np.zeros(3, np.uint16), np.zeros(3, ml_dtypes.bfloat16), np.array(0x3F80, np.uint16)]
    for backend in ("cpu", "reference"):
        optimizer = fastopt.SGD(params, lr=0.5, master="split", copy_dtype="float16", backend=backend)
        before = optimizer.master_params
        grads = [np.ones(p.shape, np.float32) for p in params]
        optimizer.step(grads)
        for master, was in zip(optimizer.master_params, before, strict=True):
            assert isinstance(master, np.ndarray)
            np.testing.assert_array_equal(master, was - np.float32(0.5))


def test_a_split_optimizer_resumes_before_it_has_seen_its_parameters():
    high = np.full(100, 0x3F80, np.uint16)
    optimizer = fastopt.SGD({"w": high}, lr=0.001, master="split", ema_decay=0.5)
    g = np.ones(100, np.float32)
    optimizer.step({"w": g})
    late, copy = fastopt.SGD(master="split", ema_decay=0.5), high.copy()
    late.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    late = pickle.loads(pickle.dumps(late))
    late.update({"w": copy}, {"w": g})
    optimizer.step({"w": g})
    assert_same_bits(late.master_params["w"], optimizer.master_params["w"], "resumed")
    assert_same_bits(late.ema["w"], optimizer.ema["w"], "the average")


def test_a_lower_half_must_be_there():
    optimizer = fastopt.SGD([np.full(10, 0x3F80, np.uint16)], master="split")
    saved = optimizer.state_dict()
    saved["master_low"][0] = None
    with pytest.raises(KeyError, match="no lower half for parameter 0"):
        optimizer.load_state_dict(saved)


def test_parameters_cannot_be_set_from_their_own_memory():
    memory = np.linspace(1, 2, 10).astype(np.float32)
    optimizer = fastopt.SGD(memory.view(np.uint16)[:10], master="split")
    with pytest.raises(ValueError, match="overlap the parameters in memory"):
        optimizer.load_master_params(memory)


def test_split_parameters_are_guarded():
    high = np.full(10, 0x3F80, np.uint16)
    optimizer = fastopt.SGD({"w": high}, master="split")
    with pytest.raises(ValueError, match="needs master= at construction"):
        _ = fastopt.SGD([np.ones(3, np.float32)]).master_params
    with pytest.raises(TypeError, match="must be float32 of shape"):
        optimizer.load_master_params({"w": np.zeros(10)})
    with pytest.raises(ValueError, match="names of the parameters"):
        optimizer.load_master_params({"v": np.zeros(10, np.float32)})
    with pytest.raises(ValueError, match="keeps its array"):
        optimizer.update({"w": high.copy()}, {"w": np.zeros(10, np.float32)})
    with pytest.raises(ValueError, match="lacks lower halves"):
        optimizer.load_state_dict(fastopt.SGD({"w": np.ones(10, np.float32)}).state_dict())
    with pytest.raises(ValueError, match="has lower halves"):
        fastopt.SGD({"w": np.ones(10, np.float32)}).load_state_dict(optimizer.state_dict())


def test_types_and_docstrings_name_every_state_dtype():
    assert typing.get_args(typing.get_type_hints(Options)["state_dtype"]) == STATE_DTYPES
    assert typing.get_args(typing.get_type_hints(demo.train)["state_dtype"]) == STATE_DTYPES
    named = ", ".join(f'"{name}"' for name in STATE_DTYPES)
    assert f"state_dtype : {{{named}}}" in fastopt.Optimizer.__doc__
