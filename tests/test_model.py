"""PeftModel: named adapters, what is active, what is printed, and how it lives with torch and
transformers."""

import copy
import io
import pickle

import peft
import pytest
import torch
from peer import ATTENTION, close, gradients, logits, pair, same_state, state, stir
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration, ViTConfig, ViTForImageClassification

import deltaw
from deltaw import LoraConfig, PeftModel
from deltaw.adapters import CONFIGS, host_layers
from deltaw.errors import AdapterError

A = {"target_modules": ["q_proj", "v_proj"], "r": 4}
B = {"target_modules": ["q_proj", "up_proj"], "r": 2, "lora_alpha": 3}


@pytest.fixture
def model(llama):
    """Two stirred adapters, ``default`` and ``b``; the first is active."""
    model = stir(deltaw.get_peft_model(llama, LoraConfig(**A)))
    model.add_adapter("b", LoraConfig(**B))
    return stir(model, adapter="b")


@pytest.mark.parametrize(
    "fields",
    [
        A,
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "bias": "all"},
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # PEFT's
def test_the_printed_line_is_peft_s(make_llama, capsys, fields, tied):
    ours, theirs = pair(lambda: make_llama(bias=True, tied=tied), **fields)
    ours.print_trainable_parameters()
    mine = capsys.readouterr().out
    theirs.print_trainable_parameters()
    assert mine == capsys.readouterr().out
    assert mine.startswith("trainable params: ")
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


def test_the_parts_have_peft_s_names(model, llama):
    assert model.base_model.model is model.get_base_model() is llama
    assert model.base_model.prefix == "lora_"
    assert model.config is llama.config
    assert (model.active_adapter, model.active_adapters) == ("default", ["default"])
    assert model.active_peft_config is model.peft_config["default"]
    assert list(model.peft_config) == list(model.base_model.peft_config) == ["default", "b"]
    assert model.peft_type == "LORA"
    assert model.modules_to_save is None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = model.nothing


# --- several adapters ---------------------------------------------------------------------------------------


def test_each_active_set_is_peft_s(make_llama, ids):
    torch.manual_seed(0)
    ours = stir(deltaw.get_peft_model(make_llama(), LoraConfig(**A)))
    theirs = stir(peft.get_peft_model(make_llama(), peft.LoraConfig(**A)))
    ours.add_adapter("b", LoraConfig(**B))
    theirs.add_adapter("b", peft.LoraConfig(**B))
    with torch.no_grad():
        for (name, a), (other, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            assert name == other
            a.copy_(b)
    stir(ours, adapter="b"), stir(theirs, adapter="b")
    seen = []
    for names in ("default", "b", ["default", "b"], ["b", "default"]):
        ours.set_adapter(names)
        theirs.base_model.set_adapter(names)
        assert [p.requires_grad for p in ours.parameters()] == [p.requires_grad for p in theirs.parameters()]
        seen.append(logits(ours, ids))
        assert close(seen[-1], logits(theirs, ids))
    assert not close(seen[0], seen[1], 1e-3)
    assert close(seen[2], seen[3])


def test_add_does_not_activate_and_set_does(model, ids):
    first = logits(model, ids)
    model.add_adapter("c", LoraConfig(target_modules=["o_proj"], init_lora_weights=False))
    assert torch.equal(logits(model, ids), first)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".c." in n)
    model.set_adapter("c")
    assert not close(logits(model, ids), first, 1e-4)
    assert all(p.requires_grad == (".c." in n) for n, p in model.named_parameters())
    model.set_adapter("c", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())
    model.set_adapter("default")
    assert torch.equal(logits(model, ids), first)


def test_deleting_gives_the_layers_back(model, make_llama, ids):
    first = logits(model, ids)
    model.delete_adapter("b")
    assert list(model.peft_config) == ["default"]
    assert not any(".b." in name for name, _ in model.named_parameters())
    assert type(model.base_model.model.model.layers[0].mlp.up_proj) is nn.Linear
    assert torch.equal(logits(model, ids), first)
    model.delete_adapter("default")
    assert same_state(model.get_base_model(), state(make_llama()))
    assert model.active_adapters == []
    with pytest.raises(AdapterError, match="no adapter is active"):
        _ = model.active_adapter
    model.add_adapter("again", LoraConfig(**A))
    model.set_adapter("again")
    assert gradients(model, ids)


def test_deleting_the_active_one_activates_another_and_says_so(model, ids, caplog):
    model.set_adapter("b")
    second = logits(model, ids)
    model.set_adapter("default")
    model.delete_adapter("default")
    assert model.active_adapter == "b"
    assert "'default' was active and is gone; active now: ['b']" in caplog.text
    assert torch.equal(logits(model, ids), second)
    assert all(p.requires_grad == (".b." in n) for n, p in model.named_parameters())


def test_deleting_one_of_two_active_ones_leaves_the_other(model):
    model.set_adapter(["default", "b"])
    model.delete_adapter("b")
    assert model.active_adapters == ["default"]


def test_biases_belong_to_one_adapter(make_llama):
    model = deltaw.get_peft_model(make_llama(bias=True), LoraConfig(**A, bias="lora_only"))
    biases = [n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")]
    assert len(biases) == 4
    with pytest.raises(AdapterError, match=r"'default' trains the base's biases already.*use bias='none'"):
        model.add_adapter("b", LoraConfig(**B, bias="all"))
    model.add_adapter("b", LoraConfig(**B))
    model.set_adapter("b")
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.endswith("bias"))
    model.set_adapter("default")
    assert biases == [n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")]
    model.delete_adapter("default")
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.endswith("bias"))


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda m: m.add_adapter("b", LoraConfig(**B)), r"'b' already exists; delete_adapter\('b'\) first"),
        (lambda m: m.add_adapter("../x", LoraConfig(**B)), "adapter name '../x'"),
        (lambda m: m.add_adapter("keys", LoraConfig(**B)), "'keys' is reserved by torch; choose another"),
        (lambda m: m.set_adapter("defalt"), r"no adapter 'defalt'; .*did you mean 'default'"),
        (lambda m: m.set_adapter(["default", "nope"]), "no adapter 'nope'"),
        (lambda m: m.set_adapter(["b", "b"]), "named twice"),
        (lambda m: m.delete_adapter("nope"), r"no adapter 'nope'; there are \['default', 'b'\]"),
        (lambda m: m.save_pretrained("x", selected_adapters=["nope"]), "no adapter 'nope'"),
        (lambda m: deltaw.get_peft_model(m, LoraConfig(**A)), "has adapters already; use model.add_adapter"),
        (lambda m: PeftModel.from_pretrained(m, "x"), "has adapters already; use model.load_adapter"),
        (lambda m: deltaw.get_peft_model(m.get_base_model(), LoraConfig(**A)), "injected already"),
        (lambda m: deltaw.get_peft_model(nn.Sequential(), LoraConfig(**A), mixed=True), "mixed=True"),
        (lambda m: m(torch.tensor([[3]]), adapter_names=["bb"]), "adapter_names: no adapter 'bb'; .*did you mean 'b'"),
        (lambda m: m.set_requires_grad(["b", "nope"]), "no adapter 'nope'"),
    ],
)
def test_mistakes_are_errors_with_a_cure_and_change_nothing(model, act, words):
    before, flags = state(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(AdapterError, match=words):
        act(model)
    assert same_state(model, before)
    assert flags == [p.requires_grad for p in model.parameters()]
    assert model.active_adapters == ["default"]


# --- disabling ----------------------------------------------------------------------------------------------


def test_disable_adapter_is_the_base_bitwise_and_comes_back(model, llama, make_llama, ids):
    base, adapted = logits(make_llama(), ids), logits(model, ids)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), base)
        with model.disable_adapter():
            assert torch.equal(logits(model, ids), base)
        assert torch.equal(logits(model, ids), base)
        model.add_adapter("c", LoraConfig(target_modules=["o_proj"], init_lora_weights=False))
        model.set_adapter(["default", "c"])
        assert torch.equal(logits(model, ids), base)  # also layers that are wrapped meanwhile
        model.set_adapter("default")
    assert torch.equal(logits(model, ids), adapted)
    with pytest.raises(ZeroDivisionError), model.disable_adapter():
        raise ZeroDivisionError
    assert torch.equal(logits(model, ids), adapted)
    assert gradients(model, ids)


