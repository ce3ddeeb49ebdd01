"""Both ways between our packed weights and bitsandbytes' state dicts, and each way in which a file can be wrong."""

import json

import bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltaw.errors import CheckpointError
from deltaw.quant import dequantize_4bit, from_bnb, quantize_4bit, to_bnb
from deltaw.quant.bnb_format import KEYS, STATE
from deltaw.quant.config import STORAGES

KINDS = [(quant_type, nested) for quant_type in ("nf4", "fp4") for nested in (False, True)]


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def theirs(weight: Tensor, quant_type: str, nested: bool, storage: torch.dtype = torch.uint8) -> dict[str, Tensor]:
    """What bitsandbytes' own layer saves."""
    return dict(bnb.layer(weight, quant_type, nested=nested, storage=storage).state_dict())


@pytest.mark.parametrize(("quant_type", "nested"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(16, 64), (7, 34), (300, 64)])
def test_ours_reads_what_theirs_wrote(quant_type, nested, dtype, shape):
    weight = draw(*shape, dtype=dtype)
    saved = theirs(weight, quant_type, nested)
    packed = from_bnb(saved)
    assert (packed.quant_type, packed.nested, packed.dtype, packed.shape) == (quant_type, nested, dtype, weight.shape)
    codes, state = bnb.state_of(packed)
    state.shape = torch.Size([weight.numel()])  # flat: its CPU kernel misreads rows that blocks do not divide
    assert torch.equal(dequantize_4bit(packed).flatten(), bnb.dequantize(codes, state).flatten())
    again = to_bnb(packed)
    assert again.keys() == saved.keys()
    for key, tensor in saved.items():
        if STATE not in key:
            assert torch.equal(again[key], tensor), key
        else:
            read = [json.loads(bytes(t.tolist())) for t in (again[key], tensor)]
            assert read[0] == read[1]


@pytest.mark.parametrize(("quant_type", "nested"), KINDS)
def test_theirs_reads_what_ours_wrote(quant_type, nested):
    packed = quantize_4bit(draw(32, 64, dtype=torch.bfloat16), quant_type, nested=nested)
    saved = {key.removeprefix("weight."): tensor for key, tensor in to_bnb(packed).items()}
    weight = saved.pop("weight")
    read = bnb.bitsandbytes.nn.Params4bit.from_prequantized(weight, saved, device="cpu")
    assert read.quant_state.dtype == torch.bfloat16
    assert torch.equal(bnb.dequantize(read.data, read.quant_state), dequantize_4bit(packed))


@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    blocksize=st.sampled_from([32, 64, 256]),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@settings(max_examples=60)
def test_round_trip(shape, blocksize, kind, dtype):
    quant_type, nested = kind
    packed = quantize_4bit(draw(*shape, dtype=dtype), quant_type, blocksize, nested=nested)
    saved = to_bnb(packed)
    assert set(saved) <= set(KEYS)
    back = from_bnb(saved)
    assert back.tensors().keys() == packed.tensors().keys()
    for name, tensor in packed.tensors().items():
        assert torch.equal(back.tensors()[name], tensor), name
    assert torch.equal(dequantize_4bit(back), dequantize_4bit(packed))
    assert (back.shape, back.dtype, back.blocksize) == (packed.shape, packed.dtype, packed.blocksize)


@pytest.mark.parametrize("storage", STORAGES)
def test_the_bytes_under_another_dtype(storage):
    weight = draw(16, 64)
    saved = theirs(weight, "nf4", True, storage)
    ours = to_bnb(quantize_4bit(weight, nested=True), storage)
    assert ours["weight"].dtype == saved["weight"].dtype == storage
    assert ours["weight"].shape == saved["weight"].shape
    assert torch.equal(ours["weight"].view(torch.uint8), saved["weight"].view(torch.uint8))
    assert torch.equal(dequantize_4bit(from_bnb(saved)), dequantize_4bit(from_bnb(ours)))


def test_statistics_that_bitsandbytes_left_in_half_precision():
    """Its layers keep bf16 absmax after ``eval()`` on some CPUs; as written, so read."""
    saved = to_bnb(quantize_4bit(draw(16, 64)))
    saved["weight.absmax"] = saved["weight.absmax"].bfloat16()
    packed = from_bnb(saved)
    assert packed.absmax.dtype == torch.float32
    assert torch.equal(packed.absmax, saved["weight.absmax"].float())


def test_on_the_meta_device():
    saved = to_bnb(quantize_4bit(torch.empty(16, 64, device="meta"), nested=True))
    assert all(tensor.is_meta for tensor in saved.values())
    assert saved["weight"].shape == (512, 1)


