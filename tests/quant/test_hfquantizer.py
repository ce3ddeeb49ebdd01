"""transformers loads models in four bits through our quantizer: weight by weight, or packed as bitsandbytes packs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import bnb
import pytest
import torch
from moe import tiny_moe
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
)

from deltaw import NF4Config, NF4Linear, load_model, quantize_
from deltaw.errors import ModelError
from deltaw.quant.experts import PackedExperts
from deltaw.quant.hfquantizer import NF4Quantizer
from deltaw.weights import store_of

BOTH = pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
TYPES = pytest.mark.parametrize("quant_type", ["nf4", "fp4"])


def llama(dtype: torch.dtype = torch.bfloat16, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=192,  # rows of whole blocks: bitsandbytes' CPU kernel misreads others
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A dense bf16 Llama in several files."""
    path = tmp_path_factory.mktemp("dense")
    llama().save_pretrained(path, max_shard_size="60KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bitwise: bytes that are viewed as floats may be NaN."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys()
    assert not [key for key in a if not same(a[key], b[key])]


# --- quantized while it is read -----------------------------------------------------------------------------


@TYPES
@BOTH
def test_from_pretrained_packs_as_bitsandbytes_does(folder, quant_type, nested):
    keys = {"bnb_4bit_quant_type": quant_type, "bnb_4bit_use_double_quant": nested}
    ours = AutoModelForCausalLM.from_pretrained(folder, quantization_config=NF4Config(**keys), dtype="auto")
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True, **keys), dtype="auto"
    )
    if (
        nested
    ):  # bitsandbytes' CPU kernel looks the 8-bit codes up in a table of equal steps, and is off by one at times
        for key, absmax in theirs.state_dict().items():
            if key.endswith("weight.absmax"):
                assert (ours.state_dict()[key].int() - absmax.int()).abs().max() <= 1
                absmax.copy_(ours.state_dict()[key])
    assert_same_state(ours, theirs)
    layer = ours.model.layers[0].mlp.down_proj
    assert isinstance(layer, NF4Linear)
    assert type(ours.lm_head) is nn.Linear
    assert ours.dtype == torch.bfloat16
    assert isinstance(ours.hf_quantizer, NF4Quantizer)
    assert ours.is_quantized


def test_it_equals_quantizing_the_loaded_model(folder, ids):
    live = load_model(folder)
    quantize_(live, NF4Config())
    loaded = load_model(folder, quantization_config=NF4Config())
    assert_same_state(loaded, live)
    assert torch.equal(loaded(ids).logits, live(ids).logits)


def test_the_dtype_is_that_of_the_checkpoint_or_the_one_asked_for(folder):
    wide = AutoModelForCausalLM.from_pretrained(folder, quantization_config=NF4Config(), torch_dtype=torch.float32)
    assert wide.model.norm.weight.dtype == torch.float32
    assert store_of(wide.model.layers[0].mlp.up_proj).dtype == torch.float32
    assert load_model(folder, quantization_config=NF4Config(), torch_dtype="float16").dtype == torch.float16


def test_device_map_auto(folder, ids):
    spread = AutoModelForCausalLM.from_pretrained(folder, quantization_config=NF4Config(), device_map="auto")
    assert spread(ids.to(spread.device)).logits.isfinite().all()
    with pytest.raises(ModelError, match="a model in 4 bits is not offloaded"):
        AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=NF4Config(), device_map={"model": "cpu", "lm_head": "disk"}
        )


def test_skipped_modules_stay_dense(folder):
    config = NF4Config(llm_int8_skip_modules=["lm_head", "o_proj", "model.layers.0.mlp"])
    model = load_model(folder, quantization_config=config)
    layers = model.model.layers
    assert type(layers[0].self_attn.o_proj) is type(layers[0].mlp.up_proj) is nn.Linear
    assert isinstance(layers[1].mlp.up_proj, NF4Linear)


def test_tied_embeddings_stay_tied_and_dense(tmp_path):
    llama(tied=True).save_pretrained(tmp_path)
    model = load_model(tmp_path, quantization_config=NF4Config())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path):
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"in 4 bits: model\.layers\.1\.mlp\.up_proj\.weight: .*NaN or infinite"):
        load_model(tmp_path, quantization_config=NF4Config())


def test_gpt2s_layers_are_packed_out_by_in(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=128, n_embd=64, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=2)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    ours = load_model(tmp_path / "dense", quantization_config=NF4Config())
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense",
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        dtype="auto",
    )
    assert_same_state(ours, theirs)
    ours.save_pretrained(tmp_path / "packed")
    assert_same_state(load_model(tmp_path / "packed"), ours)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory in Linux's way")
def test_the_peak_is_the_quantized_model_and_one_shard(folder, tmp_path):
    config = LlamaConfig(
        vocab_size=512, hidden_size=768, intermediate_size=2048, num_hidden_layers=3, num_attention_heads=8
    )
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    dense.save_pretrained(tmp_path, max_shard_size="7MB")
    del dense
    shards = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    assert len(shards) >= 6
    script = Path(__file__).with_name("loading_peak.py")
    told = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(folder)], capture_output=True, text=True, check=True
    )
    found = json.loads(told.stdout.splitlines()[-1])
    assert found["weights"] < sum(shards) / 3
    assert found["peak"] <= found["weights"] + max(shards), {"shards": shards, **found}


