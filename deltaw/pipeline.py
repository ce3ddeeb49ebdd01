"""One run, top to bottom: described -> rows -> checked -> model -> trained -> saved -> reloaded -> reported.

Knows what happens in which order, and nothing of how: each step is the business of a lower floor.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, set_seed

import deltaw
from deltaw import PeftConfig, PeftModel
from deltaw.config import RunConfig
from deltaw.data import (
    CheckReport,
    Collator,
    Rendered,
    RenderSettings,
    check_rendered,
    load_rows,
    render_all,
)
from deltaw.errors import CheckpointError, ConfigError
from deltaw.evaluate.generate import inference
from deltaw.loading import load_model, load_tokenizer, resolve_model
from deltaw.methods import METHODS
from deltaw.provenance import base_fingerprint, rows_fingerprint, text_fingerprint, versions
from deltaw.quant.config import NF4Config
from deltaw.train import SFTConfig, SFTTrainer
from deltaw.train.progress import ProgressCallback

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
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_PROBES = 4  # examples that the reloaded adapter is compared on
_TOLERANCE = 1e-5  # of the largest logit: the same arithmetic twice, on a device that may reorder its sums


@dataclass(frozen=True)
class RunData:
    """The rows of a run, rendered and checked."""

    tokenizer: Any
    rows: list[dict[str, Any]]
    rendered: list[Rendered]
    eval_rendered: list[Rendered] | None
    report: CheckReport


@dataclass(frozen=True)
class Parity:
    """The adapter read back from disk, compared by its logits on a few training examples.

    Attributes:
        trained: largest difference from the model that was trained; 0 means bit for bit.
        base: largest difference from the base alone.
        scale: largest logit.
    """

    trained: float
    base: float
    scale: float

    def __str__(self) -> str:
        same = "bit for bit the trained model" if self.trained == 0 else f"the trained model to {self.trained:.1e}"
        return f"{same}; it moves the base's logits by up to {self.base:.2g}"


@dataclass(frozen=True)
class RunResult:
    """What a run left behind: its folder, the numbers of ``all_results.json``, and the adapter's proof."""

    output_dir: Path
    results: dict[str, Any]
    parity: Parity


def run_training(config: RunConfig, *, on_event: Tell | None = None, quiet: bool = False) -> RunResult:
    """Train one adapter as described, prove that what was saved is what was trained, and report.

    The data is rendered and checked before any weight is loaded. ``output_dir`` then holds the adapter, its
    tokenizer and chat template, ``run.yaml``, ``trainer_state.json`` and ``all_results.json``.

    Args:
        config: the run.
        on_event: called with a short text at each step.
        quiet: draw no progress.

    Raises:
        ConfigError: ``output_dir`` holds an adapter, or a run to resume is not there.
        DataError: rows that cannot be trained on, all of them at once.
        CheckpointError: the adapter read back differs from the trained one, or changes nothing.
        DeltawError: what the model, the adapters or the trainer find wrong.
    """
    tell = on_event or (lambda event: None)
    output_dir = _claim(config)
    data = prepare_data(config, tell)
    tell(f"loading {config.model_name_or_path}")
    model = load_base(config)
    base = model.config
    progress = ProgressCallback(quiet=quiet)
    trainer = make_trainer(config, model, data, progress)
    adapted: Any = trainer.model
    trainable, everything = adapted.get_nb_trainable_parameters()
    tell(f"training {trainable:,} of {everything:,} parameters ({trainable / everything:.2%})")
    if config.overwrite_output_dir and not config.resume_from_checkpoint:
        _forget_checkpoints(output_dir)
    try:
        metrics = trainer.train(resume_from_checkpoint=config.resume_from_checkpoint).metrics
    finally:
        progress.close()
    if data.eval_rendered is not None:
        metrics |= _last_evaluation(config, trainer) or trainer.evaluate()
    tell(f"saving to {output_dir}")
    trainer.save_model(str(output_dir))
    data.tokenizer.save_pretrained(output_dir)
    trainer.save_state()
    _write(output_dir / "run.yaml", config.to_yaml())
    fresh_base = None if config.bias == "none" else partial(load_base, config)
    parity = verify_saved(adapted, output_dir, data.rendered, fresh_base)
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
        "dataset_fingerprint": rows_fingerprint(data.rows),
        "template_fingerprint": text_fingerprint(data.tokenizer.chat_template),
        "versions": versions(),
        "output_dir": str(output_dir),
    }
    _write(output_dir / "all_results.json", json.dumps(results, indent=2, sort_keys=True, default=str) + "\n")
    return RunResult(output_dir, results, parity)


