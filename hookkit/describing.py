"""What `LM.describe` says beside the table of sites: whose adapters, where the weights are, how it is split."""

from typing import Any

import pandas as pd

from .placement import place_at, told
from .sites import Site
from .wrapped import adapters_of


def described(lm: Any) -> pd.DataFrame:
    """The table of all sites; see `LM.describe`."""
    table = lm.layout.describe()
    places = lm.places
    if len(set(places.values())) > 1:
        table["place"] = [_place(lm, name, places) for name in table["site"]]
    if lm.ranks is not None:
        table["split"] = [_split(lm, name) for name in table["site"]]
    if lm.adapters:
        table["adapters"] = [_adapters(lm, name) for name in table["site"]]
    return table


def _place(lm: Any, name: str, places: dict[str, str]) -> str:
    """Where the weights are of the modules that have a site; of the logits, those of the head."""
    if name not in lm.layout.names:
        return ""
    layers = lm.layout.layers(name)
    if layers is None:
        return place_at(places, lm.place(Site(name)).path or lm.head_path() or "")
    return told((layer, place_at(places, lm.place(Site(name, layer)).path)) for layer in layers)


def _split(lm: Any, name: str) -> str:
    """Along which axis the tensor of a site is split among processes, and how much of it each has."""
    assert lm.ranks is not None
    found: list[str] = []
    for site, place in lm.located(lm.sites(name)).items() if name in lm.layout.names else ():
        split = lm.ranks.splits.get((place.path, place.side, place.item))
        if split is not None and isinstance(site, Site):
            axis = next(axis for axis in site.axes.split() if axis not in ("batch", "pos", "query", "key"))
            one = max(1, sum(split.sizes) // (lm.layout.sizes_of(site.layer)[axis] or sum(split.sizes)))
            found.append(f"{axis} {'+'.join(str(size // one) for size in split.sizes)}")
    return "; ".join(dict.fromkeys(found))


def _adapters(lm: Any, name: str) -> str:
    places = lm.located(lm.sites(name)).values() if name in lm.layout.names else ()
    found = [adapter for place in places for adapter in adapters_of(lm.submodule(place.path))]
    return ", ".join(dict.fromkeys(found))
