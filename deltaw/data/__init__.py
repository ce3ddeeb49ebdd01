"""Floor 1: rows -> messages -> token ids with a loss mask -> batches, and the check of all that.

Knows nothing of models, adapters or trainers: a tokenizer goes in, lists of ids and labels come out.
"""

from deltaw.data.check import CheckReport, Finding, Training, check_features, check_rendered, check_tokens, preview
from deltaw.data.collate import Collator, FlatCollator
from deltaw.data.formats import Example, count_formats, detect_format, to_example, with_labels
from deltaw.data.load import draw, load_rows
from deltaw.data.order import EpochSampler, batch_waste
from deltaw.data.packing import PackedDataset, lengths_of, pack
from deltaw.data.preference import preference_rows, to_preference
from deltaw.data.render import (
    IGNORE,
    Rendered,
    RenderSettings,
    render,
    render_all,
    render_examples,
    render_prompt,
    stop_token_ids,
)
from deltaw.data.rows import Row, as_rows, where
from deltaw.data.sources import Drawn, mix
from deltaw.data.split import Split, split_rows
from deltaw.data.stream import StreamedExamples, StreamedRows, is_stream
from deltaw.data.tokenize import tokenize_rows
from deltaw.data.tokens import TokenDataset

__all__ = [
    "IGNORE",
    "CheckReport",
    "Collator",
    "Drawn",
    "EpochSampler",
    "Example",
    "Finding",
    "FlatCollator",
    "PackedDataset",
    "RenderSettings",
    "Rendered",
    "Row",
    "Split",
    "StreamedExamples",
    "StreamedRows",
    "TokenDataset",
    "Training",
    "as_rows",
    "batch_waste",
    "check_features",
    "check_rendered",
    "check_tokens",
    "count_formats",
    "detect_format",
    "draw",
    "is_stream",
    "lengths_of",
    "load_rows",
    "mix",
    "pack",
    "preference_rows",
    "preview",
    "render",
    "render_all",
    "render_examples",
    "render_prompt",
    "split_rows",
    "stop_token_ids",
    "to_example",
    "to_preference",
    "tokenize_rows",
    "where",
    "with_labels",
]
