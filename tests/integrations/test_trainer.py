"""transformers' own Trainer trains our model, where PEFT is installed and where it is not: columns, evaluation loss,
adapter files, resuming, the best checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from integrations import plain_trainer


def without(where: Path) -> dict[str, Any]:
    """In a process of its own, since transformers looks for PEFT once, when it is imported."""
    command = [sys.executable, str(plain_trainer.__file__), str(where), "without"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    where = tmp_path_factory.mktemp("plain")
    return {"with": plain_trainer.report(where / "with"), "without": without(where / "without")}


@pytest.mark.parametrize("peft", ["with", "without"])
def test_transformers_trainer_knows_what_it_trains(both: dict[str, Any], peft: str) -> None:
    found = both[peft]
    assert found["peft"] == (peft == "with")
    assert found["columns"] == ["attention_mask", "input_ids", "labels"]  # the others were dropped
    assert found["label_names"] == ["labels"]
    assert found["shifted"]
    assert found["moved"]
    assert found["base_kept"]
    assert len(found["eval_loss"]) == 2
    assert found["eval_loss"][1] < found["eval_loss"][0]


@pytest.mark.parametrize("peft", ["with", "without"])
def test_its_checkpoints_are_adapters(both: dict[str, Any], peft: str) -> None:
    files = both[peft]["files"]
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "optimizer.pt"} <= set(files)
    assert not any(name.startswith(("model", "pytorch_model")) for name in files)


@pytest.mark.parametrize("peft", ["with", "without"])
def test_it_resumes_and_loads_the_best(both: dict[str, Any], peft: str) -> None:
    assert both[peft]["resumed"]
    assert both[peft]["best_loaded"]
    assert both[peft]["still_trains"]


def test_with_and_without_peft_are_one_run(both: dict[str, Any]) -> None:
    assert len(both["with"]["losses"]) == 4
    assert both["with"]["losses"] == both["without"]["losses"]
    assert both["with"]["eval_loss"] == both["without"]["eval_loss"]
