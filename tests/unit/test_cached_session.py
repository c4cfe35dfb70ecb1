"""Prefill and decode: what the cached session promises beyond the contract suite."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import perplexit as px
from perplexit.errors import CapabilityError, ResumeError, UsageError
from perplexit.inputs.windows import WindowIds
from perplexit.sessions.base import DetailedSession, HiddenStateSession, TimesPhases
from perplexit.sessions.prefill_decode import cached_session
from perplexit.sessions.pytorch import PytorchInferenceSession
from tests.oracles import random_window
from tests.tiny_models import VOCAB_SIZE

WINDOW = 24
# One window is full; the others end earlier, skip targets, or have none.
WINDOWS = [
    random_window(0, WINDOW, VOCAB_SIZE, index=0),
    random_window(1, WINDOW, VOCAB_SIZE, index=1),
    random_window(2, 9, VOCAB_SIZE, index=2),
    random_window(3, 20, VOCAB_SIZE, range(7, 20, 3), index=3),
]
MODELS = ("gpt2", "llama", "gemma2")


@pytest.fixture(scope="module", params=MODELS)
def session(request):
    opened = PytorchInferenceSession(request.getfixturevalue(f"tiny_{request.param}_dir"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def llama(tiny_llama_dir):
    opened = PytorchInferenceSession(tiny_llama_dir)
    yield opened
    opened.close()


def largest_difference(left, right):
    assert [len(a) for a in left] == [len(b) for b in right]
    return max(float(np.abs(a - b).max()) for a, b in zip(left, right, strict=True) if len(a))


@pytest.mark.parametrize("batch", [1, 4])
def test_every_prompt_len_gives_the_losses_of_the_whole_window(session, batch):
    """For each prefill from 1 id to the whole window, alone and in a ragged batch."""
    windows = WINDOWS[:batch]
    whole = session.token_nll(windows)
    for prompt_len in range(1, WINDOW + 1):
        for decode_chunk in (1, 5):
            cached = cached_session(session, prompt_len=prompt_len, decode_chunk=decode_chunk)
            got = cached.token_nll(windows)
            assert largest_difference(whole, got) < 1e-4, (prompt_len, decode_chunk)


def test_details_and_references_are_those_of_the_whole_window(session):
    cached = cached_session(session, prompt_len=4)
    assert isinstance(cached, DetailedSession)
    assert isinstance(cached, HiddenStateSession)
    assert isinstance(cached, TimesPhases)
    for whole, got in zip(
        session.token_details(WINDOWS, top_k=3),
        cached.token_details(WINDOWS, top_k=3),
        strict=True,
    ):
        assert np.abs(whole.entropy_N - got.entropy_N).max() < 1e-4
        assert np.array_equal(whole.rank_N, got.rank_N)
        assert np.array_equal(whole.top_ids_NK, got.top_ids_NK)
    states = zip(
        session.target_hidden_states(WINDOWS), cached.target_hidden_states(WINDOWS), strict=True
    )
    assert all(np.allclose(whole, got, atol=1e-4) for whole, got in states)
    whole_chunks, cached_chunks = (
        list(s.target_logits(WINDOWS, chunk_rows=5)) for s in (session, cached)
    )
    assert [(c.place, c.start) for c in whole_chunks] == [(c.place, c.start) for c in cached_chunks]
    last = cached_chunks[-1].logits_NV
    assert np.allclose(whole_chunks[-1].logits_NV, last, atol=1e-4)


def test_prefill_and_decode_are_fed_as_asked(llama, monkeypatch):
    """One call with the prompt, then calls of the chunk, finished windows left out."""
    fed = []
    opened = llama.open_cache

    def watched(windows):
        cache = opened(windows)
        feed = cache.feed

        def note(ids_BT, **place):
            fed.append((ids_BT.shape, place["start"]))
            return feed(ids_BT, **place)

        cache.feed = note
        return cache

    monkeypatch.setattr(llama, "open_cache", watched)
    cached_session(llama, prompt_len=10, decode_chunk=4).token_nll(WINDOWS)
    # the last target of a window is never fed: 23, 23, 19 and 8 ids
    assert fed == [((4, 10), 0), ((3, 4), 10), ((3, 4), 14), ((3, 4), 18), ((2, 1), 22)]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_attention_implementations(tiny_llama_dir, attention):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, attn_implementation=attention)
    session = PytorchInferenceSession(model)
    cached = cached_session(session, prompt_len=5, decode_chunk=2)
    assert cached.description.settings["attention"] == attention
    assert largest_difference(session.token_nll(WINDOWS), cached.token_nll(WINDOWS)) < 1e-4


@pytest.mark.trap(9)
def test_a_poisoned_embedding_that_no_window_has_touches_nothing(tiny_llama_dir, monkeypatch):
    """Trap 9: rows are padded with their own ids, so no foreign embedding is read."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    expected = PytorchInferenceSession(model).token_nll(WINDOWS)
    used = {int(i) for window in WINDOWS for i in window.ids_T}
    with torch.no_grad():
        for unused in set(range(VOCAB_SIZE)) - used:
            model.model.embed_tokens.weight[unused] = float("nan")
    session = PytorchInferenceSession(model)
    # The probe, which reads random ids, is left out.
    monkeypatch.setattr(session, "_num_cached_layers", model.config.num_hidden_layers)
    monkeypatch.setattr(session, "caching", dict)
    got = cached_session(session, prompt_len=3).token_nll(WINDOWS)
    assert largest_difference(expected, got) < 1e-4


