"""The crew: actors that hold the model each, and steps whose units they compute.

Ray places the actors, sends them the model and the units, and says which have died. What is left to say here is an
order: results are taken in the order of the steps, as in one process, so that what is written is the same, byte for
byte. Ray Data has no source that reads a Python iterator as it goes (it takes in a whole one, or has tasks read
files), and a harvest's texts are read once, here, no further ahead than is computed; nor does it know bfloat16.

Units are in flight, or wait for an earlier one, up to `AHEAD` for each actor. A unit whose actor died is computed by
another one, from the beginning: it gives the same. Its results are taken once, whoever computed it.
"""

import pickle
import sys
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from ...errors import ActorLost
from ...models.lm import LM
from .ray import Ray, actors_of, joined, room
from .transport import (
    Packed,
    packed_model,
    packed_result,
    packed_work,
    unpacked_model,
    unpacked_result,
    unpacked_work,
)
from .work import Step, Steps, Work, computed_here

AHEAD = 3  # units in flight, or computed and waiting for an earlier one, for each actor
LOOK = 10  # seconds between looks at whether there is still a node to wait for
LOSSES = 5  # so often an actor may die at a unit, or actors in a row before they were ready


def computed(engine: Ray | None, lm: LM, work: Work, steps: Steps) -> None:
    """Take all steps in their order, their units computed by an engine, or here where there is none."""
    if engine is None:
        computed_here(work, steps)
        return
    with Crew(engine, lm, work) as crew:
        crew.run(steps)


@dataclass(frozen=True, eq=False)
class Failure:
    """An error of the user's, as it can be sent: the error, or what it is made of."""

    error: bytes
    words: str

    def raised(self, unit: Any) -> BaseException:
        error: BaseException = pickle.loads(self.error)
        error.add_note(f"in {unit}, on an actor of Ray")
        error.add_note(self.words)
        return error


class Actor:
    """The model in a process of Ray's, and the work that it does there."""

    def __init__(self, threads: int, precision: str, places: list[str]) -> None:
        sys.path += [
            place for place in places if place not in sys.path
        ]  # of the modules of the user's functions
        self.threads, self.precision = threads, precision
        self.work: Any = None

    def ready(self, model: Packed, work: Packed) -> Failure | None:
        """Take in the model and the work."""
        try:
            self.work = unpacked_work(work, unpacked_model(model))
            torch.set_num_threads(
                self.threads
            )  # behind the imports of the user's modules, which may say otherwise
            torch.set_float32_matmul_precision(self.precision)
        except Exception as error:  # noqa: BLE001  it is raised where the user is
            return _failure(error)
        return None

    def compute(self, unit: Any) -> Packed | Failure:
        """What comes of a unit, or how it failed."""
        try:
            return packed_result(self.work.compute(unit))
        except Exception as error:  # noqa: BLE001  it is raised where the user is
            return _failure(error)


def _failure(error: Exception) -> Failure:
    from ray.cloudpickle import dumps  # pyright: ignore[reportAttributeAccessIssue]

    words = "".join(traceback.format_exception(error)).rstrip()
    kind, state = type(error), dict(vars(error))
    for made in (
        lambda: error,
        lambda: _Remade(kind, error.args, state),
        lambda: _Remade(kind, (str(error),), {}),
    ):
        try:
            found = dumps(made())
            pickle.loads(found)
        except Exception:  # noqa: BLE001  what an error holds may be anything
            continue
        return Failure(found, words)
    return Failure(dumps(RuntimeError(f"{kind.__name__}: {error}")), words)


class _Remade:
    """Stands for an error that cannot be made by calling its class with its arguments."""

    def __init__(self, kind: type[Exception], args: tuple[Any, ...], state: dict[str, Any]) -> None:
        self.parts = kind, args, state

    def __reduce__(self) -> Any:
        return _remade, self.parts


def _remade(kind: type[Exception], args: tuple[Any, ...], state: dict[str, Any]) -> Exception:
    error = kind.__new__(kind, *args)
    error.args = args
    vars(error).update(state)
    return error


@dataclass(eq=False)
class Member:
    """An actor, and the steps it was given that did not come back. It computes them one by one, in this order."""

    handle: Any
    ready: bool = False
    given: "list[Held]" = field(default_factory=list)
    gone: bool = False


@dataclass(eq=False)
class Held:
    """A step on its way: its result, once it is there."""

    step: Step
    done: bool
    found: Any = None
    lost: int = 0


