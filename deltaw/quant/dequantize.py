"""Back from four bits: packed layers become plain ones again, of the values that they were read as. Knows nothing of
adapters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deltaw.modules import set_submodule
from deltaw.quant.experts import PackedExperts, keep_dense_
from deltaw.quant.linear import NF4Linear
from deltaw.weights import store_of

__all__ = ["dense_linear", "dequantize_"]


def dense_linear(
    layer: nn.Module, weight: Tensor | None = None, bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> nn.Linear:
    """A plain, frozen ``nn.Linear`` in the place of a quantized one.

    Args:
        layer: has a weight store.
        weight: (out, in) in place of the layer's own.
        bias: (out,) in place of the layer's own.
        dtype: of the weight; None: that in which the layer's own is read back.
    """
    store = store_of(layer)
    out_features, in_features = store.shape
    with torch.device("meta"):  # nn.Linear's own would be drawn for nothing
        dense = nn.Linear(in_features, out_features, bias=False)
    weight = store.dequantize() if weight is None else weight
    dense.weight = nn.Parameter(weight.detach().to(dtype or store.dtype), requires_grad=False)
    own = layer._parameters.get("bias")
    dense.register_parameter("bias", own if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
    return dense.train(layer.training)


def dequantize_(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Turns every layer of four bits, and experts, into plain ones in place, and has a transformers model forget that
    it was quantized: what it saves is an ordinary model.

    Args:
        dtype: of the weights; None: that in which each is read back.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, NF4Linear):
            set_submodule(model, name, dense_linear(module, dtype=dtype))
        elif isinstance(module, PackedExperts):
            keep_dense_(module, dtype)
    for attribute in ("hf_quantizer", "quantization_method"):
        if attribute in vars(model):
            delattr(model, attribute)
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "quantization_config"):
        del config.quantization_config
    if getattr(model, "is_quantized", False):
        model.is_quantized = False  # type: ignore[assignment]
    return model
