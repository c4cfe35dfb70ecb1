"""Complete runs that are not: missing tokens, and what is known of some windows only."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import perplexit as px
from perplexit.cli.app import app
from perplexit.errors import RunError
from perplexit.inputs.token_file import TokenFile
from perplexit.inputs.windows import WindowIds
from perplexit.token_columns import TokenDetails
from tests.toy_sessions import BigramSession

TEXTS = [f"Document {n}: the ferry left at four, and nobody saw it come back." for n in range(6)]


@pytest.fixture(scope="module")
def tokens(byte_tokenizer_json: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenFile:
    output = tmp_path_factory.mktemp("input") / "in.safetensors"
    return px.prepare(TEXTS, tokenizer=byte_tokenizer_json, max_length=16, output=output)


def invoke(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("damage", ["missing", "another run's", "a flipped bit"])
def test_a5_a_complete_run_without_its_tokens_is_not_complete(
    tokens: TokenFile, tmp_path: Path, damage: str
) -> None:
    where = tmp_path / "run"
    first = px.evaluate(BigramSession(), tokens, run=where)
    path = where / "tokens.parquet"
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "another run's":
        px.evaluate(BigramSession(seed=1), tokens, run=tmp_path / "other")
        path.write_bytes((tmp_path / "other" / "tokens.parquet").read_bytes())
    else:
        path.write_bytes(data[:200] + bytes([data[200] ^ 1]) + data[201:])
    said = "missing" if damage == "missing" else "SHA-256 differs"
    with pytest.raises(RunError, match=said):
        px.Run.open(where).tokens  # noqa: B018 - reading them is the point
    with pytest.raises(RunError, match=said):
        px.compare(where, where)
    assert any(said in finding for finding in px.verify_run(where))
    assert invoke("runs", "verify", where)[0] == 1
    code, out, err = invoke("runs", "list", tmp_path, "--json")
    (record,) = [r for r in json.loads(out) if r["folder"] == str(where)]
    assert (code, record["status"]) == (0, "damaged")
    assert said in record["damage"]
    assert said in " ".join(err.split())
    again = BigramSession()
    second = px.evaluate(again, tokens, run=where)
    assert again.batches  # it was scored again, not returned
    np.testing.assert_array_equal(second.tokens.nll, first.tokens.nll)
    assert px.verify_run(where) == []
    assert any(said in warning for warning in second.warnings)
    once_more = BigramSession()
    px.evaluate(once_more, tokens, run=where)
    assert not once_more.batches


@pytest.mark.parametrize("gone", ["states", "head", "record"])
def test_a5_sibling_a_complete_reference_without_its_states_is_scored_again(
    tiny_llama_dir: Path, tmp_path: Path, gone: str
) -> None:
    tokens = px.prepare(
        TEXTS[:1], tokenizer=tiny_llama_dir, max_length=32, output=tmp_path / "in.safetensors"
    )
    session = px.load_session(tiny_llama_dir, quantization="q4f16_0")
    where = tmp_path / "run"
    px.evaluate(session, tokens, save_reference=True, run=where)
    pattern = {"states": "states-*", "head": "head.*", "record": "reference.json"}[gone]
    (found,) = (where / "reference").glob(pattern)
    found.unlink()
    px.evaluate(session, tokens, save_reference=True, run=where)
    kl = px.evaluate(session, tokens, reference=where).tokens.kl
    assert np.abs(kl).max() <= 1e-9


def test_a5_sibling_an_edited_record_is_not_the_measurement_it_says(
    tokens: TokenFile, tmp_path: Path
) -> None:
    px.evaluate(BigramSession(), tokens, run=tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    record = json.loads(path.read_text())
    record["session"]["dtype"] = "bfloat16"
    path.write_text(json.dumps(record))
    assert any("measurement_fingerprint" in x for x in px.verify_run(tmp_path / "run"))


class SomeDetails(BigramSession):
    """Gives entropy, rank, alternatives and divergences for even windows only."""

    def __init__(self, columns: Sequence[str], **options: Any) -> None:
        super().__init__(**options)
        self.columns = columns
        self.token_details = self._some_details

    def _some_details(self, windows: Sequence[WindowIds], *, top_k: int = 0) -> list[TokenDetails]:
        found = []
        for window, details in zip(windows, self._token_details(windows, top_k=top_k), strict=True):
            kl = {"kl": details.nll_N * 0 + 0.5, "same_top1": details.rank_N == 1}
            absent = dict.fromkeys(self.columns if window.index % 2 else ())
            found.append(TokenDetails({**details.columns, **kl, **absent}))
        return found


@pytest.mark.parametrize("batch_size", [1, 2, "auto"])
@pytest.mark.parametrize(
    "columns",
    [("entropy", "rank"), ("top_ids", "top_logprobs"), ("kl", "same_top1")],
    ids=lambda columns: columns[0],
)
def test_a5_details_of_some_windows_are_null_for_the_others(
    tokens: TokenFile, tmp_path: Path, columns: tuple[str, ...], batch_size: int | str
) -> None:
    where = tmp_path / "run"
    run = px.evaluate(SomeDetails(columns), tokens, run=where, top_k=3, batch_size=batch_size)
    whole = px.evaluate(BigramSession(), tokens, top_k=3).tokens
    odd_R = whole.window % 2 == 1
    for tokens_of in (run.tokens, px.Run.open(where).tokens):
        for name in columns:
            assert getattr(tokens_of, name) is None  # nothing takes a mean of it
            np.testing.assert_array_equal(tokens_of.partial[name].known_R, ~odd_R)
            if hasattr(whole, name) and getattr(whole, name) is not None:
                np.testing.assert_array_equal(
                    tokens_of.partial[name].values[~odd_R], getattr(whole, name)[~odd_R]
                )
    table = pq.read_table(where / "tokens.parquet")
    for name in columns:
        np.testing.assert_array_equal(table.column(name).is_null().to_numpy(), odd_R)
    assert px.verify_run(where) == []
    comparison = px.compare(where, where)
    assert comparison.divergences is None
    json.dumps(comparison.to_json(), allow_nan=False)


def test_a5_sibling_details_of_some_windows_survive_a_resume(
    tokens: TokenFile, tmp_path: Path
) -> None:
    class Stops(SomeDetails):
        def _some_details(self, windows: Any, *, top_k: int = 0) -> list[TokenDetails]:
            if len(self.batches) >= 3:
                raise KeyboardInterrupt
            return super()._some_details(windows, top_k=top_k)

    names = ("entropy", "rank")
    with pytest.raises(KeyboardInterrupt):
        px.evaluate(Stops(names), tokens, run=tmp_path / "run", batch_size=2)
    resumed = px.evaluate(SomeDetails(names), tokens, run=tmp_path / "run", batch_size=2)
    assert resumed.num_windows_resumed > 0
    odd_R = resumed.tokens.window % 2 == 1
    np.testing.assert_array_equal(resumed.tokens.partial["rank"].known_R, ~odd_R)
