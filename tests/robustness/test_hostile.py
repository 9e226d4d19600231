"""What callers hand over is checked for what it really is and held: no object, however odd, reaches past its memory.

Each of these ended the process, or could have; so they run in processes of their own.
"""

import collections.abc
import mmap
import numbers
import resource
import sys
import threading
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import fastopt
from tests.support import operations
from tests.support.faults import alone

F32 = np.float32


def ones(*shape):
    return np.ones(shape, F32)


# --- Memory that runs out


def _address_space(n_bytes):
    """Let this process have `n_bytes` more than now; None for as much as there is."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = resource.RLIM_INFINITY if n_bytes is None else pages * resource.getpagesize() + n_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


needs_address_space = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="needs Linux, to limit and know the address space"
)


@needs_address_space
@pytest.mark.parametrize("kind", ["lamb", "adamw-split", "adam-8bit"])
@alone
def test_a_group_that_does_not_fit_into_memory_is_not_added(kind):
    """Whatever part of what is kept for it still fits."""
    structure, master = operations.KINDS[kind][1], operations.KINDS[kind][3].get("master")
    scene = operations.scene(kind, "cpu")
    large = np.zeros(2 << 20, np.uint16 if master else F32)
    group = {"params": {"large": large} if structure == "mapping" else [large]}
    before = operations.seen(scene)
    n_refused = 0
    for mebibytes in range(2, 200, 3):
        _address_space(mebibytes << 20)
        try:
            scene.optimizer.add_param_group(group)
        except (MemoryError, OSError):
            n_refused += 1
        else:
            break
        finally:
            _address_space(None)
        assert operations.seen(scene) == before
        twin = operations.scene(kind, "cpu")
        twin.step(5, max_norm=1.0)
        scene.step(5, max_norm=1.0)
        assert operations.seen(scene) == operations.seen(twin)
        scene = operations.scene(kind, "cpu")
    assert n_refused > 3
    assert len(scene.optimizer.param_groups) == 2
    scene.arrays["large"] = large
    scene.step(5)


@needs_address_space
@pytest.mark.parametrize("kind", ["lamb", "nadam"])
@alone
def test_a_sparse_file_of_128_gib_is_refused_for_lack_of_memory(kind, tmp_path):
    scene = operations.scene(kind, "cpu")
    before = operations.seen(scene)
    with open(tmp_path / "parameter", "wb") as file:
        file.truncate(128 << 30)
    _address_space(200 << 30)  # some systems grant more memory than they have, and would fill it
    large = np.memmap(tmp_path / "parameter", F32, "r+")
    params = [large] if operations.KINDS[kind][1] == "sequence" else {"large": large}
    with pytest.raises((MemoryError, OSError)):
        scene.optimizer.add_param_group({"params": params})
    assert operations.seen(scene) == before
    scene.step(5)


@needs_address_space
@alone
def test_threads_that_cannot_be_started_are_done_without():
    """A step in a process that may start no thread any more runs on those there are."""
    n = 1 << 20
    expected = ones(n)
    fastopt.SGD(expected, lr=0.5, n_threads=1).step(ones(n))
    p, g = ones(n), ones(n)
    optimizer = fastopt.SGD(p, lr=0.5, n_threads=16)
    _address_space(4 << 20)  # OpenMP's stacks are 8 MiB each
    try:
        optimizer.step(g)
    finally:
        _address_space(None)
    assert p.tobytes() == expected.tobytes()


# --- Objects that are not what they seem


CLAIMS_TO_BE_AN_ARRAY = {
    "params": lambda array: fastopt.SGD([ones(3), array]),
    "a single array": lambda array: fastopt.SGD(array),
    "names": lambda array: fastopt.SGD({"a": array}),
    "a group": lambda array: fastopt.SGD([ones(3)]).add_param_group({"params": [array]}),
    "update": lambda array: fastopt.SGD().update({"a": array}, {"a": ones(3)}),
    "grads": lambda array: fastopt.SGD([ones(3)]).step([array]),
    "grads by name": lambda array: fastopt.SGD({"a": ones(3)}).step({"a": array}),
    "grads of the reference": lambda array: fastopt.SGD([ones(3)], backend="reference").step([array]),
    "master": lambda array: fastopt.SGD([array], master="split"),
    "master_params": lambda array: fastopt.SGD([np.ones(3, np.uint16)], master="split").load_master_params([array]),
    "state": lambda array: _load_with(array),
    "functional": lambda array: fastopt.functional.sgd(array, ones(3)),
    "FlatBuffer": lambda array: fastopt.FlatBuffer({"a": array}),
}


def _load_with(array):
    optimizer = fastopt.Momentum([ones(3)])
    optimizer.step([ones(3)])
    saved = optimizer.state_dict()
    saved["state"][0]["velocity"] = array
    optimizer.load_state_dict(saved)


@pytest.mark.parametrize("where", CLAIMS_TO_BE_AN_ARRAY)
@alone
def test_an_object_that_claims_to_be_an_array_is_refused(where):
    array = mock.Mock(spec=np.ndarray)
    array.dtype, array.shape, array.size, array.ndim = np.dtype(F32), (3,), 3, 1
    with pytest.raises(TypeError, match="must be"):
        CLAIMS_TO_BE_AN_ARRAY[where](array)


class Longer(np.ndarray):
    """Says that it is longer than it is."""

    @property
    def shape(self):
        return (1 << 20,)

    @property
    def size(self):
        return 1 << 20


@alone
def test_a_parameter_counts_as_long_as_it_is():
    room = ones(5)
    p = room[1:4].view(Longer)
    optimizer = fastopt.Momentum([p], lr=0.5, ema_decay=0.5)
    optimizer.step([ones(3)])
    assert room.tolist() == [1, 0.5, 0.5, 0.5, 1]
    assert optimizer.state[0]["velocity"].shape == (3,)
    with optimizer.swap_ema():
        assert room.tolist() == [1, 0.75, 0.75, 0.75, 1]
    with pytest.raises(ValueError, match="shape"):
        optimizer.step([ones(1 << 20)])


@alone
def test_a_gradient_counts_as_long_as_it_is():
    p = np.zeros(1 << 20, F32)
    with pytest.raises(ValueError, match=r"float32 of shape \(1048576,\), got float32 of shape \(3,\)"):
        fastopt.SGD([p]).step([ones(3).view(Longer)])
    assert not p.any()


@alone
def test_a_state_counts_as_long_as_it_is():
    optimizer = fastopt.Momentum([np.zeros(1 << 20, F32)])
    optimizer.step([ones(1 << 20)])
    saved = optimizer.state_dict()
    saved["state"][0]["velocity"] = ones(3).view(Longer)
    with pytest.raises(ValueError, match=r"got float32 of shape \(3,\)"):
        optimizer.load_state_dict(saved)


class Number(numbers.Real):
    """A real number that does something when it is looked at."""

    def __init__(self, value, does):
        self.value, self.does = value, does

    def __float__(self):
        self.does()
        return self.value


for _name in numbers.Real.__abstractmethods__ - {"__float__"}:
    setattr(Number, _name, lambda *arguments: NotImplemented)
Number.__abstractmethods__ = frozenset()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@alone
def test_a_learning_rate_that_clears_the_groups_is_an_error(backend):
    params = [ones(3), ones(4)]
    optimizer = fastopt.Adam([{"params": [p]} for p in params], backend=backend)
    optimizer.step([ones(3), ones(4)])
    groups = list(optimizer.param_groups)
    before = [p.tobytes() for p in params]
    groups[0]["lr"] = Number(0.5, optimizer.param_groups.clear)
    with pytest.raises(ValueError, match="param_groups"):
        optimizer.step([ones(3), ones(4)])
    assert [p.tobytes() for p in params] == before
    groups[0]["lr"] = 0.5
    optimizer.param_groups[:] = groups
    optimizer.step([ones(3), ones(4)])
    assert int(optimizer.state[0]["step"]) == 2


@alone
def test_a_learning_rate_that_steps_is_refused():
    p = ones(3)
    optimizer = fastopt.Adam([p])
    optimizer.step([ones(3)])
    before = p.tobytes()
    optimizer.param_groups[0]["lr"] = Number(0.5, lambda: optimizer.step([ones(3)]))
    with pytest.raises(RuntimeError, match="under way"):
        optimizer.step([ones(3)])
    assert p.tobytes() == before


# --- Gradients that are gone


class Watched(np.ndarray):
    """Calls `seen` when Python code looks at its type."""

    seen = staticmethod(lambda: None)

    @property
    def dtype(self):
        Watched.seen()
        return super().dtype


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@alone
def test_gradients_are_held_while_python_code_of_one_changes_the_dict(backend):
    n = 1 << 20
    params = {name: np.zeros(n, F32) for name in "abc"}
    grads = {"a": ones(n).view(Watched), "b": ones(n), "c": ones(n)}

    def forget():
        for name in "bc":
            grads[name] = None
        grads["d"] = np.full(n, F32(9))

    optimizer = fastopt.SGD(params, lr=1.0, backend=backend)
    Watched.seen = staticmethod(forget)
    optimizer.step(grads)
    assert all(p.tolist() == [-1.0] * n for p in params.values())


@alone
def test_another_thread_may_rebind_the_keys_of_a_gradient_dict(tmp_path):
    n, names = 5000, [f"p{k}" for k in range(50)]
    params = {name: np.zeros(n, F32) for name in names}
    files = {name: np.memmap(tmp_path / name, F32, "w+", shape=n) for name in names[::2]}
    grads = {name: files.get(name, ones(n)) for name in names}
    done = threading.Event()

    def rebind():
        while not done.is_set():
            for name in names[1::2]:
                grads[name] = ones(n)

    optimizer = fastopt.SGD(params, lr=1.0)
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=rebind)
    thread.start()
    n_steps = 200
    try:
        for _ in range(n_steps):
            optimizer.step(grads)
    finally:
        done.set()
        thread.join()
    assert all((params[name] == -n_steps).all() for name in names[1::2])
    assert not any(params[name].any() for name in names[::2])


class Lazy(collections.abc.Mapping):
    """Makes its gradients when they are looked up."""

    def __init__(self, makers):
        self.makers, self.looked_up = makers, []

    def __getitem__(self, name):
        self.looked_up.append(name)
        return self.makers[name](self.looked_up.count(name))

    def __iter__(self):
        return iter(self.makers)

    def __len__(self):
        return len(self.makers)


def _in_read_only_memory(n):
    """Zeros whose pages cannot be written."""
    return np.frombuffer(mmap.mmap(-1, 4 * n, prot=mmap.PROT_READ), F32)


@pytest.mark.skipif(not hasattr(mmap, "PROT_READ"), reason="needs memory that cannot be written")
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@alone
def test_gradients_of_a_lazy_mapping_are_looked_up_once(backend):
    n = 1 << 15
    params, made = {"a": np.zeros(n, F32), "b": np.zeros(n, F32)}, []

    def make(count):
        made.append(ones(n) if count == 1 else _in_read_only_memory(n))
        return made[-1]

    grads = Lazy({"a": make, "b": make})
    fastopt.SGD(params, lr=1.0, backend=backend).step(grads, zero_grads=True)
    assert sorted(grads.looked_up) == ["a", "b"]
    assert all(p.tolist() == [-1.0] * n for p in params.values())
    assert not any(g.any() for g in made)


@pytest.mark.skipif(not hasattr(mmap, "PROT_READ"), reason="needs memory that cannot be written")
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@alone
def test_read_only_gradients_of_a_lazy_mapping_cannot_be_zeroed(backend):
    n = 1 << 15
    params = {"a": ones(n), "b": ones(n)}
    makers = [ones, lambda count: _in_read_only_memory(n)]
    grads = Lazy({"a": lambda count: makers[count > 1](n), "b": lambda count: _in_read_only_memory(n)})
    with pytest.raises(ValueError, match=r"grads\['b'\] must be writable for zero_grads"):
        fastopt.SGD(params, lr=1.0, backend=backend).step(grads, zero_grads=True)
    assert all((p == 1).all() for p in params.values())
