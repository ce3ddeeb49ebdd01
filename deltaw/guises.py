"""What an object of ours passes for when another library asks ``isinstance(object, theirs)``.

A registry: ``integrations`` fills it, and a class that inherits :class:`Guised` asks it in its ``__class__``. A library
is looked at only once it has been imported. Knows no library and none of our classes, and imports nothing, since the
package itself fills it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

__all__ = ["Guised", "guise", "register"]

_makers: dict[str, Callable[[type], type]] = {}


def register(library: str, make: Callable[[type], type]) -> None:
    """From the moment that module ``library`` is imported, ``make(own class)`` says what an object passes for."""
    _makers[library] = make


def guise(own: type) -> type:
    """The class that an object of class ``own`` says it is of: ``own`` itself while no library is there that asks."""
    for library, make in _makers.items():
        if sys.modules.get(library) is not None:
            own = make(own)
    return own


class Guised:
    """An object whose ``__class__``, which ``isinstance`` asks beyond its type, is its :func:`guise`.

    Methods are looked up on the type, so a guise lends none of its own.
    """

    def _get_class(self) -> type:
        return guise(type(self))

    def _set_class(self, kind: type) -> None:
        object.__dict__["__class__"].__set__(self, kind)

    __class__: Any = property(_get_class, _set_class)  # fully_shard sets it

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # the default refuses to pickle an object whose class is not its type
        return _blank, (type(self),), self.__getstate__()


def _blank(kind: type) -> Any:
    return object.__new__(kind)