@pytest.mark.trap(24)
def test_a_soft_cap_is_applied_in_the_decode_too(tiny_gemma2_dir):
    """Trap 24: without the final soft-cap the decoded losses would differ visibly."""
    capped = PytorchInferenceSession(tiny_gemma2_dir)
    model = AutoModelForCausalLM.from_pretrained(tiny_gemma2_dir)
    model.config.final_logit_softcapping = None
    uncapped = PytorchInferenceSession(model)
    losses = [cached_session(s, prompt_len=3).token_nll(WINDOWS) for s in (capped, uncapped)]
    assert largest_difference(losses[0], capped.token_nll(WINDOWS)) < 1e-4
    assert largest_difference(*losses) > 1e-2


def test_seconds_of_prefill_and_decode_are_apart_and_taken_once(llama):
    cached = cached_session(llama, prompt_len=8)
    cached.token_nll(WINDOWS)
    seconds = cached.take_seconds()
    assert seconds.prefill > 0
    assert seconds.decode > 0
    assert cached.take_seconds() == type(seconds)(0.0, 0.0)
    cached_session(llama, prompt_len=WINDOW).token_nll(WINDOWS)
    whole = cached_session(llama, prompt_len=WINDOW)
    whole.token_nll(WINDOWS)
    assert whole.take_seconds().decode < seconds.decode


def test_the_description_says_how(llama):
    description = cached_session(llama, prompt_len=8, decode_chunk=2).description
    assert (description.mode, description.prompt_len, description.decode_chunk) == ("cached", 8, 2)
    assert description.settings["cache"]["dtype"] == "float32"
    assert llama.description.mode == "full"


@pytest.mark.parametrize("sizes", [{"prompt_len": 0}, {"decode_chunk": 0}])
def test_sizes_below_one_are_refused(llama, sizes):
    with pytest.raises(UsageError, match="at least 1, got 0"):
        cached_session(llama, **sizes)


