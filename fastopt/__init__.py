"""Fused, in-place optimizer kernels over flat float32 buffers. The public names, nothing else."""

import typing as _typing

from fastopt._arrays.flat_buffer import FlatBuffer as FlatBuffer
from fastopt._core.optimizer import Optimizer as Optimizer
from fastopt._core.options import StepInfo as StepInfo
from fastopt._info import __version__ as __version__
from fastopt._info import info as info
from fastopt._threads import get_num_threads as get_num_threads
from fastopt._threads import set_num_threads as set_num_threads
from fastopt.optimizers import *  # noqa: F403

if _typing.TYPE_CHECKING:
    from fastopt import cuda as cuda
    from fastopt import functional as functional
    from fastopt import lr_scheduler as lr_scheduler
    from fastopt import reference as reference
    from fastopt.early_stopping import EarlyStopping as EarlyStopping
else:  # a type checker that saw these functions would believe in any name
    _IMPORTED_WHEN_ASKED_FOR = {
        "EarlyStopping": "fastopt.early_stopping",
        "cuda": "fastopt.cuda",
        "functional": "fastopt.functional",
        "lr_scheduler": "fastopt.lr_scheduler",
        "reference": "fastopt.reference",
    }

    def __getattr__(name):
        """Modules, and what is in them, that not every program needs: they would double the time of the import."""
        import importlib

        if name not in _IMPORTED_WHEN_ASKED_FOR:
            raise AttributeError(f"module 'fastopt' has no attribute {name!r}")
        module = importlib.import_module(_IMPORTED_WHEN_ASKED_FOR[name])
        globals()[name] = getattr(module, name, module)
        return globals()[name]

    def __dir__():
        return sorted({*globals(), *_IMPORTED_WHEN_ASKED_FOR} - {"cuda"})  # which needs packages of its own
