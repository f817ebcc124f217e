"""Steps: units that are computed here or on Ray actors, and a function for each result.

The actors of a `Crew` hold the model each. Ray places the actors, sends them the model and the
units, and says which have died. This file adds an order: results are taken in the order of the
steps, as in one process, so that all that is written is the same, byte for byte. Ray Data cannot be
used here: it has no source that reads a Python iterator as it goes, while a harvest's texts are
read once, here, and no further ahead than is computed; nor does it know bfloat16.

Up to `AHEAD` units for each actor are in flight, or wait for an earlier one. If an actor dies,
another one computes its unit from the beginning, with the same result. Each result is taken once.

The model itself is sent, not its name, with all changes after loading: an actor needs neither a Hub
nor the folders of this machine. Each storage of the weights is sent once, beside the pickle. Ray
keeps it in shared memory, and the actors of a node compute with that memory, without a copy. Work
is pickled without the model: it names the model's modules by their paths.
"""

import io
import pickle
import sys
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch

from ...errors import ActorLost, OtherModel, Unsupported
from ...models.lm import LM
from ...models.provenance import weights_hash
from .ray import Ray, actors_of, joined, room

AHEAD = 3  # units in flight, or computed and waiting for an earlier one, for each actor
CHECK_INTERVAL = 10  # seconds between checks whether a node with room is left
THE_LM = "lm:"  # the name of the LM, among names that are paths of modules
LOSSES = 5  # how often actors may die at one unit, or in a row before they were ready


@dataclass(frozen=True, eq=False)
class Step:
    """A unit, or None if nothing is to be computed, and `then`, which is called with its result.

    The printed form of a unit names the texts, or the cells, that are in it.
    """

    unit: Any
    then: Callable[[Any], object]


Steps: TypeAlias = Iterator[Step]


@runtime_checkable
class Work(Protocol):
    """Computes units. The result of a unit is the same whenever and wherever it is computed."""

    def compute(self, unit: Any, /) -> Any: ...


@runtime_checkable
class ActorWork(Work, Protocol):
    """Work for actors only. `prepare` is called when an actor starts; several units run at once."""

    units_at_once: ClassVar[int]

    def prepare(self) -> None: ...


def run_steps(engine: Ray | None, lm: LM, work: Work, steps: Steps) -> None:
    """Runs all steps in their order. Units are computed by the engine, or here if it is None.

    Here, each step runs to its end before the next is requested.
    """
    if engine is not None:
        Crew(engine, lm, work).run(steps)
        return
    for step in steps:
        step.then(None if step.unit is None else work.compute(step.unit))


# ---- in the process of an actor


@dataclass(frozen=True, eq=False)
class Packed:
    """A value as bytes, with the storages of its tensors beside them.

    A storage that is `shared` is only read, never written to.
    """

    data: bytes
    storages: Sequence[np.ndarray]
    devices: Sequence[str]
    shared: Sequence[bool]


class Actor:
    """The model in a process of Ray's, and the work that it does there."""

    def __init__(self, threads: int, precision: str, paths: list[str]) -> None:
        # the modules of the user's functions are imported from these paths
        sys.path += [path for path in paths if path not in sys.path]
        self.threads, self.precision = threads, precision
        self.work: Any = None

    def ready(self, model: Packed, work: Packed) -> "Failure | None":
        """Unpacks the model and the work."""
        try:
            self.work = unpack(work, unpack_model(model))
            # after the imports of the user's modules, which may set other values
            torch.set_num_threads(self.threads)
            torch.set_float32_matmul_precision(self.precision)
            if isinstance(self.work, ActorWork):
                self.work.prepare()
        except Exception as error:  # noqa: BLE001  it is raised in the user's process
            return _failure(error)
        return None

    def compute(self, unit: Any) -> "Packed | Failure":
        """Returns the result of a unit, or its error."""
        try:
            torch.set_num_threads(self.threads)  # of this thread, where units run at once
            return pack_result(self.work.compute(unit))
        except Exception as error:  # noqa: BLE001  it is raised in the user's process
            return _failure(error)


@dataclass(frozen=True, eq=False)
class Failure:
    """An error in a form that can be sent: pickled, with its traceback as text."""

    error: bytes
    traceback: str

    def to_error(self, unit: Any) -> BaseException:
        """Returns the error, with the unit and the traceback as notes."""
        error: BaseException = pickle.loads(self.error)
        error.add_note(f"in {unit}, on an actor of Ray")
        error.add_note(self.traceback)
        return error


