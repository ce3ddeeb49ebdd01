"""One run, described: every key with its type, default, doc and limits, said once.

The YAML file, the command line's flags and help, the JSON schema and the resolved ``run.yaml`` all derive
from :class:`RunConfig`. Keys are named as in ``TrainingArguments``, ``SFTConfig`` and ``LoraConfig``.
Knows nothing of torch, transformers or models: it is read before any of them is imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, PrivateAttr, ValidationError, model_validator

from deltaw.adapterfields import ADAPTER_GROUPS, AdapterFields, Fault, belongs, methods_of
from deltaw.datafields import DATA_GROUP, DataFields
from deltaw.errors import ConfigError, did_you_mean
from deltaw.fieldtypes import Dtype, Int, Pieces, QuantType, Resume, SaveStrategy, Strategy, setting
from deltaw.methods import METHODS
from deltaw.optimizers import argument_faults, name_fault
from deltaw.runfile import read_run_file

__all__ = ["ALIASES", "GROUPS", "CrossFaults", "Fault", "RunConfig", "group_of", "keys_of", "load_run_config"]

_SHOWN = 80  # characters of a value that an error repeats
GROUPS = ("Model", DATA_GROUP, *ADAPTER_GROUPS, "Training", "Evaluation", "Saving and logging")

#: keys that say how weights are kept in 4 bits, by the names of NF4Config
QUANTIZATION = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype")

# Names from older versions of the same libraries. They are read, and a note says the name of today.
ALIASES = {
    "evaluation_strategy": "eval_strategy",
    "max_seq_length": "max_length",
    "torch_dtype": "dtype",
}


class CrossFaults(ValueError):
    """Keys that are fine one by one and cannot work together."""

    def __init__(self, faults: list[Fault]) -> None:
        self.faults = faults
        super().__init__("; ".join(f"{f.key} = {f.value!r}: {f.why}; {f.cure}" for f in faults))


_model, _training, _evaluation, _saving = (
    partial(setting, group) for group in GROUPS if group not in (DATA_GROUP, *ADAPTER_GROUPS)
)


class RunConfig(AdapterFields, DataFields):
    """One fine-tuning run. Immutable; unknown keys are refused; ``preset`` fills what is not given.

    Built directly it raises pydantic's ``ValidationError`` (a ``ValueError``);
    :func:`load_run_config` raises one ``ConfigError`` with every fault, its place and its cure.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        coerce_numbers_to_str=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        title="deltaw run",
    )

    model_name_or_path: str = _model(..., "Base model: a folder, a hub id, or a built-in name (smollm2-135m).")
    dtype: Dtype = _model("auto", "Type of the base's weights; auto keeps the checkpoint's.")
    attn_implementation: str | None = _model(None, "Attention: eager, sdpa, ...; unset: the best that is there.")
    trust_remote_code: bool = _model(False, "Run Python code that comes with the model.")
    load_in_4bit: bool = _model(False, "Keep the base's weights in 4 bits (QLoRA), quantized while they are read.")
    bnb_4bit_quant_type: QuantType = _model("nf4", "Which 4 bits: nf4, or fp4, which errs more.")
    bnb_4bit_use_double_quant: bool = _model(True, "Quantize the scales too: 4.127 bits a weight, not 4.5.")
    bnb_4bit_compute_dtype: Dtype = _model("auto", "Type that 4-bit layers compute in; auto: that of their input.")

    per_device_train_batch_size: Int = _training(8, "Examples a device and micro-step.", gt=0)
    gradient_accumulation_steps: Int = _training(1, "Micro-steps an optimizer step; averaged per token.", gt=0)
    num_train_epochs: float = _training(3.0, "Passes over the data.", gt=0)
    max_steps: Int = _training(-1, "Optimizer steps; when positive, in place of num_train_epochs.", ge=-1)
    learning_rate: float = _training(2e-4, "Peak learning rate; about ten times that of full fine-tuning.", gt=0)
    lr_scheduler_type: str = _training("linear", "Schedule: linear, cosine, constant_with_warmup, ...")
    warmup_steps: float = _training(0.03, "Steps of warm-up; below 1, a share of all steps.", ge=0)
    optim: str = _training(
        "adamw_torch_fused", "Optimizer: adamw_torch_fused, adamw_8bit, paged_adamw_32bit, paged_adamw_8bit, sgd, ..."
    )
    optim_args: str | None = _training(
        None, "Arguments of the optimizer: momentum=0.9 for sgd, page_dir=/a/disk for paged ones, ..."
    )
    weight_decay: float = _training(0.0, "Decoupled weight decay.", ge=0)
    adam_beta1: float = _training(0.9, "AdamW's first decay.", ge=0, lt=1)
    adam_beta2: float = _training(0.999, "AdamW's second decay.", ge=0, lt=1)
    adam_epsilon: float = _training(1e-8, "AdamW's epsilon.", gt=0)
    max_grad_norm: float = _training(1.0, "Longest gradient before it is scaled down; 0 never scales.", ge=0)
    neftune_noise_alpha: float | None = _training(None, "Noise on the embeddings while training (NEFTune).", gt=0)
    bf16: bool = _training(False, "Mixed precision in bfloat16 over a float32 base.")
    fp16: bool = _training(False, "Mixed precision in float16.")
    gradient_checkpointing: bool = _training(False, "Recompute activations in backward: less memory, more time.")
    torch_compile: bool = _training(False, "Compile the decoder layers.")
    use_cpu: bool = _training(False, "Stay on the CPU even if there is a GPU.")
    dataloader_num_workers: Int = _training(0, "Processes that collate batches.", ge=0)
    seed: Int = _training(42, "Seed of the adapter's weights, the dropout and the order of the data.", ge=0)
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = _training(
        "random", "Order of the examples: drawn anew each epoch, as they are, or those of like length together."
    )
    max_nonfinite_steps: Int = _training(
        3, "Stop after N steps in a row whose loss or gradient is not finite; each is skipped and counted.", gt=0
    )
    memory_limit: str | None = _training(
        None, "Most memory a run may take (24GiB); beyond it, it stops and says what takes most. Unset: what there is."
    )
    data_seed: Int | None = _training(None, "Another seed for the order of the data.", ge=0)

    eval_strategy: Strategy = _evaluation("no", "When to evaluate while training; it is always done at the end.")
    eval_steps: Int | None = _evaluation(None, "Steps between evaluations; unset: logging_steps.", gt=0)
    per_device_eval_batch_size: Int = _evaluation(8, "Examples a device when evaluating.", gt=0)
    load_best_model_at_end: bool = _evaluation(False, "Keep the best evaluated adapter, not the last.")
    metric_for_best_model: str | None = _evaluation(None, "What best means; unset: loss.")
    early_stopping_patience: Int | None = _evaluation(
        None, "Stop after N evaluations without an improvement; the best adapter is kept.", gt=0
    )
    early_stopping_threshold: float = _evaluation(0.0, "Smaller improvements do not count.", ge=0)
    eval_answers: Int = _evaluation(0, "Questions answered and scored at each evaluation; 0: only the loss.", ge=0)
    greater_is_better: bool | None = _evaluation(None, "Whether more of it is better; unset: by its name.")

    output_dir: str = _saving("trainer_output", "Where the adapter, its tokenizer and the results go.")
    overwrite_output_dir: bool = _saving(False, "Replace an adapter that is already in output_dir.")
    resume_from_checkpoint: Resume = _saving(
        None, "Go on from a checkpoint: its folder; true: the newest complete one in output_dir; auto: that, if any is."
    )
    save_strategy: SaveStrategy = _saving("steps", "When to write a checkpoint.")
    save_steps: Int = _saving(500, "Steps between checkpoints.", gt=0)
    save_total_limit: Int | None = _saving(None, "Checkpoints to keep; unset: all.", gt=0)
    logging_steps: Int = _saving(10, "Steps between log lines.", gt=0)
    report_to: Pieces = _saving("none", "Trackers: none, all, tensorboard, wandb, ...")
    run_name: str | None = _saving(None, "Name of the run for the trackers.")

    _notes: list[str] = PrivateAttr(default_factory=list)

    @model_validator(mode="after")
    def _check_together(self) -> RunConfig:
        if faults := [*self.adapter_faults(), *self.data_faults(), *_faults_together(self)]:
            raise CrossFaults(faults)
        self._notes.extend(_notes_on(self))
        return self

    @property
    def notes(self) -> tuple[str, ...]:
        """What is worth saying about this description, though nothing is wrong."""
        return tuple(self._notes)

    @property
    def evaluates(self) -> bool:
        """Whether there are rows to evaluate on."""
        return bool(self.eval_dataset_name or self.dataset_test_split or self.val_size)

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The arguments of an ``NF4Config`` for the base; None when it stays in full."""
        values = {name: value for name, value in self.pick(QUANTIZATION).items() if value != "auto"}
        return values if self.load_in_4bit else None

    def changed(self, name: str) -> bool:
        """Whether key ``name`` differs from its default (a resolved file gives all keys, most unchanged)."""
        return getattr(self, name) != type(self).model_fields[name].default

    def pick(self, names: Iterable[str]) -> dict[str, Any]:
        """Those of ``names`` that are keys of a run, with their values."""
        return {name: getattr(self, name) for name in names if name in type(self).model_fields}

    def to_yaml(self) -> str:
        """The resolved description: every key of this method under its group, and ready to be run again."""
        values = self.model_dump(mode="json")
        blocks = []
        for group in GROUPS:
            # one key a line, lists and mappings in their short form
            lines = [
                yaml.safe_dump({name: value}, default_flow_style=_style(value), allow_unicode=True, width=10**6)
                for name, value in ((name, values[name]) for name in keys_of(group) if belongs(name, self.method))
            ]
            if lines:
                blocks.append(f"# {group}\n{''.join(lines)}")
        return "\n".join(blocks)


def _style(value: Any) -> bool | None:
    """YAML's short form for the inside of lists and mappings, never for the line itself."""
    return None if isinstance(value, list | dict) and value else False


