"""Builds the native modules; everything else is in pyproject.toml."""

import importlib.util
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

# The engine's headers come with its wheel; its functions are looked up at run time, so there is nothing to link.
unicorn = Path(importlib.util.find_spec("unicorn").origin).parent

MODULES = [
    "xipvm.trace.table",
    "xipvm.trace.emit",
    "xipvm.trace.history",
    "xipvm.check.world",
    "xipvm.check.usual",
    "xipvm.mmu.frames",
    "xipvm.mmu.tables",
    "xipvm.cpu.core",
]

setup(
    ext_modules=cythonize(
        [
            Extension(
                name,
                [name.replace(".", "/") + ".pyx"],
                include_dirs=[str(unicorn / "include")],
                extra_compile_args=["-O2", "-fno-strict-aliasing"],
            )
            for name in MODULES
        ],
        language_level=3,
    )
)
