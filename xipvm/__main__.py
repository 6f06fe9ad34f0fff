"""``python -m xipvm`` is the command line."""

from __future__ import annotations

from xipvm.cli import main

main()
