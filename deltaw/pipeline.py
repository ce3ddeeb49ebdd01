"""One run, top to bottom: described -> rows -> checked -> model -> trained -> saved -> reloaded -> reported.

Knows what happens in which order, and nothing of how: each step is the business of a lower floor.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, set_seed

import deltaw
from deltaw import PeftConfig
from deltaw.atomic import publishing, write_text
from deltaw.config import RunConfig
from deltaw.errors import ConfigError
from deltaw.loading import load_model, resolve_model
from deltaw.methods import METHODS
from deltaw.provenance import base_fingerprint, text_fingerprint, versions
from deltaw.quant.config import NF4Config
from deltaw.report.runcard import write_run_card
from deltaw.rundata import RunData, prepare_data
from deltaw.train import SFTConfig, SFTTrainer
from deltaw.train.batches import training_rows
from deltaw.train.checkpoints import checkpoints, resolve, saving
from deltaw.train.evaluation import require_metric
from deltaw.train.memory import limit_bytes
from deltaw.train.progress import ProgressCallback
from deltaw.train.runlog import require_trackers
from deltaw.verify import Parity, verify_saved

__all__ = [
    "Parity",
    "RunData",
    "RunResult",
    "adapter_config",
    "check_run",
    "prepare_data",
    "run_training",
    "verify_saved",
]

Tell = Callable[[str], object]
Count = Callable[[int, int | None], object]


@dataclass(frozen=True)
class RunResult:
    """What a run left behind: its folder, the numbers of ``all_results.json``, and the adapter's proof."""

    output_dir: Path
    results: dict[str, Any]
    parity: Parity


def run_training(
    config: RunConfig, *, on_event: Tell | None = None, on_rows: Count | None = None, quiet: bool = False
) -> RunResult:
    """Train one adapter as described, prove that what was saved is what was trained, and report.

    The data is rendered and checked before any weight is loaded. ``output_dir`` then holds the adapter, its
    tokenizer and chat template, ``run.yaml``, ``trainer_state.json`` and ``all_results.json``.

    Args:
        config: the run.
        on_event: called with a short text at each step.
        on_rows: called while rows are tokenized, with how many are done and of how many.
        quiet: draw no progress.

    Raises:
        ConfigError: ``output_dir`` holds an adapter, or a run to resume is not there.
        DataError: rows that cannot be trained on, all of them at once.
        CheckpointError: the adapter read back differs from the trained one, or changes nothing.
        DeltawError: what the model, the adapters or the trainer find wrong.
    """
    tell = on_event or (lambda event: None)
    output_dir, resume = _claim(config, tell)
    _require_watch(config)
    data = prepare_data(config, tell, on_rows)
    config = data.described(config)
    tell(f"loading {config.model_name_or_path}")
    model = load_base(config)
    base = model.config
    progress = ProgressCallback(quiet=quiet)
    trainer = make_trainer(config, model, data, progress)
    adapted: Any = trainer.model
    trainable, everything = adapted.get_nb_trainable_parameters()
    tell(f"training {trainable:,} of {everything:,} parameters ({trainable / everything:.2%})")
    if config.overwrite_output_dir and resume is None:
        _forget_checkpoints(output_dir)
    try:
        metrics = trainer.train(resume_from_checkpoint=resume).metrics
    finally:
        progress.close()
    if data.eval_dataset is not None:
        metrics |= _last_evaluation(config, trainer) or trainer.evaluate()
    tell(f"saving to {output_dir}")
    _save(trainer, config, output_dir)
    parity = verify_saved(adapted, output_dir, data.shortest(), partial(load_base, config))
    tell(f"reloaded: {parity}")
    tokens = trainer.state.num_input_tokens_seen - progress.first_tokens
    results = {
        **metrics,
        "train_tokens": tokens,
        "train_tokens_per_second": tokens / metrics["train_runtime"],
        "trainable_params": trainable,
        "all_params": everything,
        "data": _report(data),
        "parity": dataclasses.asdict(parity),
        "base_model": config.model_name_or_path,
        "base_revision": getattr(base, "_commit_hash", None),
        "base_fingerprint": base_fingerprint(resolve_model(config.model_name_or_path)),
        "dataset_fingerprint": data.fingerprint(),
        "template_fingerprint": text_fingerprint(data.tokenizer.chat_template),
        "versions": versions(),
        "output_dir": str(output_dir),
    }
    written = adapted.active_peft_config
    write_run_card(
        output_dir, written, results, trainer.state.log_history, proof=parity.sentences(), command=_command()
    )
    write_text(output_dir / "all_results.json", json.dumps(results, indent=2, sort_keys=True, default=str) + "\n")
    return RunResult(output_dir, results, parity)


def check_run(config: RunConfig, *, on_event: Tell | None = None, on_rows: Count | None = None) -> dict[str, Any]:
    """Everything that a run checks before it loads a weight; returns the counts of the data.

    Raises:
        ConfigError, DataError, ModelError: as :func:`run_training`.
    """
    _claim(config, lambda event: None)
    _require_watch(config)
    return _report(prepare_data(config, on_event or (lambda event: None), on_rows))


def load_base(config: RunConfig) -> Any:
    """The base model as the run wants it."""
    return load_model(
        config.model_name_or_path,
        quantization_config=None if config.quantization is None else NF4Config(**config.quantization),
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
    )


