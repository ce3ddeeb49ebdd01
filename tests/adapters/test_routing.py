"""Batches that mix adapters: each row as if alone, in inference, generation and training, whatever is recomputed."""

from __future__ import annotations

import copy
import threading
from typing import Any

import architectures
import matrix
import peft
import pytest
import torch
from peer import close, logits, stir
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM, T5Config, T5ForConditionalGeneration

import deltaw
from deltaw import LoraConfig
from deltaw.adapters import BASE, carried
from deltaw.adapters.routing import Routing, Run, _running
from deltaw.errors import AdapterError
from deltaw.methods import METHODS

A = {"target_modules": "all-linear", "r": 4}
B = {"target_modules": "all-linear", "r": 2, "lora_alpha": 3, "use_rslora": True}
NAMES = ["a", "b", BASE, "a"]
NAMED_AS_PREFIX = pytest.mark.filterwarnings("ignore:Adapter name:UserWarning")  # PEFT's, of "a", a letter of "lora_"


def two(base: nn.Module, a: Any = None, b: Any = None) -> Any:
    """Adapters ``a`` and ``b``, both away from their start; ``a`` is active."""
    model = deltaw.get_peft_model(base, a or LoraConfig(**A), adapter_name="a")
    model.add_adapter("b", b or LoraConfig(**B))
    return stirred(model)


def stirred(model: Any) -> Any:
    """``a`` and ``b`` as training would leave them; ``a`` is active."""
    for name in ("b", "a"):
        model.set_adapter(name)
        stir(model)
    return model


def tokens(rows: int = 4, length: int = 5) -> Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(1))


def alone(model: Any, name: str, call: Any) -> Any:
    """``call()`` with one adapter active, or none."""
    if name == BASE:
        with model.disable_adapter():
            return call()
    model.set_adapter(name)
    return call()


def grads_of(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def expected_gradients(model: Any, batches: list[tuple[Tensor, list[str]]], weight: Tensor) -> dict[str, Tensor]:
    """Each row by itself through its adapter, the loss sum(logits * weight)."""
    model.zero_grad()
    for ids, names in batches:
        for row, name in enumerate(names):
            if name != BASE:
                out = alone(model, name, lambda i=row, ids=ids: model(input_ids=ids[i : i + 1]).logits)
                (out * weight[row]).sum().backward()
    return grads_of(model)


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor], relative: float) -> None:
    assert ours.keys() == theirs.keys()
    assert all(bool(g.any()) for g in ours.values())
    assert [name for name in ours if not close(ours[name], theirs[name], relative)] == []


def untouched(model: Any) -> bool:
    """Whether no trace of a routed forward is left."""
    parts = list(model.modules())
    hooks = any(len(m._forward_pre_hooks) for m in parts)
    wrapped = any("carried" in str(m.__dict__.get("_gradient_checkpointing_func", "")) for m in parts)
    return _running.routing is None and not hooks and not wrapped


# --- rows and runs ------------------------------------------------------------------------------------------------


def test_runs_are_neighbouring_rows_of_one_name():
    layer = nn.Linear(1, 1)
    routing = Routing(layer, ["a", "a", BASE, "x", "b", "a"], 6, {3})
    runs = [Run("a", 0, 2), Run(None, 2, 4), Run("b", 4, 5), Run("a", 5, 6)]
    assert routing.runs(layer, torch.zeros(6, 2, 4), {"a", "b"}) == runs  # x is on another layer: here it is the base
    flat = [Run(name, 3 * start, 3 * stop) for name, start, stop in runs]
    assert routing.runs(layer, torch.zeros(18, 4), {"a", "b"}) == flat
    beams = Routing(layer, ["a", "b"], 6, {3})
    assert beams.runs(layer, torch.zeros(6, 3, 4), {"a", "b"}) == [Run("a", 0, 3), Run("b", 3, 6)]
    assert beams.runs(layer, torch.zeros(18, 4), {"a", "b"}) == [Run("a", 0, 9), Run("b", 9, 18)]