def test_a_model_without_a_cache_is_refused_by_name():
    class Opaque(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(VOCAB_SIZE, VOCAB_SIZE)

        def forward(self, input_ids):
            return self.embedding(input_ids)

    with pytest.raises(CapabilityError, match="Opaque does not; use --mode full"):
        cached_session(PytorchInferenceSession(Opaque()))


def test_a_cache_that_changes_the_answer_is_refused(tiny_llama_dir):
    """A model that forgets its cache would be scored without context, plausibly and wrongly."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    forward = model.model.forward

    def forgetful(input_ids=None, past_key_values=None, position_ids=None, **options):
        del past_key_values
        return forward(input_ids=input_ids, position_ids=position_ids, **options)

    model.model.forward = forgetful
    with pytest.raises(CapabilityError, match="hidden states that differ"):
        cached_session(PytorchInferenceSession(model))


def test_an_engine_without_a_cache_is_refused_by_name(tiny_llama_dir):
    from tests.contract import without_weights  # noqa: PLC0415 - needs no engine's package

    with pytest.raises(CapabilityError, match="scores whole windows alone; use --mode full"):
        cached_session(without_weights.ngram(tiny_llama_dir))


@pytest.fixture(scope="module")
def tokens(tiny_llama_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cached-input")
    text = folder / "text.txt"
    text.write_text("Whoever measures twice and gets the same number has measured. " * 6)
    return px.prepare(
        text, tokenizer=str(tiny_llama_dir), max_length=24, stride=12, output=folder / "in"
    )


def test_evaluate_in_cached_mode_is_the_same_measurement(llama, tokens):
    full = px.evaluate(llama, tokens)
    cached = px.evaluate(llama, tokens, mode="cached", prompt_len=6, decode_chunk=2)
    assert cached.nll_sum == pytest.approx(full.nll_sum, abs=1e-4 * full.num_tokens)
    assert np.abs(cached.tokens.nll - full.tokens.nll).max() < 1e-4
    session = cached.to_json()["session"]
    assert (session["mode"], session["prompt_len"], session["decode_chunk"]) == ("cached", 6, 2)
    assert full.to_json()["session"]["mode"] == "full"
    assert full.seconds["decode"] == 0
    assert cached.seconds["prefill"] > 0
    assert cached.seconds["decode"] > cached.seconds["prefill"]
    rate = cached.num_tokens / (cached.seconds["prefill"] + cached.seconds["decode"])
    assert cached.tokens_per_second == pytest.approx(rate)


def test_a_reference_can_be_saved_and_held_against_in_cached_mode(llama, tokens):
    reference = px.evaluate(llama, tokens, mode="cached", prompt_len=5, save_reference=True)
    against = px.evaluate(llama, tokens, mode="cached", prompt_len=9, reference=llama)
    assert reference.saved_reference["self_kl_max"] < 1e-6
    assert 0 <= np.nanmax(against.tokens.kl) < 1e-6


@pytest.mark.trap(26)
@pytest.mark.parametrize("other", [{"prompt_len": 7}, {"decode_chunk": 3}, {"mode": "full"}])
def test_another_shape_of_the_calls_is_not_resumed(llama, tokens, tmp_path, other):
    """Trap 26: mode, prompt and chunk are conditions of the measurement."""
    how = {"mode": "cached", "prompt_len": 6, "decode_chunk": 2}
    px.evaluate(llama, tokens, run=tmp_path / "run", **how)
    px.evaluate(llama, tokens, run=tmp_path / "run", **how)
    changed = other if "mode" in other else how | other
    with pytest.raises(ResumeError, match=next(iter(other))):
        px.evaluate(llama, tokens, run=tmp_path / "run", **changed)


@pytest.mark.parametrize("sizes", [{"prompt_len": 4}, {"decode_chunk": 4}])
def test_sizes_without_the_mode_are_refused(llama, tokens, sizes):
    with pytest.raises(UsageError, match="ask for mode 'cached'"):
        px.evaluate(llama, tokens, **sizes)


@pytest.mark.trap(32)
def test_keys_and_values_kept_over_a_sliding_window_are_another_protocol(llama, tiny_llama_dir):
    """Trap 32: a stream that drops old keys gives other losses than windows computed afresh.

    What is kept was computed with ids in sight that the window no longer has. Windows here always
    start from an empty cache; the stream is computed by hand.
    """
    size, length = 12, 40
    ids_T = random_window(5, length, VOCAB_SIZE).ids_T
    afresh = [
        WindowIds(start, ids_T[start : start + size], np.array([size - 1]))
        for start in range(length - size + 1)
    ]
    recomputed = np.concatenate(cached_session(llama, prompt_len=4).token_nll(afresh))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, attn_implementation="eager")
    seen = torch.arange(length)[:, None] - torch.arange(length)[None]
    mask = torch.where((seen >= 0) & (seen < size - 1), 0.0, float("-inf"))[None, None]
    with torch.no_grad():
        logits_TV = model(torch.tensor(ids_T[None]).long(), attention_mask=mask).logits[0]
    targets = torch.tensor(ids_T[size - 1 :]).long()
    streamed = torch.nn.functional.cross_entropy(
        logits_TV[size - 2 : -1], targets, reduction="none"
    ).numpy()
    assert abs(streamed[0] - recomputed[0]) < 1e-4  # nothing was dropped yet
    assert np.abs(streamed - recomputed).max() > 1e-2
