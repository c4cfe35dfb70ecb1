"""The completions session against a real HTTP server that is right, and ones that are wrong."""

import asyncio

import numpy as np
import pytest

import perplexit as px
from perplexit.errors import CapabilityError, ModelError, UsageError
from perplexit.inputs.windows import WindowIds
from perplexit.sessions.completions import CompletionsInferenceSession
from tests.markov_server import FAULTS, VOCAB_SIZE, MarkovServer, chain, serving


def _ids(length: int, seed: int = 0) -> np.ndarray:
    """Ids drawn from the chain itself, as real text is from its model."""
    rng = np.random.default_rng(seed)
    ids = [0]
    while len(ids) < length:
        ids.append(int(rng.choice(VOCAB_SIZE, p=np.exp(chain()[ids[-1]]))))
    return np.array(ids, dtype=np.int32)


def _windows(lengths=(40, 17, 5, 2)) -> list[WindowIds]:
    return [WindowIds(i, _ids(n, seed=i), np.arange(1, n)[i % 2 :]) for i, n in enumerate(lengths)]


def _expected(window: WindowIds) -> np.ndarray:
    ids = window.ids_T
    return -chain()[ids[window.targets_N - 1], ids[window.targets_N]]


def _session(server: MarkovServer, **options) -> CompletionsInferenceSession:
    return CompletionsInferenceSession(f"{server.url}#chain", **options)


def _no_waiting(monkeypatch) -> list[float]:
    """The waits between tries, which are not waited for."""
    naps: list[float] = []
    sleep = asyncio.sleep

    async def nap(seconds: float, *rest: object) -> None:
        if seconds:
            naps.append(seconds)
        await sleep(0, *rest)

    monkeypatch.setattr("asyncio.sleep", nap)
    return naps


@pytest.mark.parametrize("style", ["prompt_logprobs", "echo"])
def test_a_right_server_gives_the_chain_s_own_losses(style):
    with serving(MarkovServer(styles=(style,))) as server:
        session = _session(server)
        windows = _windows()
        results = session.token_nll(windows)
        for window, nll in zip(windows, results, strict=True):
            assert nll.dtype == np.float32
            np.testing.assert_allclose(nll, _expected(window), atol=1e-6)
        assert session.style == style
        assert all(
            all(isinstance(index, int) for index in request["prompt"])
            for request in server.requests
        )
        session.close()


@pytest.mark.trap(21)
def test_likelier_entries_beside_the_prompt_s_own_are_not_taken_for_it():
    """Trap 21: prompt_logprobs may hold extra top-k entries, in any order."""
    with serving(MarkovServer(styles=("prompt_logprobs",), extra_entries=3)) as server:
        session = _session(server)
        window = _windows()[0]
        np.testing.assert_allclose(session.token_nll([window])[0], _expected(window), atol=1e-6)
        session.close()


@pytest.mark.trap(39)
@pytest.mark.parametrize("style", ["prompt_logprobs", "echo"])
@pytest.mark.parametrize("fault", FAULTS)
def test_every_wrong_server_is_refused_before_the_first_score(fault, style):
    """Traps 20, 21, 39: echo ignored or shifted, a BOS added, a cache that truncates."""
    if fault == "wrong-id" and style == "echo":
        pytest.skip("echo names no ids")
    with serving(MarkovServer(styles=(style,), fault=fault)) as server:
        session = _session(server)
        with pytest.raises(CapabilityError, match="wrong answer to a known question"):
            session.token_nll(_windows())
        assert session.style is None
        session.close()


@pytest.mark.trap(39)
@pytest.mark.parametrize("seed", range(8))
def test_logits_taken_one_position_late_are_found_for_any_text(seed):
    """Trap 39: this fault passes every check of length, causality and repetition."""
    with serving(MarkovServer(styles=("echo",), fault="late-logits")) as server:
        session = _session(server)
        ids = _ids(30, seed=100 + seed)
        with pytest.raises(CapabilityError, match="shifted by one"):
            session.token_nll([WindowIds(0, ids, np.arange(1, 30))])
        session.close()


@pytest.mark.trap(20)
@pytest.mark.parametrize("style", ["prompt_logprobs", "echo"])
def test_a_cache_that_truncates_later_stops_the_run_with_the_window_named(style):
    """Trap 20: the probe was answered right, a later repeated prompt is not."""
    state = MarkovServer(styles=(style,), fault="truncating-cache", fault_after=40)
    with serving(state) as server:
        session = _session(server)
        windows = _windows()
        session.token_nll(windows)
        server.requests.extend([{}] * 40)
        with pytest.raises(ModelError, match=r"window 0 .*truncated answer"):
            session.token_nll(windows[:1])
        session.close()