def make_trainer(config: RunConfig, model: Any, data: RunData, progress: ProgressCallback) -> SFTTrainer:
    """A trainer with the run's adapters injected into ``model``."""
    known = {field.name for field in dataclasses.fields(SFTConfig) if field.init}
    arguments = config.pick(known - {"resume_from_checkpoint"})  # that goes to train()
    if "activation_checkpointing" in known:  # transformers' new name; the old one warns
        arguments["activation_checkpointing"] = arguments.pop("gradient_checkpointing") or None
    args = SFTConfig(**arguments, disable_tqdm=True)
    rows = training_rows(data.train_dataset, args)
    set_seed(config.seed)  # the adapters are drawn before the trainer seeds itself
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=data.eval_dataset,
        peft_config=adapter_config(config, _steps(args, len(rows if args.packing else data.dataset))),
        processing_class=data.tokenizer,
        callbacks=[progress],
    )
    trainer.remove_callback(PrinterCallback)  # the progress says the same, better
    return trainer


def adapter_config(config: RunConfig, steps: int) -> PeftConfig:
    """The config of the run's method.

    Args:
        steps: optimizer steps that the run will make, for a method that plans with them.

    Raises:
        ConfigError: values that the method refuses.
    """
    kind: type[PeftConfig] = getattr(deltaw, METHODS[config.method].config)
    names = [field.name for field in dataclasses.fields(kind) if field.init]
    values = {name: value for name, value in config.pick(names).items() if value is not None}
    if config.method == "adalora":
        values["total_step"] = steps
        values |= {name: _share(values[name], steps) for name in ("tinit", "tfinal")}
    # the name that was given: a built-in one, where the model itself knows only a folder of this machine
    return kind(**values, task_type="CAUSAL_LM", base_model_name_or_path=config.model_name_or_path)


# --- the small steps ----------------------------------------------------------------------------------------


def _claim(config: RunConfig, tell: Tell) -> tuple[Path, Path | None]:
    """The output folder, unless it holds what a person may want to keep; and the checkpoint to go on from."""
    folder = Path(config.output_dir).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir = {config.output_dir!r} is a file: name a folder")
    resume = resolve(config.resume_from_checkpoint, folder, tell)
    if resume or config.overwrite_output_dir:
        return folder, resume
    kept = [] if config.resume_from_checkpoint == "auto" else checkpoints(folder, complete=False)
    if (folder / "adapter_config.json").exists() or kept:
        held = "an adapter" if (folder / "adapter_config.json").exists() else f"{len(kept)} checkpoints"
        raise ConfigError(
            f"output_dir = {config.output_dir!r} holds {held} of an earlier run: name another folder, go on "
            "with --resume_from_checkpoint true, or replace it with --overwrite_output_dir"
        )
    return folder, None


def _require_watch(config: RunConfig) -> None:
    """What watches the run: trackers that are installed, a limit that is a size, a metric that there will be."""
    require_trackers(config.report_to)
    limit_bytes(config.memory_limit)
    require_metric(config.metric_for_best_model, answers=config.eval_answers > 0)


def _command() -> str:
    """How this process was started, if by our command; else the command that does the same from ``run.yaml``."""
    program, *words = sys.argv or [""]
    ours = Path(program).stem == "deltaw" or Path(program).parent.name == "deltaw"  # python -m deltaw
    return shlex.join(["deltaw", *words]) if ours else "deltaw train run.yaml"


def _save(trainer: SFTTrainer, config: RunConfig, folder: Path) -> None:
    """The adapter, its tokenizer and template, and what they came from: all of it or nothing."""
    with saving(folder), publishing(folder) as staged:
        trainer.save_model(str(staged))
        trainer.state.save_to_json(str(staged / "trainer_state.json"))
        (staged / "run.yaml").write_text(config.to_yaml(), encoding="utf-8")
        (folder / "all_results.json").unlink(missing_ok=True)  # of the adapter that is replaced


def _steps(args: SFTConfig, examples: int) -> int:
    """Optimizer steps of a run over ``examples``, as the trainer will count them."""
    if args.max_steps > 0:
        return args.max_steps
    batches = math.ceil(math.ceil(examples / args.train_batch_size) / args.world_size)
    return math.ceil(args.num_train_epochs * math.ceil(batches / args.gradient_accumulation_steps))


def _share(value: float, steps: int) -> int:
    """Steps, given as a number of them or, below 1, as a share of all."""
    return round(value * steps) if value < 1 else int(value)


def _forget_checkpoints(folder: Path) -> None:
    """Those of the run that is replaced: a later resume must not take one of them for its own."""
    for checkpoint in checkpoints(folder, complete=False):
        if not checkpoint.is_symlink():
            shutil.rmtree(checkpoint)


def _last_evaluation(config: RunConfig, trainer: SFTTrainer) -> dict[str, Any]:
    """The evaluation of the weights as they are now, if the trainer has just made it."""
    last = next((log for log in reversed(trainer.state.log_history) if "eval_loss" in log), {})
    if trainer.args.load_best_model_at_end or last.get("step") != trainer.state.global_step:
        return {}
    return {key: value for key, value in last.items() if key.startswith("eval_")}


def _report(data: RunData) -> dict[str, Any]:
    return dataclasses.asdict(data.report) | {"eval_examples": len(data.eval_dataset or [])}
