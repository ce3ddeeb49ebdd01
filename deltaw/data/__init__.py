"""Floor 1: rows -> messages -> token ids with a loss mask -> batches, and the check of all that.

Knows nothing of models, adapters or trainers: a tokenizer goes in, lists of ids and labels come out.
"""

from deltaw.data.check import CheckReport, check_rendered, preview
from deltaw.data.collate import Collator
from deltaw.data.formats import Example, detect_format, to_example
from deltaw.data.load import as_rows, load_rows
from deltaw.data.render import (
    IGNORE,
    Rendered,
    RenderSettings,
    render,
    render_all,
    render_prompt,
    stop_token_ids,
)
from deltaw.data.tokens import TokenDataset

__all__ = [
    "IGNORE",
    "CheckReport",
    "Collator",
    "Example",
    "RenderSettings",
    "Rendered",
    "TokenDataset",
    "as_rows",
    "check_rendered",
    "detect_format",
    "load_rows",
    "preview",
    "render",
    "render_all",
    "render_prompt",
    "stop_token_ids",
    "to_example",
]