def test_waits_as_long_as_retry_after_says_and_goes_on(monkeypatch):
    naps = _no_waiting(monkeypatch)
    failures = [(429, {"Retry-After": "7"}), (503, {}), (429, {"Retry-After": "900"})]
    with serving(MarkovServer(failures=failures)) as server:
        session = _session(server)
        window = _windows()[0]
        np.testing.assert_allclose(session.token_nll([window])[0], _expected(window), atol=1e-6)
        session.close()
    assert naps[0] == 7.0
    assert 0 <= naps[1] <= 30
    assert naps[2] == 30.0


def test_gives_up_after_the_stated_attempts(monkeypatch):
    _no_waiting(monkeypatch)
    with serving(MarkovServer(failures=[(503, {})] * 3)) as server:
        session = _session(server, attempts=3)
        with pytest.raises(ModelError, match="HTTP 503"):
            session.token_nll(_windows())
        session.close()


def test_no_server_is_a_stated_error(monkeypatch):
    _no_waiting(monkeypatch)
    with serving(MarkovServer()) as server:
        url = server.url
    with pytest.raises(ModelError, match="no usable answer"):
        CompletionsInferenceSession(f"completions:{url}#chain", attempts=2)


def test_a_window_beyond_the_server_s_context_is_a_stated_error():
    with serving(MarkovServer(max_model_len=30)) as server:
        session = _session(server)
        assert session.model.max_length == 30
        with pytest.raises(ModelError, match=r"HTTP 400.*maximum context length"):
            session.token_nll(_windows())
        session.close()


def test_the_key_comes_from_the_environment_and_is_kept_nowhere(monkeypatch):
    key = "secret-key-4711"
    with serving(MarkovServer(api_key=key)) as server:
        monkeypatch.setenv("OPENAI_API_KEY", "wrong")
        session = _session(server)
        with pytest.raises(ModelError, match="refuses the API key") as refused:
            session.token_nll(_windows())
        assert "wrong" not in str(refused.value)
        session.close()
        monkeypatch.setenv("PERPLEXIT_API_KEY", key)
        session = _session(server)
        session.token_nll(_windows())
        assert key not in repr((session.model, session.description))
        session.close()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("completions:127.0.0.1:8000#m", "http"),
        ("completions:http://user:secret@127.0.0.1:1/v1#m", "password"),
        ("completions:http://127.0.0.1:1/v1?api_key=secret#m", "password"),
    ],
)
def test_addresses_that_cannot_be_used_or_recorded_are_refused(address, message):
    with pytest.raises(UsageError, match=message) as refused:
        CompletionsInferenceSession(address)
    assert "secret" not in str(refused.value)


def test_an_unknown_model_names_those_there_are():
    with serving(MarkovServer()) as server:
        with pytest.raises(ModelError, match="which has chain"):
            CompletionsInferenceSession(f"completions:{server.url}#other")
        session = CompletionsInferenceSession(f"completions:{server.url.removesuffix('/v1')}")
        assert session.model.address == f"completions:{server.url}#chain"
        session.close()


def test_settings_that_the_server_decides_are_refused():
    with pytest.raises(CapabilityError, match="--dtype"):
        CompletionsInferenceSession("completions:http://127.0.0.1:1/v1#m", dtype="float16")


def test_a_run_of_a_served_model_never_holds_the_key(monkeypatch, tmp_path, byte_tokenizer_json):
    """Every file of the run, its parts included, is searched for the key."""
    text = tmp_path / "text.txt"
    text.write_text("Whoever measures twice and gets the same number. " * 20, encoding="utf-8")
    tokens = px.prepare(
        text, tokenizer=str(byte_tokenizer_json), max_length=64, output=tmp_path / "t.safetensors"
    )
    key = "secret-key-4711"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    table = np.random.default_rng(3).standard_normal((320, 320)) * 3
    logprobs = table - np.log(np.exp(table).sum(-1, keepdims=True))
    texts = [f"t{index}" for index in range(320)]
    monkeypatch.setattr("tests.markov_server.TEXTS", texts)
    with serving(MarkovServer(api_key=key, logprobs=logprobs)) as server:
        run = px.evaluate(f"completions:{server.url}#chain", tokens, run=tmp_path / "run")
    ids = np.asarray(tokens.token_ids)
    expected = -logprobs[ids[:-1], ids[1:]]
    assert run.perplexity == pytest.approx(float(np.exp(expected.mean())), rel=1e-6)
    assert run.session["engine"] == "completions (test)"
    assert len(server.requests) > tokens.num_windows
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) >= 2
    assert not [path for path in files if key.encode() in path.read_bytes()]
