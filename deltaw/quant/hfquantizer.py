"""transformers loads a model in four bits: weight by weight as its files are read, or from packed bytes that
bitsandbytes (or we) wrote. The dense model never exists, only one weight of it at a time.

Knows transformers' quantizer and its conversion operations, and nothing of adapters.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from deltaw.errors import CheckpointError, ModelError
from deltaw.modules import set_submodule, split_name
from deltaw.quant.bnb_format import KEYS, from_bnb
from deltaw.quant.config import NF4Config
from deltaw.quant.dequantize import dequantize_
from deltaw.quant.experts import PackedExperts, expert_weights, keep_packed_
from deltaw.quant.linear import NF4Linear, pack, weight_fault
from deltaw.quant.packed import Packed
from deltaw.quant.quantize import CONV1D, quantizable, skipped_names
from deltaw.weights import is_a, store_of

__all__ = ["METHOD", "NF4Quantizer", "introduce", "mark_quantized"]

#: what transformers calls this way of quantizing; in files it is bitsandbytes' name
METHOD = "deltaw_nf4"
#: longest first: transformers takes the first of a converter's patterns that fits
_SUFFIXES = sorted((key.removeprefix("weight") for key in KEYS), key=len, reverse=True)
_EXPERT_BY_EXPERT = re.compile(r"experts\.\d+\..*\.weight\.absmax")


class NF4Quantizer(HfQuantizer):
    """Quantizes linear layers and fused experts as they are read, or takes them as packed in the files.

    Attributes:
        targets: full names of the parameters that are kept in four bits.
        faults: what is wrong with weights that were read; told together at the end, since transformers would hide them.
        dtype: of the model's other weights, and in which those are read back.
    """

    requires_calibration = False
    quantization_config: NF4Config

    def __init__(self, quantization_config: NF4Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.targets: set[str] = set()
        self.faults: list[str] = []
        self.dtype = torch.get_default_dtype()

    # --- before the weights are read ------------------------------------------------------------------------

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """
        Raises:
            ModelError: parts of the model are to be offloaded.
        """
        places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ModelError(
                f"device_map puts parts of the model on {sorted(places)}: a model in 4 bits is not offloaded; give it "
                "device_map='auto' on GPUs that hold it, or load it on the CPU as a whole"
            )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self.dtype = dtype
        return dtype

    def update_device_map(self, device_map: Any) -> Any:
        """To the GPU where there is one, so that weights are quantized there and the host holds none of them."""
        if device_map is None and torch.cuda.is_available():
            return {"": torch.cuda.current_device()}
        return device_map

    @property
    def quantized_element_size(self) -> float:
        """Bytes a weight, statistics included."""
        block = self.quantization_config.bnb_4bit_blocksize
        return 0.5 + (1 + 4 / 256 if self.quantization_config.bnb_4bit_use_double_quant else 4) / block

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        """Leaves room for the weight that is being quantized."""
        return {place: size * 0.9 if isinstance(size, int | float) else size for place, size in max_memory.items()}

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        patterns = skipped_names(model, self.quantization_config)
        for name, module in model.named_modules():
            if not should_convert_module(name, patterns):
                continue
            weights = ["weight"] if quantizable(module) else expert_weights(module)
            self.targets.update(f"{name}.{weight}" for weight in weights)
        if self.pre_quantized:
            self._expect_bytes(model, kwargs.get("checkpoint_files") or ())
        return model

    def _expect_bytes(self, model: nn.Module, files: Iterable[str]) -> None:
        """Makes the empty parameters say that bytes will come, which must not be cast to the model's dtype.

        Raises:
            ModelError: experts that were quantized one by one, which transformers fuses.
        """
        for target in self.targets:
            path, name = split_name(target)
            module = model.get_submodule(path)
            old = module._parameters[name]
            assert old is not None
            empty = torch.empty(old.shape, dtype=self.quantization_config.bnb_4bit_quant_storage, device="meta")
            module._parameters[name] = nn.Parameter(empty, requires_grad=False)
        if not any(_fused(model, target) for target in self.targets):
            return
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                key = next((key for key in tensors.keys() if _EXPERT_BY_EXPERT.search(key)), None)  # noqa: SIM118
            if key is not None:
                raise ModelError(
                    f"{file} holds experts in 4 bits one by one ({key}), as older transformers wrote them, and today's "
                    "has them fused: load the full-precision model with NF4Config()"
                )

    # --- while they are read --------------------------------------------------------------------------------

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.targets

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """For packed bytes: one operation is given all tensors of a weight."""
        if not self.pre_quantized:
            return []
        names = {"weight"} | {
            ".".join(target.split(".")[-2:]) for target in self.targets if not target.endswith(".weight")
        }
        return [WeightConverter([name + end for end in _SUFFIXES], name, [_Unpack(self)]) for name in sorted(names)]

    def place(self, model: Any, name: str, packed: Packed, storage: torch.dtype) -> dict[str, Tensor]:
        """Puts a packed weight where parameter ``name`` of ``model`` was; returns what transformers is to set there.

        Raises:
            CheckpointError: it is not of the shape that the model has there.
        """
        path, own = split_name(name)
        module = model.get_submodule(path)
        linear = quantizable(module)
        shape = store_of(module).shape if linear else module._parameters[own].shape  # type: ignore[union-attr]
        if packed.shape != shape:
            raise CheckpointError(f"{name} is {tuple(packed.shape)} in the file and {tuple(shape)} in the model")
        if linear:
            compute = self.quantization_config.bnb_4bit_compute_dtype
            bias = module._parameters["bias"]
            new = NF4Linear.from_packed(packed, bias, compute_dtype=compute, quant_storage=storage)
            set_submodule(model, path, new.train(module.training))
            return {name: new.weight}
        keep_packed_(module, own, packed, storage)
        module._is_hf_initialized = True  # else transformers would draw these weights anew, into a copy
        return {name: module._parameters[own]}  # type: ignore[dict-item]

    # --- after that -----------------------------------------------------------------------------------------

    def failed(self, name: str, why: object) -> dict[str, Tensor]:
        """Remembers a fault; returns something to stand in the weight's place until it is told."""
        self.faults.append(f"{name}: {why}")
        return {name: nn.Parameter(torch.empty(0, dtype=torch.uint8), requires_grad=False)}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """
        Raises:
            ModelError: weights that could not be read or quantized.
        """
        if self.faults:
            shown = "; ".join(self.faults[:5]) + (f"; and {len(self.faults) - 5} more" if self.faults[5:] else "")
            raise ModelError(f"the model cannot be loaded in 4 bits: {shown}")
        _save_packed_as_they_are(model)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """With adapters."""
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        return dequantize_(model, dtype)


