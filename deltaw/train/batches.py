"""Which examples make a batch, in which order, and in which shape.

A part of the trainer. The order is a function of (seed, epoch) alone; with ``packing`` or ``padding_free`` a batch is
one row without padding, whose examples do not see each other. Knows nothing of text and losses.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer

from deltaw.data import Collator, EpochSampler, FlatCollator, PackedDataset, StreamedExamples, lengths_of
from deltaw.errors import ConfigError, DataError
from deltaw.ops.attention import example_bounds
from deltaw.train.fast import fast_blocks
from deltaw.train.flat import BOUNDS, flat_inputs, require_flat
from deltaw.train.parts import bare, base_of

__all__ = ["Batches", "collator_for", "streamed", "training_rows"]

log = logging.getLogger("deltaw")


def training_rows(dataset: Any, args: Any) -> Any:
    """What an epoch goes through: the examples, or with ``packing`` rows of several.

    Args:
        dataset: tokenized examples; rows that are packed already, and None, are given back.
        args: an :class:`~deltaw.SFTConfig`.

    Raises:
        ConfigError: packing of examples that are streamed, or without a ``max_length``.
        DataError: an example longer than ``max_length``.
    """
    if dataset is None or not args.packing or is_packed(dataset):
        return dataset
    if not hasattr(dataset, "__len__"):
        raise ConfigError("packing: it needs all examples, which a stream never has; padding_free works with streams")
    if args.max_length is None:
        raise ConfigError("packing: max_length=None: say how many tokens a row shall have")
    packed = PackedDataset(dataset, args.max_length, order_seed(args))
    log.info(
        "packed %d examples into %d rows of at most %d tokens; %.1f%% of the places stay empty",
        len(dataset), len(packed), args.max_length, 100 * packed.waste,
    )  # fmt: skip
    return packed


def streamed(rows: Any, tokenizer: Any, args: Any, *, training: bool) -> Any:
    """A stream of rows as one of examples; one that gives tokens already is taken as it is.

    Args:
        rows: see :func:`deltaw.data.is_stream`.
        args: an :class:`~deltaw.SFTConfig`.
        training: read them without end; otherwise once.
    """
    size = (args.train_batch_size if training else args.eval_batch_size) * max(1, args.world_size)
    if not isinstance(rows, StreamedExamples):
        if "input_ids" in next(iter(rows), {}):
            return rows
        passes = None if training else 1
        rows = StreamedExamples(rows, tokenizer, args.render_settings(), passes=passes, allow=args.allow)
    return rows.in_batches(size)


def collator_for(dataset: Any, args: Any, pad_token_id: int) -> Collator | FlatCollator:
    """What makes batches of ``dataset``: padded, or one row without padding."""
    flat = args.packing or args.padding_free or is_packed(dataset)
    return FlatCollator() if flat else Collator(pad_token_id)


def is_packed(dataset: Any) -> bool:
    """Whether its rows hold several examples each."""
    if not hasattr(dataset, "__len__") or not len(dataset):
        return False
    return isinstance(dataset, PackedDataset) or "seq_lengths" in dataset[0]


def order_seed(args: Any) -> int:
    """The seed of all that decides which examples a step sees."""
    return int(args.seed if args.data_seed is None else args.data_seed)


class Batches(Trainer):
    """Orders the examples, and runs batches that are one row."""

    _flops: tuple[int, int] = (0, 0)  # which model, and what a token costs it

    def _require_flat(self) -> None:
        """
        Raises:
            ModelError: the run's batches are one row, and the model cannot keep the examples of a row apart.
        """
        if not isinstance(self.data_collator, FlatCollator):
            return
        base = base_of(self.model)  # type: ignore[arg-type]
        if getattr(self, "fast", False):
            with fast_blocks(base):
                require_flat(base)
        else:
            require_flat(base)

    # --- order

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        order = str(getattr(self.args.train_sampling_strategy, "value", self.args.train_sampling_strategy))
        if not hasattr(dataset, "__len__") or order not in ("random", "sequential", "group_by_length"):
            return super()._get_train_sampler(train_dataset)
        return EpochSampler(
            len(dataset),  # type: ignore[arg-type]
            order,  # type: ignore[arg-type]
            order_seed(self.args),
            lengths=lengths_of(dataset) if order == "group_by_length" else None,
            batch_size=self._train_batch_size * max(1, self.args.world_size),
        )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        # transformers and accelerate tell the epoch to samplers that they find, and do not look through every wrapper
        inner = getattr(kwargs["train_dataloader"], "batch_sampler", None)
        while hasattr(inner, "batch_sampler"):
            inner = inner.batch_sampler  # type: ignore[union-attr]
        sampler = getattr(inner, "sampler", None)
        if isinstance(sampler, EpochSampler):
            sampler.set_epoch(kwargs["epoch"])
        try:
            return super()._run_epoch(*args, **kwargs)
        except DataError as error:
            if "DataLoader worker" not in str(error):
                raise
            # torch writes the traceback of its worker into the message; what the worker said stands last
            raise DataError(str(error).rpartition(f"{DataError.__name__}: ")[2].strip()) from error

    # --- shape

    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        given = self.data_collator
        # one row has no examples that metrics of predictions, or processes that share a batch, could tell apart
        apart = self.compute_metrics is not None or self.args.world_size > 1
        if not is_training and isinstance(given, FlatCollator) and apart:
            pad: Any = getattr(self.processing_class, "pad_token_id", None)
            self.data_collator = Collator(int(pad or 0))
        try:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.data_collator = given

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if BOUNDS[0] not in inputs:
            return super().compute_loss(model, inputs, *args, **kwargs)
        whole = model if model is self.model else self.accelerator.unwrap_model(model, keep_torch_compile=False)
        base = base_of(whole)
        with example_bounds(require_flat(base)):
            return super().compute_loss(model, flat_inputs(base, inputs), *args, **kwargs)

    # --- counts

    def _track_num_input_tokens(self, inputs: Mapping[str, Any]) -> None:
        if BOUNDS[0] not in inputs or self.args.include_num_input_tokens_seen == "no":
            super()._track_num_input_tokens(inputs)
            return
        # all of them: comparing ids with the pad token would leave out each end of a turn where the two are one
        count = inputs["input_ids"].numel()
        if self.args.world_size > 1:
            count = int(self.accelerator.gather(torch.tensor([count], device=self.args.device)).sum())  # type: ignore[union-attr]
        self.state.num_input_tokens_seen += count

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As ``Trainer.floating_point_ops``, without walking through the whole model at each step."""
        if self._flops[0] != id(self.model):
            one = {"input_ids": torch.zeros(1, dtype=torch.int64)}
            base: Any = bare(self.model)  # type: ignore[arg-type]
            known = hasattr(base, "num_parameters")
            self._flops = (id(self.model), int(super().floating_point_ops(one)) if known else 0)
        tokens = inputs.get("input_ids")
        return 0 if tokens is None else tokens.numel() * self._flops[1]
