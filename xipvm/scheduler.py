"""Runs actors, and asks at every schedule point which of them goes on.

Each actor is a greenlet: plain code that runs until it passes a point, waits, or ends. There the scheduler lists who
can go on, the one that just ran first, the others in the order of ``spawn``, and asks ``choose(n, label)`` for a number
below n; always 0 runs each actor until it waits or ends. It asks only when there is a choice. Nothing else decides
anything, so the same answers give the same run. Who gives way (``actors.give_way``) is no candidate before everybody
who can has run since it gave way the last time, which is what makes retrying end (Musuvathi and Qadeer, PLDI 2008).

What belongs to an actor goes with it: the trace's actor and cause, its locks and atomic sections. Actors may be
switched inside callbacks of an engine, which is how vCPUs are: each has an engine of its own.

A run ends when all are done. It ends before that, with every other actor unwound, when one fails (its exception is
raised), when all that are left wait for each other (DeadlockError says who waits for what, and what each holds) and
when ``choose`` raises. Unwinding raises GreenletExit where an actor is suspended: its ``finally`` clauses run, points
do nothing, and waiting raises GreenletExit again. Nothing is left behind: no greenlet, no lock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from greenlet import GreenletExit, getcurrent, greenlet

from xipvm import actors
from xipvm.actors import Actor, State
from xipvm.errors import DeadlockError, InternalError
from xipvm.locks import check

if TYPE_CHECKING:
    from xipvm.trace.funnel import Trace

Choose = Callable[[int, str], int]


class Watcher(Protocol):
    """Who wants to know of steps: what an actor does from one schedule point to the next."""

    def stepped(self, actor: Actor) -> None:
        """``actor`` has come to a point, waits, or has ended."""

    def steps(self, actor: Actor, running: Actor | None, found: list[Actor]) -> None:
        """``actor`` goes on, where ``running`` did before. ``found`` could go on, whether they gave way or not."""

    def ready(self, actor: Actor) -> bool:
        """Whether ``actor``, which waits, is ready: ``actor.ready()``."""


def first(n: int, label: str) -> int:
    """The choice that never changes the actor as long as it can go on."""
    return 0


class Scheduler:
    """One run. ``trace`` is told who acts, :attr:`watcher` what the steps are. ``spawn`` actors, then ``run``."""

    def __init__(self, choose: Choose = first, *, trace: Trace | None = None) -> None:
        self.actors: list[Actor] = []
        """All, in the order of ``spawn``."""
        self.candidates: list[Actor] = []
        """While ``choose`` is asked: whom its answer numbers."""
        self.running: Actor | None = None
        """Who ran last."""
        self.switches = 0
        """How often another actor went on than the one before."""
        self.watcher: Watcher | None = None
        self._choose = choose
        self._trace = trace
        self._hub: greenlet | None = None
        self._aborting = False
        self._polite = False
        """Somebody has given way."""
        self._failure: BaseException | None = None

    def spawn(self, name: str, function: Callable[..., object], *arguments: Any) -> Actor:
        """An actor that will call ``function(*arguments)``. May be called by actors."""
        actor = Actor(name)
        actor.greenlet = greenlet(lambda: self._body(actor, function, arguments), parent=self._hub)
        self.actors.append(actor)
        return actor

    def run(self) -> None:
        """Runs all actors to their end. Raises what the first of them raised, DeadlockError, or what ``choose`` did."""
        if self._hub is not None:
            raise InternalError("a scheduler runs once")
        self._hub = getcurrent()
        for actor in self.actors:
            actor.greenlet.parent = self._hub  # type: ignore[union-attr]
        hooks = actors.set_hooks(self._point, self._wait)
        host = actors.current
        trace = self._trace
        before = (trace.actor, trace.cause) if trace is not None else ("", 0)
        try:
            while self._failure is None:
                chosen = self._next("start" if self.running is None else "end")
                if chosen is None:
                    break
                self._enter(chosen)
                chosen.greenlet.switch()  # type: ignore[union-attr]
                self._leave(self.running)
        finally:
            try:
                self._abort()
            finally:
                actors.set_hooks(*hooks)
                actors.set_current(host)
                if trace is not None:
                    trace.actor, trace.cause = before
        if self._failure is not None:
            raise self._failure

    # ---- who goes on

    def _next(self, label: str) -> Actor | None:
        """Who goes on, None when nobody is left. Raises DeadlockError."""
        running, watcher = self.running, self.watcher
        if watcher is not None and running is not None:
            watcher.stepped(running)
        found: list[Actor] = []
        waiting = False
        for actor in self.actors:
            if actor.state is State.READY or (
                actor.state is State.WAITING and (actor.ready() if watcher is None else watcher.ready(actor))  # type: ignore[misc]
            ):
                if actor is running:
                    found.insert(0, actor)
                else:
                    found.append(actor)
            elif actor.state is State.WAITING:
                waiting = True
        able = found
        if self._polite and len(found) > 1:
            found = [actor for actor in found if actor.after.isdisjoint(found)] or found
        chosen = 0
        if len(found) > 1:
            self.candidates = found
            chosen = self._choose(len(found), label)
            if not 0 <= chosen < len(found):
                raise InternalError(f"choice {chosen} of {len(found)} at {label}")
        if found:
            if watcher is not None:
                watcher.steps(found[chosen], running, able)
            return found[chosen]
        if waiting:
            raise self._deadlock()
        return None

    def _deadlock(self) -> DeadlockError:
        waiting = tuple(
            (actor.name, actor.waits_for, tuple(map(str, actor.held)))
            for actor in self.actors
            if actor.state is State.WAITING
        )
        lines = [
            f"{name} waits for {what}" + (f" and holds {', '.join(held)}" if held else "")
            for name, what, held in waiting
        ]
        return DeadlockError("; ".join(lines), waiting)

    def _point(self, label: str) -> None:
        actor = self.running
        if self._aborting or actor is None or getcurrent() is not actor.greenlet:
            return
        if actor.gives_way:
            self._polite = True
            actor.after = {other for other in self.actors if other is not actor and other not in actor.ran}
            actor.ran = set()
        self._switch(actor, label)

    def _wait(self, what: str, ready: Callable[[], bool]) -> None:
        actor = self.running
        if actor is None or getcurrent() is not actor.greenlet:
            raise DeadlockError(f"{what}: nobody can go on")
        if self._aborting:
            raise GreenletExit
        actor.state, actor.waits_for, actor.ready = State.WAITING, what, ready
        try:
            while True:
                self._switch(actor, what)
                if ready():
                    break
        finally:
            actor.state, actor.waits_for, actor.ready = State.READY, "", None

    def _switch(self, actor: Actor, label: str) -> None:
        """Lets the one that is chosen go on, and returns when ``actor`` is."""
        chosen: Actor | None = None
        try:
            chosen = self._next(label)
        except BaseException as error:  # it ends the run, and is not this actor's to handle
            self._failure = self._failure or error
        if chosen is actor:
            return
        self._leave(actor)
        if chosen is None:
            self._hub.switch()  # type: ignore[union-attr]  # which unwinds it
            return
        self._enter(chosen)
        chosen.greenlet.switch()  # type: ignore[union-attr]

    def _enter(self, actor: Actor) -> None:
        if actor is not self.running:
            self.switches += 1
            self.running = actor
        for other in self.actors:
            other.ran.add(actor)
            other.after.discard(actor)
        actors.set_current(actor)
        if self._trace is not None:
            self._trace.actor, self._trace.cause = actor.trace_name, actor.cause
        if actor.on_enter is not None:
            actor.on_enter()

    def _leave(self, actor: Actor | None) -> None:
        if actor is None:
            return
        if self._trace is not None:
            actor.trace_name, actor.cause = self._trace.actor, self._trace.cause
        if actor.on_leave is not None:
            actor.on_leave()

    # ---- an actor's life

    def _body(self, actor: Actor, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        try:
            function(*arguments)
            check.nothing_held("at its end", actor)
        except BaseException as error:
            actor.state = State.FAILED
            actor.error = error
            if not isinstance(error, GreenletExit):
                error.add_note(f"in actor {actor.name}")
                self._failure = self._failure or error
        else:
            actor.state = State.DONE

    def _abort(self) -> None:
        """Unwinds whoever is left, in the order of ``spawn``."""
        self._aborting = True
        for actor in self.actors:
            stack = actor.greenlet
            if stack is None or stack.dead:
                continue
            if not stack:
                actor.state = State.FAILED  # it never ran
            self.running = actor
            actors.set_current(actor)
            stack.throw(GreenletExit)
            if not stack.dead:
                raise InternalError(f"{actor.name} was not unwound")
        for actor in self.actors:
            actor.greenlet = None
