"""Every difference between two runs, by name: text, tokenizer, windows, scored tokens, engine."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perplexit.diagnosis.text_differences import (
    documents_of_run,
    first_difference,
    text_aspects,
)
from perplexit.inputs.token_file import TokenFile
from perplexit.runs.run import Run
from perplexit.runs.run_text import RunText
from perplexit.runs.run_tokens import RunTokens

_AGGREGATES = {
    "tokens": "exp of the mean over tokens",
    "window-means": "exp of the mean of window means",
    "hf-guide": "exp of the mean of window means, weighted one target short",
    "window-perplexities": "the mean of the windows' perplexities",
}
_POLICIES = {
    "none": "no BOS",
    "first": "the BOS before each document",
    "every": "the BOS before every window",
}


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing in which two runs differ; `sentence` says it for people.

    aspect: newlines, trailing whitespace, … or text; tokenizer; bos, max_length, stride, protocol,
            tail, denominator, input; weights, dtype, quantization, engine, engine version,
            settings, device, threads, batch size, perplexit version.
    """

    aspect: str
    first: Any
    second: Any
    sentence: str


Inputs = tuple[TokenFile | None, TokenFile | None]


def differences(first: Run, second: Run, inputs: Inputs) -> list[Difference]:
    """Return everything in which two runs differ, inputs before sessions."""
    found = [*_of_text(first, second, inputs), *_of_tokenizer(first, second)]
    same_ids = not found
    found += _of_protocol(first, second)
    found += _of_scored_tokens(first, second, same_ids)
    if not found and first.input_fingerprint != second.input_fingerprint:
        ours, theirs = first.input_fingerprint, second.input_fingerprint
        sentence = "the inputs differ in what they record of the corpus (domains, what was skipped)"
        found.append(Difference("input", ours, theirs, sentence))
    found += _of_model(first, second)
    return found


def plain(sentence: str, aspect: str, first: Any, second: Any) -> Difference:
    """Return a Difference whose sentence ends in both values."""
    return Difference(aspect, first, second, f"{sentence}: {_shown(first)} and {_shown(second)}")


def _shown(value: Any) -> str:
    """Return a value as people write it: four digits of a fraction, `not set` for None."""
    if value is None:
        return "not set"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _of_text(first: Run, second: Run, inputs: Inputs) -> Iterator[Difference]:
    ours, theirs = first.text_fingerprint, second.text_fingerprint
    if ours == theirs:
        return
    texts = [_documents(run, tokens) for run, tokens in zip((first, second), inputs, strict=True)]
    known = [text for text in texts if text is not None]
    if len(known) < 2:
        yield Difference("text", ours, theirs, "the texts differ, and an input holds ids alone")
        return
    place = first_difference(*known)
    aspects = text_aspects(*known) or ("text",)
    for aspect in aspects:
        what = "the texts differ" if aspect == "text" else f"the texts differ in {aspect}"
        yield Difference(
            aspect,
            ours,
            theirs,
            f"{what}; {place}" if place else f"{what}, where nothing is scored",
        )


def _documents(run: Run, tokens: TokenFile | None) -> list[bytes] | None:
    if tokens is not None:
        return tokens.documents_utf8() if tokens.has_text else None
    text = RunText.of(run)
    return documents_of_run(text) if text.has_text else None


def _of_tokenizer(first: Run, second: Run) -> Iterator[Difference]:
    ours, theirs = first.tokenizer_fingerprint, second.tokenizer_fingerprint
    if ours != theirs:
        sizes = [
            (run.input_spec.get("tokenizer") or {}).get("vocab_size") for run in (first, second)
        ]
        yield Difference(
            "tokenizer",
            ours,
            theirs,
            f"the tokenizers differ ({ours[:12]}… with {sizes[0]} ids, {theirs[:12]}… with "
            f"{sizes[1]}): perplexities a token count different tokens, compare bits per byte",
        )


def _of_protocol(first: Run, second: Run) -> Iterator[Difference]:
    ours, theirs = first.input_spec["protocol"], second.input_spec["protocol"]
    names = [f"{p['name']} (version {p['version']})" for p in (ours, theirs)]
    if names[0] != names[1]:
        yield plain("the protocols differ", "protocol", *names)
    if (ours["bos"], ours["prefix_id"]) != (theirs["bos"], theirs["prefix_id"]):
        shown = [
            _POLICIES[p["bos"]] + (f" (id {p['prefix_id']})" if p["bos"] != "none" else "")
            for p in (ours, theirs)
        ]
        yield plain("what stands before the text", "bos", *shown)
    if ours["max_length"] != theirs["max_length"]:
        yield plain(
            "ids fed in one window, at most", "max_length", ours["max_length"], theirs["max_length"]
        )
    if ours["stride"] != theirs["stride"]:
        yield plain("ids from window to window", "stride", ours["stride"], theirs["stride"])


