"""LoRA shared between tied layers: one set of factors, PEFT's start and files, merged weights that stay tied."""

import copy

import peft
import pytest
import torch
from peer import close, gradients, logits, pair, same_state, state, stir
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import deltaw
from deltaw import LoraConfig, PeftModel
from deltaw.adapters import host_layers
from deltaw.errors import CheckpointError, ConfigError

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning"),
]

FIELDS = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True, "r": 4, "lora_alpha": 6}
HEAD = "base_model.model.lm_head."
TABLE = "base_model.model.model.embed_tokens."


@pytest.fixture
def tied(make_llama):
    return lambda dtype=torch.float32: make_llama(dtype, tied=True)


def same(ours, theirs):
    """Copies our parameters into PEFT's model, whose head shares the memory of the embedding's factors."""
    mine = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name in mine:
                parameter.copy_(mine[name])
    return ours, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_one_seed_gives_peft_s_adapter_and_the_base_s_output(tied, ids, dtype, init):
    ours, theirs = pair(lambda: tied(dtype), **FIELDS, init_lora_weights=init)
    mine, peers = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert peers.keys() - mine.keys() == {f"{HEAD}lora_{f}.default.weight" for f in "AB"}  # PEFT has them twice
    assert all(torch.equal(mine[name], peers[name]) for name in mine)
    assert torch.equal(mine[f"{TABLE}lora_embedding_B.default"], peers[f"{HEAD}lora_A.default.weight"].T)
    if init is not False:
        assert torch.equal(logits(ours, ids), logits(tied(dtype), ids))


def test_forward_is_peft_s_and_the_gradient_the_sum_of_both_places(tied, ids):
    ours, theirs = pair(tied, **FIELDS)
    same(stir(ours), theirs)
    assert close(logits(ours, ids), logits(theirs, ids))
    mine, peers = gradients(ours, ids), gradients(theirs, ids)
    for name, grad in mine.items():
        expected = peers[name]
        if name.startswith(TABLE):
            factor = "B" if "_A" in name else "A"
            expected = expected + peers[f"{HEAD}lora_{factor}.default.weight"].T
        assert close(grad, expected, 5e-5), name


@pytest.mark.parametrize("lean", [False, True])
def test_files_both_ways(tied, ids, tmp_path, lean):
    ours, theirs = pair(tied, **FIELDS)
    same(stir(ours), theirs)
    apart = logits(ours, ids)
    ours.save_pretrained(tmp_path / "ours"), theirs.save_pretrained(tmp_path / "theirs")
    mine, peers = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert mine.keys() == peers.keys()
    assert all(torch.equal(mine[key], peers[key]) for key in mine)
    here = PeftModel.from_pretrained(tied(), tmp_path / "theirs", low_cpu_mem_usage=lean)
    assert torch.equal(logits(here, ids), apart)
    assert not any(p.is_meta for p in here.parameters())
    assert close(logits(peft.PeftModel.from_pretrained(tied(), tmp_path / "ours"), ids), apart)


def test_a_file_whose_places_differ_is_refused_with_the_cure(tied, ids, tmp_path):
    """PEFT's own in half precision, where its tie comes apart."""
    theirs = stir(peft.get_peft_model(tied(torch.bfloat16), peft.LoraConfig(**FIELDS)))
    theirs.save_pretrained(tmp_path)
    base = tied(torch.bfloat16)
    before = state(base)
    with pytest.raises(CheckpointError, match=r"lm_head.lora_A.weight differs from .*lora_embedding_B, but here they"):
        PeftModel.from_pretrained(base, tmp_path)
    assert same_state(base, before)
    config = LoraConfig.from_pretrained(tmp_path)
    config.ensure_weight_tying = False
    config.target_modules = ["embed_tokens", "q_proj", "lm_head"]
    here = PeftModel.from_pretrained(base, tmp_path, config=config)
    assert close(logits(here, ids), logits(theirs, ids), 0.02)


def test_merged_weights_stay_tied_and_come_out_bitwise(tied, ids, tmp_path, caplog):
    base = tied()
    weight = base.lm_head.weight
    before = weight.detach().clone()
    model = stir(deltaw.get_peft_model(base, LoraConfig(**FIELDS)))
    delta = model.get_input_embeddings().adapters["default"].delta_weight()
    apart = logits(model, ids)
    model.merge_adapter()
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert torch.equal(base.lm_head.weight, before + delta)
    assert close(logits(model, ids), apart, 1e-5)
    assert not caplog.text
    model.unmerge_adapter()
    assert base.lm_head.weight is base.model.embed_tokens.weight is weight
    assert torch.equal(weight, before)
    assert torch.equal(logits(model, ids), apart)
    for merged_before in (False, True):
        copied = copy.deepcopy(model)
        if merged_before:
            copied.merge_adapter()
        plain = copied.merge_and_unload()
        assert plain.lm_head.weight is plain.model.embed_tokens.weight
        assert plain.config.tie_word_embeddings
        assert close(logits(plain, ids), apart, 1e-5)
    plain.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), logits(plain, ids))


