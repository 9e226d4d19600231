"""The gradient stage: what happens to every gradient before any rule sees it, written as a rule.

The generator puts its text in front of each rule's, so every optimizer has gradient scaling, clipping by
norm, maximize, weight decay in both forms and L1 regularisation without a line of its own. The stages
that work on tiles (element-wise clipping, low precision, moving average) are in `kernels/`.
"""

from __future__ import annotations

from fastopt.rules.functions import sign


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
        nothing=0,
    )


def rule(p, g, grad_scale, clip_coefficient, trust, decay, l2, l1, *, regularized, trusted):
    """Multiplication by 1 changes no bit; a zero times an infinite p would, hence the flag.

    The decay is subtracted: rounded to float32, the factor 1 - lr * weight_decay is 0.14% off the decay at AdamW's
    defaults, always in the same direction.
    """
    g = clip_coefficient * (grad_scale * g)
    if regularized:
        g = g + l2 * p + l1 * sign(p)
        p = p - decay * p
    if trusted:
        g = trust * g
    return p, g


def before_update(p, nothing):
    """In front of the rule of an optimizer whose trust ratio scales the update: the rule steps from 0."""
    weight = p
    p = nothing
    return p, weight


def after_update(p, weight, update_decay, nothing, *, regularized):
    """Behind it: what the rule subtracted, and the weight decay that counts in the update's norm."""
    update = nothing - p
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
