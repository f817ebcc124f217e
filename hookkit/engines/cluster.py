"""Ray at its former path, until the public names change: see `hookkit.runs.engines.ray`."""

from ..runs.engines.ray import Ray

__all__ = ["Ray"]