def _of_scored_tokens(first: Run, second: Run, same_ids: bool) -> Iterator[Difference]:
    ours, theirs = (run.input_spec["protocol"]["aggregate"] for run in (first, second))
    if ours != theirs:
        yield plain(
            "the tools' own perplexities average differently",
            "denominator",
            _AGGREGATES[ours],
            _AGGREGATES[theirs],
        )
    if first.num_non_finite != second.num_non_finite:
        yield plain(
            "tokens left out because their loss was not finite",
            "denominator",
            first.num_non_finite,
            second.num_non_finite,
        )
    if same_ids and first.input_fingerprint != second.input_fingerprint:
        yield from _of_scored_sets(first, second)


def _of_scored_sets(first: Run, second: Run) -> Iterator[Difference]:
    """Return which tokens of one text are scored, and how often."""
    keys, repeats = zip(*(_scored(run.tokens) for run in (first, second)), strict=True)
    if repeats[0] != repeats[1]:
        yield plain("tokens that are counted twice, by overlap", "denominator", *repeats)
    alone = [np.setdiff1d(keys[0], keys[1]), np.setdiff1d(keys[1], keys[0])]
    tails = [_in_tail(alone[side], keys[1 - side]) for side in (0, 1)]
    if any(tail.any() for tail in tails):
        yield plain(
            "tokens at documents' ends that one run alone scores",
            "tail",
            *(int(tail.sum()) for tail in tails),
        )
    rest = [side[~tail] for side, tail in zip(alone, tails, strict=True)]
    policies = {run.input_spec["protocol"]["bos"] for run in (first, second)}
    if len(policies) > 1:  # then a document's first id being scored is what the BOS does
        rest = [side[_token_index(side) > 0] for side in rest]
    if any(len(side) for side in rest):
        yield Difference(
            "denominator",
            first.num_tokens,
            second.num_tokens,
            f"the scored tokens differ: {len(rest[0]):,} are scored by the first run alone, "
            f"{len(rest[1]):,} by the second alone (divided by {first.num_tokens:,} and "
            f"{second.num_tokens:,} in all)",
        )


_INDEX_BITS = 40  # of a token's index in its document


def _scored(tokens: RunTokens) -> tuple[NDArray[np.int64], int]:
    """Return (a key for each scored token, sorted, each once; how many rows repeat one)."""
    rows = (tokens.document.astype(np.int64) << _INDEX_BITS) | tokens.token_index.astype(np.int64)
    keys = np.unique(rows)
    return keys, len(rows) - len(keys)


def _token_index(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    return keys & ((1 << _INDEX_BITS) - 1)


def _in_tail(alone: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which keys come after everything that the other run scored in their document."""
    following = np.searchsorted(others, alone)
    padded = np.append(others >> _INDEX_BITS, -1)
    tail: NDArray[np.bool_] = padded[following] != (alone >> _INDEX_BITS)
    return tail


def _of_model(first: Run, second: Run) -> Iterator[Difference]:
    ours, theirs = (run.model.get("weights_fingerprint") for run in (first, second))
    if ours != theirs:
        names = [
            f"{run.model.get('address')} ({str(p)[:12]}…)"
            for run, p in zip((first, second), (ours, theirs), strict=True)
        ]
        yield plain("the weights or their configuration differ", "weights", *names)
    sentences = {
        "engine": "the engines differ",
        "version": "the engine's versions differ",
        "dtype": "the precisions differ",
        "device": "the devices differ",
    }
    for key, sentence in sentences.items():
        one, other = first.session.get(key), second.session.get(key)
        same_engine = first.session.get("engine") == second.session.get("engine")
        if one != other and (key != "version" or same_engine):
            yield plain(sentence, "engine version" if key == "version" else key, one, other)
    shown = [_quantization(run.session.get("quantization")) for run in (first, second)]
    if shown[0] != shown[1]:
        yield plain("the quantizations differ", "quantization", *shown)
    yield from _of_settings(first, second)


def _settings(run: Run) -> dict[str, Any]:
    how = {name: run.session.get(name) for name in ("prompt_len", "decode_chunk")}
    mode = {"mode": run.session.get("mode", "full")}
    return {**(run.session.get("settings") or {}), **mode, **how}


def _of_settings(first: Run, second: Run) -> Iterator[Difference]:
    if first.session.get("engine") == second.session.get("engine"):
        ours, theirs = _settings(first), _settings(second)
        for name in sorted(ours | theirs):
            if ours.get(name) != theirs.get(name):
                yield plain(
                    f"the engine's setting {name}", "settings", ours.get(name), theirs.get(name)
                )
    pairs = {
        "threads": (first.threads, second.threads),
        "batch size": (_batch_size(first), _batch_size(second)),
        "perplexit version": (first.perplexit_version, second.perplexit_version),
    }
    for aspect, (one, other) in pairs.items():
        if one != other:
            yield plain(f"{aspect}, as recorded", aspect, one, other)


def _batch_size(run: Run) -> Any:
    plan: Mapping[str, Any] = run.batch_plan or {}
    return plan.get("batch_size")


def _quantization(entry: Mapping[str, Any] | None) -> str:
    if not entry:
        return "none"
    bits = entry.get("effective_bits")
    size = "" if bits is None else f" ({bits:.3g} bits per parameter)"
    return f"{entry.get('name')} by {entry.get('library')}{size}"
