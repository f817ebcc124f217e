"""Site names at their former path, until the public names change: see `hookkit.models.sites`."""

from .models.sites import ModuleSite, Site, Sites, as_sites
from .models.sites import parse_site as parse

__all__ = ["ModuleSite", "Site", "Sites", "as_sites", "parse"]
