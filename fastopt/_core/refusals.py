"""Gradients that the engine did not like: what is wrong with them, and what else a step is refused for.

The compiled engine checks gradients at first sight, and calls what is here for those that do not pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from fastopt._arrays.checks import check_array
from fastopt._arrays.flat_buffer import FlatBuffer
from fastopt._arrays.kinds import is_array
from fastopt._core.record import Record
from fastopt._core.tensors import check_parameter, written_arrays
from fastopt._messages import describe, few


def gradient_label(optimizer: Record, index: int) -> str:
    return f"{type(optimizer).__name__}: " + optimizer._tensors[index].label.replace("params", "grads", 1)


def check_gradient(optimizer: Record, index: int, gradient: Any) -> tuple[np.ndarray, str]:
    """Raise TypeError or ValueError unless `gradient` fits parameter number `index`; return it and what it holds.

    A NumPy scalar, which reductions return in the place of arrays of shape (), becomes a read-only array.
    """
    shape = optimizer._tensors[index].shape
    what = gradient_label(optimizer, index)
    if issubclass(type(gradient), np.generic):
        gradient = np.asarray(gradient)
        gradient.flags.writeable = False
    if is_array(gradient):
        dtype = np.ndarray.view(gradient, np.ndarray).dtype  # not what a subclass says
        name = dtype.name
        if name == "uint16" and optimizer.grad_dtype == "bfloat16":
            name = "bfloat16"
        if name in ("float16", "bfloat16"):
            check_array(gradient, what, shape=shape, dtypes=(dtype.type,), writable=False)
            return gradient, name
        if name == "uint16":
            raise TypeError(f"{what} is uint16; with grad_dtype='bfloat16' at construction that means bfloat16")
    if optimizer._structure == "single" and type(gradient) in (list, tuple, dict):
        raise TypeError(f"{what} must be one array, as params is, got a {type(gradient).__name__}")
    check_array(gradient, what, shape=shape, writable=False)
    return gradient, "float32"


def refuse_changed_parameter(optimizer: Record, index: int) -> NoReturn:
    """Explain a parameter that is no longer what the optimizer was given."""
    tensor = optimizer._tensors[index]
    check_parameter(optimizer, tensor.array, tensor.label, tensor.shape)
    raise ValueError(f"{type(optimizer).__name__}: the memory of {tensor.label} was reallocated since it was given")


def gradient_mapping(optimizer: Record, gradients: Any) -> dict[str, Any]:
    """Turn a mapping that is not a dict into one."""
    if isinstance(gradients, FlatBuffer):
        return gradients._views
    if isinstance(gradients, Mapping):
        return dict(gradients)
    raise TypeError(
        f"{type(optimizer).__name__}: grads must be a dict with the names of params, got {describe(gradients)}"
    )


def gradient_list(optimizer: Record, gradients: Any) -> list[Any]:
    """Turn a sequence that is not a list into one."""
    if isinstance(gradients, Sequence) and not isinstance(gradients, str | bytes):
        return list(gradients)
    raise TypeError(
        f"{type(optimizer).__name__}: grads must be a list with one float32 array or None for each of "
        f"{len(optimizer._tensors)} parameters, got {describe(gradients)}"
    )


def refuse_gradient_names(optimizer: Record, gradients: Mapping[str, Any]) -> NoReturn:
    """Explain gradients whose names are not those of the parameters."""
    names = set(optimizer._names or ())
    missing = [name for name in optimizer._names or () if name not in gradients]
    unknown = [name for name in gradients if name not in names]
    raise ValueError(
        f"{type(optimizer).__name__}: grads must have the names of params"
        + (f", missing {few(missing)}" if missing else "")
        + (f", unknown {few(unknown)}" if unknown else "")
    )


def refuse_gradient_count(optimizer: Record, gradients: Sequence[Any]) -> NoReturn:
    """Explain a wrong number of gradients."""
    raise ValueError(
        f"{type(optimizer).__name__}: grads must have one entry for each of {len(optimizer._tensors)} "
        f"parameters, got {len(gradients)}"
    )


def refuse_overlapping_gradient(optimizer: Record, index: int, gradient: Any) -> NoReturn:
    """Explain a gradient in memory that the step writes."""
    what, other = gradient_label(optimizer, index), "memory that the step writes"
    for array, label in written_arrays(optimizer):
        if optimizer._arrays.first_overlap([gradient, array]) is not None:
            other = label
            break
    raise ValueError(f"{what} overlaps {other} in memory")


def refuse_read_only_gradient(optimizer: Record, index: int) -> NoReturn:
    """Explain a gradient that cannot be zeroed."""
    raise ValueError(f"{gradient_label(optimizer, index)} must be writable for zero_grads, got a read-only array")


def refuse_shared_gradients(optimizer: Record, first: int, second: int) -> NoReturn:
    """Explain gradients of which one would be zeroed before the other is read."""
    raise ValueError(
        f"{gradient_label(optimizer, first)} and {optimizer._tensors[second].label.replace('params', 'grads', 1)} "
        "overlap in memory, and zero_grads would zero one before the other is read"
    )


def refuse_step(optimizer: Record, index: int, step: int) -> NoReturn:
    """Explain a step count that was set to nonsense."""
    label = optimizer._tensors[index].label
    raise ValueError(f"{type(optimizer).__name__}: the step count of {label} must be >= 0 and below 2**53, got {step}")


def refuse_scalars(optimizer: Record, index: int, step: int) -> NoReturn:
    """Explain hyperparameters that together leave float32's range."""
    tensor = optimizer._tensors[index]
    group = {k: v for k, v in optimizer.param_groups[tensor.group].items() if k in optimizer.spec.hypers}
    raise ValueError(
        f"{type(optimizer).__name__}: at step {step} of {tensor.label} the hyperparameters {group} give a factor "
        "outside the range of float32"
    )


def refuse_missing_gradients(optimizer: Record) -> NoReturn:
    """Explain a step without gradients that has nothing to take in their place."""
    raise RuntimeError(f"{type(optimizer).__name__}: step() needs grads where none were given to accumulate() before")


def refuse_pending_gradients(optimizer: Record, what: str) -> NoReturn:
    """Explain an operation that would lose accumulated gradients, or leave them out."""
    raise RuntimeError(
        f"{type(optimizer).__name__}: {what} while gradients are accumulated: step() without grads uses them, "
        "discard_accumulated() drops them"
    )


def refuse_regrouping(optimizer: Record) -> NoReturn:
    """Explain param groups that are not the dicts that the optimizer made."""
    raise ValueError(
        f"{type(optimizer).__name__}: param_groups must keep its dicts: change values inside them, add with "
        "add_param_group"
    )


def check_nothing_pending(optimizer: Record, what: str) -> None:
    """Raise RuntimeError while the operation `what` would lose accumulated gradients."""
    if optimizer.n_accumulated:
        refuse_pending_gradients(optimizer, what)
