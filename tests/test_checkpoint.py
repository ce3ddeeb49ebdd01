"""Files: PEFT's, both ways and bitwise, and one clear error for each way in which they can be wrong."""

import json
import logging
import os
import shutil

import hypothesis.strategies as st
import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from peer import ATTENTION, adapted, close, logits, pair, same_state, state, stir
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import deltaw
from deltaw import LoraConfig, PeftModel
from deltaw.errors import AdapterError, CheckpointError, ConfigError, TargetError

FIELDS = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": "all-linear", "use_rslora": True, "r": 4},
    {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "embed_tokens"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},  # means the layer norms too, as in PEFT
    {
        "target_modules": ATTENTION,
        "rank_pattern": {"q_proj": 2, r"1\..*v_proj": 3},
        "alpha_pattern": {"k_proj": 5},
    },
    {"target_modules": ATTENTION, "bias": "all"},
    {"target_modules": ["q_proj", "up_proj"], "bias": "lora_only"},
    {"target_modules": ATTENTION, "lora_bias": True},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": "all-linear", "exclude_modules": ["down_proj"], "task_type": "CAUSAL_LM"},
    {"target_modules": r".*\.[01]\.mlp\.(up|down)_proj", "exclude_modules": r".*\.0\.mlp\.up_proj"},
    {"target_modules": None, "task_type": "CAUSAL_LM"},
    {"target_modules": ["lm_head", "o_proj"], "init_lora_weights": "gaussian"},
]


def build(make_llama):
    return make_llama(bias=True)


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


# --- both ways ----------------------------------------------------------------------------------------------


HEAD = "base_model.model.lm_head.base_layer.weight"
PEFT_SAYS = [
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
    "ignore:.*LoRA tensor.* have invalid shape.*lora_B.bias:peft.utils.warning.PeftWarning",
    "ignore:The following rank_pattern keys did not match:RuntimeWarning",
]
pytestmark = [pytest.mark.filterwarnings(warning) for warning in PEFT_SAYS]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_ours_loads_in_peft_and_peft_s_loads_here(make_llama, ids, tmp_path, fields):
    """The tensors are bitwise the same; the logits agree to 1e-6 of the largest (another order of
    summation)."""
    ours, theirs = pair(lambda: build(make_llama), **fields)
    expected = logits(stir(ours), ids)
    stir(theirs)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    mine, peers = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    # where lm_head is a target the base's own weight is written too, though it was not trained, as PEFT does
    assert (HEAD in mine) == ("lm_head" in (fields["target_modules"] or ()))
    assert mine.keys() == peers.keys()
    assert all(torch.equal(mine[k], peers[k]) for k in mine)
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    assert configs[0].keys() == configs[1].keys()
    assert configs[0]["inference_mode"] is configs[1]["inference_mode"] is True

    there = peft.PeftModel.from_pretrained(build(make_llama), tmp_path / "ours")
    assert close(logits(there, ids), expected)
    assert adapted(there) == adapted(ours)
    here = PeftModel.from_pretrained(build(make_llama), tmp_path / "theirs")
    assert torch.equal(logits(here, ids), expected)
    again = PeftModel.from_pretrained(build(make_llama), tmp_path / "ours")
    assert torch.equal(logits(again, ids), expected)
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "adapter_config.json").read_text() == (
        tmp_path / "ours" / "adapter_config.json"
    ).read_text()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_both_ways(make_llama, ids, tmp_path, dtype):
    ours, theirs = pair(lambda: make_llama(dtype), target_modules="all-linear")
    stir(ours).save_pretrained(tmp_path / "ours")
    stir(theirs).save_pretrained(tmp_path / "theirs")
    assert {t.dtype for t in tensors(tmp_path / "ours").values()} == {torch.float32}
    here = PeftModel.from_pretrained(make_llama(dtype), tmp_path / "theirs")
    assert torch.equal(logits(here, ids), logits(ours, ids))
    there = peft.PeftModel.from_pretrained(make_llama(dtype), tmp_path / "ours")
    assert torch.equal(logits(there, ids), logits(theirs, ids))


