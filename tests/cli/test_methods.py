"""``deltaw methods``, and ``deltaw train`` with each of them: trained, saved, reloaded, verified."""

from __future__ import annotations

import json

import pytest
import torch
from commandline import run
from tinychat import save_tiny, tiny_model, write_rows

import deltaw
from deltaw.methods import INITIALISERS, METHODS
from deltaw.skeleton import count_trainable, skeleton


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    save_tiny(folder / "base")
    write_rows(folder / "rows.jsonl")
    (folder / "run.yaml").write_text(
        f"model_name_or_path: {folder / 'base'}\ndataset_name: {folder / 'rows.jsonl'}\n"
        "max_steps: 3\nlearning_rate: 1e-2\nwarmup_steps: 0\nlogging_steps: 1\nuse_cpu: true\n"
    )
    return folder


def ranks(name: str) -> list[str]:
    return ["--init-r", "4", "--target-r", "2"] if name == "adalora" else ["--r", "4"]


@pytest.mark.parametrize("name", METHODS)
def test_a_run_of_each_method_leaves_a_proven_adapter(capsys, folder, name):
    out = folder / name
    code, text, err = run(
        capsys, "train", folder / "run.yaml", "--method", name, *ranks(name), "--output-dir", out, "--json"
    )
    assert code == 0, err
    told = json.loads(text)
    assert told["parity"]["trained"] <= 1e-5 * told["parity"]["scale"]
    assert told["parity"]["base"] > 0
    assert told["trainable_params"] > 0
    config = deltaw.PeftConfig.from_pretrained(out)
    assert type(config).__name__ == METHODS[name].config
    # an outsider reads it onto a fresh base
    model = deltaw.PeftModel.from_pretrained(deltaw.load_model(folder / "base"), str(out))
    ids = torch.arange(5)[None]
    with torch.no_grad():
        assert not torch.equal(model(input_ids=ids).logits, tiny_model()(input_ids=ids).logits)
    # and its run.yaml is the same run
    code, again, _ = run(capsys, "train", out / "run.yaml", "--output-dir", folder / "x", "--dry-run", "--json")
    assert code == 0
    assert json.loads(again)["config"]["method"] == name


def test_adalora_knows_its_steps_and_has_pruned(capsys, folder):
    words = ["--method", "adalora", *ranks("adalora"), "--max-steps", "-1", "--num-train-epochs", "2"]
    code, _, err = run(
        capsys, "train", folder / "run.yaml", *words, "--output-dir", folder / "whole", "--tinit", "1", "--quiet"
    )
    assert code == 0, err
    kept = json.loads((folder / "whole" / "adapter_config.json").read_text())
    state = json.loads((folder / "whole" / "trainer_state.json").read_text())
    assert kept["total_step"] == state["global_step"] == 6  # 20 rows, 8 a step, twice
    assert (kept["tinit"], kept["tfinal"]) == (1, 2)
    left = [sum(flags) for flags in kept["rank_pattern"].values()]
    assert sum(left) / len(left) <= 2


def test_the_table_names_every_method_and_counts_for_the_built_in_model(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr("deltaw.loading._built_in", lambda name: pytest.fail("a model was fetched to be counted"))
    code, out, err = run(capsys, "methods")
    assert (code, err) == (0, "")
    for name in METHODS:
        assert f"\n{name} " in out
    assert "4,884,480" in out  # LoRA at 16 on SmolLM2-135M, known from its own runs
    for name in INITIALISERS:
        assert name in out
    monkeypatch.setenv("COLUMNS", "80")
    assert max(len(line) for line in run(capsys, "methods")[1].splitlines()[:-2]) <= 80


def test_for_machines_and_for_another_model(capsys, folder):
    code, out, _ = run(capsys, "methods", "--model", folder / "base", "--r", 4, "--json")
    assert code == 0
    told = json.loads(out)
    assert [row["name"] for row in told["methods"]] == list(METHODS)
    assert told["base_params"] == sum(p.numel() for p in tiny_model().parameters())
    counts = {row["name"]: row["trainable_params"] for row in told["methods"]}
    for name in ("lora", "dora", "lokr"):  # counted on the real thing
        method = METHODS[name]
        config = getattr(deltaw, method.config)(**method.fixes, r=4, target_modules="all-linear")
        assert deltaw.get_peft_model(tiny_model(), config).get_nb_trainable_parameters()[0] == counts[name], name
    assert counts["lora"] == counts["rslora"] == counts["pissa"] == counts["olora"] == counts["loha"] // 2
    assert counts["adalora"] > counts["lora"]  # it begins with half as much rank again


def test_a_model_that_is_not_there(capsys, tmp_path):
    code, out, err = run(capsys, "methods", "--model", "./nowhere")
    assert (code, out) == (2, "")
    assert err.startswith("error: model folder './nowhere' does not exist")
    (tmp_path / "config.json").write_text("{}")
    code, _, err = run(capsys, "methods", "--model", tmp_path)
    assert code == 2
    assert "has no config that can be read" in err


def test_counting_leaves_the_skeleton_and_the_config_as_they_were(folder):
    base = skeleton(folder / "base")
    config = deltaw.LoraConfig(r=2, target_modules="all-linear")
    names = [name for name, _ in base.named_parameters()]
    assert count_trainable(base, config) == count_trainable(base, config) > 0
    assert [name for name, _ in base.named_parameters()] == names
    assert config.target_modules == "all-linear"
    assert all(parameter.is_meta for parameter in base.parameters())
