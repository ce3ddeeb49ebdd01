"""Full-precision weights of a quantized model: where they are looked for, and what is said when they are not there."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaForCausalLM, LlamaModel

import deltaw
from deltaw.errors import ModelError
from deltaw.fullweights import FullWeights, full_weight, full_weights, full_weights_of, weights_at_hand
from deltaw.quant import NF4Config

LAYER = "model.layers.1.mlp.down_proj"
SHAPE = (32, 64)


@pytest.fixture(scope="module")
def folders(make_llama, tmp_path_factory):
    """One file, and the same model in several, in bfloat16."""
    root, model = tmp_path_factory.mktemp("full"), make_llama(torch.bfloat16)
    model.save_pretrained(root / "one")
    model.save_pretrained(root / "many", max_shard_size="20KB")
    assert len(list((root / "many").glob("*.safetensors"))) > 2
    return root


def expected(make_llama) -> torch.Tensor:
    return make_llama(torch.bfloat16).get_submodule(LAYER).weight.float()


def test_every_source_gives_the_same(folders, make_llama):
    dense = make_llama(torch.bfloat16)
    sources = [
        folders / "one",
        str(folders / "many"),
        folders / "one" / "model.safetensors",
        dense,
        dense.state_dict(),
        {f"{LAYER}.weight": dense.get_submodule(LAYER).weight},
    ]
    for source in sources:
        found = FullWeights(source).weight(LAYER, SHAPE)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected(make_llama))


def test_a_model_is_asked_where_it_came_from(folders, make_llama):
    for kind, layer in ((LlamaForCausalLM, LAYER), (LlamaModel, LAYER.removeprefix("model."))):
        model = kind.from_pretrained(folders / "many")
        deltaw.quantize_(model, NF4Config())
        assert torch.equal(full_weights_of(model).weight(layer, SHAPE), expected(make_llama))
        assert torch.equal(FullWeights(folders / "one").weight(layer, SHAPE), expected(make_llama))


def test_what_is_given_comes_before_where_the_model_came_from(folders, make_llama):
    model = LlamaForCausalLM.from_pretrained(folders / "one")
    other = {f"{LAYER}.weight": torch.ones(SHAPE)}
    with full_weights(other):
        with weights_at_hand(model):
            assert torch.equal(full_weight(LAYER, SHAPE), torch.ones(SHAPE))
        assert torch.equal(full_weight(LAYER, SHAPE), torch.ones(SHAPE))
    with weights_at_hand(model):
        assert torch.equal(full_weight(LAYER, SHAPE), expected(make_llama))
    with pytest.raises(ModelError, match="does not say"):
        full_weight(LAYER, SHAPE)


def test_a_prefix_that_fits_twice_is_no_answer():
    names = {"a.layer.weight": torch.ones(2, 2), "b.layer.weight": torch.ones(2, 2)}
    with pytest.raises(ModelError, match="several that may be it"):
        FullWeights(names).weight("layer", (2, 2))
    assert FullWeights({"a.layer.weight": torch.ones(2, 2)}).weight("layer", (2, 2)).sum() == 4
    assert FullWeights({"layer.weight": torch.ones(2, 2)}).weight("model.layer", (2, 2)).sum() == 4
    with pytest.raises(ModelError, match="there is none"):  # a prefix ends where a name begins
        FullWeights({"player.weight": torch.ones(2, 2)}).weight("layer", (2, 2))


def test_each_thing_that_is_wrong_is_said_with_what_to_give(folders, make_llama, tmp_path):
    packed = make_llama()
    deltaw.quantize_(packed, NF4Config())
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("not a tensor", encoding="utf-8")
    save_file({f"{LAYER}.weight": torch.zeros(8, 1, dtype=torch.uint8)}, tmp_path / "bytes.safetensors")
    for source, told in [
        (tmp_path / "empty", "has neither model.safetensors nor"),
        (tmp_path / "text", "no safetensors file"),
        (tmp_path / "bytes.safetensors", "not in full precision"),
        (packed, "quantized"),
        (packed.state_dict(), "not in full precision"),
        (nn.Sequential(nn.Linear(2, 2)), "no layer"),
        ({"down_prj.weight": torch.ones(2, 2)}, "there is none"),
        ("", "does not say"),
    ]:
        with pytest.raises(ModelError, match=told):
            FullWeights(source).weight(LAYER, SHAPE)
    with pytest.raises(ModelError, match="another model"):
        FullWeights(folders / "one").weight(LAYER, (64, 32))
    (lost,) = sorted((folders / "many").glob("*00002*"))
    lost.rename(tmp_path / lost.name)
    with pytest.raises(ModelError, match=lost.name):
        FullWeights(folders / "many").weight(LAYER, SHAPE)
    (tmp_path / lost.name).rename(lost)