def test_two_adapters_both_ways(make_llama, ids, tmp_path):
    a = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    b = {"target_modules": ["q_proj", "up_proj"], "use_rslora": True, "r": 2}
    ours, theirs = pair(make_llama, **a)
    ours.add_adapter("second", LoraConfig(**b))
    theirs.add_adapter("second", peft.LoraConfig(**b))
    with torch.no_grad():
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.copy_(q)
    stir(stir(ours), adapter="second"), stir(stir(theirs), adapter="second")
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for who in ("ours", "theirs"):
        files = {str(p.relative_to(tmp_path / who)) for p in (tmp_path / who).rglob("*") if p.is_file()}
        assert files - {"second/README.md"} == {
            *("README.md", "adapter_config.json", "adapter_model.safetensors"),
            *("second/adapter_config.json", "second/adapter_model.safetensors"),
        }
    here = PeftModel.from_pretrained(make_llama(), tmp_path / "theirs")
    here.load_adapter(tmp_path / "theirs" / "second", "second")
    there = peft.PeftModel.from_pretrained(make_llama(), tmp_path / "ours")
    there.load_adapter(tmp_path / "ours" / "second", "second")
    for name in ("default", "second"):
        for model in (here, there, ours):
            model.set_adapter(name)
        assert torch.equal(logits(here, ids), logits(ours, ids))
        assert close(logits(there, ids), logits(ours, ids))
    one = tmp_path / "one"
    ours.save_pretrained(one, selected_adapters=["second"])
    assert [p.name for p in one.iterdir()] == ["second"]


def test_the_file_is_plain_safetensors_without_the_adapter_s_name(llama, tmp_path):
    model = deltaw.get_peft_model(llama, LoraConfig(target_modules=["q_proj"]), adapter_name="mine")
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "mine" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert sorted(file.keys())[0] == "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


# --- loading ------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(make_llama, tmp_path):
    """A folder with a stirred adapter on q_proj and up_proj."""
    model = deltaw.get_peft_model(make_llama(), LoraConfig(target_modules=["q_proj", "up_proj"], r=2, lora_dropout=0.1))
    stir(model).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_cpu_mem_usage_gives_the_same_model(make_llama, saved, ids, dtype):
    rng = torch.get_rng_state()
    lean = PeftModel.from_pretrained(make_llama(dtype), saved, low_cpu_mem_usage=True)
    normal = PeftModel.from_pretrained(make_llama(dtype), saved)
    assert not any(p.is_meta for p in lean.parameters())
    assert [(n, p.dtype, p.requires_grad) for n, p in lean.named_parameters()] == [
        (n, p.dtype, p.requires_grad) for n, p in normal.named_parameters()
    ]
    assert torch.equal(logits(lean, ids), logits(normal, ids))
    lean.load_adapter(saved, "b", low_cpu_mem_usage=True, is_trainable=True)
    lean.set_adapter("b")
    assert torch.equal(logits(lean, ids), logits(normal, ids))
    torch.set_rng_state(rng)
    PeftModel.from_pretrained(make_llama(dtype), saved, low_cpu_mem_usage=True).merge_and_unload()


def test_loaded_for_use_or_for_training(make_llama, saved):
    model = PeftModel.from_pretrained(make_llama().train(), saved)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.peft_config["default"].inference_mode
    model = PeftModel.from_pretrained(make_llama().train(), saved, is_trainable=True)
    assert all(m.training for m in model.modules())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "lora_" in n
    }


def test_loading_beside_a_training_adapter_changes_nothing_of_it(make_llama, saved, ids):
    model = deltaw.get_peft_model(make_llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    before, trained = logits(model, ids), [n for n, p in model.named_parameters() if p.requires_grad]
    model.load_adapter(saved, "other")
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trained
    assert torch.equal(logits(model, ids), before)
    model.set_adapter("other")
    alone = PeftModel.from_pretrained(make_llama(), saved)
    assert torch.equal(logits(model, ids), logits(alone, ids))


def test_overlapping_patterns_keep_their_order_in_our_files(make_llama, ids, tmp_path):
    """The first key that matches wins. PEFT sorts the keys when it writes, and then cannot read its own
    file."""
    patterns = {"q_proj": 2, r"layers\.1\..*": 3}
    model = stir(
        deltaw.get_peft_model(
            make_llama(), LoraConfig(target_modules=ATTENTION, rank_pattern=patterns, alpha_pattern=patterns)
        )
    )
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(make_llama(), tmp_path), ids), logits(model, ids))
    assert close(logits(peft.PeftModel.from_pretrained(make_llama(), tmp_path), ids), logits(model, ids))


