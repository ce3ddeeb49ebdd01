"""The whole walk on the command line: train, eval, generate, chat, merge."""

from __future__ import annotations

import io
import json
import sys

import pytest
from commandline import run
from tinychat import save_tiny, write_rows

from deltaw.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("walk")
    save_tiny(folder / "base")
    write_rows(folder / "rows.jsonl")
    write_rows(folder / "test.jsonl", 4, start=100)
    (folder / "run.yaml").write_text(
        f"model_name_or_path: {folder / 'base'}\ndataset_name: {folder / 'rows.jsonl'}\n"
        f"output_dir: {folder / 'adapter'}\nmax_steps: 3\nlearning_rate: 1e-2\nwarmup_steps: 0\n"
        "r: 4\nlogging_steps: 1\nuse_cpu: true\n"
    )
    return folder


@pytest.fixture(scope="module")
def adapter(folder):
    with pytest.raises(SystemExit) as left:
        main(["train", str(folder / "run.yaml"), "--quiet", "--lora-dropout", "0"])
    assert not left.value.code
    return folder / "adapter"


def test_dry_run_prints_what_would_be_run_and_writes_nothing(capsys, folder):
    code, out, err = run(capsys, "train", folder / "run.yaml", "--r", "2", "--output-dir", folder / "x", "--dry-run")
    assert code == 0
    assert "\nr: 2\n" in out
    assert "20 examples" in err
    assert not (folder / "x").exists()


def test_train_for_machines_prints_json_alone(capsys, folder):
    code, out, err = run(capsys, "train", folder / "run.yaml", "--output_dir", folder / "json", "--json")
    assert code == 0
    results = json.loads(out)
    assert results["train_loss"] > 0
    assert results["parity"]["trained"] == 0
    assert "step 3/3  loss" in err


def test_train_a_second_time_is_refused(capsys, folder, adapter):
    code, _, err = run(capsys, "train", folder / "run.yaml")
    assert code == 2
    assert "overwrite_output_dir" in err


def test_eval_beside_the_base(capsys, folder, adapter):
    words = [
        "eval",
        "--adapter",
        adapter,
        "--dataset",
        folder / "test.jsonl",
        "--compare-base",
        "--max-new-tokens",
        6,
    ]
    code, out, _ = run(capsys, *words, "--json", "--output", folder / "preds.jsonl")
    assert code == 0
    told = json.loads(out)
    assert told["adapter"]["loss"] < told["base"]["loss"]  # three steps at a high rate learn the form
    assert told["adapter"]["tokens"] == told["base"]["tokens"]
    assert told["base"]["exact_match"]["total"] == 4
    first = json.loads((folder / "preds.jsonl").read_text().splitlines()[0])
    assert first["reference"] == "100!"
    assert {"base", "adapter"} <= set(first)
    code, out, _ = run(capsys, *words)
    assert code == 0
    for part in ("base", "adapter", "perplexity", "exact_match"):
        assert part in out


def test_generate_reads_a_pipe(capsys, adapter, monkeypatch):
    _, asked, _ = run(capsys, "generate", "--adapter", adapter, "--prompt", "say 3", "--max-new-tokens", 6)
    monkeypatch.setattr(sys, "stdin", io.StringIO("say 3\n"))
    code, piped, _ = run(capsys, "generate", "--adapter", adapter, "--max-new-tokens", 6)
    assert code == 0
    assert piped == asked


def test_chat_keeps_the_context_until_it_is_reset(capsys, adapter, monkeypatch):
    def talk(*lines: str) -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        code, out, err = run(capsys, "chat", "--adapter", adapter, "--max-new-tokens", 6)
        assert code == 0
        assert "/reset" in err
        return out.splitlines()

    once = talk("say 3")
    assert talk("say 3", "/reset", "say 3", "/exit", "say 4") == once * 2
    assert talk("/help", "", "/system be brief", "/system", "say 3") == once


def test_an_answer_can_be_stopped_and_stays_in_the_conversation(monkeypatch, capsys):
    import deltaw.evaluate
    from deltaw.cli.chat import Conversation
    from deltaw.cli.common import Loaded

    def stopped(model, tokenizer, prompt, on_text, **settings):
        on_text("half an ")
        raise KeyboardInterrupt

    monkeypatch.setattr(deltaw.evaluate, "stream_answer", stopped)
    talk = Conversation(Loaded(None, None, "base", None), "be brief", {})
    talk.answer("hi")
    assert talk.turns == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "half an"}]
    assert capsys.readouterr().out == "half an \n"


def test_an_adapter_of_a_4_bit_run_is_used_over_4_bits(capsys, folder, monkeypatch):
    import deltaw.loading

    out = folder / "qlora"
    code, told, _ = run(capsys, "train", folder / "run.yaml", "--output_dir", out, "--load_in_4bit", "true", "--json")
    assert code == 0
    assert json.loads(told)["parity"]["trained"] == 0
    assert "load_in_4bit: true\nbnb_4bit_quant_type: nf4\nbnb_4bit_use_double_quant: true\n" in (
        out / "run.yaml"
    ).read_text(encoding="utf-8")

    asked = []
    load = deltaw.loading.load_model

    def watched(*args, quantization_config=None, **kwargs):
        asked.append(quantization_config)
        return load(*args, quantization_config=quantization_config, **kwargs)

    monkeypatch.setattr(deltaw.loading, "load_model", watched)
    code, told, _ = run(capsys, "eval", "--adapter", out, "--dataset", folder / "test.jsonl", "--json")
    assert code == 0
    assert json.loads(told)["adapter"]["loss"] > 0
    code, said, _ = run(capsys, "generate", "--adapter", out, "--prompt", "say 3", "--max-new-tokens", 6)
    assert code == 0
    assert said
    monkeypatch.setattr(sys, "stdin", io.StringIO("say 3\n"))
    code, talk, _ = run(capsys, "chat", "--adapter", out, "--max-new-tokens", 6)
    assert code == 0
    assert talk.strip() == said.strip()
    assert len(asked) == 3
    assert all(config.bnb_4bit_use_double_quant for config in asked)


def test_merge_writes_a_plain_model_that_answers_alike(capsys, folder, adapter):
    code, out, _ = run(capsys, "merge", "--adapter", adapter, "--output", folder / "merged", "--json")
    assert code == 0
    told = json.loads(out)
    assert told["drift"]["max_abs"] < 1e-3
    assert told["drift"]["same_argmax"] == 1
    assert not list(folder.glob(".merged*"))
    _, merged, _ = run(capsys, "generate", "--model", folder / "merged", "--prompt", "say 3", "--max-new-tokens", 6)
    _, apart, _ = run(capsys, "generate", "--adapter", adapter, "--prompt", "say 3", "--max-new-tokens", 6)
    assert merged == apart
