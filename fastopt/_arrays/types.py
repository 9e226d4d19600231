"""What type checkers know of parameters, gradients and state; what is asked of arrays at run time is in `checks`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, KeysView, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]
Half: TypeAlias = np.ndarray[Any, np.dtype[np.uint16]]
"""bfloat16 numbers, where they are not ml_dtypes' own."""


class DeviceArray(Protocol):
    """An array on a GPU: of Numba, CuPy, PyTorch or whoever else says where its memory is."""

    @property
    def __cuda_array_interface__(self) -> Any: ...


Parameter: TypeAlias = Array | Half | DeviceArray
Params: TypeAlias = (
    Parameter | Sequence[Parameter] | Iterator[Parameter] | Mapping[str, Parameter] | Sequence[dict[str, Any]]
)
"""An iterator, but no other iterable: NumPy's annotations make an array of any type an iterable of anything."""

Gradient: TypeAlias = np.ndarray[Any, np.dtype[np.floating[Any]]] | Half | np.floating[Any] | DeviceArray
"""Of any float type: NumPy's annotations take a float32 array divided by an int for float64."""
Gradients: TypeAlias = Gradient | Sequence[Gradient | None] | Mapping[str, Gradient | None]

State: TypeAlias = Mapping[str, np.ndarray]
_Kept = TypeVar("_Kept", covariant=True)


class PerParameter(Protocol[_Kept]):
    """What an optimizer keeps for each parameter: a list in their order, or where they have names a dict."""

    def __getitem__(self, parameter: Any, /) -> _Kept: ...
    def __iter__(self) -> Iterator[Any]: ...
    def __len__(self) -> int: ...
    def keys(self) -> KeysView[str]: ...
    def values(self) -> Iterable[_Kept]: ...
    def items(self) -> Iterable[tuple[str, _Kept]]: ...
