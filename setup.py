"""Generates the Cython text from the rules and builds one extension per instruction set. Nothing else."""

import os
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))

from fastopt import _codegen, optimizers  # noqa: E402, F401
from fastopt._core import functions  # noqa: E402
from fastopt._instruction_sets import for_this_machine  # noqa: E402
from fastopt.rules import registry  # noqa: E402

GENERATED = Path("build", "generated")


class BuildKernels(build_ext):
    """build_ext that generates first and asks the compiler what it can do."""

    def run(self):
        import numpy
        from Cython.Build import cythonize

        GENERATED.mkdir(parents=True, exist_ok=True)
        texts = {"formats.h": _codegen.formats_header(), "gradient_stage.pxi": _codegen.gradient_stage_source()}
        for row in for_this_machine():
            texts[f"{row.module}.pyx"] = _codegen.cython_source(
                registry.values(), Path("kernels", "kernels.pyx.in"), row.name
            )
        for name, text in texts.items():
            path = GENERATED / name
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                path.write_text(text, encoding="utf-8")
        for extension in self.extensions:
            is_engine = extension.name.endswith("._engine")
            extension.include_dirs += ["kernels", str(GENERATED), numpy.get_include()]
            extension.depends += [
                str(path)
                for folder in ("kernels", GENERATED)
                for path in Path(folder).iterdir()
                if path.suffix in (".h", ".pxd") or (is_engine and path.suffix == ".pxi")
            ]
        made = cythonize(
            self.extensions,
            include_path=["kernels", str(GENERATED)],
            build_dir=str(GENERATED),
            language_level=3,
            quiet=True,
        )
        for path in GENERATED.glob("*/**/*.h"):
            path.unlink()  # Cython copies headers beside its C files, where stale ones would be found first
        for extension, cythonized in zip(self.extensions, made, strict=True):
            extension.sources = cythonized.sources
        self.parallel = self.parallel or os.cpu_count()
        super().run()

    def build_extensions(self):
        flags = [flag for flag in _codegen.FLAGS if self.compiles([flag])]
        if "-ffp-contract=off" not in flags and self.compiler.compiler_type != "msvc":
            raise SystemExit("fastopt needs a compiler that knows -ffp-contract=off, such as GCC or Clang")
        openmp = ["-fopenmp"] if self.compiles(["-fopenmp"], "#include <omp.h>\nint main(void) { return 0; }") else []
        if not openmp:
            print("fastopt: this compiler has no OpenMP; every step will run on one thread")
        wanted = {f"fastopt.backends.{row.module}": row.flags for row in for_this_machine()}
        unsupported = [name for name, extra in wanted.items() if extra and not self.compiles(extra)]
        for name in unsupported:
            print(f"fastopt: this compiler cannot build {name}; it is left out")
        self.extensions = [extension for extension in self.extensions if extension.name not in unsupported]
        for extension in self.extensions:
            extension.extra_compile_args = [*flags, *openmp, *wanted.get(extension.name, [])]
            extension.extra_link_args = list(openmp)
        super().build_extensions()

    def compiles(self, flags, text="int main(void) { return 0; }"):
        """Whether the compiler makes a program of `text` under `flags`."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.c")
            source.write_text(text, encoding="utf-8")
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=["-Werror", *flags])
                self.compiler.link_executable(objects, "probe", output_dir=folder, extra_postargs=flags)
            except Exception:  # every compiler class has its own
                return False
        return True


class BuildStubs(build_py):
    """build_py that first writes the type stubs of the functions made from the registry."""

    def run(self):
        for name, backend in (("functional", "cpu"), ("reference", "reference")):
            Path("fastopt", f"{name}.pyi").write_text(functions.stub(backend), encoding="utf-8")
        super().run()


setup(
    ext_modules=[
        Extension("fastopt.backends._engine", ["kernels/engine.pyx"]),
        *(
            Extension(f"fastopt.backends.{row.module}", [str(GENERATED / f"{row.module}.pyx")])
            for row in for_this_machine()
        ),
    ],
    cmdclass={"build_ext": BuildKernels, "build_py": BuildStubs},
)
