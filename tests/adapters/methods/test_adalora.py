"""AdaLoRA beside PEFT: the same start, penalty, allocation and files; and that it cannot be forgotten."""

import copy
import json

import hypothesis.strategies as st
import peft
import pytest
import torch
from hypothesis import given, settings
from peer import ATTENTION, close, logits, same_state, state, stir
from safetensors.torch import load_file
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

import deltaw
from deltaw import AdaLoraConfig, LoraConfig, PeftModel
from deltaw.adapters import AdaLora, Linear, adapters_named, host_layers
from deltaw.errors import AdapterError, CheckpointError, ConfigError, TargetError

# PEFT warns of its own files: of layers that lost every triplet, and of masks, which it takes for rank patterns
pytestmark = [
    pytest.mark.filterwarnings("ignore:Adapter 'default'. 8 LoRA tensor"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),
]
STEPS = 14
FIELDS = {
    "target_modules": ATTENTION,
    "init_r": 4,
    "target_r": 2,
    "tinit": 2,
    "tfinal": 3,
    "total_step": STEPS,
    "lora_alpha": 8,
    "orth_reg_weight": 0.1,
    "task_type": "CAUSAL_LM",  # without one PEFT passes its own penalty by
}


def ours(base, seed=7, **fields):
    torch.manual_seed(seed)
    return deltaw.get_peft_model(base, AdaLoraConfig(**copy.deepcopy({**FIELDS, **fields})))


def theirs(base, seed=7, **fields):
    torch.manual_seed(seed)
    return peft.get_peft_model(base, peft.AdaLoraConfig(**copy.deepcopy({**FIELDS, **fields})))


def train(*models, steps=range(1, STEPS + 1), drive=True, check=None, lr=2e-2):
    """The same batches through each model, in PEFT's own loop; the losses, one list a model."""
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=lr) for m in models]
    losses = [[] for _ in models]
    for step in steps:
        ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(step))
        for model, optimizer, seen in zip(models, optimizers, losses, strict=True):
            model.train()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            if drive:
                model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
            seen.append(loss.item())
        if check is not None:
            check(step)
    return losses


def pattern(model):
    """rank_pattern as a file holds it."""
    held = model.peft_config["default"].rank_pattern
    return held and {key.replace(".default", ""): value for key, value in held.items()}


def layers(model, name="default"):
    return adapters_named(model.get_base_model(), name)


