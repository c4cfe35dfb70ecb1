"""What every session promises, whatever its engine. See engines.py for who takes part."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from perplexit.errors import VocabularyError
from perplexit.sessions.base import DetailedSession, InferenceSession
from tests.contract.engines import ENGINES, Engine
from tests.oracles import oracle_details, random_window
from tests.tiny_models import VOCAB_SIZE

CASES = [(engine, model) for engine, entry in ENGINES.items() for model in entry.models]


@dataclass(frozen=True)
class Opened:
    session: InferenceSession
    engine: Engine
    oracle: torch.nn.Module


@pytest.fixture(scope="module", params=CASES, ids=["-".join(case) for case in CASES])
def opened(request: pytest.FixtureRequest) -> Iterator[Opened]:
    engine_name, model_name = request.param
    folder = request.getfixturevalue(f"tiny_{model_name}_dir")
    engine = ENGINES[engine_name]
    session = engine.open(folder)
    yield Opened(session, engine, engine.oracle(folder).eval())
    session.close()


def detailed(opened: Opened) -> DetailedSession:
    if not isinstance(opened.session, DetailedSession):
        pytest.skip("this engine gives the nll alone")
    return opened.session


# Full windows, a short one, one with targets in its middle, single targets at either end.
WINDOWS = [
    random_window(0, 48, VOCAB_SIZE, index=0),
    random_window(1, 48, VOCAB_SIZE, index=1),
    random_window(2, 9, VOCAB_SIZE, index=2),
    random_window(3, 30, VOCAB_SIZE, range(11, 19), index=3),
    random_window(4, 2, VOCAB_SIZE, index=4),
    random_window(5, 33, VOCAB_SIZE, range(32, 33), index=5),
    random_window(6, 21, VOCAB_SIZE, range(1, 2), index=6),
    random_window(7, 40, VOCAB_SIZE, range(2, 40, 3), index=7),
]


def one_by_one(session, windows=WINDOWS):
    return [session.token_nll([window])[0] for window in windows]


def largest_difference(left, right):
    assert [len(a) for a in left] == [len(b) for b in right]
    return max(float(np.abs(a - b).max()) for a, b in zip(left, right, strict=True) if len(a))


def test_it_is_a_session(opened):
    assert isinstance(opened.session, InferenceSession)


def test_nll_agrees_with_the_float64_oracle(opened):
    expected = [oracle_details(opened.oracle, window).nll_N for window in WINDOWS]
    results = opened.session.token_nll(WINDOWS)
    assert [nll_N.dtype for nll_N in results] == [np.float32] * len(WINDOWS)
    assert largest_difference(results, expected) < opened.engine.tolerance


@pytest.mark.trap(9)
@pytest.mark.trap(10)
def test_a_window_has_the_same_nll_alone_in_a_batch_and_in_a_shuffled_batch(opened):
    """Traps 9 and 10: padding is neither scored nor attended, and positions do not move."""
    alone = one_by_one(opened.session)
    together = opened.session.token_nll(WINDOWS)
    order = np.random.default_rng(0).permutation(len(WINDOWS))
    shuffled = opened.session.token_nll([WINDOWS[i] for i in order])
    back = [shuffled[list(order).index(i)] for i in range(len(WINDOWS))]
    assert largest_difference(alone, together) < opened.engine.batch_tolerance
    assert largest_difference(together, back) < opened.engine.batch_tolerance


@pytest.mark.trap(9)
def test_what_stands_beside_a_short_window_does_not_matter(opened):
    """Trap 9: a short window is padded to different lengths by different neighbours."""
    short = WINDOWS[2]
    results = [
        opened.session.token_nll([short, random_window(seed, length, VOCAB_SIZE)])[0]
        for seed, length in ((20, 10), (21, 60), (22, 100))
    ]
    assert largest_difference(results[:1] * 2, results[1:]) < opened.engine.batch_tolerance


@pytest.mark.trap(25)
def test_two_passes_are_identical_to_the_last_bit(opened):
    """Trap 25: no dropout, nothing random."""
    first, second = (opened.session.token_nll(WINDOWS) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_details_agree_with_the_oracle_and_change_no_bit_of_the_nll(opened):
    session = detailed(opened)
    plain = session.token_nll(WINDOWS)
    for nll_N, got, window in zip(plain, session.token_details(WINDOWS), WINDOWS, strict=True):
        expected = oracle_details(opened.oracle, window)
        assert np.array_equal(nll_N, got.nll_N)
        assert np.abs(got.entropy_N - expected.entropy_N).max() < 10 * opened.engine.tolerance
        assert np.abs(got.rank_N - expected.rank_N).max() <= 1  # two logits may differ by rounding
        assert (got.rank_N == expected.rank_N).mean() > 0.9 or len(nll_N) < 10
        assert got.top_ids_NK is None
        assert got.rank_N.dtype == np.int32
        assert got.entropy_N.dtype == np.float32


def test_alternatives_are_the_most_likely_tokens(opened):
    session = detailed(opened)
    with torch.no_grad():
        logits_TV = opened.oracle(torch.tensor([WINDOWS[3].ids_T.tolist()])).logits[0].double()
    expected = logits_TV.log_softmax(-1)[WINDOWS[3].targets_N - 1].topk(5)
    got = session.token_details([WINDOWS[3]], top_k=5)[0]
    assert got.top_logprobs_NK.shape == (8, 5)
    assert got.top_ids_NK.dtype == np.int32
    difference = np.abs(got.top_logprobs_NK - expected.values.numpy()).max()
    assert difference < opened.engine.tolerance
    assert (got.top_ids_NK == expected.indices.numpy()).mean() > 0.9


@pytest.mark.trap(22)
def test_probabilities_over_the_whole_vocabulary_sum_to_one(opened):
    """Trap 22: no id is masked, be it the padding's or the end's: each is once the target."""
    context = random_window(8, 12, VOCAB_SIZE).ids_T
    total = 0.0
    for start in range(0, VOCAB_SIZE, 64):
        windows = []
        for target in range(start, start + 64):
            ids_T = np.append(context, np.int32(target)).astype(np.int32)
            windows.append(random_window(0, 1, VOCAB_SIZE))
            windows[-1] = type(windows[-1])(target, ids_T, np.array([12]))
        total += sum(float(np.exp(-nll_N[0])) for nll_N in opened.session.token_nll(windows))
    assert total == pytest.approx(1.0, abs=1e-4)


@pytest.mark.trap(5)
def test_another_first_id_changes_the_predictions(opened):
    """Trap 5: a BOS is fed forward, not put in its place afterwards."""
    window = WINDOWS[2]
    changed_T = window.ids_T.copy()
    changed_T[0] = (changed_T[0] + 1) % VOCAB_SIZE
    changed = type(window)(window.index, changed_T, window.targets_N)
    before, after = (opened.session.token_nll([w])[0] for w in (window, changed))
    num_changed = (np.abs(before - after) > 1e-4).sum()
    assert num_changed > len(before) // 2 if opened.engine.sees_far else num_changed == 1


def test_windows_without_targets_give_empty_results_in_their_place(opened):
    empty = random_window(9, 5, VOCAB_SIZE, range(0), index=9)
    results = opened.session.token_nll([empty, WINDOWS[2], empty])
    assert [len(nll_N) for nll_N in results] == [0, 8, 0]
    assert largest_difference([results[1]], one_by_one(opened.session, [WINDOWS[2]])) < 1e-5
    assert [len(nll_N) for nll_N in opened.session.token_nll([empty])] == [0]
    assert opened.session.token_nll([]) == []


def test_details_of_a_window_without_targets_are_empty(opened):
    empty = random_window(9, 5, VOCAB_SIZE, range(0))
    got = detailed(opened).token_details([empty], top_k=3)[0]
    assert got.nll_N.shape == got.entropy_N.shape == got.rank_N.shape == (0,)
    assert got.top_ids_NK.shape == got.top_logprobs_NK.shape == (0, 3)


@pytest.mark.trap(18)
@pytest.mark.parametrize("bad_id", [VOCAB_SIZE, 2**31 - 1, -1])
def test_an_id_without_a_row_is_refused_before_anything_runs(opened, bad_id):
    """Trap 18: a tokenizer with more ids than the model has rows."""
    if not opened.engine.knows_weights:
        pytest.skip("the session cannot see the vocabulary")
    window = random_window(10, 6, VOCAB_SIZE)
    window.ids_T[3] = bad_id
    with pytest.raises(VocabularyError, match="vocabulary"):
        opened.session.token_nll([window])


def test_the_inputs_are_left_as_they_were(opened):
    before = [(w.ids_T.copy(), w.targets_N.copy()) for w in WINDOWS]
    opened.session.token_nll(WINDOWS)
    for (ids_T, targets_N), window in zip(before, WINDOWS, strict=True):
        assert np.array_equal(ids_T, window.ids_T)
        assert np.array_equal(targets_N, window.targets_N)


def test_it_says_whose_numbers_these_are_and_under_which_conditions(opened):
    model, description = opened.session.model, opened.session.description
    if opened.engine.knows_weights:
        assert model.vocab_size == VOCAB_SIZE
        assert model.num_parameters == sum(p.numel() for p in opened.oracle.parameters())
        assert description.dtype == "float32"
    assert len(model.weights_fingerprint) == 64
    assert model.address
    assert model.architecture
    assert description.engine
    assert description.version
    assert description.dtype
    assert description.device
    assert description.threads is None or description.threads >= 1
    assert opened.session.max_batch_size(64) >= 1
    assert opened.session.max_batch_size(10**7) == 1
