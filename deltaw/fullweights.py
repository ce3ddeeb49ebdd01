"""Weights in full precision of a model that holds them in fewer bits, read one at a time from where it came from.

Some adapters start from what quantization lost (LoftQ) or from the weight's own singular vectors (PiSSA): neither can
be seen in a weight of 4 bits. Knows nothing of adapters or of how weights are packed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from deltaw.errors import ModelError, did_you_mean
from deltaw.weights import has_store, store_of, wide

__all__ = ["FullWeights", "full_weight", "full_weights", "full_weights_of", "weights_at_hand"]

#: a folder or hub id with safetensors, one such file, tensors by name (a state dict), or the dense model itself
Source = str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_CURE = "give them: with deltaw.full_weights(folder, hub id, state dict or the dense model): ..."

_at_hand: ContextVar[FullWeights | None] = ContextVar("full_weights", default=None)


class FullWeights:
    """Looks up one weight after the other; nothing is opened before the first is asked for.

    Args:
        source: where they are; None: nobody knows.
        revision: of a hub id.
    """

    def __init__(self, source: Source | None, revision: str | None = None) -> None:
        self._source = source
        self._revision = revision
        self._files: dict[str, str] | None = None  # name in the files -> file
        self._why = ""  # the last file that was not found was not, in words

    def weight(self, layer: str, shape: Sequence[int]) -> Tensor:
        """The weight of a linear layer, (out, in), in float32 or wider.

        Args:
            layer: dotted name in the model. In a file it may have a prefix more or less, where only one name fits.
            shape: that it must have.

        Raises:
            ModelError: it is not to be found, has another shape, or is itself quantized.
        """
        weight = self._module_s(layer) if isinstance(self._source, nn.Module) else self._named(f"{layer}.weight")
        if not weight.is_floating_point():
            raise ModelError(f"{self._origin} holds {layer!r} in {weight.dtype}, not in full precision; {_CURE}")
        if tuple(weight.shape) != tuple(shape):
            raise ModelError(
                f"{self._origin} holds {layer!r} as {tuple(weight.shape)}, the model as {tuple(shape)}: "
                f"it is another model; {_CURE}"
            )
        return wide(weight.detach())

    @property
    def _origin(self) -> str:
        return (
            str(self._source) if isinstance(self._source, (str, os.PathLike)) else f"the {type(self._source).__name__}"
        )

    def _module_s(self, layer: str) -> Tensor:
        assert isinstance(self._source, nn.Module)
        try:
            module = self._source.get_submodule(layer)
        except AttributeError:
            module = None
        if module is None or not has_store(module):
            raise ModelError(f"the {type(self._source).__name__} given for full weights has no layer {layer!r}")
        store = store_of(module)
        if store.quantized:
            raise ModelError(
                f"the {type(self._source).__name__} given for full weights holds {layer!r} quantized; {_CURE}"
            )
        return store.dequantize()

    def _named(self, wanted: str) -> Tensor:
        names = self._names()
        fitting = [wanted] if wanted in names else [n for n in names if _same_but_for_a_prefix(n, wanted)]
        if len(fitting) != 1:
            found = f"several that may be it: {fitting[:5]}" if fitting else f"none{did_you_mean(wanted, names)}"
            raise ModelError(f"looking for {wanted!r} in {self._origin}: there is {found}; {_CURE}")
        if isinstance(self._source, Mapping):
            return self._source[fitting[0]]
        with safe_open(self._open()[fitting[0]], framework="pt") as file:
            return file.get_tensor(fitting[0])

    def _names(self) -> Sequence[str]:
        return list(self._source) if isinstance(self._source, Mapping) else list(self._open())

    def _open(self) -> dict[str, str]:
        """Name -> file that holds it.

        Raises:
            ModelError: there are no safetensors.
        """
        if self._files is not None:
            return self._files
        if not self._source:
            raise ModelError(f"the model does not say which folder its full-precision weights are in; {_CURE}")
        if Path(str(self._source)).is_file():
            return self._in_one(str(self._source))
        index = self._file(_INDEX)
        if index is not None:
            shards: dict[str, str] = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
            paths = {shard: self._file(shard) for shard in set(shards.values())}
            lost = sorted(shard for shard, path in paths.items() if path is None)
            if lost:
                raise ModelError(f"{self._origin} lacks {', '.join(lost)}, which its {_INDEX} names; load it again")
            self._files = {name: str(paths[shard]) for name, shard in shards.items()}
            return self._files
        single = self._file(_SINGLE)
        if single is None:
            raise ModelError(f"{self._origin} has neither {_SINGLE} nor {_INDEX} ({self._why}); {_CURE}")
        return self._in_one(single)

    def _in_one(self, path: str) -> dict[str, str]:
        try:
            with safe_open(path, framework="pt") as file:
                self._files = dict.fromkeys(file.keys(), path)
        except Exception as error:  # the reader's own, of no public class
            raise ModelError(f"{path} is no safetensors file ({error}); {_CURE}") from error
        return self._files

    def _file(self, name: str) -> str | None:
        """Local path of a file of the source, which is fetched where it lies on the hub; None: it has none."""
        from transformers.utils import cached_file

        try:
            return cached_file(str(self._source), name, revision=self._revision)
        except OSError as error:  # transformers' for every reason: no such file, no such repository, no connection
            self._why = str(error)
            return None


def _same_but_for_a_prefix(name: str, wanted: str) -> bool:
    return name.endswith(f".{wanted}") or wanted.endswith(f".{name}")


def full_weights_of(model: nn.Module) -> FullWeights:
    """Those of the folder or hub id that transformers loaded ``model`` from."""
    config = getattr(model, "config", None)
    return FullWeights(getattr(model, "name_or_path", "") or getattr(config, "_name_or_path", ""))


@contextmanager
def full_weights(source: Source, revision: str | None = None) -> Iterator[None]:
    """Inside the block, adapters that start from full-precision weights read them from ``source`` instead of the folder
    that the quantized model came from.

    Args:
        source: a folder or hub id with safetensors, a state dict, or the model in full precision.
        revision: of a hub id.
    """
    token = _at_hand.set(FullWeights(source, revision))
    try:
        yield
    finally:
        _at_hand.reset(token)


@contextmanager
def weights_at_hand(model: nn.Module) -> Iterator[FullWeights]:
    """What :func:`full_weights` gives now, or else :func:`full_weights_of` ``model``: for the block, whoever asks."""
    found = _at_hand.get() or full_weights_of(model)
    token = _at_hand.set(found)
    try:
        yield found
    finally:
        _at_hand.reset(token)


def full_weight(layer: str, shape: Sequence[int]) -> Tensor:
    """The weight of ``layer`` from what is at hand (see :meth:`FullWeights.weight`)."""
    return (_at_hand.get() or FullWeights(None)).weight(layer, torch.Size(shape))
