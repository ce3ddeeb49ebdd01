"""trainable_token_indices: rows of an embedding, the tied head that follows them, and PEFT's numbers and files."""

import copy
import logging

import hypothesis.strategies as st
import peft
import pytest
import torch
import torch.nn.functional as F
from architectures import build
from hypothesis import given, settings
from peer import close, gradients, logits, pair, same_state, state, stir
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

import deltaw
from deltaw import LoraConfig, PeftModel
from deltaw.adapters import TokenHost, host_layers
from deltaw.adapters.tokens import TokenRows
from deltaw.errors import AdapterError, ConfigError, MergeError, TargetError

ROWS = [5, 3, 100]  # not in order
FIELDS = {"target_modules": ["q_proj", "up_proj"], "trainable_token_indices": ROWS}
DELTA = "token_adapter.trainable_tokens_delta"

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*no tied modules are added in either:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`:UserWarning"),
]


@pytest.fixture
def ids():
    """(2, 9), with every one of ROWS in it and one of them twice."""
    ids = torch.randint(6, 99, (2, 9), generator=torch.Generator().manual_seed(1))
    ids[0, :3], ids[1, 4] = torch.tensor(ROWS), 3
    return ids


def untied(make_llama):
    return lambda: make_llama()


def tied(make_llama):
    return lambda: make_llama(tied=True)


BASES = [untied, tied]


# --- the formula --------------------------------------------------------------------------------------------------


def host_of(layer: nn.Module, rows: list[int], name: str = "a") -> TokenHost:
    host = TokenHost(layer)
    host.add(TokenRows, name, LoraConfig(target_modules=["x"], trainable_token_indices=rows), "layer")
    host.set_active([name])
    return host


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 12),
    width=st.integers(1, 6),
    data=st.data(),
    batch=st.lists(st.integers(1, 4), max_size=3),
    head=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_rows_are_replaced_and_nothing_else_is(size, width, data, batch, head, bias, dtype):
    rows = data.draw(st.lists(st.integers(0, size - 1), unique=True, min_size=1))
    torch.manual_seed(0)
    layer = nn.Linear(width, size, bias=bias, dtype=dtype) if head else nn.Embedding(size, width, dtype=dtype)
    host = host_of(layer, rows)
    delta = host.trainable_tokens_delta["a"]
    assert torch.equal(delta, layer.weight[torch.tensor(rows)].to(delta.dtype))
    with torch.no_grad():
        delta += torch.randn(delta.shape)
    x = torch.randn(*batch, width).to(dtype) if head else torch.randint(size, batch)
    weight = layer.weight.detach().clone()
    for row, value in zip(rows, delta.detach(), strict=True):
        weight[row] = value.to(dtype)
    expected = F.linear(x, weight, layer.bias) if head else F.embedding(x, weight)
    out = host(x)
    assert torch.allclose(out, expected, rtol=1e-6 if dtype != torch.bfloat16 else 1e-2, atol=1e-6)
    if not head:
        assert torch.equal(out, expected)
    assert torch.equal(host.weight, weight)
    before = layer.weight.detach().clone()
    host.merge(["a"])
    assert torch.equal(layer.weight, weight)
    assert torch.equal(host(x), expected)
    host.unmerge()
    assert torch.equal(layer.weight, before)
    assert torch.equal(host.adapters["a"].delta_weight(), (weight.double() - before.double()).to(delta.dtype))


def test_the_gradient_goes_to_the_rows_that_were_read_and_to_no_other():
    host = host_of(nn.Embedding(8, 3, padding_idx=2).requires_grad_(False), [4, 2, 7])
    out = host(torch.tensor([[4, 1, 4], [2, 0, 6]]))
    out.sum().backward()
    # 4 twice, the padding row once (whoever names it wants it trained), 7 never
    assert host.trainable_tokens_delta["a"].grad.tolist() == [[2.0] * 3, [1.0] * 3, [0.0] * 3]
    assert host.base_layer.weight.grad is None


# --- PEFT ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "rows",
    [
        ROWS,
        {"embed_tokens": [3, 5]},
        {"model.embed_tokens": [3, 5], "lm_head": [3, 5]},
        {"embed_tokens": [3, 5], "lm_head": [7]},
        {"lm_head": [3, 5]},
    ],
    ids=str,
)
def test_names_forward_and_gradients_are_peft_s(make_llama, ids, base, rows):
    ours, theirs = pair(base(make_llama), target_modules=["q_proj", "up_proj"], trainable_token_indices=rows)
    names = [(n, p.shape, p.dtype, p.requires_grad) for n, p in theirs.named_parameters()]
    assert [(n, p.shape, p.dtype, p.requires_grad) for n, p in ours.named_parameters()] == names
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    stir(ours), stir(theirs)
    assert not close(logits(ours, ids), logits(base(make_llama)(), ids), 1e-2)
    assert close(logits(ours, ids), logits(theirs, ids))
    mine, peers = gradients(ours, ids), gradients(theirs, ids)
    assert mine.keys() == peers.keys()
    assert all(close(mine[name], peers[name], 5e-5) for name in mine)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast", [True, False])
def test_half_precision_as_peft(make_llama, ids, dtype, cast):
    ours = deltaw.get_peft_model(make_llama(dtype), LoraConfig(**FIELDS), autocast_adapter_dtype=cast)
    theirs = peft.get_peft_model(make_llama(dtype), peft.LoraConfig(**FIELDS), autocast_adapter_dtype=cast)
    assert [(n, p.dtype) for n, p in ours.named_parameters()] == [(n, p.dtype) for n, p in theirs.named_parameters()]
    assert {p.dtype for p in ours.parameters() if p.requires_grad} == {torch.float32 if cast else dtype}
    with torch.no_grad():
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            b.copy_(a)
    stir(ours), stir(theirs)
    assert close(logits(ours, ids), logits(theirs, ids), 0.02)
    assert all(bool(grad.any()) for grad in gradients(ours, ids).values())


def test_a_scaled_embedding_scales_its_rows(ids):
    """Gemma multiplies what it looks up; its head is tied."""
    ids = ids % 64
    fields = {"target_modules": ["q_proj"], "trainable_token_indices": [int(i) for i in ids[0, :3].unique()]}
    base = logits(build("gemma3"), ids)
    ours, theirs = pair(lambda: build("gemma3"), **fields)
    assert close(logits(ours, ids), base, 1e-6)
    stir(ours, 0.5), stir(theirs, 0.5)
    assert not close(logits(ours, ids), base, 1e-2)
    assert close(logits(ours, ids), logits(theirs, ids))
    mine, peers = gradients(ours, ids), gradients(theirs, ids)
    assert all(close(mine[name], peers[name], 5e-5) for name in mine)
    assert close(logits(ours.merge_and_unload(), ids), logits(theirs.merge_and_unload(), ids))


def test_every_embedding_tied_to_the_input_follows(tmp_path):
    """T5: the encoder's, the decoder's and the head all read the shared weight."""

    def build_t5():
        torch.manual_seed(0)
        sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)).eval()

    def run(model):
        with torch.no_grad():
            return model(input_ids=ids, decoder_input_ids=ids[:, :3]).logits

    ids = torch.tensor([[5, 3, 9, 20]])
    fields = {"target_modules": ["q", "v"], "trainable_token_indices": [3, 5], "task_type": "SEQ_2_SEQ_LM"}
    ours, theirs = pair(build_t5, **fields)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    stir(ours), stir(theirs)
    out = run(ours.base_model)
    assert close(out, run(theirs.base_model))
    assert not close(out, run(build_t5()), 1e-2)
    ours.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(build_t5(), tmp_path).base_model), out)
    merged = ours.merge_and_unload()
    assert not list(host_layers(merged))
    assert close(run(merged), out)
    assert merged.lm_head.weight is merged.encoder.embed_tokens.weight is merged.shared.weight


# --- the start, the fast loss, mixed batches ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_is_the_base(make_llama, ids, dtype):
    """Bitwise through the embedding; a tied head's rows are a product of their own, 1e-6 (bf16 1e-2) of the largest."""
    base = logits(make_llama(dtype), ids)
    assert torch.equal(logits(deltaw.get_peft_model(make_llama(dtype), LoraConfig(**FIELDS)), ids), base)
    base = logits(make_llama(dtype, tied=True), ids)
    model = deltaw.get_peft_model(make_llama(dtype, tied=True), LoraConfig(**FIELDS))
    assert close(logits(model, ids), base, 1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("base", BASES)
def test_the_fast_loss_sees_the_rows(make_llama, ids, base):
    model = stir(deltaw.get_peft_model(base(make_llama)(), LoraConfig(**FIELDS)))
    exact = gradients(model, ids)
    model.zero_grad()
    loss = deltaw.causal_lm_loss(model, input_ids=ids, labels=ids)
    loss.backward()
    assert torch.allclose(loss, model(input_ids=ids, labels=ids).loss, rtol=1e-5)
    for name, parameter in model.named_parameters():
        assert name not in exact or close(parameter.grad, exact[name], 1e-4), name


@pytest.mark.parametrize("base", BASES)
def test_rows_of_a_batch_may_have_adapters_of_their_own(make_llama, ids, base):
    model = stir(deltaw.get_peft_model(base(make_llama)(), LoraConfig(**FIELDS)))
    model.add_adapter("b", LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 7]))
    model.add_adapter("c", LoraConfig(target_modules=["q_proj"]))
    stir(stir(model, adapter="b"), adapter="c")
    ids = torch.cat([ids[:1]] * 4)
    mixed = model(input_ids=ids, adapter_names=["default", "b", "c", "__base__"]).logits
    for row, name in enumerate(["default", "b", "c"]):
        model.set_adapter(name)
        assert close(mixed[row], logits(model, ids)[row], 1e-5)
    with model.disable_adapter():
        assert close(mixed[3], logits(model, ids)[3], 1e-6)
    model.set_adapter("b")
    model(input_ids=ids, adapter_names=["default", "b", "c", "__base__"]).logits.square().mean().backward()
    rows = model.get_base_model().model.embed_tokens.trainable_tokens_delta
    assert bool(rows["b"].grad.any())
    assert rows["default"].grad is None


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("rows", [ROWS, {"embed_tokens": [3], "lm_head": [5, 3]}], ids=str)
def test_files_both_ways(make_llama, ids, tmp_path, base, rows):
    ours, theirs = pair(base(make_llama), target_modules=["q_proj"], trainable_token_indices=rows)
    out = logits(stir(ours), ids)
    stir(theirs)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    mine, peers = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert f"base_model.model.model.embed_tokens.{DELTA}" in mine
    assert mine.keys() == peers.keys()
    assert all(torch.equal(mine[key], peers[key]) for key in mine)
    for low in (False, True):
        here = PeftModel.from_pretrained(base(make_llama)(), tmp_path / "theirs", low_cpu_mem_usage=low)
        assert torch.equal(logits(here, ids), out)
        assert here.peft_config["default"].trainable_token_indices == rows
    there = peft.PeftModel.from_pretrained(base(make_llama)(), tmp_path / "ours")
    assert close(logits(there, ids), out)
    other = deltaw.get_peft_model(base(make_llama)(), LoraConfig(target_modules=["v_proj"]))
    other.load_adapter(tmp_path / "ours", "second")
    other.set_adapter("second")
    assert torch.equal(logits(other, ids), out)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.filterwarnings("ignore:.*have invalid shape:peft.utils.warning.PeftWarning")
def test_rows_of_a_vocabulary_that_grew(make_llama, ids, tmp_path, base):
    """Their start is random in each copy of the base, so they and the embeddings are in the file; PEFT reads it."""

    def resized():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(130, mean_resizing=False)
        return model.eval()

    base(make_llama)().save_pretrained(tmp_path / "base")
    ids = torch.cat([ids, torch.tensor([[128, 129], [129, 129]])], dim=1)
    fields = {"target_modules": ["q_proj"], "trainable_token_indices": [128, 129]}
    ours = stir(deltaw.get_peft_model(resized(), LoraConfig(**fields)))
    theirs = stir(peft.get_peft_model(resized(), peft.LoraConfig(**fields)))
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for source, writer in (("ours", ours), ("theirs", theirs)):
        out = logits(writer, ids)
        assert close(logits(PeftModel.from_pretrained(resized(), tmp_path / source), ids), out)
        assert close(logits(peft.PeftModel.from_pretrained(resized(), tmp_path / source), ids), out)


# --- merging and taking away --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", BASES)
def test_merge_unmerge_unload(make_llama, ids, tmp_path, base, dtype):
    def fresh():
        return base(make_llama)().to(dtype)

    before, modules = state(fresh()), [(n, type(m)) for n, m in fresh().named_modules()]
    model = stir(deltaw.get_peft_model(fresh(), LoraConfig(**FIELDS)))
    out, bare, tolerance = logits(model, ids), state(model), 1e-5 if dtype == torch.float32 else 0.03
    model.merge_adapter()
    assert close(logits(model, ids), out, tolerance)
    host = model.base_model.model.model.embed_tokens
    assert torch.equal(host.weight[torch.tensor(ROWS)], host.trainable_tokens_delta["default"].to(dtype))
    with pytest.raises(MergeError, match="merged already"):
        model.merge_adapter()
    model.save_pretrained(tmp_path / "adapter")
    model.unmerge_adapter()
    assert same_state(model, bare)
    assert torch.equal(logits(model, ids), out)
    assert torch.equal(logits(PeftModel.from_pretrained(fresh(), tmp_path / "adapter"), ids), out)

    unloaded = copy.deepcopy(model).unload()
    assert same_state(unloaded, before)
    assert [(n, type(m)) for n, m in unloaded.named_modules()] == modules
    merged = model.merge_and_unload()
    assert [(n, type(m)) for n, m in merged.named_modules()] == modules
    assert close(logits(merged, ids), out, tolerance)
    is_tied = base is tied
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == is_tied
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), merged.parameters(), strict=True))
    assert again.config.tie_word_embeddings == is_tied


def test_head_and_embedding_with_other_rows_part_when_they_are_merged(make_llama, ids, caplog):
    rows = {"embed_tokens": [3], "lm_head": [5, 100]}
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=rows)
    model = stir(deltaw.get_peft_model(make_llama(tied=True), config), 0.5)
    out = logits(model, ids)
    with caplog.at_level(logging.WARNING):
        model.merge_adapter()
    assert "was tied to" in caplog.text
    assert close(logits(model, ids), out, 1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model, ids), out)
    base = model.get_base_model()
    assert base.lm_head.base_layer.weight is base.model.embed_tokens.base_layer.weight
    merged = model.merge_and_unload()
    assert close(logits(merged, ids), out, 1e-5)
    assert not merged.config.tie_word_embeddings


@pytest.mark.parametrize("base", BASES)
def test_adapters_as_a_set(make_llama, ids, base):
    plain = base(make_llama)()
    original, modules = state(plain), list(plain.named_modules())
    base_out = logits(plain, ids)
    model = stir(deltaw.get_peft_model(plain, LoraConfig(**FIELDS)))
    out = logits(model, ids)
    model.add_adapter("b", LoraConfig(target_modules=["v_proj"], trainable_token_indices=[7, 3]))
    model.add_adapter("c", LoraConfig(target_modules=["v_proj"]))
    model.add_adapter("d", LoraConfig(target_modules=["v_proj"], trainable_token_indices=[8]))
    assert torch.equal(logits(model, ids), out)
    for name in "bcd":
        stir(model, adapter=name)
    outs = {}
    for name in ("b", "c", "d", "default"):
        model.set_adapter(name)
        outs[name] = logits(model, ids)
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        assert all(f".{name}" in n for n in trained)
        assert any("tokens_delta" in n for n in trained) == (name != "c")
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), base_out)
    before, flags = state(model), [p.requires_grad for p in model.parameters()]
    model.merge_adapter(["d"])
    with pytest.raises(AdapterError, match=r"'default' and 'b' each replace token 3 .*only one of them can be active"):
        model.set_adapter(["default", "b"])
    assert model.get_base_model().model.embed_tokens.merged_adapters == ["d"]
    model.unmerge_adapter()
    with pytest.raises(MergeError, match="'default' and 'b' each replace token 3"):
        model.merge_adapter(["default", "b"])
    assert same_state(model, before)
    assert model.active_adapters == ["default"]
    assert [p.requires_grad for p in model.parameters()] == flags

    model.set_adapter(["default", "d"])  # other rows: both at once
    weight = model.get_base_model().model.embed_tokens.weight
    host = model.get_base_model().model.embed_tokens
    assert torch.equal(weight[8], host.trainable_tokens_delta["d"][0])
    assert torch.equal(weight[3], host.trainable_tokens_delta["default"][1])
    model.delete_adapter("default")
    model.set_adapter("b")
    assert torch.equal(logits(model, ids), outs["b"])
    for name in "bd":
        model.delete_adapter(name)
    assert not any(isinstance(module, TokenHost) for module in model.modules())
    model.delete_adapter("c")
    assert same_state(plain, original)
    assert list(plain.named_modules()) == modules


@pytest.mark.parametrize("base", BASES)
def test_copies_share_nothing(make_llama, ids, base):
    model = stir(deltaw.get_peft_model(base(make_llama)(), LoraConfig(**FIELDS)))
    out = logits(model, ids)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other, ids), out)
    stir(other, 1.0)
    assert torch.equal(logits(model, ids), out)
    assert not close(logits(other, ids), out, 1e-2)
    other.merge_adapter()
    assert torch.equal(logits(model, ids), out)


@pytest.mark.parametrize("base", BASES)
def test_the_rest_of_the_interface(make_llama, ids, tmp_path, base):
    """Counting and status as PEFT's, loading over itself, compiling, activation checkpointing."""
    ours, theirs = pair(base(make_llama), **FIELDS)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    mine, peers = ours.get_model_status(), theirs.get_model_status()
    for field in ("num_adapter_layers", "requires_grad", "devices", "active_adapters", "merged_adapters", "enabled"):
        assert getattr(mine, field) == getattr(peers, field), field
    stir(ours).save_pretrained(tmp_path)
    out = logits(ours, ids)
    stir(ours, 1.0).load_adapter(tmp_path, "default")
    assert torch.equal(logits(ours, ids), out)
    assert close(logits(torch.compile(ours, backend="aot_eager", fullgraph=True), ids), out)
    expected = gradients(ours, ids)
    ours.train().activation_checkpointing_enable()
    again = gradients(ours, ids)
    assert expected.keys() == again.keys()
    assert all(close(again[name], expected[name], 1e-5) for name in again)


def test_models_read_the_rows_off_the_weight(llama):
    model = stir(deltaw.get_peft_model(llama, LoraConfig(**FIELDS)))
    delta = model.get_base_model().model.embed_tokens.trainable_tokens_delta["default"]
    assert torch.equal(model.get_input_embeddings().weight[torch.tensor(ROWS)], delta)
    with model.disable_adapter():
        assert model.get_input_embeddings().weight is llama.model.embed_tokens.base_layer.weight


# --- what cannot be -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"trainable_token_indices": [-1, 500, 7, 7]}, ["rows 0 to 127, and -1, 500 are not", "rows 7 of .* twice"]),
        ({"trainable_token_indices": {"embed_token": [1], "norm": [0]}}, ["did you mean 'embed_tokens'", "RMSNorm"]),
        ({"trainable_token_indices": {"embed_tokens": [1], "model.embed_tokens": [2]}}, ["named twice"]),
        ({"trainable_token_indices": []}, ["no row of 'model.embed_tokens' is named"]),
        ({"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]}, ["named by modules_to_save too"]),
        ({"trainable_token_indices": [1], "target_modules": ["embed_tokens"]}, ["named by target_modules too"]),
        ({"trainable_token_indices": [1], "modules_to_save": ["lm_head"]}, ["follows its rows, but modules_to_save"]),
        ({"trainable_token_indices": [1], "target_modules": ["lm_head"]}, ["follows its rows, but target_modules"]),
        (
            {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}, "ensure_weight_tying": True},
            ["'lm_head' is tied to 'model.embed_tokens', but other rows are given"],
        ),
    ],
    ids=str,
)
def test_faults_are_told_together_and_change_nothing(make_llama, fields, words):
    model = make_llama(tied=True)
    before, modules = state(model), list(model.named_modules())
    with pytest.raises(TargetError, match="trainable_token_indices") as error:
        deltaw.get_peft_model(model, LoraConfig(**{"target_modules": ["q_proj"], **fields}))
    for word in words:
        with pytest.raises(TargetError, match=word):
            raise error.value
    assert same_state(model, before)
    assert list(model.named_modules()) == modules
    assert all(p.requires_grad for p in model.parameters())


def test_values_of_another_type_are_the_config_s_own_fault():
    with pytest.raises(ConfigError, match="trainable_token_indices='all'"):
        LoraConfig(trainable_token_indices="all")


def test_other_kinds_of_adapters_on_the_same_embedding_are_refused(llama):
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1])
    model = deltaw.get_peft_model(llama, config)
    before = state(model)
    with pytest.raises(TargetError, match=r"'model.embed_tokens', a Embedding, whose rows another adapter replaces"):
        model.add_adapter("b", LoraConfig(target_modules=["embed_tokens"]))
    with pytest.raises(TargetError, match="carries an adapter already"):
        model.add_adapter("b", LoraConfig(target_modules=["v_proj"], modules_to_save=["embed_tokens"]))
    assert same_state(model, before)
    model.add_adapter("b", LoraConfig(target_modules=["v_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(TargetError, match="'lm_head' is adapted already"):
        model.add_adapter("c", LoraConfig(target_modules=["v_proj"], trainable_token_indices={"lm_head": [1]}))
    assert list(model.peft_config) == ["default", "b"]


def test_a_tied_head_that_is_adapted_already_cannot_follow(make_llama):
    model = deltaw.get_peft_model(make_llama(tied=True), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(TargetError, match=r"'lm_head' is tied to .* it is adapted already"):
        model.add_adapter("b", LoraConfig(target_modules=["v_proj"], trainable_token_indices=[1]))
    assert list(model.peft_config) == ["default"]


def test_an_embedding_that_does_more_than_look_up_is_refused():
    class Shifted(nn.Embedding):
        def forward(self, input):
            return super().forward(input) + 1

    net = nn.ModuleDict({"embed_tokens": Shifted(4, 3), "q_proj": nn.Linear(3, 3)})
    with pytest.raises(TargetError, match=r"Shifted\) cannot have rows replaced: its forward is not torch's own"):
        deltaw.inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1]), net)
    net["embed_tokens"] = nn.Embedding(4, 3, max_norm=1.0)
    with pytest.raises(TargetError, match="max_norm"):
        deltaw.inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1]), net)


def test_any_module_will_do_and_what_shares_its_weight_follows():
    net = nn.ModuleDict({"embed_tokens": nn.Embedding(6, 3), "q_proj": nn.Linear(3, 3), "out": nn.Linear(3, 6)})
    net["out"].weight = net["embed_tokens"].weight
    deltaw.inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 4]), net)
    with torch.no_grad():
        net["embed_tokens"].trainable_tokens_delta["default"].zero_()
    assert not net["embed_tokens"](torch.tensor([1, 4])).any()
    out = net["out"](torch.randn(5, 3))
    assert torch.equal(out[:, [1, 4]], net["out"].base_layer.bias[[1, 4]].expand(5, 2))  # PEFT forgets the bias
