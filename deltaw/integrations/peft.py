"""Our model and layers pass for PEFT's where PEFT, TRL or transformers ask ``isinstance``; they stay our own.

An object's ``__class__`` is all that ``isinstance`` looks at beyond its type, and methods are looked up on the type: so
our model counts as a ``peft.PeftModel`` and runs none of its code. Knows PEFT's names, not what its classes do.
"""

from __future__ import annotations

import functools
import sys

from deltaw.adapters import HostLayer

__all__ = ["guise"]


def guise(own: type) -> type:
    """``own`` and PEFT's class of the same name in one; ``own`` itself while PEFT is still being imported."""
    return _both(own) if hasattr(sys.modules["peft"], "PeftModel") else own


@functools.cache
def _both(own: type) -> type:
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer

    BaseTunerLayer.register(HostLayer)
    theirs = next((getattr(peft, c.__name__) for c in own.__mro__ if hasattr(peft, c.__name__)), peft.PeftModel)
    return type(own.__name__, (own, theirs), {"__module__": own.__module__, "__doc__": own.__doc__})
