"""What the README shows must run: its Python, and its commands one after the other, on a tiny model."""

from __future__ import annotations

import io
import re
import shlex
from pathlib import Path

import pytest
from tinychat import save_tiny, write_rows

from deltaw.cli import main

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_its_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    monkeypatch.chdir(tmp_path)
    exec(program.replace("smollm2-135m", str(save_tiny(tmp_path / "tiny"))), {})
    assert (tmp_path / "runs/sums/adapter/adapter_model.safetensors").is_file()


def test_its_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    commands = [line.split("#")[0].strip() for line in README.splitlines() if line.startswith("    deltaw ")]
    assert len(commands) == 11
    model = save_tiny(tmp_path / "tiny")
    write_rows(tmp_path / "rows.jsonl")
    (tmp_path / "run.yaml").write_text(
        f"model_name_or_path: {model}\ndataset_name: rows.jsonl\noutput_dir: runs/yaml\nmax_steps: 2\n"
    )
    monkeypatch.chdir(tmp_path)
    for command in commands:
        monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
        arguments = shlex.split(command.replace("smollm2-135m", str(model)))[1:]
        if arguments[0] in ("generate", "chat"):
            arguments += ["--max-new-tokens", "4"]
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code in (0, None), f"{command}: {capsys.readouterr().err}"
    for folder in ("merged", "plain"):
        assert (tmp_path / f"runs/{folder}/model.safetensors").is_file()
