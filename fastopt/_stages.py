"""The gradient stage: what happens to every gradient before any rule sees it, written as a rule.

The generator puts its text in front of each rule's, so every optimizer has maximize, weight decay in
both forms and L1 regularisation without a line of its own.
"""

from __future__ import annotations

from fastopt._rule import sign


def scalars(lr, weight_decay, decoupled, l1, maximize):
    """Host scalars, float64; rounded once to float32."""
    return dict(
        grad_scale=-1 if maximize else 1,
        decay=lr * weight_decay if decoupled else 0,
        l2=0 if decoupled else weight_decay,
        l1=l1,
    )


def rule(p, g, grad_scale, decay, l2, l1, *, regularized):
    """Multiplication by 1 changes no bit; a zero times an infinite p would, hence the flag.

    The decay is subtracted: rounded to float32, the factor 1 - lr * weight_decay is 0.14% off the decay at AdamW's
    defaults, always in the same direction.
    """
    g = grad_scale * g
    if regularized:
        g = g + l2 * p + l1 * sign(p)
        p = p - decay * p
    return p, g


def regularized(values):
    """Whether the gradient stage with these hyperparameters (`Spec.stage_values`) needs the flag."""
    return values["l1"] != 0 or values["weight_decay"] != 0


def reference(p, g, *, lr, weight_decay, decoupled, l1, maximize):
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