# --- files --------------------------------------------------------------------------------------------------


@TYPES
@BOTH
@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_folders_of_bitsandbytes_load_here(folder, tmp_path, quant_type, nested, storage):
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_quant_storage=storage,
        bnb_4bit_compute_dtype="bfloat16",
        llm_int8_skip_modules=["lm_head", "o_proj"],
    )
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype="auto")
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert_same_state(ours, theirs)
    assert type(ours.model.layers[0].self_attn.o_proj) is nn.Linear
    for name, module in ours.named_modules():
        if isinstance(module, NF4Linear):
            weight = theirs.get_submodule(name).weight
            assert torch.equal(store_of(module).dequantize(), bnb.dequantize(weight.data, weight.quant_state))
            assert module.compute_dtype == torch.bfloat16
    # what is not packed follows the dtype that is asked for, though the bytes are kept in the file's
    assert load_model(tmp_path, dtype="float32").model.norm.weight.dtype == torch.float32


def test_bitsandbytes_is_not_needed(folder, tmp_path):
    config = BitsAndBytesConfig(load_in_4bit=True)
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).save_pretrained(tmp_path)
    script = (
        "import sys; from deltaw import load_model; model = load_model(sys.argv[1]); "
        "print(type(model.model.layers[0].mlp.up_proj).__name__, 'bitsandbytes' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["NF4Linear", "False"]


@TYPES
@BOTH
def test_our_folders_load_in_transformers_with_bitsandbytes(folder, tmp_path, quant_type, nested):
    config = NF4Config(bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=nested)
    ours = load_model(folder, quantization_config=config)
    ours.eval().save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (said["quant_method"], said["load_in_4bit"]) == ("bitsandbytes", True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs.model.layers[0].mlp.up_proj) is bnb.bitsandbytes.nn.Linear4bit
    assert_same_state(ours, theirs)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_are_packed_while_loading_and_saved_as_they_are(kind, tmp_path, ids):
    dense = tiny_moe(kind, torch.bfloat16)
    dense.save_pretrained(tmp_path / "dense", max_shard_size="60KB")
    live = load_model(tmp_path / "dense")
    quantize_(live, NF4Config(bnb_4bit_use_double_quant=True))
    loaded = load_model(tmp_path / "dense", quantization_config=NF4Config(bnb_4bit_use_double_quant=True))
    assert any(isinstance(module, PackedExperts) for module in loaded.modules())
    assert_same_state(loaded, live)
    for number, model in enumerate((loaded, live)):
        model.save_pretrained(tmp_path / str(number))
        again = load_model(tmp_path / str(number))
        assert_same_state(again, model)
        assert torch.equal(again(ids).logits, live(ids).logits)
    # transformers has no 4-bit experts: it says so instead of taking the bytes for numbers
    with pytest.raises(RuntimeError, match="mismatched"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "0")


def test_a_mixture_for_bitsandbytes_keeps_its_experts_in_full(tmp_path):
    tiny_moe("mixtral", torch.bfloat16).save_pretrained(tmp_path / "dense")
    config = NF4Config(llm_int8_skip_modules=["lm_head", "experts"])
    ours = load_model(tmp_path / "dense", quantization_config=config)
    ours.save_pretrained(tmp_path / "packed")
    assert_same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "packed"), ours)


def test_layers_left_by_quantize_are_said_in_the_folder(tmp_path):
    model = llama()
    quantize_(model, NF4Config(), skip=["v_proj"])
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs.model.layers[0].self_attn.v_proj) is nn.Linear
    assert_same_state(model, theirs)


def test_experts_that_were_packed_one_by_one_are_refused(tmp_path):
    quantized = load_model(_saved(tiny_moe("mixtral"), tmp_path / "dense"), quantization_config=NF4Config())
    quantized.save_pretrained(tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.block_sparse_moe.experts.0.w1.weight.absmax"] = torch.zeros(4)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"experts in 4 bits one by one .*experts\.0\.w1.*NF4Config"):
        load_model(tmp_path / "packed")


def test_a_damaged_folder_is_one_error(folder, tmp_path):
    load_model(folder, quantization_config=NF4Config()).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    first, second = (f"model.layers.{i}.mlp.down_proj.weight" for i in range(2))
    tensors[f"{first}.absmax"] = tensors[f"{first}.absmax"][:-3].clone()
    del tensors[f"{second}.quant_map"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"{first}: .*absmax is 189 values.*; {second}: .*lacks weight.quant_map"):
        load_model(tmp_path)


def test_dequantize_gives_an_ordinary_model(folder, tmp_path, ids):
    model = load_model(folder, quantization_config=NF4Config(bnb_4bit_use_double_quant=True))
    logits = model(ids).logits
    plain = model.dequantize()
    assert not any(isinstance(module, NF4Linear) for module in plain.modules())
    assert torch.equal(plain(ids).logits, logits)
    plain.save_pretrained(tmp_path)
    assert not hasattr(AutoConfig.from_pretrained(tmp_path), "quantization_config")


def test_generation(folder, ids):
    model = load_model(folder, quantization_config=NF4Config())
    out = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert out.shape[1] <= ids.shape[1] + 5
    assert torch.equal(out, model.generate(ids, max_new_tokens=5, do_sample=False))


def _saved(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)  # type: ignore[operator]
    return folder
