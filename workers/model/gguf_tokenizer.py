"""The tokenizer inside a GGUF file as a `tokenizers` pipeline.

Byte-level BPE is put together here from the file's own tokens and merges, because the pre-tokenizer hangs on
`tokenizer.ggml.pre`, which transformers' conversion ignores (SmolLM2 loses its Digits rule there: runs of spaces before digits
then tokenise differently).
"""

from __future__ import annotations

from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from winnow.errors import CorruptBlock, Unsupported
from winnow.workers.model.sources import FETCH_AGAIN
from winnow.workers.model.tokenizer import Tokenizer

_CONTROL, _USER = 3, 4  # tokenizer.ggml.token_type
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


_PRE = {
    "smollm": _digits,
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama-bpe": lambda: _split(_LLAMA3),
    "qwen2": lambda: _split(_QWEN2),
}


def convert(metadata: dict[str, Any]) -> Tokenizer:
    """Build the tokenizer that `tokenizer.*` metadata describes.

    Raises:
        Unsupported: a vocabulary model or pre-tokenizer that is not converted exactly.
        CorruptBlock: metadata missing.
    """
    kind = str(metadata.get("tokenizer.ggml.model", ""))
    pre = str(metadata.get("tokenizer.ggml.pre", "gpt-2"))
    way_out = "use the model's Hugging Face folder, which has tokenizer.json"
    if kind != "gpt2":
        raise Unsupported(f"model: GGUF tokenizer {kind!r} is not supported (supported: gpt2, byte-level BPE); {way_out}")
    if pre not in _PRE:
        raise Unsupported(f"model: GGUF pre-tokenizer {pre!r} is not supported (supported: {', '.join(_PRE)}); {way_out}")
    try:
        tokens: list[str] = metadata["tokenizer.ggml.tokens"]
        merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    except KeyError as error:
        raise CorruptBlock(f"model: {error.args[0]} is missing from the GGUF file; {FETCH_AGAIN}") from None
    kinds: list[int] = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    pipeline = tokenizers.Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    if pre == "qwen2":
        pipeline.normalizer = normalizers.NFC()
    pipeline.pre_tokenizer = _PRE[pre]()  # type: ignore[no-untyped-call]
    pipeline.decoder = decoders.ByteLevel()
    typed = list(zip(tokens, kinds, strict=True))
    pipeline.add_tokens([AddedToken(token, normalized=False) for token, k in typed if k == _USER])
    pipeline.add_special_tokens([AddedToken(token, normalized=False, special=True) for token, k in typed if k == _CONTROL])
    return Tokenizer(wrap(pipeline, metadata, tokens))


def wrap(pipeline: tokenizers.Tokenizer, metadata: dict[str, Any], tokens: list[str]) -> Any:
    """transformers' wrapper with the file's special tokens and chat template."""
    from transformers import PreTrainedTokenizerFast

    names = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
    special = {
        f"{name}_token": tokens[metadata[f"tokenizer.ggml.{key}"]]
        for name, key in names.items()
        if 0 <= metadata.get(f"tokenizer.ggml.{key}", -1) < len(tokens)
    }
    if metadata.get("tokenizer.ggml.add_bos_token") and "bos_token" in special:
        bos = special["bos_token"]
        pipeline.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, metadata["tokenizer.ggml.bos_token_id"])]
        )
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=pipeline, clean_up_tokenization_spaces=False, **special
    )
    template = metadata.get("tokenizer.chat_template")
    if template:
        fast.chat_template = template
    return fast