def test_a_second_merge_that_is_not_tied_parts_them(tied, ids, caplog):
    model = stir(deltaw.get_peft_model(tied(), LoraConfig(**FIELDS)))
    model.add_adapter("b", LoraConfig(target_modules=["lm_head"], r=2))
    stir(model, adapter="b").set_adapter(["default", "b"])
    apart, base = logits(model, ids), model.get_base_model()
    before, weight = state(tied()), base.lm_head.base_layer.weight
    model.merge_adapter(["default"])
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert not caplog.text
    model.merge_adapter(["b"])
    assert "lm_head was tied to" in caplog.text
    assert base.lm_head.weight is not base.model.embed_tokens.weight
    assert close(logits(model, ids), apart, 1e-5)
    model.unmerge_adapter(["b"])
    assert torch.equal(base.lm_head.weight, base.model.embed_tokens.weight)
    model.unmerge_adapter()
    assert base.lm_head.weight is base.model.embed_tokens.weight is weight
    assert torch.equal(weight, before["lm_head.weight"])
    assert torch.equal(logits(model, ids), apart)
    plain = model.merge_and_unload(adapter_names=["default", "b"])
    assert not plain.config.tie_word_embeddings
    assert close(logits(plain, ids), apart, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_keeps_both_places_one(tied, ids, dtype):
    model = deltaw.get_peft_model(tied(dtype), LoraConfig(**FIELDS)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    start = model(input_ids=ids, labels=ids).loss.item()
    for _ in range(5):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert model(input_ids=ids, labels=ids).loss.item() < start
    base = model.get_base_model()
    table, head = base.model.embed_tokens.adapters["default"], base.lm_head.adapters["default"]
    assert torch.equal(table.delta_weight(), head.delta_weight())
    assert torch.equal(head.factors().A.T, table.lora_B)
    assert not list(head.parameters())


def test_a_copy_is_on_its_own(tied, ids):
    model = stir(deltaw.get_peft_model(tied(), LoraConfig(**FIELDS)))
    apart, other = logits(model, ids), copy.deepcopy(model)
    stir(other, 0.5)
    assert torch.equal(logits(model, ids), apart)
    base = other.get_base_model()
    assert torch.equal(
        base.lm_head.adapters["default"].delta_weight(), base.model.embed_tokens.adapters["default"].delta_weight()
    )


def test_it_comes_off_without_a_trace(tied):
    base = tied()
    before, modules = state(base), list(base.named_modules())
    model = stir(deltaw.get_peft_model(base, LoraConfig(**FIELDS)))
    model.add_adapter("b", LoraConfig(target_modules=["lm_head"]))
    model.delete_adapter("default")
    assert [path for path, _ in host_layers(base)] == ["lm_head"]
    model.unload()
    assert same_state(base, before)
    assert list(base.named_modules()) == modules


def test_starts_from_the_base_weight_are_refused(tied):
    base = tied()
    before = state(base)
    with pytest.raises(ConfigError, match="ensure_weight_tying with init_lora_weights='pissa': 'lm_head' shares"):
        deltaw.get_peft_model(base, LoraConfig(**FIELDS, init_lora_weights="pissa"))
    assert same_state(base, before)


# --- modules_to_save --------------------------------------------------------------------------------------------

SAVED = {"target_modules": ["q_proj"], "ensure_weight_tying": True}


@pytest.mark.parametrize("named", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trained_copy_is_one_in_both_places(tied, ids, tmp_path, named, dtype):
    ours, theirs = pair(lambda: tied(dtype), **SAVED, modules_to_save=[named])
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    base = ours.get_base_model()
    assert base.lm_head.weight is base.model.embed_tokens.weight
    stir(ours), stir(theirs)
    assert close(logits(ours, ids), logits(theirs, ids), 1e-6 if dtype == torch.float32 else 0.02)
    if dtype == torch.float32:
        mine, peers = gradients(ours, ids), gradients(theirs, ids)
        assert mine.keys() == peers.keys()
        assert all(close(mine[name], peers[name], 5e-5) for name in mine)
    ours.save_pretrained(tmp_path / "ours"), theirs.save_pretrained(tmp_path / "theirs")
    mine, peers = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert mine.keys() == peers.keys() >= {f"{HEAD}weight", f"{TABLE}weight"}
    here = PeftModel.from_pretrained(tied(dtype), tmp_path / "theirs")
    assert close(logits(here, ids), logits(theirs, ids), 1e-6 if dtype == torch.float32 else 0.02)
    there = peft.PeftModel.from_pretrained(tied(dtype), tmp_path / "ours")
    assert close(logits(there, ids), logits(ours, ids), 1e-6 if dtype == torch.float32 else 0.02)

    apart = logits(ours, ids)
    plain = ours.merge_and_unload()
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert plain.config.tie_word_embeddings
    assert close(logits(plain, ids), apart, 1e-5 if dtype == torch.float32 else 0.03)
    plain.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=dtype)
    assert close(logits(again, ids), apart, 1e-5 if dtype == torch.float32 else 0.03)


def test_two_copies_that_differ_are_refused(tied, tmp_path):
    model = stir(deltaw.get_peft_model(tied(), LoraConfig(**SAVED, modules_to_save=["embed_tokens"])))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors[f"{HEAD}weight"] += 1
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from .*embed_tokens.weight"):
        PeftModel.from_pretrained(tied(), tmp_path)


def test_copies_trained_apart_untie_the_plain_model(tied, ids, tmp_path, caplog):
    model = deltaw.get_peft_model(
        tied(), LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    )
    apart = logits(stir(model), ids)
    plain = model.merge_and_unload()
    assert "was tied to other weights" in caplog.text
    assert not plain.config.tie_word_embeddings
    plain.save_pretrained(tmp_path)
    assert close(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), apart, 1e-5)
