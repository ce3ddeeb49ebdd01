"""``PeftModel`` under the name of its task, as PEFT's scripts write it.

By task differs only which head trains along, and that ``adapters.targets`` knows. Knows nothing of layers or files.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

from torch import nn

from deltaw.adapters import PeftConfig, TaskType
from deltaw.errors import AdapterError
from deltaw.model import PeftModel

__all__ = [
    "TASK_CLASSES",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
]


class _PeftModelForTask(PeftModel):
    """A :class:`PeftModel` whose adapters are for one task.

    ``get_peft_model`` and ``PeftModel.from_pretrained`` choose the class by the config's ``task_type``; a class called
    by its own name fills the task in where the config has none.

    Raises:
        AdapterError: the config is for another task.
    """

    task: ClassVar[TaskType]

    def __init__(
        self, model: nn.Module, peft_config: PeftConfig, *args: Any, strict: bool = True, **kwargs: Any
    ) -> None:
        given = getattr(peft_config, "task_type", None)
        if given is None and strict:  # of a file, the task decides which tensors it must hold: it stays as it is
            peft_config = copy.copy(peft_config)
            peft_config.task_type = self.task
        elif given is not None and given != self.task:
            other = TASK_CLASSES[getattr(given, "value", given)].__name__
            raise AdapterError(
                f"{type(self).__name__} is for task_type {self.task!s}, and the config says {given!s}; "
                f"use {other}, or get_peft_model, which chooses the class"
            )
        super().__init__(model, peft_config, *args, strict=strict, **kwargs)


class PeftModelForCausalLM(_PeftModelForTask):
    """Adapters on a model that predicts the next token."""

    task = TaskType.CAUSAL_LM


class PeftModelForSeq2SeqLM(_PeftModelForTask):
    """Adapters on an encoder and decoder that map a text to a text."""

    task = TaskType.SEQ_2_SEQ_LM


class PeftModelForSequenceClassification(_PeftModelForTask):
    """Adapters on a model that classifies whole texts (or images); its head trains along and is saved."""

    task = TaskType.SEQ_CLS


class PeftModelForTokenClassification(_PeftModelForTask):
    """Adapters on a model that classifies each token; its head trains along and is saved."""

    task = TaskType.TOKEN_CLS


class PeftModelForQuestionAnswering(_PeftModelForTask):
    """Adapters on a model that finds an answer's start and end; its head trains along and is saved."""

    task = TaskType.QUESTION_ANS


class PeftModelForFeatureExtraction(_PeftModelForTask):
    """Adapters on a model whose hidden states are the result, such as an embedder."""

    task = TaskType.FEATURE_EXTRACTION


#: ``task_type`` -> class
TASK_CLASSES: dict[str, type[PeftModel]] = {
    str(kind.task): kind
    for kind in (
        PeftModelForCausalLM,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
        PeftModelForQuestionAnswering,
        PeftModelForFeatureExtraction,
    )
}
