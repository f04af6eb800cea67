"""What a method is called, what it takes, and what it takes by default: :class:`AdapterConfig`, :func:`register_method`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ..layers.quantize import BITS

__all__ = ["METHODS", "AdapterConfig", "Method", "Update", "register_method"]


@dataclass(frozen=True)
class AdapterConfig:
    """The arguments of :func:`fpet.add_adapters`, complete; kept as ``model.adapter_config``.

    Attributes:
        method: one of ``METHODS``. hidden_dim: bottleneck width, rank, or number of prompts.
        scale: multiplies what the method adds. bits: of a weight, 32 for plain. dropout: on the hidden units or prompts.
            hidden_dim and dropout are 0 where a method has none.
    """

    method: str
    hidden_dim: int = 0
    scale: float = 1.0
    bits: int = 32
    dropout: float = 0.0

    @classmethod
    def resolve(
        cls,
        method: str,
        hidden_dim: int | None = None,
        scale: float | None = None,
        bits: int | None = None,
        dropout: float | None = None,
    ) -> AdapterConfig:
        """Fills in the method's defaults and checks the rest.

        Raises:
            ValueError: no such method, or an argument that the method does not have or that is out of range.
        """
        if method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
        known = METHODS[method]
        given = {"hidden_dim": hidden_dim, "scale": scale, "bits": bits, "dropout": dropout}
        for name, value in given.items():
            if name not in known.takes and value is not None and value != getattr(known.defaults, name):
                raise ValueError(f"{name}: the method {method!r} has none, got {value!r}")
        values: dict[str, Any] = {
            name: getattr(known.defaults, name) if value is None else value for name, value in given.items()
        }
        return cls(method, **values).checked("hidden_dim" in known.takes)

    def checked(self, has_hidden_dim: bool) -> AdapterConfig:
        """Itself, with floats where floats belong. ValueError: a value is out of range."""
        if isinstance(self.hidden_dim, bool) or not isinstance(self.hidden_dim, int) or self.hidden_dim < has_hidden_dim:
            raise ValueError(f"hidden_dim: expected an integer of at least 1, got {self.hidden_dim!r}")
        if self.bits not in (*BITS, 32):
            raise ValueError(f"bits: expected one of {(*BITS, 32)}, got {self.bits!r}")
        if not math.isfinite(self.scale):
            raise ValueError(f"scale: expected a finite number, got {self.scale!r}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {self.dropout!r}")
        return AdapterConfig(self.method, self.hidden_dim, float(self.scale), self.bits, float(self.dropout))


Update = tuple[Any, Tensor, Tensor | None]
"""What folding makes of a layer: the layer, its new weight, and its new bias or None; in float64."""

Install = Callable[[Any, AdapterConfig], None]
Fold = Callable[[Any], Iterable[Update]]
Trains = Callable[[str], bool]


@dataclass(frozen=True)
class Method:
    """A registered method, as :func:`register_method` describes it.

    Attributes:
        defaults: its settings where none are given. takes: the names of those that it has.
        install, fold, trains: see :func:`register_method`.
    """

    defaults: AdapterConfig
    takes: frozenset[str]
    install: Install
    fold: Fold | None = None
    trains: Trains | None = None


_REGISTRY: dict[str, Method] = {}
METHODS: Mapping[str, Method] = MappingProxyType(_REGISTRY)
"""Every method by name: a read-only view that shows what is registered later too."""


def register_method(
    name: str,
    *,
    hidden_dim: int | None = None,
    scale: float | None = None,
    bits: int | None = None,
    dropout: float | None = None,
    fold: Fold | None = None,
    trains: Trains | None = None,
) -> Callable[[Install], Install]:
    """Makes a tuning method known by ``name``, everywhere: to :func:`fpet.add_adapters`, freezing, counting, saving, loading,
    ``fpet train --method`` and ``fpet tables``. A decorator of the function that puts the method's modules into a model::

        @fpet.register_method("sequential", hidden_dim=8, dropout=0.1)
        def install(model, config):
            for block in model.blocks:
                adapter = SequentialAdapter(model.embed_dim, config.hidden_dim, config.dropout)
                fpet.adapters.attach(block.mlp, "sequential", adapter, acts="output")

    Args:
        name: for users; a name can be registered again only by the same function, as when a notebook's cell runs twice.
        hidden_dim, scale, bits, dropout: the defaults of those settings that the method has; None: it has none.
        fold: from the model, the new weight and bias of each layer that takes the method up, for methods that are linear in
            their input: makes :func:`fpet.fold` work. The model's values stay as they are.
        trains: whether a parameter of the backbone, by its name, is tuned too.

    Raises:
        ValueError: the name is taken by another method, or a default is out of range.
    """
    given = {"hidden_dim": hidden_dim, "scale": scale, "bits": bits, "dropout": dropout}
    has: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    defaults = AdapterConfig(name, **has).checked("hidden_dim" in has)

    def register(install: Install) -> Install:
        old = _REGISTRY.get(name)
        if old is not None and _full_name(old.install) != _full_name(install):
            raise ValueError(f"name: the method {name!r} is registered already, by {_full_name(old.install)}")
        _REGISTRY[name] = Method(defaults, frozenset(has), install, fold, trains)
        return install

    return register


def _full_name(function: Any) -> str:
    return f"{function.__module__}.{function.__qualname__}"
