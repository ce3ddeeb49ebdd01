"""Weights in 4 bits, side by side with bitsandbytes in one process: kernels, training steps, memory, generation.

    python benchmarks/quant.py kernels [--rounds 15]    # dequantization and quantization, elements a second
    python benchmarks/quant.py step [--rounds 7]        # a QLoRA step beside a LoRA step, ours and PEFT's
    python benchmarks/quant.py losses [--steps 20]      # QLoRA's losses beside those of LoRA on the dequantized base
    python benchmarks/quant.py memory [--rounds 3]      # weights, and the peak of a step, each in its own process
    python benchmarks/quant.py generate [--rounds 5]    # greedy decoding, 4 bits beside bfloat16
    python benchmarks/quant.py all

A step is forward and backward on SmolLM2-135M, with the same adapters, batch and labels for everyone. bitsandbytes and
PEFT are optional: without them, deltaw stands beside plain PyTorch alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore", category=FutureWarning)

import torch
from common import PeakMemory, in_turns, machine, own_process, spread, table
from torch import Tensor, nn
from train_step import ADAPTER, batch, gradient_norm, nudge, step_of

from deltaw import LoraConfig, NF4Config, causal_lm_loss, get_peft_model, load_model, quantize_
from deltaw.quant import NF4Linear, dequantize_4bit, from_bnb, quantize_4bit
from deltaw.quant.backends import backend_for
from deltaw.quant.dequantize import dequantize_

NESTED = NF4Config(bnb_4bit_use_double_quant=True)
#: (out, in): SmolLM2's largest layer, and an attention and an MLP layer of an 8-billion-parameter model
SHAPES = [(1536, 576), (4096, 4096), (14336, 4096)]


# --- kernels ------------------------------------------------------------------------------------------------


@dataclass
class Repeated:
    """A call of ``elements``, made so often that one turn is long enough to be timed."""

    call: Callable[[], Any]
    elements: int
    enough: float = 3e8

    @property
    def times(self) -> int:
        return max(1, round(self.enough / self.elements))

    def __call__(self) -> None:
        for _ in range(self.times):
            self.call()

    def rates(self, seconds: Sequence[float]) -> list[float]:
        """Billions of elements a second."""
        return [self.times * self.elements / one / 1e9 for one in seconds]


def contestants(shape: tuple[int, int]) -> dict[str, Repeated]:
    """The kernels on one weight of ``shape``."""
    import bitsandbytes.functional as bnb

    weight = torch.randn(shape, dtype=torch.bfloat16) * 0.02
    n, out, source = weight.numel(), torch.empty_like(weight), weight.clone()
    calls: dict[str, Repeated] = {"copy of the output": Repeated(lambda: out.copy_(source), n)}

    def pair(nested: bool) -> None:
        kind = ", double quantized" if nested else ""
        theirs, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
        held = {f"weight.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
        ours = from_bnb({"weight": theirs, **held})  # the same bytes
        apart = int((dequantize_4bit(ours) != bnb.dequantize_4bit(theirs, state)).sum())
        print(f"{shape}{kind}: {apart} of {n:,} dequantized elements differ from bitsandbytes'")
        calls[f"dequantize{kind}, over lent memory: deltaw"] = Repeated(lambda: dequantize_4bit(ours, out=out), n)
        calls[f"dequantize{kind}: deltaw"] = Repeated(lambda: dequantize_4bit(ours), n)
        calls[f"dequantize{kind}: bitsandbytes"] = Repeated(lambda: bnb.dequantize_4bit(theirs, state), n)

    pair(False)
    pair(True)
    settings: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": True}
    calls["quantize, double quantized: deltaw"] = Repeated(lambda: quantize_4bit(weight, nested=True), n)
    calls["quantize, double quantized: bitsandbytes"] = Repeated(lambda: bnb.quantize_4bit(weight, **settings), n, 1)
    return calls


def backend_name() -> str:
    """Which kernels run here, and with which instructions."""
    kernels: Any = backend_for(torch.device("cpu"))
    name = kernels.__name__.rpartition(".")[2]
    return f"{name}, {kernels.instruction_set()}" if hasattr(kernels, "instruction_set") else name


def kernels(args: argparse.Namespace) -> None:
    """Billions of elements a second, for each shape."""
    print(f"\nKernels, bfloat16 weights; {args.rounds} rounds; {backend_name()}")
    print(f"{machine()}\n")
    rows = []
    for shape in SHAPES:
        calls = contestants(shape)
        slow = {name: call for name, call in calls.items() if call.times == 1 and "quantize, double" in name}
        seconds = in_turns({name: call for name, call in calls.items() if name not in slow}, args.rounds)
        seconds |= in_turns(slow, min(args.rounds, 3))
        rates = {name: calls[name].rates(each) for name, each in seconds.items()}
        middle = {name: statistics.median(each) for name, each in rates.items()}
        for name, each in rates.items():
            rival = middle[name.replace("deltaw", "bitsandbytes").replace(", over lent memory", "")]
            cells = [f"{middle['copy of the output'] / middle[name]:.2f}" if name.startswith("dequantize") else ""]
            cells.append(f"{middle[name] / rival:.1f}" if name.endswith("deltaw") else "")
            rows.append([f"{shape[0]} x {shape[1]}", name, spread(each, 2), *cells])
    head = ["weight", "what", "billion elements/s (min to max)", "time / copy", "it / bitsandbytes"]
    print(table(head, rows))


# --- a training step ----------------------------------------------------------------------------------------

STEPS = ["deltaw LoRA", "deltaw QLoRA", "PEFT LoRA", "PEFT QLoRA"]


def base_of(kind: str) -> Any:
    """SmolLM2 in bfloat16, in 4 bits, or in bfloat16 with the values of the 4-bit weights."""
    if kind == "bitsandbytes":
        from transformers import BitsAndBytesConfig

        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        return load_model("smollm2-135m", dtype=torch.bfloat16, quantization_config=config)
    base = load_model("smollm2-135m", dtype=torch.bfloat16)
    if kind == "4-bit":
        quantize_(base, NESTED)
    elif kind == "dequantized":
        quantize_(base, NESTED)
        dequantize_(base)
    return base


BASES = {"deltaw QLoRA": "4-bit", "PEFT QLoRA": "bitsandbytes", "deltaw LoRA, dequantized base": "dequantized"}


def make(name: str, args: argparse.Namespace) -> tuple[Callable[[], Tensor], Any]:
    """The forward of a contestant (returns its loss) and its model."""
    data, base = batch(args), base_of(BASES.get(name, "bf16"))
    torch.manual_seed(1)
    if name.startswith("PEFT"):
        import peft

        model: Any = peft.get_peft_model(base, peft.LoraConfig(r=args.rank, **ADAPTER)).train()
        nudge(model)
        return (lambda: model(**data).loss), model
    model = get_peft_model(base, LoraConfig(r=args.rank, **ADAPTER)).train()
    nudge(model)
    return (lambda: causal_lm_loss(model, **data)), model


def step(args: argparse.Namespace) -> None:
    """Times of a step, in turns."""
    made = {name: make(name, args) for name in STEPS}
    steps = {name: step_of(*pair) for name, pair in made.items()}
    losses = {name: one() for name, one in steps.items()}
    norms = {name: gradient_norm(model) for name, (_, model) in made.items()}
    seconds = in_turns(steps, args.rounds)
    rows = []
    for name in STEPS:
        lora = "PEFT LoRA" if name.startswith("PEFT") else "deltaw LoRA"
        paired = [a / b for a, b in zip(seconds[name], seconds[lora], strict=True)]
        rows.append([name, spread(seconds[name]), spread(paired), f"{losses[name]:.4f}", f"{norms[name]:.4f}"])
    print(
        f"\nA step, bfloat16, rank {args.rank}, batch {args.batch} x {args.length}; {args.rounds} rounds\n{machine()}\n"
    )
    print(table(["step", "seconds (min to max)", "it / its LoRA, round by round", "loss", "gradient norm"], rows))


def losses(args: argparse.Namespace) -> None:
    """Losses of a run: in 4 bits, and on a dense base with the same values."""
    runs: dict[str, list[float]] = {}
    for name in ("deltaw QLoRA", "deltaw LoRA, dequantized base", "deltaw LoRA"):
        forward, model = make(name, args)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
        runs[name] = []
        for _ in range(args.steps):
            optimizer.zero_grad()
            loss = forward()
            loss.backward()
            optimizer.step()
            runs[name].append(float(loss.detach()))
    four, same, other = runs.values()
    apart = max(abs(a - b) for a, b in zip(four, same, strict=True))
    print(
        f"\nLosses of {args.steps} steps on one batch; QLoRA and LoRA on the dequantized base differ by {apart:.2e}\n"
    )
    rows = [[str(i + 1), *(f"{run[i]:.4f}" for run in (four, same, other))] for i in range(0, args.steps, 4)]
    print(table(["step", *runs], rows))


# --- memory -------------------------------------------------------------------------------------------------


def kept(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes of the tensors that autograd keeps for backward, the model's own left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    storages: dict[int, int] = {}

    def look(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
        loss = forward()  # while it lives, no address is used twice
    del loss
    return sum(storages.values())


def memory_of(args: argparse.Namespace) -> None:
    """Of one contestant, in this process: bytes of the quantized layers, and the peak of a step; printed as JSON."""
    forward, model = make(args.memory_of, args)
    layers = [m for m in model.modules() if isinstance(m, NF4Linear)]
    with torch.no_grad():
        forward()  # faults the weights in
    with PeakMemory() as memory:
        loss = step_of(forward, model)()
    found = {"peak": memory.above, "loss": loss, "bytes": sum(layer.packed.nbytes() for layer in layers)}
    found |= {"kept": kept(forward, model), "elements": sum(layer.packed.numel() for layer in layers)}
    print(json.dumps(found))


def memory(args: argparse.Namespace) -> None:
    """Bits of a weight, what a step keeps for backward, and its peak above the loaded model."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in STEPS}
    options = ["--rank", str(args.rank), "--batch", str(args.batch), "--length", str(args.length)]
    for _ in range(args.rounds):
        for name in STEPS:
            found[name].append(own_process(__file__, "memory", "--memory-of", name, *options))
    four = found["deltaw QLoRA"][0]
    peaks = {name: [one["peak"] / 2**20 for one in each] for name, each in found.items()}
    rows = []
    for name, each in peaks.items():
        other = "PEFT LoRA" if name.startswith("PEFT") else "deltaw LoRA"
        held = found[name][0]["kept"] / 2**20
        ratios = [held / (found[other][0]["kept"] / 2**20), statistics.median(each) / statistics.median(peaks[other])]
        rows.append([name, f"{held:.1f}", f"{ratios[0]:.3f}", spread(each, 0), f"{ratios[1]:.3f}"])
    print(f"\nMemory of a step, batch {args.batch} x {args.length}; {args.rounds} processes each\n{machine()}\n")
    head = ["step", "MiB kept for backward", "it / its LoRA", "peak MiB above the model (min to max)", "it / its LoRA"]
    print(table(head, rows))
    print(f"\nThe {four['elements']:,} weights in 4 bits take {8 * four['bytes'] / four['elements']:.4f} bits each.")


