"""The options of a command that say where it computes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..engines import EngineLike


@dataclass(frozen=True)
class Engine:
    """Where it is computed: in this process, or by Ray's actors."""

    engine: Annotated[str | None, typer.Option(help="ray; this process if left out.")] = None
    actors: Annotated[int | None, typer.Option(min=1, help="With ray: how many; as many as fit if left out.")] = None
    cpus: Annotated[float | None, typer.Option(min=0, help="With ray: of each actor; 1 if left out.")] = None
    gpus: Annotated[float | None, typer.Option(min=0, help="With ray: of each actor; 0 if left out.")] = None
    address: Annotated[str | None, typer.Option(help="With ray: of a cluster to join.")] = None

    def chosen(self) -> "EngineLike":
        """The engine that these options mean."""
        from ..engines import Ray, check_installed
        from ..errors import BadHook

        words = {"actors": self.actors, "cpus": self.cpus, "gpus": self.gpus, "address": self.address}
        given = {name: value for name, value in words.items() if value is not None}
        if self.engine not in (None, "ray"):
            raise BadHook(f"--engine {self.engine!r} is unknown: say ray, or leave it out")
        if given and self.engine is None:
            raise BadHook(f"--{next(iter(given))} is of Ray's actors: add --engine ray")
        if self.engine is not None:
            check_installed()
        return None if self.engine is None else Ray(**given)  # pyright: ignore[reportArgumentType]
