"""Compiles what the backend launches, for GPUs that need not be there, and looks into the machine code.

A script of its own, since what is compiled for another device stays in triton's memory. Reads cases as a JSON list from
standard input, writes what is wrong with each (empty: nothing) as a line of JSON. Started by test_triton.py.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import re
import sys
from unittest import mock

import torch
import triton as compiler
from torch import Tensor
from triton.backends.compiler import GPUTarget

from deltaw.quant import triton
from deltaw.quant.packed import Packed


class Device:
    """Stands in for a driver: says what to compile for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling(capability: int):
    """Launches compile and do not run; yields the assembly of each, as PTX. The compiler's last step, ptxas, has then
    accepted it."""

    def compile_only(kernel, *arguments, grid, warmup, **options):
        made = run(kernel, *arguments, grid=grid, warmup=True, **options)
        assembly.append(made.asm["ptx"])

    assembly: list[str] = []
    run = compiler.JITFunction.run
    with (
        mock.patch.object(compiler.runtime.driver, "_active", Device(capability)),
        mock.patch.object(compiler.JITFunction, "run", compile_only),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False),
        mock.patch.object(torch.cuda, "_sleep", create=True),
        mock.patch.object(torch.cuda, "Event", return_value=mock.Mock(elapsed_time=lambda end: 1.0)),
        mock.patch.object(triton, "_multiprocessors", return_value=132),
        mock.patch.object(triton, "_has_bfloat16", return_value=capability >= 80),
        mock.patch.object(triton, "_on", return_value=contextlib.nullcontext()),
    ):
        yield assembly


def packed_of(case: dict) -> Packed:
    """Memory that nothing is read from."""
    shape, nested = torch.Size(case["shape"]), case["nested"]
    blocks = -(-shape.numel() // 64)
    return Packed(
        torch.empty((shape.numel() + 1) // 2, dtype=torch.uint8),
        torch.empty(blocks, dtype=torch.uint8 if nested else torch.float32),
        torch.empty(-(-blocks // 256)) if nested else None,
        torch.empty(1) if nested else None,
        "nf4",
        64,
        shape,
        getattr(torch, case["dtype"]),
    )


def launch(case: dict) -> None:
    values: Tensor = torch.empty(case["shape"], dtype=getattr(torch, case.get("dtype", "float32")))
    match case["kind"]:
        case "dequantize":
            triton.dequantize_4bit(packed_of(case), values)
        case "linear":
            x = torch.empty(case["rows"], values.shape[1], dtype=getattr(torch, case.get("x", case["dtype"])))
            triton.linear_4bit(x, packed_of(case))
        case "quantize":
            triton.quantize_4bit(values, "nf4", 64)
        case "quantize_8bit":
            triton.quantize_8bit(values, True, 256)
        case "dequantize_8bit":
            triton.dequantize_8bit(values.byte(), torch.empty(-(-values.numel() // 256)), True, 256, values)


def faults(case: dict) -> str:
    try:
        with compiling(case["capability"]) as assembly:
            launch(case)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if len(set(assembly)) != case.get("kernels", 1):
        return f"{len(set(assembly))} kernels"
    wrong = [f"no {pattern}" for pattern in case["must"] if not all(re.search(pattern, ptx) for ptx in assembly)]
    wrong += [f"has {pattern}" for pattern in case["never"] if any(re.search(pattern, ptx) for ptx in assembly)]
    return "; ".join(wrong)


if __name__ == "__main__":
    faulthandler.enable()
    for case in json.load(sys.stdin):
        print(json.dumps(faults(case)), flush=True)
