"""The fused step, done one step after another in NumPy float32: what `Optimizer.step` must equal to the bit."""

import math

import numpy as np

from tests.support.oracle import Oracle, sum_squares


def decoded(g):
    """A gradient in float32; uint16 holds the bits of bfloat16."""
    if g.dtype == np.uint16:
        return (g.astype(np.uint32) << 16).view(np.float32)
    return g.astype(np.float32)


def as_bfloat16(x):
    """The bits of bfloat16, rounded to nearest even, by way of float64 arithmetic instead of integers."""
    with np.errstate(all="ignore"):
        _, exponent = np.frexp(x.astype(np.float64))
        exponent = np.maximum(exponent, -125)  # subnormals keep bfloat16's smallest spacing
        unit = np.ldexp(1.0, exponent - 8)
        rounded = np.rint(x.astype(np.float64) / unit) * unit
        result = np.where(np.isfinite(x), rounded, x).astype(np.float32)
    bits = np.where(np.isnan(x), np.float32(np.nan), result).astype(np.float32).view(np.uint32)
    return (bits >> 16).astype(np.uint16)


class Unfused:
    """Scale, norm, clip, clamp, rule, average, copy: each on whole flat arrays, one after the other.

    `cuts` are the ends of the tensors inside the flat array, for an optimizer with a trust ratio for each.
    """

    def __init__(self, config, p, ema_decay=None, copy_dtype=None, cuts=(), ema_warmup=False):
        self.cuts = [min(cut, p.size) for cut in cuts] if config.spec.trust else []
        self.oracles = [Oracle(config, part) for part in np.split(p, self.cuts)]
        self.ema_decay, self.copy_dtype, self.ema_warmup = ema_decay, copy_dtype, ema_warmup
        self.ema = p.copy()

    @property
    def arrays(self):
        """p and states, flat."""
        names = self.oracles[0].arrays
        return {name: np.concatenate([oracle.arrays[name] for oracle in self.oracles]) for name in names}

    @property
    def p(self):
        return self.arrays["p"]

    def copy(self):
        """The parameters in low precision, as uint16."""
        if self.copy_dtype == "bfloat16":
            return as_bfloat16(self.p)
        with np.errstate(over="ignore"):
            return self.p.astype(np.float16).view(np.uint16)

    def step(self, g, grad_scale=1.0, max_norm=None, clip_value=None):
        with np.errstate(all="ignore"):
            g = np.float32(grad_scale) * decoded(g)
            norm = math.sqrt(sum_squares(g))
            if max_norm is not None:
                g = np.float32(min(1.0, max_norm / (norm + 1e-6))) * g
            if clip_value is not None:
                g = np.minimum(np.maximum(g, np.float32(-clip_value)), np.float32(clip_value))
            for oracle, part in zip(self.oracles, np.split(g, self.cuts), strict=True):
                oracle.step(part)
            if self.ema_decay is not None:
                t = self.oracles[0].steps
                decay = min(self.ema_decay, (1 + t) / (10 + t)) if self.ema_warmup else self.ema_decay
                self.ema = np.float32(decay) * self.ema + np.float32(1.0 - decay) * self.p
        return norm
