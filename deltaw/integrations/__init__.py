"""What TRL, transformers and peft need to accept our objects; the only place that knows them.

Importing it loads none of them, nor torch: it only says what is to be done once they are there.
"""

from __future__ import annotations

from deltaw import guises

__all__: list[str] = []


def _beside_peft(own: type) -> type:
    from deltaw.integrations.peft import guise

    return guise(own)


def _beside_trainer(own: type) -> type:
    from deltaw.integrations.trainer import introduce

    introduce()
    return own


guises.register("peft", _beside_peft)
guises.register("transformers.trainer", _beside_trainer)
