"""The options of a command that say where it computes."""

from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

if TYPE_CHECKING:
    from ..engines import EngineLike

Engine: TypeAlias = Annotated[str | None, typer.Option(help="ray; this process if left out.")]
Actors: TypeAlias = Annotated[int | None, typer.Option(min=1, help="With ray: how many; as many as fit if left out.")]
Cpus: TypeAlias = Annotated[float | None, typer.Option(min=0, help="With ray: of each actor; 1 if left out.")]
Gpus: TypeAlias = Annotated[float | None, typer.Option(min=0, help="With ray: of each actor; 0 if left out.")]
Address: TypeAlias = Annotated[str | None, typer.Option(help="With ray: of a cluster to join.")]


def chosen(
    engine: str | None, actors: int | None, cpus: float | None, gpus: float | None, address: str | None
) -> "EngineLike":
    """The engine that these options mean."""
    from ..engines import Ray, check_installed
    from ..errors import BadHook

    words = {"actors": actors, "cpus": cpus, "gpus": gpus, "address": address}
    given = {name: value for name, value in words.items() if value is not None}
    if engine not in (None, "ray"):
        raise BadHook(f"--engine {engine!r} is unknown: say ray, or leave it out")
    if given and engine is None:
        raise BadHook(f"--{next(iter(given))} is of Ray's actors: add --engine ray")
    if engine is not None:
        check_installed()
    return None if engine is None else Ray(**given)  # pyright: ignore[reportArgumentType]
