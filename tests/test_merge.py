"""Merging: PEFT's bits, a bitwise way back, and refusals that leave the base alone."""

import peft
import pytest
import torch
from peer import ATTENTION, close, logits, pair, same_state, state, stir
from torch import nn
from transformers import AutoModelForCausalLM

import deltaw
from deltaw import LoraConfig, MergeReport
from deltaw.adapters import host_layers
from deltaw.errors import MergeError

A = {"target_modules": ["q_proj", "v_proj"], "r": 4}
B = {"target_modules": ["q_proj", "up_proj"], "r": 2, "lora_alpha": 3}


def two(base):
    model = stir(deltaw.get_peft_model(base, LoraConfig(**A)))
    model.add_adapter("b", LoraConfig(**B))
    return stir(model, adapter="b")


def weights(model):
    """Name -> base weight of each adapted layer."""
    return {n: m.base_layer.weight.detach().clone() for n, m in model.named_modules() if hasattr(m, "lora_A")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "all-linear"},
        {
            "target_modules": ATTENTION,
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"k_proj": 1},
        },
    ],
    ids=str,
)
def test_merged_weights_are_peft_s_bitwise(make_llama, ids, dtype, fields):
    ours, theirs = pair(lambda: make_llama(dtype), **fields)
    stir(ours), stir(theirs)
    before, apart = weights(ours), logits(ours, ids)
    ours.merge_adapter()
    theirs.merge_adapter()
    mine, peers = weights(ours), weights(theirs)
    assert mine.keys() == peers.keys()
    assert all(torch.equal(mine[name], peers[name]) for name in mine)
    assert not any(torch.equal(mine[name], before[name]) for name in mine)
    assert close(logits(ours, ids), apart, 1e-5 if dtype == torch.float32 else 0.03)
    ours.unmerge_adapter()
    assert all(torch.equal(weight, before[name]) for name, weight in weights(ours).items())
    assert torch.equal(logits(ours, ids), apart)


@pytest.mark.parametrize(
    "fields",
    [A, {"target_modules": ATTENTION, "bias": "all", "modules_to_save": ["lm_head"]}],
    ids=str,
)
def test_merge_and_unload_is_a_plain_model_and_peft_s(make_llama, ids, fields):
    ours, theirs = pair(lambda: make_llama(bias=True), **fields)
    apart = logits(stir(ours), ids)
    stir(theirs)
    merged = ours.merge_and_unload()
    assert same_state(merged, state(theirs.merge_and_unload()))
    assert [type(m) for m in merged.modules()] == [type(m) for m in make_llama(bias=True).modules()]
    assert close(logits(merged, ids), apart, 1e-5)
    assert not any(p.requires_grad for p in merged.parameters())


def test_lora_bias_merges_to_the_forward(make_llama, ids):
    model = deltaw.get_peft_model(make_llama(bias=True), LoraConfig(target_modules=ATTENTION, lora_bias=True, r=2))
    apart = logits(stir(model, 0.2), ids)
    base = [host.bias.detach().clone() for _, host in host_layers(model)]
    model.merge_adapter()
    assert close(logits(model, ids), apart, 1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(host.bias, b) for (_, host), b in zip(host_layers(model), base, strict=True))


def test_unload_gives_the_base_back_bitwise_whatever_was_done(llama, make_llama):
    modules = [name for name, _ in llama.named_modules()]
    model = two(llama)
    model.merge_adapter(["default", "b"])
    plain = model.unload()
    assert plain is llama
    assert same_state(plain, state(make_llama()))
    assert [name for name, _ in plain.named_modules()] == modules
    whole = stir(deltaw.get_peft_model(plain, LoraConfig(**A, modules_to_save=["lm_head"])))
    assert same_state(whole.unload(), state(make_llama()))


def test_switching_by_unmerging_one_and_merging_another(make_llama):
    model, fresh = two(make_llama()), two(make_llama())
    model.merge_adapter(["default"])
    model.unmerge_adapter()
    model.set_adapter("b")
    model.merge_adapter()
    fresh.merge_adapter(["b"])
    assert same_state(model, state(fresh))
    assert {n for _, host in host_layers(model) for n in host.merged_adapters} == {"b"}


def test_two_merged_at_once_and_one_taken_out(make_llama, ids):
    model = two(make_llama())
    model.set_adapter(["default", "b"])
    apart = logits(model, ids)
    model.merge_adapter()
    assert close(logits(model, ids), apart, 1e-5)
    model.unmerge_adapter(["default"])
    fresh = two(make_llama())
    fresh.merge_adapter(["b"])
    assert same_state(model, state(fresh))
    model.unmerge_adapter(["b"])
    assert torch.equal(logits(model, ids), apart)


def test_one_after_the_other_equals_both_at_once(make_llama):
    model, both = two(make_llama(torch.bfloat16)), two(make_llama(torch.bfloat16))
    model.merge_adapter(["default"])
    model.merge_adapter(["b"])
    both.merge_adapter(["default", "b"])
    assert same_state(model, state(both))