def check_run(config: RunConfig, *, on_event: Tell | None = None) -> dict[str, Any]:
    """Everything that a run checks before it loads a weight; returns the counts of the data.

    Raises:
        ConfigError, DataError, ModelError: as :func:`run_training`.
    """
    _claim(config)
    return _report(prepare_data(config, on_event or (lambda event: None)))


def prepare_data(config: RunConfig, tell: Tell) -> RunData:
    """Rows read, rendered with the tokenizer that will be saved, and checked.

    Raises:
        DataError: what is wrong with the rows, all at once.
    """
    tokenizer = load_tokenizer(config.model_name_or_path, chat_template=config.chat_template_path)
    settings = RenderSettings(
        max_length=config.max_length,
        completion_only_loss=config.completion_only_loss,
        assistant_only_loss=config.assistant_only_loss,
        text_field=config.dataset_text_field,
        allow_truncation=config.allow_truncation,
    )
    rows, eval_rows = _read_rows(config)
    tell(f"read {len(rows):,} rows" + ("" if eval_rows is None else f", {len(eval_rows):,} to evaluate on"))
    rendered = render_all(rows, tokenizer, settings)
    eval_rendered = None if eval_rows is None else render_all(eval_rows, tokenizer, settings)
    report = check_rendered(
        rendered,
        tokenizer,
        settings,
        eval_rendered=eval_rendered,
        batch_size=config.per_device_train_batch_size,
    )
    report.raise_if_bad()
    tell(str(report))
    return RunData(tokenizer, rows, rendered, eval_rendered, report)


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
    set_seed(config.seed)  # the adapters are drawn before the trainer seeds itself
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=_features(data.rendered),
        eval_dataset=_features(data.eval_rendered),
        peft_config=adapter_config(config, _steps(args, len(data.rendered))),
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
    return kind(**values, task_type="CAUSAL_LM")


def verify_saved(
    model: Any, folder: str | Path, rendered: list[Rendered], fresh_base: Callable[[], Any] | None = None
) -> Parity:
    """Reads the adapter in ``folder`` back from disk and compares its logits with the trained one's.

    Args:
        model: the trained ``PeftModel``; it is left as it was found.
        folder: where its adapter was saved.
        rendered: training examples; the shortest few are compared on.
        fresh_base: loads another base to put the adapter on; None puts it beside the trained one on the same
            base, which needs no second copy of the weights but is wrong where the base's biases were trained.

    Raises:
        CheckpointError: the adapter read back is not the trained one, or it does not change the base.
    """
    shortest = sorted(rendered, key=lambda one: len(one.input_ids))[:_PROBES]
    batch = Collator(pad_token_id=0)([one.as_features() for one in shortest])
    device = next(model.parameters()).device
    inputs = {key: batch[key].to(device) for key in ("input_ids", "attention_mask")}
    seen = batch["attention_mask"].bool()

    def logits(of: Any) -> torch.Tensor:  # (tokens, vocabulary)
        with inference(of):
            return of(**inputs).logits.float().cpu()[seen]

    trained = logits(model)
    if fresh_base is not None:
        other = fresh_base().to(device)
        base = logits(other)
        reloaded = logits(PeftModel.from_pretrained(other, str(folder)))
    else:
        with model.disable_adapter():
            base = logits(model)
        trained_name = model.active_adapter
        model.load_adapter(str(folder), adapter_name="reloaded")
        try:
            model.set_adapter("reloaded")
            reloaded = logits(model)
        finally:
            model.set_adapter(trained_name)
            model.delete_adapter("reloaded")
    parity = Parity(
        trained=float((reloaded - trained).abs().max()),
        base=float((reloaded - base).abs().max()),
        scale=float(trained.abs().max()),
    )
    if not parity.trained <= _TOLERANCE * parity.scale:
        raise CheckpointError(
            f"the adapter in {folder} is not the one that was trained: read back, its logits differ by up to "
            f"{parity.trained:.3g} (the largest is {parity.scale:.3g}); do not use it, and report this"
        )
    if parity.base == 0:
        raise CheckpointError(
            f"the adapter in {folder} changes nothing: its logits are the base's. Nothing was learned; "
            "look at learning_rate, max_steps, warmup_steps and the loss in trainer_state.json"
        )
    return parity


