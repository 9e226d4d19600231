"""The gradient stage: what happens to every gradient before any rule sees it, written as a rule.

The generators put its text in front of each rule's, so every optimizer has gradient scaling, clipping, maximize, weight
decay in both forms and L1 regularisation without a line of its own. Functions of one element are in the rule language;
`scalars`, `clip_coefficient` and `clip_factors` are computed on the host, or by one thread of a GPU, in float64. What a
step does beside (low precision, moving average, norms) is in `kernels/`.
"""

from __future__ import annotations

from fastopt.rules.functions import maximum, minimum, sign


def scalars(lr, weight_decay, decoupled, inside, l1, maximize):
    """Host scalars, float64; rounded once to float32.

    The engine puts a step's scale, its clipping and a tensor's trust ratio into grad_scale, clip_coefficient and trust.
    """
    return dict(
        grad_scale=-1 if maximize else 1,
        clip_coefficient=1,
        trust=1,
        decay=lr * weight_decay if decoupled else 0,
        l2=0 if decoupled else (0 if inside else weight_decay),
        l1=l1,
        update_decay=weight_decay if inside else 0,
        origin=0,
    )


def clip_coefficient(norm, max_norm):
    """What gradients of this global norm are multiplied by so that it becomes at most `max_norm`; NaN for NaN."""
    coefficient = max_norm / (norm + 1e-6)
    return 1 if coefficient > 1 else coefficient


def clip_factors(grad_scale, clip_coefficient):
    """The two factors of `scale`, such that float32 holds both, with the same product.

    Kernels flush subnormal numbers to zero, and a coefficient of zero would zero every gradient. Moving a factor of
    2**64 from a coefficient below 2**-126 to the scale is exact.
    """
    moved = 18446744073709551616.0 if clip_coefficient < 1.1754943508222875e-38 else 1
    moved = moved if clip_coefficient > 0 else 1
    return dict(grad_scale=grad_scale / moved, clip_coefficient=clip_coefficient * moved)


def scale(g, grad_scale, clip_coefficient):
    """The first thing that happens to a gradient; multiplication by 1 changes no bit."""
    g = clip_coefficient * (grad_scale * g)
    return g


def clamp(g, clip_value):
    """Clipping by value, between `scale` and `rule`, in steps that ask for it."""
    g = minimum(maximum(g, -clip_value), clip_value)
    return g


def rule(p, g, trust, decay, l2, l1, *, regularized, trusted):
    """Regularization, and the trust ratio of a tensor. Zero times an infinite p would be NaN, hence the flag.

    The decay is subtracted: rounded to float32, the factor 1 - lr * weight_decay is 0.14% off the decay at AdamW's
    defaults, always in the same direction.
    """
    if regularized:
        g = g + l2 * p + l1 * sign(p)
        p = p - decay * p
    if trusted:
        g = trust * g
    return p, g


def before_update(p, origin):
    """Before the rule of an optimizer whose trust ratio scales the update: the rule then starts at 0, not at p."""
    weight = p
    p = origin
    return p, weight


def after_update(p, weight, update_decay, origin, *, regularized):
    """After that rule: the update is what it subtracted, plus the weight decay, which counts in the update's norm."""
    update = origin - p
    if regularized:
        update = update_decay * weight + update
    return update


def regularized(values):
    """Whether the gradient stage with these hyperparameters (`Spec.stage_values`) needs the flag."""
    return values["l1"] != 0 or values["weight_decay"] != 0


def reference(p, g, *, lr, weight_decay, decoupled, inside, l1, maximize):  # noqa: ARG001  inside: its own has it
    """The same as a textbook writes it: (p, g), new arrays where they change."""
    if maximize:
        g = -g
    if weight_decay and not decoupled:
        g = g + weight_decay * p
    if l1:
        g = g + l1 * sign(p)
    if weight_decay and decoupled:
        p = p - lr * weight_decay * p
    return p, g
