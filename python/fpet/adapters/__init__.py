"""Parameter-efficient tuning: :func:`add_adapters` puts a method's modules into a timm vision transformer, :func:`fold` and
:func:`remove_adapters` take them out again, :func:`register_method` adds a method of one's own."""

from ..layers.modules import BottleneckAdapter, FacT, FacTFactors, PETModule, Prompts, RepAdapter, ScaleShift
from . import methods  # which registers them
from .attaching import add_adapters, attach, remove_adapters
from .config import METHODS, AdapterConfig, Method, register_method
from .folding import fold

__all__ = [
    "METHODS",
    "AdapterConfig",
    "BottleneckAdapter",
    "FacT",
    "FacTFactors",
    "Method",
    "PETModule",
    "Prompts",
    "RepAdapter",
    "ScaleShift",
    "add_adapters",
    "attach",
    "fold",
    "methods",
    "register_method",
    "remove_adapters",
]
