"""Ways to have fewer tokens, by name: :func:`register_reduction`, and what a reducer is given and gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor, nn

from fpet_kernels import Merged

__all__ = ["REDUCTIONS", "Place", "Reducer", "Reduction", "ReductionConfig", "Tokens", "register_reduction"]


@dataclass(frozen=True)
class ReductionConfig:
    """The arguments of :func:`apply_reduction`, complete; kept as ``model.fpet_reduction`` and in saved files.

    Attributes: name; layer, the block that reduces; r, refinement, target: see :func:`apply_reduction`.
    """

    name: str
    layer: int
    r: int = 8
    refinement: dict[str, Any] | None = None
    target: float | None = None


class Tokens(NamedTuple):
    """What comes into a reducer.

    Attributes:
        x: (B, N, D). size: (B, N, 1), how many of the image's tokens each stands for. prefix: how many in front stay as they
            are, such as the class token. grid: (height, width) of the patches; None once tokens were reduced.
    """

    x: Tensor
    size: Tensor
    prefix: int
    grid: tuple[int, int] | None


class Place(NamedTuple):
    """Where a reducer is put: the model, one of its blocks, that block's number, and the settings."""

    model: Any
    block: Any
    layer: int
    config: ReductionConfig


class Reducer:
    """Makes fewer tokens of some, between a block's attention and its MLP. One that learns is an nn.Module as well.

    Attributes:
        proportional: whether later attention counts a token as often as its size says.
    """

    proportional = True

    @classmethod
    def build(cls, place: Place) -> Reducer:
        """The reducer of one block: by default one without arguments."""
        return cls()

    def __call__(self, tokens: Tokens, key: Tensor, refinement: Any) -> Merged:
        """``key`` (B, heads, N, C). Returns tokens (B, M, D), size (B, M, 1), and match (B, N): where each token went, −1 for
        one that was thrown away."""
        raise NotImplementedError


class _Function(Reducer):
    """A function of (tokens, key) as a reducer."""

    def __init__(self, function: Callable[[Tokens, Tensor], Merged]) -> None:
        self.function = function

    def __call__(self, tokens: Tokens, key: Tensor, refinement: Any) -> Merged:
        return self.function(tokens, key)


class Reduction(NamedTuple):
    """A registered way to have fewer tokens. Attributes: summary, a line about it; everywhere, whether every block reduces and
    not one; reducer, the class or the function. Its text is the summary."""

    summary: str
    everywhere: bool
    reducer: Any

    def __str__(self) -> str:
        return self.summary

    def build(self, place: Place) -> Reducer:
        """The reducer of one block."""
        if not isinstance(self.reducer, type):
            return _Function(self.reducer)
        made = self.reducer.build if issubclass(self.reducer, Reducer) else lambda _place: self.reducer()
        found: Any = made(place)
        if isinstance(found, nn.Module):
            like = next(place.block.parameters())
            found.to(like.device, like.dtype).train(place.block.training)
        return found  # type: ignore[no-any-return]


_REGISTRY: dict[str, Reduction] = {}
REDUCTIONS: Mapping[str, Reduction] = MappingProxyType(_REGISTRY)
"""What may become of the tokens, by name: a read-only view that shows what is registered later too."""


def register_reduction(name: str, summary: str = "", *, everywhere: bool = False) -> Callable[[Any], Any]:
    """Makes a way to have fewer tokens known by ``name``: to :func:`fpet.comparators.apply_reduction`, saving and loading,
    ``fpet train --reduction``, ``--compare`` and ``fpet tables``. A decorator of a :class:`Reducer`, or of a function::

        @fpet.register_reduction("strided", "every second patch at one layer")
        def strided(tokens, key):
            ...
            return Merged(x, size, match)

    Args:
        name: for users; it can be registered again only by the same class or function, as when a notebook's cell runs twice.
        summary: a line for the summary of a run. everywhere: every block reduces; otherwise the one that ``layer`` names.

    A reducer that learns is a class that derives from :class:`Reducer` and from nn.Module: its parameters are then trained,
    counted, saved and loaded with the rest, as ``blocks.I.reducer``.

    Raises:
        ValueError: the name is taken.
    """

    def register(reducer: Any) -> Any:
        old = _REGISTRY.get(name)
        if old is not None and _full_name(old.reducer) != _full_name(reducer):
            raise ValueError(f"name: the reduction {name!r} is registered already, by {_full_name(old.reducer)}")
        _REGISTRY[name] = Reduction(summary or f"{_full_name(reducer)}", everywhere, reducer)
        return reducer

    return register


def _full_name(what: Any) -> str:
    return f"{what.__module__}.{what.__qualname__}"
