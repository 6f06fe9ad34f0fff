"""``xipvm attach``: a remote node on the command line."""

from __future__ import annotations

import os
import select
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from xipvm.address import parse_size
from xipvm.errors import BadInput, MmError, XipvmError, os_reason
from xipvm.xpmem.node import NodeAttachment, OwnerGoneError, XpmemNode, only_segment
from xipvm.xpmem.sockets import SocketLink, connect
from xipvm.xpmem.wire import FROM_OWNER, WireError

_PROMPT: Final = "xpmem> "
_LINE: Final = 16


def attach_segment(
    path: str, words: Sequence[str], *, segment: str | None, readonly: bool, timeout: float, interval: float
) -> int:
    """Attach what is served on ``path`` and do the verb ``words``, or those of standard input. Raises XipvmError."""
    if words:
        check(words)
    link = SocketLink(connect(path), "the owner", FROM_OWNER, timeout=timeout)
    node = XpmemNode(link, f"pid {os.getpid()}")
    try:
        node.hello()
        name = only_segment(node, segment)
        session = Session(node, link, name, *_attached(node, name, readonly), interval)
        try:
            return session.do(words) if words else session.listen()
        finally:
            session.leave()
    except WireError as error:
        raise BadInput(f"{path}: {error}") from None
    except OwnerGoneError as error:
        if not node.segments:  # it has never said a word that was understood
            raise BadInput(f"{path}: {error}") from None
        raise
    finally:
        node.close()


def _attached(node: XpmemNode, name: str, readonly: bool) -> tuple[int, NodeAttachment, bool]:
    """The permit, the attachment, and whether it may be written."""
    write = not readonly
    try:
        permit, size = node.get(name, write=write)
    except MmError:
        write = False
        permit, size = node.get(name, write=False)
    return permit, node.attach(permit, 0, size), write


def _number(text: str, what: str) -> int:
    """An OFFSET or a SIZE. Raises BadInput."""
    try:
        return parse_size(text)
    except ValueError:
        article = "an" if what == "OFFSET" else "a"
        raise BadInput(f"{text!r} is not {article} {what}; write it as 4096, 0x1000 or 64K") from None


def _data(text: str) -> bytes:
    """What ``write`` stores. Raises BadInput."""
    if text.startswith("@"):
        try:
            with open(text[1:], "rb") as file:
                return file.read()
        except OSError as error:
            raise BadInput(f"{text[1:]}: {os_reason(error)}") from None
    if text.startswith("0x"):
        try:
            return bytes.fromhex(text[2:])
        except ValueError:
            raise BadInput(f"{text}: not bytes in hexadecimal") from None
    return text.encode(errors="surrogateescape")


_VERBS: Final = {
    "info": ((), "what there is, and how often pages were faulted and recalled"),
    "read": (("OFFSET", "SIZE"), "bytes, as they are, on standard output"),
    "dump": (("OFFSET", "SIZE"), "the same, to be read by people"),
    "write": (("OFFSET", "TEXT"), "store TEXT; 0x... are bytes in hexadecimal, @FILE those of a file"),
    "watch": (("OFFSET", "SIZE"), "show them whenever they change, until Ctrl-C"),
}
"""What each needs and does."""
_AT_THE_PROMPT: Final = {
    "help": "these lines; so does ?",
    "quit": "leave; so does the end of the input",
}


def _help() -> str:
    does = {" ".join((verb, *needed)): what for verb, (needed, what) in _VERBS.items()} | _AT_THE_PROMPT
    width = max(map(len, does))
    return "".join(f"{verb:{width}}  {what}\n" for verb, what in does.items())


def check(words: Sequence[str], *, prompt: bool = False) -> None:
    """Raises BadInput unless ``words`` are a verb and what it needs. ``prompt``: somebody could say more than those."""
    verb, *arguments = words
    if verb not in _VERBS:
        known = [*_VERBS, *(_AT_THE_PROMPT if prompt else ())]
        raise BadInput(f"no verb is called {verb!r}; known are {', '.join(known)}")
    needed, _ = _VERBS[verb]
    if len(arguments) != len(needed):
        raise BadInput(f"{' '.join((verb, *needed))}: {len(arguments)} given")
    for argument, name in zip(arguments, needed, strict=True):
        if name == "TEXT":
            _data(argument)
        else:
            _number(argument, name)