def test_disable_takes_merged_adapters_out(model, make_llama, ids):
    adapted = logits(model, ids)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), logits(make_llama(), ids))
        assert same_state(make_llama(), _plain(model))
    assert torch.equal(logits(model, ids), adapted)


def _plain(model):
    """The base's own tensors, under the base's names."""
    return {
        name.replace("base_layer.", ""): tensor
        for name, tensor in model.get_base_model().state_dict().items()
        if "lora_" not in name
    }


def test_layers_can_be_switched_off_and_on(model, make_llama, ids):
    adapted = logits(model, ids)
    model.disable_adapter_layers()
    assert torch.equal(logits(model, ids), logits(make_llama(), ids))
    with model.disable_adapter():
        pass
    assert torch.equal(logits(model, ids), logits(make_llama(), ids))  # the block restores what was before it
    model.enable_adapter_layers()
    assert torch.equal(logits(model, ids), adapted)


def test_disabling_with_trained_biases_is_said(make_llama, caplog):
    model = deltaw.get_peft_model(make_llama(bias=True), LoraConfig(**A, bias="all"))
    with model.disable_adapter():
        pass
    assert "biases were trained" in caplog.text


# --- torch and transformers ---------------------------------------------------------------------------------


def test_deepcopy_and_pickle_are_whole_and_apart(model, ids):
    out = logits(model, ids)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(logits(other, ids), out)
        stir(other)
        assert not torch.equal(logits(other, ids), out)
        other.set_adapter("b")
        other.merge_adapter()
        assert torch.equal(logits(model, ids), out)
    for name, host in host_layers(copy.deepcopy(model)):
        assert all(adapter.host is host for adapter in host.adapters.values()), name


