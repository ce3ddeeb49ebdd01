"""Faster and leaner ways to run a transformers model as it stands, for the time of a training step.

Inside :func:`fast_blocks` short sequences go through matrix-product attention (chosen in transformers' own registry),
RMS norms keep no float32 copy and SwiGLU keeps only gate and up. A module is taken over only after it was seen to give
the same numbers; everything is put back at the end, and the model's classes and forward are never touched.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaw.adapters import HostLayer
from deltaw.ops.attention import ATTENTION
from deltaw.ops.norm import rms_norm
from deltaw.ops.swiglu import swiglu
from deltaw.weights import has_store, store_of

__all__ = ["compile_layers", "fast_blocks", "runs_fast"]

log = logging.getLogger("deltaw")

_inside: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_recognised: weakref.WeakKeyDictionary[nn.Module, tuple[int, list[tuple[nn.Module, Callable[..., Tensor]]]]] = (
    weakref.WeakKeyDictionary()
)


@contextmanager
def fast_blocks(model: nn.Module, *, modules: bool = True) -> Iterator[None]:
    """Runs ``model`` the fast way inside the block; entered again inside itself it does nothing.

    With activation checkpointing the block must enclose backward too, since forward runs again there.

    Args:
        modules: take over norms and SwiGLU as well (leave them to the compiler when layers are compiled).
    """
    if model in _inside:
        yield
        return
    configs = _sdpa_configs(model)
    taken = _recognise(model) if modules else []
    _inside.add(model)
    try:
        for config in configs:
            config._attn_implementation = ATTENTION
        for module, forward in taken:
            module.forward = forward  # an instance attribute: the class's own forward is uncovered by deleting it
        yield
    finally:
        for module, _ in taken:
            module.__dict__.pop("forward", None)
        for config in configs:
            config._attn_implementation = "sdpa"
        _inside.discard(model)


def runs_fast(model: nn.Module) -> bool:
    """Whether ``model`` is inside :func:`fast_blocks` now."""
    return model in _inside


def _sdpa_configs(model: nn.Module) -> list[Any]:
    """Configs of the parts that use sdpa now; whoever chose another attention keeps it. Only a CPU gains."""
    first = next(model.parameters(), None)
    if first is None or first.device.type != "cpu":
        return []
    found = {
        id(module.config): module.config
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and module.config._attn_implementation == "sdpa"
    }
    return list(found.values())


def _recognise(model: nn.Module) -> list[tuple[nn.Module, Callable[..., Tensor]]]:
    """Modules whose arithmetic is known, with the forward that replaces theirs. Found once a model."""
    parts = list(model.modules())
    cached = _recognised.get(model)
    if cached is not None and cached[0] == len(parts):
        return cached[1]
    found: list[tuple[nn.Module, Callable[..., Tensor]]] = []
    proven: dict[tuple[Any, ...], bool] = {}
    for module in parts:
        if "forward" in module.__dict__:
            continue  # someone else has taken it over
        for make in (_norm_forward, _swiglu_forward):
            forward = make(module)
            if forward is None:
                continue
            signature = (type(module), *(tuple(p.shape) for p in module.parameters(recurse=False)))
            if signature not in proven:
                proven[signature] = _agrees(module, forward)
            if proven[signature]:
                found.append((module, forward))
    _recognised[model] = (len(parts), found)
    return found


def _norm_forward(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    own = dict(module.named_parameters())
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or list(own) != ["weight"] or not isinstance(eps, float):
        return None
    if own["weight"].requires_grad or own["weight"].dim() != 1:
        return None  # a norm that trains needs its weight's gradient
    stock = module.forward

    def forward(x: Tensor) -> Tensor:
        weight: Any = module.weight
        if weight.requires_grad or torch.compiler.is_compiling() or x.dtype != weight.dtype:
            return stock(x)
        return rms_norm(x, weight, eps)

    return forward


def _swiglu_forward(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    activation = type(getattr(module, "act_fn", None)).__name__
    if not all(isinstance(p, nn.Module) for p in parts) or activation not in ("SiLU", "SiLUActivation"):
        return None
    gate, up, down = parts
    if len(list(module.children())) != 4:
        return None  # something more than gate, up, down and the activation happens in there

    def forward(x: Tensor) -> Tensor:
        return down(swiglu(gate(x), up(x)))  # type: ignore[misc]

    return forward


@torch.no_grad()
def _agrees(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> bool:
    """Whether ``forward`` gives what the module's own does, on random numbers, to a few units of rounding."""
    first = getattr(module, "gate_proj", module)
    first = first.get_base_layer() if isinstance(first, HostLayer) else first
    weight = store_of(first) if has_store(first) else next(module.parameters())  # that of a norm has no store
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, weight.shape[-1], generator=generator).to(weight.device, weight.dtype)
    training = module.training
    module.eval()
    try:
        ours, theirs = forward(x).float(), module(x).float()
    except Exception as error:
        log.debug("left %s alone: %s", type(module).__name__, error)
        return False
    finally:
        module.train(training)
    return ours.shape == theirs.shape and torch.allclose(
        ours, theirs, rtol=4 * torch.finfo(weight.dtype).eps, atol=4 * torch.finfo(weight.dtype).eps
    )


def compile_layers(model: nn.Module) -> int:
    """Compiles the repeated layers of ``model`` one by one, in place; returns how many.

    One compilation serves all of them, where compiling the whole model would take minutes (torchtune's regional
    compilation). Shapes are dynamic, so that batches of any length use the same code.
    """
    layers = _repeated(model)
    for layer in layers:
        layer.compile(dynamic=True)
    return len(layers)


def _repeated(model: nn.Module) -> list[nn.Module]:
    """The members of the longest list of same-typed layers."""
    lists = [
        list(module)
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len({type(layer) for layer in module}) == 1
    ]
    return max(lists, key=len, default=[])