def _failure(error: Exception) -> Failure:
    from ray.cloudpickle import dumps  # pyright: ignore[reportAttributeAccessIssue]

    text = "".join(traceback.format_exception(error)).rstrip()
    kind, state = type(error), dict(vars(error))
    forms = (error, _ErrorParts(kind, error.args, state), _ErrorParts(kind, (str(error),), {}))
    for form in forms:
        try:
            data = dumps(form)
            pickle.loads(data)
        except Exception:  # noqa: BLE001  an error may hold any value
            continue
        return Failure(data, text)
    return Failure(dumps(RuntimeError(f"{kind.__name__}: {error}")), text)


class _ErrorParts:
    """Is unpickled as an error that cannot be made by calling its class with its arguments."""

    def __init__(self, kind: type[Exception], args: tuple[Any, ...], state: dict[str, Any]) -> None:
        self.parts = kind, args, state

    def __reduce__(self) -> Any:
        return _make_error, self.parts


def _make_error(kind: type[Exception], args: tuple[Any, ...], state: dict[str, Any]) -> Exception:
    error = kind.__new__(kind, *args)
    error.args = args
    vars(error).update(state)
    return error


# ---- in the user's process


@dataclass(eq=False)
class Task:
    """A step and its result. Owned by the `Crew`."""

    step: Step
    done: bool
    result: Any = None
    losses: int = 0  # how many actors have died at it

    def finish(self, member: "Member", result: Any) -> None:
        """Stores the result, which this actor has computed."""
        self.result = result if isinstance(result, Failure) else unpack(result)
        self.done = True
        member.tasks.remove(self)


@dataclass(eq=False)
class Member:
    """An actor and its tasks. It begins them in this order. Owned by the `Crew`."""

    handle: Any
    ready: bool = False
    tasks: list[Task] = field(default_factory=list)
    lost: bool = False


