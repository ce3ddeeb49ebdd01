"""LoRA on embeddings: the formula, PEFT's numbers, names and files, scaled and resized ones."""

import math

import hypothesis.strategies as st
import peft
import pytest
import torch
from architectures import build
from hypothesis import given, settings
from peer import close, gradients, logits, pair, stir
from safetensors.torch import load_file
from torch import nn

import deltaw
from deltaw import LoraConfig, PeftModel
from deltaw.adapters import Embedding, LoraEmbedding, host_layers
from deltaw.errors import CheckpointError, ConfigError

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

FIELDS = [
    {"target_modules": ["embed_tokens"]},
    {"target_modules": ["embed_tokens", "q_proj"], "use_rslora": True, "r": 4, "lora_alpha": 3},
    {"target_modules": ["embed_tokens", "lm_head"], "rank_pattern": {"embed_tokens": 2}, "lora_dropout": 0.1},
    {"target_modules": r".*(embed_tokens|v_proj)", "init_lora_weights": False},
    {"target_modules": ["embed_tokens", "q_proj"], "init_lora_weights": "gaussian", "bias": "lora_only"},
]
BUILDERS = ["llama", "gemma3"]  # Gemma's embedding scales its rows


def made(name, dtype=torch.float32):
    return build(name).to(dtype)


def lora(vocabulary=7, d=5, dtype=torch.float32, base=None, **fields) -> Embedding:
    host = Embedding(nn.Embedding(vocabulary, d, dtype=dtype) if base is None else base)
    host.add(LoraEmbedding, "a", LoraConfig(**fields), "layer")
    host.set_active(["a"])
    return host


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 9)),
    r=st.integers(1, 12),
    alpha=st.one_of(st.integers(-20, 64), st.floats(0.1, 50)),
    rslora=st.booleans(),
    lead=st.lists(st.integers(1, 3), max_size=3),
    padded=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_update_is_the_formula_and_merging_is_the_forward(shape, r, alpha, rslora, lead, padded, dtype):
    base = nn.Embedding(*shape, padding_idx=0 if padded else None, dtype=dtype)
    host = lora(base=base, r=r, lora_alpha=alpha, use_rslora=rslora, init_lora_weights=False)
    A, B = host.lora_embedding_A["a"], host.lora_embedding_B["a"]
    assert (A.shape, B.shape) == ((r, shape[0]), (shape[1], r))
    s = alpha / (math.sqrt(r) if rslora else r)
    delta = host.adapters["a"].delta_weight()
    tolerance = 1e-5 * (1 + abs(s) * r)
    assert torch.allclose(delta, s * (B @ A).T, atol=tolerance)
    ids = torch.randint(shape[0], lead)
    out = host(ids)
    assert out.shape == (*lead, shape[1])
    assert torch.allclose(out, (base.weight + delta)[ids], atol=tolerance)
    before = host.weight.detach().clone()
    host.merge(["a"])
    assert torch.allclose(host(ids), out, atol=tolerance)
    host.unmerge()
    assert torch.equal(host.weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BUILDERS)
def test_the_start_is_the_base_bitwise(name, dtype, ids):
    ids = ids % 64
    model = deltaw.get_peft_model(made(name, dtype), LoraConfig(target_modules=["embed_tokens", "q_proj"]))
    assert torch.equal(logits(model, ids), logits(made(name, dtype), ids))
    host = model.get_input_embeddings()
    assert not host.lora_embedding_A["default"].any()
    assert host.lora_embedding_B["default"].std() > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("init", [True, "gaussian", False])
