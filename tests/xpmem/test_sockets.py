"""Links over sockets, and what is served on them while a guest runs; in one process, with a clock of the test's."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.asm import rv64, words
from tests.guests.test_handmade import constant, finish
from tests.loader.conftest import R, W, X, write_elf
from xipvm.address import PAGE_SIZE
from xipvm.check import Oracle
from xipvm.errors import AtomicSleepError, BadInput
from xipvm.export import Export, ExportOption, parse_export
from xipvm.locks.check import atomic
from xipvm.machine import Machine
from xipvm.mmu.madvise import MADV_DONTNEED
from xipvm.trace.funnel import Trace
from xipvm.xpmem.link import LinkClosedError
from xipvm.xpmem.node import XpmemNode
from xipvm.xpmem.sockets import SocketLink, connect, listen, peer_name
from xipvm.xpmem.wire import FROM_NODE, FROM_OWNER, Decoder, Kind, Message, VersionError, encode

RAM = 0x8000_0000
WORD = 0x1_0000
"""Where, from the start of RAM, the guest below looks; behind it is what it counts."""


class Clock:
    """Stands still, or goes on by ``step`` whenever somebody looks."""

    def __init__(self, step: float = 0.0) -> None:
        self.now = 0.0
        self.step = step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def guest(path: Path) -> Path:
    """Counts at WORD + 8 until there is something at WORD, then ends with status 0."""
    loop = [rv64.lw(7, 5, 0), rv64.lw(8, 5, 8), rv64.addi(8, 8, 1), rv64.sw(8, 5, 8), rv64.beq(7, 0, -16)]
    code = words(*constant(5, RAM + WORD), *loop, *finish(0x5555))
    path.write_bytes(write_elf({"paddr": RAM, "data": code, "flags": R | W | X}, entry=RAM, machine=243))
    return path


def ends() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


@pytest.fixture
def pair() -> Iterator[tuple[SocketLink, SocketLink]]:
    ours, theirs = ends()
    made = SocketLink(ours, "node", FROM_NODE, timeout=1.0, clock=Clock()), SocketLink(theirs, "owner", FROM_OWNER)
    yield made
    for link in made:
        link.close()


def test_messages_arrive_in_order_and_also_after_the_end(pair: tuple[SocketLink, SocketLink]) -> None:
    owner, node = pair
    sent = [Message(Kind.FAULT, n, (1, n, 0)) for n in range(100)]
    for message in sent:
        node.send(message)
    node.close()
    assert owner.wait("them", lambda: False, owner.patience())
    assert [owner.receive() for _ in sent] == sent
    assert owner.receive() is None
    assert owner.closed
    with pytest.raises(LinkClosedError, match="has gone"):
        owner.send(Message(Kind.DONE))


def test_patience_is_measured_by_the_clock() -> None:
    ours, theirs = ends()
    with theirs:
        link = SocketLink(ours, "node", FROM_NODE, timeout=1e-6, clock=Clock(step=1.0))
        assert not link.wait("an answer", lambda: False, link.patience())
        theirs.send(encode(Message(Kind.DROPPED, 1)))
        assert link.wait("an answer", lambda: False, link.patience())
        link.close()


def test_nobody_waits_where_nobody_may_sleep(pair: tuple[SocketLink, SocketLink]) -> None:
    with atomic("a test"), pytest.raises(AtomicSleepError):
        pair[0].wait("an answer", lambda: True, 0.0)


def test_who_does_not_read_gets_no_more(pair: tuple[SocketLink, SocketLink]) -> None:
    owner, _ = pair

    def endless() -> None:
        for _ in range(10_000):
            owner.send(Message(Kind.DATA, 1, (), bytes(PAGE_SIZE)))

    with pytest.raises(LinkClosedError, match="does not read"):
        endless()
    assert owner.closed


def test_another_version_is_told_after_what_came_before(pair: tuple[SocketLink, SocketLink]) -> None:
    ours, theirs = ends()
    with ours:
        link = SocketLink(theirs, "owner", FROM_OWNER)
        ours.send(encode(Message(Kind.DONE, 1)) + b"XP\x07")
        assert link.receive() == Message(Kind.DONE, 1)
        with pytest.raises(VersionError, match="version 7"):
            link.receive()
        link.close()


def test_the_kernel_says_who_it_is() -> None:
    ours, theirs = ends()
    with ours, theirs:
        assert peer_name(ours) == f"pid {os.getpid()}"


def test_where_nobody_listens(tmp_path: Path) -> None:
    path = tmp_path / "s"
    for expected in ("No such file", "nobody listens there any more"):
        with pytest.raises(BadInput, match=expected):
            connect(str(path))
        listen(str(path)).close()
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInput, match="this is no socket"):
        connect(str(tmp_path / "file"))
    with pytest.raises(BadInput, match="too long"):
        connect(str(tmp_path / ("s" * 200)))


def test_a_socket_that_is_left_over_is_replaced_and_no_other(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    listen(path).close()
    with listen(path):
        assert os.stat(path).st_mode & 0o777 == 0o600
        with pytest.raises(BadInput, match="in use"):
            listen(path)
    (tmp_path / "file").write_text("kept")
    with pytest.raises(BadInput, match="in use"):
        listen(str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("ram=0x80000000,64K", ExportOption("ram", 0x8000_0000, 0x1_0000, "ram.sock")),
        (
            "a=2G,4096,path=/tmp/x,readonly=on,timeout=0.5",
            ExportOption("a", 2 << 30, 4096, "/tmp/x", writable=False, timeout=0.5),
        ),
    ],
)
def test_what_the_option_says(text: str, option: ExportOption) -> None:
    assert parse_export(text) == option


@pytest.mark.parametrize(
    "text",
    ["", "ram", "=0,1", "ram=", "ram=0", "ram=x,1", "ram=0,x", "ram=0,1,path=", "ram=0,1,readonly=maybe", "a b=0,1",
     "a/b=0,1", "ram=0,1,timeout=0", "ram=0,1,timeout=nan", "ram=0,1,color=red", "n" * 300 + "=0,1"],
)  # fmt: skip
def test_what_it_must_not_say(text: str) -> None:
    with pytest.raises(BadInput, match=r"^--export"):
        parse_export(text)


# ---- a machine


Served = tuple[Machine, Export, list[str]]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Makes a machine that runs the guest above and exports the two pages at WORD."""
    made: list[tuple[Machine, Export, Oracle]] = []

    def make(clock: Clock | None = None, **options: object) -> Served:
        trace, oracle, said = Trace(), Oracle(), list[str]()
        trace.attach(oracle)
        machine = Machine(guest=guest(tmp_path / "loop.elf"), memory=4 << 20, trace=trace, **options)  # type: ignore[arg-type]
        option = ExportOption("ram", RAM + WORD, 2 * PAGE_SIZE, str(tmp_path / "s"), timeout=1e-6)
        export = Export(machine, option, log=said.append, clock=clock or Clock())
        made.append((machine, export, oracle))
        return machine, export, said

    yield make
    for machine, export, oracle in made:
        export.close()
        machine.trace.detach(oracle)  # what follows goes in no order
        machine.close()
        assert oracle.violations == []


