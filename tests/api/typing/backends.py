"""Every backend is what `fastopt.backends.interface` says, for type checkers."""

from fastopt.backends import cpu, cuda, reference
from fastopt.backends.interface import Backend

BACKENDS: list[Backend] = [cpu, cuda, reference]