# --- one layer ----------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    r=st.integers(1, 9),
    alpha=st.one_of(st.integers(1, 64), st.floats(0.1, 50)),
    batch=st.lists(st.integers(1, 3), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_update_is_the_formula_and_merging_is_the_forward(shape, r, alpha, batch, dtype):
    host = Linear(nn.Linear(*shape, dtype=dtype))
    config = AdaLoraConfig(init_r=r, target_r=1, lora_alpha=alpha, init_lora_weights=False)
    host.add(AdaLora, "a", config, "layer")
    host.set_active(["a"])
    A, B, E = host.lora_A["a"], host.lora_B["a"], host.lora_E["a"]
    assert (A.shape, B.shape, E.shape) == ((r, shape[0]), (shape[1], r), (r, 1))
    delta = alpha / (r + 1e-5) * (B @ (A * E))
    tolerance = 1e-5 * (1 + delta.abs().max().item()) * max(shape)
    torch.testing.assert_close(host.adapters["a"].delta_weight(), delta, rtol=1e-5, atol=tolerance)
    x, before = torch.randn(*batch, shape[0], dtype=dtype), host.weight.detach().clone()
    out = host(x)
    torch.testing.assert_close(out, host.base_layer(x) + x @ delta.T, rtol=1e-5, atol=4 * tolerance)
    host.merge(["a"])
    torch.testing.assert_close(host(x), out, rtol=1e-5, atol=4 * tolerance)
    host.unmerge()
    assert torch.equal(host.weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cast", [True, False])
@pytest.mark.parametrize("init", [True, False])
def test_one_seed_gives_peft_s_adapter(make_llama, dtype, cast, init):
    fields = {**FIELDS, "target_modules": "all-linear", "init_lora_weights": init}
    torch.manual_seed(3)
    a = deltaw.get_peft_model(make_llama(dtype), AdaLoraConfig(**fields), autocast_adapter_dtype=cast)
    torch.manual_seed(3)
    b = peft.get_peft_model(make_llama(dtype), peft.AdaLoraConfig(**fields), autocast_adapter_dtype=cast)
    for (name, mine), (other, peer) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(mine.float(), peer.float()), name
        if "ranknum" not in name:
            assert mine.dtype == peer.dtype
            assert mine.requires_grad == peer.requires_grad
    assert not any(p.requires_grad for n, p in a.named_parameters() if "ranknum" in n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_is_the_base_bitwise(make_llama, ids, dtype):
    base = logits(make_llama(dtype, bias=True), ids)
    model = ours(make_llama(dtype, bias=True), lora_dropout=0.1)
    assert torch.equal(logits(model, ids), base)
    assert torch.equal(logits(model.train(), ids), base)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"target_modules": "all-linear", "lora_alpha": 3, "bias": "all"},
        {"bias": "lora_only", "modules_to_save": ["lm_head"]},
        {"layers_to_transform": 1, "exclude_modules": ["k_proj"]},
    ],
    ids=str,
)
def test_forward_gradients_and_merging_are_peft_s(make_llama, ids, fields):
    """In training, so with the penalty: float32, gradients to 5e-5 because the products are summed in another order."""
    a, b = ours(make_llama(bias=True), **fields), theirs(make_llama(bias=True), **fields)
    stir(a), stir(b)
    assert not close(logits(a, ids), logits(make_llama(bias=True), ids), 1e-3)
    assert close(logits(a, ids), logits(b, ids))
    grads = []
    for model in (a, b):
        model.train()(input_ids=ids, labels=ids).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert close(grad, grads[1][name], 5e-5), name
    merged, peer = a.merge_and_unload().state_dict(), b.merge_and_unload().state_dict()
    assert all(close(merged[key].float(), peer[key].float()) for key in merged)


def test_bf16_is_as_near_to_float32_as_peft_is(make_llama, ids):
    exact = logits(stir(ours(make_llama(torch.bfloat16).float())), ids)
    a, b = stir(ours(make_llama(torch.bfloat16))), stir(theirs(make_llama(torch.bfloat16)))
    assert (logits(a, ids) - exact).abs().mean() <= 1.25 * (logits(b, ids) - exact).abs().mean()
    assert close(logits(a, ids), logits(b, ids), 0.02)
    a.train()(input_ids=ids, labels=ids).loss.backward()
    assert {p.grad.dtype for p in a.parameters() if p.requires_grad} == {torch.float32}


# --- the penalty --------------------------------------------------------------------------------------------------


def test_the_penalty_is_peft_s_in_training_and_none_in_evaluation(make_llama, ids):
    a, b = stir(ours(make_llama())), stir(theirs(make_llama()))
    plain = a.eval()(input_ids=ids, labels=ids).loss
    assert plain.item() == pytest.approx(make_llama_loss(a, ids), rel=1e-6)
    loss, peer = (model.train()(input_ids=ids, labels=ids).loss for model in (a, b))
    assert loss.item() == pytest.approx(peer.item(), rel=1e-6)
    assert (loss - plain).item() == pytest.approx(a.base_model.penalty().item(), rel=1e-4)
    with a.disable_adapter():
        assert a(input_ids=ids, labels=ids).loss.item() == pytest.approx(
            make_llama().train()(input_ids=ids, labels=ids).loss.item(), rel=1e-6
        )


def make_llama_loss(model, ids):
    """The loss of the base with its adapters, asked without the wrapper."""
    return model.get_base_model()(input_ids=ids, labels=ids).loss.item()


def test_the_penalty_is_the_mean_distance_from_orthonormal(llama):
    model = stir(ours(llama, orth_reg_weight=0.3))
    norms = []
    for layer in layers(model).values():
        A, B = layer.lora_A, layer.lora_B
        norms += [(A @ A.T - torch.eye(4)).norm(), (B.T @ B - torch.eye(4)).norm()]
    assert model.base_model.penalty().item() == pytest.approx(0.3 * torch.stack(norms).mean().item(), rel=1e-6)
    assert ours(copy.deepcopy(model.unload()), orth_reg_weight=0).base_model.penalty() is None