class Remote(threading.Thread):
    """A node that works while the guest runs: ``work(node)`` in a thread of its own."""

    def __init__(self, path: str, work: Callable[[XpmemNode], object]) -> None:
        super().__init__()
        self.work = work
        self.error: BaseException | None = None
        self.link = SocketLink(connect(path), "the owner", FROM_OWNER, timeout=60.0)
        self.start()

    def run(self) -> None:
        node = XpmemNode(self.link, "node")
        try:
            node.hello()
            self.work(node)
        except BaseException as error:
            self.error = error
        finally:
            node.close()

    def done(self) -> None:
        self.join()
        if self.error is not None:
            raise self.error


def test_a_running_guest_sees_what_a_node_writes(served: Callable[..., Served]) -> None:
    machine, export, said = served()
    counts: list[int] = []

    def work(node: XpmemNode) -> None:
        permit, size = node.get("ram")
        at = node.attach(permit, 0, size)
        while len(counts) < 2 or counts[-1] == counts[-2]:
            counts.append(int.from_bytes(node.load(at, 8, 4), "little"))
        node.store(at, 0, b"\1")
        node.detach(at)
        node.release(permit)

    remote = Remote(export.option.path, work)
    result = machine.run()
    remote.done()
    assert (result.reason, result.status) == ("exit", 0)
    assert counts[-1] > counts[-2]
    export.close()
    assert said == []
    assert not os.path.exists(export.option.path)


