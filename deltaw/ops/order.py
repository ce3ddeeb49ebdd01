"""First-order only: a backward that says so when a second derivative is asked of it, instead of giving a wrong one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["first_order"]


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For the ``backward`` of an autograd function without a graph of its own.

    PyTorch's ``once_differentiable`` lets a second derivative pass as zero when the incoming gradient is a constant.

    Raises:
        RuntimeError: backward runs with ``create_graph=True``.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            operation = backward.__qualname__.split(".")[0].lstrip("_")
            raise RuntimeError(
                f"{operation} has no second derivative: it cannot be differentiated twice (create_graph=True); "
                "compute the second derivative through the plain formula"
            )
        return backward(ctx, *grads)

    return checked