class Session:
    """One attachment and its user."""

    def __init__(
        self,
        node: XpmemNode,
        link: SocketLink,
        name: str,
        permit: int,
        at: NodeAttachment,
        write: bool,
        interval: float,
    ) -> None:
        self.node = node
        self.link = link
        self.name = name
        self.permit = permit
        self.at = at
        self.write = write
        self.interval = interval

    def leave(self) -> None:
        """Detach, unless there is nobody to tell."""
        with suppress(OwnerGoneError, WireError, MmError):
            self.node.detach(self.at)
            self.node.release(self.permit)

    def do(self, words: Sequence[str]) -> int:
        """One verb, which was checked. Raises BadInput, MmError and OwnerGoneError."""
        verb, *arguments = words
        if verb == "info":
            rights = "read and write" if self.write else "read only"
            print(f"{self.name}: {self.at.size:#x} bytes, {rights}")
            print(f"{self.node.faults} faults, {self.node.recalls} pages recalled, {len(self.at.table)} translated")
            return 0
        offset = _number(arguments[0], "OFFSET")
        if verb == "write":
            if not self.write:
                raise BadInput(f"{self.name} is attached for reading only")
            data = _data(arguments[1])
            self._inside(offset, len(data))
            self.node.store(self.at, offset, data)
            return 0
        size = _number(arguments[1], "SIZE")
        self._inside(offset, size)
        if verb == "watch":
            return self._watch(offset, size)
        data = self.node.load(self.at, offset, size)
        if verb == "read":
            sys.stdout.flush()
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        else:
            _dump(offset, data)
        return 0

    def _inside(self, offset: int, size: int) -> None:
        if offset + size > self.at.size:
            raise BadInput(f"{size:#x} bytes at {offset:#x}: {self.name} has {self.at.size:#x}")

    def _watch(self, offset: int, size: int) -> int:
        self.node.on_recall = lambda attachment, pages: print(
            f"the owner has taken back page{'s' if len(pages) != 1 else ''} {', '.join(map(str, pages))}", flush=True
        )
        before: bytes | None = None
        while True:
            data = self.node.load(self.at, offset, size)
            if data != before:
                print(time.strftime("%H:%M:%S"))
                _dump(offset, data)
                sys.stdout.flush()
                before = data
            self._attend((), self.interval)

    def _attend(self, others: Sequence[int], seconds: float | None) -> bool:
        """Answer the owner until one of ``others`` can be read (True) or so many seconds are over (False)."""
        until = None if seconds is None else time.monotonic() + seconds
        while True:
            left = None if until is None else max(until - time.monotonic(), 0.0)
            poller = select.poll()
            for fd in (self.link.fileno(), *others):
                poller.register(fd, select.POLLIN)
            readable = [fd for fd, _ in poller.poll(None if left is None else left * 1000)]
            if self.link.fileno() in readable:
                self.node.serve()
                if self.link.closed:
                    raise self.node.gone_error()
            elif readable:
                return True
            elif until is not None and time.monotonic() >= until:
                return False

    def listen(self) -> int:
        """Do the verbs of standard input, a line each, until its end or ``quit``; 1 when one of them failed."""
        person = sys.stdin.isatty() and sys.stdout.isatty()
        status = 0
        pending = b""
        if person:
            print(f"{self.name}: {self.at.size:#x} bytes; {', '.join((*_VERBS, *_AT_THE_PROMPT))}")
        while True:
            while b"\n" in pending:
                line, _, pending = pending.partition(b"\n")
                words = self._words(line)
                if words == ["quit"]:
                    return status
                if words is None or not self._one(words):
                    status = 1
            if person:
                sys.stdout.write(_PROMPT)
            sys.stdout.flush()
            self._attend((0,), None)
            data = os.read(0, 4096)
            if not data and not pending:
                if person:
                    print()
                return status
            pending += data or b"\n"

    def _words(self, line: bytes) -> list[str] | None:
        try:
            return shlex.split(line.decode(errors="surrogateescape"))
        except ValueError as error:
            _say(str(error))
            return None

    def _one(self, words: list[str]) -> bool:
        """Whether it could be done. An owner that has gone ends it all."""
        if not words:
            return True
        try:
            if words in (["help"], ["?"]):
                sys.stdout.write(_help())
            else:
                check(words, prompt=True)
                self.do(words)
        except OwnerGoneError:
            raise
        except KeyboardInterrupt:
            print()  # back to the prompt, as from watch
        except XipvmError as error:
            _say(str(error))
            return False
        finally:
            self.node.on_recall = lambda attachment, pages: None
        return True


def _dump(offset: int, data: bytes) -> None:
    for at in range(0, len(data), _LINE):
        line = data[at : at + _LINE]
        text = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in line)
        print(f"{offset + at:08x}  {line.hex(' '):{3 * _LINE - 1}}  {text}")


def _say(line: str) -> None:
    sys.stderr.write(f"xipvm: {' '.join(line.split())}\n")
