"""Batches that mix adapters: which rows of the forward that is running go through which adapter.

A forward is entered with one name a row; layers that hold adapters ask for their runs of rows. The routing outlives the
forward only inside a checkpoint that computes a layer again in backward, which carries it along. Knows nothing of hosts
or methods: a module that can split a batch is :class:`Routable`.
"""

from __future__ import annotations

import functools
import threading
from abc import abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltaw.errors import AdapterError, did_you_mean
from deltaw.modules import name_of

__all__ = ["BASE", "Routable", "Run", "carried", "forwarding", "generating", "slices"]

#: the name of rows that go through no adapter
BASE = "__base__"

#: inputs by which a model is told its batch, after its own main input
_MAIN = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


class Run(NamedTuple):
    """Rows ``start`` to ``stop`` of a layer's input, all of adapter ``name``; None is the bare base."""

    name: str | None
    start: int
    stop: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


class Routing:
    """The names of one forward's rows.

    Args:
        names: one a row of the batch as the caller gave it.
        batch: rows of the batch in this forward, a multiple of that (generation repeats each row, side by side).
        lengths: tokens a row, of all inputs; some layers flatten rows and tokens.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], batch: int, lengths: Iterable[int]) -> None:
        self.model = model
        self.names = tuple(names)
        self.batch = batch
        self.flat = frozenset(batch * length for length in lengths)

    @classmethod
    def of(cls, model: nn.Module, names: Sequence[str], repeats: int, args: Sequence[Any], kwargs: Mapping) -> Routing:
        """The routing of ``model(*args, **kwargs)``.

        Args:
            repeats: how often generation may have repeated each row.

        Raises:
            AdapterError: the number of names is not the number of rows.
        """
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()]
        named = [kwargs.get(name) for name in (getattr(model, "main_input_name", ""), *_MAIN)]
        first = next((value for value in (*args[:1], *named, *tensors) if isinstance(value, Tensor)), None)
        if first is None:
            raise AdapterError("adapter_names: there is no tensor among the model's inputs to read the batch from")
        batch = first.shape[0]
        if batch not in (len(names), len(names) * repeats):
            raise AdapterError(
                f"adapter_names holds {len(names)} names, but the batch has {batch} rows: give one name a row "
                f"({BASE!r} for none)"
            )
        return cls(model, names, batch, {t.shape[1] for t in tensors if t.dim() > 1 and t.shape[0] == batch})

    def runs(self, layer: nn.Module, x: Tensor, known: Container[str]) -> list[Run]:
        """Neighbouring rows of x under one name, in order; names that are not ``known`` to the layer mean the base.

        Raises:
            AdapterError: the first dimension of x is not the batch, so its rows cannot be told apart.
        """
        size = x.shape[0] if x.dim() else 0
        if size != self.batch and not (x.dim() <= 2 and size in self.flat):
            raise AdapterError(
                f"adapter_names: the input of {name_of(self.model, layer)!r} ({type(layer).__name__}) has the shape "
                f"{tuple(x.shape)}; its first dimension is neither the batch ({self.batch} rows) nor batch times "
                "tokens, so its rows cannot be told apart. Adapt other layers, or run one adapter at a time"
            )
        each = size // len(self.names)  # both ways of growing keep a row's parts side by side
        runs: list[Run] = []
        for index, name in enumerate(self.names):
            mine = name if name in known else None
            start = runs.pop().start if runs and runs[-1].name == mine else index * each
            runs.append(Run(mine, start, (index + 1) * each))
        return runs


# --- the forward that is running ----------------------------------------------------------------------------------


class _Running(threading.local):
    routing: Routing | None = None


_running = _Running()


@contextmanager
def _using(routing: Routing) -> Iterator[None]:
    before = _running.routing
    _running.routing = routing
    try:
        yield
    finally:
        _running.routing = before


def carried(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, with the routing of now whenever it is called: ``checkpoint(carried(layer), x)``.

    Backward computes a checkpointed layer again when forward has returned, perhaps on another thread.
    """
    routing = _running.routing
    return function if routing is None else functools.partial(_call, routing, function)


