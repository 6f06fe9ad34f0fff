"""Programs from the literature on partial-order reduction, whose numbers of Mazurkiewicz traces are known."""

from __future__ import annotations

from collections.abc import Callable

from xipvm.actors import give_way, point, wait
from xipvm.explore import Scene
from xipvm.explore.shared import Shared
from xipvm.locks import LockClass, RwLock

Furnish = Callable[[Scene], None]


def writers(count: int) -> Furnish:
    """Each writes to one variable: every order is another trace."""

    def furnish(scene: Scene) -> None:
        variable = Shared(0)

        def write(value: int) -> None:
            variable.value = value

        for number in range(count):
            scene.actor(f"writer{number}", write, number)

    return furnish


def readers(count: int) -> Furnish:
    """One writes, the others read: each reads before or after."""

    def furnish(scene: Scene) -> None:
        variable = Shared(0)

        def write() -> None:
            variable.value = 1

        def read() -> int:
            return variable.value

        scene.actor("writer", write)
        for number in range(count):
            scene.actor(f"reader{number}", read)

    return furnish


def last_zero(count: int) -> Furnish:
    """One looks for the last zero of an array; each of the others makes an element one more than the one before it."""

    def furnish(scene: Scene) -> None:
        array = tuple(Shared(0) for _ in range(count + 1))

        def find() -> None:
            at = count
            while array[at].value:
                point("next")
                at -= 1

        def raise_one(at: int) -> None:
            before = array[at - 1].value
            point("read")
            array[at].value = before + 1

        scene.actor("finder", find)
        for number in range(1, count + 1):
            scene.actor(f"raiser{number}", raise_one, number)

    return furnish


def indexer(count: int) -> Furnish:
    """Each puts four messages into a hash table of 128 places, and goes on to the next where one is taken."""

    def furnish(scene: Scene) -> None:
        table = tuple(Shared(0) for _ in range(128))

        def insert(thread: int) -> None:
            for number in range(1, 5):
                message = number * 11 + thread
                at = message * 7 % 128
                while table[at].value:
                    at = (at + 1) % 128
                    point("taken")
                table[at].value = message
                point("inserted")

        for number in range(count):
            scene.actor(f"thread{number}", insert, number)

    return furnish


def lost_update(count: int) -> Furnish:
    """Each adds one to a counter, in two steps."""

    def furnish(scene: Scene) -> None:
        counter = Shared(0)

        def add() -> None:
            seen = counter.value
            point("read")
            counter.value = seen + 1

        def all_there() -> None:
            if counter.value != count:
                raise AssertionError(f"{count} additions gave {counter.value}")

        for number in range(count):
            scene.actor(f"adder{number}", add)
        scene.afterwards(all_there)

    return furnish


def readers_and_writers(*, locked: bool) -> Furnish:
    """Two write a pair of variables, two read it: with a lock nobody sees a half of one and a half of another."""

    def furnish(scene: Scene) -> None:
        pair = Shared(0), Shared(0)
        lock = RwLock("pair", LockClass("pair"))

        def write(value: int) -> None:
            if locked:
                with lock.write:
                    both(value)
            else:
                both(value)

        def both(value: int) -> None:
            pair[0].value = value
            point("half")
            pair[1].value = value

        def read() -> None:
            if locked:
                with lock.read:
                    look()
            else:
                look()

        def look() -> None:
            first = pair[0].value
            point("half")
            if pair[1].value != first:
                raise AssertionError("torn")

        for number in (1, 2):
            scene.actor(f"writer{number}", write, number)
            scene.actor(f"reader{number}", read)

    return furnish


def philosophers(seats: int, *, ordered: bool) -> Furnish:
    """Each takes the fork at the left, then the one at the right; or the lower one first."""

    def furnish(scene: Scene) -> None:
        taken = tuple(Shared(False) for _ in range(seats))

        def take(fork: int) -> None:
            wait(f"fork {fork}", lambda: not taken[fork].value)
            taken[fork].value = True

        def eat(seat: int) -> None:
            hands = (seat, (seat + 1) % seats)
            first, second = sorted(hands) if ordered else hands
            take(first)
            point("one fork")
            take(second)
            point("eating")
            taken[second].value = False
            point("one fork again")
            taken[first].value = False

        for seat in range(seats):
            scene.actor(f"philosopher{seat}", eat, seat)

    return furnish


def peterson(*, fence: bool) -> Furnish:
    """Peterson's algorithm for two, on a machine with store buffers: what somebody wants is seen later."""

    def furnish(scene: Scene) -> None:
        wants = Shared(False), Shared(False)
        buffered = Shared(False), Shared(False)
        turn, inside = Shared(0), Shared(0)

        def drain(whose: int) -> None:
            wait("a store", lambda: buffered[whose].value)
            wants[whose].value = True
            buffered[whose].value = False

        def enter(me: int) -> None:
            other = 1 - me
            buffered[me].value = True
            point("stored")
            if fence:
                wait("the store buffer", lambda: not buffered[me].value)
            turn.value = other
            point("turn")
            while wants[other].value:
                point("wanted")
                if turn.value != other:
                    break
                give_way("spin")
            point("checked")
            inside.value += 1
            if inside.value > 1:
                raise AssertionError("two are in the critical section")
            point("inside")
            inside.value -= 1
            wait("the store buffer", lambda: not buffered[me].value)
            wants[me].value = False

        for number in range(2):
            scene.actor(f"process{number}", enter, number)
            scene.actor(f"buffer{number}", drain, number)

    return furnish