def group_of(name: str) -> str:
    """The group that a key of :class:`RunConfig` is shown under."""
    extra = RunConfig.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)
    return str(extra["group"])


def keys_of(group: str) -> list[str]:
    """The keys of a group, in their order."""
    return [name for name in RunConfig.model_fields if group_of(name) == group]


def _faults_together(c: RunConfig) -> Iterable[Fault]:
    """What cannot work, or would be read by nothing, though each key is fine by itself."""

    def fault(name: str, why: str, cure: str) -> Fault:
        return Fault(name, getattr(c, name), why, cure)

    if not c.load_in_4bit:
        for name in QUANTIZATION:
            if c.changed(name):
                yield fault(name, "nothing reads it while load_in_4bit is false", "load_in_4bit: true")
    if c.bf16 and c.fp16:
        yield fault("fp16", "bf16 is set too, and only one can be", "keep bf16 where the device has it")
    if why := name_fault(c.optim):
        yield fault("optim", why, "docs/optimizers.md lists them")
    for why in argument_faults(c.optim, c.optim_args):
        yield fault("optim_args", why, "key=value pairs with commas between")
    if c.max_steps == 0:
        yield fault("max_steps", "a run of no steps learns nothing", "-1 for whole epochs, or a positive number")
    if c.dataset_streaming:
        if c.max_steps < 0:
            yield fault("max_steps", "a stream has no length (dataset_streaming)", "max_steps: how long to train")
        if c.changed("train_sampling_strategy"):
            why = "a stream has an order of its own (dataset_streaming)"
            yield fault("train_sampling_strategy", why, "leave it out")
    if c.val_size and (c.eval_dataset_name or c.dataset_test_split):
        yield fault("val_size", "there are evaluation rows already", "leave it out")
    if not c.evaluates:
        cure = "give eval_dataset_name, dataset_test_split or val_size"
        for name in (
            *("eval_strategy", "max_eval_samples", "load_best_model_at_end"),
            *("early_stopping_patience", "eval_answers", "metric_for_best_model"),
        ):
            if c.changed(name):
                yield fault(name, "there are no rows to evaluate on", cure)
    if c.eval_steps and c.eval_strategy != "steps":
        yield fault(
            "eval_steps",
            f"nothing reads it while eval_strategy is {c.eval_strategy!r}",
            "eval_strategy: steps",
        )
    if c.changed("save_steps") and c.save_strategy != "steps":
        yield fault(
            "save_steps",
            f"nothing reads it while save_strategy is {c.save_strategy!r}",
            "save_strategy: steps",
        )
    keeps = "load_best_model_at_end" if c.load_best_model_at_end else "early_stopping_patience"
    if c.early_stopping_patience is None and c.changed("early_stopping_threshold"):
        yield fault("early_stopping_threshold", "nothing reads it alone", "early_stopping_patience: 3")
    if getattr(c, keeps):  # early stopping keeps the best too
        every = c.eval_steps or c.logging_steps
        if c.eval_strategy == "no" and c.evaluates:
            yield fault(keeps, "nothing is evaluated while training", "eval_strategy: epoch or steps")
        elif c.save_strategy != "best" and c.eval_strategy != c.save_strategy:
            yield fault(
                keeps,
                f"eval_strategy is {c.eval_strategy!r} and save_strategy {c.save_strategy!r}: "
                "the best may not be saved",
                "give both the same value, or save_strategy: best",
            )
        elif c.eval_strategy == c.save_strategy == "steps" and c.save_steps % every:
            yield fault("save_steps", f"it is no multiple of eval_steps ({every})", f"save_steps: {every}")
    elif c.save_strategy == "best":
        yield fault("save_strategy", "best needs evaluations to compare", "load_best_model_at_end: true")