@dataclass(eq=False)
class Crew:
    """Actors that do some work, from its first unit to its end. Used once."""

    engine: Ray
    lm: LM
    work: Work
    members: list[Member] = field(default_factory=list)
    count: int = 1
    _queue: deque[Task] = field(default_factory=deque)  # in the order of the steps
    _waiting: deque[Task] = field(default_factory=deque)  # those that no actor has
    _stack: ExitStack = field(default_factory=ExitStack)
    _packed: Any = None  # the model and the work, in Ray's store
    # by Ray's reference: the tasks that are computed, None for an actor that starts
    _in_flight: dict[Any, tuple[Task | None, Member]] = field(default_factory=dict)
    _losses_at_start: int = 0  # in a row

    def run(self, steps: Steps) -> None:
        """Runs steps in their order.

        What was computed before an error is taken first, as if all had run in this process.
        """
        with self._stack:
            error = self._run_until_error(steps)
            while self._queue:
                self._wait_for_results()
            if error is not None:
                raise error

    def _run_until_error(self, steps: Steps) -> Exception | None:
        """Gives all steps to actors; returns the error of the iterator, which comes after them."""
        while True:
            while not self._has_capacity():
                self._wait_for_results()
            try:
                step = next(steps, None)
            except Exception as error:  # noqa: BLE001  it is raised after the steps before it
                return error
            if step is None:
                return None
            task = Task(step, done=step.unit is None)
            self._queue.append(task)
            if not task.done:
                self._waiting.append(task)
            self._assign()
            self._take_results()

    def _has_capacity(self) -> bool:
        units = sum(task.step.unit is not None for task in self._queue)
        return units < AHEAD * self.count

    def _take_results(self) -> None:
        while self._queue and self._queue[0].done:
            task = self._queue.popleft()
            if isinstance(task.result, Failure):
                raise task.result.to_error(task.step.unit) from None
            task.step.then(task.result)

    def _assign(self) -> None:
        """Gives tasks to the actors that are ready, those with the fewest tasks first."""
        if self._waiting and self._packed is None:
            self._start()
        ready = [member for member in self.members if member.ready]
        while self._waiting and ready:
            member = min(ready, key=lambda member: len(member.tasks))
            if len(member.tasks) == AHEAD:
                return
            task = self._waiting.popleft()
            member.tasks.append(task)
            self._in_flight[member.handle.compute.remote(task.step.unit)] = task, member

    def _wait_for_results(self) -> None:
        """Waits for an actor, gives it the next tasks, and takes the results that have come."""
        self._wait_for_actor()
        self._assign()
        self._take_results()

    def _wait_for_actor(self) -> None:
        """Waits for a result or a start. The task of an actor that has died waits for another."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        done, _ = ray.wait([*self._in_flight], num_returns=1, timeout=CHECK_INTERVAL)
        if not done:
            self._check_room()
            return
        task, member = self._in_flight.pop(done[0])
        try:
            result: Any = ray.get(done[0])
        except RayTaskError:
            raise
        except RayError as error:  # the actor died, or its node, with what it had computed
            self._replace(member, error)
            if task is not None:
                self._waiting.appendleft(task)
            return
        if task is not None:
            task.finish(member, result)
        elif isinstance(result, Failure):
            raise result.to_error("an actor's start") from None
        else:
            member.ready, self._losses_at_start = True, 0

    def _check_room(self) -> None:
        """Raises `ActorLost` if nothing is computed and no actor can start."""
        is_computing = any(task is not None for task, _ in self._in_flight.values())
        if not is_computing and not room(self.engine):
            raise ActorLost(
                "no node that is left has room for an actor: what was done before it is kept"
            )

    # ---- the actors

    def _start(self) -> None:
        import ray

        self._stack.enter_context(joined(self.engine))
        self.count = actors_of(self.engine)
        self._packed = ray.put(pack_model(self.lm)), ray.put(pack_work(self.work, self.lm))
        self._stack.callback(self._kill_all)
        for _ in range(self.count):
            self._start_actor()

    def _start_actor(self) -> None:
        import ray

        engine = self.engine
        remote_actor: Any = ray.remote(  # pyright: ignore[reportCallIssue]
            num_cpus=engine.cpus,
            num_gpus=engine.gpus,
            memory=engine.memory,
            max_concurrency=getattr(self.work, "units_at_once", 1),
            scheduling_strategy="SPREAD",
            max_restarts=0,
            max_task_retries=0,
        )(Actor)
        precision = torch.get_float32_matmul_precision()
        member = Member(remote_actor.remote(engine.threads, precision, sys.path))
        self.members.append(member)
        self._in_flight[member.handle.ready.remote(*self._packed)] = None, member

    def _replace(self, member: Member, error: BaseException) -> None:
        """Starts another actor for one that died; `ActorLost` if that happens again and again.

        The first of its tasks counts as the one that killed it, not those that waited after it or
        ran beside it.
        """
        import ray

        if member.lost:
            return
        member.lost = True
        self.members.remove(member)
        with suppress(Exception):
            ray.kill(member.handle)
        self._take_finished(member)
        subject, losses = "an actor before it had the model", 0
        if member.tasks:
            task = member.tasks[0]
            task.losses += 1
            subject, losses = f"the actors that computed {task.step.unit}", task.losses
        if not member.ready:
            self._losses_at_start += 1
        if max(self._losses_at_start, losses) > LOSSES:
            reason = str(error).strip().splitlines()[0]
            raise ActorLost(
                f"{subject} died {LOSSES + 1} times: is the memory enough? What was done before it "
                f"is kept. Ray said: {reason}"
            ) from error
        self._start_actor()

    def _take_finished(self, member: Member) -> None:
        """Takes the results that an actor had given before it died."""
        import ray
        from ray.exceptions import RayError

        for reference, (task, owner) in list(self._in_flight.items()):
            if owner is not member or task is None or not ray.wait([reference], timeout=0)[0]:
                continue
            with suppress(RayError):  # this task is lost: the next wait for it raises this error
                task.finish(member, ray.get(reference))
                del self._in_flight[reference]

    def _kill_all(self) -> None:
        """Kills all actors; Ray itself may continue to run."""
        import ray

        self._in_flight.clear()
        for member in self.members:
            with suppress(Exception):
                ray.kill(member.handle)
        self._packed = None


# ---- models, work and results


def pack_model(lm: LM) -> Packed:
    """Returns the fields of an LM, and the hash of its weights."""
    weights = frozenset(weight.untyped_storage().data_ptr() for weight in lm.model.parameters())
    fields = [lm.model, lm.tokenizer, lm.name, lm.row, lm.dictionaries, lm.processor]
    return _pack([*fields, weights_hash(lm)], {}, weights)


def unpack_model(packed: Packed) -> LM:
    """Returns the model in an actor; `OtherModel` if its weights are not those that were sent."""
    *fields, sent_hash = unpack(packed)
    lm = LM(*fields)
    own_hash = weights_hash(lm)
    if own_hash != sent_hash:
        raise OtherModel(
            f"the weights in the actor have the sha256 {own_hash}, and {sent_hash} was sent: "
            "report this"
        )
    return lm


def pack_work(work: Any, lm: LM) -> Packed:
    """Returns work for a model, without the model."""
    references = {id(module): path for path, module in lm.model.named_modules()}
    return _pack(work, {**references, id(lm): THE_LM}, frozenset())


def pack_result(value: Any) -> Packed:
    """Returns the result of a unit; its tensors will be in Ray's shared memory."""
    return _pack(value, {}, None)