def test_compiles_as_one_graph(make_llama, ids):
    config = LoraConfig(target_modules=["q_proj", "up_proj"], modules_to_save=["model.norm"])
    model = stir(deltaw.get_peft_model(make_llama(layers=1), config)).train()
    torch._dynamo.reset()
    results = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        out = run(input_ids=ids).logits
        out.logsumexp(-1).sum().backward()
        results.append({"out": out, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}})
    torch._dynamo.reset()
    eager, compiled = results
    assert len(eager) == 1 + 4 + 1
    assert all(close(compiled[name], eager[name], 1e-5) for name in eager)


@pytest.mark.parametrize("first", ["wrap", "checkpointing"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_gives_the_same_gradients(llama, ids, first, reentrant, dropout):
    config = LoraConfig(target_modules="all-linear", lora_dropout=dropout)
    llama.train()

    def switch_on(model):
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant})

    if first == "checkpointing":
        switch_on(llama)
    model = stir(deltaw.get_peft_model(llama, config))
    plain = copy.deepcopy(model)
    if first == "wrap":
        switch_on(model)
    else:
        disable = getattr(plain, "activation_checkpointing_disable", None) or plain.gradient_checkpointing_disable
        disable()
    results = []
    for each in (plain, model):
        torch.manual_seed(5)
        results.append(gradients(each, ids))
    expected, grads = results
    assert len(grads) == len(expected) == 28
    assert all(close(grads[name], expected[name], 1e-5) for name in grads)


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def vit():
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**SMALL, image_size=8, patch_size=4, num_labels=3)).double().eval()


def t5():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(vocab_size=64, **sizes, decoder_start_token_id=0)).double().eval()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("first", ["wrap", "checkpointing"])
@pytest.mark.parametrize("options", [{}, {"use_reentrant": True}, {"use_reentrant": False}], ids=str)
@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        (vit, {"pixel_values": torch.ones(2, 3, 8, 8, dtype=torch.float64)}),
        (t5, {"input_ids": torch.tensor([[3, 4, 5]]), "labels": torch.tensor([[6, 7]])}),
    ],
    ids=["images", "encoder-decoder"],
)
def test_checkpointing_of_other_models_lets_gradients_in(build, inputs, first, options):
    """A reentrant checkpoint over a frozen base would give none: transformers asks for them on text alone."""
    results = []
    for recompute in (False, True):
        base = build()
        if recompute and first == "checkpointing":
            base.gradient_checkpointing_enable(options or None)
        model = stir(deltaw.get_peft_model(base, LoraConfig(target_modules="all-linear")))
        if recompute and first == "wrap":
            model.gradient_checkpointing_enable(options or None)
        model.train()
        model(**inputs).logits.square().sum().backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, again = results
    assert plain.keys() == again.keys()
    assert len(plain) == sum(p.requires_grad for p in model.parameters())
    assert all(close(again[name], plain[name], 1e-9) for name in plain)


