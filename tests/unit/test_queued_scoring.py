"""A session that queues its work: one batch ahead, the same run, memory that runs out."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

import perplexit as px
from perplexit.errors import EngineOutOfMemoryError
from perplexit.evaluation.scorer import Scorer, plan_batches
from perplexit.inputs.token_file import TokenFile
from perplexit.inputs.windows import WindowIds
from perplexit.sessions.pytorch import PytorchInferenceSession
from perplexit.token_columns import TokenDetails
from tests.toy_sessions import BigramSession


class QueueingBigramSession(BigramSession):
    """Works as a device does: a batch is computed when it is started and told when waited for.

    fails_late: out of memory is told by the wait for a batch, not by its start.
    ids_at_once: more ids than this under way run out of memory, whatever a batch's size.
    """

    queues = True

    def __init__(
        self, *, fails_late: bool = False, ids_at_once: int | None = None, **options: object
    ) -> None:
        super().__init__(**options)
        self.fails_late, self.ids_at_once = fails_late, ids_at_once
        self.events: list[str] = []
        self.under_way = 0

    def queue_details(
        self, windows: Sequence[WindowIds], *, top_k: int = 0
    ) -> Callable[[], list[TokenDetails]]:
        number, size = len(self.batches), sum(len(window.ids_T) for window in windows)
        if self.ids_at_once and self.under_way + size > self.ids_at_once:
            self.events.append("full")
            raise EngineOutOfMemoryError("too much under way")
        failure: EngineOutOfMemoryError | None = None
        try:
            details = self.token_details(windows, top_k=top_k)
        except EngineOutOfMemoryError as error:
            if not self.fails_late:
                raise
            failure = error
        self.events.append(f"start {number}")
        self.under_way += size

        def wait() -> list[TokenDetails]:
            self.under_way -= size
            if failure is not None:
                raise failure
            self.events.append(f"wait {number}")
            return details

        return wait


@pytest.fixture(scope="module")
def tokens(byte_tokenizer_json: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenFile:
    texts = ["The loss of a token is measured. " * 4, "Short.", "Wer misst, misst Mist. " * 5]
    output = tmp_path_factory.mktemp("input") / "in.safetensors"
    return px.prepare(texts, tokenizer=byte_tokenizer_json, max_length=16, stride=7, output=output)


def test_the_next_batch_is_started_before_the_last_ones_results_are_waited_for(tokens) -> None:
    session = QueueingBigramSession()
    run = px.evaluate(session, tokens, batch_size=4)
    assert session.events[:5] == ["start 0", "start 1", "wait 0", "start 2", "wait 1"]
    assert session.events[-1] == f"wait {len(session.batches) - 1}"
    plain = px.evaluate(BigramSession(), tokens, batch_size=4)
    assert run.nll_sum == plain.nll_sum
    assert run.num_tokens == plain.num_tokens
    assert run.batch_plan == plain.batch_plan


@pytest.mark.parametrize("fails_late", [False, True])
def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_scored_twice(
    tokens, fails_late: bool
) -> None:
    session = QueueingBigramSession(memory_ids=70, memory_from_batch=1, fails_late=fails_late)
    run = px.evaluate(session, tokens, batch_size=8)
    assert run.nll_sum == pytest.approx(px.evaluate(BigramSession(), tokens).nll_sum, rel=1e-12)
    assert [limit["max_windows"] for limit in run.batch_plan["limits"]] == [8, 4]


def test_memory_that_two_batches_share_is_waited_for_before_a_batch_is_halved(tokens) -> None:
    session = QueueingBigramSession(ids_at_once=64)  # one batch of 4 × 16 at a time
    run = px.evaluate(session, tokens, batch_size=4)
    assert "full" in session.events
    assert run.batch_plan["limits"] == [{"start": 0, "max_windows": 4, "max_ids": None}]
    assert run.nll_sum == px.evaluate(BigramSession(), tokens, batch_size=4).nll_sum


def test_a_window_that_never_fits_is_named(tokens) -> None:
    with pytest.raises(EngineOutOfMemoryError, match="smaller --max-length"):
        px.evaluate(QueueingBigramSession(memory_ids=10), tokens, batch_size=2)


def test_a_resumed_run_starts_no_batch_that_is_done(tokens) -> None:
    session = QueueingBigramSession()
    scorer = Scorer(session, tokens, plan_batches(session, tokens, 4))
    done = np.zeros(tokens.num_windows, bool)
    done[:8] = True
    batches = list(scorer.batches(done))
    assert batches[0].start == 8
    assert batches[-1].stop == tokens.num_windows
    assert len(session.batches) == len(batches)


def test_batches_under_way_together_count_no_second_twice(tokens) -> None:
    session = QueueingBigramSession(seconds_per_batch=0.02)
    run = px.evaluate(session, tokens, batch_size=8)
    assert 0.02 * len(session.batches) * 0.9 < run.seconds["prefill"] <= run.seconds["total"]


def test_the_pytorch_session_gives_the_same_bits_when_it_queues(
    tokens, tiny_llama_dir, monkeypatch
) -> None:
    """On the CPU a start does the work at once, so it does not claim to queue."""
    session = PytorchInferenceSession(tiny_llama_dir)
    assert not session.queues
    plain = px.evaluate(session, tokens, batch_size=4, top_k=2)
    monkeypatch.setattr(PytorchInferenceSession, "queues", True)
    queued = px.evaluate(session, tokens, batch_size=4, top_k=2)
    for name in ("nll", "rank", "entropy", "top_ids"):
        got, expected = getattr(queued.tokens, name), getattr(plain.tokens, name)
        assert np.array_equal(got, expected), name