# ---- pickling


def _pack(value: Any, references: Mapping[int, str], read_only: frozenset[int] | None) -> Packed:
    """Pickles a value.

    `references` has, by id, the paths of modules that are not sent; `read_only` the addresses of
    storages that nothing writes to, None for all.
    """
    # cloudpickle sends the user's functions by their code
    from ray.cloudpickle import CloudPickler  # pyright: ignore[reportAttributeAccessIssue]

    storages = _Storages(read_only)

    class Pickler(CloudPickler):
        def persistent_id(self, obj: Any) -> Any:
            if id(obj) in references:
                return references[id(obj)]
            return storages.add(obj) if isinstance(obj, torch.TypedStorage) else None

    file = io.BytesIO()
    try:
        Pickler(file, protocol=5).dump(value)
    # what the pickle methods of torch, of Python and of the user's objects raise
    except (pickle.PicklingError, TypeError, AttributeError, NotImplementedError) as error:
        raise Unsupported(
            f"something in the model, a hook or a metric cannot go to an actor ({error}): a "
            "function may use values and modules, and no open file, lock or connection"
        ) from error
    return Packed(file.getvalue(), storages.arrays, storages.devices, storages.shared)


def unpack(packed: Packed, lm: LM | None = None) -> Any:
    """Returns work, with the modules of this copy of the model, or the result of a unit.

    The tensors of a result must not be written to.
    """
    storages: dict[int, torch.UntypedStorage] = {}

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, pid: Any) -> Any:
            if isinstance(pid, str):
                assert lm is not None
                return lm if pid == THE_LM else lm.model.get_submodule(pid)
            number, dtype = pid
            if number not in storages:
                storages[number] = _storage(packed, number)
            return torch.TypedStorage(wrap_storage=storages[number], dtype=dtype, _internal=True)

    return Unpickler(io.BytesIO(packed.data)).load()


def _storage(packed: Packed, number: int) -> torch.UntypedStorage:
    array = packed.storages[number]
    if len(array):
        with warnings.catch_warnings():
            # torch warns that the memory is read-only, which shared memory has to be
            warnings.simplefilter("ignore", UserWarning)
            tensor = torch.from_numpy(array)
    else:
        tensor = torch.empty(0, dtype=torch.uint8)
    device = packed.devices[number]
    if device != "cpu":
        return tensor.to(device).untyped_storage()
    if not packed.shared[number]:
        tensor = tensor.clone()
    return tensor.untyped_storage()


@dataclass(eq=False)
class _Storages:
    """The storages of the tensors in a value, each once. Owned by one call of `_pack`."""

    read_only: frozenset[int] | None
    arrays: list[np.ndarray] = field(default_factory=list)
    devices: list[str] = field(default_factory=list)
    shared: list[bool] = field(default_factory=list)
    _numbers: dict[tuple[int, int], int] = field(default_factory=dict)
    # the storages are kept alive, so that no address is used twice
    _added: list[torch.TypedStorage] = field(default_factory=list)

    def add(self, storage: torch.TypedStorage) -> tuple[int, torch.dtype]:
        """Adds a storage and returns its persistent id."""
        untyped = storage._untyped_storage
        key = untyped.data_ptr(), untyped.nbytes()
        if key not in self._numbers or not untyped.nbytes():
            self._numbers[key] = len(self.arrays)
            numbers = torch.empty(0, dtype=torch.uint8, device=untyped.device)
            numbers.set_(untyped)  # pyright: ignore[reportCallIssue, reportArgumentType]
            self.arrays.append(numbers.cpu().numpy())
            self.devices.append(untyped.device.type)
            is_shared = self.read_only is None or untyped.data_ptr() in self.read_only
            self.shared.append(is_shared)
            self._added.append(storage)
        return self._numbers[key], storage.dtype
