"""LoftQ's A and B over a quantized base that stays as it is (PEFT's ``replace_lora_weights_loftq``).

One turn of LoftQ without its first half: s B A is the best approximation of what quantization lost. Nothing but A and B
changes, so a file of the adapter is plain LoRA, for any program that quantizes the base the same way.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn

from deltaw.adapters.host import adapters_named
from deltaw.adapters.methods.loftq import of_what_is_lost
from deltaw.adapters.methods.lora import Lora, require_bare
from deltaw.errors import AdapterError, did_you_mean
from deltaw.fullweights import FullWeights, full_weights, weights_at_hand
from deltaw.weights import wide

__all__ = ["replace_lora_weights_loftq"]


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | os.PathLike[str] | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Sets A and B of a LoRA adapter to what brings each quantized layer nearest to its full-precision weight.

    The weights are read one at a time. Layers that are not quantized keep their A and B.

    Args:
        peft_model: a model whose base is quantized.
        model_path: folder, file or hub id of the base in full precision; None: where the base came from, or what
            ``deltaw.full_weights`` gives.
        adapter_name: of plain LoRA.
        callback: called with the model and the layer's name after each; False takes that layer's change back.

    Raises:
        AdapterError: no quantized layer has a LoRA adapter of that name, or one is merged, or has a base of its own.
        ModelError: the full-precision weights are not to be found.
    """
    base = peft_model.get_base_model() if hasattr(peft_model, "get_base_model") else peft_model  # type: ignore[operator]
    everywhere = adapters_named(base, adapter_name)
    ours = {path: a for path, a in everywhere.items() if type(a) is Lora and a.host.store.quantized}
    if not ours:
        names = sorted({name for module in base.modules() for name in getattr(module, "adapters", {})})
        raise AdapterError(
            f"no quantized layer has a LoRA adapter {adapter_name!r}; "
            f"there are {names}{did_you_mean(adapter_name, names)}"
        )
    given = nullcontext() if model_path is None else full_weights(model_path)
    with given, weights_at_hand(base) as source:
        for path, adapter in ours.items():
            before = adapter.lora_A.clone(), adapter.lora_B.clone()
            _replace(adapter, path, source)
            if callback is not None and not callback(peft_model, path):
                adapter.lora_A.copy_(before[0])
                adapter.lora_B.copy_(before[1])


def _replace(adapter: Lora, path: str, source: FullWeights) -> None:
    host, store = adapter.host, adapter.host.store
    require_bare(host, f"replacing the weights of adapter {adapter.name!r} on {path!r}")
    if adapter.name in host.bases:
        raise AdapterError(
            f"adapter {adapter.name!r} on {path!r} was made over a base weight of its own (init_lora_weights), which "
            "already answers for what quantization loses; make it with init_lora_weights=True to replace its weights"
        )
    if host.bases:
        host.bases.put(store, None)  # another adapter's own may be there
    weight = source.weight(path, store.shape).to(store.device)
    A, B = of_what_is_lost(weight, wide(store.dequantize()), len(adapter.lora_A), adapter.scaling)
    adapter.lora_A.copy_(A)
    adapter.lora_B.copy_(B)
