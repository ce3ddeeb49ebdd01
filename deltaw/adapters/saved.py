"""``modules_to_save``: a module trained and saved whole, one copy for each adapter name, beside the untouched
original."""

from __future__ import annotations

import copy
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.adapters.routing import Routable, Run, slices
from deltaw.errors import AdapterError
from deltaw.modules import dtype_of

__all__ = ["ModulesToSaveWrapper"]


class ModulesToSaveWrapper(Routable):
    """Runs the active adapter's copy of a module, or the original when none is active; in a batch that mixes adapters,
    each row through its own adapter's copy.

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

    def share(self, name: str, other: ModulesToSaveWrapper) -> None:
        """Ties adapter ``name``'s copy to ``other``'s: one weight in two places."""
        self.modules_to_save[name].weight = other.modules_to_save[name].weight

    def remove(self, name: str) -> None:
        if name in self.modules_to_save:
            del self.modules_to_save[name]
        if self._active == name:
            self._active = None

    def check_active(self, names: Sequence[str]) -> None:
        """
        Raises:
            AdapterError: several of ``names`` have a copy: whole modules cannot be added up.
        """
        mine = [name for name in names if name in self.modules_to_save]
        if len(mine) > 1:
            raise AdapterError(
                f"adapters {mine} each replace one module whole (modules_to_save), so only one can be active"
            )

    def set_active(self, names: Sequence[str], trainable: bool = True) -> None:
        """Runs the copy of the one adapter of ``names`` that has one.

        Raises:
            AdapterError: several of them have one.
        """
        self.check_active(names)
        mine = [name for name in names if name in self.modules_to_save]
        self._active = mine[0] if mine else None
        for name, module in self.modules_to_save.items():
            module.requires_grad_(trainable and name == self._active)

    set_adapter = set_active

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Whether the copies of ``adapter_names`` train, active or not."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self.modules_to_save:
                self.modules_to_save[name].requires_grad_(requires_grad)

    def enable_adapters(self, enabled: bool) -> None:
        self._disabled = not enabled

    def routes(self) -> Container[str]:
        return self.modules_to_save

    def refusal(self) -> str | None:
        return "the adapters are disabled: leave disable_adapter() first" if self._disabled else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        runs = None if x is None else self.route(x)
        if runs is None:
            return self._run(self.current(), args, kwargs)
        if len(runs) == 1:
            return self._run(self._module(runs[0]), args, kwargs)
        return self._mixed(runs, args, kwargs)

    def _module(self, run: Run) -> nn.Module:
        return self.original_module if run.name is None else self.modules_to_save[run.name]

    def _mixed(self, runs: list[Run], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """Each run of rows through its own module, the outputs put together again.

        Raises:
            AdapterError: the module gives something else than one tensor with a row for each row.
        """
        size = runs[-1].stop
        # rows of the original come from the whole batch: how a product is blocked depends on its size, and they are
        # to be bitwise what the bare base gives
        whole = self._run(self.original_module, args, kwargs) if any(run.name is None for run in runs) else None
        pieces = []
        for run in runs:
            if run.name is None:
                out, rows = whole, size
            else:
                cut = slices(args, size, run.rows)
                named = dict(zip(kwargs, slices(kwargs.values(), size, run.rows), strict=True))
                out, rows = self._run(self._module(run), cut, named), run.stop - run.start
            if not isinstance(out, Tensor) or not out.dim() or out.shape[0] != rows:
                raise AdapterError(
                    f"adapter_names: {type(self.original_module).__name__} (modules_to_save) does not give one tensor "
                    "with a row for each row of its input, so its outputs cannot be mixed; run one adapter at a time"
                )
            pieces.append(out[run.rows] if run.name is None else out)
        return torch.cat(pieces)

    def _run(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        wanted = dtype_of(self.original_module)
        if module is self.original_module or wanted is None or dtype_of(module) == wanted:
            return module(*args, **kwargs)
        cast = {
            name: value.to(wanted) if value.is_floating_point() else value
            for name, value in (*module.named_parameters(), *module.named_buffers())
        }
        return torch.func.functional_call(module, cast, tuple(args), dict(kwargs))