def test_a_subfolder_and_a_given_config(make_llama, saved, ids):
    expected = logits(PeftModel.from_pretrained(make_llama(), saved), ids)
    there = PeftModel.from_pretrained(make_llama(), saved.parent, subfolder="saved")
    assert torch.equal(logits(there, ids), expected)
    config = LoraConfig.from_pretrained(saved)
    config.lora_alpha = 0
    scaled = PeftModel.from_pretrained(make_llama(), saved, config=config)
    assert torch.equal(logits(scaled, ids), logits(make_llama(), ids))


def test_entries_of_peft_s_that_match_nothing_are_a_note(make_llama, ids, tmp_path, caplog):
    theirs = peft.get_peft_model(make_llama(), peft.LoraConfig(target_modules=["q_proj", "w1"], rank_pattern={"w2": 3}))
    stir(theirs).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "deltaw"):
        here = PeftModel.from_pretrained(make_llama(), tmp_path)
    assert "'w1' matches no layer" in caplog.text
    assert "rank_pattern key 'w2'" in caplog.text
    assert close(logits(here, ids), logits(theirs, ids))


def edit(folder, change):
    """Rewrites the tensors of ``folder`` as ``change`` returns them."""
    save_file(change(tensors(folder)), folder / "adapter_model.safetensors", metadata={"format": "pt"})


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def put(key, value):
    return lambda all_: {**all_, key: value(all_)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {k: v for k, v in t.items() if k != Q0}, f"missing: {Q0}"),
        (
            lambda t: {k.replace("layers.0", "layers.7"): v for k, v in t.items()},
            "no place for: .*layers.7.*mean",
        ),
        (
            lambda t: {k.removeprefix("base_model.model."): v for k, v in t.items()},
            "no place for: model.layers",
        ),
        (put("base_model.model.more", lambda t: torch.ones(2)), "no place for: base_model.model.more"),
        (
            put(Q0, lambda t: torch.ones(3, 32)),
            rf"shape of {Q0}: \(3, 32\) in the file, \(2, 32\) in the model",
        ),
        (put(Q0, lambda t: t[Q0].T.contiguous()), rf"shape of {Q0}: \(32, 2\) in the file"),
        (put(Q0, lambda t: t[Q0].to(torch.int8)), f"dtype of {Q0}: torch.int8 in the file"),
        (put(Q0, lambda t: t[Q0] * float("nan")), f"not finite: {Q0}"),
        (put(Q0, lambda t: t[Q0] / 0), f"not finite: {Q0}"),
        (lambda t: {}, "missing: .*8 faults|8 faults"),
    ],
)
@pytest.mark.parametrize("how", ["from_pretrained", "load_adapter"])
def test_tensors_that_do_not_fit_are_refused_and_nothing_stays(make_llama, saved, how, change, words):
    edit(saved, change)
    base = make_llama()
    base.model.norm.weight.requires_grad_(False)
    if how == "from_pretrained":
        model, load = base, lambda: PeftModel.from_pretrained(base, saved)
    else:
        model = deltaw.get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"]))
        load = lambda: model.load_adapter(saved, "other")  # noqa: E731
    before, modules = state(model), [(n, id(m)) for n, m in model.named_modules()]
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(CheckpointError, match=words):
        load()
    assert same_state(model, before)
    assert [(n, id(m)) for n, m in model.named_modules()] == modules
    assert [p.requires_grad for p in model.parameters()] == flags
    if how == "load_adapter":
        assert list(model.peft_config) == ["default"]
        with pytest.raises(CheckpointError, match=words):
            load()  # the name is free again


def test_all_faults_are_in_one_error(make_llama, saved):
    def change(found):
        del found[Q0]
        return {
            **found,
            Q0.replace("lora_A", "lora_C"): torch.ones(2, 32),
            Q0.replace("_A", "_B"): torch.ones(1),
        }

    edit(saved, change)
    with pytest.raises(CheckpointError) as error:
        PeftModel.from_pretrained(make_llama(), saved)
    text = str(error.value)
    assert "3 faults" in text
    assert f"missing: {Q0}; did you mean '{Q0.replace('_A', '_C')}'?" in text
    assert f"no place for: {Q0.replace('_A', '_C')}; did you mean '{Q0}'?" in text
    assert "shape of" in text
    assert str(saved) in text


