"""The directive `kernel-text`: a rule as it is written, the Cython that is generated from it, the machine code of that.

```{kernel-text} adam assembly
```
"""

import inspect
import re
import shutil
import subprocess
import textwrap
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive

from fastopt import _codegen
from fastopt._instruction_sets import INSTRUCTION_SETS
from fastopt.backends import cpu
from fastopt.rules import registry

TEMPLATE = Path(__file__).resolve().parents[2] / "kernels" / "kernels.pyx.in"
LANGUAGES = {"rule": "python", "scalars": "python", "reference": "python", "cython": "cython", "assembly": "nasm"}


def python_text(function):
    """The source of a rule, of its host scalars or of its reference."""
    return textwrap.dedent(inspect.getsource(function))


def cython_text(name):
    """What is compiled for the kernel `name` with float32 states: its loop, and the tile that calls it."""
    spec = next(spec for spec in registry.values() if any(kernel.name == name for kernel in _codegen.kernels(spec)))
    source = _codegen.cython_source([spec], TEMPLATE, "baseline")
    kinds = ("inline void {}_span", "void {}_tile")
    found = [
        re.search(rf"^cdef {kind.format(name)}\(.*?\n(?=\n\n)", source, re.DOTALL | re.MULTILINE) for kind in kinds
    ]
    return "\n\n".join(match[0] for match in found)


def extension(isa):
    """The compiled kernels of an instruction set, or None where they were not built."""
    return next(iter(sorted(Path(cpu.__file__).parent.glob(f"{INSTRUCTION_SETS[isa].module}.*so"))), None)


def assembly_text(name, isas=tuple(INSTRUCTION_SETS)):
    """The loop of the compiled kernel `name` for the last of `isas` that was built: (instruction set, text).

    Or (None, why there is none).
    """
    built = next(((isa, extension(isa)) for isa in reversed(isas) if extension(isa)), None)
    if built is None:
        return None, "no compiled kernels were found"
    if shutil.which("objdump") is None:
        return None, "objdump is not installed"
    isa, path = built
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", "-M", "intel", str(path)], capture_output=True, text=True, check=True
    ).stdout
    function = re.search(rf"^[0-9a-f]+ <\w*_{name}_tile>:\n(.*?)\n\n", listing, re.DOTALL | re.MULTILINE)
    found = function and loop(function[1])
    return (isa, found) if found else (None, f"objdump shows no {name} in this build")


def loop(listing):
    """The first loop of a function that fetches ahead: from the target of a backward jump to the jump."""
    lines = [re.match(r"\s*([0-9a-f]+):\s+(.*)", line) for line in listing.splitlines()]
    code = [(int(match[1], 16), match[2].strip()) for match in lines if match]
    for end, (address, text) in enumerate(code):
        jump = re.match(r"j\w+\s+([0-9a-f]+)", text)
        if jump is None or int(jump[1], 16) > address:
            continue
        body = [t for a, t in code[: end + 1] if a >= int(jump[1], 16)]
        if any(t.startswith("prefetch") for t in body):
            body[-1] = re.sub(r"(j\w+\s+).*", r"\1loop", body[-1])
            return "\n".join(["loop:", *("    {:<14}{}".format(*t.split(None, 1)) for t in body)])
    return None


class KernelText(Directive):
    """``kernel-text NAME KIND``, KIND one of `LANGUAGES`."""

    required_arguments = 2

    def run(self):
        name, kind = self.arguments
        if kind not in LANGUAGES:
            raise self.error(f"kernel-text: expected one of {', '.join(LANGUAGES)}, got {kind!r}")
        if kind == "cython":
            text = cython_text(name)
        elif kind == "assembly":
            isa, text = assembly_text(name)
            if isa is None:
                return [nodes.paragraph("", f"(The machine code is not shown here: {text}.)")]
            text = f"; {name}, {isa}: 16 parameters\n{text}"
        else:
            text = python_text(getattr(registry[name], kind))
        return [nodes.literal_block(text, text, language=LANGUAGES[kind])]


def setup(app):
    app.add_directive("kernel-text", KernelText)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
