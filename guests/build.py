"""Builds the guests: C and assembler sources to ELFs executed in place, one for each board.

    python guests/build.py              build everything into guests/bin/
    python guests/build.py hello token  only these
    python guests/build.py --check      build elsewhere and compare with guests/bin/ byte for byte

The compiler is the `ziglang` wheel (clang and lld for every target in one package), pinned, so that the same sources
give the same bytes on every host: names are relative to this folder, there are no build ids, no debug information and
no comment sections. Symbol tables stay, for symbolic reports.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ZIGLANG = "ziglang==0.17.1"
HERE = Path(__file__).resolve().parent
BIN = HERE / "bin"

COMMON = ("print", "memory", "trap", "flash")
CFLAGS = (
    "-std=c11",
    "-O2",
    "-g0",
    "-ffreestanding",
    "-ffunction-sections",
    "-fdata-sections",
    "-fno-pic",
    "-fno-sanitize=all",
    "-fno-stack-protector",
    "-fno-unwind-tables",
    "-fno-asynchronous-unwind-tables",
    "-fno-delete-null-pointer-checks",  # flash begins at address 0
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Icommon",
)
LDFLAGS = ("--gc-sections", "--build-id=none", "--no-relax", "--discard-locals", "-z", "max-page-size=4096", "-Lcommon")


@dataclass(frozen=True)
class Isa:
    """A target: what the compiler has to know of the board's CPU."""

    name: str
    flags: tuple[str, ...]


ISAS = (
    # With the MMU off all memory is Device memory: unaligned accesses may trap.
    Isa("arm64", ("-target", "aarch64-freestanding-none", "-mcpu=generic-neon-fp_armv8", "-mstrict-align")),
    Isa(
        "riscv64",
        ("-target", "riscv64-freestanding-none", "-mcpu=generic_rv64+m+a+c", "-mabi=lp64", "-mcmodel=medany"),
    ),
)


@dataclass(frozen=True)
class Guest:
    """One ELF an ISA: its source beside the common ones, and macros that select a variant."""

    name: str
    source: str
    defines: tuple[str, ...] = ()


@dataclass(frozen=True)
class System:
    """A guest of several programs: a kernel that has their ELFs in flash. ``name`` is its folder, too.

    {isa} in a source stands for the ISA. Linked by <name>/kernel-<isa>.ld, each program by <name>/user.ld.
    """

    name: str
    kernel: tuple[str, ...]
    library: tuple[str, ...]
    programs: tuple[str, ...]


GUESTS: tuple[Guest | System, ...] = (
    Guest("hello", "hello.c"),
    Guest("selfmod", "selfmod.c"),
    Guest("selfmod-alias", "selfmod.c", ("ALIAS_BASE=0x2000000000",)),
    Guest("selfmod-smp", "selfmod-smp.c"),
    Guest("reprogram", "reprogram.c"),
    Guest("warmloop", "warmloop.c"),
    Guest("faults", "faults.c"),
    Guest("crash", "crash.c"),
    Guest("panic", "crash.c", ("VECTORS",)),
    Guest("user", "user.c"),
    Guest("paging", "paging.c"),
    Guest("rights", "rights.c"),
    Guest("shootdown", "shootdown.c"),
    Guest("clocks", "clocks.c"),
    Guest("pages", "pages.c"),
    Guest("dma", "dma.c"),
    Guest("token", "token.c"),
    System(
        "processes",
        kernel=(
            "processes/entry-{isa}.S",
            "processes/machine-{isa}.c",
            "processes/processes.c",
            "processes/vm.c",
            "processes/programs.S",
            "common/print.c",
            "common/memory.c",
        ),
        library=("processes/user.c", "common/print.c", "common/memory.c"),
        programs=("init", "hash", "upper", "worker"),
    ),
    Guest("store", "kernels/store.c"),
    Guest("sort", "kernels/sort.c"),
    Guest("crc", "kernels/crc.c"),
    Guest("matrix", "kernels/matrix.c"),
    Guest("thrash", "kernels/thrash.c"),
    Guest("coldfault", "kernels/coldfault.c"),
)


class BuildError(Exception):
    """The toolchain is missing or has refused a source; the text is for the user."""