def test_pages_go_and_come_under_the_node(served: Callable[..., Served]) -> None:
    """The host's operations wait for a node that is another thread of control, and it sees what is there then."""
    machine, export, said = served()
    hva = machine.ram + WORD
    first, last = threading.Event(), threading.Event()
    recalled: list[list[int]] = []
    seen: list[bytes] = []

    def work(node: XpmemNode) -> None:
        node.on_recall = lambda attachment, pages: recalled.append(pages)
        permit, size = node.get("ram")
        at = node.attach(permit, 0, size)
        node.store(at, PAGE_SIZE, b"mine")
        first.set()
        while not last.is_set() or not seen:
            node.serve()
            if last.is_set():
                seen.append(node.load(at, PAGE_SIZE, 4))
        node.store(at, 0, b"\1")
        node.detach(at)

    remote = Remote(export.option.path, work)
    while not first.is_set():
        machine.run(max_instructions=1000)
    assert machine.mm.read(hva + PAGE_SIZE, 4) == b"mine"
    machine.mm.madvise(hva + PAGE_SIZE, PAGE_SIZE, MADV_DONTNEED)
    machine.mm.write(hva + PAGE_SIZE, b"host")
    last.set()
    result = machine.run()
    remote.done()
    assert (result.reason, result.status) == ("exit", 0)
    assert recalled == [[1]]
    assert seen[0] == b"host"
    assert said == []


def raw(path: str) -> socket.socket:
    """A node that is up to no good, as far as a permit and an attachment."""
    connection = connect(path)
    connection.send(encode(Message(Kind.HELLO, 1)) + encode(Message(Kind.GET, 2, (1,), b"ram")))
    return connection


def answers(connection: socket.socket, count: int, machine: Machine) -> list[Message]:
    decoder, found = Decoder(FROM_OWNER), list[Message]()
    connection.setblocking(False)
    while len(found) < count:
        machine.run(max_instructions=1000)
        try:
            data = connection.recv(65536)
        except BlockingIOError:
            continue
        assert data or decoder.broken is None
        found += decoder.take(data)
        if not data:
            break
    return found


def pinned(machine: Machine, path: str) -> socket.socket:
    """One that has page 0."""
    connection = raw(path)
    permit = answers(connection, 2, machine)[1].numbers[0]
    connection.send(encode(Message(Kind.ATTACH, 3, (permit, 0, PAGE_SIZE))))
    number = answers(connection, 1, machine)[0].numbers[0]
    connection.send(encode(Message(Kind.FAULT, 4, (number, 0, 1))))
    assert answers(connection, 1, machine)[0].kind is Kind.GRANT
    return connection


def test_a_slow_node_is_cut_off(served: Callable[..., Served]) -> None:
    machine, export, said = served(Clock(step=1.0))
    with pinned(machine, export.option.path) as connection:
        machine.mm.madvise(machine.ram + WORD, PAGE_SIZE, MADV_DONTNEED)
        assert said == [f"ram: pid {os.getpid()} was cut off: it has not answered the recall of 1 page in time"]
        assert export.owner.pins() == {}
        told = answers(connection, 2, machine)
        assert [message.kind for message in told] == [Kind.RECALL]
    assert machine.run(max_instructions=10_000).reason == "limit"


def test_one_that_talks_and_does_not_answer_is_cut_off_as_well(served: Callable[..., Served]) -> None:
    machine, export, said = served(Clock(step=1.0))
    with pinned(machine, export.option.path) as connection:
        connection.send(encode(Message(Kind.LOAD, 9, (0, 0, 0, 0, 1))) * 100)
        machine.mm.madvise(machine.ram + WORD, PAGE_SIZE, MADV_DONTNEED)
        assert "has not answered the recall" in said[0]