@pytest.mark.parametrize("cast", [True, False])
def test_one_seed_gives_peft_s_adapter(make_llama, dtype, init, cast):
    fields = {"target_modules": ["embed_tokens", "v_proj"], "init_lora_weights": init, "r": 4}
    torch.manual_seed(3)
    theirs = peft.get_peft_model(make_llama(dtype), peft.LoraConfig(**fields), autocast_adapter_dtype=cast)
    torch.manual_seed(3)
    ours = deltaw.get_peft_model(make_llama(dtype), LoraConfig(**fields), autocast_adapter_dtype=cast)
    for (name, a), (other, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other
        assert a.dtype == b.dtype == (torch.float32 if cast and "lora_" in name else dtype)
        assert a.requires_grad == b.requires_grad
        assert torch.equal(a, b), name


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.parametrize("name", BUILDERS)
def test_forward_gradients_merge_and_files_are_peft_s(name, fields, ids, tmp_path):
    ids = ids % 64
    ours, theirs = pair(lambda: made(name), **fields)
    start = logits(made(name), ids)
    stir(ours.eval()), stir(theirs.eval())
    apart = logits(ours, ids)
    assert not close(apart, start, 1e-2)
    assert close(apart, logits(theirs, ids))
    mine, peers = gradients(ours, ids), gradients(theirs, ids)
    assert mine.keys() == peers.keys()
    for key in mine:
        assert close(mine[key], peers[key], 5e-5), key

    ours.save_pretrained(tmp_path / "ours"), theirs.save_pretrained(tmp_path / "theirs")
    mine, peers = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert mine.keys() == peers.keys()
    assert all(torch.equal(mine[key], peers[key]) for key in mine)
    assert "base_model.model.model.embed_tokens.base_layer.weight" in mine
    here = PeftModel.from_pretrained(made(name), tmp_path / "theirs", low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in here.parameters())
    assert torch.equal(logits(here, ids), apart)
    assert close(logits(peft.PeftModel.from_pretrained(made(name), tmp_path / "ours"), ids), apart)

    before = ours.get_input_embeddings().weight.detach().clone()
    ours.merge_adapter(), theirs.merge_adapter()
    if name == "llama" or "lm_head" not in fields["target_modules"]:  # PEFT adds both updates to Gemma's tied weight
        assert torch.equal(ours.get_input_embeddings().weight, theirs.base_model.model.get_input_embeddings().weight)
    assert close(logits(ours, ids), apart, 1e-5)
    ours.unmerge_adapter()
    assert torch.equal(ours.get_input_embeddings().weight, before)
    assert torch.equal(logits(ours, ids), apart)


@pytest.mark.parametrize("name", BUILDERS)
def test_bf16_is_as_near_to_float32_as_peft_is_and_merges_to_its_forward(name, ids):
    ids, fields = ids % 64, {"target_modules": ["embed_tokens", "up_proj"], "lora_alpha": 4}
    ours, theirs = pair(lambda: made(name, torch.bfloat16), **fields)
    exact, _ = pair(lambda: made(name, torch.bfloat16).float(), **fields)
    for (_, a), (_, b) in zip(exact.named_parameters(), ours.named_parameters(), strict=True):
        a.data = b.data.float().clone()
    for model in (ours, theirs, exact):
        stir(model)
    right = logits(exact, ids)
    error = (logits(ours, ids) - right).abs().mean()
    assert error <= 1.25 * (logits(theirs, ids) - right).abs().mean()
    assert close(logits(ours, ids), logits(theirs, ids), 0.02)
    apart = logits(ours, ids)
    ours.merge_adapter()
    assert close(logits(ours, ids), apart, 0.03)


def test_only_the_rows_that_are_named_get_a_gradient_and_the_padding_row_none():
    host = lora(base=nn.Embedding(9, 4, padding_idx=2), r=3, init_lora_weights=False)
    host(torch.tensor([[1, 2, 5]])).sum().backward()
    grad = host.lora_embedding_A["a"].grad
    assert grad[:, [1, 5]].all()
    assert not grad[:, [0, 2, 3, 4, 6, 7, 8]].any()


def test_an_embedding_that_scales_its_gradients():
    ids, grads = torch.tensor([[1, 1, 2]]), {}
    for scaled in (False, True):
        for library in (deltaw, peft):
            torch.manual_seed(0)
            net = nn.ModuleDict({"table": nn.Embedding(5, 4, scale_grad_by_freq=scaled)})
            config = library.LoraConfig(target_modules=["table"], r=2, init_lora_weights=False)
            library.inject_adapter_in_model(config, net)["table"](ids).sum().backward()
            grads[scaled, library] = net["table"].lora_embedding_A["default"].grad
        assert torch.allclose(grads[scaled, deltaw], grads[scaled, peft])
    assert not torch.allclose(grads[True, peft], grads[False, peft])


def test_autocast_and_dropout_leave_an_embedding_as_peft_has_it(make_llama, ids):
    ours, theirs = pair(make_llama, target_modules=["embed_tokens"], lora_dropout=0.5)
    stir(ours.train()), stir(theirs.train())
    assert close(logits(ours, ids), logits(theirs, ids))  # no dropout here
    with torch.autocast("cpu", torch.bfloat16):
        ours(input_ids=ids, labels=ids).loss.backward()
    grads = [p.grad for n, p in ours.named_parameters() if "lora_" in n]
    assert all(g is not None and g.dtype == torch.float32 and g.any() for g in grads)


def test_a_bias_of_its_own_is_refused(llama):
    with pytest.raises(ConfigError, match=r"lora_bias=True, but 'model\.embed_tokens' is an embedding"):
        deltaw.get_peft_model(llama, LoraConfig(target_modules=["embed_tokens"], lora_bias=True))
    assert not list(host_layers(llama))


def test_two_adapters_one_of_them_on_the_embedding(make_llama, ids, tmp_path):
    """The other one's file brings no embedding."""
    model = deltaw.get_peft_model(make_llama(), LoraConfig(target_modules=["embed_tokens", "q_proj"]))
    model.add_adapter("b", LoraConfig(target_modules=["q_proj"]))
    stir(stir(model), adapter="b").save_pretrained(tmp_path)
    assert not any("embed" in key for key in load_file(tmp_path / "b" / "adapter_model.safetensors"))
    model.set_adapter(["default", "b"])
    base, update = make_llama(), model.get_input_embeddings().adapters["default"].delta_weight()
    assert torch.allclose(
        model.get_input_embeddings()(ids), (base.get_input_embeddings().weight + update)[ids], atol=1e-6
    )


# --- files with the base's embedding in them ----------------------------------------------------------------------


def test_the_file_holds_the_embedding_without_what_is_merged_into_it(make_llama, ids, tmp_path):
    model = stir(deltaw.get_peft_model(make_llama(), LoraConfig(target_modules=["embed_tokens"])))
    apart = logits(model, ids)
    model.merge_adapter()
    merged = model.get_input_embeddings().weight.detach().clone()
    model.save_pretrained(tmp_path)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(saved[key], make_llama().model.embed_tokens.weight)
    assert torch.equal(model.get_input_embeddings().weight, merged)
    assert torch.equal(logits(PeftModel.from_pretrained(make_llama(), tmp_path), ids), apart)
    model.load_adapter(tmp_path, "again")  # the same embedding: it stays merged
    assert torch.equal(model.get_input_embeddings().weight, merged)
    other = make_llama()
    other.model.embed_tokens.weight.data += 1
    stir(deltaw.get_peft_model(other, LoraConfig(target_modules=["embed_tokens"]))).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"not the base's, which has adapters merged.*unmerge_adapter\(\) first"):
        model.load_adapter(tmp_path / "other", "other")
    assert torch.equal(model.get_input_embeddings().weight, merged)


