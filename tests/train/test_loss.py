"""The fast loss against each model's own forward, on every architecture it claims."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, build
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from deltaw import AdaLoraConfig, LoraConfig, causal_lm_loss, get_peft_model
from deltaw.errors import AdapterError, ModelError
from deltaw.train.loss import require_fast_loss

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def batch(right_pad: int = 3) -> dict[str, Tensor]:
    """(3, 12) tokens; the first row is padded on the right, a third of the labels carries a loss."""
    torch.manual_seed(0)
    ids = torch.randint(3, 128, (3, 12))
    labels = ids.clone()
    labels[:, :7] = -100
    mask = torch.ones_like(ids)
    if right_pad:
        mask[0, -right_pad:] = 0
        labels[0, -right_pad:] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def adapted(model: Any) -> Any:
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(model, config).train()


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_same(model: Any, data: dict[str, Tensor], **kwargs: Any) -> None:
    ours = causal_lm_loss(model, **data, **kwargs)
    theirs = model(**data, **kwargs).loss
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=1e-6)
    plain = gradients(model, theirs)
    for name, gradient in gradients(model, ours).items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("count", [None, 7, torch.tensor(31)])
def test_equals_the_models_own_loss(llama: Any, count: Any) -> None:
    assert_same(adapted(llama), batch(), **({} if count is None else {"num_items_in_batch": count}))


def test_left_padding_keeps_its_mask(llama: Any) -> None:
    data = batch(0)
    data["attention_mask"][0, :4] = 0
    assert_same(adapted(llama), data)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_on_every_architecture(kind: str) -> None:
    data = batch()
    data["input_ids"] = data["input_ids"] % 61 + 3
    data["labels"] = data["labels"].where(data["labels"] == -100, data["input_ids"])
    assert_same(adapted(build(kind)).eval(), data)  # OPT drops out while it trains


@pytest.mark.parametrize("kind", ["gemma2", "cohere", "granite"])
def test_soft_caps_and_scales_are_honoured(kind: str) -> None:
    torch.manual_seed(0)
    model: Any = {
        "gemma2": lambda: Gemma2ForCausalLM(
            Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.5, attn_implementation="eager")
        ),
        "cohere": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=3.0)),
        "granite": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=5.0)),
    }[kind]()
    assert_same(adapted(model), batch())
    head = require_fast_loss(model)
    assert (head.softcap, head.scale) == {"gemma2": (0.5, 1.0), "cohere": (None, 3.0), "granite": (None, 0.2)}[kind]


def test_an_unknown_change_of_the_logits_is_refused_by_name(llama: Any) -> None:
    class Shifted(type(llama)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 1.1
            return out

    llama.__class__ = Shifted
    with pytest.raises(ModelError, match="Shifted changes its logits"):
        causal_lm_loss(llama, **batch())


def test_a_model_that_is_no_language_model_is_refused() -> None:
    with pytest.raises(ModelError, match="Linear"):
        causal_lm_loss(torch.nn.Linear(2, 2), **batch())


@pytest.mark.parametrize("where", ["modules_to_save", "target_modules", "nothing frozen"])
def test_a_head_that_trains_or_carries_an_adapter(make_llama: Any, where: str) -> None:
    base = make_llama()
    if where == "nothing frozen":
        assert_same(base.train(), batch())
        return
    targets = ["q_proj", "lm_head"] if where == "target_modules" else ["q_proj"]
    saved = ["lm_head"] if where == "modules_to_save" else None
    config = LoraConfig(r=4, target_modules=targets, modules_to_save=saved, init_lora_weights=False)
    assert_same(get_peft_model(base, config).train(), batch())


def test_micro_batches_add_up_to_the_large_batch(llama: Any) -> None:
    model, data = adapted(llama), batch()
    count = (data["labels"][:, 1:] != -100).sum()
    whole = gradients(model, causal_lm_loss(model, **data))
    parts = [
        gradients(model, causal_lm_loss(model, **{k: v[i : i + 1] for k, v in data.items()}, num_items_in_batch=count))
        for i in range(3)
    ]
    for name, gradient in whole.items():
        torch.testing.assert_close(gradient, sum(part[name] for part in parts), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_activation_checkpointing(llama: Any, reentrant: bool) -> None:
    plain = adapted(copy.deepcopy(llama))
    model = adapted(llama)
    options = {"use_reentrant": reentrant}
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)
    if reentrant:
        model.enable_input_require_grads()
    wanted = gradients(plain, causal_lm_loss(plain, **batch()))
    causal_lm_loss(model, **batch()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-7)


def test_the_models_own_forward_is_as_before(llama: Any) -> None:
    data = batch()
    before = llama(**data).logits
    names = {id(m): type(m).forward for m in llama.modules()}
    causal_lm_loss(llama, **data)
    assert torch.equal(llama(**data).logits, before)
    assert all("forward" not in m.__dict__ and type(m).forward is names[id(m)] for m in llama.modules())
    assert llama.config._attn_implementation == "sdpa"


def test_nothing_supervised_is_zero_not_nan(llama: Any) -> None:
    data = batch()
    data["labels"].fill_(-100)
    assert causal_lm_loss(adapted(llama), **data).item() == 0.0


def adalora(model: Any) -> Any:
    torch.manual_seed(1)
    config = AdaLoraConfig(init_r=4, target_r=2, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, config).train()


@pytest.mark.parametrize("count", [None, 7, torch.tensor(31)])
def test_a_penalty_is_part_of_the_loss_in_training_alone(llama: Any, count: Any) -> None:
    model = adalora(llama)
    kwargs: dict[str, Any] = {} if count is None else {"num_items_in_batch": count}
    assert_same(model, batch(), **kwargs)  # the wrapper's own forward adds it too
    plain = causal_lm_loss(model.get_base_model(), **batch(), **kwargs)
    share = 1.0 if count is None else (batch()["labels"][:, 1:] != -100).sum() / count
    added = causal_lm_loss(model, **batch(), **kwargs) - plain
    assert added.item() == pytest.approx((model.base_model.penalty() * share).item(), rel=1e-4)
    assert torch.equal(causal_lm_loss(model.eval(), **batch(), **kwargs), plain)


def test_micro_batches_hold_the_penalty_once(llama: Any) -> None:
    model, data = adalora(llama), batch()
    count = (data["labels"][:, 1:] != -100).sum()
    whole = gradients(model, causal_lm_loss(model, **data))
    parts = [
        gradients(model, causal_lm_loss(model, **{k: v[i : i + 1] for k, v in data.items()}, num_items_in_batch=count))
        for i in range(3)
    ]
    for name, gradient in whole.items():
        torch.testing.assert_close(gradient, sum(part[name] for part in parts), rtol=1e-4, atol=1e-7)


def test_a_mixed_batch_has_the_loss_of_the_wrapper_s_own_forward(llama: Any) -> None:
    model, names = adapted(llama), ["default", "b", "__base__"]
    model.add_adapter("b", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.set_requires_grad(["default", "b"])
    ours = causal_lm_loss(model, **batch(), adapter_names=names)
    theirs = model(**batch(), adapter_names=names).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    expected = gradients(model, theirs)
    for name, gradient in gradients(model, ours).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
    with pytest.raises(AdapterError, match="no adapter"):
        causal_lm_loss(model, **batch(), adapter_names=["c", "b", "default"])
