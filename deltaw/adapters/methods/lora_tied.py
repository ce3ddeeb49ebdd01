"""LoRA on layers whose weight is the input embedding's: they share the embedding's factors (``ensure_weight_tying``).

The update stays one and the same in both places, W + s (B A)^T, so that tied weights can be merged and stay tied. PEFT
keeps the head's factors as parameters of their own over the same memory, which an optimizer steps twice; here there is
one set, and its gradient is the sum over all places. Files hold a copy for each place, as PEFT's do.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.adapters.base import Adapter, drawing
from deltaw.adapters.config import PeftConfig
from deltaw.adapters.host import HostLayer
from deltaw.adapters.lowrank import Factors, LowRank
from deltaw.adapters.methods.lora import LoraConfig, rate, remember_settings
from deltaw.adapters.methods.lora_embedding import LoraEmbedding
from deltaw.errors import ConfigError

__all__ = ["TiedLora", "TiedLoraEmbedding"]


def source_of(adapter: Adapter) -> LoraEmbedding:
    """The adapter whose parameters this one shares; ``inject`` puts its host into ``tied_to``."""
    hosts: Any = adapter.host.tied_to
    return hosts[adapter.name].adapters[adapter.name]


class TiedLora(LowRank):
    """On a linear layer, usually the output head: A = B_e^T (r, d) and B = A_e^T (V, r) of the embedding's factors."""

    value_slots = ("tied_to", "lora_dropout", "r", "lora_alpha", "scaling", "use_rslora", "lora_bias")
    prefix = "lora_"

    @classmethod
    def create(cls, host: HostLayer, name: str, config: PeftConfig, layer_name: str) -> TiedLora:
        assert isinstance(config, LoraConfig)
        if config.init_lora_weights not in (True, False, "gaussian"):
            raise ConfigError(
                f"ensure_weight_tying with init_lora_weights={config.init_lora_weights!r}: {layer_name!r} shares its "
                "factors with the input embedding, so they cannot start from its weight; use True, False or 'gaussian'"
            )
        remember_settings(host, name, config, layer_name)
        adapter = cls(host, name)
        source = source_of(adapter)
        r, d = source.lora_A.shape[0], source.lora_B.shape[0]
        with drawing(host):  # PEFT's draws, in its order: two linears that are not used, then the shared factor anew
            nn.Linear(d, r, bias=False)
            nn.Linear(r, source.lora_A.shape[1], bias=False)
            start = torch.empty(d, r, dtype=host.store.dtype)
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(start.t(), std=1 / r)
        elif config.init_lora_weights:
            nn.init.kaiming_uniform_(start.t(), a=math.sqrt(5))
        if config.init_lora_weights:
            with torch.no_grad():
                source.lora_B.copy_(start)
        return adapter

    def factors(self) -> Factors:
        source = source_of(self)
        dropout = rate(self.host.lora_dropout[self.name])  # type: ignore[index]
        return Factors(source.lora_B.t(), source.lora_A.t(), source.scaling, dropout=dropout)

    def delta_weight(self) -> Tensor:
        return source_of(self).delta_weight()  # bitwise the embedding's

    def places(self) -> dict[str, nn.Parameter]:
        source = source_of(self)
        return {"lora_A.weight": source.lora_B, "lora_B.weight": source.lora_A}  # transposed: see from_file()

    def file_tensors(self) -> dict[str, Tensor]:
        return {key: parameter.detach().t() for key, parameter in self.places().items()}

    def from_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        own = self.places()
        return {key: tensor.t() if key in own and tensor.ndim == 2 else tensor for key, tensor in tensors.items()}


class TiedLoraEmbedding(LoraEmbedding):
    """On another embedding (an encoder's and a decoder's own, as in T5): A and B are the input embedding's."""

    parameter_slots = ()
    value_slots = ("tied_to", *LoraEmbedding.value_slots)

    @classmethod
    def create(cls, host: HostLayer, name: str, config: PeftConfig, layer_name: str) -> TiedLoraEmbedding:
        assert isinstance(config, LoraConfig)
        remember_settings(host, name, config, layer_name)
        return cls(host, name)

    @property
    def lora_A(self) -> nn.Parameter:
        return source_of(self).lora_A

    @property
    def lora_B(self) -> nn.Parameter:
        return source_of(self).lora_B

    @property
    def scaling(self) -> float:
        return source_of(self).scaling

    def delta_weight(self) -> Tensor:
        return source_of(self).delta_weight()

    def places(self) -> dict[str, nn.Parameter]:
        return {"lora_embedding_A": self.lora_A, "lora_embedding_B": self.lora_B}
