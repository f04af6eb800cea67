"""What a method is called, what it takes, and what it takes by default."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..layers.quantize import BITS

__all__ = ["METHODS", "AdapterConfig"]


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
        default = METHODS[method]
        given = {"hidden_dim": hidden_dim, "scale": scale, "bits": bits, "dropout": dropout}
        absent = {
            "hidden_dim": default.hidden_dim == 0,
            "scale": method not in _SCALED,
            "bits": method not in _QUANTIZABLE,
            "dropout": default.hidden_dim == 0,
        }
        for name, value in given.items():
            if absent[name] and value is not None and value != getattr(default, name):
                raise ValueError(f"{name}: the method {method!r} has none, got {value!r}")
        values: dict[str, Any] = {name: getattr(default, name) if value is None else value for name, value in given.items()}
        if not isinstance(values["hidden_dim"], int) or values["hidden_dim"] < (default.hidden_dim > 0):
            raise ValueError(f"hidden_dim: expected an integer of at least 1, got {values['hidden_dim']!r}")
        if values["bits"] not in (*BITS, 32):
            raise ValueError(f"bits: expected one of {(*BITS, 32)}, got {values['bits']!r}")
        if not math.isfinite(values["scale"]):
            raise ValueError(f"scale: expected a finite number, got {values['scale']!r}")
        if not 0.0 <= values["dropout"] < 1.0:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {values['dropout']!r}")
        return cls(method, values["hidden_dim"], float(values["scale"]), values["bits"], float(values["dropout"]))


METHODS: dict[str, AdapterConfig] = {
    config.method: config
    for config in (
        AdapterConfig("none"),
        AdapterConfig("linear"),
        AdapterConfig("full"),
        AdapterConfig("bitfit"),
        AdapterConfig("adaptformer", 8, dropout=0.1),
        AdapterConfig("bi-adaptformer", 32, bits=1, dropout=0.1),
        AdapterConfig("lora", 8, dropout=0.1),
        AdapterConfig("bi-lora", 32, bits=1, dropout=0.1),
        AdapterConfig("repadapter", 8, dropout=0.1),
        AdapterConfig("ssf"),
        AdapterConfig("vpt-shallow", 50, dropout=0.1),
        AdapterConfig("vpt-deep", 50, dropout=0.1),
        AdapterConfig("fact-tt", 16, dropout=0.1),
    )
}
"""The methods and their defaults."""

_QUANTIZABLE = ("adaptformer", "bi-adaptformer", "lora", "bi-lora")
_SCALED = (*_QUANTIZABLE, "repadapter", "fact-tt")
