"""What kind of array a value is, if it is one; no package is imported to find out."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np


def is_array(value: Any) -> bool:
    """Whether `value` is a NumPy array by its real type: objects can claim another class."""
    return issubclass(type(value), np.ndarray)


def lives_on_gpu(value: Any) -> bool:
    """Whether `value` is an array in a GPU's memory, of whatever package; none is imported to find out."""
    if value is None or isinstance(value, np.ndarray):
        return False
    torch: Any = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return bool(value.is_cuda)
    return bool(getattr(value, "__cuda_ndarray__", False)) or hasattr(value, "__cuda_array_interface__")


def is_any_array(value: Any) -> bool:
    """Whether `value` is one array, of the host or a GPU."""
    return issubclass(type(value), np.ndarray) or hasattr(value, "__array_interface__") or lives_on_gpu(value)
