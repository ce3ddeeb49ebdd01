"""The layer: what it computes, what it saves, and what leaves it as it is."""

import copy
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import bnb
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from deltaw.errors import CheckpointError, ModelError
from deltaw.quant import NF4Config, NF4Linear, dequantize_4bit, from_bnb, quantize_4bit
from deltaw.quant.bnb_format import fitting
from deltaw.quant.config import STORAGES

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CONFIGS = {
    "nf4": NF4Config(),
    "nf4 nested": NF4Config(bnb_4bit_use_double_quant=True),
    "fp4": NF4Config(bnb_4bit_quant_type="fp4"),
    "fp4 nested": NF4Config(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def dense(out: int = 24, width: int = 40, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(width, out, bias=bias, dtype=dtype)


def made(config: NF4Config | None = None, **kwargs) -> NF4Linear:
    return NF4Linear.from_linear(dense(**kwargs), config or NF4Config(bnb_4bit_use_double_quant=True))


def bits(layer: NF4Linear) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in layer.packed.tensors().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one.values(), other.values(), strict=True)
    )


# --- what it holds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_it_holds_the_packed_weight(name):
    linear, config = dense(), CONFIGS[name]
    layer = NF4Linear.from_linear(linear, config)
    expected = quantize_4bit(linear.weight, config.bnb_4bit_quant_type, nested=config.bnb_4bit_use_double_quant)
    assert same(bits(layer), expected.tensors())
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (40, 24)
    assert layer.weight.shape == (480, 1)
    assert layer.bias is linear.bias
    assert not any(p.requires_grad for n, p in layer.named_parameters() if n != "bias")
    nested = {"nested_absmax", "nested_offset"} if "nested" in name else set()
    assert set(dict(layer.named_parameters())) == {"weight", "absmax", "bias"} | nested


def test_bits_of_a_weight():
    """0.5 bytes a weight, a float32 for 64 of them; nested a byte for 64, a float32 for 64 * 256, one for all."""
    n = 1024 * 1024
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    plain, nested = quantize_4bit(weight), quantize_4bit(weight, nested=True)
    assert 8 * plain.nbytes() / n == 4.5
    assert 8 * nested.nbytes() / n == pytest.approx(4 + 8 / 64 + 32 / (64 * 256) + 32 / n)
    assert round(8 * nested.nbytes() / n, 3) == 4.127
    assert round(8 * (plain.nbytes() - nested.nbytes()) / n, 2) == 0.37


def test_what_it_says_of_itself():
    said = repr(made())
    for part in ("in_features=40", "out_features=24", "bias=True", "nf4", "blocksize=64", "nested", "float32"):
        assert part in said


def test_an_empty_layer_waits_for_its_weight():
    layer = NF4Linear(40, 24, config=CONFIGS["nf4 nested"], dtype=torch.bfloat16)
    assert layer.packed.dtype == layer.bias.dtype == torch.bfloat16
    assert (layer(torch.ones(2, 40, dtype=torch.bfloat16)) == 0).all()
    source = made(dtype=torch.bfloat16)
    layer.load_state_dict(source.state_dict())
    assert same(bits(layer), bits(source))


def test_gpt2s_layer_is_turned_round():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    conv = Conv1D(24, 40)
    layer = NF4Linear.from_linear(conv, NF4Config())
    assert (layer.in_features, layer.out_features) == (40, 24)
    assert same(bits(layer), quantize_4bit(conv.weight.t()).tensors())
    x = torch.randn(3, 40)
    assert torch.allclose(layer(x), conv(x), atol=0.2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_a_dtype_that_cannot_be_read_back_is_refused(dtype):
    with pytest.raises(ModelError, match=r"cannot be kept in 4 bits: convert the model to float32"):
        NF4Linear.from_linear(dense().to(dtype), NF4Config())


# --- what it computes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(1,), (2, 3), (4, 16), (0,)])
def test_the_forward_is_that_of_the_weight_it_reads(name, dtype, bias, rows):
    layer = NF4Linear.from_linear(dense(bias=bias, dtype=dtype), CONFIGS[name])
    x = torch.randn(*rows, 40, dtype=dtype)
    expected = F.linear(x, dequantize_4bit(layer.packed), layer.bias)
    recorded = layer(x.clone().requires_grad_())
    assert torch.equal(recorded, expected)
    with torch.no_grad():
        out = layer(x)
    assert out.dtype == dtype
    assert out.shape == expected.shape
    assert torch.allclose(out.float(), expected.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 40), (2, 3, 40), (40,)])
