"""``ensure_weight_tying``: which layers follow the embedding, what the config becomes, and what makes no sense."""

import peft
import pytest
import torch
from peer import gradients, in_order, logits, pair, stir
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import deltaw
from deltaw import LoraConfig
from deltaw.adapters import host_layers
from deltaw.adapters.targets import resolve
from deltaw.adapters.tying import find_ties
from deltaw.errors import TargetError

EMBEDDING = "model.embed_tokens"


def t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64, d_model=16, d_ff=24, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    return T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    ("fields", "target_modules", "modules_to_save"),
    [
        ({"target_modules": ["lm_head"]}, {EMBEDDING}, None),
        ({"target_modules": ["embed_tokens", "q_proj"]}, {"embed_tokens", "q_proj"}, None),
        ({"target_modules": ["lm_head", "embed_tokens"]}, {"embed_tokens"}, None),
        ({"target_modules": r".*(lm_head|q_proj)"}, r"(?:.*(lm_head|q_proj)|^model\.embed_tokens$)", None),
        ({"target_modules": r".*embed_tokens"}, r".*embed_tokens", None),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, {"q_proj"}, [EMBEDDING]),
        ({"target_modules": ["q_proj"], "modules_to_save": ["norm", "embed_tokens"]}, {"q_proj"}, None),
    ],
    ids=in_order,
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_the_config_names_the_embedding_alone_as_peft_s_does(make_llama, fields, target_modules, modules_to_save):
    ours, theirs = pair(lambda: make_llama(tied=True), **fields, ensure_weight_tying=True)
    mine, peers = ours.peft_config["default"], theirs.peft_config["default"]
    assert mine.target_modules == target_modules
    if isinstance(target_modules, set):
        assert peers.target_modules - {EMBEDDING} == target_modules - {EMBEDDING}  # PEFT may name it twice
    else:
        assert peers.target_modules == rf"(?:{fields['target_modules']}|^model\.embed_tokens$)"
    assert mine.modules_to_save == (modules_to_save or fields.get("modules_to_save"))
    assert set(mine.modules_to_save or []) | {EMBEDDING} == set(peers.modules_to_save or []) | {EMBEDDING}

    def carriers(model):
        marks = ("lora_dropout", "modules_to_save")
        return {name for name, m in model.named_modules() if any(mark in m._modules for mark in marks)}

    assert carriers(ours) == carriers(theirs)


@pytest.mark.parametrize(
    ("tied", "fields", "words"),
    [
        (False, {"target_modules": ["lm_head"]}, "no layer of LlamaForCausalLM is tied to its input embedding"),
        (True, {"target_modules": "all-linear"}, "neither .* names one of 'model.embed_tokens', 'lm_head'"),
        (
            True,
            {"target_modules": ["embed_tokens"], "exclude_modules": ["embed_tokens"]},
            "match no layer of LlamaForCausalLM",
        ),
        (
            True,
            {"target_modules": ["lm_head", "q_proj"], "exclude_modules": ["embed_tokens"]},
            "needs 'model.embed_tokens', which the config leaves out",
        ),
    ],
    ids=str,
)
def test_a_tie_that_makes_no_sense_is_an_error(make_llama, tied, fields, words):
    base = make_llama(tied=tied)
    with pytest.raises(TargetError, match=words):
        deltaw.get_peft_model(base, LoraConfig(**fields, ensure_weight_tying=True))
    assert not list(host_layers(base))


def test_a_method_that_cannot_tie_says_so(make_llama):
    config = LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True, use_dora=True)
    with pytest.raises(TargetError, match=r"ensure_weight_tying: DORA cannot tie 'lm_head' to 'model\.embed_tokens'"):
        deltaw.get_peft_model(make_llama(tied=True), config)


@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`, but no tied modules:UserWarning")
def test_a_file_s_tie_that_matches_nothing_is_a_note(make_llama, ids, tmp_path, caplog):
    theirs = peft.get_peft_model(make_llama(), peft.LoraConfig(target_modules=["q_proj"], ensure_weight_tying=True))
    stir(theirs).save_pretrained(tmp_path)
    here = deltaw.PeftModel.from_pretrained(make_llama(), tmp_path)
    assert "no layer of LlamaForCausalLM is tied" in caplog.text
    assert torch.allclose(logits(here, ids), logits(theirs, ids), atol=1e-6)


def test_without_it_nothing_is_tied(make_llama):
    model = make_llama(tied=True)
    config = LoraConfig(target_modules=["embed_tokens", "lm_head"])
    assert find_ties(model, config, {}) == find_ties(nn.Linear(1, 1), config, {})
    assert resolve(model, config).tied == {}


def test_an_encoder_and_a_decoder_follow_their_shared_embedding():
    """T5: three embeddings and a head over one weight. PEFT gives the embeddings adapters of their own instead."""
    ids = torch.randint(1, 64, (2, 5))
    model = deltaw.get_peft_model(t5(), LoraConfig(target_modules=["shared"], ensure_weight_tying=True, r=2))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained == [f"base_model.model.shared.lora_embedding_{f}.default" for f in "AB"]
    stir(model)
    grads = gradients(model, ids)
    assert all(grad.any() for grad in grads.values())
    merged = t5()
    weight = merged.shared.weight.detach()
    merged.shared.weight.data = weight + model.get_input_embeddings().adapters["default"].delta_weight().detach()
    with torch.no_grad():
        expected = merged(input_ids=ids, labels=ids).logits
        assert torch.allclose(model(input_ids=ids, labels=ids).logits, expected, atol=1e-5)
    assert expected.shape == (2, 5, 64)
