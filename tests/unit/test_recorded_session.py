"""Recorded log-probabilities as a session, in its three forms, and what is refused."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perplexit.errors import CapabilityError, FingerprintMismatchError, ModelError
from perplexit.inputs.windows import WindowIds
from perplexit.sessions.loss_file import RecordedInferenceSession


def _windows(seed: int = 0, count: int = 4) -> list[WindowIds]:
    rng = np.random.default_rng(seed)
    windows = []
    for index in range(count):
        length = int(rng.integers(2, 30))
        first = int(rng.integers(1, length))
        ids = rng.integers(0, 500, length).astype(np.int32)
        windows.append(WindowIds(index, ids, np.arange(first, length)))
    return windows


def _truth(window: WindowIds) -> np.ndarray:
    return np.random.default_rng(1000 + window.index).exponential(3.0, len(window.targets_N))


def _jsonl(path, windows, *, base=1.0, first_line=None, edit=lambda record: record):
    lines = [] if first_line is None else [first_line]
    for window in windows:
        logprobs = [None] * len(window.ids_T)
        for target, nll in zip(window.targets_N, _truth(window), strict=True):
            logprobs[target] = -float(nll) / base
        record = {"window": window.index, "ids": window.ids_T.tolist(), "logprobs": logprobs}
        lines.append(edit(record))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def _table(windows) -> pa.Table:
    rows = [
        (window.index, int(t), int(window.ids_T[t]), -float(nll))
        for window in windows
        for t, nll in zip(window.targets_N, _truth(window), strict=True)
    ]
    np.random.default_rng(0).shuffle(rows)  # the order of rows means nothing
    columns = zip(*rows, strict=True)
    names = ("window", "position", "token_id", "logprob")
    return pa.table({name: list(map(float if name == "logprob" else int, column))
                     for name, column in zip(names, columns, strict=True)})  # fmt: skip


@settings(
    deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 10_000))
def test_the_three_forms_give_back_what_was_recorded(tmp_path, seed):
    windows = _windows(seed)
    paths = [_jsonl(tmp_path / "r.jsonl", windows), tmp_path / "r.parquet", tmp_path / "r.csv"]
    pq.write_table(_table(windows), paths[1])
    pa_csv.write_csv(_table(windows), paths[2])
    for path in paths:
        session = RecordedInferenceSession(path)
        for window, nll in zip(windows, session.token_nll(windows), strict=True):
            np.testing.assert_allclose(nll, _truth(window), rtol=1e-6)
            assert nll.dtype == np.float32


@pytest.mark.trap(19)
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_another_id_is_refused_with_its_place(tmp_path, form):
    """Trap 19: a recording made with the engine's own tokenizer has other ids."""
    windows = _windows()
    path = tmp_path / f"r.{form}"
    if form == "jsonl":
        _jsonl(path, windows)
    else:
        pq.write_table(_table(windows), path)
    ids = windows[2].ids_T.copy()
    ids[windows[2].targets_N[-1]] += 1
    other = WindowIds(2, ids, windows[2].targets_N)
    session = RecordedInferenceSession(path)
    session.token_nll(windows[:2])
    with pytest.raises(FingerprintMismatchError, match=r"position \d+ of window 2"):
        session.token_nll([other])


@pytest.mark.trap(19)
def test_context_ids_count_too_where_they_are_recorded(tmp_path):
    """Trap 19: same targets after another context are another measurement."""
    window = WindowIds(0, np.array([5, 6, 7], dtype=np.int32), np.array([2]))
    session = RecordedInferenceSession(_jsonl(tmp_path / "r.jsonl", [window]))
    changed = WindowIds(0, np.array([5, 9, 7], dtype=np.int32), np.array([2]))
    with pytest.raises(FingerprintMismatchError, match="id 6 at position 1"):
        session.token_nll([changed])


