"""Memory that runs out: what takes most of it, and the cures, cheapest first. Nothing is ever changed in silence.

A part of the trainer. On a GPU the error is CUDA's; on a CPU the system would end the process without a word, so a run
may be given a ``memory_limit``. Linux holds a process to it: the limit is put on its private writable memory
(RLIMIT_DATA, which weights mapped from a file are no part of), so that the very allocation fails that would go beyond.
Knows nothing of data and losses.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.utils import convert_file_size_to_int
from torch import Tensor, nn
from transformers import Trainer

from deltaw.errors import ConfigError, OutOfMemory
from deltaw.footprint import anonymous, private
from deltaw.modules import is_checkpointing
from deltaw.optim import state_bytes
from deltaw.optimizers import OPTIMIZERS
from deltaw.train import checkpoints

try:
    import resource
except ImportError:  # Windows
    resource = None

__all__ = ["MemoryGuard", "Term", "limit_bytes", "limited", "ran_out"]

#: how allocators say it where there is no class for it: PyTorch's own on a CPU, C++'s, oneDNN's
_SAID = re.compile(
    r"can(no|')t allocate memory|not enough memory|bad_alloc|could not create a memory object|out of memory",
    re.IGNORECASE,
)
_WORTH = 0.01  # of all that is named: a cure that saves less is not told
_4BIT_BYTES = 0.52  # a weight, its scales included
_UNITS = ("KB", "KIB", "MB", "MIB", "GB", "GIB")

log = logging.getLogger("deltaw")


class Term(NamedTuple):
    """One part of the memory of a run."""

    name: str
    bytes: int
    measured: bool = False  # else counted

    def __str__(self) -> str:
        return f"{self.name:24} {_size(self.bytes):>10}, {'measured' if self.measured else 'counted'}"


class MemoryGuard(Trainer):
    """Holds a run to its ``memory_limit``, and turns memory that runs out into an error that says what to do."""

    _begun_with = 0  # bytes in use when training began
    _shape: tuple[int, int] | None = None  # (b, t) of the batch that runs
    _evaluates = False

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``.

        Raises:
            OutOfMemory: of the device, or of ``memory_limit``: with the largest terms and the cures.
        """
        limit = limit_bytes(getattr(self.args, "memory_limit", None))
        device = torch.device(self.args.device)
        self._shape, self._begun_with, self._evaluates = None, _in_use(device), False
        try:
            with limited(limit, device):
                return super().train(*args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error) or self.args.auto_find_batch_size:  # which asks for smaller batches
                raise
            self.is_in_train = False
            raise OutOfMemory(self._told(error, limit)) from error

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        self._shape = _shape(inputs)
        return super().training_step(model, inputs, *args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self._shape = _shape(inputs)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self._evaluates = True
        try:
            metrics = super().evaluate(*args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            if self.is_in_train or not ran_out(error):
                raise  # train() tells it
            raise OutOfMemory(self._told(error, None)) from error
        self._evaluates = False
        return metrics

    # --- what is said

    def _told(self, error: BaseException, limit: int | None) -> str:
        device = torch.device(self.args.device)
        where = f"the memory_limit of {_size(limit)}" if limit is not None else f"the memory of {_named(device)}"
        batch = "" if self._shape is None else f", on a batch of {self._shape[0]} x {self._shape[1]:,} tokens"
        act = "evaluating" if self._evaluates else "training"
        terms = sorted(self._terms(device), key=lambda term: -term.bytes)
        lines = [f"{where} ran out while {act} at step {self.state.global_step + 1}{batch}. What takes it:"]
        lines += [f"  {term}" for term in terms]
        lines += ["Nothing was changed. Cures, the cheapest first:"]
        lines += [f"  - {cure}" for cure in self._cures({term.name: term.bytes for term in terms})]
        newest = checkpoints.newest(str(self.args.output_dir))
        if newest is not None:
            lines.append(f"The run can go on from {newest} (resume_from_checkpoint)")
        said = str(error).strip() or type(error).__name__
        return "\n".join([*lines, f"PyTorch said: {said.splitlines()[0]}"])

    def _terms(self, device: torch.device) -> Iterator[Term]:
        """The parts that are not nothing: weights, states and logits counted, what a step keeps measured."""
        whole: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        params = list(whole.parameters())
        trained = [p for p in params if p.requires_grad]
        frozen = _bytes([*(p for p in params if not p.requires_grad), *whole.buffers()])
        gradients = _bytes([p.grad for p in trained if p.grad is not None])
        optimizer: Any = self.optimizer
        states = state_bytes(optimizer).total if getattr(optimizer, "state", None) else 0
        known = [
            Term("base weights", frozen),
            Term("trained weights", _bytes(trained)),
            Term("gradients", gradients or _bytes(trained)),
            Term("optimizer states", states or self._states_to_come(trained)),
            Term("logits", self._logits(whole)),
        ]
        # what came since the run began and is none of these; the frames of the error still hold it
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _in_use(device)
        rest = peak - self._begun_with - gradients - states
        known.append(Term("activations of the step", max(0, rest), measured=True))
        if device.type != "cuda":  # the base's weights among it, unless they are mapped from their file
            known.append(Term("in use before training", self._begun_with, measured=True))
        yield from (term for term in known if term.bytes)

    def _states_to_come(self, trained: list[nn.Parameter]) -> int:
        optim = str(getattr(self.args.optim, "value", self.args.optim))
        return round(OPTIMIZERS[optim].bytes_kept * sum(p.numel() for p in trained)) if optim in OPTIMIZERS else 0

    def _logits(self, model: Any) -> int:
        """Those of a model's own forward, in float32, with their gradient; the fast loss makes them in small pieces."""
        vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
        if getattr(self, "fast", False) or vocabulary is None or self._shape is None:
            return 0
        return (1 if self._evaluates else 2) * 4 * self._shape[0] * self._shape[1] * vocabulary

    def _cures(self, sizes: Mapping[str, int]) -> Iterator[str]:
        args: Any = self.args
        whole: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if self._evaluates:
            size = args.per_device_eval_batch_size
            if size > 1:
                yield f"per_device_eval_batch_size: {size // 2}: the same figures"
        else:
            if not is_checkpointing(whole):
                yield "gradient_checkpointing: true: activations are computed again in backward; a third more time"
            size, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
            if size > 1:
                yield (
                    f"per_device_train_batch_size: {size // 2} with gradient_accumulation_steps: {steps * 2}: "
                    "the same training"
                )
            if not (getattr(args, "packing", False) or getattr(args, "padding_free", False)):
                yield "padding_free: true: no memory for padding, the same training"
        if getattr(self, "fast", None) is False:
            yield "fast_loss: true, if this model allows it: logits in small pieces"
        dense = [p for p in whole.parameters() if p.is_floating_point() and not p.requires_grad and p.dim() == 2]
        worth = _WORTH * max(sum(sizes.values()), 1)
        saved = round(sum(p.nbytes - _4BIT_BYTES * p.numel() for p in dense))
        if saved > worth:
            yield f"load_in_4bit: true: base weights smaller by up to {_size(saved)}"
        optim, states = str(getattr(args.optim, "value", args.optim)), sizes.get("optimizer states", 0)
        if 0.75 * states > worth and "8bit" not in optim and "4bit" not in optim:
            yield f"optim: adamw_8bit: optimizer states a quarter of {_size(states)}"
        longest = getattr(args, "max_length", None)
        if longest:
            yield f"max_length: {longest // 2}, if the data allows it"


# --- the limit ------------------------------------------------------------------------------------------------------


def limit_bytes(text: str | int | None) -> int | None:
    """``"24GiB"`` in bytes: a number and KB, MB, GB (of 1,000) or KiB, MiB, GiB (of 1,024).

    Raises:
        ConfigError: it is no size.
    """
    if text is None or isinstance(text, int):
        return text
    said = text.strip().replace(" ", "")
    try:
        if not said.upper().endswith(_UNITS):
            raise ValueError(said)
        found = convert_file_size_to_int(said.upper().replace("IB", "iB"))
        if found < 1:
            raise ValueError(said)
    except ValueError:
        raise ConfigError(f"memory_limit = {text!r} is no size: write it like 24GiB or 512MB") from None
    return found


@contextmanager
def limited(limit: int | None, device: torch.device) -> Iterator[None]:
    """Inside the block an allocation fails that would take the run's memory beyond ``limit`` bytes; None: no limit.

    Of a CUDA device it is what PyTorch has reserved there. Of the process it is anonymous memory, held by Linux; where
    the system cannot hold a process to a limit, the log says so.

    Raises:
        ConfigError: more than ``limit`` is in use already.
    """
    if limit is None:
        yield
        return
    used = _in_use(device)
    if used >= limit:
        raise ConfigError(
            f"memory_limit = {_size(limit)}: the loaded model and what came before it take {_size(used)} already: "
            "raise it, or load a smaller base (load_in_4bit: true)"
        )
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        return
    mapped = private()
    if resource is None or mapped is None:
        log.warning("memory_limit: this system cannot hold a process to it; the run goes on without a limit")
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    # counted by what is mapped, used or not: what was mapped and not used before is not held against the run
    wanted = limit + mapped - used
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def ran_out(error: BaseException) -> bool:
    """Whether an error means that memory ran out."""
    if isinstance(error, OutOfMemory):
        return False  # told already
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or bool(_SAID.search(str(error)))


def _in_use(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else anonymous() or 0


def _named(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "this machine"


def _shape(inputs: Mapping[str, Any]) -> tuple[int, int] | None:
    ids = inputs.get("input_ids")
    return tuple(ids.shape) if isinstance(ids, Tensor) and ids.dim() == 2 else None  # type: ignore[return-value]


def _bytes(tensors: list[Any]) -> int:
    """Of the memory behind tensors, shared memory once."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type != "meta"
    }
    return sum(storages.values())


def _size(size: int) -> str:
    for unit, power in (("GiB", 30), ("MiB", 20)):
        if size >= 2**power:
            return f"{size / 2**power:.2f} {unit}"
    return f"{size / 2**10:.1f} KiB"