# --- the small steps ----------------------------------------------------------------------------------------


def _claim(config: RunConfig) -> Path:
    """The output folder, unless it holds what a person may want to keep."""
    folder = Path(config.output_dir).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir = {config.output_dir!r} is a file: name a folder")
    checkpoints = [p for p in folder.glob("checkpoint-*") if _CHECKPOINT.fullmatch(p.name)]
    resume = config.resume_from_checkpoint
    if isinstance(resume, str) and not Path(resume).is_dir():
        raise ConfigError(f"resume_from_checkpoint = {resume!r}: no such folder; true takes the newest in output_dir")
    if resume is True and not checkpoints:
        raise ConfigError(f"resume_from_checkpoint: {folder} holds no checkpoint; leave it out to start anew")
    if resume or config.overwrite_output_dir:
        return folder
    if (folder / "adapter_config.json").exists() or checkpoints:
        held = "an adapter" if (folder / "adapter_config.json").exists() else f"{len(checkpoints)} checkpoints"
        raise ConfigError(
            f"output_dir = {config.output_dir!r} holds {held} of an earlier run: name another folder, go on "
            "with --resume_from_checkpoint true, or replace it with --overwrite_output_dir"
        )
    return folder


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
    for checkpoint in folder.glob("checkpoint-*"):
        if _CHECKPOINT.fullmatch(checkpoint.name) and not checkpoint.is_symlink():
            shutil.rmtree(checkpoint)


def _read_rows(config: RunConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    rows = load_rows(config.dataset_name, config.dataset_train_split, limit=config.max_train_samples, seed=config.seed)
    held_out = None
    if config.val_size:
        chosen = set(random.Random(config.seed).sample(range(len(rows)), max(1, round(config.val_size * len(rows)))))
        held_out = [row for i, row in enumerate(rows) if i in chosen][: config.max_eval_samples]
        rows = [row for i, row in enumerate(rows) if i not in chosen]
    elif config.evaluates:
        name = config.eval_dataset_name or config.dataset_name
        split = config.dataset_test_split
        held_out = load_rows(name, split, limit=config.max_eval_samples, seed=config.seed)
    return rows, held_out


def _last_evaluation(config: RunConfig, trainer: SFTTrainer) -> dict[str, Any]:
    """The evaluation of the weights as they are now, if the trainer has just made it."""
    last = next((log for log in reversed(trainer.state.log_history) if "eval_loss" in log), {})
    if config.load_best_model_at_end or last.get("step") != trainer.state.global_step:
        return {}
    return {key: value for key, value in last.items() if key.startswith("eval_")}


def _features(rendered: list[Rendered] | None) -> list[dict[str, list[int]]] | None:
    return None if rendered is None else [example.as_features() for example in rendered]


def _report(data: RunData) -> dict[str, Any]:
    return dataclasses.asdict(data.report) | {"eval_examples": len(data.eval_rendered or [])}


def _write(path: Path, text: str) -> None:
    """The whole file or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
