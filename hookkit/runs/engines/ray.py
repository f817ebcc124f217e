"""hk.Ray: which actors compute, and on which cluster. Ray is imported where it is used, and only there."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, Literal, TypeAlias

from ...errors import BadHook, MissingExtra, Unsupported
from ...models.lm import LM
from .transport import check_travels

ANY = ("auto", "local")  # addresses that mean no cluster in particular
LEAST = (2, 59)  # the first version whose local cluster asks everybody for a token
AUTH_MODE = "RAY_AUTH_MODE"


@dataclass(frozen=True, kw_only=True)
class Ray:
    """Actors of Ray that hold the model each: `engine=hk.Ray(actors=4)`; `engine="ray"` is `hk.Ray()`.

    actors   how many; as many as the cluster has room for, where left out
    cpus     of each actor; torch has as many threads there, and at least one
    gpus     of each actor; 1 for a model on a GPU
    memory   bytes of each actor, which Ray sets aside; nothing where left out
    address  of a cluster to join, such as "auto" for the one of this machine or "10.0.0.1:6379"

    A Ray that the program initialised is used as it is. Else the cluster at `address` is joined, or the one that the
    environment variable RAY_ADDRESS names; and where neither says one, Ray is started on this machine and ended again.
    It then listens to this machine alone (127.0.0.1), and asks for a token, unless RAY_AUTH_MODE says otherwise.

    >>> Ray(actors=2, cpus=4)
    Ray(actors=2, cpus=4, gpus=0, memory=None, address=None)
    """

    actors: int | None = None
    cpus: float = 1
    gpus: float = 0
    memory: int | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        for word, value, least in (
            ("actors", self.actors, 1),
            ("cpus", self.cpus, 0),
            ("gpus", self.gpus, 0),
        ):
            whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and (
                not (whole or (word != "actors" and isinstance(value, float))) or value < least
            ):
                raise BadHook(f"Ray({word}={value!r}): give a number from {least} on")
        if self.memory is not None and self.memory < 1:
            raise BadHook(f"Ray(memory={self.memory!r}): give bytes, or leave it out")

    @property
    def threads(self) -> int:
        """How many threads torch has in an actor."""
        return max(1, int(self.cpus))

    @property
    def needs(self) -> dict[str, float]:
        """What an actor takes of a node, in Ray's words for it."""
        found = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory or 0}
        return {name: value for name, value in found.items() if value}


EngineLike: TypeAlias = Ray | Literal["ray"] | None


def as_engine(engine: EngineLike, lm: LM) -> Ray | None:
    """The engine that is meant; None for this process.

    `MissingExtra` where Ray is not installed, `Unsupported` for a model that cannot be on an actor.
    """
    if engine is None:
        return None
    found = Ray() if engine == "ray" else engine
    if not isinstance(found, Ray):
        raise BadHook(
            f"engine={engine!r} is unknown: say 'ray', or hk.Ray(actors=…); leave it out for this process"
        )
    check_installed()
    check_travels(lm, found.gpus)
    return found


def check_installed() -> None:
    """Raise `MissingExtra` where Ray cannot be imported."""
    try:
        found = (
            find_spec("ray.actor") is not None
        )  # a folder that happens to be called ray has no such module
    except (ImportError, ValueError):
        found = False
    if not found:
        raise MissingExtra(
            "engine='ray' needs Ray, which is not installed: pip install 'hookkit[ray]'"
        )
    installed = _installed_version()
    if installed is not None and installed < LEAST:
        raise MissingExtra(
            f"engine='ray' needs ray>={LEAST[0]}.{LEAST[1]}, and {installed[0]}.{installed[1]} is installed, whose "
            "clusters let any process that reaches them run code: pip install --upgrade 'hookkit[ray]'"
        )


def _installed_version() -> tuple[int, int] | None:
    """The first two numbers of Ray's version; None where they cannot be read, as of a build of one's own."""
    try:
        major, minor = version("ray").split(".")[:2]
        return int(major), int(minor)
    except (PackageNotFoundError, ValueError):
        return None


