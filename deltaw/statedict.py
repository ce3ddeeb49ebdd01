"""An adapter as a dictionary of tensors, under PEFT's function names and PEFT's keys.

Files are ``checkpoint``'s; these functions are for loops that gather, ship or store tensors themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.module import _IncompatibleKeys

from deltaw import checkpoint
from deltaw.adapters import PeftConfig, adapters_named
from deltaw.errors import AdapterError, CheckpointError, did_you_mean

__all__ = ["get_peft_model_state_dict", "refill", "set_peft_model_state_dict"]

#: fields of a config that do not change what its tensors compute
_FREE = frozenset(
    "auto_mapping base_model_name_or_path inference_mode peft_version revision task_type "  # where it comes from
    "target_modules exclude_modules modules_to_save layers_to_transform layers_pattern r rank_pattern "  # tensors show
    "init_lora_weights loftq_config init_weights "  # how training began
    "lora_dropout rank_dropout module_dropout runtime_config".split()
)


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: dict[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """PEFT's key (without the adapter's name) -> tensor, for all that belongs to one adapter.

    Args:
        model: a :class:`~deltaw.PeftModel`.
        state_dict: take the values from here, by the names of ``model.state_dict()``: one that was gathered from
            several processes, for instance.
        unwrap_compiled: accepted for PEFT's sake; a compiled model is always unwrapped.
        save_embedding_layers: the base's input embedding and output head too; ``"auto"``: those that carry the
            adapter, and both when the vocabulary is not the base's any more.

    Raises:
        AdapterError: no such adapter, or a model that holds none.
        CheckpointError: ``state_dict`` lacks one of the tensors.
    """
    whole, config = _with_adapter(model, adapter_name)
    base = whole.get_base_model()

    def tensors(as_saved: bool) -> dict[str, Tensor]:
        return checkpoint.adapter_tensors(
            base, adapter_name, config, embeddings=save_embedding_layers, as_saved=as_saved
        )

    if state_dict is None:
        return {key: tensor.detach() for key, tensor in tensors(as_saved=True).items()}
    named = (*whole.named_parameters(remove_duplicate=False), *whole.named_buffers(remove_duplicate=False))
    names = {id(tensor): name for name, tensor in named}
    own = [names[id(place)] for place in tensors(as_saved=False).values()]
    lacking = [name for name in own if name not in state_dict]
    if lacking:
        raise CheckpointError(
            f"state_dict lacks {len(lacking)} tensors of adapter {adapter_name!r}: {', '.join(lacking[:5])}"
            f"{did_you_mean(lacking[0], state_dict)}"
        )
    # what a file holds is computed from what trains (tied, pruned, with a start taken off): so let these values stand
    # in the model while it is computed, as torch.func does for a forward
    calling = _Calling(whole, lambda: tensors(as_saved=True))
    held = {f"model.{name}": state_dict[name] for name in own}
    return {key: tensor.detach() for key, tensor in functional_call(calling, held, ()).items()}


class _Calling(nn.Module):
    """A function of what is in ``model``, for those who replace a module's tensors while its forward runs."""

    def __init__(self, model: nn.Module, function: Callable[[], dict[str, Tensor]]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self) -> dict[str, Tensor]:
        return self.function()


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: dict[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Fills one adapter from what :func:`get_peft_model_state_dict` gave. Strict, as loading from a file is.

    Args:
        ignore_mismatched_sizes: refused: a tensor that does not fit would be left out in silence.
        low_cpu_mem_usage: accepted for PEFT's sake; a parameter on the meta device always takes the tensor itself.

    Returns:
        ``missing_keys`` and ``unexpected_keys``, both empty.

    Raises:
        AdapterError: no such adapter, or a model that holds none.
        CheckpointError: lists every missing, extra, misshapen and non-finite tensor; nothing was changed.
    """
    if ignore_mismatched_sizes:
        raise CheckpointError(
            "ignore_mismatched_sizes=True would leave tensors that do not fit at their random start; leave it out"
        )
    whole, config = _with_adapter(model, adapter_name)
    checkpoint.load_tensors(whole.get_base_model(), adapter_name, config, peft_model_state_dict, "the state dict")
    return _IncompatibleKeys([], [])


def _with_adapter(model: Any, name: str) -> tuple[Any, PeftConfig]:
    """The model under ``torch.compile``, and the config of its adapter ``name``."""
    model = getattr(model, "_orig_mod", model)
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict) or not hasattr(model, "get_base_model"):
        raise AdapterError(f"{type(model).__name__} is no PeftModel of deltaw: make one with get_peft_model()")
    if name not in configs:
        raise AdapterError(f"no adapter {name!r}; there are {list(configs)}{did_you_mean(name, configs)}")
    return model, configs[name]


def refill(
    model: nn.Module, name: str, config: PeftConfig, other: PeftConfig, tensors: dict[str, Tensor], where: str
) -> None:
    """Copies the tensors of a file into adapter ``name``, which is there already.

    Args:
        model: the base that carries the adapter.
        other: the config that came with ``tensors``; it must compute the same from them as ``config`` does.

    Raises:
        AdapterError: it would not.
        CheckpointError: lists every missing, extra, misshapen and non-finite tensor; nothing was changed.
    """
    adapters = adapters_named(model, name)
    if any(name in adapter.host.merged_adapters for adapter in adapters.values()):
        raise AdapterError(
            f"adapter {name!r} is merged into the base; unmerge_adapter([{name!r}]) before it is replaced"
        )
    written = config
    for method in {type(adapter) for adapter in adapters.values()}:
        written = method.file_config(written, adapters)
    ours, theirs = written.to_dict(), other.to_dict()
    over_own_base = any(name in adapter.host.bases for adapter in adapters.values())
    free = _FREE - {"init_lora_weights", "loftq_config"} if over_own_base else _FREE
    faults = [
        f"{key}: {theirs.get(key)!r} in the file, {ours.get(key)!r} here"
        for key in sorted({*ours, *theirs} - free)
        if ours.get(key) != theirs.get(key) and (ours.get(key) or theirs.get(key))
    ]
    if faults:
        shown = "\n".join(f"  - {fault}" for fault in faults)
        raise AdapterError(
            f"adapter {name!r} exists, and the one at {where} computes otherwise; load it under another name, or "
            f"delete_adapter({name!r}) first:\n{shown}"
        )
    checkpoint.load_tensors(model, name, config, tensors, where)
