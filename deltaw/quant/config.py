"""How weights are to be quantized: ``NF4Config``, with the field names of transformers' ``BitsAndBytesConfig``.

Knows nothing of how it is done.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from deltaw.errors import ConfigError, did_you_mean
from deltaw.quant.packed import BLOCKSIZES, QUANT_TYPES, READ_AS

__all__ = ["STORAGES", "NF4Config"]

#: dtypes under which the packed bytes can be viewed
STORAGES = (torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.float64)

#: in a file: the method; the private names that BitsAndBytesConfig writes as well; and what its 8-bit layers would do
_NOT_OF_FILES = (
    "quant_method",
    "_load_in_4bit",
    "_load_in_8bit",
    "llm_int8_has_fp16_weight",
    "llm_int8_enable_fp32_cpu_offload",
)


@dataclass(kw_only=True, repr=False)
class NF4Config(QuantizationConfigMixin):
    """Weights in four bits. A script for ``BitsAndBytesConfig`` changes the import and the name, nothing else.

    Args:
        load_in_4bit: True; there is nothing else to load in.
        bnb_4bit_quant_type: ``"nf4"`` (QLoRA, arXiv 2305.14314, section 3) or ``"fp4"``.
        bnb_4bit_use_double_quant: quantize the absmax values too: 4.127 bits a weight instead of 4.5.
        bnb_4bit_compute_dtype: inputs of a layer are cast to it, its outputs back; None: computed in the dtype of
            the input. A dtype or its name.
        bnb_4bit_quant_storage: the dtype under which the bytes are kept (the bits are the same); FSDP1 wants that
            of the model. A dtype or its name.
        bnb_4bit_blocksize: weights that share one absmax.
        llm_int8_skip_modules: names of modules that stay as they are, matched as transformers does (from the start,
            as a suffix, or as a regular expression). Given, it takes the place of the default, the output head.
        load_in_8bit, llm_int8_threshold, llm_int8_has_fp16_weight, llm_int8_enable_fp32_cpu_offload: of 8 bits and of
            offloading; accepted for the sake of scripts that give them, as long as they ask for nothing.

    Raises:
        ConfigError: all values that cannot work, at once.
    """

    load_in_8bit: bool = False
    load_in_4bit: bool = True
    llm_int8_threshold: float = 6.0
    llm_int8_skip_modules: list[str] | None = None
    llm_int8_enable_fp32_cpu_offload: bool = False
    llm_int8_has_fp16_weight: bool = False
    bnb_4bit_compute_dtype: torch.dtype | None = None
    bnb_4bit_quant_type: str = "nf4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_quant_storage: torch.dtype = torch.uint8
    bnb_4bit_blocksize: int = 64
    quant_method: str = field(default="deltaw_nf4", init=False)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        faults: list[str] = []
        if self.bnb_4bit_quant_storage is None:  # as BitsAndBytesConfig has it
            self.bnb_4bit_quant_storage = torch.uint8
        for name, known in {"bnb_4bit_compute_dtype": READ_AS, "bnb_4bit_quant_storage": STORAGES}.items():
            value = getattr(self, name)
            if isinstance(value, str):
                value = {_name(dtype): dtype for dtype in known}.get(value.removeprefix("torch."), value)
                setattr(self, name, value)
            if value not in known and not (value is None and name == "bnb_4bit_compute_dtype"):
                faults.append(f"{name}={value!r}: it is one of {', '.join(map(_name, known))}")
        if self.load_in_8bit:
            faults.append(
                "load_in_8bit=True: there are no 8-bit weights here; leave it out for 4 bits, or use bitsandbytes"
            )
        elif self.load_in_4bit is not True:
            faults.append(
                f"load_in_4bit={self.load_in_4bit!r}: without it nothing is quantized; pass no config instead"
            )
        if self.bnb_4bit_quant_type not in QUANT_TYPES:
            near = did_you_mean(str(self.bnb_4bit_quant_type), QUANT_TYPES)
            faults.append(
                f"bnb_4bit_quant_type={self.bnb_4bit_quant_type!r}: it is one of {', '.join(QUANT_TYPES)}{near}"
            )
        if not isinstance(self.bnb_4bit_use_double_quant, bool):
            faults.append(f"bnb_4bit_use_double_quant={self.bnb_4bit_use_double_quant!r}: it is True or False")
        if isinstance(self.bnb_4bit_blocksize, bool) or self.bnb_4bit_blocksize not in BLOCKSIZES:
            faults.append(
                f"bnb_4bit_blocksize={self.bnb_4bit_blocksize!r}: it is one of {', '.join(map(str, BLOCKSIZES))}"
            )
        names = self.llm_int8_skip_modules
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            faults.append(f"llm_int8_skip_modules={names!r}: it is a list of module names")
        for name in ("llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight"):
            if getattr(self, name):
                faults.append(f"{name}=True: it has no meaning for weights in 4 bits here; leave it out")
        if faults:
            raise ConfigError("this NF4Config cannot work: " + "; ".join(faults))
        from deltaw.quant.hfquantizer import introduce  # when there is a config to be used, not before

        introduce()

    def is_quantizable(self) -> bool:
        return True

    def quantization_method(self) -> str:
        """``"nf4"`` or ``"fp4"``."""
        return self.bnb_4bit_quant_type

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From what ``config.json`` holds under ``quantization_config``, ours or bitsandbytes'.

        Raises:
            ConfigError: a key of neither, or a value that cannot work.
        """
        known = {f.name for f in dataclasses.fields(cls) if f.init}
        given = {key: value for key, value in config_dict.items() if key not in _NOT_OF_FILES}
        unknown = [f"{name!r}{did_you_mean(name, known)}" for name in given if name not in known]
        if unknown:
            raise ConfigError(f"a quantization config has keys that are not known: {', '.join(unknown)}")
        config = cls(**given | {k: kwargs.pop(k) for k in list(kwargs) if k in known})
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Safe for JSON: dtypes by name; the method by the name of its files, which bitsandbytes reads too."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | {"quant_method": "bitsandbytes"}
        return {key: _name(value) if isinstance(value, torch.dtype) else value for key, value in values.items()}

    def to_diff_dict(self) -> dict[str, Any]:
        """What differs from the defaults, and which method it is."""
        default = type(self)().to_dict()
        return {k: v for k, v in self.to_dict().items() if k in ("quant_method", "load_in_4bit") or v != default[k]}

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