def _notes_on(c: RunConfig) -> Iterable[str]:
    if c.max_steps > 0 and c.changed("num_train_epochs"):
        yield f"max_steps = {c.max_steps} decides the length, not num_train_epochs = {c.num_train_epochs:g}"
    if c.trust_remote_code:
        yield f"trust_remote_code: Python code that comes with {c.model_name_or_path} will be run"


# --- reading a run: the file, then what was said beside it ------------------------------------------------


def load_run_config(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """The run described by a YAML file and by ``overrides``, which win; an override of None was not given.

    Raises:
        ConfigError: one error that lists every fault: where it stands, the key, the value, why, and the cure.
    """
    file = read_run_file(path) if path is not None else None
    given: dict[str, Any] = {}
    where: dict[str, str] = {}
    notes: list[str] = []
    faults: list[Fault] = []

    def take(values: Mapping[str, Any], places: Mapping[str, str]) -> None:
        today: dict[str, str] = {}  # today's name -> the name it was given under
        for name, value in values.items():
            key = ALIASES.get(name, name)
            if key != name:
                notes.append(f"{places[name]}: {name} is called {key} today; it was read as that")
            if key in today:
                faults.append(Fault(name, value, f"{today[key]!r} says the same", "keep one of them"))
            today[key] = name
            given[key] = value
            where[key] = where[name] = places[name]

    if file is not None:
        take(file.values, {key: f"{path}:{file.lines.get(key, 1)}" for key in file.values})
        for key, first, line in file.duplicates:
            faults.append(Fault(key, None, f"given on line {first} and again on line {line}", "keep one of them"))
    said = {key.replace("-", "_"): value for key, value in (overrides or {}).items() if value is not None}
    take(said, dict.fromkeys(said, "command line"))

    config, found = _validate(given)
    if faults := faults + found:
        raise ConfigError(_tell(faults, where, str(path) if path is not None else "command line"))
    assert config is not None
    config._notes[:0] = notes
    return config


def _validate(given: Mapping[str, Any]) -> tuple[RunConfig | None, list[Fault]]:
    """The run, or every fault: those of single keys, then those of keys together among the good ones."""
    try:
        return RunConfig.model_validate(dict(given)), []
    except ValidationError as error:
        faults = [fault for one in error.errors() for fault in _faults_of(one, given)]
    bad = {fault.key for fault in faults}
    if "method" in bad:  # whose keys these are cannot be said
        given = {key: value for key, value in given.items() if not methods_of(key)}
    stand_in = {key: "?" for key, field in RunConfig.model_fields.items() if field.is_required()}
    try:
        RunConfig.model_validate(stand_in | {key: given[key] for key in given if key not in bad})
    except ValidationError as error:
        again = [fault for one in error.errors() for fault in _faults_of(one, given)]
        faults += [fault for fault in again if fault.key not in bad]
    return None, faults


def _faults_of(error: Any, given: Mapping[str, Any]) -> Iterable[Fault]:
    """One of pydantic's errors in our words."""
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, CrossFaults):
        yield from cause.faults
        return
    key = str(error["loc"][0]) if error["loc"] else ""
    field = RunConfig.model_fields.get(key)
    if field is None:
        near = did_you_mean(key, [*RunConfig.model_fields, *ALIASES])
        yield Fault(key, given.get(key), "unknown key" + near, "" if near else "deltaw train --help lists all keys")
    elif error["type"] == "missing":
        yield Fault(key, None, f"missing: {field.description}", f"write {key}: ... or pass --{key}")
    else:
        why = error["msg"].replace("Input should be", "it should be")
        if key == "method":
            why += did_you_mean(str(given.get(key)).lower(), METHODS)
        yield Fault(key, given.get(key), why, str(field.description))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _tell(faults: list[Fault], where: Mapping[str, str], source: str) -> str:
    told: dict[str, None] = {}  # a union's branches each complain: say a thing once, in order
    for fault in faults:
        value = "" if fault.value is None else f" = {_short(fault.value)}"
        cure = f" ({fault.cure})" if fault.cure else ""
        told[f"{where.get(fault.key, source)}: {fault.key}{value}: {fault.why}{cure}"] = None
    if len(told) == 1:
        return next(iter(told))
    return "\n  ".join([f"the run cannot start, {len(told)} settings are wrong:", *told])