def test_the_penalty_is_computed_in_float32_under_autocast(llama):
    model = stir(ours(llama))
    exact = model.base_model.penalty()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.base_model.penalty(), exact)


def test_a_part_of_a_batch_has_its_share_of_the_penalty(llama):
    """num_items_in_batch is what transformers' Trainer gives; the shares of the parts add up to one penalty."""
    model = stir(ours(llama)).train()
    ids = torch.randint(3, 128, (2, 9))
    labels = ids.clone()
    labels[1, :6] = -100
    items = (labels[:, 1:] != -100).sum()
    whole = model(input_ids=ids, labels=labels).loss
    parts = [model(input_ids=ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=items).loss for i in range(2)]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-6)


def test_other_methods_have_neither_penalty_nor_steps(llama, ids):
    model = deltaw.get_peft_model(llama, LoraConfig(target_modules=ATTENTION)).train()
    assert not model.base_model.steers
    assert model.base_model.penalty() is None
    before = state(model)
    model.update_and_allocate(3)
    assert same_state(model, before)


# --- the allocation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"deltaT": 3, "target_modules": "all-linear", "target_r": 1},
        {"tinit": 0, "tfinal": 0, "beta1": 0.5, "beta2": 0.9, "modules_to_save": ["lm_head"]},
        {"bias": "all", "init_r": 6, "orth_reg_weight": 0.5},
    ],
    ids=str,
)
def test_a_run_is_peft_s_step_by_step(make_llama, fields):
    """Losses, parameters, budgets and masks of 14 steps: before, while and after the ranks are handed out."""
    a, b = ours(make_llama(bias=True), **fields), theirs(make_llama(bias=True), **fields)
    start, seen = state(a), []

    def compare(step):
        assert pattern(a) == pattern(b), step
        seen.append(pattern(a) and sum(map(sum, pattern(a).values())))
        for (name, mine), (_, peer) in zip(a.named_parameters(), b.named_parameters(), strict=True):
            if name.endswith("k_proj.base_layer.bias"):
                continue  # softmax cancels it: its gradient is rounding alone, which Adam makes steps of
            torch.testing.assert_close(mine, peer, rtol=1e-4, atol=1e-5, msg=lambda m, n=name, s=step: f"{s} {n}: {m}")
            if "lora_E" in name:
                assert torch.equal(mine == 0, peer == 0), (step, name)

    mine, peers = train(a, b, check=compare)
    assert mine == pytest.approx(peers, rel=1e-5)
    config = a.peft_config["default"]
    assert seen[-1] == config.target_r * len(layers(a))
    assert [n for n in seen if n] == sorted((n for n in seen if n), reverse=True)
    assert len({sum(kept) for kept in pattern(a).values()}) > 1  # ranks differ between layers
    assert not same_state(a, start)
    assert all(float(value) == config.init_r for name, value in a.named_parameters() if "ranknum" in name)


def test_the_last_steps_keep_the_ranks_and_forget_the_rest(llama):
    model = ours(llama)
    train(model, steps=range(1, 12))
    kept = pattern(model)
    assert not any(layer.importance for layer in layers(model).values())
    train(model, steps=range(12, 15))
    assert pattern(model) == kept
    for layer in layers(model).values():
        assert torch.equal(layer.lora_E.view(-1) != 0, layer.mask)


def test_a_call_that_was_left_out_does_not_leave_the_ranks_open(llama):
    """The step at which they settle is skipped, as after an overflow in mixed precision: the next call settles them."""
    model = ours(llama)
    train(model, steps=range(1, 11))
    assert sum(map(sum, pattern(model).values())) >= 16
    train(model, steps=[12])
    assert sum(map(sum, pattern(model).values())) == 16


def test_a_run_of_one_step_hands_out_its_ranks(llama):
    """PEFT has gathered nothing by then, and fails."""
    model = ours(llama, tinit=0, tfinal=0, total_step=1)
    train(model, steps=[1])
    assert sum(map(sum, pattern(model).values())) == 16


