"""The backend for CUDA without a GPU: interpreted on the CPU against the reference, and compiled for GPUs that need not
be there. test_triton_kernels.py runs it where there is one."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.errors import ConfigError
from deltaw.quant import backends, triton
from deltaw.quant.packed import BLOCKSIZES

HERE = Path(__file__).parent
CASE = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "nested": True}
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def cases(kind: str, **named: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {f"{kind}, {name}": {"kind": kind, **case} for name, case in named.items()}


def answers(script: str, asked: dict[str, dict[str, Any]], **environment: str) -> dict[str, str]:
    """What ``script`` finds wrong with each case, all in one process."""
    done = subprocess.run(
        [sys.executable, str(HERE / script)],
        input=json.dumps(list(asked.values())),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        timeout=300,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    lost = f"the process ended with {done.returncode}: {done.stderr[-2000:]}"
    return dict(zip(asked, [*found, *[lost] * (len(asked) - len(found))], strict=True))


# --- through the interpreter -----------------------------------------------------------------------------------

INTERPRETED = {
    **cases(
        "dequantize",
        **{
            f"{quant_type}{' nested' * nested} {dtype}": {
                **CASE,
                "quant_type": quant_type,
                "nested": nested,
                "dtype": dtype,
                "shape": [33, 66],
            }
            for quant_type in ("nf4", "fp4")
            for nested in (False, True)
            for dtype in ("float32", "bfloat16", "float16")
        },
        **{f"blocksize {size}": {**CASE, "blocksize": size, "shape": [5, 833]} for size in BLOCKSIZES},
        **{f"tile {tile}": {**CASE, "tile": tile, "shape": [5, 833]} for tile, _ in triton.TILES[1:]},
        one={**CASE, "shape": [1, 1]},
        empty={**CASE, "shape": [0, 64]},
        three_dimensions={**CASE, "shape": [3, 5, 70]},
    ),
    **cases(
        "quantize",
        **{f"blocksize {size}": {"shape": [5, 277], "quant_type": "nf4", "blocksize": size} for size in BLOCKSIZES},
        **{
            f"{quant_type} {dtype}": {"shape": [7, 66], "quant_type": quant_type, "blocksize": 64, "dtype": dtype}
            for quant_type in ("nf4", "fp4")
            for dtype in ("float32", "bfloat16", "float16")
        },
        not_finite={"shape": [5, 77], "quant_type": "nf4", "blocksize": 64, "wild": True},
        one={"shape": [1], "quant_type": "fp4", "blocksize": 64},
        empty={"shape": [0, 3], "quant_type": "nf4", "blocksize": 64},
    ),
    **cases("ties", nf4={"quant_type": "nf4"}, fp4={"quant_type": "fp4"}),
    **cases(
        "eight_bits",
        signed={"shape": [1733], "signed": True, "blocksize": 256},
        unsigned={"shape": [1733], "signed": False, "blocksize": 256},
        small_blocks={"shape": [130], "signed": True, "blocksize": 32},
        not_finite={"shape": [700], "signed": True, "blocksize": 256, "wild": True},
        empty={"shape": [0], "signed": False, "blocksize": 256},
    ),
    **cases(
        "linear",
        **{
            f"{rows} rows, {outputs} x {width}": {
                **CASE,
                "rows": rows,
                "shape": [outputs, width],
                "multiprocessors": multiprocessors,
            }
            for rows, outputs, width, multiprocessors in (
                (1, 64, 128, 1),
                (1, 70, 640, 1),  # over several pieces of the inputs
                (2, 70, 192, 4),  # the last round is not full
                (16, 130, 256, 1),
                (17, 3, 128, 1),
                (70, 10, 130, 1),  # two inputs share a scale in every row
                (5, 33, 257, 1),  # rows begin inside a byte
                (3, 1, 1, 1),
                (0, 64, 128, 1),
                (3, 0, 128, 1),
            )
        },
        **{
            f"{dtype} blocksize {size}": {
                **CASE,
                "dtype": dtype,
                "blocksize": size,
                "rows": 3,
                "shape": [20, 200],
                "multiprocessors": 1,
                "nested": False,
            }
            for dtype, size in (("float32", 32), ("float16", 256), ("bfloat16", 4096))
        },
        **{
            # x -> what the weight is read in
            f"{dtype} x {stored}": {
                **CASE,
                "dtype": dtype,
                "stored": stored,
                "rows": 3,
                "shape": [20, 200],
                "multiprocessors": 1,
            }
            for dtype, stored in (("float32", "bfloat16"), ("float32", "float16"), ("float16", "float16"))
        },
        fp4={**CASE, "quant_type": "fp4", "rows": 2, "shape": [20, 128], "multiprocessors": 1},
        without_tensor_cores={**CASE, "rows": 2, "shape": [20, 128], "multiprocessors": 1, "modern": False},
        strided={**CASE, "rows": 5, "shape": [20, 128], "multiprocessors": 1, "strided": True},
    ),
    "more than 2^31 elements: dequantize": {"kind": "huge_dequantize"},
    "more than 2^31 elements: quantize": {"kind": "huge_quantize"},
    "more than 2^31 elements: linear": {"kind": "huge_linear"},
}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    return answers("triton_interpreted.py", INTERPRETED)


@needs_triton
@pytest.mark.parametrize("name", INTERPRETED)
def test_as_the_reference(interpreted, name):
    assert not interpreted[name]


# --- compiled --------------------------------------------------------------------------------------------------

#: no product and sum are contracted, and none is left for the assembler to contract
ROUNDED = [r"\bfma\.", r"\b(mul|add|sub)\.f32"]
#: at most the scale is read byte by byte, and all is written 16 bytes at a time
NARROW = [r"(?s)ld\.global\.b8.*ld\.global\.b8", r"st\.global\.(b16|b32|v2)"]
COMPILED = {
    **cases(
        "dequantize",
        **{
            f"{dtype}{' nested' * nested} sm_{capability}": {
                "shape": [64, 1024],
                "nested": nested,
                "dtype": dtype,
                "capability": capability,
                "must": [r"st\.global\.v4\.b32", *must],
                "never": ROUNDED if dtype == "float32" else [*ROUNDED, *NARROW],
            }
            for dtype, nested, capability, must in (
                ("bfloat16", True, 75, []),
                ("float16", True, 80, [r"cvt\.rn\.f16"]),
                ("bfloat16", True, 90, [r"cvt\.rn\.bf16"]),
                ("bfloat16", False, 90, [r"cvt\.rn\.bf16"]),
                ("float32", True, 90, []),
            )
        },
        # all that are chosen from
        tiles={
            "shape": [4096, 1024],
            "nested": True,
            "dtype": "bfloat16",
            "capability": 90,
            "kernels": len(triton.TILES),
            "must": [r"st\.global\.v4\.b32"],
            "never": ROUNDED,
        },
    ),
    **cases(
        "linear",
        **{
            f"{dtype} {width} sm_{capability}": {
                "shape": [64, width],
                "rows": 3,
                "nested": True,
                "dtype": dtype,
                "capability": capability,
                "must": must,
                "never": [],
            }
            for dtype, width, capability, must in (
                ("bfloat16", 1024, 75, [r"fma\.rn\.f32"]),  # no bfloat16 there: in float32
                ("float16", 1024, 80, [r"mma\.sync.*\.f16"]),
                ("bfloat16", 1024, 80, [r"mma\.sync.*bf16"]),
                ("bfloat16", 1021, 90, [r"wgmma\.mma_async.*bf16"]),
            )
        },
        # the rows of generation come in float32, whatever the weight is read in
        **{
            f"float32 x {stored} sm_90": {
                "shape": [64, 1024],
                "rows": 3,
                "nested": True,
                "dtype": stored,
                "x": "float32",
                "capability": 90,
                "must": [must],
                "never": [r"fma\.rn\.f32"],
            }
            for stored, must in (("bfloat16", r"wgmma\.mma_async.*bf16"), ("float16", r"mma.*tf32"))
        },
    ),
    **{
        f"{kind} sm_90": {
            "kind": kind,
            "shape": [4096],
            "dtype": "float32",
            "capability": 90,
            "must": must,
            "never": ROUNDED,
        }
        for kind, must in (
            ("quantize", [r"div\.rn\.f32", r"max\.NaN\.f32"]),
            ("quantize_8bit", [r"div\.rn\.f32", r"max\.NaN\.f32"]),
            ("dequantize_8bit", [r"mul\.rn\.f32"]),
        )
    },
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, str]:
    cache = tmp_path_factory.mktemp("triton")  # a cache would answer for the compiler
    return answers("triton_compiled.py", COMPILED, TRITON_CACHE_DIR=str(cache), TRITON_INTERPRET="0")


@needs_triton
@pytest.mark.parametrize("name", COMPILED)
def test_compiles(compiled, name):
    assert not compiled[name]


# --- which runs where ------------------------------------------------------------------------------------------


def test_says_why_it_cannot_run(monkeypatch):
    assert "no CUDA device" in triton.unavailable(torch.device("cpu"))
    monkeypatch.setenv(backends.VARIABLE, "triton")
    with pytest.raises(ConfigError, match="cannot run on cpu: no CUDA device"):
        backends.backend_for(torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    importlib.reload(triton)
    assert triton.unavailable(torch.device("cuda")) == "triton is not installed"


@needs_triton
def test_runs_where_there_is_cuda_and_triton():
    assert not triton.unavailable(torch.device("cuda"))


def test_the_fastest_tile_is_found_once(monkeypatch):
    times = dict(zip(triton.TILES, (3.0, 2.0, 1.0, 4.0), strict=True))
    timed = []
    capturing = True
    monkeypatch.setattr(triton, "_fastest", {})
    monkeypatch.setattr(triton, "_time", lambda launch, tile: timed.append(tile) or times[tile])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert triton._tile(triton.LARGE - 1, ("bfloat16",), print) == triton.TILES[0]
    assert triton._tile(triton.LARGE, ("bfloat16",), print) == triton.TILES[0]  # a graph is under way
    assert not timed
    capturing = False
    assert triton._tile(triton.LARGE, ("bfloat16",), print) == triton.TILES[2]
    capturing = True
    assert triton._tile(triton.LARGE, ("bfloat16",), print) == triton.TILES[2]
    assert timed == list(triton.TILES)
    capturing = False
    triton._tile(triton.LARGE, ("float16",), print)
    assert len(timed) == 2 * len(triton.TILES)


@given(width=st.integers(1, 20000), tiles=st.integers(1, 4000), multiprocessors=st.integers(1, 200))
@settings(max_examples=200)
def test_pieces_cover_the_inputs_and_fill_the_device(width, tiles, multiprocessors):
    piece = triton._piece(width, tiles, multiprocessors)
    pieces = -(-width // piece)
    assert piece % triton.TILE_IN == 0
    assert (pieces - 1) * piece < width <= pieces * piece
    if tiles >= triton.PROGRAMS * multiprocessors:
        assert pieces == 1
    elif pieces < -(-width // triton.TILE_IN):  # shorter pieces would be more programs than asked for
        assert -(-width // max(piece - triton.TILE_IN, 1)) * tiles >= triton.PROGRAMS * multiprocessors


@pytest.mark.slow
def test_the_benchmark_for_a_gpu_runs_without_one():
    """Tiny; LoRA on the weights that QLoRA reads has its losses and gradients."""
    script = Path(triton.__file__).parents[2] / "benchmarks" / "gpu_quant.py"
    done = subprocess.run(
        [sys.executable, str(script), "all", "--dry"], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    table = [[cell.strip() for cell in line.split("|")] for line in done.stdout.splitlines()]
    results = {(row[1], row[2]): row[6:8] for row in table if len(row) > 7 and row[2] in ("LoRA", "QLoRA")}
    assert len(results) == 4
    for tokens, name in results:
        loss, norm = map(float, results[tokens, name])
        assert [loss, norm] == pytest.approx([float(value) for value in results[tokens, "LoRA"]], rel=2e-3)
        assert norm > 0
