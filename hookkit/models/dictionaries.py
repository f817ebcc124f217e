"""What a dictionary of features has to offer to become sites of an LM.

`hookkit.features` has the dictionaries. The layout of an LM finds the sites of their features with
this interface, and a hook reads and writes them through the view that it returns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ..errors import BadHook, MissingSite, OutOfRange
from .sites import FEATURE_PREFIX, Site

if TYPE_CHECKING:
    from torch import Tensor

    from .lm import LM
    from .views import SiteView


@runtime_checkable
class SiteDictionary(Protocol):
    """A dictionary of features (a sparse autoencoder or a transcoder) of one site.

    site   where a change of the features is added
    reads  the site from which the features are computed, the same one but for a transcoder
    """

    @property
    def site(self) -> Site: ...
    @property
    def reads(self) -> Site: ...
    @property
    def n_features(self) -> int: ...

    def view(self, base: SiteView, source: SiteView | None, feature: int | None) -> SiteView:
        """Returns how the features, or one of them, are stored in the tensor at `site`.

        `base` is the view of that site, and `source` that of the other site that a transcoder
        reads.
        """
        ...

    def shares(self, features: Tensor, inputs: Tensor, along: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what the reconstruction adds along directions [cell, d_out], in float64.

        The first value is the share [cell, feature] of each feature, and the second that [cell] of
        the rest: the bias, and what undoes a normalization. `features` are those of the cells, and
        `inputs` [cell, d_in] the values that were encoded.
        """
        ...

    def prepared(self, lm: LM, *, replace: bool, check: bool) -> SiteDictionary:
        """Returns the dictionary for an LM. Raises if its model, width or site is another."""
        ...

    def about(self) -> dict[str, Any]:
        """Returns the properties of the dictionary as values for JSON."""
        ...


def site_of_features(dictionary: SiteDictionary) -> Site:
    """Returns the site of all features of a dictionary."""
    site = dictionary.site
    return replace(site, name=FEATURE_PREFIX + site.name, head=None)


def by_feature_site(dictionaries: Sequence[SiteDictionary]) -> dict[Site, SiteDictionary]:
    """Returns the dictionaries by the site of their features. `BadHook` if two have the same."""
    by_site: dict[Site, SiteDictionary] = {}
    for dictionary in dictionaries:
        site = site_of_features(dictionary)
        if site in by_site:
            raise BadHook(f"two dictionaries are of {dictionary.site}: give one for each site")
        by_site[site] = dictionary
    return by_site


def find_dictionary(dictionaries: Mapping[Site, SiteDictionary], site: Site) -> SiteDictionary:
    """Returns the dictionary of a feature site. Raises for a site or a feature without one."""
    dictionary = dictionaries.get(replace(site, head=None))
    if dictionary is None:
        names = ", ".join(map(str, dictionaries)) or "none"
        base_site = str(replace(site, name=site.base_name, head=None))
        raise MissingSite(
            f"{site} was asked for, and this LM has no dictionary there (it has {names}): "
            f"lm = lm.with_dictionaries(hk.load_dictionary(folder, at={base_site!r}))"
        )
    if site.head is not None and site.head >= dictionary.n_features:
        raise OutOfRange(
            f"{site} was asked for, and its dictionary has {dictionary.n_features} features: "
            f"0 to {dictionary.n_features - 1}"
        )
    return dictionary
