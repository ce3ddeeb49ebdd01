"""A small run, killed at a chosen change of a file; told to a process that was started with ``killpoints.c`` preloaded.

``python killing.py FOLDER [all]``: prints one JSON object. The process stays warm and forks a child for each run.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: runs that are killed unless all are asked for
SOME = 56
STEPS, EVERY = 2, 1


def build(folder: Path) -> Path | None:
    """``killpoints.c`` as a library; None where there is no C compiler."""
    compiler = next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    library = folder / "killpoints.so"
    if compiler is None or sys.platform != "linux":
        return None
    source = Path(__file__).with_name("killpoints.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


def start(library: Path, folder: Path, *words: str) -> dict[str, Any]:
    """Runs this file with the library preloaded, and reads what it prints."""
    done = subprocess.run(
        [sys.executable, __file__, str(folder), *words],
        env={**os.environ, "LD_PRELOAD": str(library), "KILLPOINTS": str(library), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def child(work: Callable[[], object]) -> int:
    """The exit status of a fork that does ``work``; negative: the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def facts(run: Path) -> dict[str, Any]:
    """What a finished run is known by: its adapter, its log without times, the states of its last checkpoint."""
    state = json.loads((run / "trainer_state.json").read_text())
    last = run / f"checkpoint-{STEPS}"
    return {
        "adapter": (run / "adapter_model.safetensors").read_bytes().hex(),
        "config": (run / "adapter_config.json").read_text(),
        "optimizer": (last / "optimizer.pt").read_bytes().hex(),
        "log": [{k: v for k, v in e.items() if "runtime" not in k and "second" not in k} for e in state["log_history"]],
        "leftovers": sorted(p.name for p in run.rglob("*") if p.name.endswith((".part", ".old"))),
        "checkpoints": sorted(p.name for p in run.glob("checkpoint-*")),
    }


def main(folder: Path, every: bool) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    import torch
    from tinychat import save_tiny, tiny_model, tiny_tokenizer, write_rows

    from deltaw import LoraConfig, SFTConfig, SFTTrainer
    from deltaw.config import load_run_config
    from deltaw.errors import CheckpointError
    from deltaw.pipeline import _save
    from deltaw.train import checkpoints

    torch.set_num_threads(1)
    points = ctypes.CDLL(os.environ["KILLPOINTS"])
    points.killpoints_arm.argtypes = [ctypes.c_long, ctypes.c_long]
    points.killpoints_seen.restype = ctypes.c_long
    tokenizer = tiny_tokenizer()
    data = write_rows(folder / "rows.jsonl", 4)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    config = load_run_config(None, {"model_name_or_path": str(save_tiny(folder / "model")), "dataset_name": str(data)})

    def train(run: Path, kill_at: int = 0, full_at: int = 0) -> None:
        args = SFTConfig(
            output_dir=str(run), max_steps=STEPS, save_strategy="steps", save_steps=EVERY, save_total_limit=1,
            per_device_train_batch_size=1, gradient_accumulation_steps=2, logging_steps=2, disable_tqdm=True,
        )  # fmt: skip
        lora = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
        trainer = SFTTrainer(tiny_model(), args, rows, processing_class=tokenizer, peft_config=lora)
        points.killpoints_arm(kill_at, full_at)
        trainer.train(resume_from_checkpoint="auto")
        _save(trainer, config, run)
        seen = points.killpoints_seen()
        points.killpoints_arm(0, 0)
        (run / "seen").write_text(str(seen))

    def fills(run: Path, full_at: int) -> None:
        try:
            train(run, full_at=full_at)
        except CheckpointError as error:
            points.killpoints_arm(0, 0)
            (folder / "told").write_text(str(error))
            raise SystemExit(3) from None

    whole = folder / "whole"
    train(whole)  # here, so that the children find everything imported
    gc.collect()
    gc.freeze()  # nor do they go through the memory that they share
    seen, expected = int((whole / "seen").read_text()), facts(whole)
    wrong: list[str] = []
    runs = folder / "runs"

    def require(fact: object, told: str) -> None:
        if not fact:
            wrong.append(told)

    def check_and_go_on(run: Path, which: str) -> None:
        done = checkpoints.newest(run)
        step = 0 if done is None else int(done.name.split("-")[1])
        require(step in (0, EVERY, STEPS), f"{which}: at step {step}")
        if (run / "adapter_config.json").exists():
            weights = (run / "adapter_model.safetensors").read_bytes().hex()
            require(weights == expected["adapter"], f"{which}: an adapter that is another's can be loaded")
            require((run / "chat_template.jinja").exists(), f"{which}: an adapter without its template")
        require(child(lambda: train(run)) == 0, f"{which}: the resumed run fails")
        require(facts(run) == expected, f"{which}: the resumed run ends elsewhere")

    ats = range(1, seen + 1)
    kills = list(ats) if every else sorted({ats[round(i * (seen - 1) / (SOME - 1))] for i in range(SOME)})
    had = 0  # the most that a run killed so far had in hand
    for at in kills:
        run = runs / f"killed-{at}"
        status = child(lambda run=run, at=at: train(run, kill_at=at))
        require(status == -9, f"kill {at}: ended with {status}")
        newest = checkpoints.newest(run)
        step = 0 if newest is None else int(newest.name.split("-")[1])
        require(step >= had, f"kill {at}: a checkpoint of step {had} was lost")
        had = max(had, step)
        check_and_go_on(run, f"kill {at}")
        shutil.rmtree(run, ignore_errors=True)
    fulls = kills if every else kills[2::7]
    told: set[str] = set()
    for at in fulls:
        run = runs / f"full-{at}"
        status = child(lambda run=run, at=at: fills(run, at))
        require(status in (0, 3), f"full {at}: ended with {status}")
        if status == 3:
            told.add((folder / "told").read_text())
        check_and_go_on(run, f"full {at}")
        shutil.rmtree(run, ignore_errors=True)
    print(json.dumps({"changes": seen, "kills": len(kills), "fulls": len(fulls), "wrong": wrong, "told": sorted(told)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), "all" in sys.argv[2:])