class _Operation(ConversionOps):
    def __init__(self, hf_quantizer: NF4Quantizer) -> None:
        self.hf_quantizer = hf_quantizer  # by this name transformers knows that bytes are not to be cast

    def __deepcopy__(self, memo: Any) -> _Operation:
        return self  # it is copied for each weight, and there is one quantizer


class _Quantize(_Operation):
    """A weight as it comes from the file -> its bytes, in place."""

    def convert(self, input_dict: dict[str, Any], *args: Any, model: Any = None, **kwargs: Any) -> dict[str, Any]:
        config = self.hf_quantizer.quantization_config
        placed: dict[str, Any] = {}
        for name in list(input_dict):
            weight = input_dict.pop(name)
            weight = weight[0] if isinstance(weight, list) else weight
            if is_a(model.get_submodule(split_name(name)[0]), CONV1D):
                weight = weight.t()
            if fault := weight_fault(weight, config):
                placed |= self.hf_quantizer.failed(name, fault)
                continue
            packed = pack(weight, config)
            placed |= self.hf_quantizer.place(model, name, packed, config.bnb_4bit_quant_storage)
        return placed


class _Unpack(_Operation):
    """The tensors of one weight, by pattern -> its bytes, in place; a weight that was left in full is passed on."""

    def convert(
        self, input_dict: dict[str, Any], *args: Any, model: Any = None, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Any]:
        tensors = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        name = min(tensors, key=len)
        if len(tensors) == 1:
            expected = model.get_parameter_or_buffer(full_layer_name).dtype
            # transformers gives what this operation reads in the dtype of the file
            target = full_layer_name in self.hf_quantizer.targets
            return {full_layer_name: tensors[name].to(self.hf_quantizer.dtype if target else expected)}
        try:
            packed = from_bnb({"weight" + key.removeprefix(name): tensor for key, tensor in tensors.items()})
            return self.hf_quantizer.place(model, full_layer_name, packed, tensors[name].dtype)
        except CheckpointError as error:
            return self.hf_quantizer.failed(full_layer_name, error)


def introduce() -> None:
    """Lets transformers' ``from_pretrained`` take an :class:`NF4Config`."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(NF4Config)
        register_quantizer(METHOD)(NF4Quantizer)


def mark_quantized(model: nn.Module, config: NF4Config, skip: Iterable[str] = ()) -> None:
    """Tells transformers that a model of its is quantized, as if it had loaded it so: what it saves says how to read
    it, and the Trainer wants adapters on it.

    Args:
        model: with layers in four bits; the ``PreTrainedModel`` in it is meant, if there is one.
        skip: names of layers that were left in full, beside those that always are.
    """
    inner: Any = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None:
        return
    always = skipped_names(inner, config)
    if more := [name for name in skip if should_convert_module(name, always)]:
        config = dataclasses.replace(config, llm_int8_skip_modules=[*always, *more])
    quantizer = NF4Quantizer(config, pre_quantized=False)
    inner.is_quantized = True
    inner.quantization_method = config.quant_method
    inner.hf_quantizer = quantizer
    quantizer.postprocess_model(inner)


def _save_packed_as_they_are(model: Any) -> None:
    """``save_pretrained`` undoes the conversions of loading: it must not cut packed experts into single ones."""
    packed = [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, PackedExperts)
        for name in module.packed_as
    ]
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        if not packed:
            return
        from transformers.conversion_mapping import get_model_conversion_mapping

        conversions = get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions = [c for c in conversions if not _cuts(c, packed)]


def _cuts(conversion: Any, packed: list[str]) -> bool:
    if not isinstance(conversion, WeightConverter):
        return False
    if any(isinstance(operation, _Unpack) for operation in conversion.operations):
        return True
    reverse = conversion.reverse_transform()
    return any(reverse.rename_source_key(name)[1] is not None for name in packed)


def _fused(model: nn.Module, target: str) -> bool:
    return not quantizable(model.get_submodule(split_name(target)[0]))