def state(**changes: object) -> Tensor:
    values = {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "float32",
        "shape": [16, 64],
        "nested_blocksize": 256,
        "nested_dtype": "float32",
        "nested_offset": 0.5,
    }
    return torch.tensor(list(json.dumps(values | changes).encode()), dtype=torch.uint8)


JSON = STATE + "nf4"
WRONG = {
    "no bytes": ({"weight": None}, "lacks weight"),
    "no absmax": ({"weight.absmax": None}, "lacks weight.absmax"),
    "no state": ({JSON: None}, "lacks exactly one of"),
    "two states": ({STATE + "fp4": state()}, "lacks exactly one of"),
    "half nested": ({"weight.nested_absmax": None}, "lacks weight.nested_absmax"),
    "not JSON": ({JSON: torch.tensor([123, 1], dtype=torch.uint8)}, "not JSON"),
    "not text": ({JSON: torch.tensor([255, 254], dtype=torch.uint8)}, "not JSON"),
    "not an object": ({JSON: torch.tensor(list(b"[1]"), dtype=torch.uint8)}, "is a list"),
    "another type": ({JSON: state(quant_type="fp4")}, "quant_type is 'fp4', not 'nf4'"),
    "a blocksize that there is not": ({JSON: state(blocksize=48)}, "blocksize is 48"),
    "no blocksize": ({JSON: state(blocksize=True)}, "blocksize is True"),
    "a dtype that there is not": ({JSON: state(dtype="int8")}, "dtype is 'int8'"),
    "a negative size": ({JSON: state(shape=[16, -64])}, "shape is"),
    "no shape": ({JSON: state(shape=None)}, "shape is None"),
    "another shape": ({JSON: state(shape=[16, 65])}, "not 520 bytes"),
    "a huge shape": ({JSON: state(shape=[2**40, 2**40])}, "bytes"),
    "no offset": ({JSON: state(nested_offset=None)}, "nested_offset is None"),
    "no inner blocksize": ({JSON: state(nested_blocksize=0)}, "nested_blocksize is 0"),
    "another inner dtype": ({JSON: state(nested_dtype="float16")}, "nested_dtype is 'float16'"),
    "too few bytes": ({"weight": torch.zeros(500, 1, dtype=torch.uint8)}, "500 values of uint8, not 512 bytes"),
    "absmax of another dtype": ({"weight.absmax": torch.ones(16)}, "16 values of float32, not 16 values of uint8"),
    "too few absmax": ({"weight.absmax": torch.zeros(15, dtype=torch.uint8)}, "15 values of uint8, not 16"),
    "too many inner": ({"weight.nested_absmax": torch.ones(2)}, "2 values of float32, not 1"),
    "another map": ({"weight.quant_map": torch.linspace(-1, 1, 16)}, "not the map of nf4"),
    "a short map": ({"weight.quant_map": torch.ones(3)}, "has 3 values, not 16"),
    "another inner map": ({"weight.nested_quant_map": torch.linspace(-1, 1, 256)}, "signed dynamic 8 bits"),
}


@pytest.mark.parametrize("case", WRONG)
def test_each_fault_is_one_clear_error(case):
    changes, said = WRONG[case]
    saved: dict[str, Tensor] = to_bnb(quantize_4bit(draw(16, 64), nested=True))
    from_bnb(saved)
    for key, value in changes.items():
        if value is None:
            del saved[key]
        else:
            saved[key] = value
    with pytest.raises(CheckpointError, match=f"a 4-bit weight.*{said}"):
        from_bnb(saved)


def test_several_faults_are_one_error():
    saved = to_bnb(quantize_4bit(draw(16, 64), nested=True))
    saved[JSON] = state(blocksize=3, dtype="x", shape=7)
    with pytest.raises(CheckpointError, match=r"blocksize is 3.*dtype is 'x'.*shape is 7"):
        from_bnb(saved)


@given(data=st.data())
@settings(max_examples=100)
def test_a_damaged_state_is_a_clear_error_or_none(data):
    """Bytes of the JSON flipped anywhere: read as something that is whole, or refused; never anything else."""
    saved = to_bnb(quantize_4bit(draw(16, 64), nested=True))
    blob = saved[JSON].clone()
    for _ in range(data.draw(st.integers(1, 3))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    saved[JSON] = blob
    try:
        packed = from_bnb(saved)
    except CheckpointError:
        return
    assert dequantize_4bit(packed).shape == packed.shape
