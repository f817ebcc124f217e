"""hk.Ray: how many actors compute, and on which cluster.

Ray is imported inside functions, so that hookkit does not need it otherwise.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from operator import itemgetter
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from ...errors import BadHook, MissingExtra, Unsupported
from ...models.lm import LM
from ..manager import find_user_hooks

ANY_CLUSTER = ("auto", "local")  # addresses that name no cluster in particular
OLDEST_VERSION = (2, 59)  # the first version whose local cluster requires a token
AUTH_MODE = "RAY_AUTH_MODE"
USAGE_STATS = "RAY_USAGE_STATS_ENABLED"


@dataclass(frozen=True, kw_only=True)
class Ray:
    """Ray actors that hold the model each: `engine=hk.Ray(actors=4)`; "ray" means `hk.Ray()`.

    actors   how many; by default as many as the cluster has room for
    cpus     of each actor; torch has as many threads there, and at least one
    gpus     of each actor; 1 for a model on a GPU
    memory   bytes that Ray reserves for each actor; none by default
    address  of a cluster to join, such as "auto" for the one of this machine or "10.0.0.1:6379"

    If the program has initialised Ray, it is used as it is. Otherwise the cluster at `address` is
    joined, or the one that the environment variable RAY_ADDRESS names. If neither names one, Ray is
    started on this machine and ended afterwards. It then listens to this machine alone (127.0.0.1),
    and requires a token, unless RAY_AUTH_MODE says otherwise.

    >>> Ray(actors=2, cpus=4)
    Ray(actors=2, cpus=4, gpus=0, memory=None, address=None)
    """

    actors: int | None = None
    cpus: float = 1
    gpus: float = 0
    memory: int | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        if self.actors is not None:
            _check_number("actors", self.actors, least=1, types=int)
        _check_number("cpus", self.cpus, least=0, types=int | float)
        _check_number("gpus", self.gpus, least=0, types=int | float)
        if self.memory is not None and self.memory < 1:
            raise BadHook(f"Ray(memory={self.memory!r}): give bytes, or leave it out")

    @property
    def threads(self) -> int:
        """The number of torch's threads in an actor."""
        return max(1, int(self.cpus))

    @property
    def needs(self) -> dict[str, float]:
        """The resources of an actor, by Ray's names for them."""
        resources = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory or 0}
        return {name: value for name, value in resources.items() if value}


def _check_number(name: str, value: Any, *, least: int, types: Any) -> None:
    is_number = isinstance(value, types) and not isinstance(value, bool)
    if not is_number or value < least:
        raise BadHook(f"Ray({name}={value!r}): give a number from {least} on")


EngineLike: TypeAlias = Ray | Literal["ray"] | None


def read_engine(engine: EngineLike, lm: LM) -> Ray | None:
    """Returns the engine; None means this process.

    Raises `MissingExtra` if Ray is not installed, `Unsupported` if the model cannot be on an actor.
    """
    if engine is None:
        return None
    if engine == "ray":
        engine = Ray()
    if not isinstance(engine, Ray):
        raise BadHook(
            f"engine={engine!r} is unknown: say 'ray', or hk.Ray(actors=…); leave it out for "
            "this process"
        )
    lm.refuse_engine(f"engine={engine!r} sends the model to actors")
    check_installed()
    _check_whole_model(lm)
    _check_weights(lm, engine.gpus)
    return engine


# ---- models that can be sent to an actor


def _check_whole_model(lm: LM) -> None:
    """Raises `Unsupported` for a model with hooks of the user's, or which is not all here."""
    root, kind = lm.root, type(lm.root).__name__
    hooked_paths = find_user_hooks(lm.model)
    if hooked_paths:
        raise Unsupported(
            "the model carries hooks that are not hookkit's (on "
            f"{hooked_paths[0] or 'the model'}), which cannot go with it to an actor: remove them, "
            "or leave engine= out"
        )
    if lm.ranks is not None:
        raise Unsupported(
            f"this {kind} is held by {lm.ranks.count} processes together, and every actor holds a "
            "whole model: load it without tp_plan, or leave engine= out"
        )
    is_offloaded = any(weight.is_meta for weight in root.parameters())
    if is_offloaded or any(hasattr(module, "_hf_hook") for module in root.modules()):
        raise Unsupported(
            f"this {kind} is offloaded or spread by accelerate, and every actor holds a whole "
            "model: load it without device_map, or leave engine= out"
        )


def _check_weights(lm: LM, gpus: float) -> None:
    """Raises `Unsupported` for weights that cannot be sent to an actor with so many GPUs."""
    kind, weights = type(lm.root).__name__, list(lm.root.parameters())
    devices = {weight.device for weight in weights} or {torch.device("cpu")}
    if len(devices) > 1:
        raise Unsupported(
            f"this {kind} is on several devices, and an actor's model is on one: leave engine= out"
        )
    if any("_orig_mod" in module._modules for module in lm.wrapping):
        raise Unsupported(
            "a compiled model does not travel: give the one that was compiled, or leave engine= out"
        )
    if set(map(type, weights)) - {nn.Parameter}:
        raise Unsupported(
            f"this {kind} has quantised weights, which do not travel: leave engine= out"
        )
    device_type = devices.pop().type
    if (device_type == "cuda") != (gpus > 0):
        device_name = "a GPU" if device_type == "cuda" else f"the {device_type}"
        raise Unsupported(
            f"the model is on {device_name}, and its actors have gpus={gpus:g}: an actor computes "
            "where this process does, so load the model there, or change gpus="
        )