@contextmanager
def joined(engine: Ray) -> Iterator[None]:
    """A block in which Ray is initialised. What was started or joined for it is left again, whatever happens."""
    import ray

    if ray.is_initialized():
        _check_address(engine)
        yield
        return
    address = engine.address or os.environ.get("RAY_ADDRESS") or "local"
    try:
        with _nothing_reported():
            if address == "local":
                _start()
            else:
                _join(address)
        yield
    finally:
        ray.shutdown()


def _start() -> None:
    """Start Ray on this machine, for this machine alone."""
    import ray

    chosen = os.environ.get(AUTH_MODE)
    try:
        with _this_machine_alone():
            ray.init(address="local", logging_level=logging.ERROR, include_dashboard=False)
    except Exception as error:  # Ray raises plain Exceptions
        raise Unsupported(f"Ray could not be started on this machine: {error}") from error
    # where the mode is not chosen, Ray turns the token on; setting it here would come too late for a Ray that is loaded
    if chosen is None and os.environ.get(AUTH_MODE, "").lower() != "token":
        raise Unsupported(
            "this Ray starts a cluster that asks nobody for a token, so that others could run code in it: upgrade Ray, "
            f"or set {AUTH_MODE}=token before Python is started"
        )


def _join(address: str) -> None:
    """Join a cluster."""
    import ray

    try:
        ray.init(address=address, logging_level=logging.ERROR)
    except Exception as error:  # no answer, another version of Ray or Python, no token
        raise Unsupported(
            f"no Ray cluster answers at {address!r}: start one with `ray start --head`, or leave address= out to start "
            f"Ray on this machine; where the cluster has a token, set {AUTH_MODE}=token here too. {error}"
        ) from error


@contextmanager
def _this_machine_alone() -> Iterator[None]:
    """A block in which a Ray that is started listens on 127.0.0.1, as it does by itself on macOS and Windows."""
    from ray._private import ray_constants

    constants: Any = ray_constants
    before = constants.ENABLE_RAY_CLUSTER
    constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _nothing_reported() -> Iterator[None]:
    """A block in which a Ray that is started sends nobody a report of its use, unless the user said otherwise."""
    name = "RAY_USAGE_STATS_ENABLED"
    if name in os.environ:
        yield
        return
    os.environ[name] = "0"
    try:
        yield
    finally:
        del os.environ[name]


def _check_address(engine: Ray) -> None:
    """Raise where another cluster is asked for than the one that the program is in."""
    import ray

    if engine.address is None or engine.address in ANY:
        return
    there = ray.get_runtime_context().gcs_address
    if engine.address != there:
        raise Unsupported(
            f"address={engine.address!r} was asked for, and this program has initialised Ray at {there!r}: leave "
            "address= out, or call ray.shutdown() first"
        )


def room(engine: Ray) -> int:
    """For how many actors the cluster has room, were it free. A node has it or not: an actor is not spread."""
    import ray

    return sum(_room(node["Resources"], engine.needs) for node in ray.nodes() if node["Alive"])


def _room(there: Mapping[str, float], needs: Mapping[str, float]) -> int:
    if not needs:
        return max(1, int(there.get("CPU", 0)))
    return min(int(there.get(name, 0) / value + 1e-9) for name, value in needs.items())


def actors_of(engine: Ray) -> int:
    """How many actors there are to be. `Unsupported` where the cluster has no room for them."""
    import ray

    there, fit = ray.cluster_resources(), room(engine)
    if fit < (engine.actors or 1):
        words = ", ".join(f"{value:g} {name}" for name, value in engine.needs.items())
        nodes = sum(node["Alive"] for node in ray.nodes())
        has = ", ".join(f"{there.get(name, 0):g} {name}" for name in engine.needs)
        raise Unsupported(
            f"{engine.actors or 1} actors of {words} each were asked for, and the cluster has {has} on {nodes} "
            f"node{'' if nodes == 1 else 's'}, room for {fit}: give fewer actors, or less to each"
        )
    return engine.actors or fit
