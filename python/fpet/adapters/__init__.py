"""Parameter-efficient tuning: :func:`add_adapters` puts a method's modules into a timm vision transformer, :func:`fold` and
:func:`remove_adapters` take them out again."""

from ..layers.modules import BottleneckAdapter, FacT, FacTFactors, PETModule, Prompts, RepAdapter, ScaleShift
from .config import METHODS, AdapterConfig
from .methods import add_adapters, fold, remove_adapters

__all__ = [
    "METHODS",
    "AdapterConfig",
    "BottleneckAdapter",
    "FacT",
    "FacTFactors",
    "PETModule",
    "Prompts",
    "RepAdapter",
    "ScaleShift",
    "add_adapters",
    "fold",
    "remove_adapters",
]
