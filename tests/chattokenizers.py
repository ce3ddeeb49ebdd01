"""Tokenizers small enough for any test, of the kinds that differ in how they treat spaces and special tokens."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def byte_level(
    special: Sequence[str] = ("<s>", "</s>"),
    *,
    eos: str = "</s>",
    bos: str | None = None,
    adds_bos: bool = False,
    swallows: bool = False,
    template: str | None = None,
) -> PreTrainedTokenizerFast:
    """GPT-2's kind: bytes and a few merges, never an unknown character.

    Args:
        special: the control tokens, with ids from 0.
        swallows: they take the white space on their right with them, as Phi-3's do.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("t", "h"), ("th", "e"), ("Ġ", "a"), ("i", "n"), ("<", "/"), ("|", ">")]
    tokens = [*special, *alphabet, *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False, rstrip=swallows) for token in special]
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if adds_bos:
        assert bos is not None
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, special.index(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=eos, chat_template=template
    )


def llama_like(template: str | None = None, *, spaces: str = "first") -> PreTrainedTokenizerFast:
    """SentencePiece BPE's kind: a space before the text, unknown characters as bytes, BOS in front.

    Args:
        spaces: where a space is put: before the "first" piece only, "always" behind control tokens too (as the older
            files do it), or "never".
    """
    special = ["<unk>", "<s>", "</s>", "[INST]"]
    merges = [("▁", "a"), ("t", "h"), ("th", "e"), ("<", "/"), ("<", "s")]
    tokens = [
        *special,
        *(f"<0x{i:02X}>" for i in range(256)),
        "▁",
        *LETTERS,
        *LETTERS.upper(),
        *"0123456789<>/[]|.,!?_",
        *("".join(pair) for pair in merges),
    ]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if spaces == "always":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=spaces, split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        chat_template=template,
    )


def unigram(template: str | None = None) -> PreTrainedTokenizerFast:
    """T5's kind: the control tokens are pieces of the model too, and compatible characters are folded into ASCII."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -3.0), ("the", -4.0)]
    pieces += [(char, -5.0) for char in LETTERS + LETTERS.upper() + "0123456789<>/[]|.,!?_\n"]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", pad_token="</s>", chat_template=template
    )
