"""Steering vectors: read from prompts or learnt, with what a dose of them does and what it damages."""

from .comparing import at_damage as at_damage
from .comparing import over_doses as over_doses
from .differences import mean_difference as mean_difference
from .differences import principal_direction as principal_direction
from .doses import dose_response as dose_response
from .drawing import damage_curves as damage_curves
from .fitting import fit_vector as fit_vector
from .vector import Vector as Vector
from .vector import Vectors as Vectors
from .vector import load_vector as load_vector