def test_setting_another_adapter_takes_the_merged_one_out(llama, ids, caplog):
    """Otherwise the base would go on answering with the merged one."""
    model = two(llama)
    model.set_adapter("b")
    second = logits(model, ids)
    model.set_adapter("default")
    model.merge_adapter()
    model.set_adapter("default")  # nothing changes, nothing is undone
    assert next(host_layers(model))[1].merged
    model.add_adapter("c", LoraConfig(**A))
    assert next(host_layers(model))[1].merged
    model.set_adapter("b")
    assert "['default'] were merged; they are taken out" in caplog.text
    assert torch.equal(logits(model, ids), second)


def test_merge_and_unload_means_the_named_ones_only(make_llama):
    model, fresh = two(make_llama()), two(make_llama())
    model.merge_adapter(["default"])
    expected = state(fresh.merge_and_unload(adapter_names=["b"]))
    assert same_state(model.merge_and_unload(adapter_names=["b"]), expected)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda m: m.merge_adapter(["nope"]), r"no adapter 'nope' to merge; there are \['b', 'default'\]"),
        (lambda m: m.merge_adapter(["defalt"]), "did you mean 'default'"),
        (lambda m: m.merge_adapter(["b", "b"]), "named twice"),
        (lambda m: m.unmerge_adapter(["nope"]), "no adapter 'nope' to unmerge"),
        (lambda m: m.merge_and_unload(adapter_names=["nope"]), "no adapter 'nope' to merge"),
        (lambda m: (m.set_adapter([]), m.merge_adapter()), "no adapter is active"),
        (lambda m: (m.set_adapter([]), m.merge_and_unload()), "no adapter is active"),
        (lambda m: (m.disable_adapter_layers(), m.merge_adapter()), "adapters are disabled now"),
    ],
)
def test_merges_that_make_no_sense(llama, act, words):
    model = two(llama)
    before = state(model)
    with pytest.raises(MergeError, match=words):
        act(model)
    assert same_state(model, before)


def test_merging_twice_is_an_error(llama):
    model = two(llama)
    model.merge_adapter()
    once = state(model)
    with pytest.raises(MergeError, match=r"\['default'\] are merged already.*call unmerge_adapter\(\)"):
        model.merge_adapter()
    assert same_state(model, once)


@pytest.mark.parametrize("act", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_with_nan_is_refused_and_the_base_is_left(llama, act, value):
    model = two(llama)
    *_, (path, host) = host_layers(model.get_base_model())
    host.lora_B["b"].weight.data[0, 0] = value
    before = state(model)
    model.set_adapter(["default", "b"])
    with pytest.raises(MergeError, match=rf"weights are not finite in {path} \(b\)"):
        getattr(model, act)()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items() if "lora_" not in n)
    assert not any(host.merged for _, host in host_layers(model))


@pytest.mark.parametrize("act", ["merge_adapter", "merge_and_unload"])
def test_a_sum_that_overflows_half_precision_is_refused(make_llama, act):
    model = stir(deltaw.get_peft_model(make_llama(torch.float16), LoraConfig(**A)))
    *_, (path, host) = host_layers(model.get_base_model())
    host.lora_B["default"].weight.data.fill_(1e6)
    before = state(model)
    with pytest.raises(MergeError, match=f"{path}: merging .* not finite; the base was left as it was"):
        getattr(model, act)()
    assert same_state(model, before)
    assert not any(host.merged for _, host in host_layers(model))


# --- tied weights -------------------------------------------------------------------------------------------

HEAD = {"target_modules": ["lm_head", "q_proj"]}


def test_a_tied_head_gets_weights_of_its_own_and_gives_them_back(make_llama, ids, caplog):
    base = make_llama(tied=True)
    before = base.model.embed_tokens.weight.detach().clone()
    model = stir(deltaw.get_peft_model(base, LoraConfig(**HEAD)))
    apart = logits(model, ids)
    model.merge_adapter()
    assert "lm_head was tied to model.embed_tokens.weight; merging gave it weights of its own" in caplog.text
    assert torch.equal(base.model.embed_tokens.weight, before)
    assert not torch.equal(base.lm_head.weight, before)
    assert close(logits(model, ids), apart, 1e-5)
    model.unmerge_adapter()
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert base.config.tie_word_embeddings
    assert torch.equal(logits(model, ids), apart)


def test_a_tied_embedding_gets_weights_of_its_own_and_gives_them_back(make_llama, ids, tmp_path, caplog):
    base = make_llama(tied=True)
    before = base.lm_head.weight.detach().clone()
    model = stir(deltaw.get_peft_model(base, LoraConfig(target_modules=["embed_tokens", "q_proj"])))
    apart = logits(model, ids)
    model.merge_adapter()
    assert "model.embed_tokens was tied to lm_head.weight; merging gave it weights of its own" in caplog.text
    assert torch.equal(base.lm_head.weight, before)
    assert not torch.equal(base.model.embed_tokens.weight, before)
    assert close(logits(model, ids), apart, 1e-5)
    model.unmerge_adapter()
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert torch.equal(logits(model, ids), apart)
    plain = model.merge_and_unload()
    assert not plain.config.tie_word_embeddings
    plain.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), logits(plain, ids))
    assert close(logits(plain, ids), apart, 1e-5)


