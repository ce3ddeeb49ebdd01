"""LoRA on an embedding: W' = W + s (B A)^T, with A (r, V) and B (d, r) (loralib's layout, as in PEFT).

Row v of the update is s B A[:, v], so forward reads only the columns of A that its ids name.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deltaw.adapters.base import Adapter, drawing, settle
from deltaw.adapters.config import PeftConfig
from deltaw.adapters.host import HostLayer
from deltaw.adapters.hosts.embedding import Embedding
from deltaw.adapters.methods.lora import LoraConfig, remember_settings
from deltaw.errors import ConfigError
from deltaw.weights import wide

__all__ = ["LoraEmbedding"]


class LoraEmbedding(Adapter):
    """The low-rank update of one embedding. A starts at zero and B is drawn from N(0, 1), whatever
    ``init_lora_weights`` names (False: both are drawn); ``lora_dropout`` does not act here. Both as in PEFT."""

    host: Embedding
    parameter_slots = ("lora_embedding_A", "lora_embedding_B")
    value_slots = ("lora_dropout", "r", "lora_alpha", "scaling", "use_rslora", "lora_bias")
    prefix = "lora_"

    @classmethod
    def create(cls, host: HostLayer, name: str, config: PeftConfig, layer_name: str) -> LoraEmbedding:
        assert isinstance(config, LoraConfig)
        assert isinstance(host, Embedding)
        if config.lora_bias:
            raise ConfigError(f"lora_bias=True, but {layer_name!r} is an embedding, which has no bias; leave it out")
        r = remember_settings(host, name, config, layer_name)
        with drawing(host):
            A = torch.randn(r, host.num_embeddings, dtype=torch.float32)
            B = torch.randn(host.embedding_dim, r, dtype=torch.float32)
        if config.init_lora_weights:
            nn.init.zeros_(A)
            nn.init.normal_(B)
        host.slot("lora_embedding_A", nn.ParameterDict)[name] = nn.Parameter(settle(host, A))
        host.slot("lora_embedding_B", nn.ParameterDict)[name] = nn.Parameter(settle(host, B))
        return cls(host, name)

    @property
    def lora_A(self) -> nn.Parameter:
        """A, (r, V)."""
        return self.host.lora_embedding_A[self.name]  # type: ignore[index]

    @property
    def lora_B(self) -> nn.Parameter:
        """B, (d, r)."""
        return self.host.lora_embedding_B[self.name]  # type: ignore[index]

    @property
    def scaling(self) -> float:
        return self.host.scaling[self.name]  # type: ignore[index]

    def delta_weight(self) -> Tensor:
        return (wide(self.lora_B) @ wide(self.lora_A)).t() * self.scaling  # (V, d)

    def update(self, ids: Tensor) -> Tensor:
        """What is added to the base's rows, ids (...) -> (..., d)."""
        low = self.host.look_up(self.lora_A.t(), ids)  # (..., r)
        return low @ self.lora_B.t() * self.scaling

    def forward(self, x: Tensor, base_out: Tensor) -> Tensor:
        return (base_out + self.update(x)).to(base_out.dtype)  # added in float32, rounded once