def test_another_size_lists_its_shapes_and_another_architecture_its_names(saved):
    from architectures import build as build_architecture

    with pytest.raises(CheckpointError, match=r"LlamaForCausalLM \(\d+ faults\).*(\n.*)*\(2, 32\).*\(2, 16\)"):
        PeftModel.from_pretrained(build_architecture("llama"), saved)
    base = build_architecture("gpt_neox")
    before = state(base)
    with pytest.raises(TargetError, match=r"match no layer of GPTNeoXForCausalLM.*its layers are.*query_key_value"):
        PeftModel.from_pretrained(base, saved)
    assert same_state(base, before)


def test_a_smaller_base_is_refused(make_llama, saved):
    with pytest.raises(CheckpointError, match="4 faults"):
        PeftModel.from_pretrained(make_llama(layers=1), saved)


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_a_truncated_file_is_damaged(make_llama, saved, cut):
    path = saved / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match="is damaged or no safetensors file"):
        PeftModel.from_pretrained(make_llama(), saved)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_with_changed_bytes_loads_or_gives_one_clear_error(make_llama, saved, data):
    path = saved / "adapter_model.safetensors"
    whole = path.read_bytes()
    where = data.draw(st.integers(0, 900))  # the header and some tensors
    changed = bytearray(whole)
    changed[where] = data.draw(st.integers(0, 255))
    base = make_llama(layers=2)
    before = state(base)
    try:
        path.write_bytes(bytes(changed))
        PeftModel.from_pretrained(base, saved).unload()
    except CheckpointError as error:
        assert str(saved) in str(error)  # noqa: PT017
    finally:
        path.write_bytes(whole)
    assert same_state(base, before)


def test_a_pickle_is_refused_with_the_command_that_converts_it(make_llama, saved, ids):
    expected = logits(PeftModel.from_pretrained(make_llama(), saved), ids)
    torch.save(tensors(saved), saved / "adapter_model.bin")
    (saved / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"is a pickle, which can run code.*convert it once: python -c") as error:
        PeftModel.from_pretrained(make_llama(), saved)
    command = str(error.value).split('python -c "')[1].rstrip('"')
    exec(command)
    assert torch.equal(logits(PeftModel.from_pretrained(make_llama(), saved), ids), expected)


@pytest.mark.parametrize(
    ("damage", "kind", "words"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), CheckpointError, "holds no adapter_config.json"),
        (
            lambda f: (f / "adapter_model.safetensors").unlink(),
            CheckpointError,
            "holds no adapter_model.safetensors",
        ),
        (lambda f: (f / "adapter_config.json").write_text('{"r":'), CheckpointError, "not valid JSON"),
        (
            lambda f: (f / "adapter_config.json").write_text("{}"),
            CheckpointError,
            "does not describe an adapter",
        ),
        (lambda f: shutil.rmtree(f), CheckpointError, "no adapter at .*not a folder here"),
    ],
)
def test_folders_that_are_no_adapter(make_llama, saved, damage, kind, words):
    damage(saved)
    base = make_llama()
    before = state(base)
    with pytest.raises(kind, match=words):
        PeftModel.from_pretrained(base, saved)
    assert same_state(base, before)


