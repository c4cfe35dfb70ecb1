"""`--top-k` on what an engine elsewhere lists: completions servers and recordings, right and wrong.

Shape suffixes: N = targets of one window, K = alternatives a target.
"""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.special import log_softmax, rel_entr
from typer.testing import CliRunner

import perplexit as px
from perplexit.cli.app import app
from perplexit.errors import CapabilityError, ModelError
from perplexit.inputs.windows import WindowIds
from perplexit.sessions.base import AlternativesSession
from perplexit.sessions.completions import CompletionsInferenceSession
from perplexit.sessions.logit_rows import contradiction, most_likely_first
from perplexit.sessions.loss_file import RecordedInferenceSession
from perplexit.token_columns import TokenDetails
from tests.markov_server import ALTERNATIVES_FAULTS, VOCAB_SIZE, MarkovServer, chain, serving

STYLES = ["prompt_logprobs", "echo"]


def _windows(lengths=(40, 17, 5, 2)) -> list[WindowIds]:
    """Of ids drawn from the chain itself; the last window has no targets."""
    windows = []
    for index, length in enumerate(lengths):
        rng = np.random.default_rng(index)
        ids = [0]
        while len(ids) < length:
            ids.append(int(rng.choice(VOCAB_SIZE, p=np.exp(chain()[ids[-1]]))))
        windows.append(WindowIds(index, np.array(ids, np.int32), np.arange(1, length)[index % 2 :]))
    return windows


def _assert_the_chain_s(window: WindowIds, details: TokenDetails, k: int, *, ranks: bool) -> None:
    rows_NV = chain()[window.ids_T[window.targets_N - 1]]
    order_NK = np.argsort(-rows_NV, axis=1)[:, :k]
    own_N = rows_NV[np.arange(len(rows_NV)), window.ids_T[window.targets_N]]
    np.testing.assert_allclose(details.nll_N, -own_N, atol=1e-6)
    np.testing.assert_array_equal(details.top_ids_NK, order_NK)
    expected_NK = np.take_along_axis(rows_NV, order_NK, axis=1)
    np.testing.assert_allclose(details.top_logprobs_NK, expected_NK, atol=1e-6)
    assert details.top_ids_NK.dtype == np.int32
    assert details.top_logprobs_NK.dtype == np.float32
    assert details.entropy_N is None
    if ranks:
        np.testing.assert_array_equal(details.rank_N, (rows_NV > own_N[:, None]).sum(1) + 1)
    else:
        assert details.rank_N is None


@pytest.mark.trap(21)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("k", [1, 4, VOCAB_SIZE])
def test_a_right_server_lists_the_chain_s_own_alternatives(style: str, k: int) -> None:
    """Trap 21: they come in any order, with the prompt's own id among them or beside them."""
    with serving(MarkovServer(styles=(style,))) as server:
        session = CompletionsInferenceSession(f"{server.url}#chain")
        assert isinstance(session, AlternativesSession)
        windows = _windows()
        for window, details in zip(
            windows, session.token_alternatives(windows, top_k=k), strict=True
        ):
            _assert_the_chain_s(window, details, k, ranks=style == "prompt_logprobs")
        plain = session.token_nll(windows)
        np.testing.assert_array_equal(
            plain[0], session.token_alternatives(windows, top_k=k)[0].nll_N
        )
        session.close()


def test_a_server_that_tells_no_ranks_has_none() -> None:
    with serving(MarkovServer(styles=("prompt_logprobs",), tells_ranks=False)) as server:
        session = CompletionsInferenceSession(f"{server.url}#chain")
        window = _windows()[0]
        _assert_the_chain_s(
            window, session.token_alternatives([window], top_k=3)[0], 3, ranks=False
        )
        session.close()


MESSAGES = {
    "shifted": (ModelError, "alternatives at position .* hold"),
    "fewer": (CapabilityError, "gives [34] alternatives at position 1 where [45] were asked for"),
    "other-numbers": (CapabilityError, "asking for [45] alternatives changes"),
    "improper": (ModelError, "alternatives at position .* hold"),
    "texts": (CapabilityError, "does not tell which id"),
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("fault", ALTERNATIVES_FAULTS)
def test_alternatives_that_cannot_be_right_are_refused(style: str, fault: str) -> None:
    if style == "prompt_logprobs" and fault == "fewer":
        pytest.skip("the prompt's own id, listed beside them, makes up for one")
    with serving(MarkovServer(styles=(style,), alternatives_fault=fault)) as server:
        session = CompletionsInferenceSession(f"{server.url}#chain")
        windows = _windows()
        session.token_nll(windows)  # its losses are right
        error, message = MESSAGES[fault]
        with pytest.raises(error, match=message):
            session.token_alternatives(windows, top_k=5)
        session.close()


@pytest.mark.parametrize("style", STYLES)
def test_more_than_the_server_allows_is_refused_with_what_to_do(style: str) -> None:
    with serving(MarkovServer(styles=(style,), max_alternatives=5)) as server:
        session = CompletionsInferenceSession(f"{server.url}#chain")
        with pytest.raises(CapabilityError, match=r"--top-k 6.*HTTP 400.*--max-logprobs"):
            session.token_alternatives(_windows(), top_k=6)
        assert len(session.token_alternatives(_windows(), top_k=5)) == 4
        session.close()


@pytest.mark.parametrize("style", STYLES)
def test_a_server_that_fails_for_a_while_is_not_one_that_cannot(style: str, monkeypatch) -> None:
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)
    with serving(MarkovServer(styles=(style,))) as server:
        session = CompletionsInferenceSession(f"{server.url}#chain", attempts=2)
        session.token_nll(_windows())
        server.failures.extend([(503, {})] * 2)
        with pytest.raises(ModelError, match="HTTP 503"):
            session.token_alternatives(_windows(), top_k=4)
        session.close()