def test_gradients_are_those_of_the_weight_it_reads(dtype, shape):
    layer = made(dtype=dtype)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    plain = F.linear(x, dequantize_4bit(layer.packed), layer.bias)
    grad = torch.randn_like(plain)
    assert layer.bias is not None
    expected = torch.autograd.grad(plain, (x, layer.bias), grad)
    got = torch.autograd.grad(layer(x), (x, layer.bias), grad)
    assert torch.equal(got[0], expected[0])
    assert torch.allclose(got[1].float(), expected[1].float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_gradients_are_right_by_difference():
    layer = made()
    x = torch.randn(2, 40, dtype=torch.float64, requires_grad=True)
    layer.bias.data = layer.bias.data.double()
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(layer, (x,))


def test_a_bias_that_stays_gets_no_gradient():
    layer = made()
    layer.bias.requires_grad_(False)
    layer(torch.randn(3, 40, requires_grad=True)).sum().backward()
    assert layer.bias.grad is None


def test_the_weight_does_not_outlive_its_product():
    layer = made(out=64, width=64)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(3, 64, requires_grad=True))
    assert sum(t.nbytes for t in kept) <= layer.packed.nbytes()


def test_a_change_between_forward_and_backward_is_an_error():
    layer = made()
    out = layer(torch.randn(3, 40, requires_grad=True))
    with torch.no_grad():
        layer.absmax.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recorded", [True, False])
def test_the_compute_dtype_is_bitsandbytes(compute, given, recorded):
    linear = dense(64, 64, dtype=compute)
    config = NF4Config(bnb_4bit_compute_dtype=compute)
    ours = NF4Linear.from_linear(linear, config)
    theirs = bnb.layer(linear.weight.data, bias=linear.bias.data, compute_dtype=compute).train()
    x = torch.randn(16, 64, dtype=given)
    with torch.set_grad_enabled(recorded):
        out, expected = ours(x.requires_grad_(recorded)), theirs(x)
    assert out.dtype == expected.dtype == given
    assert torch.equal(out, expected)


def test_a_weight_is_what_it_is_read_back_as():
    """In a wider compute dtype too; bitsandbytes rounds it in backward alone, and so differentiates another weight."""
    layer = made(NF4Config(bnb_4bit_compute_dtype=torch.float32), dtype=torch.bfloat16)
    x = torch.randn(16, 40, requires_grad=True)
    weight = dequantize_4bit(layer.packed).float()
    out = layer(x)
    assert torch.equal(out, F.linear(x, weight, layer.bias.float()))
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(grad, torch.ones(16, 24) @ weight)


