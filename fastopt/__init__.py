"""Fused, in-place optimizer kernels over flat float32 buffers. The public names, nothing else."""

import typing as _typing

from fastopt import functional as functional
from fastopt import lr_scheduler as lr_scheduler
from fastopt import reference as reference
from fastopt._arrays.flat_buffer import FlatBuffer as FlatBuffer
from fastopt._core.optimizer import Optimizer as Optimizer
from fastopt._core.options import StepInfo as StepInfo
from fastopt._info import __version__ as __version__
from fastopt._info import info as info
from fastopt._threads import get_num_threads as get_num_threads
from fastopt._threads import set_num_threads as set_num_threads
from fastopt.early_stopping import EarlyStopping as EarlyStopping
from fastopt.optimizers import *  # noqa: F403

if _typing.TYPE_CHECKING:
    from fastopt import cuda as cuda
else:  # a type checker that saw this function would believe in any name

    def __getattr__(name):
        """`fastopt.cuda`, imported when it is first asked for: it needs packages of its own."""
        import importlib

        if name == "cuda":
            return importlib.import_module("fastopt.cuda")
        raise AttributeError(f"module 'fastopt' has no attribute {name!r}")