@pytest.mark.parametrize("save_embedding_layers", ["auto", True, False])
def test_what_is_saved_of_the_embeddings(make_llama, ids, tmp_path, save_embedding_layers):
    ours, theirs = pair(make_llama, target_modules=["embed_tokens", "q_proj"])
    apart = logits(stir(ours), ids)
    stir(theirs)
    ours.save_pretrained(tmp_path / "ours", save_embedding_layers=save_embedding_layers)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=save_embedding_layers)
    mine, peers = (load_file(tmp_path / who / "adapter_model.safetensors").keys() for who in ("ours", "theirs"))
    head = {"base_model.model.lm_head.weight"} if save_embedding_layers is True else set()  # asked for, so both
    assert mine - peers == head
    assert peers <= mine
    for who in ("ours", "theirs"):
        assert torch.equal(logits(PeftModel.from_pretrained(make_llama(), tmp_path / who), ids), apart)


def test_where_rows_train_the_embedding_is_not_saved(make_llama, ids, tmp_path):
    fields = {"target_modules": ["embed_tokens", "q_proj"], "trainable_token_indices": {"lm_head": [3, 5]}}
    ours, theirs = pair(make_llama, **fields)
    apart = logits(stir(ours), ids)
    stir(theirs)
    ours.save_pretrained(tmp_path / "ours"), theirs.save_pretrained(tmp_path / "theirs")
    mine, peers = (load_file(tmp_path / who / "adapter_model.safetensors").keys() for who in ("ours", "theirs"))
    assert mine == peers
    assert not any("embed_tokens.base_layer" in key for key in mine)
    for who in ("ours", "theirs"):
        assert close(logits(PeftModel.from_pretrained(make_llama(), tmp_path / who), ids), apart)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ensure", [False, True])