def zig(*arguments: str, folder: Path = HERE) -> None:
    """Runs the wheel's zig in ``folder``; raises BuildError with what it printed."""
    if importlib.util.find_spec("ziglang") is None:
        raise BuildError(f"the guests' compiler is not installed: {sys.executable} -m pip install {ZIGLANG}")
    done = subprocess.run(
        [sys.executable, "-m", "ziglang", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode != 0 or done.stderr:
        raise BuildError(done.stderr or f"zig {arguments[0]}: status {done.returncode}")


def compile_source(isa: Isa, source: str, defines: Iterable[str], output: Path, *flags: str) -> Path:
    """Compiles or assembles one source, named relative to this folder."""
    zig("cc", *isa.flags, *CFLAGS, *flags, *(f"-D{define}" for define in defines), "-c", source, "-o", str(output))
    return output


def link(script: str, objects: Iterable[Path], output: Path, *flags: str) -> None:
    """Links one ELF by a linker script."""
    output.parent.mkdir(parents=True, exist_ok=True)
    zig("ld.lld", *LDFLAGS, *flags, "-T", script, *map(str, objects), "-o", str(output))


def build_system(isa: Isa, system: System, scratch: Path, output: Path) -> None:
    """Builds the programs, and then the kernel that carries them."""
    scratch.mkdir()

    def compiled(sources: Iterable[str], prefix: str) -> list[Path]:
        named = [source.format(isa=isa.name) for source in sources]
        return [
            compile_source(isa, source, (), scratch / f"{prefix}{index}.o", f"-I{scratch}", f"-Wa,-I{scratch}")
            for index, source in enumerate(named)
        ]

    library = compiled(system.library, "library")
    for name in system.programs:
        main = compiled((f"{system.name}/{name}.c",), name)
        link(f"{system.name}/user.ld", [*main, *library], scratch / name, "-z", "max-page-size=4096", "--strip-all")
    link(f"{system.name}/kernel-{isa.name}.ld", compiled(system.kernel, "kernel"), output, f"-L{system.name}")


def differences(built: Iterable[Path], fresh: Path, committed: Path) -> list[str]:
    """Names below ``fresh`` of the built files that differ from those below ``committed``, or are missing there."""
    names = [path.relative_to(fresh) for path in built]
    return [
        str(name)
        for name in names
        if not (committed / name).is_file() or (committed / name).read_bytes() != (fresh / name).read_bytes()
    ]


def build(guests: Iterable[Guest | System], isas: Iterable[Isa], output: Path) -> list[Path]:
    """Builds into output/<isa>/<guest>-<isa>.elf and returns the paths."""
    built = []
    with tempfile.TemporaryDirectory() as scratch:
        for isa in isas:
            sources = [f"common/start-{isa.name}.S", f"common/{isa.name}.c", *(f"common/{name}.c" for name in COMMON)]
            common = [
                compile_source(isa, source, (), Path(scratch, f"{isa.name}-{index}.o"))
                for index, source in enumerate(sources)
            ]
            for guest in guests:
                elf = output / isa.name / f"{guest.name}-{isa.name}.elf"
                if isinstance(guest, System):
                    build_system(isa, guest, Path(scratch, f"{isa.name}-{guest.name}"), elf)
                else:
                    main = compile_source(isa, guest.source, guest.defines, Path(scratch, f"{isa.name}-{guest.name}.o"))
                    link(f"common/{isa.name}.ld", [*common, main], elf)
                built.append(elf)
    return built


def check(guests: Iterable[Guest | System], isas: Iterable[Isa]) -> list[str]:
    """Rebuilds elsewhere and returns the names that differ from guests/bin/, or are missing there."""
    with tempfile.TemporaryDirectory() as fresh:
        return differences(build(guests, isas, Path(fresh)), Path(fresh), BIN)


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Builds the guests.")
    parser.add_argument("names", nargs="*", metavar="GUEST", help="only these (default: all)")
    parser.add_argument("--check", action="store_true", help="compare a fresh build with guests/bin/")
    parser.add_argument("--isa", choices=[isa.name for isa in ISAS], help="only this ISA")
    options = parser.parse_args()

    unknown = set(options.names) - {guest.name for guest in GUESTS}
    if unknown:
        parser.error(f"no such guest: {', '.join(sorted(unknown))}")
    guests = [guest for guest in GUESTS if not options.names or guest.name in options.names]
    isas = [isa for isa in ISAS if options.isa in (None, isa.name)]
    try:
        if options.check:
            different = check(guests, isas)
            print("\n".join(f"differs: {name}" for name in different) or "all guests are what their sources give")
            return 1 if different else 0
        for elf in build(guests, isas, BIN):
            print(elf.relative_to(HERE))
    except BuildError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