def test_equal_ranks_at_both_ends_prune_nothing(llama):
    """PEFT fails here, at the first allocation."""
    model = ours(llama, target_r=4)
    train(model)
    assert all(all(kept) for kept in pattern(model).values())


def test_a_layer_that_took_no_part_in_the_loss_is_pruned_first(llama, ids):
    model = ours(llama, tinit=0, tfinal=0)
    unused = next(name for name in layers(model) if name.endswith("layers.0.self_attn.q_proj"))
    model.train()(input_ids=ids, labels=ids).loss.backward()
    for parameter in layers(model)[unused].parameters():
        parameter.grad = None
    model.update_and_allocate(1)
    assert not any(pattern(model)[f"{unused}.lora_E"])
    assert all(all(kept) for key, kept in pattern(model).items() if unused not in key)


def test_it_works_under_activation_checkpointing_and_over_bf16(make_llama):
    plain, model = ours(make_llama(torch.bfloat16)), ours(make_llama(torch.bfloat16))
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    a, b = train(plain, model)
    assert a == b
    assert pattern(plain) == pattern(model)


def test_a_copy_goes_on_by_itself(llama):
    model = ours(llama)
    train(model, steps=range(1, 6))
    copied = copy.deepcopy(model)
    before = state(copied)
    train(model, steps=range(6, 9))
    assert same_state(copied, before)
    train(copied, steps=range(6, 9))
    assert pattern(copied) == pattern(model)


# --- it cannot be forgotten ---------------------------------------------------------------------------------------


def test_a_run_that_never_allocates_stops_at_its_second_step(llama):
    with pytest.raises(AdapterError, match=r"never handed out.*update_and_allocate.*SteeringCallback"):
        train(ours(llama), drive=False, steps=[1, 2])


