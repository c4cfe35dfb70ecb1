"""compare_bytes: runs of two tokenizers over one text, paired where their token boundaries meet."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import perplexit as px
from perplexit.comparison.byte_comparison import ScoredBytes, common_segments
from perplexit.comparison.compare_by_byte import compare_bytes
from perplexit.errors import EmptyScoreError, FingerprintMismatchError, UsageError
from perplexit.inputs.token_file import TokenFile
from perplexit.runs.run import Run
from tests.toy_sessions import BigramSession
from tests.unseen_text import DOCUMENTS

Prepare = Callable[..., TokenFile]
NUM_BYTES = sum(len(text.encode()) for text in DOCUMENTS)


@pytest.fixture(scope="module")
def letters_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer without a merge: every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|bos|>": 0} | {letter: 1 + index for index, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|bos|>"])
    path = tmp_path_factory.mktemp("letters") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def runs(
    byte_tokenizer_json: Path, letters_json: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, Run]:
    """(320 ids, every byte a token): the same text, other windows, other models."""
    made = []
    for path, seed, length in ((byte_tokenizer_json, 0, 48), (letters_json, 1, 64)):
        folder = tmp_path_factory.mktemp("input")
        tokens = px.prepare(
            list(DOCUMENTS), tokenizer=path, output=folder / "in.safetensors", max_length=length
        )
        made.append(px.evaluate(BigramSession(seed=seed), tokens, run=folder / "run"))
    return made[0], made[1]


def test_the_sums_are_those_of_the_common_bytes_by_a_dull_loop(runs: tuple[Run, Run]) -> None:
    by_byte: list[dict[tuple[int, int], float]] = []  # (document, start) → nll; all starts align
    for run in runs:
        tokens, best = run.tokens, {}
        for row in range(len(tokens)):
            key = (int(tokens.document[row]), int(tokens.byte_start[row]))
            best[key] = (float(tokens.nll[row]), int(tokens.num_bytes[row]))
        by_byte.append(best)
    merged, letters = by_byte
    reference_nll = candidate_nll = 0.0
    num_bytes = 0
    for (document, start), (nll, length) in merged.items():
        inner = [letters.get((document, start + offset)) for offset in range(length)]
        if None not in inner:
            reference_nll += nll
            candidate_nll += sum(entry[0] for entry in inner)
            num_bytes += length
    found = compare_bytes(*runs)
    assert found.num_bytes == num_bytes
    assert found.bits_per_byte_reference == pytest.approx(reference_nll / num_bytes / math.log(2))
    assert found.bits_per_byte_candidate == pytest.approx(candidate_nll / num_bytes / math.log(2))
    assert found.log_difference == pytest.approx((candidate_nll - reference_nll) / num_bytes)
    assert found.byte_ratio == pytest.approx(math.exp(found.log_difference))
    assert found.bits_per_byte_difference == pytest.approx(found.log_difference / math.log(2))
    first_tokens = sum(
        int(run_tokens.byte_start[run_tokens.document == document].min())
        for run_tokens in [runs[0].tokens]
        for document in range(len(DOCUMENTS))
    )
    assert num_bytes == NUM_BYTES - first_tokens  # each document's first id has no context


def test_the_verdict_and_its_interval(runs: tuple[Run, Run]) -> None:
    """A byte a token with a random model of 2 nats' spread is far worse a byte."""
    found = compare_bytes(*runs)
    assert found.verdict == "worse"
    assert found.byte_ratio_low > 1
    assert found.byte_ratio_low < found.byte_ratio < found.byte_ratio_high
    assert compare_bytes(runs[1], runs[0]).verdict == "better"
    assert compare_bytes(*runs, noise_floor=100.0).verdict == "equivalent"
    wider = compare_bytes(*runs, confidence=0.99)
    assert wider.byte_ratio_high > found.byte_ratio_high


def test_a_run_against_itself_has_no_difference_at_all(runs: tuple[Run, Run]) -> None:
    same = compare_bytes(runs[0], runs[0].folder)
    assert same.log_difference == 0.0
    assert same.verdict == "equivalent"
    assert same.num_unaligned_bytes_reference == 0
    assert same.bits_per_byte_reference == pytest.approx(runs[0].bits_per_byte, rel=1e-12)


def test_no_token_perplexity_is_shown_and_the_reader_is_warned(runs: tuple[Run, Run]) -> None:
    found = compare_bytes(*runs)
    text, record = str(found), json.dumps(found.to_json(), allow_nan=False)
    for run in runs:
        assert f"{run.perplexity:.4g}" not in text
        assert repr(run.perplexity) not in record
    assert "count different tokens and cannot be compared" in text
    assert f"{found.bits_per_byte_reference:.6g} bits per byte" in text
    assert json.loads(record)["unit"] == "byte"
    assert json.loads(record)["verdict"] == "worse"
    assert not found.same_tokenizer


def test_the_same_tokenizer_with_other_windows_says_what_it_is(
    byte_tokenizer_json: Path,
) -> None:
    def run(length: int) -> Run:
        tokens = px.prepare(list(DOCUMENTS), tokenizer=byte_tokenizer_json, max_length=length)
        return px.evaluate(BigramSession(), tokens)

    found = compare_bytes(run(16), run(64))
    assert found.same_tokenizer
    assert "windows, BOS or scored tokens" in found.warnings[0]
    assert found.log_difference == pytest.approx(0.0, abs=1e-9)  # a bigram needs one id of context


