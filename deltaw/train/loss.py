"""The fast loss of a causal language model: one call that any training loop can make.

The decoder runs as transformers wrote it; only the supervised rows of its output reach the head, in chunks. The model's
own ``forward`` is not changed. What a model does between decoder and logits (soft-capping, scaling) is read from its
config and then proven against its own forward, once; a model that does something else is refused by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaw.adapters.routing import forwarding
from deltaw.errors import ModelError
from deltaw.model import PeftModel
from deltaw.modules import is_checkpointing
from deltaw.ops import IGNORE, supervised_cross_entropy, supervised_cross_entropy_through
from deltaw.ops.attention import example_bounds
from deltaw.train.fast import fast_blocks, runs_fast
from deltaw.train.flat import BOUNDS, flat_inputs
from deltaw.train.parts import base_of, decoder_of
from deltaw.weights import has_store, store_of

__all__ = ["causal_lm_loss", "decoder_states", "require_fast_loss"]


@dataclasses.dataclass(frozen=True)
class _Head:
    """How a model turns hidden states into logits: softcap tanh(scale (W h + b) / softcap)."""

    scale: float
    softcap: float | None


_proven: weakref.WeakKeyDictionary[nn.Module, _Head] = weakref.WeakKeyDictionary()


def causal_lm_loss(
    model: nn.Module,
    *,
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    adapter_names: Sequence[str] | None = None,
    **kwargs: Any,
) -> Tensor:
    """Cross entropy of the next token, over the positions whose label is not -100; in training, with what the active
    adapters add to the loss (AdaLoRA's penalty).

    Args:
        model: a causal language model of transformers, or a :class:`~deltaw.PeftModel` of one.
        input_ids: (b, t).
        labels: (b, t), not shifted, -100 where there is no loss.
        attention_mask: (b, t), 1 for tokens, 0 for padding; right padding is cheapest, since then no mask is needed.
        num_items_in_batch: supervised tokens in the whole accumulated batch, which the sum is divided by, so that
            accumulating gradients equals the large batch. None: those of this call.
        adapter_names: one name a row, in place of the active adapters, as in ``PeftModel.forward``.
        kwargs: further arguments of the decoder (``position_ids``, ...). A batch of :class:`~deltaw.data.FlatCollator`
            is one row of several examples: that they do not see each other is proven once a model.

    Returns:
        Scalar in float32, with a graph when any parameter trains.

    Raises:
        ModelError: the model computes its logits in a way that is not known here (use its own ``forward``), or cannot
            keep the examples of one row apart.
        AdapterError: ``adapter_names`` that do not fit, or an adapter on the head, which sees supervised rows only.
    """
    base = base_of(model)
    head = require_fast_loss(model)
    with contextlib.ExitStack() as stack:
        if adapter_names is not None:
            known = model.peft_config if isinstance(model, PeftModel) else {}
            stack.enter_context(forwarding(base, adapter_names, known, (), {"input_ids": input_ids}))
        # under checkpointing forward runs again in backward, outside of this call: it must run the same way there
        if not (runs_fast(base) or torch.compiler.is_compiling() or (base.training and is_checkpointing(base))):
            stack.enter_context(fast_blocks(base))
        loss = _loss(base, head, input_ids, labels, attention_mask, num_items_in_batch, kwargs)
    if not (isinstance(model, PeftModel) and model.training and model.base_model.steers):
        return loss
    # the items of all parts of a batch add up to num_items_in_batch, and so their shares of the penalty to the whole
    share = 1.0 if num_items_in_batch is None else (labels[:, 1:] != IGNORE).sum() / num_items_in_batch
    return model.base_model.with_penalty(loss, share)


def _loss(
    base: PreTrainedModel,
    head: _Head,
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None,
    divisor: Tensor | int | None,
    kwargs: dict[str, Any],
) -> Tensor:
    hidden = _hidden(base, input_ids, attention_mask, kwargs)
    targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)  # the last position predicts nothing
    output: Any = base.get_output_embeddings()
    if isinstance(divisor, Tensor):
        divisor = divisor.to(hidden.device)
    options: dict[str, Any] = {"divisor": divisor, "logit_scale": head.scale, "softcap": head.softcap}
    plain = type(output) is nn.Linear or (isinstance(output, nn.Linear) and has_store(output))
    if plain and not any(p.requires_grad for p in output.parameters()):
        return supervised_cross_entropy(hidden, targets.to(hidden.device), store_of(output), output.bias, **options)
    embeddings: Any = base.get_input_embeddings()
    vocabulary = getattr(embeddings, "base_layer", embeddings).weight.shape[0]
    return supervised_cross_entropy_through(hidden, targets.to(hidden.device), output, vocabulary, **options)


def decoder_states(
    model: nn.Module, *, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """What the head of a causal language model reads, and what it makes of it, for whoever needs few of the logits.

    Args:
        model, input_ids, attention_mask, kwargs: as in :func:`causal_lm_loss`.

    Returns:
        Hidden states (b, t, d), and a function from (..., d) to logits (..., vocabulary) in float32.

    Raises:
        ModelError: as :func:`causal_lm_loss`.
    """
    base, how = base_of(model), require_fast_loss(model)
    with fast_blocks(base):
        hidden = _hidden(base, input_ids, attention_mask, kwargs)
    output: Any = base.get_output_embeddings()

    def head(states: Tensor) -> Tensor:
        logits = output(states).float() * how.scale
        return logits if how.softcap is None else torch.tanh(logits / how.softcap) * how.softcap

    return hidden, head


def _hidden(base: PreTrainedModel, input_ids: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
    """(b, t, d): what the head reads."""
    if BOUNDS[0] in kwargs:
        kwargs = flat_inputs(base, kwargs)
    with example_bounds(BOUNDS[0] in kwargs):
        decoder, mask = decoder_of(base), _needed_mask(mask)
        return decoder(input_ids=input_ids, attention_mask=mask, **{"use_cache": False, **kwargs}).last_hidden_state


def _needed_mask(mask: Tensor | None) -> Tensor | None:
    """None when padding is only on the right: no real token attends to it, and its rows carry no loss."""
    if mask is None or mask.dim() != 2:
        return mask
    return None if bool((mask[:, 1:] <= mask[:, :-1]).all()) and bool(mask[:, 0].all()) else mask


def require_fast_loss(model: nn.Module) -> _Head:
    """How ``model`` makes logits of hidden states, proven once against its own forward.

    Raises:
        ModelError: the model is no causal language model, or does something between decoder and logits that is not
            known here.
    """
    base = base_of(model)
    if base in _proven:
        return _proven[base]
    kind = type(base).__name__
    output = base.get_output_embeddings()
    if output is None or decoder_of(base) is base:
        raise ModelError(f"{kind} has no decoder with an output head on top; use the model's own forward for its loss")
    if getattr(base.config, "output_router_logits", False):
        raise ModelError(f"{kind} adds a load-balancing loss (output_router_logits); use the model's own forward")
    config: Any = base.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    head = _Head(scale, getattr(config, "final_logit_softcapping", None))
    _prove(base, output, head)
    _proven[base] = head
    return head


@torch.no_grad()
def _prove(base: PreTrainedModel, output: Any, head: _Head) -> None:
    """Feeds the model's own forward with chosen hidden states and compares its logits with ours."""
    kind = type(base).__name__
    embeddings: Any = base.get_input_embeddings()
    weight: Tensor = embeddings.weight
    ids = torch.arange(4, device=weight.device).unsqueeze(0) % weight.shape[0]
    chosen: dict[str, Tensor] = {}

    def replace(_module: nn.Module, _args: Any, out: Any) -> Any:
        # large enough for a soft cap to show
        noise = torch.randn(out.last_hidden_state.shape, generator=torch.Generator().manual_seed(0))
        out.last_hidden_state = chosen["hidden"] = (30 * noise).to(out.last_hidden_state)
        return out

    training = base.training
    base.eval()
    hook = decoder_of(base).register_forward_hook(replace)
    try:
        theirs = base(input_ids=ids, use_cache=False).logits.float()
        ours = output(chosen["hidden"]).float() * head.scale
        ours = ours if head.softcap is None else torch.tanh(ours / head.softcap) * head.softcap
    except Exception as error:
        raise ModelError(
            f"{kind}: cannot tell how it makes its logits ({error}); use the model's own forward"
        ) from error
    finally:
        hook.remove()
        base.train(training)
    tolerance = 16 * torch.finfo(weight.dtype).eps * max(1.0, theirs.abs().max().item())
    if ours.shape != theirs.shape or (ours - theirs).abs().max().item() > tolerance:
        raise ModelError(
            f"{kind} changes its logits in a way that the fast loss does not know (scale {head.scale}, soft cap "
            f"{head.softcap} were tried); use the model's own forward, or fast_loss=False in the trainer"
        )