# ---- the installation


def check_installed() -> None:
    """Raises `MissingExtra` if Ray cannot be imported, or is too old."""
    try:
        # a folder that happens to be called ray has no module ray.actor
        is_installed = find_spec("ray.actor") is not None
    except (ImportError, ValueError):
        is_installed = False
    if not is_installed:
        raise MissingExtra(
            "engine='ray' needs Ray, which is not installed: pip install 'hookkit[ray]'"
        )
    try:
        major, minor = version("ray").split(".")[:2]
        installed = int(major), int(minor)
    except (PackageNotFoundError, ValueError):  # of a local build, say
        return
    if installed < OLDEST_VERSION:
        oldest, current = (".".join(map(str, numbers)) for numbers in (OLDEST_VERSION, installed))
        raise MissingExtra(
            f"engine='ray' needs ray>={oldest}, and {current} is installed, whose clusters let any "
            "process that reaches them run code: pip install --upgrade 'hookkit[ray]'"
        )


# ---- the cluster


@contextmanager
def joined(engine: Ray) -> Iterator[None]:
    """A context in which Ray is initialised; at its end, what was started or joined is left."""
    import ray

    if ray.is_initialized():
        current = ray.get_runtime_context().gcs_address
        if engine.address not in (None, *ANY_CLUSTER, current):
            raise Unsupported(
                f"address={engine.address!r} was asked for, and this program has initialised Ray "
                f"at {current!r}: leave address= out, or call ray.shutdown() first"
            )
        yield
        return
    address = engine.address or os.environ.get("RAY_ADDRESS") or "local"
    try:
        with _without_usage_reports():
            if address == "local":
                _start()
            else:
                _join(address)
        yield
    finally:
        ray.shutdown()


def _start() -> None:
    """Starts Ray on this machine, for this machine alone."""
    import ray
    from ray._private import ray_constants

    constants: Any = ray_constants
    mode_before, listens_before = os.environ.get(AUTH_MODE), constants.ENABLE_RAY_CLUSTER
    constants.ENABLE_RAY_CLUSTER = False  # it listens on 127.0.0.1, as on macOS and Windows
    try:
        ray.init(address="local", logging_level=logging.ERROR, include_dashboard=False)
    except Exception as error:  # Ray raises plain Exceptions
        raise Unsupported(f"Ray could not be started on this machine: {error}") from error
    finally:
        constants.ENABLE_RAY_CLUSTER = listens_before
    # if the mode is not set, Ray requires a token and sets the mode; setting it here would be too
    # late if Ray is imported already
    if mode_before is None and os.environ.get(AUTH_MODE, "").lower() != "token":
        raise Unsupported(
            "this Ray starts a cluster that asks nobody for a token, so that others could run code "
            f"in it: upgrade Ray, or set {AUTH_MODE}=token before Python is started"
        )


def _join(address: str) -> None:
    import ray

    try:
        ray.init(address=address, logging_level=logging.ERROR)
    except Exception as error:  # no answer, another version of Ray or Python, no token
        raise Unsupported(
            f"no Ray cluster answers at {address!r}: start one with `ray start --head`, or leave "
            "address= out to start Ray on this machine; where the cluster has a token, set "
            f"{AUTH_MODE}=token here too. {error}"
        ) from error


@contextmanager
def _without_usage_reports() -> Iterator[None]:
    """A context in which Ray, if started, reports its use to nobody, unless the user wants it."""
    if USAGE_STATS in os.environ:
        yield
        return
    os.environ[USAGE_STATS] = "0"
    try:
        yield
    finally:
        del os.environ[USAGE_STATS]


def room(engine: Ray) -> int:
    """Returns for how many actors the cluster has room, if nothing else runs on it.

    An actor is on one node.
    """
    import ray

    alive = filter(itemgetter("Alive"), ray.nodes())
    return sum(_room_on(node["Resources"], engine.needs) for node in alive)


def _room_on(resources: Mapping[str, float], needs: Mapping[str, float]) -> int:
    if not needs:
        return max(1, int(resources.get("CPU", 0)))
    return min(int(resources.get(name, 0) / value + 1e-9) for name, value in needs.items())


def actors_of(engine: Ray) -> int:
    """Returns how many actors to start, or raises `Unsupported` if the cluster has no room."""
    import ray

    fit, actors = room(engine), engine.actors or 1
    if fit < actors:
        resources = ray.cluster_resources()
        needs, has = [], []
        for name, value in engine.needs.items():
            needs.append(f"{value:g} {name}")
            has.append(f"{resources.get(name, 0):g} {name}")
        count = sum(map(itemgetter("Alive"), ray.nodes()))
        nodes = "1 node" if count == 1 else f"{count} nodes"
        raise Unsupported(
            f"{actors} actors of {', '.join(needs)} each were asked for, and the cluster has "
            f"{', '.join(has)} on {nodes}, room for {fit}: give fewer actors, or less to each"
        )
    return engine.actors or fit