@pytest.mark.parametrize("shape", [(3, 6, 4), (12, 4), (18, 3, 4), (1, 6, 4), ()])
def test_a_first_dimension_that_is_no_batch_is_refused_by_name(shape):
    model = nn.Sequential(nn.ReLU(), nn.Linear(1, 1))
    routing = Routing(model, ["a"] * 6, 6, {3})
    with pytest.raises(AdapterError, match=r"the input of '1' \(Linear\) has the shape"):
        routing.runs(model[1], torch.zeros(shape), {"a"})


class Flattening(nn.Module):
    """(b, t, d): the first layer sees rows and tokens flattened, the second sees tokens first."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.turned = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.flat(x.flatten(0, 1)).view(x.shape)
        return self.turned(y.transpose(0, 1)).transpose(0, 1)


def test_a_layer_that_flattens_works_and_one_that_turns_is_refused_by_name():
    model = two(Flattening(), *(LoraConfig(target_modules=["flat"], r=r) for r in (2, 3)))
    x = torch.randn(4, 3, 4)
    with torch.no_grad():
        out = model(x, adapter_names=NAMES)
        for row, name in enumerate(NAMES):
            assert close(out[row], alone(model, name, lambda i=row: model(x[i : i + 1]))[0])
    model.add_adapter("c", LoraConfig(target_modules=["turned"], r=2))
    with pytest.raises(AdapterError, match=r"'turned' \(Linear\) has the shape \(3, 4, 4\)"):
        model(x, adapter_names=[*NAMES[:3], "c"])
    assert untouched(model)


# --- inference ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [NAMES, ["a", "a", "b", "b"], ["b"] * 4, [BASE] * 4, ["a", "b", "b", "b"]], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_each_row_is_as_if_alone(make_llama, names, bias):
    model, ids = two(make_llama(bias=bias)), tokens()
    with torch.no_grad():
        out = model(input_ids=ids, adapter_names=names).logits
    for row, name in enumerate(names):
        assert close(out[row], alone(model, name, lambda i=row: logits(model, ids[i : i + 1]))[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_row_of_the_base_is_bitwise_the_base_s(make_llama, dtype, bias):
    model, ids = two(make_llama(dtype, bias=bias)), tokens()
    bare = logits(make_llama(dtype, bias=bias), ids)
    with torch.no_grad():
        out = model(input_ids=ids, adapter_names=NAMES).logits.float()
    assert torch.equal(out[2], bare[2])
    assert not close(out[0], bare[0], 1e-2)


def pair_of_two(make_llama) -> tuple[Any, Any]:
    ours = two(make_llama())
    theirs = peft.get_peft_model(make_llama(), peft.LoraConfig(**A), adapter_name="a")
    theirs.add_adapter("b", peft.LoraConfig(**B))
    mine = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(mine[name])
    return ours, theirs.eval()


@NAMED_AS_PREFIX
def test_inference_is_peft_s(make_llama):
    ours, theirs = pair_of_two(make_llama)
    ids = tokens()
    with torch.no_grad():
        assert close(ours(input_ids=ids, adapter_names=NAMES).logits, theirs(input_ids=ids, adapter_names=NAMES).logits)


@NAMED_AS_PREFIX
def test_gradients_are_peft_s_where_it_has_them(make_llama):
    """PEFT refuses mixed batches in training mode; in evaluation mode it differentiates them."""
    ours, theirs = pair_of_two(make_llama)
    ids, found = tokens(), []
    for model in (ours, theirs):
        model.set_requires_grad(["a", "b"])
        model(input_ids=ids, labels=ids, adapter_names=NAMES).loss.backward()
        found.append(grads_of(model))
    same(*found, 1e-5)


@NAMED_AS_PREFIX
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=str)
def test_generation_is_peft_s(make_llama, settings):
    ours, theirs = pair_of_two(make_llama)
    ids = tokens()
    settings = {"max_new_tokens": 5, "do_sample": False, "adapter_names": NAMES, **settings}
    assert torch.equal(ours.generate(input_ids=ids, **settings), theirs.generate(input_ids=ids, **settings))


def config_of(method: str) -> Any:
    chosen = METHODS[method]
    fields = {**matrix.SMALL[chosen.config], **chosen.fixes, "target_modules": "all-linear"}
    return getattr(deltaw, chosen.config)(**fields)


def beside(base: nn.Module, method: str) -> Any:
    """Adapter ``b`` of ``method`` beside one that can share its layers."""
    return two(base, config_of("lokr") if method == "adalora" else None, config_of(method))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_methods_mix_in_one_batch(make_llama, method, dtype):
    model, ids = beside(make_llama(dtype), method), tokens()
    bare = logits(make_llama(dtype), ids)
    with torch.no_grad():
        out = model(input_ids=ids, adapter_names=NAMES).logits
    assert torch.equal(out[2].float(), bare[2])
    for row, name in enumerate(NAMES):
        single = alone(model, name, lambda i=row: logits(model, ids[i : i + 1]))[0]
        assert close(out[row].float(), single, 1e-6 if dtype == torch.float64 else 3e-2)


@pytest.mark.parametrize("layer", matrix.LAYERS)
@pytest.mark.parametrize("case", matrix.CASES)
def test_every_method_mixes_on_every_layer(case, layer):
    if matrix.refusal(case, layer):
        pytest.skip("the method does not run on this layer")
    model = stirred(matrix.adapted(case, layer, torch.float64, ("a", "b")))
    x, names = matrix.LAYERS[layer].inputs(torch.float64), ["b", BASE, "a"]
    weight = model(x).detach().sin()
    expected = {}
    for row, name in enumerate(names):
        out = alone(model, name, lambda i=row: model(x[i : i + 1]))
        expected[name] = out.detach()
        if name != BASE:
            (out * weight[row]).sum().backward()
    single = grads_of(model)
    model.set_requires_grad(["a", "b"])
    out = model(x, adapter_names=names)
    assert torch.equal(out[1], matrix.base(layer, torch.float64)(x)[1])
    for row, name in enumerate(names):
        assert close(out[row].detach(), expected[name][0], 1e-9)
    (out * weight).sum().backward()
    same(grads_of(model), single, 1e-9)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"trainable_token_indices": [3, 4]}, {"trainable_token_indices": [4, 5, 9]}),
        ({"trainable_token_indices": {"embed_tokens": [3, 4], "lm_head": [3, 4]}}, {}),
        ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, {}),
    ],
    ids=["rows", "rows of one", "embedding and head"],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_embeddings_and_heads_mix_row_by_row(make_llama, tied, a, b):
    if "lm_head" in a.get("target_modules", ()):
        a = {**a, "ensure_weight_tying": tied}
    configs = [LoraConfig(**{"target_modules": ["q_proj"], "r": 2, **fields}) for fields in (a, b)]
    model = two(make_llama(torch.float64, tied=tied, vocab=64), *configs)
    ids = torch.arange(3, 11).repeat(4, 1)
    weight = torch.randn(4, 8, 64, dtype=torch.float64)
    expected = expected_gradients(model, [(ids, NAMES)], weight)
    singles = [alone(model, name, lambda i=row: logits(model, ids[i : i + 1]))[0] for row, name in enumerate(NAMES)]
    model.train().set_requires_grad(["a", "b"])
    out = model(input_ids=ids, adapter_names=NAMES).logits
    (out * weight).sum().backward()
    same(grads_of(model), expected, 1e-9)
    assert all(close(out[row].detach().float(), single) for row, single in enumerate(singles))
    assert torch.equal(out[2].float(), logits(make_llama(torch.float64, tied=tied, vocab=64), ids)[2])


def test_experts_shared_by_all_tokens_see_them_flattened():
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        **architectures.GATED,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        tie_word_embeddings=False,
    )
    base = Qwen2MoeForCausalLM(config).eval()
    shared = LoraConfig(target_modules=r".*shared_expert\.(gate|up|down)_proj|.*q_proj", r=2)
    model, ids = two(base, shared, shared), tokens()
    with torch.no_grad():
        out = model(input_ids=ids, adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        assert close(out[row], alone(model, name, lambda i=row: logits(model, ids[i : i + 1]))[0], 1e-5)


def test_an_adapter_of_other_layers_leaves_the_rest_to_the_base(make_llama):
    model = two(make_llama(), b=LoraConfig(target_modules=["q_proj"], layers_to_transform=[1], lora_bias=False))
    ids = tokens()
    with torch.no_grad():
        out = model(input_ids=ids, adapter_names=NAMES).logits
    assert close(out[1], alone(model, "b", lambda: logits(model, ids[1:2]))[0])


def test_an_adapter_s_own_bias_is_its_rows_own(make_llama):
    config = LoraConfig(target_modules=["q_proj"], lora_bias=True)
    model, ids = two(make_llama(bias=True), b=config), tokens()
    with torch.no_grad():
        out = model(input_ids=ids, adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        assert close(out[row], alone(model, name, lambda i=row: logits(model, ids[i : i + 1]))[0])


def test_threads_do_not_see_each_other_s_rows(make_llama):
    model, ids = two(make_llama()), tokens()
    choices = (["a"] * 4, ["b"] * 4, NAMES)
    expected = [model(input_ids=ids, adapter_names=names).logits for names in choices]
    wrong: list[int] = []

    def run(index: int) -> None:
        for _ in range(10):
            with torch.no_grad():
                out = model(input_ids=ids, adapter_names=choices[index]).logits
            if not torch.equal(out, expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert untouched(model)


# --- generation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 1, "num_return_sequences": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("given", ["arguments", "config"])
def test_each_prompt_is_continued_as_if_alone(make_llama, settings, given):
    model, ids = two(make_llama()), tokens()
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **settings}
    if given == "config":
        config = copy.deepcopy(model.generation_config)
        config.update(**settings)
        settings = {"generation_config": config}
    out = model.generate(input_ids=ids, adapter_names=NAMES, **settings)
    assert untouched(model)
    each = len(out) // len(NAMES)
    seen = []
    for row, name in enumerate(NAMES):
        single = alone(model, name, lambda i=row: model.generate(input_ids=ids[i : i + 1], **settings))
        assert torch.equal(out[row * each : (row + 1) * each], single)
        seen.append(single[0].tolist())
    assert seen[0][5:] != seen[1][5:]


@pytest.fixture
def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    return T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("beams", [1, 2])
def test_encoder_and_decoder_each_have_their_rows(t5, beams):
    model, ids = two(t5), tokens()
    answers = tokens(length=3)
    with torch.no_grad():
        out = model(input_ids=ids, labels=answers, adapter_names=NAMES).logits
    settings = {"num_beams": beams, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    texts = model.generate(input_ids=ids, adapter_names=NAMES, **settings)
    assert untouched(model)
    for row, name in enumerate(NAMES):
        one = slice(row, row + 1)
        single = alone(model, name, lambda one=one: model(input_ids=ids[one], labels=answers[one]).logits)
        assert close(out[row], single[0].detach())
        assert torch.equal(
            texts[row], alone(model, name, lambda one=one: model.generate(input_ids=ids[one], **settings))[0]
        )


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", architectures.ARCHITECTURES)
@pytest.mark.parametrize("recompute", [None, "reentrant", "not reentrant"])
def test_gradients_are_those_of_each_row_alone(architecture, recompute):
    model = two(architectures.build(architecture).double())
    ids = tokens()
    weight = torch.randn(4, 5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = expected_gradients(model, [(ids, NAMES)], weight)
    if recompute:
        model.activation_checkpointing_enable({"use_reentrant": recompute == "reentrant"})
    before = untouched(model)
    for part in model.modules():
        if isinstance(getattr(part, "dropout", None), float):
            part.dropout = 0.0  # OPT's own
    model.train().set_requires_grad(["a", "b"])
    (model(input_ids=ids, adapter_names=NAMES).logits * weight).sum().backward()
    assert untouched(model) == before
    same(grads_of(model), expected, 1e-9)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_two_forwards_before_one_backward(make_llama, method, reentrant):
    model = beside(make_llama(torch.float64), method)
    batches = [(tokens(), NAMES), (tokens().flip(0), ["b", BASE, "b", "a"])]
    weight = torch.randn(4, 5, 128, dtype=torch.float64)
    expected = expected_gradients(model, batches, weight)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.train().set_requires_grad(["a", "b"])
    losses = [(model(input_ids=ids, adapter_names=names).logits * weight).sum() for ids, names in batches]
    model.set_adapter("b")  # what is active meanwhile does not matter
    model.set_requires_grad("a")
    sum(losses).backward()
    same(grads_of(model), expected, 1e-9)


def test_a_mixed_and_a_plain_forward_before_one_backward(make_llama):
    model = two(make_llama(torch.float64))
    ids, weight = tokens(), torch.randn(4, 5, 128, dtype=torch.float64)
    expected = expected_gradients(model, [(ids, NAMES), (ids, ["a"] * 4)], weight)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train().set_adapter("a")
    model.set_requires_grad("b")
    mixed = (model(input_ids=ids, adapter_names=NAMES).logits * weight).sum()
    plain = (model(input_ids=ids).logits * weight).sum()
    (mixed + plain).backward()
    same(grads_of(model), expected, 1e-9)


@pytest.mark.parametrize("reentrant", [True, False])
def test_backward_on_another_thread_recomputes_the_same_rows(make_llama, reentrant):
    """As CUDA's is: autograd has a thread for each device."""
    model = two(make_llama(torch.float64))
    ids, weight = tokens(), torch.randn(4, 5, 128, dtype=torch.float64)
    expected = expected_gradients(model, [(ids, NAMES)], weight)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.train().set_requires_grad(["a", "b"])
    loss = (model(input_ids=ids, adapter_names=NAMES).logits * weight).sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    same(grads_of(model), expected, 1e-9)


