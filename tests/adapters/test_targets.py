"""Which layers a config means: PEFT's choice, and errors that name the nearest layer."""

import logging
from types import SimpleNamespace

import peft
import pytest
import torch
from architectures import ARCHITECTURES, build
from peer import adapted
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
)

import deltaw
from deltaw import LoraConfig
from deltaw.adapters.targets import CUSTOMARY_TARGETS, resolve
from deltaw.errors import TargetError

LAYERS = ["q_proj", "v_proj"]
GPT2_CONFIG = GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=1, n_positions=16, bos_token_id=1, eos_token_id=2)
BERT_CONFIG = BertConfig(
    vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, pad_token_id=0
)

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")


def chosen(model, **fields):
    return set(resolve(model, LoraConfig(**fields)).adapted)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": LAYERS},
        {"target_modules": ["layers.1.mlp.up_proj", "q_proj"]},
        {"target_modules": r".*\.1\.self_attn\.(q|k)_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": "ALL-LINEAR", "exclude_modules": ["gate_proj"]},
        {"target_modules": "all-linear", "modules_to_save": ["up_proj"]},
        {"target_modules": None},
        {"target_modules": [*LAYERS, "lm_head"]},
        {"target_modules": LAYERS, "exclude_modules": ["v_proj"]},
        {"target_modules": LAYERS, "exclude_modules": r".*layers\.0\..*"},
        {"target_modules": LAYERS, "layers_to_transform": 1},
        {"target_modules": LAYERS, "layers_to_transform": [0, 1]},
        {"target_modules": LAYERS, "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "mlp.up_proj"], "modules_to_save": ["mlp"], "exclude_modules": ["mlp"]},
    ],
    ids=str,
)
def test_the_same_layers_as_peft(make_llama, fields):
    theirs = peft.get_peft_model(make_llama(), peft.LoraConfig(**fields))
    strict = "mlp.up_proj" not in str(fields)
    ours = {f"base_model.model.{n}" for n in resolve(make_llama(), LoraConfig(**fields), strict=strict).adapted}
    assert ours == adapted(theirs)


@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_same_layers_as_peft_in_each_architecture(name, targets):
    theirs = peft.get_peft_model(build(name), peft.LoraConfig(target_modules=targets))
    ours = deltaw.get_peft_model(build(name), LoraConfig(target_modules=targets))
    assert adapted(ours) == adapted(theirs)


def test_customary_targets_are_peft_s():
    theirs = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert theirs == CUSTOMARY_TARGETS


def test_customary_names_of_another_kind_of_the_same_model_are_no_error():
    """BLIP-2 has a T5 or an OPT inside, and the customary layers of both."""
    net = nn.ModuleDict({"q_proj": nn.Linear(2, 2), "v_proj": nn.Linear(2, 2), "fc": nn.Linear(2, 2)})
    net.config = SimpleNamespace(model_type="blip-2")
    config = LoraConfig()
    assert set(resolve(net, config).adapted) == {"q_proj", "v_proj"}
    assert config.target_modules == {"q", "v", "q_proj", "v_proj"}
    net.config = SimpleNamespace(model_type="gemma4")
    net["language_model"] = nn.ModuleDict({"layer": nn.ModuleDict({"q_proj": nn.Linear(2, 2)})})
    nested = nn.ModuleDict({"model": net})
    nested.config = net.config
    assert chosen(nested, target_modules=None) == {"model.language_model.layer.q_proj"}


@pytest.mark.parametrize("targets", [None, "all-linear", ["wte", "c_fc"], ["word_embeddings", "query"]])
@pytest.mark.parametrize(
    ("model", "config", "task"),
    [(GPT2LMHeadModel, GPT2_CONFIG, "CAUSAL_LM"), (BertForSequenceClassification, BERT_CONFIG, "SEQ_CLS")],
)
def test_layers_of_other_kinds_are_chosen_as_peft_chooses_them(model, config, task, targets):
    if isinstance(targets, list) and ("wte" in targets) != (task == "CAUSAL_LM"):
        pytest.skip("names of the other model")
    fields = {"target_modules": targets, "task_type": task}
    theirs = peft.get_peft_model(model(config), peft.LoraConfig(**fields))
    assert adapted(deltaw.get_peft_model(model(config), LoraConfig(**fields))) == adapted(theirs)


def test_the_choice_is_written_back_as_the_shortest_names(llama):
    config = LoraConfig(target_modules="all-linear", exclude_modules=r".*layers\.0\.mlp.*")
    resolve(llama, config)
    assert "model.layers.1.mlp.up_proj" in config.target_modules  # "up_proj" would mean layer 0 too
    config = LoraConfig()
    resolve(llama, config)
    assert config.target_modules == {"q_proj", "v_proj"}
    assert config.target_modules is not CUSTOMARY_TARGETS["llama"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"target_modules": ["q_prj"]}, r"\['q_prj'\].*LlamaForCausalLM; did you mean 'q_proj'"),
        ({"target_modules": ["q_proj", "vv_proj"]}, "'vv_proj' matches no layer.*did you mean 'v_proj'"),
        ({"target_modules": ["xyz"]}, "its layers are .*q_proj"),
        ({"target_modules": ".*nothing"}, "'.*nothing' match no layer.*its layers are"),
        ({"target_modules": []}, r"target_modules \[\] match no layer"),
        ({"target_modules": LAYERS, "exclude_modules": LAYERS}, "with exclude_modules="),
        ({"target_modules": LAYERS, "exclude_modules": ["x_proj"]}, r"exclude_modules .* matches no module"),
        (
            {"target_modules": LAYERS, "layers_to_transform": [1, 9]},
            r"layers_to_transform 9 .*layers are 0 to 1",
        ),
        ({"target_modules": LAYERS, "layers_to_transform": [9]}, r"\(with layers_to_transform=\[9\]\)"),
        ({"target_modules": LAYERS, "rank_pattern": {"q_prj": 2}}, "rank_pattern key 'q_prj'.*mean 'q_proj'"),
        (
            {"target_modules": LAYERS, "alpha_pattern": {"up_proj": 2}},
            "alpha_pattern key 'up_proj' matches no",
        ),
        (
            {"target_modules": LAYERS, "modules_to_save": ["lm_hed"]},
            "modules_to_save entry 'lm_hed'.*'lm_head'",
        ),
        ({"target_modules": ["norm"]}, "'model.norm', a LlamaRMSNorm, which cannot carry"),
        ({"target_modules": ["self_attn"]}, "self_attn', a LlamaAttention, which cannot carry"),
    ],
    ids=str,
)
def test_what_matches_nothing_is_an_error_with_the_nearest_name(llama, fields, words):
    with pytest.raises(TargetError, match=words):
        resolve(llama, LoraConfig(**fields))


