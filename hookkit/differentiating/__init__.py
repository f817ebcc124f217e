"""Gradients: of a metric at every place of a model, and the attributions that are made of them."""

from .agreement import agreement as agreement
from .attribution import attribution as attribution
from .edges import edge_attribution as edge_attribution
from .found import Gradients as Gradients
from .found import gradients as gradients
from .tokens import token_attribution as token_attribution
