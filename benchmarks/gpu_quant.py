"""Weights in 4 bits on a GPU: reading them, multiplying with few rows, and a QLoRA step beside a LoRA step.

    python benchmarks/gpu_quant.py read [--rounds 20]     # dequantization beside a plain copy of the output
    python benchmarks/gpu_quant.py rows [--rounds 20]     # the fused product beside bfloat16's, 1 to 16 rows
    python benchmarks/gpu_quant.py step [--rounds 10]     # a model of a billion parameters, 512 to 8,192 tokens a step
    python benchmarks/gpu_quant.py all
    python benchmarks/gpu_quant.py all --dry              # tiny and on the CPU: that all of it runs; times mean nothing

Kernels are timed inside a CUDA graph, so that what is measured is the device and not the launches. The model of a step
is random, built from a config, and the same for everyone; LoRA's base holds the weights that QLoRA's reads from 4 bits,
so that both compute the same: losses and gradient norms stand beside the times. To reach on an H100: 1.10 times LoRA's
step at 2,048 tokens and more.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from common import in_turns, machine, spread, table
from torch import Tensor, nn
from train_step import ADAPTER, gradient_norm, nudge, step_of
from transformers import LlamaConfig, LlamaForCausalLM

from deltaw import LoraConfig, NF4Config, NF4Linear, causal_lm_loss, get_peft_model, quantize_
from deltaw.quant import dequantize_4bit, linear_4bit, quantize_4bit

NESTED = NF4Config(bnb_4bit_use_double_quant=True)
#: (out, in) of the layers of models of one and of eight billion parameters
SHAPES = [(2048, 2048), (8192, 2048), (4096, 4096), (14336, 4096)]
ROWS = (1, 2, 4, 8, 16)
#: (sequences, tokens each) of a step
STEPS = [(1, 512), (1, 2048), (4, 2048)]
#: bytes to go through before a weight is read again, so that none is found in the cache
BEYOND_CACHE = 256 << 20
DRY = {
    "SHAPES": [(64, 96), (70, 33)],
    "ROWS": (1, 3),
    "STEPS": [(1, 16), (2, 16)],
    "BEYOND_CACHE": 1 << 16,
}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measured(
    contestants: dict[str, Callable[[], Any]], args: argparse.Namespace, calls: int, graph: bool = True
) -> dict[str, list[float]]:
    """Seconds of one call each: in every turn of a contestant, enough calls to be timed, and one wait for them all."""

    def turn(call: Callable[[], Any]) -> Callable[[], None]:
        def repeat() -> None:
            for _ in range(calls):
                call()

        def run() -> None:
            replay()
            wait(args.device)

        replay = recorded(repeat) if graph and args.device.type == "cuda" else repeat
        return run

    seconds = in_turns({name: turn(call) for name, call in contestants.items()}, args.rounds, warmup=2)
    return {name: [value / calls for value in values] for name, values in seconds.items()}


def recorded(call: Callable[[], Any]) -> Callable[[], None]:
    """What ``call`` launches, as a CUDA graph."""
    call()  # compiles, and finds what is fastest here
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def rotating(make: Callable[[], Any], nbytes: int) -> Callable[[], Any]:
    """Hands out so many of what ``make`` makes, in turn, that each has left the cache when it comes again."""
    made = itertools.cycle([make() for _ in range(max(2, -(-BEYOND_CACHE // nbytes)))])
    return lambda: next(made)


def reading(shape: tuple[int, int], device: torch.device) -> dict[str, tuple[Callable[[], Any], int]]:
    """What reads a weight of ``shape`` into bfloat16, each with the bytes that it moves."""
    elements = shape[0] * shape[1]
    outs = rotating(lambda: torch.empty(shape, dtype=torch.bfloat16, device=device), 2 * elements)
    weight = torch.randn(shape, device=device).bfloat16()

    def of(nested: bool) -> tuple[Callable[[], Any], int]:
        packed = rotating(lambda: quantize_4bit(weight, nested=nested), elements // 2)
        return lambda: dequantize_4bit(packed(), out=outs()), packed().nbytes() + 2 * elements

    return {
        "copy": (lambda: outs().copy_(outs()), 4 * elements),
        "nf4": of(False),
        "nf4, double quantized": of(True),
    }


def read(args: argparse.Namespace) -> None:
    """Bytes counted once each: a copy reads and writes two an element, dequantization reads about half of one."""
    rows = []
    for shape in SHAPES:
        elements = shape[0] * shape[1]
        ways = reading(shape, args.device)
        seconds = measured({name: call for name, (call, _) in ways.items()}, args, 2 if args.dry else 40)
        middle = {name: statistics.median(values) for name, values in seconds.items()}
        for name, values in seconds.items():
            rows.append(
                [
                    f"{shape[0]} x {shape[1]}",
                    name,
                    spread([1e6 * value for value in values], 1),
                    f"{elements / middle[name] / 1e9:,.0f}",
                    f"{ways[name][1] / middle[name] / 1e9:,.0f}",
                    f"{middle[name] / middle['copy']:.2f}",
                ]
            )
    head = ["weight", "what", "us (min to max)", "billion elements/s", "GB/s", "time / copy"]
    print(f"\nReading into bfloat16\n\n{table(head, rows)}")


def products(x: Tensor, packed: Callable[[], Any], dense: Callable[[], Tensor]) -> dict[str, Callable[[], Tensor]]:
    """The ways to multiply ``x`` (n, in) by a weight that is there in 4 bits and in bfloat16."""
    wide = x.float()  # so that the adapters are added before anything is rounded
    return {
        "bfloat16": lambda: nn.functional.linear(x, dense()),
        "fused": lambda: linear_4bit(x, packed()),
        "fused, as layers do": lambda: linear_4bit(wide, packed()),
        "read out": lambda: nn.functional.linear(x, dequantize_4bit(packed())),
    }


def few_rows(args: argparse.Namespace) -> None:
    """The fused product, bfloat16's own, and reading the weight out for it; errors against the weight in float64."""
    rows = []
    for shape in SHAPES:
        weight = torch.randn(shape, device=args.device).bfloat16() / shape[1] ** 0.5
        packed = rotating(partial(quantize_4bit, weight, nested=True), weight.numel() // 2)
        exact = dequantize_4bit(packed())
        dense = rotating(exact.clone, exact.nbytes)
        for n in ROWS:
            x = torch.randn(n, shape[1], device=args.device).bfloat16()
            contestants = products(x, packed, dense)
            right = x.double() @ exact.double().T
            seconds = measured(contestants, args, 2 if args.dry else 40)
            middle = {name: statistics.median(values) for name, values in seconds.items()}
            for name, call in contestants.items():
                rows.append(
                    [
                        f"{shape[0]} x {shape[1]}",
                        str(n),
                        name,
                        spread([1e6 * value for value in seconds[name]], 1),
                        f"{middle['bfloat16'] / middle[name]:.2f}",
                        f"{float((call().double() - right).norm() / right.norm()):.1e}",
                    ]
                )
    head = ["weight", "rows", "product", "us (min to max)", "bfloat16 / it", "relative error"]
    print(f"\nFew rows\n\n{table(head, rows)}")


def vocabulary(args: argparse.Namespace) -> int:
    return 128 if args.dry else 32000


def model_of(args: argparse.Namespace, quantized: bool) -> nn.Module:
    """The same weights for both: those that are read from 4 bits."""
    wide, inner, layers, heads = (64, 96, 2, 4) if args.dry else (2048, 8192, 16, 32)
    config = LlamaConfig(
        hidden_size=wide,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        vocab_size=vocabulary(args),
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with args.device:
            base: Any = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    print(quantize_(base, NESTED) if quantized else f"{base.num_parameters():,} parameters", flush=True)
    if not quantized:
        for module in base.modules():
            if isinstance(module, nn.Linear) and module is not base.lm_head:
                held = NF4Linear.from_linear(module, NESTED)
                module.weight.data.copy_(dequantize_4bit(held.packed))
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=args.rank, **ADAPTER)).to(args.device)
    nudge(model)
    return model.train()


