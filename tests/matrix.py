"""What the matrix test and the table of docs/methods.md run through: every method on every kind of layer.

Methods come from the catalogue and the registry; a layer is alone in its model. Who supports what is found by trying.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import deltaw
from deltaw.errors import DeltawError
from deltaw.methods import METHODS

ROWS = 3  # of a batch


class Layer(NamedTuple):
    """A kind of layer: how one is made, and the shape of a batch for it (None: of ids)."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] | None

    def inputs(self, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        if self.shape is None:
            return torch.randint(0, 9, (ROWS, 5), generator=generator)
        return torch.randn(ROWS, *self.shape, generator=generator).to(dtype)


LAYERS = {
    "Linear": Layer(lambda: nn.Linear(12, 10), (5, 12)),
    "Conv1D": Layer(lambda: Conv1D(10, 12), (5, 12)),  # transformers' linear layer, stored (in, out)
    "Embedding": Layer(lambda: nn.Embedding(9, 12), None),
    "Conv1d": Layer(lambda: nn.Conv1d(4, 6, 3, padding=1), (4, 7)),
    "Conv2d": Layer(lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (4, 6, 6)),
    "Conv3d": Layer(lambda: nn.Conv3d(4, 6, 2), (4, 3, 3, 3)),
    "grouped": Layer(lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 6, 6)),
}


class Case(NamedTuple):
    """A method with settings."""

    method: str
    fields: dict[str, Any]

    def config(self, library: Any = deltaw, **more: Any) -> Any:
        """The config of ``library`` (deltaw or peft)."""
        chosen = METHODS[self.method]
        fields = {**SMALL[chosen.config], **chosen.fixes, **self.fields, **more}
        return getattr(library, chosen.config)(**fields, target_modules=["layer"])


SMALL: dict[str, dict[str, Any]] = {
    "LoraConfig": {"r": 4, "lora_alpha": 6},
    "AdaLoraConfig": {"init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": 20},
    "LoHaConfig": {"r": 3, "alpha": 5},
    "LoKrConfig": {"r": 2, "alpha": 5},
}
#: each method as it comes, and with settings that take another path
CASES = {name: Case(name, {}) for name in METHODS} | {
    "lora gaussian": Case("lora", {"init_lora_weights": "gaussian"}),
    "lora orthogonal": Case("lora", {"init_lora_weights": "orthogonal"}),
    "lora with bias": Case("lora", {"lora_bias": True}),
    "dora rslora": Case("dora", {"use_rslora": True, "lora_alpha": 3}),
    "loha effective": Case("loha", {"use_effective_conv2d": True}),
    "lokr whole": Case("lokr", {"r": 8}),
    "lokr both": Case("lokr", {"r": 1, "decompose_both": True, "decompose_factor": 2}),
    "lokr effective": Case("lokr", {"r": 1, "use_effective_conv2d": True}),
    "lokr lycoris": Case("lokr", {"init_weights": "lycoris"}),
}


class Holder(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def base(layer: str, dtype: torch.dtype = torch.float32) -> Holder:
    """The bare layer, with the same weights at each call."""
    torch.manual_seed(0)
    made = LAYERS[layer].build()
    bias = getattr(made, "bias", None)
    if bias is not None:
        nn.init.normal_(bias)  # a zero bias would hide mistakes
    return Holder(made).to(dtype).eval()


def adapted(
    case: Case | str,
    layer: str,
    dtype: torch.dtype = torch.float32,
    names: Sequence[str] = ("default",),
    library: Any = deltaw,
) -> Any:
    """The layer with adapters ``names`` of one method on it, all of them active; PEFT's with ``library=peft``."""
    case = CASES[case] if isinstance(case, str) else case
    held, more = base(layer, dtype), {}
    if library is not deltaw and isinstance(held.layer, Conv1D) and "Lora" in METHODS[case.method].config:
        more["fan_in_fan_out"] = True  # PEFT warns where it must be told
    torch.manual_seed(7)
    model = library.get_peft_model(held, case.config(library, **more), adapter_name=names[0])
    if case.method == "adalora":
        more["inference_mode"] = True  # PEFT trains one AdaLoRA at a time
    for name in names[1:]:
        model.add_adapter(name, case.config(library, **more))
    if len(names) > 1:
        (model if library is deltaw else model.base_model).set_adapter(list(names))
    return model.eval()


@functools.cache
def refusal(case: str, layer: str, library: Any = deltaw) -> str:
    """Why the method cannot run on the layer, in the library's words; empty where it can."""
    try:
        adapted(case, layer, library=library)(LAYERS[layer].inputs())
    except Exception as error:
        if library is deltaw and not isinstance(error, DeltawError):
            raise
        return str(error) or type(error).__name__
    return ""


@torch.no_grad()
def stirred(model: Any, size: float = 0.3) -> Any:
    """With noise on all that the adapters hold, alike for equal names, as after training."""
    for name, parameter in model.named_parameters():
        if ".base_layer." not in name and "ranknum" not in name:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter += (torch.randn(parameter.shape, generator=generator) * size).to(parameter.dtype)
    return model
