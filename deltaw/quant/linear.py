"""``NF4Linear``: a linear layer whose weight is kept in four bits.

Its bytes and statistics are frozen parameters, so that FSDP shards them; a state dict has bitsandbytes' keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltaw.errors import CheckpointError, ModelError
from deltaw.quant.autograd import linear
from deltaw.quant.bnb_format import KEYS, fitting, stored, to_bnb
from deltaw.quant.ops import quantize_4bit
from deltaw.quant.packed import READ_AS, Packed, uncast
from deltaw.quant.store import QuantizedWeight
from deltaw.weights import is_finite, register_store, store_of

if TYPE_CHECKING:
    from deltaw.quant.config import NF4Config  # which imports transformers; a layer does without

__all__ = ["NF4Linear", "pack", "unpackable"]

#: attribute of Packed -> name of the parameter that holds it
_HELD = {"codes": "weight", "absmax": "absmax", "nested_absmax": "nested_absmax", "nested_offset": "nested_offset"}


class NF4Linear(nn.Linear):
    """x (..., in) -> x W^T + bias, (..., out), with W in four bits.

    ``train()``, ``eval()`` and ``to(dtype)`` leave the weight as it is, bit for bit, and the dtype that it is read back
    in too (bitsandbytes does the same); the bias follows ``to(dtype)``.

    Args:
        in_features, out_features, bias: as those of ``nn.Linear``.
        config: how the weight is kept.
        device: where.
        dtype: of the bias, and in which the weight is read back.

    Attributes:
        weight: uint8 [(out * in + 1) // 2, 1], or the same bytes under ``config.bnb_4bit_quant_storage``.
        absmax, nested_absmax, nested_offset: statistics, see :class:`~deltaw.quant.packed.Packed`; without double
            quantization the last two are None.
    """

    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        config: NF4Config,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dtype = dtype or torch.get_default_dtype()
        zeros = torch.zeros(out_features, in_features, device=device, dtype=dtype)
        self._hold(
            pack(zeros, config),
            nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None,
            config.bnb_4bit_compute_dtype,
            config.bnb_4bit_quant_storage,
        )

    def _hold(
        self, packed: Packed, bias: nn.Parameter | None, compute_dtype: torch.dtype | None, storage: torch.dtype
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make the weight in full
        self.out_features, self.in_features = packed.shape
        self.compute_dtype = compute_dtype
        self.quant_storage = storage
        self.quant_type = packed.quant_type
        self.blocksize = packed.blocksize
        self.nested_blocksize = packed.nested_blocksize
        self.dtype = packed.dtype
        for name in _HELD.values():
            self.register_parameter(name, None)
        self.register_parameter("bias", bias)
        for name, tensor in packed.tensors().items():
            tensor = stored(tensor, storage) if name == "codes" else tensor
            setattr(self, _HELD[name], nn.Parameter(tensor.detach(), requires_grad=False))

    # --- in and out -----------------------------------------------------------------------------------------

    @classmethod
    def from_linear(cls, module: nn.Module, config: NF4Config) -> NF4Linear:
        """A linear layer's weight in four bits; its bias is taken as it is.

        Args:
            module: anything whose weight store gives (out, in): ``nn.Linear``, transformers' ``Conv1D``.

        Raises:
            ModelError: a weight of a dtype that is not read back, or bytes that do not divide into the storage's items.
        """
        weight = store_of(module).dequantize().detach()
        made = cls.from_packed(
            pack(weight, config),
            module._parameters.get("bias"),
            compute_dtype=config.bnb_4bit_compute_dtype,
            quant_storage=config.bnb_4bit_quant_storage,
        )
        return made.train(module.training)  # type: ignore[return-value]

    @classmethod
    def from_packed(
        cls,
        packed: Packed,
        bias: nn.Parameter | None = None,
        *,
        compute_dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
    ) -> NF4Linear:
        """A layer over a weight that is packed already; shares its memory."""
        made = cls.__new__(cls)
        made._hold(packed, bias, compute_dtype, quant_storage)
        return made

    @property
    def packed(self) -> Packed:
        """The weight as it is kept; shares the parameters' memory."""
        codes = self.weight.detach()
        return Packed(
            (codes if codes.dtype == torch.uint8 else codes.view(torch.uint8)).view(-1),
            self.absmax,
            self.nested_absmax,
            self.nested_offset,
            self.quant_type,
            self.blocksize,
            torch.Size((self.out_features, self.in_features)),
            self.dtype,
            self.nested_blocksize,
        )

    def twin(self, bias: nn.Parameter | None = None) -> NF4Linear:
        """Another layer with a bias of its own and this one's very parameters: tied weights."""
        made = self.from_packed(self.packed, bias, compute_dtype=self.compute_dtype, quant_storage=self.quant_storage)
        for name in _HELD.values():
            setattr(made, name, getattr(self, name))
        return made.train(self.training)  # type: ignore[return-value]

    def logical_sizes(self) -> dict[str, int]:
        """Name of a parameter -> how many weights of the model it stands for, where that is not its own size."""
        held = dict.fromkeys((name for name in _HELD.values() if getattr(self, name) is not None), 0)
        return held | {"weight": self.out_features * self.in_features}

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.packed, self.bias, self.compute_dtype)

    def extra_repr(self) -> str:
        nested = ", nested" if self.nested_absmax is not None else ""
        return f"{super().extra_repr()}, {self.quant_type}, blocksize={self.blocksize}{nested}, read as {self.dtype}"

    # --- what must not be cast ------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
        """Moves; of the packed weight and its statistics it changes the device alone, never the dtype."""
        held = [parameter for name in _HELD.values() if (parameter := getattr(self, name)) is not None]
        return super()._apply(uncast(fn, held), recurse)  # type: ignore[return-value]

    # --- state dicts in bitsandbytes' keys ------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for key, tensor in to_bnb(self.packed, self.quant_storage).items():
            destination[prefix + key] = tensor
        if keep_vars:
            destination[prefix + "weight"] = self.weight
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = {key: state_dict[prefix + key] for key in KEYS if prefix + key in state_dict}
        packed = self.packed  # what is not given, or wrong, stays
        if given:
            try:
                packed = fitting(given, packed, "layer")
            except CheckpointError as error:
                error_msgs.append(f"{prefix.removesuffix('.') or 'the layer'}: {error}")
        else:
            missing_keys.append(prefix + "weight")
        # the rest, shapes and assignment among it, is as for any parameter
        own: dict[str, Any] = {
            k: v for k, v in state_dict.items() if k.startswith(prefix) and k[len(prefix) :] not in given
        }
        for name, tensor in packed.tensors().items():
            own[prefix + _HELD[name]] = stored(tensor, self.quant_storage) if name == "codes" else tensor
        super()._load_from_state_dict(own, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        self.dtype = packed.dtype


def unpackable(weight: Tensor, config: NF4Config) -> str:
    """Why ``weight`` cannot be kept as ``config`` says, in words; empty when it can."""
    if weight.dtype not in READ_AS:
        return f"has a weight of {weight.dtype}, which cannot be kept in 4 bits: convert the model to float32 first"
    count, item = (weight.numel() + 1) // 2, config.bnb_4bit_quant_storage.itemsize
    if count % item:
        return (
            f"has a weight {tuple(weight.shape)} of {count} bytes in 4 bits, which do not divide into items of "
            f"bnb_4bit_quant_storage={config.bnb_4bit_quant_storage}: use uint8, or skip this layer"
        )
    return ""


def weight_fault(weight: Tensor, config: NF4Config) -> str:
    """The same, or that its values are none to be kept."""
    if fault := unpackable(weight, config):
        return fault
    return "" if weight.is_meta or is_finite(weight) else "has weights that are NaN or infinite"


def pack(weight: Tensor, config: NF4Config) -> Packed:
    if fault := unpackable(weight, config):
        raise ModelError(f"a layer {fault}")
    return quantize_4bit(
        weight,
        config.bnb_4bit_quant_type,
        config.bnb_4bit_blocksize,
        nested=config.bnb_4bit_use_double_quant,
    )


register_store(NF4Linear, QuantizedWeight)  # type: ignore[arg-type]
