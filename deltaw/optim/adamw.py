"""AdamW with states in 8 bits, paged states, or both.

``AdamW8bit``, ``PagedAdamW32bit`` and ``PagedAdamW8bit`` are one optimizer whose states differ in bits and in where
they live. Knows nothing of models and trainers.
"""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from deltaw.errors import CheckpointError, ConfigError
from deltaw.optim.buckets import Bucket, Piece, Scratch, flat, grad_of, kinds, pack
from deltaw.optim.memory import MappedMemory, Memory, PinnedMemory, PlainMemory
from deltaw.optim.update import Rates, adamw_, adamw_8bit_

__all__ = ["AdamW8bit", "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit"]

_SHOWN = 8  # faults that an error lists
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class _AdamW(torch.optim.Optimizer):
    """The optimizer behind the public names; ``bits`` and ``paged`` are what sets them apart."""

    bits = 32
    paged = False

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        min_8bit_size: int = 4096,
        keep_float32: Iterable[Tensor] = (),
        paged_from: int = 100_000,
        page_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        faults = [
            f"{name} = {value}: {why}"
            for name, value, fine, why in (
                ("lr", lr, lr >= 0, "it is never negative"),
                ("betas", betas, all(0 <= beta < 1 for beta in betas), "each is at least 0 and below 1"),
                ("eps", eps, eps >= 0, "it is never negative"),
                ("weight_decay", weight_decay, weight_decay >= 0, "it is never negative"),
            )
            if not fine
        ]
        if faults:
            raise ConfigError(f"{type(self).__name__}: " + "; ".join(faults))
        self.min_8bit_size, self.paged_from = min_8bit_size, paged_from
        self._keep_float32 = {id(param) for param in keep_float32}
        self._page_dir = page_dir
        self._memories: dict[tuple[torch.device, bool], Memory] = {}
        self._buckets: dict[int, list[Bucket]] = defaultdict(list)  # by parameter group
        self._scratch: dict[torch.device, Scratch] = defaultdict(Scratch)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        if self.paged:  # a folder that cannot be used is said now, not after the first forward
            for device in {param.device for group in self.param_groups for param in group["params"]}:
                self._memory(device, paged=True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer.add_param_group``.

        Raises:
            ConfigError: parameters that are not float32, bfloat16 or float16, or are sharded.
        """
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            name = f"{type(self).__name__}: a parameter {tuple(param.shape)}"
            if hasattr(param, "to_local"):
                raise ConfigError(f"{name} is sharded (DTensor); use torch.optim.AdamW(fused=True) with FSDP2")
            if param.dtype not in _FLOATS:
                raise ConfigError(f"{name} is {param.dtype}; states are float32 at most: use torch.optim.AdamW")

    # --- one step -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pieces: list[Piece] = []
        for index, group in enumerate(self.param_groups):
            live = [param for param in group["params"] if param.grad is not None]
            if any(grad_of(param).is_sparse for param in live):
                raise ConfigError(f"{type(self).__name__}: a gradient is sparse; its embedding must have sparse=False")
            self._begin(index, [param for param in live if param not in self.state])
            steps = {}
            for param in live:
                state = self.state[param]
                steps[param] = state["step"] = state["step"] + 1
            for bucket in self._buckets[index]:
                pieces.extend(bucket.pieces(steps, group))
        for memory in self._memories.values():
            for piece, states in memory.visit([piece for piece in pieces if piece.bucket.memory is memory]):
                self._update(piece, states)
        return loss

    def _begin(self, index: int, params: list[Tensor]) -> None:
        """Gives ``params`` of the group ``index`` states of zeros."""
        if not params:
            return
        small: dict[tuple[torch.device, int], list[Tensor]] = defaultdict(list)
        buckets: list[Bucket] = []
        for param in params:
            bits, device = self._bits(param), param.device
            if self.paged and param.numel() >= self.paged_from:
                buckets.append(Bucket([param], bits, self._memory(device, paged=True)))
            else:
                small[device, bits].append(param)
        for (device, bits), several in small.items():
            buckets += [Bucket(some, bits, self._memory(device, paged=False)) for some in pack(several)]
        for memory in self._memories.values():
            here = [bucket for bucket in buckets if bucket.memory is memory]
            tensors = iter(memory.zeros([spec for bucket in here for spec in bucket.specs()]) if here else [])
            for bucket in here:
                bucket.fill(list(itertools.islice(tensors, len(bucket.specs()))))
        for bucket in buckets:
            for i, param in enumerate(bucket.params):
                self.state[param] = {"step": 0, **bucket.states_of(i)}
        self._buckets[index] += buckets

    def _bits(self, param: Tensor) -> int:
        in_8 = self.bits == 8 and param.numel() >= self.min_8bit_size and id(param) not in self._keep_float32
        return 8 if in_8 else 32

    def _memory(self, device: torch.device, *, paged: bool) -> Memory:
        if (device, paged) not in self._memories:
            made: Memory = PlainMemory(device)
            if paged:
                made = MappedMemory(self._page_dir) if device.type == "cpu" else PinnedMemory(device)
            self._memories[device, paged] = made
        return self._memories[device, paged]

    def _update(self, piece: Piece, states: tuple[Tensor, ...]) -> None:
        group = piece.settings
        beta1, beta2 = group["betas"]
        rates = Rates(float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"], piece.step)
        in_8 = piece.bucket.bits == 8
        params, first = piece.params, piece.params[0]
        if len(params) == 1 and flat(first):
            own = first.view(-1)[piece.begin : piece.end]
            values, grads = own.float(), grad_of(first).view(-1)[piece.begin : piece.end].float()  # no copy in float32
            if in_8:
                adamw_8bit_(values, grads, *states, rates=rates)
            else:
                adamw_([values], [grads], [states[0]], [states[1]], rates)
            if values is not own:
                own.copy_(values)
        elif not in_8 and all(flat(param) and param.dtype == grad_of(param).dtype == torch.float32 for param in params):
            adamw_(params, [grad_of(param) for param in params], *self._moments(params), rates)
        else:
            values, grads, values_of, grads_of = self._scratch[first.device].gather(piece)
            if in_8:
                adamw_8bit_(values, grads, *states, rates=rates)
            elif len(params) == 1:
                adamw_([values], [grads], [states[0]], [states[1]], rates)
            else:
                adamw_(values_of, grads_of, *self._moments(params), rates)
            torch._foreach_copy_(params, values_of)
        # whoever remembers what a parameter was worth must see that it changed; torch's fused kernels do not say so
        torch.autograd.graph.increment_version(params)

    def _moments(self, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return [self.state[param]["exp_avg"] for param in params], [self.state[param]["exp_avg_sq"] for param in params]

    def paged_bytes(self) -> int:
        """Bytes of the states that can leave memory."""
        buckets = [bucket for buckets in self._buckets.values() for bucket in buckets]
        paged = [bucket for bucket in buckets if not isinstance(bucket.memory, PlainMemory)]
        return sum(tensor.nbytes for bucket in paged for tensor in bucket.states.values())

    # --- files --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim.Optimizer.state_dict``: tensors under torch's names, also of paged states, so that
        ``torch.save`` writes them as they are. Those in 32 bits can be read by ``torch.optim.AdamW``."""
        for memory in self._memories.values():
            memory.settle()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """Takes states back bit for bit.

        Raises:
            CheckpointError: states of another optimizer or of other parameters; all faults at once.
            ValueError: other parameter groups.
        """
        saved = state_dict["state"]
        self._refuse_others(saved, state_dict["param_groups"])
        super().load_state_dict({**state_dict, "state": {}})  # torch would cast the codes to the parameter's dtype
        self.state.clear()
        self._buckets.clear()
        first = 0  # torch numbers parameters over all groups
        for index, group in enumerate(self.param_groups):
            known = [(param, saved[n]) for n, param in enumerate(group["params"], first) if n in saved]
            first += len(group["params"])
            self._begin(index, [param for param, _ in known])
            for param, state in known:
                for name, value in self.state[param].items():
                    if name == "step":
                        self.state[param][name] = int(state[name])
                    else:
                        value.copy_(state[name])

    def _refuse_others(self, saved: dict[int, dict[str, Any]], groups: list[dict[str, Any]]) -> None:
        params = [param for group in self.param_groups for param in group["params"]]
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in self.param_groups]:
            return  # torch says so in its own words
        faults = []
        for n, state in saved.items():
            wanted: dict[str, Any] = {"step": None} | kinds(self._bits(params[n]), params[n])
            for name in sorted(wanted.keys() - state.keys()):
                faults.append(f"parameter {n}: {name} is missing; there are {sorted(state)}")
            for name, value in state.items():
                if name not in wanted:
                    faults.append(f"parameter {n}: {name} is unknown")
                elif name != "step" and (value.dtype, value.shape) != wanted[name]:
                    dtype, shape = wanted[name]
                    faults.append(
                        f"parameter {n}: {name} is {value.dtype} {tuple(value.shape)}, not {dtype} {tuple(shape)}"
                    )
        if faults:
            more = [f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
            raise CheckpointError(
                f"these states are not of {type(self).__name__} over these parameters; resume with the optimizer that "
                "wrote them:\n  " + "\n  ".join(faults[:_SHOWN] + more)
            )


class AdamW8bit(_AdamW):
    """AdamW with both moments in 8 bits, block by block (Dettmers et al. 2022, arXiv 2110.02861): about 2.03 bytes an
    element instead of 8, and decoupled weight decay in torch's order.

    Args:
        params: parameters or groups, float32, bfloat16 or float16; their update is computed in float32.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``.
        min_8bit_size: parameters with fewer elements keep float32 moments: they cost little and gain nothing.
        keep_float32: parameters that keep float32 moments at any size; the paper does so for embeddings.

    Raises:
        ConfigError: a setting or a parameter that cannot work.
    """

    bits = 8


class PagedAdamW32bit(_AdamW):
    """AdamW whose moments leave memory when it is short (QLoRA, arXiv 2305.14314, section 3): on a CPU they are in a
    mapped file that the operating system pages, on a GPU in pinned host memory, copied over one parameter ahead. The
    weights are those of ``torch.optim.AdamW(fused=True)``.

    Args:
        params: parameters or groups, float32, bfloat16 or float16; their update is computed in float32.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``.
        paged_from: parameters with fewer elements keep their moments in memory.
        page_dir: on a CPU, the folder of the file; None: the first one for temporary files that is on a disk.

    Raises:
        ConfigError: a setting or a parameter that cannot work, or no room in ``page_dir``.
    """

    paged = True


class PagedAdamW8bit(_AdamW):
    """:class:`AdamW8bit` with its moments paged as :class:`PagedAdamW32bit` does; it takes the arguments of both."""

    bits = 8
    paged = True


PagedAdamW = PagedAdamW32bit
