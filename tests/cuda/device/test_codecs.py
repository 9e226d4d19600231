"""The device's codecs as Python functions, as Numba's simulator has them: exhaustive where there are few codes."""

import numpy as np
import pytest

from tests.support import lockstep  # noqa: F401  skips where there is no numba-cuda

# isort: split
from fastopt import _formats
from fastopt._formats import dither
from fastopt.backends.cuda import codecs
from tests.support.unfused import as_bfloat16

pytestmark = pytest.mark.simulator

SPECIAL = np.array(
    [0.0, 6e-8, 3e-8, 2.98e-8, 6.1e-5, 6.0e-5, 65504, 65519, 65520, 1e5, np.inf, np.nan, 1e-38], np.float32
)


def floats():
    rng = np.random.default_rng(0)
    values = np.concatenate([SPECIAL, rng.standard_normal(500).astype(np.float32), 2.0 ** rng.uniform(-30, 17, 2000)])
    return np.concatenate([values, -values]).astype(np.float32)


def test_every_float16_decodes():
    halves = np.arange(65536, dtype=np.uint16)
    decoded = np.array([codecs.float16_to_f32(int(half)) for half in halves], np.float32)
    expected = halves.view(np.float16).astype(np.float32)
    assert np.array_equal(decoded, expected, equal_nan=True)
    assert np.array_equal(np.signbit(decoded[~np.isnan(expected)]), np.signbit(expected[~np.isnan(expected)]))


def test_float16_rounds_to_nearest_even():
    values = floats()
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    encoded = np.array([codecs.f32_to_float16(x) for x in values], np.uint16).view(np.float16)
    assert np.array_equal(encoded, expected, equal_nan=True)


def test_bfloat16_rounds_to_nearest_even():
    values = floats()
    encoded = np.array([codecs.f32_to_bfloat16(x) for x in values], np.uint16)
    is_nan = np.isnan(values)
    assert np.array_equal(encoded[~is_nan], as_bfloat16(values)[~is_nan])
    assert ((encoded[is_nan] & 0x7FFF) > 0x7F80).all()


def test_every_bfloat16_decodes_and_subnormals_count_as_zero():
    halves = np.arange(65536, dtype=np.uint32)
    decoded = np.array([codecs.bfloat16_to_f32(int(half)) for half in halves], np.float32)
    assert np.array_equal(decoded, _formats.Bfloat16().decode(halves.astype(np.uint16)), equal_nan=True)


def test_halves_make_the_whole():
    for x in floats():
        high, low = codecs.high_of_f32(x), codecs.low_of_f32(x)
        assert codecs.f32_of_halves(high, low) == x or np.isnan(x)


def test_every_code_decodes_under_every_scale():
    for is_signed in (False, True):
        codec = _formats.EightBit(is_signed)
        for scale in (codec.smallest_scale, codec.smallest_scale + 1, 127, 200, 254):
            for flagged in (0, _formats.FLAGGED):
                short = [np.arange(k, k + 32, dtype=np.uint8) for k in range(0, 256, 32)]  # in natural order
                scales = np.array([scale | flagged], np.uint16)
                expected = np.concatenate([codec.decode(codes, scales) for codes in short])
                decoded = [codecs.flush(codecs.decode_code(code, scale | flagged, is_signed)) for code in range(256)]
                assert np.array_equal(np.array(decoded, np.float32), expected, equal_nan=True)


def test_random_bits_are_those_of_the_host():
    first = np.array([0, 64, 6400, 2**40])
    for position in range(3):
        random = _formats.Random(2**63 + 5, 12345, 0, position)
        key = int(_formats.dither_key(random.seed, random.step))
        drawn = [codecs.dither_of_state(codecs.dither_bits(key, int(k)), position) for k in first]
        assert drawn == dither.dither(random, first).tolist()
    assert [codecs.stratum(lane) for lane in range(64)] == dither.STRATA.tolist()