@pytest.mark.trap(31)
def test_missing_windows_targets_and_longer_windows_are_refused(tmp_path):
    """Trap 31: the window length must be the same on both sides."""
    window = WindowIds(0, np.arange(8, dtype=np.int32), np.arange(4, 8))
    session = RecordedInferenceSession(_jsonl(tmp_path / "r.jsonl", [window]))
    with pytest.raises(FingerprintMismatchError, match="no window 1"):
        session.token_nll([WindowIds(1, window.ids_T, window.targets_N)])
    with pytest.raises(FingerprintMismatchError, match=r"4 of 5 targets.*position 3"):
        session.token_nll([WindowIds(0, window.ids_T, np.arange(3, 8))])
    with pytest.raises(FingerprintMismatchError, match="position 7 in window 0"):
        session.token_nll([WindowIds(0, window.ids_T[:6], np.arange(4, 6))])


def test_losses_in_place_of_log_probabilities_are_refused(tmp_path):
    windows = _windows()

    def negated(record):
        record["logprobs"] = [None if x is None else -x for x in record["logprobs"]]
        return record

    session = RecordedInferenceSession(_jsonl(tmp_path / "r.jsonl", windows, edit=negated))
    with pytest.raises(ModelError, match="negate them"):
        session.token_nll(windows)


@pytest.mark.trap(23)
def test_a_recorded_nan_stays_nan_for_the_evaluation_to_name(tmp_path):
    """Trap 23: a NaN is neither dropped nor turned into a number."""
    window = WindowIds(0, np.array([5, 6, 7], dtype=np.int32), np.array([1, 2]))

    def spoiled(record):
        record["logprobs"][1] = float("nan")
        return record

    session = RecordedInferenceSession(_jsonl(tmp_path / "r.jsonl", [window], edit=spoiled))
    nll = session.token_nll([window])[0]
    assert np.isnan(nll[0])
    assert np.isfinite(nll[1])


def test_base_and_identity_come_from_the_recording(tmp_path):
    windows = _windows()
    first = {"log_base": 2, "model": {"architecture": "device-llama", "vocab_size": 500},
             "session": {"engine": "npu", "version": "3", "dtype": "int8"}}  # fmt: skip
    path = _jsonl(tmp_path / "r.jsonl", windows, base=np.log(2), first_line=first)
    session = RecordedInferenceSession(path)
    np.testing.assert_allclose(session.token_nll(windows)[0], _truth(windows[0]), rtol=1e-6)
    assert session.model.architecture == "device-llama"
    assert session.model.vocab_size == 500
    assert session.description.engine == "recorded (npu)"
    assert session.description.dtype == "int8"
    beside = tmp_path / "r.jsonl.json"
    beside.write_text(json.dumps({"model": {"weights_fingerprint": "abc"}}), encoding="utf-8")
    assert RecordedInferenceSession(path).model.weights_fingerprint == "abc"


@pytest.mark.trap(26)
def test_without_an_identity_the_file_is_its_own(tmp_path):
    """Trap 26: two recordings never share a resume key."""
    one = RecordedInferenceSession(_jsonl(tmp_path / "a.jsonl", _windows(1)))
    two = RecordedInferenceSession(_jsonl(tmp_path / "b.jsonl", _windows(2)))
    assert one.model.weights_fingerprint != two.model.weights_fingerprint


@pytest.mark.parametrize(
    "content",
    ["not json\n", '{"window": 0, "ids": [1, 2], "logprobs": [null]}\n', '{"window": 0}\n'],
)
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "r.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match="expected a recording"):
        RecordedInferenceSession(path)


def test_duplicates_and_settings_are_refused(tmp_path):
    windows = _windows()
    path = tmp_path / "r.parquet"
    pq.write_table(pa.concat_tables([_table(windows), _table(windows)]), path)
    with pytest.raises(ModelError, match="twice"):
        RecordedInferenceSession(path)
    with pytest.raises(CapabilityError, match="--dtype"):
        RecordedInferenceSession(path, dtype="float16")
