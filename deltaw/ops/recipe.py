"""Tensors that need not be kept: a product remembers how it was made, and backward makes it again.

Whoever computes a cheap elementwise product says ``remember(product, function, *inputs)``; an operation that would
save the product for backward saves ``kept(product)`` instead (the inputs, which their own operation saves anyway) and
calls the recipe in backward. The mark is a hint: lost on the way, the product itself is saved, as ever.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

__all__ = ["kept", "made_again", "remember"]

Recipe = Callable[..., Tensor]
_MARK = "_deltaw_recipe"


def remember(product: Tensor, recipe: Recipe, *inputs: Tensor) -> Tensor:
    """Marks ``product`` as equal to ``recipe(*inputs)``, and returns it."""
    setattr(product, _MARK, (recipe, tuple(t.detach() for t in inputs)))
    return product


def kept(x: Tensor) -> tuple[Recipe | None, tuple[Tensor, ...]]:
    """(recipe, tensors to save) for x: its inputs if it is a marked product, else itself."""
    return getattr(x, _MARK, (None, (x,)))


def made_again(recipe: Recipe | None, saved: tuple[Tensor, ...]) -> Tensor:
    """x, from what :func:`kept` said to save."""
    return saved[0] if recipe is None else recipe(*saved)