@dataclass(eq=False)
class Crew:
    """Actors that do some work. They are started for the first unit, and end with the block."""

    engine: Ray
    lm: LM
    work: Work
    members: list[Member] = field(default_factory=list)
    count: int = 1
    _stack: ExitStack = field(default_factory=ExitStack)
    _sent: Any = None  # the model and the work, in Ray's store
    _starting: dict[Any, Member] = field(default_factory=dict)
    _flying: dict[Any, tuple[Held, Member]] = field(default_factory=dict)
    _never_ready: int = 0

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, steps: Steps) -> None:
        """Take steps in their order. What was computed before an error is taken first, as if all had run here."""
        queue: deque[Held] = deque()
        todo: deque[Held] = deque()
        more, failed = True, None
        while more or queue:
            while more and sum(held.step.unit is not None for held in queue) < AHEAD * self.count:
                try:
                    step = next(steps, None)
                except Exception as error:  # noqa: BLE001  it is raised below, behind what came before it
                    step, failed = None, error
                more = step is not None
                if step is not None:
                    queue.append(Held(step, done=step.unit is None))
                    todo += [queue[-1]] if step.unit is not None else []
                    self._give(todo)
                    self._take(queue)
            if queue:
                todo.extendleft(self._back())
                self._give(todo)
                self._take(queue)
        if failed is not None:
            raise failed

    def _take(self, queue: deque[Held]) -> None:
        while queue and queue[0].done:
            held = queue.popleft()
            if isinstance(held.found, Failure):
                raise held.found.raised(held.step.unit) from None
            held.step.then(held.found)

    def _give(self, todo: deque[Held]) -> None:
        """Give units to the actors that are ready, those with the least to do first."""
        if todo and self._sent is None:
            self._start()
        while todo:
            free = [member for member in self.members if member.ready and len(member.given) < AHEAD]
            if not free:
                return
            member, held = min(free, key=lambda member: len(member.given)), todo.popleft()
            member.given.append(held)
            self._flying[member.handle.compute.remote(held.step.unit)] = held, member

    def _back(self) -> list[Held]:
        """Wait for an actor; the units that have to be computed again."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        again: list[Held] = []
        done, _ = ray.wait([*self._starting, *self._flying], num_returns=1, timeout=LOOK)
        if not done and not self._flying and not room(self.engine):
            raise ActorLost(
                "no node that is left has room for an actor: what was done before it is kept"
            )
        for ref in done:
            starting, (held, member) = (
                self._starting.pop(ref, None),
                self._flying.pop(ref, (None, None)),
            )
            try:
                found = ray.get(ref)
            except RayTaskError:
                raise
            except RayError as error:  # the actor died, or its node, with what it had computed
                self._lost(starting or member, error)
                again += [] if held is None else [held]
                continue
            if starting is not None:
                if isinstance(found, Failure):
                    raise found.raised("an actor's start") from None
                starting.ready, self._never_ready = True, 0
            elif held is not None and member is not None:
                held.found, held.done = (
                    found if isinstance(found, Failure) else unpacked_result(found),
                    True,
                )
                member.given.remove(held)
        return again[::-1]

    # ---- the actors

    def _start(self) -> None:
        import ray

        self._stack.enter_context(joined(self.engine))
        self.count = actors_of(self.engine)
        self._sent = ray.put(packed_model(self.lm)), ray.put(packed_work(self.work, self.lm))
        self._stack.enter_context(self._ended())
        for _ in range(self.count):
            self._another()

    def _another(self) -> None:
        """Start an actor. Units are given to it once it is ready."""
        import ray

        engine = self.engine
        options: dict[str, Any] = {
            "num_cpus": engine.cpus,
            "num_gpus": engine.gpus,
            "scheduling_strategy": "SPREAD",
        }
        options |= {} if engine.memory is None else {"memory": engine.memory}
        kind: Any = ray.remote(**options, max_restarts=0, max_task_retries=0)(Actor)
        member = Member(kind.remote(engine.threads, torch.get_float32_matmul_precision(), sys.path))
        self.members.append(member)
        self._starting[member.handle.ready.remote(*self._sent)] = member

    def _lost(self, member: Member | None, error: BaseException) -> None:
        """Another actor takes the place of one that died. `ActorLost` where that happens over and over.

        The unit that it was at is held to have killed it, not those that waited behind that one.
        """
        import ray

        if member is None or member.gone:
            return
        member.gone = True
        self.members.remove(member)
        with suppress(Exception):
            ray.kill(member.handle)
        held = member.given[0] if member.given else None
        if held is not None:
            held.lost += 1
        self._never_ready += not member.ready
        if self._never_ready > LOSSES or (held is not None and held.lost > LOSSES):
            what = (
                "an actor before it had the model"
                if held is None
                else f"the actors that computed {held.step.unit}"
            )
            raise ActorLost(
                f"{what} died {LOSSES + 1} times: is the memory enough? What was done before it is kept. Ray said: "
                f"{str(error).strip().splitlines()[0]}"
            ) from error
        self._another()

    @contextmanager
    def _ended(self) -> Iterator[None]:
        """A block behind which no actor is left, whether Ray is or not."""
        import ray

        try:
            yield
        finally:
            self._flying.clear()
            self._starting.clear()
            for member in self.members:
                with suppress(Exception):
                    ray.kill(member.handle)
            self._sent = None
