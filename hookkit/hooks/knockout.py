"""The hook that cuts attention between tokens: `knockout`."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..arguments import check_integers, check_keywords
from ..errors import BadEdit, BadHook, EmptySelection, OutOfRange
from ..models.positions import IndicesLike, Pos, PosLike, Where, read_position, resolve_positions
from ..models.sites import Site, as_sites
from ..models.views import is_hidden, unseen_value
from .base import Binding, Change, EditHook, Here, as_where, set_field


@dataclass(frozen=True)
class Knockout(EditHook):
    """Cuts attention from the queries, `where.pos`, to the keys. `knockout` returns it."""

    key: Pos = None

    verb: ClassVar[str] = "knockout"

    def check(self) -> None:
        for site in self.sites:
            if not isinstance(site, Site) or site.name != "scores" or site.layer is None:
                raise BadHook(
                    f"knockout cuts attention's scores in layers, and {site} is none of them"
                )
        if self.key is None:
            raise EmptySelection(
                "knockout needs the keys that are not to be seen: key=0, key=hk.at('Mary')"
            )
        set_field(self, "key", read_position(self.key))
        _check_visible(self.key, self.where.pos)

    def change(self, binding: Binding) -> Change:
        def apply(values: Tensor, here: Here) -> Tensor:
            masked = unseen_value(values.dtype, scores=True)
            new = values.clone()
            for index, row in enumerate(here.rows):
                new[index, ..., self._keys(here, row, values.shape[-1])] = masked
            blind = here.real_cells(is_hidden(new).all(-1) & ~is_hidden(values).all(-1))
            if bool(blind.any()):
                index, column = blind.nonzero()[0][:2].tolist()
                raise BadEdit(
                    f"{self} leaves the query at position {int(here.positions[index, column])} of "
                    f"row {here.rows[index]} nothing to see: name the queries, such as "
                    "query=slice(1, None), or fewer keys"
                )
            return new

        return apply

    def _keys(self, here: Here, row: int, n_keys: int) -> list[int]:
        """Returns the positions of a row's keys that are cut, among the first `n_keys`."""
        sequences = here.cells.text
        length = sequences.lengths[row]
        prompt = sequences.prompt(row)
        positions = resolve_positions(
            Where(self.key), length, lambda at: sequences.find(prompt, at)
        )
        if isinstance(positions, range):
            return list(range(positions.start, min(positions.stop, n_keys), positions.step))
        if sequences.final and positions[-1] >= length:
            raise OutOfRange(
                f"{self} means the key at position {positions[-1]} of row {row}, which has "
                f"{length} tokens"
            )
        return [position for position in positions if position < n_keys]

    def __str__(self) -> str:
        arguments = []
        for name in ("layer", "head"):
            indices = list(dict.fromkeys(getattr(site, name) for site in self.sites))
            if len(indices) > 1:
                arguments.append(str(indices))
            elif indices != [None]:
                arguments.append(str(indices[0]))
        keywords = {"query": self.where.pos, "key": self.key, "rows": self.where.rows}
        for name, value in keywords.items():
            if value is not None:
                arguments.append(f"{name}={value!r}")
        return f"knockout({', '.join(arguments)})"


def _check_visible(key: Pos, query: Pos) -> None:
    """Raises `BadHook` if all keys come after all queries, where this is known without the text."""
    keys, queries = _bounds(key), _bounds(query)
    if keys is None or queries is None or (keys[0] < 0) != (queries[1] < 0):
        return
    if keys[0] > queries[1]:
        raise BadHook(
            f"key={key!r} comes after query={query!r}, which never sees it: a token sees itself "
            "and those before it, so there is nothing to cut; name keys that are not after the "
            "query"
        )


def _bounds(positions: Pos) -> tuple[int, int] | None:
    """Returns the first and the last of positions that are numbers of one sign; None for others."""
    numbers = (positions,) if isinstance(positions, int) else positions
    if not isinstance(numbers, tuple) or (min(numbers) < 0) != (max(numbers) < 0):
        return None
    return min(numbers), max(numbers)


@check_keywords
def knockout(
    layer: int | Iterable[int],
    head: int | Iterable[int] | None = None,
    *,
    key: PosLike,
    query: PosLike = None,
    rows: IndicesLike = None,
) -> Knockout:
    """Cuts attention from the tokens `query` to the tokens `key` (Geva et al. 2023).

    The scores of these pairs become the smallest number of the dtype, so that the softmax gives
    them no weight and renormalizes the rest. `head` is one head or several; by default all of them.
    Positions are a number, a slice, a list, `hk.at("store")`, `hk.PROMPT` or `hk.GENERATED`. A
    query that can attend to nothing raises `BadEdit`.

    >>> print(knockout(9, 3, query=-1, key=at("Mary")))
    knockout(9, 3, query=-1, key=at('Mary'))
    """
    layers = check_integers(layer, "layer", least=0, meaning="the layers, counted from 0,")
    heads: list[int | None] = [None]
    if head is not None:
        heads = [*check_integers(head, "head", least=0, meaning="the heads, counted from 0,")]
    scores = [Site("scores", *indices) for indices in itertools.product(layers, heads)]
    return Knockout(as_sites(scores), as_where(query, rows), read_position(key))
