"""Two processes, by the command line: one runs a guest and exports memory, the other attaches it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.run.command import UBOOT, XIPVM, environment, inside, needs_uboot, read_until, start, xipvm
from tests.xpmem.test_sockets import RAM, WORD, guest
from xipvm.xpmem.sockets import listen


class Owner:
    """``xipvm run --export`` of the guest that counts until the node writes something."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.path = folder / "s"
        elf = guest(folder / "loop.elf")
        self.child = subprocess.Popen(
            [*XIPVM, "run", "--memory", "4M", "--export", f"ram={RAM + WORD:#x},64K,path={self.path},timeout=20",
             *options, str(elf)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment(),
        )  # fmt: skip
        self.said: list[str] = []
        assert "is exported on" in self.line()

    def line(self) -> str:
        """The next line of its standard error, which comes sooner or later."""
        assert self.child.stderr is not None
        line = self.child.stderr.readline().decode().rstrip("\n")
        self.said.append(line)
        return line

    def end(self) -> int:
        """Wait for its end."""
        assert self.child.stderr is not None
        self.said += self.child.stderr.read().decode().splitlines()
        return self.child.wait()


@contextmanager
def running(folder: Path, *options: str) -> Iterator[Owner]:
    owner = Owner(folder, *options)
    try:
        yield owner
    finally:
        if owner.child.poll() is None:
            owner.child.kill()
        owner.child.wait()
        assert owner.child.stderr is not None
        owner.child.stderr.close()


@contextmanager
def started(*argv: object) -> Iterator[subprocess.Popen[bytes]]:
    """As ``start``, and it is killed if it has not ended by itself."""
    with start(*argv) as child:
        try:
            yield child
        finally:
            child.kill()


@pytest.mark.slow
def test_two_terminals(tmp_path: Path) -> None:
    with running(tmp_path) as owner:
        outcome = xipvm("attach", owner.path, "write", 16, "hello")
        assert outcome == (0, "", "")
        outcome = xipvm("attach", owner.path, "dump", "0x10", 8)
        assert (outcome.status, outcome.err) == (0, "")
        assert outcome.out == f"00000010  {'68 65 6c 6c 6f 00 00 00':47}  hello...\n"
        assert xipvm("attach", owner.path, "info").out.startswith("ram: 0x10000 bytes, read and write\n")
        assert xipvm("attach", owner.path, "write", 0, "0x01").status == 0
        assert owner.end() == 0
        assert owner.said[1] == "xipvm: the guest ended, status 0"
    assert not owner.path.exists()


def test_verbs_of_standard_input(tmp_path: Path) -> None:
    with running(tmp_path) as owner, started("attach", owner.path) as node:
        assert node.stdin is not None
        assert node.stderr is not None
        node.stdin.write(b"write 16 'two words'\ndump 16 9\nnothing\nread 0 1M\n\nwrite 0 'oh\ninfo\n")
        node.stdin.flush()
        seen = read_until(node, b" translated\n").decode().splitlines()
        assert seen[0].endswith("two words")
        assert seen[1] == "ram: 0x10000 bytes, read and write"
        node.stdin.write(b"quit\nwrite 0 x\n")
        node.stdin.close()
        assert node.wait() == 1
        assert node.stderr.read().decode().splitlines() == [
            "xipvm: no verb is called 'nothing'; known are info, read, dump, write, watch, help, quit",
            "xipvm: 0x100000 bytes at 0x0: ram has 0x10000",
            "xipvm: No closing quotation",
        ]


def test_the_prompt_has_help_as_the_command_has(tmp_path: Path) -> None:
    with running(tmp_path) as owner:
        done = subprocess.run(
            [*XIPVM, "attach", str(owner.path)], input=b"help\n?\n", capture_output=True, env=environment(), timeout=60
        )
    assert (done.returncode, done.stderr) == (0, b"")
    lines = done.stdout.decode().splitlines()
    half = len(lines) // 2
    assert lines[:half] == lines[half:]
    assert [line.split()[0] for line in lines[:half]] == ["info", "read", "dump", "write", "watch", "help", "quit"]
    documented = [line.split() for line in inside("attach", "--help", cwd=tmp_path).lines]
    assert all(line.split() in documented for line in lines[: half - 2])


@pytest.mark.slow
def test_pages_are_recalled_while_a_storm_rages(tmp_path: Path) -> None:
    """Under the oracle: the host moves, swaps and copies pages which the node reads all the while."""
    with running(tmp_path, "--storm", "1,rate=100", "--check") as owner:
        with started("attach", owner.path, "--interval", "0.001", "watch", "8", "8") as node:
            for _ in range(3):
                read_until(node, b"the owner has taken back page 0\n")
            node.send_signal(signal.SIGINT)
            assert node.stderr is not None
            assert node.stderr.read().endswith(b"xipvm: interrupted\n")
            assert node.wait() == 130
        assert xipvm("attach", owner.path, "write", 0, "x").status == 0
        assert owner.end() == 0, owner.said
        assert owner.said[-1].endswith("0 violations")


@pytest.mark.slow
def test_a_node_is_killed_half_way(tmp_path: Path) -> None:
    with running(tmp_path) as owner:
        with started("attach", owner.path, "--interval", "0.001", "watch", "8", "8") as node:
            read_until(node, b"00000008  ")
            read_until(node, b"00000008  ")
            node.kill()
            node.wait()
            assert owner.line() == f"xipvm: ram: pid {node.pid} was cut off: it has gone without a word"
        assert xipvm("attach", owner.path, "write", 0, "x").status == 0
        assert owner.end() == 0


@pytest.mark.slow
def test_a_node_that_was_stopped_is_cut_off(tmp_path: Path) -> None:
    """It does not answer, and the guest goes on without it; when it goes on itself it learns of that."""
    path = tmp_path / "s"
    arguments = f"brief={RAM + WORD:#x},64K,path={tmp_path / 'brief'},timeout=0.01"
    with running(tmp_path, "--storm", "1,rate=100", "--export", arguments) as owner:
        assert "brief" in owner.line()
        with started("attach", tmp_path / "brief", "--interval", "0.001", "watch", "8", "8") as node:
            read_until(node, b"00000008  ")
            node.send_signal(signal.SIGSTOP)
            why = "it has not answered the recall of 1 page in time"
            assert owner.line() == f"xipvm: brief: pid {node.pid} was cut off: {why}"
            node.send_signal(signal.SIGCONT)
            assert node.stderr is not None
            assert node.stderr.read() == b"xipvm: the owner has cut this node off, or has ended\n"
            assert node.wait() == 1
        assert xipvm("attach", path, "write", 0, "x").status == 0
        assert owner.end() == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_owner_ends_before_its_node(tmp_path: Path, number: signal.Signals) -> None:
    with running(tmp_path) as owner, started("attach", owner.path) as node:
        assert node.stdin is not None
        assert node.stderr is not None
        node.stdin.write(b"info\nread 0 1\ninfo\n")
        node.stdin.flush()
        read_until(node, b"0 faults")
        owner.child.send_signal(number)
        status = owner.end()
        assert status == (-number if number == signal.SIGKILL else 128 + number)
        assert node.wait() == 1
        why = "the owner has cut this node off, or has ended" if number == signal.SIGKILL else "the owner has ended"
        assert node.stderr.read().decode() == f"xipvm: {why}\n"
        assert owner.path.exists() == (number == signal.SIGKILL)


@pytest.mark.slow
def test_two_exports_each_with_its_own_rights(tmp_path: Path) -> None:
    with running(tmp_path, "--export", f"all={RAM:#x},4M,readonly=on,path={tmp_path / 'all'}") as owner:
        assert "all (4 MiB at 0x80000000)" in owner.line()
        assert xipvm("attach", tmp_path / "all", "info").out.startswith("all: 0x400000 bytes, read only\n")
        outcome = xipvm("attach", tmp_path / "all", "write", 0, "x")
        assert (outcome.status, outcome.err) == (2, "xipvm: all is attached for reading only\n")
        outcome = xipvm("attach", "--segment", "ram", tmp_path / "all", "info")
        assert (outcome.status, outcome.err) == (2, "xipvm: there is no segment 'ram'; there are all\n")
        command = [*XIPVM, "attach", str(tmp_path / "all"), "read", "0", "4M"]
        everything = subprocess.run(command, capture_output=True, env=environment(), check=True).stdout
        assert len(everything) == 4 << 20


@needs_uboot
@pytest.mark.slow
def test_with_a_real_firmware(tmp_path: Path) -> None:
    """What a node writes U-Boot reads, and the other way round."""
    xipvm("flash", "create", "flash.img", "--board", "virt-arm64", cwd=tmp_path)
    export = f"ram=0x40000000,64K,path={tmp_path / 's'}"
    with started("run", "--flash", tmp_path / "flash.img", "--export", export, "--quiet", UBOOT) as owner:
        assert owner.stdin is not None
        owner.stdin.write(b"\n")
        owner.stdin.flush()
        read_until(owner, b"=> ")
        assert xipvm("attach", tmp_path / "s", "write", "0x8000", "from afar").status == 0
        owner.stdin.write(b"md.b 0x40008000 9\nmw.l 0x40009000 0x636261\n")
        owner.stdin.flush()
        read_until(owner, b"from afar")
        read_until(owner, b"=> mw.l 0x40009000 0x636261\r\n=> ")
        assert xipvm("attach", tmp_path / "s", "read", "0x9000", 3).out == "abc"


# ---- what cannot be


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("nowhere", "info"), "nowhere: No such file or directory"),
        (("nowhere", "shout"), "no verb is called 'shout'; known are info, read, dump, write, watch"),
        (("nowhere", "read", "0"), "read OFFSET SIZE: 1 given"),
        (("nowhere", "read", "0", "much"), "'much' is not a SIZE; write it as 4096, 0x1000 or 64K"),
        (("nowhere", "read", "there", "1"), "'there' is not an OFFSET; write it as 4096, 0x1000 or 64K"),
        (("nowhere", "help"), "no verb is called 'help'; known are info, read, dump, write, watch"),
        (("nowhere", "write", "0", "0xabc"), "0xabc: not bytes in hexadecimal"),
        (("nowhere", "write", "0", "@none"), "none: No such file or directory"),
        (("file", "info"), "file: this is no socket"),
        (("--timeout", "0", "s", "info"), "no positive number of seconds"),
        ((), "Missing argument 'SOCKET'"),
    ],
)
def test_bad_words_are_one_line(tmp_path: Path, words: tuple[str, ...], complaint: str) -> None:
    (tmp_path / "file").write_text("x")
    outcome = inside("attach", *words, cwd=tmp_path)
    assert outcome.status == 2
    assert complaint in outcome.err
    assert outcome.err.count("\n") == 1
    assert outcome.out == ""


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (b"XP\x02\x11\0\0\0\1\0\0\0\0", "it speaks version 2 of the protocol, this is version 1"),
        (b"220 mail.example\r\n", "what it says is no message of XPMEM"),
        (b"", "the owner has cut this node off, or has ended"),
    ],
)
def test_somebody_else_listens(tmp_path: Path, answer: bytes, complaint: str) -> None:
    with listen(str(tmp_path / "s")) as listener, started("attach", tmp_path / "s", "info") as node:
        listener.setblocking(True)
        connection, _ = listener.accept()
        with connection:
            assert connection.recv(12)[:3] == b"XP\x01"
            connection.sendall(answer)
        assert node.wait() == 2
        assert node.stderr is not None
        assert node.stderr.read().decode() == f"xipvm: {tmp_path / 's'}: {complaint}\n"


