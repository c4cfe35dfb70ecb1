"""A `tokenizer.json` → the vocabulary that llama.cpp needs to load a GGUF file.

Perplexit feeds ids and never uses it; other tools do. Where the tokenizer has no form in GGUF, the
file gets the vocabulary's size alone, which llama.cpp accepts.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Tokenizer

_GPT2_PRE, _SMOLLM_PRE, _LLAMA3_PRE = "gpt-2", "smollm", "llama-bpe"


def add_vocabulary(
    writer: gguf.GGUFWriter, tokenizer_json: Path | None, config: Mapping[str, Any]
) -> str:
    """Write the vocabulary's fields and return GGUF's name of the kind: gpt2, llama or no_vocab.

    config: the checkpoint's, for the vocabulary's size and the ids of BOS and EOS. Rows of the
    model without a token become `[PADn]`, marked unused.
    """
    spec = json.loads(tokenizer_json.read_text(encoding="utf-8")) if tokenizer_json else {}
    kind = _kind(spec)
    writer.add_tokenizer_model(kind)
    if tokenizer_json is None or kind == "no_vocab":
        return kind
    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    tokens, types = _tokens(tokenizer, spec, int(config["vocab_size"]))
    merges = [
        merge.split(" ", 1) if isinstance(merge, str) else merge
        for merge in spec["model"].get("merges", [])
    ]
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if kind == "llama":
        rank = {left + right: -float(i + 1) for i, (left, right) in enumerate(merges)}
        lowest = -float(len(merges) + 1)
        writer.add_token_scores([rank.get(token, lowest) for token in tokens])
    else:
        writer.add_tokenizer_pre(_pre(spec))
        writer.add_token_merges([f"{left} {right}" for left, right in merges])
    _add_special(writer, tokenizer, config)
    return kind


def _kind(spec: Mapping[str, Any]) -> str:
    model = spec.get("model", {})
    if model.get("type", "BPE" if "merges" in model else None) != "BPE":
        return "no_vocab"
    if model.get("byte_fallback"):
        return "llama"
    return "gpt2" if "ByteLevel" in json.dumps(spec.get("pre_tokenizer")) else "no_vocab"


def _pre(spec: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for the way text is split before the merges, judged by its parts."""
    written = json.dumps(spec.get("pre_tokenizer"))
    if '"Digits"' in written:
        return _SMOLLM_PRE
    return _LLAMA3_PRE if r"\\p{N}{1,3}" in written else _GPT2_PRE


def _tokens(
    tokenizer: Tokenizer, spec: Mapping[str, Any], vocab_size: int
) -> tuple[list[str], list[int]]:
    added = {entry["id"]: entry for entry in spec.get("added_tokens", [])}
    unknown = spec["model"].get("unk_token")
    tokens, types = [], []
    for index in range(vocab_size):
        token = tokenizer.id_to_token(index)
        entry = added.get(index)
        if token is None:
            kind = gguf.TokenType.UNUSED
        elif token == unknown:
            kind = gguf.TokenType.UNKNOWN
        elif entry is not None:
            special = bool(entry.get("special"))
            kind = gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
        elif spec["model"].get("byte_fallback") and token.startswith("<0x") and len(token) == 6:
            kind = gguf.TokenType.BYTE
        else:
            kind = gguf.TokenType.NORMAL
        tokens.append(f"[PAD{index}]" if token is None else token)
        types.append(int(kind))
    return tokens, types


def _add_special(writer: gguf.GGUFWriter, tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
    bos, eos = config.get("bos_token_id"), config.get("eos_token_id")
    if isinstance(eos, list):
        eos = eos[0]
    first = tokenizer.encode("a").ids[:1]
    if bos is not None:
        writer.add_bos_token_id(int(bos))
    if eos is not None:
        writer.add_eos_token_id(int(eos))
    writer.add_add_bos_token(bos is not None and first == [bos])