@pytest.mark.parametrize(
    ("nonsense", "reason"),
    [
        (b"GET / HTTP/1.0\r\n", "no message of XPMEM"),
        (b"XP\x02\x01" + bytes(8), "version 2"),
        (encode(Message(Kind.DROPPED, 3)), "a recall that nobody made"),
        (encode(Message(Kind.RECALL, 3, (0, 0, 1))), "RECALL, which is not its to say"),
    ],
)
def test_one_that_talks_nonsense_is_told_why(served: Callable[..., Served], nonsense: bytes, reason: str) -> None:
    machine, export, said = served()
    with pinned(machine, export.option.path) as connection:
        connection.send(nonsense)
        machine.run(max_instructions=1000)
        while not said:
            machine.run(max_instructions=1000)
        assert reason in said[0]
        assert export.owner.pins() == {}
        if "recall" not in reason:
            assert reason in answers(connection, 1, machine)[0].text


def test_half_a_message_and_the_end(served: Callable[..., Served]) -> None:
    machine, export, said = served()
    with pinned(machine, export.option.path) as connection:
        connection.send(encode(Message(Kind.LOAD, 9, (0, 0, 0, 0, 1)))[:20])
    while not said:
        machine.run(max_instructions=1000)
    assert said == [f"ram: pid {os.getpid()} was cut off: it has gone without a word"]
    assert export.owner.pins() == {}


def test_it_makes_no_difference_when_nobody_is_attached(tmp_path: Path) -> None:
    from tests.run.command import guest as built

    def events(export: bool) -> list[object]:
        trace, seen = Trace(), list[object]()
        with Machine(guest=built("pages", "riscv64"), trace=trace) as machine:
            trace.attach(lambda event: seen.append((event.time, event.actor, event.kind, event.fields)))
            if export:
                Export(machine, ExportOption("ram", RAM, 1 << 20, str(tmp_path / "s")))
                seen.clear()
            machine.run()
        return [event for event in seen if "xpmem0" not in str(event)]

    assert events(True) == events(False)


@pytest.mark.parametrize("base", [0, RAM - PAGE_SIZE, RAM + (4 << 20) - PAGE_SIZE, 1 << 60])
def test_only_ram_is_exported(tmp_path: Path, base: int) -> None:
    with Machine(guest=guest(tmp_path / "loop.elf"), memory=4 << 20) as machine:
        with pytest.raises(BadInput, match="RAM is 0x80000000 to 0x80400000"):
            Export(machine, ExportOption("ram", base, 2 * PAGE_SIZE, str(tmp_path / "s")))
        assert len(machine.mm.notifiers) == 1
    assert not (tmp_path / "s").exists()


def test_a_socket_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    with Machine(guest=guest(tmp_path / "loop.elf"), memory=4 << 20) as machine:
        with pytest.raises(BadInput, match="No such file"):
            Export(machine, ExportOption("ram", RAM, PAGE_SIZE, str(tmp_path / "no" / "s")))
        assert len(machine.mm.notifiers) == 1


def test_the_protocol_of_2008_says_why(tmp_path: Path) -> None:
    with (
        Machine(guest=guest(tmp_path / "loop.elf"), memory=4 << 20, protocol="2008") as machine,
        pytest.raises(BadInput, match="no callback of the 2008 protocol may wait"),
    ):
        Export(machine, ExportOption("ram", RAM, PAGE_SIZE, str(tmp_path / "s")))


def test_a_service_that_is_removed_is_not_asked_any_more(tmp_path: Path) -> None:
    asked: list[int] = []

    def poll() -> None:
        asked.append(1)
        machine.remove_service(poll)  # in the middle of being asked

    with Machine(guest=guest(tmp_path / "loop.elf"), memory=4 << 20) as machine:
        machine.add_service(poll, lambda: None)
        machine.run(max_instructions=1000)
        machine.run(max_instructions=1000)
    assert asked == [1]
