"""What `deltaw check` can find, by name, for people: how bad it is, what it means, and the cure.

A name is what ``allow`` takes. Knows nothing of how anything is found, nor of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from deltaw.errors import did_you_mean

__all__ = ["FINDINGS", "Kind", "Level", "name_faults"]

#: an error stops a run unless it is allowed; a warning is shown; a note explains what is done
Level = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Kind:
    """One kind of finding.

    Attributes:
        level: how bad it is as a rule; a single finding may be worse or milder (few of many, or asked for).
        what: what it means for the model that is trained on it.
        cure: what to do.
    """

    level: Level
    what: str
    cure: str


FINDINGS: dict[str, Kind] = {
    # --- what the loss covers
    "no-examples": Kind(
        "error",
        "there is nothing to learn from, or to evaluate on",
        "look at the names of the data and its splits, and at overlong",
    ),
    "no-supervised-token": Kind(
        "error", "the loss covers nothing: it would be 0, and teach nothing", "add the answers, or leave these rows out"
    ),
    "answer-cut-away": Kind(
        "error",
        "max_length cuts the whole answer off: the loss covers nothing",
        "raise max_length, or overlong: truncate_prompt or drop",
    ),
    "truncated-answer": Kind(
        "error",
        "max_length cuts answers: they end anywhere, without a stop token",
        "raise max_length, or overlong: truncate_prompt or drop",
    ),
    "too-long": Kind(
        "error", "overlong: error takes none of them", "raise max_length, or overlong: truncate_prompt or drop"
    ),
    "stop-token-not-supervised": Kind(
        "error",
        "the model would never learn to stop",
        "a chat template that closes every turn of the assistant; labels that cover the closing token",
    ),
    "other-stop-token": Kind(
        "warning",
        "answers end with a token at which generation does not stop",
        "a template that closes turns with the tokenizer's eos, or tokenizer.eos_token = that token",
    ),
    "empty-answer": Kind(
        "warning", "teaches the model to answer nothing", "leave these rows out, unless silence is the answer"
    ),
    "unsupervised-turns": Kind(
        "warning",
        "turns of the assistant that nothing is learned from",
        "write the rows as messages, all of whose assistant turns are learned",
    ),
    "prompt-supervised": Kind(
        "warning",
        "the loss covers the prompts too: the model learns to write the questions",
        "completion_only_loss: true",
    ),
    "chat-as-text": Kind(
        "warning",
        "conversations written out as plain text: the loss covers the questions too",
        "write the rows as messages, or as prompt and completion",
    ),
    # --- the template and the tokenizer
    "double-bos": Kind(
        "error",
        "a beginning that no pretrained model has seen",
        "remove the BOS token from the text or from the chat template",
    ),
    "missing-bos": Kind(
        "warning",
        "the tokenizer begins plain text with a BOS token, these examples have none",
        "{{ bos_token }} at the start of the chat template, if the model was trained so",
    ),
    "template-differs": Kind(
        "error",
        "chat and serve will see other tokens before the answer than were trained on",
        "a chat template that renders a conversation as its beginning plus the rest",
    ),
    "template-not-saved": Kind(
        "error",
        "the tokenizer, saved and read again, gives other tokens: chat would see those",
        "set the template on the tokenizer (chat_template_path does)",
    ),
    "stale-tokens": Kind("error", "the tokens are not those that the rows give now", "dataset_cache: false"),
    "markers-not-tokens": Kind(
        "warning",
        "the template's marks of a turn are plain text to this tokenizer",
        "a template made for this tokenizer, or add its marks as special tokens",
    ),
    "system-prompt-inserted": Kind(
        "note",
        "the chat template writes a system prompt of its own where a row has none",
        "a system message in each row, if another is wanted",
    ),
    "outside-vocabulary": Kind(
        "error",
        "token ids that the model has no embedding for",
        "the tokenizer that belongs to the model, or model.resize_token_embeddings(len(tokenizer))",
    ),
    "special-outside-vocabulary": Kind(
        "error",
        "special tokens that the model has no embedding for",
        "the tokenizer that belongs to the model, or model.resize_token_embeddings(len(tokenizer))",
    ),
    "tokenizer-not-the-models": Kind(
        "warning", "tokenizer and model disagree about their special tokens", "the tokenizer that belongs to the model"
    ),
    "pad-is-eos": Kind(
        "note",
        "padding is the token that ends an answer: padding is told by length here, so the end is learned all the same",
        "",
    ),
    "control-tokens": Kind(
        "warning",
        "they are learned as plain text, as a row must give no commands",
        "write conversations as messages; clean out what another template left behind",
    ),
    # --- the texts
    "dropped-rows": Kind(
        "warning", "rows longer than max_length are left out, as overlong says", "raise max_length to keep them"
    ),
    "truncated-prompt": Kind(
        "warning",
        "prompts are cut from the left, as overlong says: what they begin with is lost",
        "raise max_length to keep them whole",
    ),
    "cut-upstream": Kind(
        "warning",
        "many examples have exactly the greatest length: something cut them before they came here",
        "look for a limit where the data was made",
    ),
    "duplicates": Kind(
        "warning",
        "examples that repeat an earlier one are learned more often than the others",
        "remove them, unless the repetition is meant",
    ),
    "conflicting-answers": Kind(
        "warning",
        "one prompt with several answers: not all of them can be learned",
        "keep one answer to a prompt, unless several are right",
    ),
    "constant-answers": Kind(
        "warning",
        "nearly all answers are the same: always giving that one already has a low loss",
        "look at how the answers were made, or balance them",
    ),
    "answer-repeats-prompt": Kind(
        "warning",
        "answers begin with their whole prompt: the model learns to repeat the question",
        "the answer alone in the column of the answers",
    ),
    "empty-prompt": Kind("warning", "nothing is asked", "look at the column of the prompts"),
    "mojibake": Kind(
        "warning",
        "the model learns to write them",
        "read the source again in its own encoding (UTF-8 as UTF-8)",
    ),
    "unread-columns": Kind("note", "nothing reads them", "rename them, if they belong to the examples"),
    # --- training and evaluation
    "train-eval-overlap": Kind(
        "error",
        "evaluation examples that are trained on: their loss says nothing",
        "split by val_group_column, or remove duplicates before the split",
    ),
    "train-eval-same-prompt": Kind(
        "warning",
        "evaluation prompts that are trained on with another answer",
        "split by val_group_column, so that one prompt stays on one side",
    ),
    "few-eval-examples": Kind("note", "the loss of so few is noisy", "hold out more rows: val_size"),
    "few-rows": Kind(
        "warning", "fewer examples than one optimizer step takes", "a smaller batch or less accumulation, or more rows"
    ),
    "few-steps": Kind(
        "warning",
        "so few optimizer steps hardly move the adapter",
        "a smaller batch, less accumulation, or more epochs",
    ),
    "many-epochs": Kind(
        "warning",
        "few examples seen many times are learned by heart",
        "num_train_epochs: 3 or less, and watch the loss of held-out rows (val_size: 0.1)",
    ),
    "padding-waste": Kind(
        "note",
        "that much is computed for nothing",
        "packing: true, padding_free: true, or train_sampling_strategy: group_by_length",
    ),
}


def name_faults(names: Iterable[str]) -> list[str]:
    """What is wrong with names given to ``allow``: one text for each that is no finding."""
    return [
        f"{name!r} is no finding of the check{did_you_mean(name, FINDINGS)}" for name in names if name not in FINDINGS
    ]