def test_checkpointing_is_offered_where_the_base_has_it():
    net = deltaw.get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    assert not hasattr(net, "activation_checkpointing_enable")
    assert not hasattr(net, "gradient_checkpointing_enable")


def test_gradients_are_asked_for_without_activating(make_llama):
    whole = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    model = deltaw.get_peft_model(make_llama(bias=True), LoraConfig(**whole, bias="lora_only"))
    model.add_adapter("b", LoraConfig(**whole))
    trained = lambda: {n for n, p in model.named_parameters() if p.requires_grad}  # noqa: E731
    first = trained()
    model.set_requires_grad("b")
    assert trained() == first | {n for n, _ in model.named_parameters() if ".b." in n}
    assert model.active_adapters == ["default"]
    model.set_requires_grad("default", False)
    assert {n for n in trained() if ".b." not in n} == set()  # the biases that train with it, too
    model.set_requires_grad(["default"])
    model.set_requires_grad(["b"], False)
    assert trained() == first


@pytest.mark.parametrize("kind", sorted({kind.__name__: kind for kind in CONFIGS.values()}.items()))
def test_configs_are_pickled_and_copied_whole(kind):
    config = kind[1](target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", modules_to_save=["head"])
    for other in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert other == config
        assert type(other) is type(config)
        assert other.to_dict() == config.to_dict()


def test_a_copy_made_after_a_mixed_batch_is_whole(model, ids):
    model.set_requires_grad(["default", "b"])
    expected = model(input_ids=ids, adapter_names=["default", "b"]).logits
    other = copy.deepcopy(model)
    assert torch.equal(other(input_ids=ids, adapter_names=["default", "b"]).logits, expected)
    assert gradients(other, ids)


def test_training_moves_only_the_adapter(model, ids):
    before = state(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if ".default." in name}


def test_generate_is_the_adapted_model_s(model, ids):
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2}
    adapted = model.generate(input_ids=ids, **settings)
    with model.disable_adapter():
        base = model.generate(input_ids=ids, **settings)
    assert not torch.equal(adapted, base)
    model.merge_adapter()
    assert torch.equal(model.generate(input_ids=ids, **settings), adapted)


def test_any_module_can_be_wrapped():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    model = deltaw.get_peft_model(net, LoraConfig(target_modules=["0"], modules_to_save=["2"]))
    assert torch.equal(model(x), net(x))
    assert model.peft_config["default"].base_model_name_or_path is None
    stir(model)
    out = model(x)
    assert torch.allclose(model.merge_and_unload()(x), out, atol=1e-6)


def test_the_base_and_its_revision_are_recorded(llama):
    llama.name_or_path = "org/base"
    model = deltaw.get_peft_model(llama, LoraConfig(**A), revision="abc")
    model.add_adapter("b", LoraConfig(**B))
    assert [c.base_model_name_or_path for c in model.peft_config.values()] == ["org/base"] * 2
    assert model.peft_config["default"].revision == "abc"


def test_a_config_is_not_changed_by_its_use(make_llama):
    """Otherwise "all-linear" would mean the first model's layers on the next one."""
    config = LoraConfig(target_modules="all-linear")
    small = deltaw.get_peft_model(make_llama(), config)
    small.add_adapter("b", config)
    assert config == LoraConfig(target_modules="all-linear")
    assert isinstance(small.peft_config["default"].target_modules, set)
    net = deltaw.get_peft_model(nn.Sequential(nn.Linear(2, 2)), config)
    assert net.peft_config["default"].target_modules == {"0"}


def test_every_attention_layer_counts(make_llama):
    model = deltaw.get_peft_model(make_llama(layers=3), LoraConfig(target_modules=ATTENTION, r=2))
    # q and o: 2 * (32 + 32); k and v, half as many heads: 2 * (32 + 16)
    assert model.get_nb_trainable_parameters()[0] == 3 * 2 * (2 * 64 + 2 * 48)