def test_somebody_who_says_nothing(tmp_path: Path) -> None:
    with listen(str(tmp_path / "s")):
        outcome = xipvm("attach", "--timeout", "0.05", tmp_path / "s", "info")
    assert (outcome.status, outcome.err) == (2, f"xipvm: {tmp_path / 's'}: the owner does not answer HELLO\n")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--export", "ram"), "--export ram: write NAME=BASE,SIZE"),
        (("--export", "ram=0,4K"), "RAM is 0x80000000"),
        (("--export", "a=2G,4K", "--export", "a=2G,8K,path=b"), "two exports have the name a"),
        (("--export", "a=2G,4K,path=x", "--export", "b=2G,8K,path=x"), "two exports have the path x"),
        (("--protocol", "2008", "--export", "ram=2G,4K"), "no callback of the 2008 protocol may wait"),
    ],
)
def test_bad_exports_are_one_line(tmp_path: Path, options: tuple[str, ...], complaint: str) -> None:
    outcome = inside("run", *options, guest(tmp_path / "loop.elf"), cwd=tmp_path)
    assert outcome.status == 2
    assert complaint in outcome.err
    assert outcome.err.count("\n") == 1
    assert os.listdir(tmp_path) == ["loop.elf"]


def test_help_helps(tmp_path: Path) -> None:
    text = inside("attach", "--help", cwd=tmp_path).out
    for verb in ("info", "read OFFSET SIZE", "dump OFFSET SIZE", "write OFFSET TEXT", "watch OFFSET SIZE"):
        assert verb in text
    assert "--export" in inside("run", "--help", cwd=tmp_path).out
