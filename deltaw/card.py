"""The model card beside a saved adapter: the header that the hub reads, how to load it, and how it came about.

Knows nothing of runs but the words it is given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deltaw.adapters import PeftConfig
from deltaw.adapters.config import BASE_CLASSES
from deltaw.atomic import write_text
from deltaw.builtin import BUILT_IN

__all__ = ["MARK", "RunFacts", "write_card"]

#: the line by which a card of ours is known; any other card is the user's
MARK = "<!-- deltaw wrote this card. Without this line it is yours, and stays as it is. -->"

#: task_type -> the hub's name for it
PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}


@dataclass(frozen=True)
class RunFacts:
    """What a card says of the run that trained the adapter, in words.

    Attributes:
        figures: losses, scores, speed.
        origin: what it was made of: base model and its hash, data and template fingerprints, versions.
        proof: sentences on the adapter read back from disk.
        command: how the run was started.
        picture: name of the file with the loss curve, beside the card; None without one.
    """

    figures: Mapping[str, str]
    origin: Mapping[str, str]
    proof: Sequence[str] = field(default_factory=list)
    command: str = ""
    picture: str | None = None


def write_card(folder: Path, config: PeftConfig, run: RunFacts | None = None) -> bool:
    """Writes ``README.md`` into ``folder``; returns whether it did.

    A card of the user's is left alone; one of ours is replaced where ``run`` says more than it.
    """
    path = folder / "README.md"
    if path.exists() and (run is None or MARK not in path.read_text(encoding="utf-8", errors="replace")):
        return False
    base = config.base_model_name_or_path or ""
    task = str(config.task_type)
    pipeline, auto = PIPELINES.get(task), BASE_CLASSES.get(task, "AutoModel")
    method = str(config.peft_type).lower()
    # neither a local folder nor a built-in name is an id of the hub, which would refuse it
    listed = base if base and base not in BUILT_IN and not Path(base).exists() and base.count("/") <= 1 else ""
    header = [f"base_model: {json.dumps(listed)}"] if listed else []
    header.append("library_name: peft")
    if pipeline:
        header.append(f"pipeline_tag: {pipeline}")
    header.append("tags:")
    if listed:
        header.append(f"- {json.dumps(f'base_model:adapter:{listed}')}")
    header += [f"- {method}", "- transformers", "- deltaw"]
    settings = {k: v for k, v in config.to_dict().items() if k in SHOWN and v not in (None, {}, [], False)}
    parts = [
        "---\n" + "\n".join(header) + "\n---\n",
        f"# {config.peft_type!s} adapter\n",
        f"A low-rank adapter for `{base or 'its base model'}`, in PEFT's format.\n",
        _table("setting", "value", {key: _cell(value) for key, value in settings.items()}),
        f"```python\n{_loading(base, auto)}model = PeftModel.from_pretrained(base, 'this folder')\n```",
        *([] if run is None else [_story(run).rstrip("\n")]),
        f"\n{MARK}\n",
    ]
    write_text(path, "\n".join(parts))
    return True


def _loading(base: str, auto: str) -> str:
    """Python that loads the base; a built-in one is made by deltaw alone."""
    if base in BUILT_IN:
        return f"from deltaw import PeftModel, load_model\n\nbase = load_model({base!r})\n"
    return (
        f"from transformers import {auto}\n"
        "from deltaw import PeftModel  # or: from peft import PeftModel\n\n"
        f"base = {auto}.from_pretrained({base or 'base'!r})\n"
    )


def _story(run: RunFacts) -> str:
    parts = ["\n## Training\n"]
    if run.picture:
        parts.append(f"![Training loss by step]({run.picture})\n")
    parts.append(_table("figure", "value", run.figures))
    parts.append("## Made of\n")
    parts.append(_table("what", "which", run.origin))
    if run.command:
        parts.append(f"```sh\n{run.command}\n```\n")
    if run.proof:
        parts.append("## Proof\n\nAfter training the adapter was read back from disk and compared by its logits:\n")
        parts.append("\n".join(f"- {line}" for line in run.proof) + "\n")
    return "\n".join(parts)


def _table(left: str, right: str, rows: Mapping[str, str]) -> str:
    cells = [(key, str(value).replace("|", "\\|").replace("\n", " ")) for key, value in rows.items()]
    return f"| {left} | {right} |\n| --- | --- |\n" + "".join(f"| {key} | {value} |\n" for key, value in cells)


SHOWN = (
    "task_type", "r", "lora_alpha", "alpha", "lora_dropout", "use_rslora", "use_dora", "bias", "init_r", "target_r",
    "total_step", "decompose_both", "decompose_factor", "target_modules", "modules_to_save", "trainable_token_indices",
    "rank_pattern", "alpha_pattern", "layers_to_transform",
)  # fmt: skip


def _cell(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
