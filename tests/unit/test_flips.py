"""First choices that changed: which, how many, with the text around them and both choices."""

import json
from pathlib import Path

import numpy as np
import pytest

import perplexit as px
from tests.report_runs import DamagedSession
from tests.toy_sessions import BigramSession

TEXTS = [
    f"Item {n}: a kettle, two cups and the größte Teekanne 🫖 of the house." for n in range(22)
]


@pytest.fixture(scope="module")
def tokens(byte_tokenizer_json: Path, tmp_path_factory: pytest.TempPathFactory) -> px.TokenFile:
    output = tmp_path_factory.mktemp("input") / "in.safetensors"
    return px.prepare(TEXTS, tokenizer=byte_tokenizer_json, max_length=48, output=output)


def run_of(tokens: px.TokenFile, noise: float | None, top_k: int) -> px.Run:
    session = BigramSession(400) if noise is None else DamagedSession(noise=noise)
    return px.evaluate(session, tokens, top_k=top_k)


def test_flips_are_those_of_the_recorded_alternatives_the_surest_first(
    tokens: px.TokenFile,
) -> None:
    reference, candidate = run_of(tokens, None, 3), run_of(tokens, 1.5, 3)
    ours, theirs = reference.tokens, candidate.tokens
    changed = np.flatnonzero(ours.top_ids[:, 0] != theirs.top_ids[:, 0])
    assert len(changed) > 20
    comparison = px.compare(reference, candidate, num_most_changed=8)
    flips = comparison.flips
    assert (flips.count, flips.num_tokens, flips.complete) == (len(changed), len(ours), True)
    surest = np.sort(np.exp(ours.top_logprobs[changed, 0]))[::-1][:8]
    np.testing.assert_allclose([flip.reference_p for flip in flips.listed], surest, rtol=1e-6)
    for flip in flips.listed:
        text = TEXTS[flip.document].encode()
        around = (flip.context + flip.token + flip.after).replace("�", "")
        assert around in TEXTS[flip.document] or around.encode()[:4] in text
        assert flip.reference_top1 != flip.candidate_top1
        assert None not in (flip.reference_top1, flip.candidate_top1)
    value = comparison.figures()["top1_agreement"].value
    assert value == pytest.approx(1 - len(changed) / len(ours))
    json.dumps(comparison.to_json(), allow_nan=False)
    assert f"first choice changed at {len(changed):,}" in str(comparison)


def test_without_alternatives_only_the_certain_ones_are_counted(tokens: px.TokenFile) -> None:
    reference, candidate = run_of(tokens, None, 0), run_of(tokens, 1.5, 0)
    if reference.tokens.rank is None:
        pytest.fail("the toy session is expected to give ranks")
    flips = px.compare(reference, candidate).flips
    certain = (reference.tokens.rank == 1) != (candidate.tokens.rank == 1)
    assert flips.count == certain.sum()
    assert not flips.complete
    assert all(
        (flip.reference_top1 is None) != (flip.candidate_top1 is None) for flip in flips.listed
    )
    whole = px.compare(run_of(tokens, None, 1), run_of(tokens, 1.5, 1)).flips
    assert flips.count <= whole.count


def test_equal_models_have_none_and_none_is_asked_for(tokens: px.TokenFile) -> None:
    assert px.compare(run_of(tokens, None, 2), run_of(tokens, None, 2)).flips.count == 0
    listed = px.compare(run_of(tokens, None, 2), run_of(tokens, 1.0, 2), num_most_changed=0).flips
    assert listed.listed == ()
    assert listed.count > 0
