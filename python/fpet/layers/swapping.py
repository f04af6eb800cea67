"""Classes of modules swapped for subclasses of them and back: how merging gets into a model that exists."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

__all__ = ["ClassSwap", "Foreign"]


class Foreign(nn.Module):
    """A module whose parts another library made: a type checker knows nothing of them."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


class ClassSwap:
    """Pairs of a class and the subclass that takes over from it on an existing module (``module.__class__ = ...``).

    Parameters, buffers, their names and hooks stay as they are.

    Args:
        subclasses: each one's last base is the class it takes over from.
    """

    def __init__(self, *subclasses: type[nn.Module]) -> None:
        self._ours: dict[type, type] = {ours.__bases__[-1]: ours for ours in subclasses}
        self._theirs: dict[type, type] = {ours: theirs for theirs, ours in self._ours.items()}

    def __or__(self, other: ClassSwap) -> ClassSwap:
        return ClassSwap(*self._theirs, *other._theirs)

    def __contains__(self, theirs: object) -> bool:
        """Whether there is a subclass for the class ``theirs``."""
        return theirs in self._ours

    def known(self, module: nn.Module) -> bool:
        """Whether ``module`` can be swapped or has been."""
        return type(module) in self._ours or type(module) in self._theirs

    def base_of(self, cls: type) -> type | None:
        """The nearest base of ``cls`` that there is a subclass for."""
        return next((base for base in cls.__mro__[1:] if base in self._ours), None)

    def names(self) -> str:
        """The classes that can be swapped, for messages."""
        return ", ".join(sorted(theirs.__name__ for theirs in self._ours))

    def pairs(self) -> list[tuple[type, type]]:
        """(their class, our subclass), in the order given."""
        return list(self._ours.items())

    def swap(self, module: nn.Module) -> None:
        """Does nothing to a module of another class."""
        _become(module, self._ours.get(type(module)))

    def restore(self, module: nn.Module) -> None:
        """Undoes :meth:`swap`; does nothing to a module of another class."""
        _become(module, self._theirs.get(type(module)))


def _become(module: nn.Module, cls: Any) -> None:
    if cls is None:
        return
    before: Any = type(module)
    module.__class__ = cls
    # Bound forwards of the class before, which accelerate's hooks call, or leave behind, as transformers 4's recorders do.
    for name in ("forward", "_old_forward"):
        kept: Any = module.__dict__.get(name)
        if getattr(kept, "__self__", None) is module and kept.__func__ is before.forward:
            module.__dict__[name] = cls.forward.__get__(module)
