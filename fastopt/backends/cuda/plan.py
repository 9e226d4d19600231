"""The step on the device: from gradients and param groups to launches on a stream.

A `Plan` is what one optimizer needs for a step, prebuilt. It goes through the rooms of the CPU's engine, and nothing
waits for the device:

1. groups     hyperparameters are compared with those last seen; what changed is validated
2. gather     every gradient is checked
3. scalars    host scalars of every (group, step count)
4. upload     the table of segments if an array changed, and the numbers of the step (see `layout`)
5. launch     norm and decision if asked for, then one kernel for all tensors of a rule

Whether a step with `skip_nonfinite` was applied is decided on the device, and the host may be several steps ahead
before it knows. So it uploads host scalars for every number of those steps that may have been applied, and the device
takes the row that is true.
"""

from __future__ import annotations

import bisect
import itertools
import math
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastopt import _formats
from fastopt._codegen import cuda as codegen
from fastopt._core import groups, refusals
from fastopt._core.options import ACCUMULATED
from fastopt.backends.cuda import kernels, layout, memory
from fastopt.backends.cuda.sums import Given, Sums
from fastopt.rules import gradient_stage, host_scalars

MAX_UNDECIDED = 7
"""Steps that may be undecided before one waits for the first of them."""
NOT_RUN = -1.0
"""In the place of the norm until the device writes it there."""
_WORDS = layout.ROW // 8
_PLAIN = (1.0, None, None, False, False)
_STORAGES = {"float32": layout.FLOAT32, "bfloat16": layout.BFLOAT16, "float16": layout.FLOAT16}


def _word(offset: int) -> int:
    return offset // 8