def test_a_run_that_never_allocates_is_not_saved(llama, ids, tmp_path):
    """A loop with a loss of its own, which the penalty never sees."""
    model = ours(llama).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        model(input_ids=ids).logits.logsumexp(-1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with pytest.raises(AdapterError, match="adapter 'default' was trained, but its ranks were never handed out"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_steps_before_tinit_count(llama, tmp_path):
    model = ours(llama, tinit=10)
    train(model, steps=range(1, 4))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"] is None


@pytest.mark.parametrize("fields", [{}, {"init_lora_weights": False}])
def test_what_was_not_trained_here_is_saved(make_llama, ids, tmp_path, fields):
    model = ours(make_llama(), **fields)
    stir(model)
    model(input_ids=ids, labels=ids).loss.backward()  # looked at, not stepped
    model.train()(input_ids=ids, labels=ids).loss.backward()
    model.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(make_llama(), tmp_path, is_trainable=True)
    back.save_pretrained(tmp_path / "again")


def test_update_and_allocate_says_what_it_needs(llama, ids):
    model = ours(llama, total_step=None).train()
    model(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(ConfigError, match=r"update_and_allocate\(1\).*total_step is not set"):
        model.update_and_allocate(1)
    model.peft_config["default"].total_step = STEPS
    model.zero_grad()
    with pytest.raises(AdapterError, match=r"before optimizer.zero_grad\(\)"):
        model.update_and_allocate(1)
    with pytest.raises(AdapterError, match="to be settled at step 11, but it was not called before"):
        model.update_and_allocate(12)


# --- files --------------------------------------------------------------------------------------------------------


def test_the_file_is_peft_s_and_each_reads_the_other_s(make_llama, ids, tmp_path):
    a, b = ours(make_llama(), modules_to_save=["lm_head"]), theirs(make_llama(), modules_to_save=["lm_head"])
    train(a, b)
    a.eval(), b.eval()
    a.save_pretrained(tmp_path / "ours")
    b.save_pretrained(tmp_path / "theirs")
    mine, peers = (load_file(tmp_path / w / "adapter_model.safetensors") for w in ("ours", "theirs"))
    assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in peers.items()}
    configs = [json.loads((tmp_path / w / "adapter_config.json").read_text()) for w in ("ours", "theirs")]
    for key in ("rank_pattern", "init_r", "target_r", "total_step", "peft_type", "inference_mode"):
        assert configs[0][key] == configs[1][key], key
    assert configs[0].keys() == configs[1].keys()
    for folder, wanted in (("ours", a), ("theirs", b)):
        here = PeftModel.from_pretrained(make_llama(), tmp_path / folder)
        there = peft.PeftModel.from_pretrained(make_llama(), tmp_path / folder)
        assert close(logits(here, ids), logits(wanted, ids))
        assert close(logits(there, ids), logits(wanted, ids))
        for (name, x), (other, y) in zip(here.named_parameters(), there.named_parameters(), strict=True):
            assert name == other
            empty = "ranknum" in name and float(y) == 0  # PEFT's, where no triplet is left
            assert empty or torch.equal(x, y), name


@pytest.mark.parametrize("low", [False, True])
def test_a_pruned_adapter_comes_back_bitwise_and_is_written_again(make_llama, ids, tmp_path, low):
    model = ours(make_llama())
    train(model)
    model.eval().save_pretrained(tmp_path / "a")
    wanted = logits(model, ids)
    back = PeftModel.from_pretrained(make_llama(), tmp_path / "a", low_cpu_mem_usage=low)
    assert close(logits(back, ids), wanted)  # fewer rows in the products, so not bitwise
    assert {len(layer.lora_E) for layer in layers(back).values()} != {4}
    assert not any(p.is_meta for p in back.parameters())
    back.save_pretrained(tmp_path / "b")
    a, b = (load_file(tmp_path / w / "adapter_model.safetensors") for w in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    configs = [json.loads((tmp_path / w / "adapter_config.json").read_text()) for w in "ab"]
    assert configs[0] == configs[1]
    again = PeftModel.from_pretrained(make_llama(), tmp_path / "b")
    assert torch.equal(logits(again, ids), logits(back, ids))
    assert close(logits(back.merge_and_unload(), ids), wanted, 1e-5)


def test_layers_may_lose_every_triplet(make_llama, ids, tmp_path):
    model = ours(make_llama())
    train(model)
    first = next(iter(layers(model).values()))
    first.mask[:] = False
    with torch.no_grad():
        first.lora_E.zero_()
    key = next(iter(layers(model))) + ".lora_E"
    model.peft_config["default"].rank_pattern[key] = [False] * 4
    model.eval().save_pretrained(tmp_path)
    for library in (deltaw, peft):
        back = library.PeftModel.from_pretrained(make_llama(), tmp_path)
        assert close(logits(back, ids), logits(model, ids))
    PeftModel.from_pretrained(make_llama(), tmp_path).merge_and_unload()


def test_a_pruned_adapter_trains_on(make_llama, tmp_path):
    """Its ranks were settled: going on without handing out is right, and handing out prunes no further."""
    model = ours(make_llama())
    train(model)
    model.save_pretrained(tmp_path)
    kept = pattern(model)
    free = PeftModel.from_pretrained(make_llama(), tmp_path, is_trainable=True)
    assert train(free, drive=False)[0][-1] > 0
    free.save_pretrained(tmp_path / "free")
    driven = PeftModel.from_pretrained(make_llama(), tmp_path, is_trainable=True)
    train(driven)
    assert pattern(driven) == pattern(free) == kept


def test_pruning_goes_on_from_where_a_file_stopped(make_llama, ids, tmp_path):
    """The masks of both runs, one over the other, in terms of the triplets that there were at first."""
    model = ours(make_llama(), target_r=3)
    train(model)
    model.save_pretrained(tmp_path)
    first = pattern(model)
    again = PeftModel.from_pretrained(make_llama(), tmp_path, is_trainable=True)
    again.peft_config["default"].target_r = 1
    train(again)
    second = pattern(again)
    assert sum(map(sum, second.values())) == 8
    assert all(
        len(second[key]) == 4 and all(was or not now for was, now in zip(first[key], second[key], strict=True))
        for key in first
    )
    again.eval().save_pretrained(tmp_path / "b")
    back = peft.PeftModel.from_pretrained(make_llama(), tmp_path / "b")
    assert close(logits(back, ids), logits(again, ids))


def test_a_state_dict_goes_round(llama):
    model = ours(llama)
    train(model)
    held = {key: tensor.clone() for key, tensor in deltaw.get_peft_model_state_dict(model).items()}
    before = state(model)
    with torch.no_grad():
        for layer in layers(model).values():
            layer.lora_E.add_(1.0)
    deltaw.set_peft_model_state_dict(model, held)
    assert same_state(model, before)


def test_a_file_that_does_not_fit_its_masks_changes_nothing(make_llama, tmp_path):
    model = ours(make_llama())
    train(model)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    key = next(k for k, kept in config["rank_pattern"].items() if not all(kept))
    config["rank_pattern"][key] = [True] * 4
    path.write_text(json.dumps(config))
    base = make_llama()
    before = state(base)
    with pytest.raises(CheckpointError, match=r"shape of .*lora_A"):
        PeftModel.from_pretrained(base, tmp_path)
    assert same_state(base, before)


def test_a_file_without_total_step_is_written_with_a_note(llama, tmp_path, caplog):
    with caplog.at_level("WARNING", "deltaw"):
        ours(llama, total_step=None).save_pretrained(tmp_path)
    assert "PEFT refuses it without" in caplog.text


# --- beside other adapters ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [LoraConfig, AdaLoraConfig])
def test_lora_and_adalora_do_not_share_a_layer(llama, first):
    second = AdaLoraConfig if first is LoraConfig else LoraConfig
    model = deltaw.get_peft_model(llama, first(target_modules=["q_proj"]))
    before = state(model)
    with pytest.raises(AdapterError, match="'lora_A' of this layer holds the parameters of 'default'"):
        model.add_adapter("b", second(target_modules=["q_proj"]))
    assert same_state(model, before)
    assert list(model.peft_config) == ["default"]
    model.add_adapter("b", second(target_modules=["v_proj"]))


def test_one_adapter_trains_at_a_time(llama, ids, tmp_path):
    model = ours(llama)
    model.add_adapter("b", AdaLoraConfig(**FIELDS))
    with pytest.raises(AdapterError, match=r"\['default', 'b'\] would train together.*ADALORA.*inference_mode=True"):
        model.set_adapter(["default", "b"])
    model.set_adapter("b")
    train(model)
    assert pattern(model) is None
    assert model.peft_config["b"].rank_pattern is not None
    model.set_adapter(["default", "b"], inference_mode=True)
    assert model.train()(input_ids=ids, labels=ids).loss.item() == pytest.approx(
        model.eval()(input_ids=ids, labels=ids).loss.item(), rel=1e-6
    )  # nothing trains, so there is no penalty
    model.save_pretrained(tmp_path)
    assert (tmp_path / "b" / "adapter_config.json").exists()


def test_several_pruned_adapters_serve_together(make_llama, ids, tmp_path):
    model = ours(make_llama())
    train(model)
    model.eval().save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(make_llama(), tmp_path)
    back.load_adapter(tmp_path, "twin")
    alone = logits(back, ids)
    back.set_adapter("twin")
    assert torch.equal(logits(back, ids), alone)
    back.set_adapter(["default", "twin"])
    with back.disable_adapter():
        base = logits(back, ids)
    assert close(logits(back, ids), logits(make_llama(), ids) + (logits(back, ids) - base))
    assert not close(logits(back, ids), alone, 1e-4)


def test_token_rows_train_and_travel_beside_it(make_llama, ids, tmp_path):
    fields = {"trainable_token_indices": [3, 5], "modules_to_save": ["lm_head"]}
    model = ours(make_llama(), **fields)
    train(model)
    model.eval().save_pretrained(tmp_path)
    for library in (deltaw, peft):
        back = library.PeftModel.from_pretrained(make_llama(), tmp_path)
        assert close(logits(back, ids), logits(model, ids))


def test_a_batch_may_mix_them(make_llama):
    model = ours(make_llama(), init_lora_weights=False)
    model.add_adapter("b", AdaLoraConfig(**{**FIELDS, "target_modules": ["v_proj"], "init_lora_weights": False}))
    batch = torch.randint(3, 128, (3, 6))
    with torch.no_grad():
        mixed = model(input_ids=batch, adapter_names=["default", "b", "__base__"]).logits
    assert close(mixed[2], logits(make_llama(), batch)[2])
    for row, name in enumerate(["default", "b"]):
        model.set_adapter(name)
        assert close(mixed[row], logits(model, batch)[row])
        assert not close(mixed[row], logits(make_llama(), batch)[row], 1e-3)


# --- kinds of layers ----------------------------------------------------------------------------------------------


class Convolutional(nn.Module):
    def __init__(self, dimensions=2, groups=1, padding_mode="zeros"):
        super().__init__()
        torch.manual_seed(0)
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        self.conv = kind(4, 6, 3, stride=2, padding=1, padding_mode=padding_mode, groups=groups)

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_convolutions(dimensions, padding_mode):
    model = ours(Convolutional(dimensions, padding_mode=padding_mode), target_modules=["conv"], task_type=None)
    x = torch.randn(2, 4, *[7] * dimensions)
    assert torch.equal(model(x), Convolutional(dimensions, padding_mode=padding_mode)(x))
    stir(model, 0.5)
    out = model(x)
    if dimensions == 2 and padding_mode == "zeros":  # PEFT knows no other
        peer = stir(theirs(Convolutional(), target_modules=["conv"], task_type=None), 0.5)
        assert [n for n, _ in model.named_parameters()] == [n for n, _ in peer.named_parameters()]
        assert close(out, peer(x))
    host = model.base_model.model.conv
    before = host.weight.detach().clone()
    model.merge_adapter()
    assert not torch.equal(host.weight, before)
    assert close(model(x), out, 1e-5)
    model.unmerge_adapter()
    assert torch.equal(host.weight, before)


def test_convolutions_with_groups_and_embeddings_are_refused_by_name(llama):
    with pytest.raises(ConfigError, match="'conv', a convolution with 2 groups"):
        ours(Convolutional(groups=2), target_modules=["conv"], task_type=None)
    with pytest.raises(TargetError, match="ADALORA does not support"):
        ours(llama, target_modules=["embed_tokens"])


def test_gpt2_s_transposed_weights(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    def base():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=128, n_positions=32)).eval()

    ids = torch.randint(3, 128, (2, 9))
    fields = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    a, b = stir(ours(base(), **fields)), stir(theirs(base(), **fields))
    assert close(logits(a, ids), logits(b, ids))
    merged, peer = a.merge_and_unload(), b.merge_and_unload()
    assert close(logits(merged, ids), logits(peer, ids))


def test_the_customary_layers_are_peft_s(make_llama):
    from architectures import build

    for name in ("llama", "opt", "gpt_neox"):
        a = ours(build(name), target_modules=None)
        b = theirs(build(name), target_modules=None)
        wrapped = {n for n, m in b.named_modules() if hasattr(m, "ranknum")}
        assert {f"base_model.model.{n}" for n, _ in host_layers(a.get_base_model())} == wrapped


class Losing(nn.Module):
    """The least that has a loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        out = self.second(self.first(x).relu())
        return SequenceClassifierOutput(loss=out.square().mean(), logits=out)


@pytest.mark.parametrize("method", ["adalora", "lora"])
def test_torch_compile_runs_it(method):
    """LoRA as one graph, AdaLoRA with the penalty outside."""
    config = {
        "adalora": AdaLoraConfig(target_modules=["first", "second"], init_r=2, target_r=1, init_lora_weights=False),
        "lora": LoraConfig(target_modules=["first", "second"], r=2, init_lora_weights=False),
    }[method]
    model = deltaw.get_peft_model(Losing(), config).train()
    x = torch.randn(4, 5)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=method == "lora")
    grads = []
    for run in (model, compiled):
        model.zero_grad()
        run(x=x).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for eager, traced in zip(*grads, strict=True):
        torch.testing.assert_close(traced, eager)
    assert compiled(x=x).loss.item() == pytest.approx(model(x=x).loss.item(), rel=1e-6)