def test_a_resized_vocabulary_travels_with_an_adapter_on_it(make_llama, tmp_path, tied, ensure):
    if ensure and not tied:
        pytest.skip("nothing is tied")
    make_llama(tied=tied).save_pretrained(tmp_path / "base")

    def resized(seed):
        model = make_llama(tied=tied)
        torch.manual_seed(seed)  # of the new rows
        model.resize_token_embeddings(133, mean_resizing=False)
        model.name_or_path = str(tmp_path / "base")
        return model

    ids = torch.arange(120, 133)[None]
    ours, theirs = pair(lambda: resized(5), target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=ensure)
    apart = logits(stir(ours), ids)
    for name, parameter in theirs.named_parameters():
        if name in dict(ours.named_parameters()):
            parameter.data.copy_(ours.get_parameter(name))
    ours.save_pretrained(tmp_path / "ours"), theirs.save_pretrained(tmp_path / "theirs")
    assert torch.equal(logits(PeftModel.from_pretrained(resized(6), tmp_path / "ours"), ids), apart)
    assert close(logits(peft.PeftModel.from_pretrained(resized(6), tmp_path / "ours"), ids), apart)
    if tied:  # PEFT leaves the new rows of an untied head out
        assert torch.equal(logits(PeftModel.from_pretrained(resized(6), tmp_path / "theirs"), ids), apart)
    with pytest.raises(CheckpointError, match=r"embed_tokens.*\(133, 32\) in the file, \(128, 32\)"):
        PeftModel.from_pretrained(make_llama(tied=tied), tmp_path / "ours")


def test_a_vocabulary_resized_beside_the_adapter(make_llama, tmp_path):
    """Adapters elsewhere: the embedding may grow after they were put on; on it, transformers refuses loudly."""
    make_llama().save_pretrained(tmp_path / "base")
    base = make_llama()
    base.name_or_path = str(tmp_path / "base")
    model = stir(deltaw.get_peft_model(base, LoraConfig(target_modules=["q_proj"])))
    model.get_base_model().resize_token_embeddings(131, mean_resizing=False)
    ids = torch.arange(120, 131)[None]
    apart = logits(model, ids)
    model.save_pretrained(tmp_path / "ours")
    for library in (deltaw, peft):
        fresh = make_llama()
        fresh.resize_token_embeddings(131, mean_resizing=False)
        assert close(logits(library.PeftModel.from_pretrained(fresh, tmp_path / "ours"), ids), apart)
    model = deltaw.get_peft_model(make_llama(), LoraConfig(target_modules=["embed_tokens"]))
    with pytest.raises(TypeError, match=r"not an instance of .*Embedding"):
        model.get_base_model().resize_token_embeddings(131)
