"""Hooks that cut attention: knockout."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..arguments import checks_keywords, whole_numbers
from ..errors import BadEdit, BadHook, EmptySelection, OutOfRange
from ..models.positions import CountLike, Pos, PosLike, Where, as_pos, wish
from ..models.sites import Site, Sites, as_sites
from ..models.views import hidden, unseen_value
from .base import Binding, Change, EditHook, Here, inner, put


@dataclass(frozen=True)
class Knockout(EditHook):
    """Keep queries from seeing keys. Made by `knockout`; `where.pos` are the queries."""

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
        put(self, "key", as_pos(self.key))
        _check_seen(self.key, self.where.pos)

    def change(self, binding: Binding) -> Change:
        def apply(values: Tensor, here: Here) -> Tensor:
            unseen = unseen_value(values.dtype, scores=True)
            new = values.clone()
            for number, row in enumerate(here.rows):
                new[number, ..., self._keys(here, row, values.shape[-1])] = unseen
            blind = here.real_cells(hidden(new).all(-1) & ~hidden(values).all(-1))
            if bool(blind.any()):
                number, place = (int(index) for index in blind.nonzero()[0][:2])
                raise BadEdit(
                    f"{self} leaves the query at position {int(here.positions[number, place])} of row "
                    f"{here.rows[number]} nothing to see: name the queries, query=slice(1, None) say, or fewer keys"
                )
            return new

        return apply

    def _keys(self, here: Here, row: int, count: int) -> list[int]:
        """The positions of the keys that a row's queries are not to see, of the `count` that there
        are.
        """
        text = here.cells.text
        length = text.lengths[row]
        wanted = wish(Where(self.key), length, lambda at: text.find(text.prompt(row), at))
        if isinstance(wanted, range):
            return list(range(wanted.start, min(wanted.stop, count), wanted.step))
        if text.final and wanted[-1] >= length:
            raise OutOfRange(
                f"{self} means the key at position {wanted[-1]} of row {row}, which has {length} tokens"
            )
        return [place for place in wanted if place < count]

    def __str__(self) -> str:
        layers = dict.fromkeys(site.layer for site in self.sites if isinstance(site, Site))
        heads = dict.fromkeys(site.head for site in self.sites if isinstance(site, Site))
        words = [
            str(found[0] if len(found) == 1 else found)
            for found in (list(layers), list(heads))
            if found != [None]
        ]
        given = {"query": self.where.pos, "key": self.key, "rows": self.where.rows}
        words += [f"{name}={value!r}" for name, value in given.items() if value is not None]
        return f"knockout({', '.join(words)})"


def _check_seen(key: Pos, query: Pos) -> None:
    """Raises `BadHook` where no query can see any of the keys, as far as their numbers tell without
    the text.
    """
    keys, queries = _extremes(key), _extremes(query)
    if keys is None or queries is None or (keys[0] < 0) != (queries[1] < 0):
        return
    if keys[0] > queries[1]:
        raise BadHook(
            f"key={key!r} comes after query={query!r}, which never sees it: a token sees itself and those before it, "
            "so there is nothing to cut; name keys that are not after the query"
        )


def _extremes(places: Pos) -> tuple[int, int] | None:
    """The first and the last of positions that are numbers of one sign; None for others."""
    numbers = (places,) if isinstance(places, int) else places
    if not isinstance(numbers, tuple) or (min(numbers) < 0) != (max(numbers) < 0):
        return None
    return min(numbers), max(numbers)


@checks_keywords
def knockout(
    layer: int | Iterable[int],
    head: int | Iterable[int] | None = None,
    *,
    key: PosLike,
    query: PosLike = None,
    rows: CountLike = None,
) -> Knockout:
    """Cut attention from the tokens `query` to the tokens `key`, in one or more layers; the rest is
    renormalised (attention knockout, Geva et al. 2023).

    Scores of these pairs become the smallest number there is, so that the softmax gives them
    nothing. `head` is one head or several; all of them where it is left out. Positions are written
    as anywhere: a number, a slice, a list, `hk.at("store")`, `hk.PROMPT`, `hk.GENERATED`. A query
    that would see nothing at all raises `BadEdit`.

    >>> print(knockout(9, 3, query=-1, key=at("Mary")))
    knockout(9, 3, query=-1, key=at('Mary'))
    """
    layers = whole_numbers(layer, "layer", least=0, meaning="the layers, counted from 0,")
    heads = (
        [None]
        if head is None
        else whole_numbers(head, "head", least=0, meaning="the heads, counted from 0,")
    )
    sites: Sites = as_sites([Site("scores", each, one) for each in layers for one in heads])
    return Knockout(sites, inner(query, rows, None, sites), as_pos(key))