def _log_table(size: int, seed: int = 3) -> np.ndarray:
    return log_softmax(np.random.default_rng(seed).standard_normal((size, size)) * 3, axis=-1)


@pytest.fixture
def tokens(tmp_path: Path, byte_tokenizer_json: Path) -> px.TokenFile:
    text = tmp_path / "text.txt"
    text.write_text("Whoever measures twice and gets the same number. " * 20, encoding="utf-8")
    output = tmp_path / "in.safetensors"
    return px.prepare(text, tokenizer=str(byte_tokenizer_json), max_length=64, output=output)


@pytest.mark.parametrize("style", STYLES)
def test_the_command_makes_of_a_server_a_reference_with_bounds_around_the_true_kl(
    style: str, tokens: px.TokenFile, tmp_path: Path, monkeypatch, tiny_llama_dir: Path
) -> None:
    """`eval completions:URL --top-k K`, then a candidate in PyTorch against it."""
    table_VV = _log_table(320)
    monkeypatch.setattr("tests.markov_server.TEXTS", [f"t{index}" for index in range(320)])
    server = MarkovServer(styles=(style,), logprobs=table_VV, max_alternatives=320)
    with serving(server):
        address = f"completions:{server.url}#chain"
        words = ["eval", address, str(tmp_path / "in.safetensors"), "--top-k"]
        done = CliRunner().invoke(app, [*words, "12", "--run", str(tmp_path / "served")])
        assert done.exit_code == 0, done.output
        more = CliRunner().invoke(app, [*words, "321", "--run", str(tmp_path / "more")])
        assert more.exit_code == 1
        assert "--max-logprobs" in " ".join(more.output.split())
    run = px.evaluate(tiny_llama_dir, tokens, reference=tmp_path / "served", run=tmp_path / "own")
    assert run.reference["kind"] == "top 12 and a tail"
    session = px.load_session(f"hf:{tiny_llama_dir}")
    expected = np.empty(len(run.tokens.nll))
    for index in range(tokens.num_windows):
        window = tokens.window_ids(index)
        chunks = session.target_logits([window], chunk_rows=1000)
        candidate_NV = np.concatenate([chunk.logits_NV.astype(np.float64) for chunk in chunks])
        p_NV = np.exp(table_VV[window.ids_T[window.targets_N - 1]])
        q_NV = np.exp(log_softmax(candidate_NV, axis=-1))
        expected[run.tokens.window == index] = rel_entr(p_NV, q_NV).sum(-1)
    assert (run.tokens.kl <= expected * (1 + 1e-5) + 1e-5).all()
    assert (run.tokens.kl_high >= expected * (1 - 1e-5) - 1e-5).all()
    assert run.tokens.kl.mean() > 0.3 * expected.mean()
    comparison = px.compare(tmp_path / "served", tmp_path / "own")
    assert comparison.figures()["mean_kl"].value <= expected.mean()
    assert comparison.figures()["mean_kl_high"].value >= expected.mean()
    assert "top1_agreement" in comparison.figures()


def test_what_a_served_model_cannot_be_says_what_it_can(
    tokens: px.TokenFile, tiny_llama_dir: Path
) -> None:
    with serving(MarkovServer()) as server:
        address = f"completions:{server.url}#chain"
        for options in ({"reference": f"hf:{tiny_llama_dir}"}, {"save_reference": True}):
            with pytest.raises(CapabilityError, match=r"Let it be the reference.*--top-k 20"):
                px.evaluate(address, tokens, **options)
        assert not [request for request in server.requests if "prompt" in request]


