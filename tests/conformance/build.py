"""Builds the conformance programs: one ELF an instruction, in bin/.

    python tests/conformance/build.py            build all of them
    python tests/conformance/build.py --check    build elsewhere and compare byte for byte

Compiler and rules are the guests' (guests/build.py).
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
BIN = HERE / "bin"


def sibling(name: str, path: Path) -> ModuleType:
    """Imports the script at ``path``, which is in no package."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


guests = sibling("guests_build", HERE.parents[1] / "guests" / "build.py")
sibling("model", HERE / "model.py")
programs = sibling("programs", HERE / "programs.py")

TARGET = ("-target", "riscv64-freestanding-none", "-mcpu=generic_rv64+m+a+c", "-mabi=lp64", "-g0")


def build(output: Path) -> list[Path]:
    """Builds every program into ``output`` and returns the paths; raises guests.BuildError."""
    output.mkdir(parents=True, exist_ok=True)
    built = []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        guests.zig("cc", *TARGET, "-c", "environment.S", "-o", str(scratch / "environment.o"), folder=HERE)
        for program, text in programs.programs():
            (scratch / f"{program}.S").write_text(text)
            guests.zig("cc", *TARGET, "-c", f"{program}.S", "-o", f"{program}.o", folder=scratch)
            elf = output / f"{program}.elf"
            inputs = (str(scratch / "environment.o"), str(scratch / f"{program}.o"))
            guests.zig("ld.lld", *guests.LDFLAGS, "-T", "link.ld", *inputs, "-o", str(elf), folder=HERE)
            built.append(elf)
    return built


def check() -> list[str]:
    """Rebuilds elsewhere and returns the names that differ from bin/, or are missing there."""
    with tempfile.TemporaryDirectory() as fresh:
        return list(guests.differences(build(Path(fresh)), Path(fresh), BIN))


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Builds the conformance programs.")
    parser.add_argument("--check", action="store_true", help="compare a fresh build with bin/")
    options = parser.parse_args()
    try:
        if options.check:
            different = check()
            print("\n".join(f"differs: {name}" for name in different) or "all programs are what their sources give")
            return 1 if different else 0
        print(f"{len(build(BIN))} programs in {BIN.name}/")
    except guests.BuildError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