class Decision:
    """What becomes of one step: known to the device first, and to the host when it asks."""

    def __init__(self, event: memory.Event, header: np.ndarray, may_skip: bool) -> None:
        self._event, self._header = event, header
        self._may_skip = may_skip
        self._known: tuple[bool, float] | None = None

    def is_known(self) -> bool:
        """Whether the host can tell without waiting."""
        if self._known is None and self._event.has_passed():
            self._read()
        return self._known is not None

    def result(self) -> tuple[bool, float]:
        """(applied, norm), after waiting for the device if need be."""
        if self._known is None:
            self._event.wait()
            self._read()
        assert self._known is not None
        return self._known

    def _read(self) -> None:
        applied = bool(self._header.view(np.int32)[layout.RESULT // 4])
        self._known = (applied or not self._may_skip, float(self._header.view(np.float64)[layout.NORM // 8]))


class DeviceStepInfo:
    """What became of a step on the GPU: as `fastopt.StepInfo`, but reading an attribute waits for the step's norm."""

    __slots__ = ("_decision",)

    def __init__(self, decision: Decision) -> None:
        self._decision = decision

    @property
    def applied(self) -> bool:
        """False if `skip_nonfinite` found an inf or NaN: nothing was changed then."""
        return self._decision.result()[0]

    @property
    def grad_norm(self) -> float:
        """Global L2 norm of the scaled gradients before clipping."""
        return self._decision.result()[1]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.applied, self.grad_norm))

    def __repr__(self) -> str:
        if self._decision.is_known():
            return f"DeviceStepInfo(applied={self.applied}, grad_norm={self.grad_norm!r})"
        return "DeviceStepInfo(not known yet)"


class _Undecided(NamedTuple):
    """A step of which the host does not know whether it was applied."""

    decision: Decision
    active: tuple[int, ...]
    values: tuple[Any, ...]
    counts: tuple[Any, ...]


class _Run(NamedTuple):
    """Segments that one launch takes: neighbours in the table with the same kernel."""

    kernel: str
    first: int
    n: int
    n_tiles: int


class _Buffers:
    """A table and numbers on the device."""

    def __init__(self, n_rows: int, n_scalars: int, is_once: bool = False) -> None:
        self.table = memory.allocate(n_rows * layout.ROW)
        self.table_host = memory.Ring(n_rows * layout.ROW, 1 if is_once else 8)
        self.numbers = memory.allocate(layout.HEADER + n_scalars * layout.SCALAR_BYTES)
        self.numbers_host = memory.Ring(layout.HEADER + n_scalars * layout.SCALAR_BYTES, 1 if is_once else 32)
        self.table_at = memory.address_of(self.table)
        self.numbers_at = memory.address_of(self.numbers)
        self.n_scalars = n_scalars
        self.n_segments = 0
        self.runs: tuple[_Run, ...] = ()


class _Norms:
    """What a step with a norm needs beside `_Buffers`: partial sums, what outlives the step, places to read it back."""

    def __init__(self, sizes: Sequence[int], has_trust: bool) -> None:
        n_blocks = sum(sizes) // layout.NORM_BLOCK + len(sizes) + 1
        self._arrays = [memory.allocate(8 * n_blocks), memory.allocate(8 * n_blocks if has_trust else 8)]
        self._arrays.append(memory.allocate(layout.CONTROL))
        self.sums, self.other_sums, self.control = map(memory.address_of, self._arrays)
        slots = 4 * (MAX_UNDECIDED + 1)
        self._headers = np.split(memory.pinned(layout.HEADER * slots), slots)
        self._decisions: list[Decision | None] = [None] * slots
        self._events: list[memory.Event | None] = [None] * slots
        self._at = 0

    def read_back(self, buffers: _Buffers, may_skip: bool, stream: int) -> Decision:
        """Queue a copy of the header: what the device decided."""
        k = self._at = (self._at + 1) % len(self._decisions)
        before = self._decisions[k]
        if before is not None:
            before.result()  # its place in pinned memory is reused now
        memory.copy_out(self._headers[k], buffers.numbers_at, stream)
        event = self._events[k] = self._events[k] or memory.Event()
        event.record(stream)
        decision = self._decisions[k] = Decision(event, self._headers[k], may_skip)
        return decision


class _Captured(NamedTuple):
    """What a captured step did, for replays."""

    active: tuple[int, ...]
    kernels: tuple[str, ...]
    options: tuple
    blocks: tuple[int, ...]


class Plan:
    """The prebuilt step of one optimizer."""

    def __init__(self, optimizer: Any, is_once: bool = False) -> None:
        self._reference = weakref.ref(optimizer)  # in a cycle, large states would wait for the garbage collector
        self.n_threads = 0
        self._guard = optimizer._guard
        spec = self._spec = optimizer.spec
        tensors = optimizer._tensors
        self._groups = optimizer.param_groups
        self._group_dicts = optimizer._groups
        self._hyper_names = ("params", *spec.hypers)
        self._group_values: list[tuple | None] = [None] * len(self._groups)
        self._kernels = [""] * len(self._groups)
        self._names = optimizer._names or ()
        self._group_of = [tensor.group for tensor in tensors]
        self._steps = [tensor.step for tensor in tensors]
        self._running = [tensor.running for tensor in tensors] if spec.running else []
        self._shapes = [tensor.shape for tensor in tensors]
        self._arrays = [tensor.array for tensor in tensors]
        self._state_names = tuple(spec.states)
        self._trust_hypers = codegen.trust_hypers(spec) if spec.trust else ()
        self._seed = optimizer.seed
        self._rows = np.zeros((len(tensors), _WORDS), np.int64)
        self._states = np.zeros((len(tensors), 2, len(self._state_names)), np.int64)
        self._itemsizes = np.zeros(_WORDS, np.int64)
        self._pointers: list[Any] = []
        self._device = memory.current_device()
        for tensor in tensors:
            memory.check_device(tensor.array, memory.address_of(tensor.array), tensor.label)
        self._layout(optimizer)
        self._identity = self._guard.begin_plan()
        self._given = Given(self._rows)
        self._sums: Sums | None = None
        self._is_stale = True
        self._arrangement: tuple[Any, ...] = ()
        self._table: tuple[np.ndarray, tuple[_Run, ...]] = (np.zeros((0, _WORDS), np.int64), ())
        self._n_norm_blocks = 0
        self._n_trust_blocks = 0
        n_scalars = max(len(self._groups) * (MAX_UNDECIDED + 1), 2)
        self._is_once = is_once  # buffers are then made for a single step
        self._eager = _Buffers(max(len(tensors), 1), n_scalars, self._is_once)
        self._norms: _Norms | None = None
        self._captured_buffers: _Buffers | None = None
        self._captured: _Captured | None = None
        self._retired: list[_Buffers] = []
        self._replayed: _Replayed | None = None
        self._decided = 0
        self._undecided: list[_Undecided] = []
        self._loaded: set[str] = set()

    def _layout(self, optimizer: Any) -> None:
        """Fill what does not change in the rows, and list everything that a step writes."""
        rows, sizes = self._rows, self._itemsizes
        is_split = optimizer.master is not None
        sizes[[_word(layout.P), _word(layout.LOW)]] = 2 if is_split else 4, 2 if is_split else 0
        kinds = [self._spec.kinds[name] for name in self._spec.states]
        self._codec = _formats.common_codec(optimizer.state_dtype, kinds)
        for k, tensor in enumerate(optimizer._tensors):
            row = rows[k]
            row[_word(layout.N)] = tensor.size
            row[_word(layout.INDEX)] = tensor.index
            beside = ((layout.LOW, tensor.low), (layout.EMA, tensor.ema), (layout.COPY, tensor.copy))
            for offset, array in ((layout.P, tensor.array), *beside, (layout.UPDATE, tensor.update)):
                if array is not None:
                    row[_word(offset)] = memory.address_of(array)
                    self._pointers.append(array)
            for j, name in enumerate(self._state_names):
                for part, kept in ((0, tensor.states), (1, tensor.scales)):
                    if name in kept:
                        self._states[k, part, j] = memory.address_of(kept[name])
                        self._pointers.append(kept[name])
        ranges = []
        for array in self._pointers:
            seen = memory.look(array)
            assert seen is not None
            ranges.append((seen.address, seen.address + memory.nbytes(array)))
        self._written = sorted(one for one in ranges if one[0] < one[1])
        self._starts = [one[0] for one in self._written]
        self._movable = [i for i, array in enumerate(self._arrays) if hasattr(array, "data_ptr")]

    @property
    def _optimizer(self) -> Any:
        return self._reference()

    def _check_device(self) -> None:
        """Raise ValueError unless the GPU of the arrays is the one that this thread works on."""
        current = memory.current_device()
        if current != self._device:
            name = type(self._optimizer).__name__
            raise ValueError(f"{name}: the parameters are on GPU {self._device}, but GPU {current} is current")

    # --- 1. groups

    def _check_groups(self) -> None:
        self._guard.check_plan(self._identity)
        if len(self._groups) != len(self._group_dicts):
            refusals.refuse_regrouping(self._optimizer)
        for k, known in enumerate(self._group_dicts):
            group = self._groups[k]
            if group is not known:
                refusals.refuse_regrouping(self._optimizer)
            values = self._group_values[k]
            if values is not None and len(group) == len(values):
                for name, value in zip(self._hyper_names, values, strict=False):
                    if group.get(name) is not value:
                        break
                else:
                    continue
            self._read_group(k)

    def _read_group(self, k: int) -> None:
        name, _, group = groups.read_group(self._optimizer, k)
        if name != self._kernels[k]:
            self._kernels[k] = name
            self._is_stale = True
            states = kernels.description(name).states
            members = [i for i, of in enumerate(self._group_of) if of == k]
            self._rows[members, _word(layout.STATES) : _WORDS] = 0
            for j, state in enumerate(states):
                at = self._state_names.index(state)
                self._rows[members, _word(layout.STATES) + j] = self._states[members, 0, at]
                self._rows[members, _word(layout.SCALES) + j] = self._states[members, 1, at]
        values = [group[key] for key in self._hyper_names]
        values += [group[key] for key in group if key not in self._hyper_names]
        self._group_values[k] = tuple(values)

    # --- 2. gather

    def _gather(self, gradients: Any, last: Given) -> list[int]:
        """Check every gradient, note in `last` where it is, and return the positions of those that are there."""
        optimizer = self._optimizer
        structure = optimizer._structure
        if structure == "single":
            items: Sequence[Any] = (gradients,)
        elif structure == "mapping":
            if type(gradients) is not dict:
                gradients = refusals.gradient_mapping(optimizer, gradients)
            if len(gradients) != len(self._arrays) or any(name not in gradients for name in self._names):
                refusals.refuse_gradient_names(optimizer, gradients)
            items = [gradients[name] for name in self._names]
        else:
            if type(gradients) is not list:
                gradients = refusals.gradient_list(optimizer, gradients)
            if len(gradients) != len(self._arrays):
                refusals.refuse_gradient_count(optimizer, gradients)
            items = gradients
        torch: Any = sys.modules.get("torch")
        active, changed, known = [], [], last.known
        for i, gradient in enumerate(items):
            if gradient is None:
                continue
            active.append(i)
            if known[i] is not None and known[i]() is gradient:
                continue
            if (
                torch is not None
                and type(gradient) is torch.Tensor
                and gradient.dtype is torch.float32
                and gradient.is_cuda
                and gradient.layout is torch.strided
                and gradient.shape == self._shapes[i]
                and gradient.is_contiguous()
            ):
                found = gradient.data_ptr(), layout.FLOAT32
            else:
                found = self._check_gradient(i, gradient)
            if last.places[i] != found:
                memory.check_device(gradient, found[0], refusals.gradient_label(optimizer, i))
                self._check_apart(i, gradient, *found)
            changed.append((i, found, gradient))
        for i in self._movable:
            self._check_parameter(i)
        counts = [self._steps[i].item() for i in active]
        if counts and not (min(counts) >= 0 and max(counts) < 2**53):
            i, count = next((i, n) for i, n in zip(active, counts, strict=True) if not 0 <= n < 2**53)
            refusals.refuse_step(optimizer, i, count)
        for i, found, gradient in changed:
            if last.places[i] != found:
                last.places[i] = found
                last.rows[i, _word(layout.GRADIENT)], last.rows[i, _word(layout.STORAGE)] = found
                last.has_moved = True
            # A gradient that is the same object as in the last step is not looked at again, if its memory cannot move.
            known[i] = weakref.ref(gradient) if memory.never_moves(gradient) else None
        return active

    def _check_gradient(self, i: int, gradient: Any) -> tuple[int, int]:
        """Address and storage of a gradient that fits."""
        what = refusals.gradient_label(self._optimizer, i)
        seen = memory.look(gradient)
        dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")
        if seen is not None and seen.dtype == "uint16":
            if self._optimizer.grad_dtype != "bfloat16":
                raise TypeError(f"{what} is uint16; with grad_dtype='bfloat16' at construction that means bfloat16")
            dtypes = ("uint16",)
        seen = memory.checked(gradient, what, shape=self._shapes[i], dtypes=dtypes, writable=False)
        return seen.address, _STORAGES["bfloat16" if seen.dtype == "uint16" else seen.dtype]

    def _check_apart(self, i: int, gradient: Any, address: int, storage: int) -> None:
        """Raise ValueError if a gradient lies in memory that the step writes."""
        end = address + int(self._rows[i, _word(layout.N)]) * (4 if storage == layout.FLOAT32 else 2)
        at = bisect.bisect_left(self._starts, end) - 1  # ranges do not overlap: only this one can reach so far
        if at >= 0 and address < end and address < self._written[at][1]:
            refusals.refuse_overlapping_gradient(self._optimizer, i, gradient)

    def _check_parameter(self, i: int) -> None:
        """Raise ValueError if a parameter's memory is no longer what the plan knows (PyTorch can exchange it)."""
        if self._arrays[i].data_ptr() != self._rows[i, _word(layout.P)]:
            refusals.refuse_changed_parameter(self._optimizer, i)

    def _check_zeroable(self, gradients: Any, active: Sequence[int]) -> None:
        """Raise ValueError unless every gradient can be zeroed without touching another."""
        structure = self._optimizer._structure
        items = {0: gradients} if structure == "single" else gradients
        ranges = []
        for i in active:
            gradient = items[self._names[i]] if structure == "mapping" else items[i]
            seen = memory.look(gradient)
            assert seen is not None
            if not seen.is_writable:
                refusals.refuse_read_only_gradient(self._optimizer, i)
            if seen.size:
                ranges.append((seen.address, seen.address + memory.nbytes(gradient), i))
        ranges.sort()
        for before, after in itertools.pairwise(ranges):
            if after[0] < before[1]:
                refusals.refuse_shared_gradients(self._optimizer, *sorted((before[2], after[2])))

    # --- 3. scalars

    def _host_scalars(
        self, values: Mapping[str, Any], step: int, running: tuple[float, ...]
    ) -> tuple[list[float], tuple[float, ...]]:
        """The host scalars of step number `step` in float64, and the running ones after it."""
        spec = self._spec
        own = host_scalars.host_scalars(spec, step, dict(zip(spec.running, running, strict=True)), values)
        advanced = tuple(float(own.pop(name)) for name in spec.running)
        return [*gradient_stage.scalars(**spec.stage_values(values)).values(), *own.values()], advanced

    def _scalar_rows(self, active: Sequence[int], options: tuple) -> tuple[list[int], list[list[bytes]]]:
        """Which of the scalars each tensor takes, and their bytes for each number of undecided steps applied."""
        self._settle_what_differs(active, options)
        made = self._rows_of_scalars(active, len(self._undecided) + 1)
        if made is None:
            self._settle(wait=True)
            made = self._rows_of_scalars(active, 1)
        assert made is not None
        return made

    def _rows_of_scalars(self, active: Sequence[int], n_rows: int) -> tuple[list[int], list[list[bytes]]] | None:
        """The same for so many rows; None if a scalar in one of the rows behind the first leaves float32."""
        kinds: dict[tuple, int] = {}
        chosen: list[int] = []
        rows: list[list[bytes]] = [[] for _ in range(n_rows)]
        for i in active:
            running = tuple(self._running[i].tolist()) if self._running else ()
            key = (self._group_of[i], self._steps[i].item(), running)
            if key not in kinds:
                kinds[key] = len(kinds)
                group, step, _ = key
                for row in rows:
                    step += 1
                    scalars, running = self._host_scalars(self._group_dicts[group], step, running)
                    packed = self._packed(scalars, group, step)
                    if packed is None:
                        if row is not rows[0]:
                            return None  # so many steps may not have been applied: refuse only when it is known
                        refusals.refuse_scalars(self._optimizer, i, step)
                    row.append(packed)
            chosen.append(kinds[key])
        return chosen, rows

    def _packed(self, scalars: Sequence[float], group: int, step: int) -> bytes | None:
        """Host scalars of one kind of tensor as `layout` has them; None unless all are finite in float32."""
        if not all(map(math.isfinite, scalars)):
            return None
        values, hypers = self._group_dicts[group], [0.0] * layout.MAX_TRUST_HYPERS
        for k, name in enumerate(self._trust_hypers):
            hypers[k] = values[name]
        key = int(_formats.dither_key(self._seed, step)) if self._codec.is_rounded else 0
        decay = host_scalars.average_decay(self._optimizer, step)
        try:
            return layout.scalars(len(scalars)).pack(*scalars, key, step & 0x7FFFFFFF, decay, 1.0 - decay, *hypers)
        except OverflowError:
            return None

    # --- 4. upload

    def _arrange(self, active: Sequence[int], blocks: Sequence[int]) -> None:
        """Turn the rows of active tensors into segments: neighbours in memory become one."""
        arrangement = (tuple(active), tuple(blocks), tuple(self._kernels))
        self._is_stale |= self._given.has_moved
        self._given.has_moved = False
        if not self._is_stale and arrangement == self._arrangement:
            return
        rows = self._rows[list(active)].copy()
        rows[:, _word(layout.SCALARS)] = np.array(blocks, np.int64) * layout.SCALAR_BYTES
        names = np.array([self._kernels[self._group_of[i]] for i in active])
        n = rows[:, _word(layout.N)]
        keep = n > 0
        rows, names, n = rows[keep], names[keep], n[keep]
        if len(rows) > 1 and self._spec.trust is None:
            starts = ~self._follows(rows, names)
            first = np.flatnonzero(starts)
            lengths = np.add.reduceat(n, first)
            rows, names, n = rows[first].copy(), names[first], lengths
            rows[:, _word(layout.N)] = n
        is_wide = self._sizes_of(rows) == 4
        addresses = rows[:, self._address_words]
        odd = np.where(is_wide, addresses % 16, addresses % 8)
        rows[:, _word(layout.ALIGNED)] = ~odd.any(axis=1)
        rows[:, _word(layout.NORM_START)] = np.cumsum(n) - n
        n_blocks = -(-n // layout.NORM_BLOCK)
        rows[:, _word(layout.FIRST_BLOCK)] = np.cumsum(n_blocks) - n_blocks
        self._n_norm_blocks = -(-int(n.sum()) // layout.NORM_BLOCK)
        self._n_trust_blocks = int(n_blocks.sum())
        tiles = -(-n // kernels.TILE)
        runs = []
        bounds = [0, *(np.flatnonzero(names[1:] != names[:-1]) + 1).tolist(), len(rows)]
        for start, stop in itertools.pairwise(bounds):
            if stop > start:
                rows[start:stop, _word(layout.FIRST_TILE)] = np.cumsum(tiles[start:stop]) - tiles[start:stop]
                runs.append(_Run(str(names[start]), start, stop - start, int(tiles[start:stop].sum())))
        self._table = rows, tuple(runs)
        self._arrangement = arrangement
        self._is_stale = True

    _address_words = tuple(
        _word(offset)
        for offset in (
            *(layout.P, layout.LOW, layout.GRADIENT, layout.EMA, layout.COPY, layout.UPDATE),
            *(layout.STATES + 8 * k for k in range(layout.MAX_STATES)),
        )
    )

    def _sizes_of(self, rows: np.ndarray) -> np.ndarray:
        """Bytes of an element behind each of `_address_words`, for every row."""
        sizes = np.full((len(rows), len(self._address_words)), 4, np.int64)
        sizes[:, 0] = self._itemsizes[0]
        sizes[:, 1] = 2
        sizes[:, 2] = np.where(rows[:, _word(layout.STORAGE)] == layout.FLOAT32, 4, 2)
        sizes[:, 4] = 2
        sizes[:, 6:] = self._codec.dtype.itemsize
        return sizes

    def _follows(self, rows: np.ndarray, names: np.ndarray) -> np.ndarray:
        """For each row, whether every array of it continues that of the row before in memory."""
        before, after = rows[:-1], rows[1:]
        n = before[:, _word(layout.N), None]
        addresses, next_addresses = before[:, self._address_words], after[:, self._address_words]
        sizes = self._sizes_of(before)
        continues = (next_addresses == addresses + n * sizes) | ((addresses == 0) & (next_addresses == 0))
        same = continues.all(axis=1) & (names[1:] == names[:-1])
        for offset in (layout.SCALARS, layout.STORAGE):
            same &= before[:, _word(offset)] == after[:, _word(offset)]
        if self._codec.is_rounded:
            same &= before[:, _word(layout.INDEX)] + n[:, 0] == after[:, _word(layout.INDEX)]
        scales = before[:, _word(layout.SCALES) :]
        if scales.any():
            same &= n[:, 0] % layout.CODE_BLOCK == 0
            following = scales + n // layout.CODE_BLOCK * 2
            same &= ((after[:, _word(layout.SCALES) :] == following) | (scales == 0)).all(axis=1)
        return np.concatenate([[False], same])

    def _numbers(self, rows: list[list[bytes]], options: tuple) -> bytes:
        """The numbers of a step."""
        row_bytes = len(rows[0]) * layout.SCALAR_BYTES if rows else 0
        head = header(self._optimizer, options, row_bytes, self._decided, len(rows))
        return b"".join([head, *itertools.chain.from_iterable(rows)])

    def _send_table(self, buffers: _Buffers, stream: int, is_captured: bool = False) -> None:
        """Upload the table, if it is not there already."""
        table, runs = self._table
        if not self._is_stale and not is_captured:
            return
        if is_captured:
            buffers.table_host.send_again_and_again(table.tobytes(), buffers.table_at, stream)
        else:
            buffers.table_host.send(table.tobytes(), buffers.table_at, stream)
            self._is_stale = False
        buffers.n_segments, buffers.runs = len(table), runs

    # --- 5. launch

    def _launch(self, buffers: _Buffers, needs_norm: bool, stream: int) -> None:
        table, numbers, n = buffers.table_at, buffers.numbers_at, buffers.n_segments
        trust = self._spec.trust
        sums = others = 0
        if self._norms is not None:
            sums, others = self._norms.sums, self._norms.other_sums
            if needs_norm:
                if self._n_norm_blocks:
                    self._sum(buffers, "gradients", self._n_norm_blocks, sums, stream)
                control = self._norms.control
                kernels.shared("decide").launch(1, stream, numbers, control, self._n_norm_blocks, sums)
        if n == 0:
            return
        if trust:
            self._sum(buffers, "parameters", self._n_trust_blocks, sums, stream)
        if trust == "gradient":
            self._sum(buffers, "clipped_gradients", self._n_trust_blocks, others, stream)
            self._ratios(buffers, sums, others, stream)
        for run in buffers.runs:
            kernel = kernels.compiled(run.kernel, self._optimizer.state_dtype)
            arguments = (table + layout.ROW * run.first, numbers, run.n, run.n_tiles)
            kernel.launch(min(run.n_tiles, kernels.MAX_BLOCKS), stream, *arguments)
        if trust == "update":
            self._sum(buffers, "updates", self._n_trust_blocks, others, stream)
            self._ratios(buffers, sums, others, stream)
            for run in buffers.runs:
                arguments = (table + layout.ROW * run.first, numbers, run.n, run.n_tiles)
                kernels.shared("apply_update").launch(min(run.n_tiles, kernels.MAX_BLOCKS), stream, *arguments)

    def _needed(self, buffers: _Buffers, needs_norm: bool) -> set[str]:
        """Names for the kernels that a step launches."""
        names = {run.kernel for run in buffers.runs}
        if needs_norm:
            names |= {"decide"} | ({"sum"} if self._n_norm_blocks else set())
        return names

    def _sum(self, buffers: _Buffers, what: str, n_blocks: int, sums: int, stream: int) -> None:
        blocks = min(-(-n_blocks * 32 // kernels.WARP_THREADS), kernels.MAX_BLOCKS)
        arguments = (buffers.table_at, buffers.numbers_at, buffers.n_segments, n_blocks, sums)
        kernels.shared(f"sum_{what}").launch(blocks, stream, *arguments)

    def _ratios(self, buffers: _Buffers, sums: int, others: int, stream: int) -> None:
        blocks = min(-(-buffers.n_segments * 32 // kernels.WARP_THREADS), kernels.MAX_BLOCKS)
        kernel = kernels.compiled_trust(self._spec.rule_name)
        kernel.launch(blocks, stream, buffers.table_at, buffers.numbers_at, buffers.n_segments, sums, others)

    # --- The step

    def step(self, gradients: Any, options: tuple = _PLAIN, stream: Any = None) -> DeviceStepInfo | None:
        """Check everything, then queue the update of every tensor that has a gradient on the stream.

        Returns None where nothing needs the norm: the step is applied then.
        """
        info: DeviceStepInfo | None = self._guard.run("step()", self.step_held, gradients, options, stream)
        return info

    def step_held(self, gradients: Any, options: tuple = _PLAIN, stream: Any = None) -> DeviceStepInfo | None:
        """The same for a caller that has taken the optimizer's guard."""
        self._check_device()
        self._check_groups()
        if gradients is ACCUMULATED:
            return self._step_of_sums(options, stream)
        self._check_nothing_pending("step(grads)")
        active = tuple(self._gather(gradients, self._given))
        if options[4]:
            self._check_zeroable(gradients, active)
        handle = memory.stream_of(self._arrays, stream)
        if memory.is_capturing(handle):
            self._capture(active, options, handle)
            return None
        return self._run(active, options, handle)

    def _step_of_sums(self, options: tuple, stream: Any) -> DeviceStepInfo | None:
        """The step that takes the sums of gradients, and zeroes them."""
        optimizer, sums = self._optimizer, self._sums
        if sums is None or not self.n_accumulated:
            refusals.refuse_missing_gradients(optimizer)
        handle = self._stream(stream, "step() without grads")
        items = [array if i in sums.pending[1] else None for i, array in enumerate(sums.arrays)]
        gradients = items[0] if optimizer._structure == "single" else optimizer._structured(items)
        active = tuple(self._gather(gradients, self._given))
        info = self._run(active, (*options[:4], True), handle)
        sums.pending = 0, frozenset()
        return info

    # --- Sums of gradients

    @property
    def n_accumulated(self) -> int:
        """Calls of `accumulate` whose gradients no step has used."""
        return 0 if self._sums is None else self._sums.pending[0]

    def accumulate(self, gradients: Any, stream: Any = None) -> None:
        """Check every gradient, then queue its addition to its tensor's float32 sums on the stream.

        For a caller that has taken the optimizer's guard.
        """
        self._check_device()
        handle = self._stream(stream, "accumulate()")
        if self._sums is None:
            sizes = [math.prod(shape) for shape in self._shapes]
            self._sums = Sums(memory.state_arrays(self._arrays), sizes)
        self._sums.add(tuple(self._gather(gradients, self._sums.given)), handle)

    def discard(self) -> None:
        """Drop the sums, for a caller that has taken the optimizer's guard."""
        memory.synchronize()
        self._sums = None

    def _check_nothing_pending(self, what: str) -> None:
        if self.n_accumulated:
            refusals.refuse_pending_gradients(self._optimizer, what)

    def _stream(self, stream: Any, what: str) -> int:
        """Handle of the stream to work on, which may not be capturing."""
        handle = memory.stream_of(self._arrays, stream)
        if memory.is_capturing(handle):
            name = type(self._optimizer).__name__
            raise RuntimeError(f"{name}: {what} cannot be captured into a graph; a step with gradients can")
        return handle

    def _run(self, active: tuple[int, ...], options: tuple, stream: int) -> DeviceStepInfo | None:
        needs_norm = options[1] is not None or options[3]
        blocks, rows = self._scalar_rows(active, options)
        self._make_room(len(set(blocks)) * len(rows))
        self._arrange(active, blocks)
        if needs_norm or self._spec.trust:
            self._make_norms()
        self._send_table(self._eager, stream)
        self._eager.numbers_host.send(self._numbers(rows, options), self._eager.numbers_at, stream)
        self._launch(self._eager, needs_norm, stream)
        self._loaded |= self._needed(self._eager, needs_norm)
        return self._count(active, options, self._eager, stream)

    def _count(self, active: tuple[int, ...], options: tuple, buffers: _Buffers, stream: int) -> DeviceStepInfo | None:
        """Count the step, now or when it is decided."""
        self._guard.steps += 1
        may_skip, needs_norm = options[3], options[1] is not None or options[3]
        if not may_skip:
            self._advance(active, self._group_values)
        if not needs_norm:
            return None
        decision = self._make_norms().read_back(buffers, may_skip, stream)
        if may_skip:
            self._undecided.append(self._undecided_step(decision, active))
        return DeviceStepInfo(decision)

    def _make_norms(self) -> _Norms:
        if self._norms is None:
            self._norms = _Norms([math.prod(shape) for shape in self._shapes], bool(self._spec.trust))
        return self._norms

    def _undecided_step(self, decision: Decision, active: tuple[int, ...]) -> _Undecided:
        return _Undecided(decision, active, tuple(self._group_values), self._counts())

    def _counts(self) -> tuple[Any, ...]:
        """Step counts and what else is carried, as they are on the host: users can change them."""
        return tuple(step.item() for step in self._steps), tuple(tuple(one.tolist()) for one in self._running)

    def _settle_what_differs(self, active: Sequence[int], options: tuple) -> None:
        """Settle what can be without waiting; and the rest, if this step cannot go on top of it."""
        self._settle(wait=False)
        if not self._undecided:
            return
        fits = options[3] and len(self._undecided) < MAX_UNDECIDED
        now = (active, tuple(self._group_values), self._counts())
        if not fits or any((step.active, step.values, step.counts) != now for step in self._undecided):
            self._settle(wait=True)

    def _settle(self, wait: bool) -> None:
        """Count the undecided steps of which the host can know by now, or of all."""
        while self._undecided and (wait or self._undecided[0].decision.is_known()):
            step = self._undecided[0]
            applied, _ = step.decision.result()
            del self._undecided[0]
            if applied:
                self._decided += 1
                self._advance(step.active, step.values)

    def settle(self) -> None:
        """Wait until the host knows of every step whether it was applied."""
        if self._undecided:
            self._check_device()
            self._settle(wait=True)

    def _advance(self, active: Sequence[int], group_values: Sequence[Any]) -> None:
        """Count a step that was taken with these values of the groups."""
        for i in active:
            if self._running:
                running = tuple(self._running[i].tolist())
                values = dict(zip(self._hyper_names, group_values[self._group_of[i]], strict=False))
                _, advanced = self._host_scalars(values, self._steps[i].item() + 1, running)
                self._running[i][...] = advanced
            step = self._steps[i]
            step[()] = step.item() + 1

    def _make_room(self, n_scalars: int) -> None:
        if n_scalars > self._eager.n_scalars:
            memory.synchronize()
            self._eager = _Buffers(max(len(self._arrays), 1), 2 * n_scalars, self._is_once)
            self._is_stale = True

    # --- Captured graphs

    def _capture(self, active: tuple[int, ...], options: tuple, stream: int) -> None:
        """Put the step's launches into the graph that is being captured; `prepare_replay` counts its replays."""
        name = type(self._optimizer).__name__
        needs_norm = options[1] is not None or options[3]
        if self._captured_buffers is None or self._captured is not None:
            raise RuntimeError(f"{name}: call prepare_capture() before each capture of a step")
        made = self._rows_of_scalars(active, 1)
        assert made is not None
        blocks, _ = made
        if max(blocks, default=0) >= len(self._groups):
            raise RuntimeError(f"{name}: a captured step needs the same step count for all tensors of a param group")
        buffers = self._captured_buffers
        self._arrange(active, blocks)
        buffers.n_segments, buffers.runs = len(self._table[0]), self._table[1]
        if not self._needed(buffers, needs_norm) <= self._loaded:
            raise RuntimeError(f"{name}: run a step like the one to be captured first: kernels are loaded then")
        self._send_table(buffers, stream, is_captured=True)
        self._launch(buffers, needs_norm, stream)
        self._captured = _Captured(active, tuple(self._kernels), options, tuple(blocks))
        self._arrangement = ()

    def captured(self) -> list[Any]:
        """Buffers whose addresses may be in a graph."""
        kept = [self._captured_buffers, self._norms, self._table] if self._captured_buffers is not None else []
        return [*self._retired, *kept]

    def prepare_capture(self) -> None:
        """Make what a captured step needs: nothing can be allocated while a graph is captured."""
        self._check_device()
        if not self._loaded:
            raise RuntimeError(f"{type(self._optimizer).__name__}: run a step like the one to be captured first")
        self.settle()
        if self._captured_buffers is not None:
            self._retired.append(self._captured_buffers)  # a graph may have their addresses
        self._captured = None
        self._captured_buffers = _Buffers(max(len(self._arrays), 1), len(self._groups) * (MAX_UNDECIDED + 1))
        memory.prepare_capture()

    def prepare_replay(self, stream: Any = None) -> DeviceStepInfo | None:
        """Count one replay of the captured step, and queue its numbers before it."""
        name = type(self._optimizer).__name__
        if self._captured is None or self._captured_buffers is None:
            raise RuntimeError(f"{name}: no step was captured")
        self._check_nothing_pending("prepare_replay()")
        self._check_device()
        self._check_groups()
        active, names, options, captured_blocks = self._captured
        if tuple(self._kernels) != names:
            raise RuntimeError(f"{name}: the hyperparameters now need another kernel than the captured one")
        handle = memory.stream_of(self._arrays, stream)
        if self._replayed is not None:
            self._replayed.end(handle)
        blocks, rows = self._scalar_rows(active, options)
        if tuple(blocks) != captured_blocks:
            raise RuntimeError(f"{name}: step counts in a param group differ now; in the captured step they did not")
        buffers = self._captured_buffers
        buffers.numbers_host.send(self._numbers(rows, options), buffers.numbers_at, handle)
        if not options[3]:
            self._advance(active, self._group_values)
        if options[1] is None and not options[3]:
            return None
        self._replayed = _Replayed(self._make_norms(), self._captured_buffers, handle, options[3])
        if options[3]:
            self._undecided.append(self._undecided_step(self._replayed, active))
        return DeviceStepInfo(self._replayed)


class _Replayed(Decision):
    """The decision of a replay that is queued after `prepare_replay`: read back before the next, or when asked for."""

    def __init__(self, norms: _Norms, buffers: _Buffers, stream: int, may_skip: bool) -> None:
        self._queued: Decision | None = None
        self._read_back = lambda on: norms.read_back(buffers, may_skip, on)
        self._stream = stream
        self._is_over = False

    def end(self, stream: int) -> None:
        """Queue the reading before the numbers are written over; not replayed by then, it never was."""
        self._queued = self._queued or self._read_back(stream)
        self._is_over = True

    def is_known(self) -> bool:
        if self._queued is None or not self._queued.is_known():
            return False
        return self._is_over or self._queued.result()[1] != NOT_RUN

    def result(self) -> tuple[bool, float]:
        self._queued = self._queued or self._read_back(self._stream)
        applied, norm = self._queued.result()
        if norm != NOT_RUN:
            return applied, norm
        if self._is_over:
            return False, math.nan
        self._queued = None
        raise RuntimeError("a replay was prepared but not queued yet: what becomes of it is known after that")


def header(optimizer: Any, options: tuple = _PLAIN, row_bytes: int = 0, decided: int = 0, n_rows: int = 1) -> bytes:
    """The header of the numbers, as `layout` has it."""
    grad_scale, max_norm, clip_value, skip_nonfinite, zero_grads = options
    return layout.header.pack(
        True,  # applied, until the device decides
        0,
        clip_value is not None,
        zero_grads,
        _single(grad_scale),
        1.0,
        math.inf if clip_value is None else _single(clip_value),
        layout.FLOAT16 if optimizer.copy_dtype == "float16" else layout.BFLOAT16,
        row_bytes,
        skip_nonfinite,
        max_norm is not None and not math.isinf(max_norm),
        decided & 0xFFFFFFFF,
        grad_scale,
        0.0 if max_norm is None else max_norm,
        NOT_RUN,
        n_rows,
        0,
    )


def _single(x: float) -> float:
    """`x` if it can be rounded to float32, else inf with its sign."""
    return x if abs(x) < 3.4028235677973366e38 else math.copysign(math.inf, x)