# --- generation ---------------------------------------------------------------------------------------------


def generate(args: argparse.Namespace) -> None:
    """Greedy decoding of one sequence and of a batch."""
    ids = batch(args)["input_ids"][:, :32]
    models: dict[str, Any] = {"bfloat16": base_of("bf16"), "deltaw, 4 bits": base_of("4-bit")}
    models["bitsandbytes, 4 bits"] = base_of("bitsandbytes")
    for name in ("deltaw LoRA", "deltaw QLoRA"):
        models[f"{name}, not merged"] = make(name, args)[1]

    def decode(model: Any, rows: int) -> Callable[[], Any]:
        model.eval()
        settings = {"max_new_tokens": args.tokens, "min_new_tokens": args.tokens, "do_sample": False, "use_cache": True}
        return lambda: model.generate(input_ids=ids[:rows], attention_mask=torch.ones_like(ids[:rows]), **settings)

    found = []
    for rows in (1, 4):
        calls = {name: decode(model, rows) for name, model in models.items()}
        seconds = in_turns(calls, args.rounds)
        for name, each in seconds.items():
            plain = "deltaw LoRA, not merged" if "merged" in name else "bfloat16"
            paired = [a / b for a, b in zip(seconds[plain], each, strict=True)]
            rates = [rows * args.tokens / s for s in each]
            found.append([str(rows), name, spread(rates, 1), spread(paired, 2)])
    print(f"\nGreedy decoding of {args.tokens} tokens after 32; {args.rounds} rounds\n{machine()}\n")
    print(table(["sequences", "model", "tokens/s (min to max)", "speed / in bfloat16"], found))


VERBS: dict[str, Callable[[argparse.Namespace], None]] = {
    "kernels": kernels,
    "step": step,
    "losses": losses,
    "memory": memory,
    "generate": generate,
}
ROUNDS = {"kernels": 15, "step": 7, "memory": 3, "generate": 5}


def main(arguments: Sequence[str] | None = None) -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=[*VERBS, "all"])
    parser.add_argument("--rounds", type=int, help="of each measurement; unset: as many as steady it")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20, help="of the losses (%(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="to generate (%(default)s)")
    parser.add_argument("--memory-of", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.dtype, args.supervised = "bf16", 1.0
    load_model("smollm2-135m")  # fetched now, if at all
    if args.memory_of:
        memory_of(args)
        return
    rounds = args.rounds
    for verb in VERBS if args.verb == "all" else [args.verb]:
        args.rounds = rounds or ROUNDS.get(verb, 1)
        began = time.perf_counter()
        VERBS[verb](args)
        print(f"\n({verb}: {time.perf_counter() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
