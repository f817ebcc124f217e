"""`lm.sites`: called, it selects sites; and it has each name that the model has, for a notebook to complete."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

from .arguments import checks_keywords, whole_numbers
from .displaying import shown
from .errors import BadHook, HookkitError
from .sites import AXES, WHOLE_MODEL, AnySite, Site, Sites, SitesLike, as_sites

Expand = Callable[[SitesLike], Sites]


class SiteNames:
    """The sites of a model by name: `lm.sites("z", layers=[3])` is a selection, `lm.sites.z` that of all layers."""

    def __init__(self, names: Callable[[], list[str]], expand: Expand) -> None:
        self._names, self._expand = names, expand

    def __call__(
        self,
        names: str | Iterable[str] | None = None,
        *,
        layers: Collection[int] | None = None,
        heads: Collection[int] | None = None,
        **unknown: Any,
    ) -> Sites:
        return sites(self, names, layers=layers, heads=heads, **unknown)

    def __getattr__(self, name: str) -> Sites:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self._expand(name)
        except HookkitError as error:
            raise AttributeError(str(error)) from error

    def __getitem__(self, site: str) -> Sites:
        return self._expand(site)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._names()]

    def _ipython_key_completions_(self) -> list[str]:
        """What a notebook offers behind `lm.sites["`: every name, and every layer of each."""
        every = self._expand(self._names())
        return [*self._names(), *(str(site) for site in every if str(site) not in self._names())]

    def __repr__(self) -> str:
        return f"sites {', '.join(self._names())}: lm.sites(names, layers=, heads=) selects some"

    def _repr_html_(self) -> str:
        names = self._names()
        return shown("sites", rows=[{"site": name, "axes": AXES[name]} for name in names], most=len(names))


@checks_keywords
def sites(
    of: SiteNames,
    names: str | Iterable[str] | None = None,
    *,
    layers: Collection[int] | None = None,
    heads: Collection[int] | None = None,
) -> Sites:
    """The selection of sites with these names, in the layers and heads given (all, where left out)."""
    if layers is not None:
        layers = whole_numbers(layers, "layers", least=0, meaning="the layers, counted from 0,")
    if heads is not None:
        heads = whole_numbers(heads, "heads", least=0, meaning="the heads, counted from 0,")
    if names is None:
        names = [name for name in of._names() if layers is None or name not in WHOLE_MODEL]
    chosen: list[AnySite] = []
    for site in as_sites(names):
        for each in of._expand([site] if layers is None else _in_layers(site, layers)):
            chosen += [each] if heads is None else _of_heads(each, heads)
    return of._expand(chosen)


def _in_layers(site: AnySite, layers: Iterable[int]) -> list[AnySite]:
    if not isinstance(site, Site) or site.layer is not None:
        raise BadHook(f"{site} says its own place: leave layers= out, or give the site's name alone")
    return [Site(site.name, layer) for layer in layers]


def _of_heads(site: AnySite, heads: Iterable[int]) -> list[AnySite]:
    if not isinstance(site, Site) or site.head is not None:
        raise BadHook(f"{site} says its own place: leave heads= out, or give the site's name alone")
    return [Site(site.name, site.layer, head) for head in heads]