def test_only_adapters_that_train_get_gradients(make_llama):
    model, ids = two(make_llama()), tokens()
    model.set_requires_grad("a", False)
    model.set_requires_grad("b")
    model(input_ids=ids, labels=ids, adapter_names=NAMES).loss.backward()
    assert {name.split(".")[-2] for name in grads_of(model)} == {"b"}


def test_dropout_in_training_is_each_adapter_s_own(make_llama):
    """On average a dropped batch is the batch itself; an adapter without dropout is not touched."""
    model = two(make_llama(), LoraConfig(**A, lora_dropout=0.5), LoraConfig(**B)).train()
    ids = tokens()
    torch.manual_seed(0)
    with torch.no_grad():
        first, second = (model(input_ids=ids, adapter_names=NAMES).logits for _ in range(2))
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[1:3], second[1:3])


class Recomputed(nn.Module):
    """Checkpoints a layer by its own means."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.layer, self.wrap = nn.Linear(4, 4), wrap

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.wrap(self.layer), x, use_reentrant=False)  # type: ignore[return-value]


def test_a_checkpoint_that_loses_the_routing_is_an_error_and_one_that_carries_it_is_right():
    config = LoraConfig(target_modules=["layer"], r=2)
    x = torch.randn(4, 3, 4)

    def build(wrap: Any) -> Any:
        torch.manual_seed(0)
        return two(Recomputed(wrap), config, config)

    models = [build(wrap) for wrap in (lambda layer: layer, carried)]
    for model in models:
        model.set_requires_grad(["a", "b"])
    lost, kept = (model(x, adapter_names=NAMES).square().sum() for model in models)
    with pytest.raises(AdapterError, match=r"which row went through which adapter is lost: .*carried\(function\)"):
        lost.backward()
    kept.backward()
    carried_grads = grads_of(models[1])
    models[0](x).square().sum().backward()  # outside of backward it is an ordinary forward again
    models[0].zero_grad()
    plain = build(lambda layer: layer)
    for row, name in enumerate(NAMES):
        if name != BASE:
            alone(plain, name, lambda i=row: plain(x[i : i + 1]).square().sum().backward())
    same(carried_grads, grads_of(plain), 1e-5)


# --- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            ["a", "c", "__bse__", "a"],
            r"no adapter 'c'; there are \['a', 'b'\]\nno adapter '__bse__'.*did you mean '__base__'",
        ),
        (["a", "b"], "holds 2 names, but the batch has 4 rows: give one name a row"),
        (["a"] * 8, "holds 8 names, but the batch has 4 rows"),
        ("a", "adapter_names='a': give a list"),
        ([], "holds 0 names"),
    ],
    ids=str,
)
@pytest.mark.parametrize("act", ["forward", "generate"])
def test_wrong_names(make_llama, names, words, act):
    model, ids = two(make_llama()), tokens()
    before = logits(model, ids)
    with pytest.raises(AdapterError, match=words):
        getattr(model, act)(input_ids=ids, adapter_names=names)
    assert untouched(model)
    assert torch.equal(logits(model, ids), before)


def test_names_of_beams_instead_of_prompts(make_llama):
    with pytest.raises(AdapterError, match="holds 8 names, but the batch has 4 rows"):
        two(make_llama()).generate(input_ids=tokens(), num_beams=2, max_new_tokens=2, adapter_names=["a"] * 8)


def test_merged_and_disabled_adapters_are_refused(make_llama):
    model, ids = two(make_llama()), tokens()
    model.merge_adapter(["b"])
    with pytest.raises(AdapterError, match=r"\['b'\] are merged into the base: call unmerge_adapter\(\) first"):
        model(input_ids=ids, adapter_names=NAMES)
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(AdapterError, match=r"disabled: leave disable_adapter\(\) first"):
        model(input_ids=ids, adapter_names=NAMES)
    model(input_ids=ids, adapter_names=NAMES)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.shared_experts = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        halves = [expert(rows) for expert, rows in zip(self.experts, x.flatten(0, 1).chunk(2), strict=True)]
        return torch.cat(halves).view(x.shape) + self.shared_experts(x)


def test_experts_are_refused_by_name_before_anything_runs():
    model = two(Mixture(), *(LoraConfig(target_modules=t, r=2) for t in (["shared_experts"], ["0", "1"])))
    x = torch.randn(2, 2, 4)
    model(x, adapter_names=["a", BASE])
    with pytest.raises(AdapterError, match=r"'experts.0' and 1 more lies inside a mixture's experts"):
        model(x, adapter_names=["a", "b"])
    assert untouched(model)


@pytest.mark.parametrize("act", ["forward", "generate"])
def test_a_forward_that_fails_leaves_nothing_behind(make_llama, act):
    model, ids = two(make_llama()), tokens()
    model.activation_checkpointing_enable()
    model.train()
    names = {id(m): dict(m.__dict__) for m in model.modules()}
    down = model.base_model.model.model.layers[1].mlp.down_proj

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    handle = down.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        getattr(model, act)(input_ids=ids, adapter_names=NAMES, **({"max_new_tokens": 2} if act == "generate" else {}))
    handle.remove()
    assert untouched(model)
    functions = [
        m._gradient_checkpointing_func for m in model.modules() if "_gradient_checkpointing_func" in m.__dict__
    ]
    assert functions == [
        d["_gradient_checkpointing_func"] for d in names.values() if "_gradient_checkpointing_func" in d
    ]
    model.eval()
    assert torch.equal(logits(model, ids), alone(model, "a", lambda: logits(model, ids)))


def test_inputs_without_a_tensor():
    class Lists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: list) -> Tensor:
            return self.layer(torch.tensor(x))

    model = two(Lists(), *(LoraConfig(target_modules=["layer"], r=1) for _ in range(2)))
    with pytest.raises(AdapterError, match="no tensor among the model's inputs"):
        model([[1.0, 2.0]], adapter_names=["a"])


# --- the compiler -------------------------------------------------------------------------------------------------


def test_compiled_layers_run_mixed_batches(make_llama):
    config = {"target_modules": ["q_proj", "down_proj"]}
    model, ids = two(make_llama(layers=1), LoraConfig(**config, r=4), LoraConfig(**config, r=2)), tokens()
    choices = (NAMES, None, ["b", "a", "a", BASE])
    with torch.no_grad():
        eager = [model(input_ids=ids, adapter_names=names).logits for names in choices]
        model.base_model.model.model.layers[0].compile(backend="eager", fullgraph=True)
        compiled = [model(input_ids=ids, adapter_names=names).logits for names in choices]
    torch._dynamo.reset()
    assert all(close(mine, theirs) for mine, theirs in zip(compiled, eager, strict=True))


def test_a_compiled_model_trains_on_mixed_batches(make_llama):
    config = {"target_modules": ["q_proj"]}
    model, ids = two(make_llama(layers=1), LoraConfig(**config, r=4), LoraConfig(**config, r=2)), tokens()
    model.set_requires_grad(["a", "b"])
    torch._dynamo.reset()
    found = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        run(input_ids=ids, adapter_names=NAMES).logits.square().sum().backward()
        found.append(grads_of(model))
    torch._dynamo.reset()
    same(*found, 1e-5)