def step(args: argparse.Namespace) -> None:
    rows = []
    models = {"LoRA": model_of(args, quantized=False), "QLoRA": model_of(args, quantized=True)}
    for sequences, length in STEPS:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, vocabulary(args), (sequences, length), generator=generator).to(args.device)
        steps, losses, norms, peaks = {}, {}, {}, {}
        for name, model in models.items():

            def forward(model: nn.Module = model, ids: Tensor = ids) -> Tensor:
                return causal_lm_loss(model, input_ids=ids, labels=ids)

            steps[name] = step_of(forward, model)
            losses[name] = steps[name]()  # compiles and tunes what is met for the first time
            norms[name] = gradient_norm(model)
            peaks[name] = peak_of(steps[name], args.device)
        seconds = measured(steps, args, 1 if args.dry else 3, graph=False)
        middle = {name: statistics.median(values) for name, values in seconds.items()}
        for name, values in seconds.items():
            rows.append(
                [
                    f"{sequences} x {length}",
                    name,
                    spread([1e3 * value for value in values], 2),
                    f"{sequences * length / middle[name]:,.0f}",
                    f"{middle[name] / middle['LoRA']:.3f}",
                    f"{losses[name]:.5f}",
                    f"{norms[name]:.5f}",
                    peaks[name],
                ]
            )
    head = [
        "tokens",
        "step",
        "ms (min to max)",
        "tokens/s",
        "it / LoRA",
        "loss",
        "gradient norm",
        "peak MiB above rest",
    ]
    print(f"\nA step, rank {args.rank}\n\n{table(head, rows)}")


def peak_of(call: Callable[[], Any], device: torch.device) -> str:
    """Of what PyTorch allocates during a call, above what it held before."""
    if device.type != "cuda":
        return "-"
    gc.collect()
    wait(device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    wait(device)
    return f"{(torch.cuda.max_memory_allocated() - before) / 2**20:,.0f}"


def gpu(device: torch.device) -> str:
    if device.type != "cuda":
        return "a dry run on the CPU: the times mean nothing"
    import triton

    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, triton {triton.__version__}"


PARTS = {"read": read, "rows": few_rows, "step": step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "all"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU")
    args = parser.parse_args()
    if not args.dry and not torch.cuda.is_available():
        parser.error("there is no GPU here; --dry runs everything on the CPU, tiny")
    args.device = torch.device("cpu" if args.dry else "cuda")
    if args.dry:
        globals().update(DRY)
        args.rounds = min(args.rounds, 2)
    print(f"{gpu(args.device)}\n{machine()}")
    for name in PARTS if args.part == "all" else [args.part]:
        PARTS[name](args)


if __name__ == "__main__":
    main()