def test_a_method_of_peft_s_that_is_not_here_is_named(make_llama, tmp_path):
    theirs = peft.get_peft_model(make_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path / "twice")
    config = json.loads((tmp_path / "twice" / "adapter_config.json").read_text())
    (tmp_path / "twice" / "adapter_config.json").write_text(json.dumps({**config, "layer_replication": [[0, 2]]}))
    with pytest.raises(ConfigError, match=r"layer_replication=.*: a setting of PEFT's that deltaw does not support"):
        PeftModel.from_pretrained(make_llama(), tmp_path / "twice")
    theirs = peft.get_peft_model(make_llama(), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    theirs.save_pretrained(tmp_path / "ia3")
    with pytest.raises(ConfigError, match="peft_type 'IA3' is not a method of deltaw"):
        PeftModel.from_pretrained(make_llama(), tmp_path / "ia3")


def test_an_unknown_argument_is_an_error(make_llama, saved):
    with pytest.raises(ConfigError, match="'is_trainabel' is not a field"):
        PeftModel.from_pretrained(make_llama(), saved, is_trainabel=True)


# --- saving -------------------------------------------------------------------------------------------------


def test_saving_over_an_old_one_replaces_it_and_leaves_no_parts(llama, saved):
    model = deltaw.get_peft_model(llama, LoraConfig(target_modules=["o_proj"]))
    model.save_pretrained(saved)
    assert all("o_proj" in key for key in tensors(saved))
    assert sorted(p.name for p in saved.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_follow_the_umask(llama, tmp_path, umask):
    """safetensors' own files are private to whoever writes them, and a server could not read them."""
    model = deltaw.get_peft_model(llama, LoraConfig(target_modules=["o_proj"]))
    before = os.umask(umask)
    try:
        model.save_pretrained(tmp_path / "saved")
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "saved").iterdir()} == {0o666 & ~umask}


def test_a_crash_while_writing_leaves_the_old_file(llama, saved, monkeypatch):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        deltaw.get_peft_model(llama, LoraConfig(target_modules=["o_proj"])).save_pretrained(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_saves_that_make_no_sense(llama, tmp_path):
    model = deltaw.get_peft_model(llama, LoraConfig(target_modules=["o_proj"]))
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="it is a file, not a folder"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(CheckpointError, match="would write a pickle"):
        model.save_pretrained(tmp_path / "new", safe_serialization=False)
    with pytest.raises(AdapterError, match="no adapter 'x'"):
        model.save_pretrained(tmp_path / "new", selected_adapters=["x"])
    model.save_pretrained(tmp_path / "new", is_main_process=False)
    assert not (tmp_path / "new").exists()


def test_merged_adapters_are_saved_as_they_are(llama, tmp_path):
    model = stir(deltaw.get_peft_model(llama, LoraConfig(target_modules=["q_proj"])))
    model.save_pretrained(tmp_path / "apart")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    a, b = tensors(tmp_path / "apart"), tensors(tmp_path / "merged")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_tied_trained_copies_are_both_written(make_llama, ids, tmp_path):
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(4, 4)
            self.heads = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
            self.heads[1].weight = self.heads[0].weight

        def forward(self, x):
            return self.heads(self.proj(x))

    torch.manual_seed(0)
    net, x = Pair(), torch.randn(2, 4)
    model = stir(deltaw.get_peft_model(net, LoraConfig(target_modules=["proj"], modules_to_save=["heads"])))
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    assert torch.equal(PeftModel.from_pretrained(Pair(), tmp_path)(x), model(x))


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_of_a_resized_vocabulary_travel_along(make_llama, ids, tmp_path, tied):
    base = make_llama(tied=tied)
    base.save_pretrained(tmp_path / "base")

    def grown():
        model = make_llama(tied=tied)
        torch.manual_seed(11)
        model.resize_token_embeddings(131, mean_resizing=False)
        model.name_or_path = str(tmp_path / "base")
        return model

    ours, theirs = pair(grown, target_modules=["q_proj"])
    expected = logits(stir(ours), ids)
    stir(theirs)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert tensors(tmp_path / "ours").keys() >= {"base_model.model.model.embed_tokens.weight"}
    for folder in ("ours", "theirs"):
        fresh = make_llama(tied=tied)
        fresh.resize_token_embeddings(131, mean_resizing=False)  # the new rows are random here
        assert torch.equal(logits(PeftModel.from_pretrained(fresh, tmp_path / folder), ids), expected)
        with pytest.raises(CheckpointError, match=r"embed_tokens.*\(131, 32\) in the file, \(128, 32\)"):
            PeftModel.from_pretrained(make_llama(tied=tied), tmp_path / folder)
    fresh = make_llama(tied=tied)
    fresh.resize_token_embeddings(131, mean_resizing=False)
    assert close(logits(peft.PeftModel.from_pretrained(fresh, tmp_path / "ours"), ids), expected)
