"""Every difference between two runs, by name: text, tokenizer, windows, scored tokens, engine."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perplexit.diagnosis.input_steps import documents_of_run, first_difference, text_aspects
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
    found += _of_table(_OF_PROTOCOL, first, second)
    if same_ids and first.input_fingerprint != second.input_fingerprint:
        found += _of_scored_sets(first, second)
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
            f"{sizes[1]}): perplexities per token count different tokens, compare bits per byte",
        )


def _protocol(run: Run) -> str:
    protocol = run.input_spec["protocol"]
    return f"{protocol['name']} (version {protocol['version']})"


def _bos(run: Run) -> str:
    protocol = run.input_spec["protocol"]
    policy = _POLICIES[protocol["bos"]]
    return policy if protocol["bos"] == "none" else f"{policy} (id {protocol['prefix_id']})"


# sentence, aspect, and the value of a run that is compared and shown
_Row = tuple[str, str, Callable[[Run], Any]]
_OF_PROTOCOL: tuple[_Row, ...] = (
    ("the protocols differ", "protocol", _protocol),
    ("what stands before the text", "bos", _bos),
    (
        "ids fed in one window, at most",
        "max_length",
        lambda run: run.input_spec["protocol"]["max_length"],
    ),
    ("ids from window to window", "stride", lambda run: run.input_spec["protocol"]["stride"]),
    (
        "the tools' own perplexities average differently",
        "denominator",
        lambda run: _AGGREGATES[run.input_spec["protocol"]["aggregate"]],
    ),
    (
        "tokens left out because their loss was not finite",
        "denominator",
        lambda run: run.num_non_finite,
    ),
)


def _of_table(table: Iterable[_Row], first: Run, second: Run) -> Iterator[Difference]:
    """Yield a difference for each row whose value is not the same in both runs."""
    for sentence, aspect, value in table:
        one, other = value(first), value(second)
        if one != other:
            yield plain(sentence, aspect, one, other)


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
        rest = [side[side & ((1 << _INDEX_BITS) - 1) > 0] for side in rest]
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
    same_engine = first.session.get("engine") == second.session.get("engine")
    for row in _OF_SESSION:
        if row[1] != "engine version" or same_engine:
            yield from _of_table([row], first, second)
    if same_engine:
        ours, theirs = _settings(first), _settings(second)
        for name in sorted(ours | theirs):
            one, other = ours.get(name), theirs.get(name)
            if one != other:
                yield plain(f"the engine's setting {name}", "settings", one, other)
    yield from _of_table(_AS_RECORDED, first, second)


def _settings(run: Run) -> dict[str, Any]:
    how = {name: run.session.get(name) for name in ("prompt_len", "decode_chunk")}
    mode = {"mode": run.session.get("mode", "full")}
    return {**(run.session.get("settings") or {}), **mode, **how}


def _quantization(run: Run) -> str:
    entry = run.session.get("quantization")
    if not entry:
        return "none"
    bits = entry.get("effective_bits")
    size = "" if bits is None else f" ({bits:.3g} bits per parameter)"
    return f"{entry.get('name')} by {entry.get('library')}{size}"


_OF_SESSION: tuple[_Row, ...] = (
    ("the engines differ", "engine", lambda run: run.session.get("engine")),
    ("the engine's versions differ", "engine version", lambda run: run.session.get("version")),
    ("the precisions differ", "dtype", lambda run: run.session.get("dtype")),
    ("the devices differ", "device", lambda run: run.session.get("device")),
    ("the quantizations differ", "quantization", _quantization),
)
_AS_RECORDED: tuple[_Row, ...] = (
    ("threads, as recorded", "threads", lambda run: run.threads),
    ("batch size, as recorded", "batch size", lambda run: run.batch_plan.get("batch_size")),
    ("perplexit version, as recorded", "perplexit version", lambda run: run.perplexit_version),
)
