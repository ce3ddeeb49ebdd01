"""A base made ready for adapters: frozen, checkpointed, and no larger than it was."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from deltaw import LoraConfig, NF4Config, causal_lm_loss, get_peft_model, prepare_model_for_kbit_training, quantize_
from deltaw.errors import ModelError
from deltaw.kbit import memory_of
from deltaw.modules import is_checkpointing

LORA = LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.fixture(params=["dense", "4 bits"])
def model(request, make_llama):
    base = make_llama(torch.bfloat16)
    if request.param == "4 bits":
        quantize_(base, NF4Config())
    return base


def gradients(adapted, ids):
    causal_lm_loss(adapted, input_ids=ids, labels=ids).backward()
    return {name: p.grad.clone() for name, p in adapted.named_parameters() if p.grad is not None}


def test_it_freezes_and_checkpoints_and_casts_nothing(model, caplog):
    before, dtypes = memory_of(model), [p.dtype for p in model.parameters()]
    with caplog.at_level(logging.INFO, logger="deltaw"):
        assert prepare_model_for_kbit_training(model) is model
    assert not [p for p in model.parameters() if p.requires_grad]
    assert is_checkpointing(model)
    assert [p.dtype for p in model.parameters()] == dtypes
    assert memory_of(model) == before
    assert "MiB, and took" in caplog.text


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_those_without_checkpointing(model, ids, reentrant):
    import copy

    plain = copy.deepcopy(model)
    prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = []
    for base in (model, plain):
        torch.manual_seed(0)
        adapted = get_peft_model(base, LORA)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        found.append(gradients(adapted.train(), ids))
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    assert len(ours) == 8
    for name, gradient in ours.items():
        assert torch.allclose(gradient, theirs[name], rtol=2e-2, atol=1e-3), name


def test_norms_and_head_in_float32_only_as_asked(model, ids):
    prepare_model_for_kbit_training(model, False, upcast_norms=True, upcast_head=True)
    norms = [m for m in model.modules() if "Norm" in type(m).__name__]
    assert {m.weight.dtype for m in norms} == {torch.float32}
    assert model.lm_head.weight.dtype == torch.float32
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    hidden = model.model(ids).last_hidden_state
    assert hidden.dtype == torch.bfloat16
    assert model(ids).logits.dtype == torch.float32
    adapted = get_peft_model(model, LORA)
    loss = causal_lm_loss(adapted, input_ids=ids, labels=ids)
    assert torch.allclose(loss, adapted(input_ids=ids, labels=ids).loss, rtol=1e-3)
    assert gradients(adapted, ids)


def test_a_tied_head_takes_the_embedding_along(make_llama, ids):
    model = make_llama(torch.bfloat16, tied=True)
    prepare_model_for_kbit_training(model, False, upcast_head=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model(ids).last_hidden_state.dtype == torch.bfloat16
    assert model(ids).logits.dtype == torch.float32


def test_what_cannot_be_done_is_said():
    plain = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ModelError, match=r"cannot recompute its activations.*use_gradient_checkpointing=False"):
        prepare_model_for_kbit_training(plain)
    with pytest.raises(ModelError, match="has no output head"):
        prepare_model_for_kbit_training(plain, False, upcast_head=True)
    assert prepare_model_for_kbit_training(plain, False) is plain
