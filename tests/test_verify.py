"""The proof after training: a fresh base, the note where memory forbids it, and what merging changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tinychat import save_tiny, tiny_model, write_rows

from deltaw import LoraConfig, PeftModel, get_peft_model, verify
from deltaw.config import RunConfig
from deltaw.data import Rendered
from deltaw.errors import CheckpointError, ConfigError, MergeError
from deltaw.pipeline import run_training
from deltaw.report.runcard import PICTURE
from deltaw.train.runlog import LOG_NAME, read_log
from deltaw.verify import free_memory, verify_saved

PROBES = [Rendered(list(range(5, 12 + n)), [-100] * (7 + n), 7 + n) for n in range(6)]


def trained(where: Path, *, bias: str = "none") -> PeftModel:
    """A model whose adapter does something, saved."""
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules="all-linear", bias=bias))  # type: ignore[arg-type]
    torch.manual_seed(1)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.normal_(std=0.1)
    model.save_pretrained(where)
    return model


def test_it_is_read_back_onto_a_fresh_base(tmp_path: Path) -> None:
    model, loads = trained(tmp_path), []

    def fresh() -> Any:
        loads.append(tiny_model())
        return loads[-1]

    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    parity = verify_saved(model, tmp_path, PROBES, fresh)
    assert len(loads) == 1
    assert loads[0] is not model.get_base_model()
    assert (parity.fresh, parity.trained, parity.note) == (True, 0.0, "")
    assert parity.base > 0.01
    assert all(torch.equal(before[name], param) for name, param in model.named_parameters())
    assert model.active_adapter == "default"
    assert list(model.peft_config) == ["default"]


def test_a_change_of_the_base_itself_is_seen(tmp_path: Path) -> None:
    """Which a look at the trained model's own base cannot see."""
    model = trained(tmp_path)
    with torch.no_grad():
        model.get_base_model().model.norm.weight[0] += 0.5
    assert verify_saved(model, tmp_path, PROBES).trained == 0
    with pytest.raises(CheckpointError, match="not the one that was trained"):
        verify_saved(model, tmp_path, PROBES, tiny_model)


def test_what_merging_changes_is_measured(tmp_path: Path) -> None:
    model = trained(tmp_path)
    parity = verify_saved(model, tmp_path, PROBES, tiny_model)
    assert parity.merged is not None
    shortest = sorted(PROBES, key=lambda one: len(one.input_ids))[:4]
    apart = [_logits(model, one) for one in shortest]
    merged = model.merge_and_unload()
    gap = max(float((a - _logits(merged, one)).abs().max()) for a, one in zip(apart, shortest, strict=True))
    assert parity.merged.max_abs == pytest.approx(gap, rel=0.5)
    assert 0 < parity.merged.max_abs < 1e-4
    assert parity.merged.same_argmax == 1.0
    assert "merging moves them by up to" in str(parity)
    assert any(line.startswith("Folded into the base: merged against adapter over ") for line in parity.sentences())
    assert verify_saved(trained(tmp_path), tmp_path, PROBES, tiny_model, merge=False).merged is None


@torch.no_grad()
def _logits(model: Any, one: Rendered) -> torch.Tensor:
    return model.eval()(input_ids=torch.tensor([one.input_ids])).logits


def test_where_memory_forbids_a_second_base_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(tmp_path)
    monkeypatch.setattr(verify, "free_memory", lambda device: 1000)
    parity = verify_saved(model, tmp_path, PROBES, lambda: pytest.fail("loaded all the same"))
    assert not parity.fresh
    assert parity.trained == 0
    assert "a second base would take" in parity.note
    assert parity.note in str(parity)
    assert parity.note in parity.sentences()[-1]

    def runs_out() -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(verify, "free_memory", lambda device: None)
    assert "memory ran out" in verify_saved(model, tmp_path, PROBES, runs_out).note


def test_an_adapter_that_cannot_be_merged_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*args: Any) -> Any:
        raise MergeError("no weight update to merge")

    monkeypatch.setattr(verify, "merge_report", refuses)
    parity = verify_saved(trained(tmp_path), tmp_path, PROBES, tiny_model)
    assert parity.fresh
    assert parity.merged is None
    assert parity.note == "not merged: no weight update to merge"


def test_a_run_is_proven_and_told_unasked(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base")
    config = RunConfig(
        model_name_or_path=str(tmp_path / "base"), dataset_name=str(write_rows(tmp_path / "rows.jsonl")), use_cpu=True,
        output_dir=str(tmp_path / "out"), max_steps=4, learning_rate=1e-2, logging_steps=1, val_size=0.2, r=4,
        eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    done = run_training(config, quiet=True)
    assert done.parity.fresh
    assert done.parity.merged is not None
    assert done.results["parity"]["merged"]["same_argmax"] == 1.0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for key in ("base_fingerprint", "dataset_fingerprint", "template_fingerprint"):
        assert f"`{done.results[key]}`" in card
    assert f"torch {torch.__version__}" in card
    assert f"| evaluation loss | {done.results['eval_loss']:.4f} |" in card
    assert "equals the trained model bit for bit" in card
    assert "deltaw train run.yaml" in card
    assert (tmp_path / "out" / PICTURE).is_file()
    steps = [entry["step"] for entry in read_log(tmp_path / "out" / LOG_NAME) if "loss" in entry]
    assert steps == [1, 2, 3, 4]


def test_what_cannot_be_watched_is_told_before_anything_is_read(tmp_path: Path) -> None:
    common = {"model_name_or_path": "none", "dataset_name": "none", "output_dir": str(tmp_path), "val_size": 0.1}
    for keys, said in (
        ({"report_to": "tensorbord"}, "did you mean 'tensorboard'"),
        ({"memory_limit": "much"}, "write it like 24GiB"),
        ({"metric_for_best_model": "exact_match"}, "set eval_answers"),
    ):
        with pytest.raises(ConfigError, match=said):
            run_training(RunConfig(**common, **keys), quiet=True)  # type: ignore[arg-type]


def test_free_memory_is_less_than_there_is() -> None:
    free = free_memory(torch.device("cpu"))
    if free is not None:
        assert 0 < free < 2**50
