"""The command line, thin: parse, call, print.

``main`` is the console script. The exit status is the guest's own; 1 when the guest crashed, 2 for bad usage or
input, 124 for a time or instruction limit, 130 for Ctrl-C. Errors are one line on stderr.

Start-up time is part of every short run, so a command imports what it needs when it is used, and nothing
here imports rich, numpy, capstone or pyelftools for ``xipvm run``.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

from xipvm.errors import BadInput, InternalError, XipvmError, os_reason

BAD_INPUT = 2
FAILED = 1
INTERRUPTED = 130
BROKEN_PIPE = 141
"""What a shell reports for a process that SIGPIPE ended."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line ``argv`` (without the program's name; by default the process's) and exit."""
    _prepare_streams()
    status = _call(argv)
    try:
        sys.stdout.flush()
    except OSError as error:
        # What is left in the buffer would raise again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            status = BROKEN_PIPE
        elif status != BAD_INPUT:
            status = _say(f"standard output: {os_reason(error)}", BAD_INPUT)
    sys.exit(status)


def _prepare_streams() -> None:
    """Have a standard output and error, even where the parent closed them, that any file name can be printed to."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the life of the process)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")


def _call(argv: Sequence[str] | None) -> int:
    import click

    from xipvm.cli.commands import OutputClosedError, cli

    try:
        status = cli.main(args=argv, prog_name="xipvm", standalone_mode=False)
    except BadInput as error:
        return _say(str(error), BAD_INPUT)
    except InternalError as error:
        return _say(f"internal error, please report it: {error}", FAILED)
    except XipvmError as error:
        return _say(str(error), FAILED)
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx is not None else "xipvm"
        return _say(f"{error.format_message()} (see {where} --help)", BAD_INPUT)
    except click.ClickException as error:
        return _say(error.format_message(), BAD_INPUT)
    except (KeyboardInterrupt, click.Abort):
        return _say("interrupted", INTERRUPTED)
    except OutputClosedError:
        return BROKEN_PIPE
    except OSError as error:
        return _say(f"{error.filename or 'standard output'}: {os_reason(error)}", BAD_INPUT)
    return status if isinstance(status, int) else 0


def _say(line: str, status: int) -> int:
    """Print an error of one line on stderr; ``status`` is returned."""
    sys.stderr.write(f"xipvm: {' '.join(line.split())}\n")
    return status
