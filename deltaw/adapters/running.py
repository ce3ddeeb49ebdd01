"""How an adapted model runs: forward and generation, where each row may have an adapter of its own, which adapters
train, and activation checkpointing over a frozen base. Knows nothing of files or of merging.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from deltaw.adapters.adapted import AdaptedBase
from deltaw.adapters.inject import carriers, trained_biases
from deltaw.adapters.routing import forwarding, generating
from deltaw.modules import is_checkpointing

__all__ = ["Running", "let_gradients_in"]

#: transformers' methods that switch activation checkpointing on, new name and old
CHECKPOINTING = ("activation_checkpointing_enable", "gradient_checkpointing_enable")


class Running(nn.Module):
    """The running side of a model whose adapters are in ``base_model``."""

    base_model: AdaptedBase

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
        value = getattr(self.base_model, name)
        return functools.partial(self._checkpointing, value) if name in CHECKPOINTING else value

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The base's forward through the active adapters.

        Args:
            adapter_names: instead, one name for each row of the batch, whatever is active: the row goes through that
                adapter alone, or through none (``"__base__"``). In training each of them gets the gradient of its own
                rows, if it trains: see :meth:`set_requires_grad`.

        Raises:
            AdapterError: an unknown name, a wrong number of them, adapters that are merged or disabled, or a layer
                where the rows cannot be told apart. Nothing is left behind.
        """
        if adapter_names is None:
            return self.base_model(*args, **kwargs)
        with forwarding(self.base_model.model, adapter_names, self.base_model.peft_config, args, kwargs):
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The base's ``generate``; ``adapter_names`` is one name a prompt, as in :meth:`forward`, however many beams or
        returned sequences there are."""
        base: Any = self.base_model.model
        if adapter_names is None:
            return base.generate(*args, **kwargs)
        with generating(base, adapter_names, self.base_model.peft_config, args, kwargs):
            return base.generate(*args, **kwargs)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Makes adapters train, or freezes them, and leaves the others and what is active alone.

        ``set_adapter`` freezes whatever it does not activate, so this is how several adapters train in mixed batches:
        ``model.set_requires_grad(["a", "b"])``. The next ``set_adapter`` decides anew.

        Raises:
            AdapterError: no such adapter.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in names:
            self.base_model.require(name)
        for _, carrier in carriers(self.base_model.model):
            carrier.set_requires_grad(names, requires_grad)
        for name in names:
            for _, bias in trained_biases(self.base_model.model, self.base_model.peft_config[name]):
                bias.requires_grad_(requires_grad)

    def _checkpointing(self, enable: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        enable(*args, **kwargs)
        let_gradients_in(self.base_model.model)


def let_gradients_in(model: Any) -> None:
    """Under activation checkpointing, makes the output of the input embeddings require a gradient.

    A reentrant checkpoint gives no gradient to what is inside unless an input of it asks for one, and over a frozen
    base none does. transformers sees to it for text alone.
    """
    hooks = getattr(model, "_require_grads_hooks", None) or getattr(model, "_require_grads_hook", None)
    if not hooks and hasattr(model, "enable_input_require_grads") and is_checkpointing(model):
        model.enable_input_require_grads()
