"""``transformers.Trainer`` where PEFT is not installed.

It asks ``isinstance(model, peft.PeftModel)`` to find the model under the adapters (columns, labels, loss) and to save
and resume adapters alone. Without PEFT it has no such class to ask for, and silently takes the whole for its base: no
evaluation loss, no adapter files. Here it gets our class in that place. For other models nothing changes.
"""

from __future__ import annotations

import functools
import sys

from transformers.utils import is_peft_available

from deltaw.model import PeftModel

__all__ = ["introduce"]


@functools.cache
def introduce() -> None:
    """Gives transformers' Trainer our ``PeftModel`` to ask for, once, unless PEFT is there with its own."""
    if is_peft_available():
        return
    for name in ("transformers.trainer", "transformers.trainer_utils"):
        module = sys.modules[name]
        for asked in ("PeftModel", "PeftMixedModel"):
            setattr(module, asked, PeftModel)
        module.is_peft_available = lambda: True  # type: ignore[attr-defined]
