"""The model card that lies beside a saved adapter: the header that the hub reads, and how to load the
adapter."""

from __future__ import annotations

import json
from pathlib import Path

from deltaw.adapters import PeftConfig
from deltaw.adapters.config import BASE_CLASSES

__all__ = ["write_card"]

#: task_type -> the hub's name for it
PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}


def write_card(folder: Path, config: PeftConfig) -> None:
    """Writes ``README.md`` into ``folder``; a card that is there already is the user's and is left alone."""
    path = folder / "README.md"
    if path.exists():
        return
    base = config.base_model_name_or_path or ""
    task = str(config.task_type)
    pipeline, auto = PIPELINES.get(task), BASE_CLASSES.get(task, "AutoModel")
    method = str(config.peft_type).lower()
    # a local folder is not an id of the hub, and the hub would refuse it
    listed = base if base and not Path(base).exists() and base.count("/") <= 1 else ""
    header = [f"base_model: {json.dumps(listed)}"] if listed else []
    header.append("library_name: peft")
    if pipeline:
        header.append(f"pipeline_tag: {pipeline}")
    header.append("tags:")
    if listed:
        header.append(f"- {json.dumps(f'base_model:adapter:{listed}')}")
    header += [f"- {method}", "- transformers", "- deltaw"]
    settings = {k: v for k, v in config.to_dict().items() if k in SHOWN and v not in (None, {}, [], False)}
    rows = "\n".join(f"| {key} | {_cell(value)} |" for key, value in settings.items())
    path.write_text(
        "---\n" + "\n".join(header) + "\n---\n\n"
        f"# {config.peft_type!s} adapter\n\n"
        f"A low-rank adapter for `{base or 'its base model'}`, in PEFT's format.\n\n"
        f"| setting | value |\n| --- | --- |\n{rows}\n\n"
        "```python\n"
        f"from transformers import {auto}\n"
        "from deltaw import PeftModel  # or: from peft import PeftModel\n\n"
        f"base = {auto}.from_pretrained({base or 'base'!r})\n"
        "model = PeftModel.from_pretrained(base, 'this folder')\n"
        "```\n",
        encoding="utf-8",
    )


SHOWN = (
    "task_type", "r", "lora_alpha", "alpha", "lora_dropout", "use_rslora", "use_dora", "bias", "init_r", "target_r",
    "total_step", "decompose_both", "decompose_factor", "target_modules", "modules_to_save", "trainable_token_indices",
    "rank_pattern", "alpha_pattern", "layers_to_transform",
)  # fmt: skip


def _cell(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