def test_all_faults_are_in_one_error_and_a_flood_is_cut(llama):
    with pytest.raises(TargetError) as error:
        resolve(llama, LoraConfig(target_modules=["q_prj", "v_prj", "o_proj"], rank_pattern={"no": 1}))
    assert all(word in str(error.value) for word in ("'q_prj'", "'v_prj'", "rank_pattern key 'no'"))
    flood = nn.ModuleList(nn.ReLU() for _ in range(50))
    with pytest.raises(TargetError, match=r"\.\.\. and 30 more"):
        resolve(flood, LoraConfig(target_modules=".*"))


def test_a_file_may_hold_entries_that_match_nothing(llama, caplog):
    config = LoraConfig(target_modules=["q_proj", "w1"], rank_pattern={"w2": 2}, modules_to_save=["score"])
    with caplog.at_level(logging.WARNING, "deltaw"):
        found = resolve(llama, config, strict=False)
    assert len(found.adapted) == 2
    assert len(found.notes) == 3
    assert all(word in caplog.text for word in ("'w1'", "'w2'", "'score'"))
    with pytest.raises(TargetError):
        resolve(llama, LoraConfig(target_modules=["w1"]), strict=False)


def test_an_architecture_without_customary_targets_must_be_told():
    with pytest.raises(TargetError, match="no customary choice for Sequential"):
        resolve(nn.Sequential(nn.Linear(2, 2)), LoraConfig())


def test_multihead_attention_is_refused():
    """It reads its projection's weight and never calls it: an adapter there would silently do nothing."""
    net = nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.raises(TargetError, match=r"'self_attn.out_proj' inside nn.MultiheadAttention.*exclude_modules"):
        resolve(net, LoraConfig(target_modules="all-linear"))
    assert chosen(net, target_modules="all-linear", exclude_modules=["out_proj"]) == {"linear1", "linear2"}


def test_one_layer_at_two_places_is_refused():
    shared = nn.Linear(2, 2)
    for net in (nn.Sequential(shared, shared), nn.Sequential(nn.Sequential(shared), nn.Sequential(shared))):
        with pytest.raises(TargetError, match="which is the same layer as '0"):
            resolve(net, LoraConfig(target_modules=r"0|1|0\.0|1\.0"))


@pytest.mark.parametrize("listed", [None, ["score"]])
def test_a_classifier_s_random_head_trains_with_the_adapter(listed):
    def build_classifier():
        torch.manual_seed(0)
        return LlamaForSequenceClassification(
            LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                        num_attention_heads=2, num_labels=3, pad_token_id=0)
        )  # fmt: skip

    fields = {"task_type": "SEQ_CLS", "target_modules": "all-linear"}
    ours = deltaw.get_peft_model(build_classifier(), LoraConfig(**fields, modules_to_save=listed))
    theirs = peft.get_peft_model(build_classifier(), peft.LoraConfig(**fields))
    trained = [n for n, p in theirs.named_parameters() if p.requires_grad]
    assert [n for n, p in ours.named_parameters() if p.requires_grad] == trained
    assert "base_model.model.score.modules_to_save.default.weight" in trained
    assert ours.peft_config["default"].modules_to_save == ["score"]


def test_a_module_inside_a_saved_one_is_saved_once(llama):
    found = resolve(llama, LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp", "up_proj"]))
    assert set(found.saved) == {"model.layers.0.mlp", "model.layers.1.mlp"}


def test_fused_experts_that_all_linear_leaves_out_are_said(caplog):
    class Moe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(4, 2)
            self.experts = nn.ParameterDict({"up": nn.Parameter(torch.zeros(2, 4, 4))})

    assert chosen(Moe(), target_modules="all-linear") == {"gate"}
    assert "leaves out 1 fused expert weights (experts.up" in caplog.text


def test_a_list_of_modules_cannot_be_saved_whole(llama):
    with pytest.raises(TargetError, match=r"'model.layers', a ModuleList, which is never called; name its items"):
        resolve(llama, LoraConfig(target_modules=["q_proj"], modules_to_save=["layers"]))


def test_modules_to_save_cannot_hold_another_adapter(llama):
    model = deltaw.get_peft_model(llama, LoraConfig(target_modules=["q_proj"]))
    for name in ("q_proj", "self_attn"):
        with pytest.raises(TargetError, match="carries an adapter already"):
            model.add_adapter("b", LoraConfig(target_modules=["v_proj"], modules_to_save=[name]))
