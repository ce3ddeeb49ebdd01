import pytest
import torch
from torch import nn

import deltaw
from deltaw import modules


@pytest.fixture
def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 2))


@pytest.mark.parametrize(("name", "parts"), [("a.b.c", ("a.b", "c")), ("a", ("", "a"))])
def test_split_name(name, parts):
    assert modules.split_name(name) == parts


def test_set_submodule_keeps_the_place_and_the_order(net):
    new = nn.Identity()
    modules.set_submodule(net, "1.0", new)
    assert net[1][0] is new
    assert [name for name, _ in net.named_children()] == ["0", "1", "2"]
    assert modules.name_of(net, new) == "1.0"
    assert modules.name_of(net, nn.ReLU()) is None


@pytest.mark.parametrize(
    ("name", "spec", "hit"),
    [
        ("model.layers.0.q_proj", ["q_proj"], True),
        ("q_proj", ["q_proj"], True),
        ("model.layers.0.eq_proj", ["q_proj"], False),
        ("model.layers.0.q_proj", {"0.q_proj"}, True),
        ("model.layers.0.q_proj", r".*\.0\.[qv]_proj", True),
        ("model.layers.0.q_proj", "q_proj", False),  # an expression matches the whole name
        ("model.layers.0.q_proj", [], False),
    ],
)
def test_matches(name, spec, hit):
    assert modules.matches(name, spec) is hit


@pytest.mark.parametrize(
    ("name", "pattern", "index"),
    [
        ("model.layers.3.mlp.up", None, 3),
        ("model.layers.3.experts.7.up", None, 3),
        ("model.layers.3.experts.7.up", "experts", 7),
        ("model.layers.3.mlp.up", ["h", "layers"], 3),
        ("layers.3.mlp.up", "layers", 3),
        ("model.norm", None, None),
        ("model.layers.3.mlp.up", "h", None),
    ],
)
def test_layer_index(name, pattern, index):
    assert modules.layer_index(name, pattern) == index


def test_pattern_value_takes_the_first_key_that_matches():
    patterns = {"q_proj": 4, r"layers\.0\..*": 2}
    assert modules.pattern_value(patterns, "model.layers.0.q_proj") == ("q_proj", 4)
    assert modules.pattern_value(patterns, "model.layers.0.v_proj") == (r"layers\.0\..*", 2)
    assert modules.pattern_value(patterns, "model.layers.1.v_proj") is None
    assert modules.pattern_value({"proj": 4}, "model.q_proj") is None  # a key starts after a dot


def test_dtype_of_looks_past_integers():
    layer = nn.Linear(2, 2, dtype=torch.bfloat16)
    layer.register_parameter("count", nn.Parameter(torch.zeros(1, dtype=torch.int8), requires_grad=False))
    assert modules.dtype_of(layer) == torch.bfloat16
    assert modules.dtype_of(nn.ReLU()) is None


def test_weight_owners_shows_tied_weights(net):
    net[2].weight = net[1][0].weight
    owners = modules.weight_owners(net)
    assert owners[net[2].weight] == ["1.0.weight", "2.weight"]
    assert owners[net[0].bias] == ["0.bias"]


def test_tied_to_embedding_names_the_other_places(make_llama, net):
    tied = make_llama(tied=True)
    assert modules.tied_to_embedding(tied) == ["lm_head.weight"]
    assert modules.tied_to_embedding(make_llama()) == []
    assert modules.tied_to_embedding(net) == []  # no transformers model
    deltaw.inject_adapter_in_model(deltaw.LoraConfig(target_modules=["embed_tokens", "lm_head"]), tied)
    assert modules.tied_to_embedding(tied) == ["lm_head.base_layer.weight"]
    whole = deltaw.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    trained = deltaw.get_peft_model(make_llama(tied=True), whole).get_base_model()
    assert modules.tied_to_embedding(trained) == ["lm_head.weight"]
    tied.get_input_embeddings = lambda: None
    assert modules.tied_to_embedding(tied) == []


def test_is_checkpointing_asks_every_part(llama):
    assert not modules.is_checkpointing(llama)
    llama.model.layers[1].gradient_checkpointing = True
    assert modules.is_checkpointing(llama)


def test_frozen_restores_each_flag_even_after_an_error(net):
    net[0].bias.requires_grad_(False)

    def fail():
        with modules.frozen(net.parameters()):
            assert not any(p.requires_grad for p in net.parameters())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [p.requires_grad for p in net.parameters()] == [True, False, True, True, True, True]


def test_parameters_are_counted_once_and_as_what_they_stand_for(net):
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(6, dtype=torch.uint8), requires_grad=False)
            self.absmax = nn.Parameter(torch.zeros(1), requires_grad=False)
            self.bias = nn.Parameter(torch.zeros(3))

        def logical_sizes(self) -> dict[str, int]:
            return {"weight": 12, "absmax": 0}

    packed = Packed()
    sizes = modules.parameter_sizes(nn.ModuleList([net, packed, net[0]]))
    assert list(sizes.values()) == [6, 3, 9, 3, 6, 2, 12, 0, 3]
    assert [p for p in sizes if p is packed.weight]