def _call(routing: Routing, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _using(routing):
        return function(*args, **kwargs)


class Routable(nn.Module):
    """A module that runs each row of a mixed batch through the row's own adapter."""

    _was_routed = False

    @abstractmethod
    def routes(self) -> Container[str]:
        """Names of the adapters that are here."""

    @abstractmethod
    def refusal(self) -> str | None:
        """What keeps a mixed batch from running now, and the cure; None when nothing does."""

    def route(self, x: Tensor) -> list[Run] | None:
        """The runs of x's rows in the forward that is running; None where it mixes no adapters.

        Raises:
            AdapterError: the rows of x cannot be told apart, or x is a mixed batch that is computed again in backward
                without its routing.
        """
        routing = _running.routing
        if routing is not None:
            if not self._was_routed:
                self._was_routed = True
            return routing.runs(self, x, self.routes())
        if self._was_routed:
            # compiled code is not run again as Python, and cannot ask whether backward is running
            if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
                raise AdapterError(
                    "backward computes a layer again that ran a mixed batch (adapter_names), and which row went "
                    "through which adapter is lost: wrap what you checkpoint, checkpoint(deltaw.adapters.carried("
                    "function), ...), or let transformers do it (model.gradient_checkpointing_enable())"
                )
            self._was_routed = False
        return None


def slices(values: Iterable[Any], size: int, rows: slice) -> list[Any]:
    """``values``, each tensor among them whose first dimension is ``size`` cut down to ``rows``."""
    return [v[rows] if isinstance(v, Tensor) and v.dim() and v.shape[0] == size else v for v in values]


# --- entering it --------------------------------------------------------------------------------------------------


@contextmanager
def forwarding(
    model: nn.Module, names: Sequence[str], known: Iterable[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[None]:
    """Inside the block ``model(*args, **kwargs)`` sends each row through the adapter of its name.

    Args:
        known: the adapters that exist.

    Raises:
        AdapterError: unknown names, a wrong number of them, or a model that cannot mix adapters now; all faults at
            once.
    """
    checkpoints = _check(model, names, known)
    routing = Routing.of(model, names, 1, args, kwargs)
    with _using(routing), _carrying(checkpoints):
        yield


@contextmanager
def generating(
    model: nn.Module, names: Sequence[str], known: Iterable[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[None]:
    """The same for ``model.generate(*args, **kwargs)``, where beams and returned sequences repeat each row."""
    _check(model, names, known)
    repeats = max(_generation_setting(model, name, args, kwargs) for name in ("num_beams", "num_return_sequences"))

    def at_each_forward(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _running.routing = Routing.of(model, names, repeats, args, kwargs)

    parts = [model]
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        parts.append(model.get_encoder())  # type: ignore[operator]
    with _using(Routing.of(model, names, 1, args, kwargs)), ExitStack() as hooks:
        for part in parts:
            hooks.callback(part.register_forward_pre_hook(at_each_forward, with_kwargs=True).remove)
        yield


def _generation_setting(model: nn.Module, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """What generation will use: the call's own value, else its config's, else the model's."""
    given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    configs = (given, getattr(model, "generation_config", None))
    found = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in found if value is not None), 1)


def _check(model: nn.Module, names: Sequence[str], known: Iterable[str]) -> list[nn.Module]:
    """The modules of ``model`` that will be computed again in backward.

    Raises:
        AdapterError: as :func:`forwarding` says.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise AdapterError(f"adapter_names={names!r}: give a list with one adapter name a row ({BASE!r} for none)")
    known = list(known)
    unknown = [name for name in dict.fromkeys(names) if name != BASE and name not in known]
    faults = [f"no adapter {n!r}; there are {known}{did_you_mean(str(n), [*known, BASE])}" for n in unknown]
    refusals: dict[str, None] = {}
    experts, checkpoints = [], []
    for path, module in _parts(model):
        if not isinstance(module, Routable):
            if module.training and "_gradient_checkpointing_func" in module.__dict__:
                checkpoints.append(module)
            continue
        refusal = module.refusal()
        if refusal is not None:
            refusals[refusal] = None
        if "experts" in path.split(".") and any(name in module.routes() for name in names):
            experts.append(path)
    if experts:
        more = f" and {len(experts) - 1} more" if experts[1:] else ""
        refusals[
            f"{experts[0]!r}{more} lies inside a mixture's experts, where the rows of the batch are "
            "shuffled; adapt other layers, or run one adapter at a time"
        ] = None
    faults.extend(refusals)
    if faults:
        raise AdapterError("adapter_names: " + "\n".join(faults))
    return checkpoints


def _parts(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of all modules, without those inside a :class:`Routable`: adapters make these many."""
    yield path, module
    if not isinstance(module, Routable):
        for name, child in module._modules.items():
            if child is not None:
                yield from _parts(child, f"{path}.{name}" if path else name)


@contextmanager
def _carrying(modules: list[nn.Module]) -> Iterator[None]:
    """Inside the block transformers' checkpoints of these modules carry the routing into backward."""
    kept: list[tuple[Any, Any]] = [(module, module.__dict__["_gradient_checkpointing_func"]) for module in modules]
    try:
        for module, checkpoint in kept:
            module._gradient_checkpointing_func = functools.partial(_checkpoint_carried, checkpoint)
        yield
    finally:
        for module, checkpoint in kept:
            module._gradient_checkpointing_func = checkpoint


def _checkpoint_carried(checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return checkpoint(carried(function), *args, **kwargs)