def _record(path: Path, windows: list[WindowIds], k: int, *, edit=None, base: float = 1.0) -> Path:
    """A recording of the chain with its k most likely ids, the least likely first."""
    lines, rows = [{"log_base": 2 if base != 1.0 else "e"}], []
    for window in windows:
        ids = window.ids_T.tolist()
        lists = [np.argsort(-chain()[a])[:k][::-1].tolist() for a in ids[:-1]]
        record = {
            "window": window.index,
            "ids": ids,
            "logprobs": [None, *(float(chain()[a, b]) / base for a, b in pairwise(ids))],
            "top_ids": [None, *lists],
            "top_logprobs": [
                None, *((chain()[a][x] / base).tolist() for a, x in zip(ids, lists, strict=False))
            ],
        }  # fmt: skip
        if edit is not None:
            edit(record)
        lines.append(record)
        for i in range(1, len(ids)):
            values = [record[x][i] for x in ("logprobs", "top_ids", "top_logprobs")]
            rows.append((window.index, i, ids[i], *values))
    if path.suffix == ".parquet":
        np.random.default_rng(0).shuffle(rows)
        names = ("window", "position", "token_id", "logprob", "top_ids", "top_logprobs")
        columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
        identity = {b"perplexit": json.dumps(lines[0]).encode()}
        pq.write_table(pa.table(columns).replace_schema_metadata(identity), path)
    else:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("base", [1.0, np.log(2)])
def test_recorded_alternatives_are_given_back_in_order(tmp_path, form, base) -> None:
    windows = _windows()
    session = RecordedInferenceSession(_record(tmp_path / f"r.{form}", windows, 6, base=base))
    for k in (1, 6):
        found = session.token_alternatives(windows, top_k=k)
        for window, details in zip(windows, found, strict=True):
            _assert_the_chain_s(window, details, k, ranks=False)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_lists_of_unequal_length_give_as_many_as_the_shortest(tmp_path, form) -> None:
    """A server's dump lists the prompt's own id where it is not among the most likely."""

    def lengthened(record) -> None:
        row = chain()[record["ids"][2]]
        order = np.argsort(-row)[:8].tolist()
        record["top_ids"][3], record["top_logprobs"][3] = order, row[order].tolist()

    windows = _windows((40, 17))
    path = _record(tmp_path / f"r.{form}", windows, 6, edit=lengthened)
    session = RecordedInferenceSession(path)
    _assert_the_chain_s(windows[0], session.token_alternatives(windows, top_k=6)[0], 6, ranks=False)
    with pytest.raises(CapabilityError, match=r"--top-k 7\).*lists 6"):
        session.token_alternatives(windows, top_k=7)


def test_a_recording_without_alternatives_says_so(tmp_path: Path) -> None:
    def bare(record) -> None:
        del record["top_ids"], record["top_logprobs"]

    windows = _windows()
    path = tmp_path / "r.jsonl"
    _record(path, windows, 3)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines[1:]:
        bare(line)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(CapabilityError, match="lists 0"):
        RecordedInferenceSession(path).token_alternatives(windows, top_k=1)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_recorded_alternatives_of_another_position_are_refused(tmp_path, form) -> None:
    def shifted(record) -> None:
        for name in ("top_ids", "top_logprobs"):
            record[name] = [None, *record[name][2:], record[name][1]]

    windows = _windows()
    session = RecordedInferenceSession(_record(tmp_path / f"r.{form}", windows, 4, edit=shifted))
    session.token_nll(windows)
    with pytest.raises(ModelError, match=r"alternatives of the target's own.*window 0"):
        session.token_alternatives(windows, top_k=4)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_lists_that_do_not_stand_in_pairs_are_no_recording(tmp_path, form) -> None:
    def odd(record) -> None:
        record["top_ids"][1] = record["top_ids"][1][:-1]

    path = _record(tmp_path / f"r.{form}", _windows(), 4, edit=odd)
    with pytest.raises(ModelError, match="stand in pairs"):
        RecordedInferenceSession(path)


def _top(ids: list[int], probabilities: list[float]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([ids], np.int32), np.log(np.array([probabilities], np.float32))


@pytest.mark.parametrize(
    ("own", "top", "problem"),
    [
        (0.6, _top([1, 2], [0.6, 0.2]), None),
        (0.1, _top([5, 2], [0.6, 0.2]), None),
        (0.2, _top([5, 2], [0.6, 0.2]), None),  # a tie at the edge
        (0.5, _top([1, 2], [0.6, 0.2]), "another log-probability"),
        (0.3, _top([5, 2], [0.6, 0.2]), "less likely tokens"),
        (0.1, _top([5, 2], [0.6, 0.5]), "more than 1"),
        (0.1, _top([5, 5], [0.6, 0.2]), "twice"),
        (0.1, _top([5, 2], [0.6, float("nan")]), "without a number"),
    ],
)
def test_what_contradicts_a_distribution_is_named(own, top, problem) -> None:
    found = contradiction(np.array([1]), np.log(np.array([own])), top, slack=1e-3)
    assert (found is None) == (problem is None)
    if problem:
        assert found[0] == 0
        assert problem in found[1]


def test_most_likely_first_orders_and_cuts() -> None:
    ids, logprobs = most_likely_first(np.array([[4, 7, 9]]), np.array([[-3.0, -0.5, -1.0]]), 2)
    assert ids.tolist() == [[7, 9]]
    assert logprobs.tolist() == [[-0.5, -1.0]]