def test_the_most_changed_segments_show_their_text(runs: tuple[Run, Run]) -> None:
    found = compare_bytes(*runs, num_most_changed=3)
    assert len(found.most_changed) == 3
    deltas = [abs(segment.delta) for segment in found.most_changed]
    assert deltas == sorted(deltas, reverse=True)
    for segment in found.most_changed:
        data = DOCUMENTS[segment.document].encode()
        shown = segment.text.encode()
        assert data[segment.byte_start : segment.byte_start + len(shown)] == shown
        assert segment.context.endswith(data[: segment.byte_start].decode()[-5:])
        assert segment.delta == pytest.approx(segment.nll_candidate - segment.nll_reference)


def test_another_text_is_refused(runs: tuple[Run, Run], byte_tokenizer_json: Path) -> None:
    other = px.prepare([*DOCUMENTS[:-1], "Something else."], tokenizer=byte_tokenizer_json)
    run = px.evaluate(BigramSession(), other)
    with pytest.raises(FingerprintMismatchError, match=r"the same text.*`perplexit explain`"):
        compare_bytes(runs[0], run)
    with pytest.raises(UsageError, match="noise_floor"):
        compare_bytes(*runs, noise_floor=-1.0)
    ids = runs[0].tokens.with_columns(token_bytes=None)
    with pytest.raises(FingerprintMismatchError, match="ids without text"):
        compare_bytes(replace(runs[0], loaded_tokens=ids), runs[1])


def test_a_loss_that_is_not_finite_leaves_its_segment_out(runs: tuple[Run, Run]) -> None:
    nll = runs[0].tokens.nll.copy()
    nll[5] = np.nan
    broken = replace(runs[0], loaded_tokens=runs[0].tokens.with_columns(nll=nll))
    found = compare_bytes(broken, runs[1])
    assert math.isfinite(found.log_difference)
    assert found.num_bytes < compare_bytes(*runs).num_bytes
    assert "1 segments with a loss that is not finite" in found.warnings[1]


def scored(pieces: list[int], skipped: set[int], seed: int) -> ScoredBytes:
    """One document cut into tokens of these lengths, some not scored; random losses."""
    stops = np.cumsum(pieces)
    kept = np.array([i for i in range(len(pieces)) if i not in skipped], dtype=np.int64)
    nll = np.random.default_rng(seed).random(len(pieces))
    zeros = np.zeros(len(kept), dtype=np.int64)
    return ScoredBytes(zeros, (stops - pieces)[kept], stops[kept], nll[kept], zeros)


@settings(max_examples=200, deadline=None)
@given(
    size=st.integers(1, 25),
    cuts=st.tuples(st.sets(st.integers(1, 24)), st.sets(st.integers(1, 24))),
    skipped=st.tuples(st.sets(st.integers(0, 24)), st.sets(st.integers(0, 24))),
)
def test_segments_against_a_loop_over_bytes(
    size: int, cuts: tuple[set[int], set[int]], skipped: tuple[set[int], set[int]]
) -> None:
    sides, tokens = [], []
    for seed in range(2):
        points = [0, *sorted(cut for cut in cuts[seed] if cut < size), size]
        side = scored(np.diff(points).tolist(), skipped[seed], seed)
        sides.append(side)
        tokens.append({(int(a), int(b)): x for _, a, b, x, _ in zip(*side, strict=True)})
    boundaries = [{edge for token in of for edge in token} for of in tokens]
    common = sorted(boundaries[0] & boundaries[1])
    expected = []
    for begin, end in pairwise(common):
        inside = [[t for t in of if begin <= t[0] and t[1] <= end] for of in tokens]
        if all(sum(b - a for a, b in held) == end - begin for held in inside):
            sums = [sum(of[t] for t in held) for of, held in zip(tokens, inside, strict=True)]
            expected.append((begin, end - begin, *sums))
    if not expected:
        with pytest.raises(EmptyScoreError, match="bytes that both runs scored"):
            common_segments(*sides)
        return
    found = common_segments(*sides)
    rows = zip(found.start_S, found.num_bytes_S, found.reference_S, found.candidate_S, strict=True)
    assert [tuple(map(float, row)) for row in rows] == [pytest.approx(row) for row in expected]


def test_gates_on_bytes_are_held_and_figures_a_token_are_refused(runs: tuple[Run, Run]) -> None:
    found = compare_bytes(*runs)
    ratio = found.bits_per_byte_candidate / found.bits_per_byte_reference
    assert found.bits_per_byte_ratio == pytest.approx(ratio)
    assert found.bits_per_byte_ratio_low < ratio < found.bits_per_byte_ratio_high
    loose, tight = found.bits_per_byte_ratio_high + 1e-6, found.bits_per_byte_ratio
    gates = [f"bits_per_byte_ratio<={loose}", f"bits_per_byte_ratio<={tight}", "byte_ratio<100"]
    results = px.compare_runs(runs[0], [runs[1]], gates=gates).gates[0]
    assert [result.passed for result in results] == [True, False, True]
    by_value = px.compare_runs(runs[0], [runs[1]], gates=gates[1:2], gates_on="value")
    assert by_value.failed == []
    for gate in ("fp16", "mean_kl<=0.1"):
        with pytest.raises(UsageError, match="gate on bits_per_byte_ratio"):
            px.compare_runs(runs[0], [runs[1]], gates=[gate])