def test_adapters_on_both_of_two_tied_layers_merge_apart(make_llama, ids):
    """Without ``ensure_weight_tying`` each has an update of its own; PEFT would add both to the one weight."""
    base = make_llama(tied=True)
    before = state(base)
    model = stir(deltaw.get_peft_model(base, LoraConfig(target_modules=["embed_tokens", "lm_head"])))
    apart = logits(model, ids)
    model.merge_adapter()
    assert not torch.equal(base.lm_head.weight, base.model.embed_tokens.weight)
    assert close(logits(model, ids), apart, 1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model, ids), apart)
    assert same_state(model.unload(), before)
    assert base.lm_head.weight is base.model.embed_tokens.weight


def test_adapters_elsewhere_do_not_untie(make_llama, caplog):
    base = make_llama(tied=True)
    model = stir(deltaw.get_peft_model(base, LoraConfig(**HEAD)))
    model.add_adapter("b", LoraConfig(target_modules=["v_proj"]))
    stir(model, adapter="b").merge_adapter(["b"])
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert not caplog.text


def test_a_refused_merge_leaves_the_tie(make_llama):
    base = make_llama(torch.float16, tied=True)
    model = deltaw.get_peft_model(base, LoraConfig(**HEAD, init_lora_weights=False))
    base.lm_head.lora_B["default"].weight.data.fill_(1e6)
    with pytest.raises(MergeError):
        model.merge_adapter()
    assert base.lm_head.weight is base.model.embed_tokens.weight


@pytest.mark.parametrize("fields", [HEAD, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}], ids=str)
@pytest.mark.parametrize("merged_before", [False, True])
def test_a_merged_tied_model_survives_its_own_files(make_llama, ids, tmp_path, fields, merged_before):
    model = stir(deltaw.get_peft_model(make_llama(tied=True), LoraConfig(**fields)), 0.2)
    apart = logits(model, ids)
    if merged_before:
        model.merge_adapter()
    merged = model.merge_and_unload()
    assert close(logits(merged, ids), apart, 1e-5)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), ids), logits(merged, ids))


def test_two_copies_of_one_module_are_not_merged_silently(llama):
    fields = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    model = deltaw.get_peft_model(llama, LoraConfig(**fields))
    model.add_adapter("b", LoraConfig(**fields))
    with pytest.raises(MergeError, match="lm_head whole"):
        model.merge_and_unload(adapter_names=["default", "b"])
    assert type(model.base_model.model.model.layers[0].self_attn.q_proj) is not nn.Linear


# --- the report ---------------------------------------------------------------------------------------------


def test_the_report_is_tiny_in_float32_and_leaves_no_trace(llama, ids):
    model = two(llama)
    model.train()
    before = state(model)
    mask = torch.ones_like(ids)
    mask[0, -4:] = 0
    report = deltaw.merge_report(model, [{"input_ids": ids, "attention_mask": mask}, {"input_ids": ids}])
    assert isinstance(report, MergeReport)
    assert report.tokens == 2 * ids.numel() - 4
    assert 0 < report.max_abs < 1e-5
    assert 0 < report.mean_abs <= report.max_abs
    assert report.scale > 0.01
    assert report.same_argmax == 1.0
    assert 0 <= report.kl < 1e-6
    assert "same top token at 100.00%" in str(report)
    assert same_state(model, before)
    assert model.training
    model.merge_adapter()
    with pytest.raises(MergeError, match="call unmerge_adapter"):
        deltaw.merge_report(model, [{"input_ids": ids}])


def test_the_report_sees_a_drift(make_llama, ids):
    tiny, coarse = (
        deltaw.merge_report(stir(deltaw.get_peft_model(make_llama(d), LoraConfig(**A))), [{"input_ids": ids}])
        for d in (torch.float32, torch.bfloat16)
    )
    assert coarse.mean_abs > 100 * tiny.mean_abs
    exact = MergeReport.between(torch.eye(3), torch.eye(3))
    assert (exact.max_abs, exact.kl, exact.same_argmax) == (0.0, 0.0, 1.0)
    assert MergeReport.between(torch.eye(3), -torch.eye(3)).same_argmax == 0.0
    assert MergeReport.between(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])).kl == pytest.approx(
        0.5 * (torch.log(torch.tensor(0.5 / 0.8808)) + torch.log(torch.tensor(0.5 / 0.1192))).item(), abs=1e-3
    )


def test_peft_sees_our_merge_as_its_own(make_llama, ids, tmp_path):
    model = stir(deltaw.get_peft_model(make_llama(), LoraConfig(**A)))
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(make_llama(), tmp_path).merge_and_unload()
    assert same_state(model.merge_and_unload(), state(theirs))
