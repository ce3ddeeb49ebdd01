"""``modules_to_save``: a module trained and saved whole, one copy for each adapter name, beside the untouched
original."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from deltaw.errors import AdapterError
from deltaw.modules import dtype_of

__all__ = ["ModulesToSaveWrapper"]


class ModulesToSaveWrapper(nn.Module):
    """Runs the active adapter's copy of a module, or the original when none is active.

    Copies of a half-precision module are kept in float32, as adapters are: masters that small updates do not
    vanish from, and one dtype among the trainable parameters. They are cast to the original's dtype at each
    use.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()
        self._active: str | None = None
        self._disabled = False

    def __getattr__(self, name: str) -> Any:
        # the model may ask the head or the embedding for its weight, its features, ...
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "modules_to_save") or name.startswith("_"):
                raise
            return getattr(self.current(), name)

    def current(self) -> nn.Module:
        """The module that forward runs now."""
        if self._disabled or self._active is None:
            return self.original_module
        return self.modules_to_save[self._active]

    @property
    def active_adapters(self) -> list[str]:
        return [] if self._active is None else [self._active]

    def add(self, name: str) -> None:
        """Makes adapter ``name``'s own copy of the original; it is not active yet."""
        if name in self.modules_to_save:
            raise AdapterError(f"adapter {name!r} already has a copy of this module")
        clone = copy.deepcopy(self.original_module)
        if dtype_of(clone) in (torch.bfloat16, torch.float16):
            clone.to(torch.float32)
        self.modules_to_save[name] = clone.requires_grad_(False)

    def remove(self, name: str) -> None:
        if name in self.modules_to_save:
            del self.modules_to_save[name]
        if self._active == name:
            self._active = None

    def set_active(self, names: Sequence[str], trainable: bool = True) -> None:
        """Runs the copy of the one adapter of ``names`` that has one.

        Raises:
            AdapterError: several of them have one: whole modules cannot be added up.
        """
        mine = [name for name in names if name in self.modules_to_save]
        if len(mine) > 1:
            raise AdapterError(
                f"adapters {mine} each replace one module whole (modules_to_save), so only one can be active"
            )
        self._active = mine[0] if mine else None
        for name, module in self.modules_to_save.items():
            module.requires_grad_(trainable and name == self._active)

    set_adapter = set_active

    def enable_adapters(self, enabled: bool) -> None:
        self._disabled = not enabled

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module = self.current()
        wanted = dtype_of(self.original_module)
        if module is self.original_module or wanted is None or dtype_of(module) == wanted:
            return module(*args, **kwargs)
        cast = {
            name: value.to(wanted) if value.is_floating_point() else value
            for name, value in (*module.named_parameters(), *module.named_buffers())
        }
        return torch.func.functional_call(module, cast, args, kwargs)