def test_without_a_compute_dtype_the_input_says():
    layer = made(dtype=torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert layer(torch.randn(16, 40, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("recorded", [True, False])
def test_autocast_decides_as_for_a_dense_layer(recorded):
    layer = made(dtype=torch.float32)
    plain = nn.Linear(40, 24)
    plain.weight.data, plain.bias = dequantize_4bit(layer.packed), layer.bias
    x = torch.randn(16, 40)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(recorded):
        out, expected = layer(x), plain(x)
    assert out.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(out, expected)


@given(
    rows=st.integers(0, 20),
    out=st.integers(1, 40),
    width=st.integers(1, 90),
    name=st.sampled_from(sorted(CONFIGS)),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=60)
def test_any_shape(rows, out, width, name, dtype):
    layer = NF4Linear.from_linear(dense(out, width, dtype=dtype), CONFIGS[name])
    x = torch.randn(rows, width, dtype=dtype)
    expected = F.linear(x, dequantize_4bit(layer.packed), layer.bias).float()
    with torch.no_grad():
        assert torch.allclose(layer(x).float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["aot_eager", "aot_eager_decomp_partition"])
def test_the_weight_does_not_outlive_its_product_when_compiled(backend):
    layer = made(out=64, width=64)
    kept: list[Tensor] = []
    compiled = torch.compile(lambda x: layer(layer(x).relu()), backend=backend, fullgraph=True)
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = compiled(x)
    assert kept
    assert max(t.nbytes for t in kept) <= layer.weight.nbytes
    (grad,) = torch.autograd.grad(out.sum(), x)
    (expected,) = torch.autograd.grad(layer(layer(x).relu()).sum(), x)
    assert torch.allclose(grad, expected, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("recorded", [True, False])
def test_it_compiles_in_one_piece(recorded):
    layer = made(width=64, bias=False)
    layer.requires_grad_(False)
    x = torch.randn(16, 64, requires_grad=recorded)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(recorded):
        out = compiled(x)
        assert torch.allclose(out, layer(x), atol=1e-5)
    if recorded:
        (grad,) = torch.autograd.grad(out.square().sum(), x)
        (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
        assert torch.allclose(grad, expected, atol=1e-4)
    torch.compiler.reset()


# --- what leaves it as it is --------------------------------------------------------------------------------

MOVES = {
    "train": lambda layer: layer.train(),
    "eval": lambda layer: layer.eval(),
    "bfloat16": lambda layer: layer.bfloat16(),
    "half": lambda layer: layer.half(),
    "float": lambda layer: layer.float(),
    "double": lambda layer: layer.double(),
    "to(dtype)": lambda layer: layer.to(torch.bfloat16),
    "to(device, dtype)": lambda layer: layer.to("cpu", torch.float16),
    "type": lambda layer: layer.type(torch.float16),
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "forward in eval, then train": lambda layer: (layer.eval()(torch.randn(1, 40)), layer.train())[1],
    "forward in train, then eval": lambda layer: (layer.train()(torch.randn(9, 40)), layer.eval())[1],
    "inference": lambda layer: (torch.inference_mode()(layer)(torch.randn(1, 40)), layer)[1],
}


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("move", MOVES)
def test_nothing_changes_the_weight(move, storage):
    layer = made(NF4Config(bnb_4bit_use_double_quant=True, bnb_4bit_quant_storage=storage))
    before, read = bits(layer), dequantize_4bit(layer.packed)
    moved = MOVES[move](layer)
    assert same(bits(moved), before)
    assert moved.weight.dtype == storage
    again = dequantize_4bit(moved.packed)
    assert again.dtype == read.dtype  # as with bitsandbytes, what it is read back in is part of the weight
    assert torch.equal(again, read)
    assert all(isinstance(p, nn.Parameter) for p in moved.parameters())


def test_the_bias_follows():
    assert made().bfloat16().bias.dtype == torch.bfloat16


def test_bitsandbytes_keeps_the_dtype_too():
    theirs = bnb.layer(dense(64, 64).weight.data).to(torch.bfloat16)
    assert theirs.weight.quant_state.dtype == torch.float32


def test_saving_after_eval_is_lossless():
    layer = made()
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    layer.eval()
    with torch.no_grad():
        layer(torch.randn(1, 40))
    assert same(dict(layer.state_dict()), before)
    layer.train()(torch.randn(4, 40, requires_grad=True)).sum().backward()
    assert same(dict(layer.state_dict()), before)


def test_to_meta_and_back():
    layer = made()
    empty = copy.deepcopy(layer).to("meta")
    assert all(p.is_meta for p in empty.parameters())
    assert empty(torch.empty(3, 40, device="meta")).shape == (3, 24)
    assert set(empty.state_dict()) == set(layer.state_dict())
    filled = empty.to_empty(device="cpu")
    assert {n: (p.dtype, p.shape) for n, p in filled.named_parameters()} == {
        n: (p.dtype, p.shape) for n, p in layer.named_parameters()
    }
    filled.load_state_dict(layer.state_dict())
    assert same(bits(filled), bits(layer))


def test_made_without_weights():
    with torch.device("meta"):
        layer = NF4Linear.from_linear(dense(), CONFIGS["nf4 nested"])
    assert all(p.is_meta for p in layer.parameters())
    layer.load_state_dict(made().state_dict(), assign=True)
    assert same(bits(layer), bits(made()))


# --- its state dict -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("storage", STORAGES)
def test_its_keys_are_bitsandbytes(name, dtype, storage):
    config = CONFIGS[name]
    config = NF4Config.from_dict(config.to_dict(), bnb_4bit_quant_storage=storage)
    linear = dense(32, 64, dtype=dtype)
    ours = NF4Linear.from_linear(linear, config)
    theirs = bnb.layer(
        linear.weight.data,
        config.bnb_4bit_quant_type,
        nested=config.bnb_4bit_use_double_quant,
        bias=linear.bias.data,
        storage=storage,
    )
    mine, saved = ours.state_dict(), theirs.state_dict()
    assert set(mine) == set(saved)
    for key, tensor in saved.items():
        assert mine[key].dtype == tensor.dtype, key
        assert mine[key].shape == tensor.shape or "quant_state" in key, key
    empty = NF4Linear(64, 32, config=config)
    assert str(empty.load_state_dict(saved, assign=True)) == "<All keys matched successfully>"
    assert empty.dtype == dtype
    assert torch.equal(dequantize_4bit(empty.packed), bnb.dequantize(theirs.weight.data, theirs.weight.quant_state))


@pytest.mark.parametrize("assign", [False, True])
def test_inside_a_model(assign):
    model = nn.Sequential(made(), nn.ReLU(), made(CONFIGS["fp4"], out=8, width=24))
    other = nn.Sequential(made(), nn.ReLU(), made(CONFIGS["fp4"], out=8, width=24))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    identity = [id(p) for p in other.parameters()]
    other.load_state_dict(model.state_dict(), assign=assign)
    x = torch.randn(3, 40)
    assert torch.equal(model(x), other(x))
    assert ([id(p) for p in other.parameters()] == identity) is not assign
    assert not any(p.requires_grad for n, p in other.named_parameters() if "bias" not in n)


def test_with_the_parameters_themselves():
    layer = made()
    saved = layer.state_dict(keep_vars=True)
    assert saved["weight"] is layer.weight
    assert saved["bias"] is layer.bias


def test_nothing_shares_memory_in_a_file(tmp_path):
    from safetensors.torch import load_file, save_file

    model = nn.Sequential(made(), made(out=8, width=24))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    packed = from_bnb({k[2:]: v for k, v in load_file(tmp_path / "model.safetensors").items() if k[:3] == "0.w"})
    assert same(packed.tensors(), bits(model[0]))


def wrong(**changes: object) -> dict[str, Tensor]:
    kwargs = {"out": 24, "width": 40, "config": CONFIGS["nf4 nested"]} | changes
    return made(kwargs.pop("config"), **kwargs).state_dict()


FAULTS = {
    "shape": (wrong(out=40, width=24), r"shape is \(40, 24\), of this layer \(24, 40\)"),
    "type": (wrong(config=CONFIGS["fp4 nested"]), "quant_type is fp4, of this layer nf4"),
    "nested": (wrong(config=CONFIGS["nf4"]), "double quantization is False, of this layer True"),
    "blocksize": (
        wrong(config=NF4Config(bnb_4bit_use_double_quant=True, bnb_4bit_blocksize=128)),
        "blocksize is 128, of this layer 64",
    ),
    "dense": ({"weight": torch.zeros(24, 40), "bias": torch.zeros(24)}, r"in full.*before quantize_\(\)"),
    "map": (wrong() | {"weight.quant_map": torch.zeros(16)}, "not the map of nf4"),
    "lacks": ({k: v for k, v in wrong().items() if k != "weight.absmax"}, "lacks weight.absmax"),
    "bias": (wrong() | {"bias": torch.zeros(3)}, "size mismatch for 0.bias"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("strict", [True, False])
def test_each_fault_is_one_clear_error(fault, strict):
    saved, said = FAULTS[fault]
    model = nn.Sequential(made())
    before = bits(model[0])
    with pytest.raises(RuntimeError, match=said) as caught:
        model.load_state_dict({f"0.{key}": tensor for key, tensor in saved.items()}, strict=strict)
    assert "Missing key" not in str(caught.value)
    assert "Unexpected key" not in str(caught.value)
    if fault != "bias":
        assert same(bits(model[0]), before)


def test_several_layers_are_one_error():
    model = nn.Sequential(made(), made(out=8, width=24))
    saved = model.state_dict() | {"0.weight": torch.zeros(24, 40), "1.weight.quant_map": torch.zeros(16)}
    with pytest.raises(RuntimeError, match=r"(?s)0: a 4-bit weight.*1: a 4-bit weight"):
        model.load_state_dict(saved)


def test_a_missing_layer_and_a_key_too_many():
    model = nn.Sequential(made())
    with pytest.raises(RuntimeError, match=r'(?s)Missing key.*"0.weight".*Unexpected key.*"0.weight.other"'):
        model.load_state_dict({"0.bias": torch.zeros(24), "0.weight.other": torch.zeros(1)})
    missing, unexpected = model.load_state_dict({"0.bias": torch.ones(24)}, strict=False)
    assert (missing, unexpected) == (["0.weight"], [])
    assert (model[0].bias == 1).all()


def test_bytes_that_do_not_divide_into_the_storage():
    with pytest.raises(ModelError, match=r"7 bytes in 4 bits, which do not divide into items of .*float32: use uint8"):
        NF4Linear.from_linear(dense(2, 7), NF4Config(bnb_4bit_quant_storage="float32"))


def test_tied_layers_share_their_bytes():
    first = made()
    second = first.twin()
    assert second.weight is first.weight
    assert second.nested_absmax is first.nested_absmax
    assert second.bias is None
    assert second.training == first.training


def test_an_error_of_a_file_names_its_kind():
    with pytest.raises(CheckpointError):
        fitting({"weight": torch.zeros(24, 40)}, made().packed, "layer")


def test_no_warning_is_given():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made().half().load_state_dict(made().state_dict())


@pytest.mark.slow
def test_fsdp_shards_the_bytes(tmp_path):
    script = Path(__file__).parent / "sharded.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "rendezvous")],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
