"""The host of embeddings: it reads another table as the base reads its own, and refuses what it cannot follow."""

import math

import pytest
import torch
from torch import nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

import deltaw
from deltaw.adapters import Embedding
from deltaw.errors import TargetError

BASES = [
    (nn.Embedding(7, 4, padding_idx=2), 1.0),
    (nn.Embedding(7, 4, scale_grad_by_freq=True), 1.0),
    (Gemma3TextScaledWordEmbedding(7, 4, 0, embed_scale=math.sqrt(8)), math.sqrt(8)),
    (BartScaledWordEmbedding(7, 4, 1, embed_scale=3.0), 3.0),
]


def test_it_looks_like_the_layer_it_wraps():
    host = Embedding(nn.Embedding(7, 4, padding_idx=2))
    assert (host.num_embeddings, host.embedding_dim, host.padding_idx) == (7, 4, 2)
    assert host.weight is host.base_layer.weight
    assert host.bias is None
    assert host.kind == "embedding"


@pytest.mark.parametrize(("base", "scale"), BASES, ids=lambda v: str(v))
def test_another_table_is_read_as_the_base_reads_its_own(base, scale):
    host, ids = Embedding(base), torch.tensor([[1, 6, 1], [2, 0, 3]])
    table = torch.randn(7, 3, requires_grad=True)
    before = base.weight.detach().clone()
    assert torch.allclose(host.look_up(table, ids), table[ids] * scale)
    assert torch.equal(host.look_up(base.weight, ids), base(ids))
    same = before.clone().requires_grad_()
    (mine,) = torch.autograd.grad(host.look_up(same, ids).sum(), same)
    (own,) = torch.autograd.grad(base(ids).sum(), base.weight)
    assert torch.equal(mine, own)
    assert torch.equal(base.weight, before)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.Embedding(7, 4, max_norm=1.0), "max_norm"),
        (nn.Embedding(7, 4, sparse=True), "set its .sparse to False"),
        (OPTLearnedPositionalEmbedding(7, 4), "forward takes more than ids"),
        (nn.utils.parametrizations.spectral_norm(nn.Embedding(7, 4)), "computed anew at each forward"),
    ],
    ids=["max_norm", "sparse", "positions", "parametrized"],
)
def test_what_an_adapter_cannot_follow_is_refused_with_the_reason(layer, words):
    net = nn.ModuleDict({"table": layer})
    with pytest.raises(TargetError, match=f"'table', a .*which cannot carry an adapter: .*{words}"):
        deltaw.inject_adapter_in_model(deltaw.LoraConfig(target_modules=["table"]), net)
    assert net["table"] is layer
