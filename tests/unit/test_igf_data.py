"""Articles, splits, contexts, stored files: stable, disjoint, and no pickle unless asked for."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from perplexit.errors import CorpusError, OutputError, PerplexitError, TrustWarning, UsageError
from perplexit.igf.articles import Articles, read_articles
from perplexit.igf.pairs import GainStatistics, Pairs, load, pairs_of
from perplexit.igf.random_contexts import ContextStream, check_disjoint, objective_contexts
from perplexit.igf.tensors_with_record import StoredFileError, TensorFile, tensor_path

joblib = pytest.importorskip("joblib")


def read(path: Path, kind: str) -> tuple[dict, dict]:
    with TensorFile(kind).opened(path) as found:
        return found


def articles(count: int = 60, length: int = 80, seed: int = 0) -> Articles:
    random = np.random.default_rng(seed)
    return Articles.of([random.integers(0, 300, length + i) for i in range(count)])


def test_the_three_splits_are_disjoint_and_complete() -> None:
    everything = articles()
    parts = [everything.split(part) for part in ("train", "objective", "test")]
    check_disjoint(train=parts[0], objective=parts[1], test=parts[2])
    assert sum(map(len, parts)) == len(everything)
    assert min(map(len, parts)) > 3


def test_an_article_stays_in_its_split_when_others_come_and_go() -> None:
    everything = articles()
    for part in ("train", "objective", "test"):
        whole = set(everything.split(part).fingerprints().tolist())
        fewer = set(everything.take(range(0, 60, 2)).split(part).fingerprints().tolist())
        assert fewer <= whole


def test_copies_of_an_article_are_never_in_two_splits() -> None:
    twice = Articles.of([*articles().ids, *articles().ids])
    parts = {part: twice.split(part) for part in ("train", "objective", "test")}
    check_disjoint(**parts)


def test_an_article_in_two_sets_is_a_leak() -> None:
    everything = articles(4)
    with pytest.raises(CorpusError, match="both in train and in test"):
        check_disjoint(train=everything, test=everything.take([2]))


def test_text_is_one_article_a_document(byte_tokenizer_json: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"The text of {name}, which is measured. " * 3)
    found = read_articles(tmp_path, byte_tokenizer_json)
    assert found.names == ("a.txt", "b.txt")
    assert len(found) == 2
    assert found.ids[0].dtype == np.int32
    with pytest.raises(UsageError, match="expected a tokenizer"):
        read_articles(tmp_path)


def test_articles_come_back_from_their_file(tmp_path: Path) -> None:
    kept = articles(5)
    path = kept.save(tmp_path / "articles.safetensors")
    found = Articles.open(path)
    assert found.names == kept.names
    assert all(np.array_equal(a, b) for a, b in zip(found.ids, kept.ids, strict=True))


@given(start=st.integers(0, 2000), count=st.integers(1, 600), seed=st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_a_stream_is_the_same_however_it_is_taken(start: int, count: int, seed: int) -> None:
    stream = ContextStream(articles(5), 16, seed)
    whole = stream.take(start, count)
    cut = count // 2
    if cut:
        first, second = stream.take(start, cut), stream.take(start + cut, count - cut)
        assert np.array_equal(np.concatenate([first.ids_NT, second.ids_NT]), whole.ids_NT)
    assert whole.ids_NT.shape == (count, 16)
    known = {
        a.tobytes()
        for ids in articles(5).ids
        for a in np.lib.stride_tricks.sliding_window_view(ids, 16)
    }
    assert {row.tobytes() for row in whole.ids_NT} <= known


def test_the_last_window_of_an_article_can_be_drawn() -> None:
    only = Articles.of([np.arange(17)])
    firsts = set(ContextStream(only, 16, 0).take(0, 64).ids_NT[:, 0].tolist())
    assert firsts == {0, 1}


def test_seeds_give_different_contexts() -> None:
    one, two = (ContextStream(articles(5), 16, seed).take(0, 50).ids_NT for seed in (0, 1))
    assert not np.array_equal(one, two)


def test_the_objective_is_one_context_an_article_as_far_as_they_go() -> None:
    found = objective_contexts(articles(10, 100), number=8, length=32, min_len=100)
    assert len(set(found.article_N.tolist())) == 8
    assert found.ids_NT.shape == (8, 32)
    again = objective_contexts(articles(10, 100), number=25, length=32, min_len=100)
    counts = np.unique(again.article_N, return_counts=True)[1]
    assert len(counts) == 9  # the first has exactly min_len ids, which is not longer
    assert counts.max() - counts.min() <= 1


def test_articles_that_are_all_too_short_are_refused() -> None:
    with pytest.raises(CorpusError, match="longer than 5000 ids"):
        objective_contexts(articles(4), min_len=5000)


@pytest.mark.parametrize(
    "bad", [[np.array([1.5, 2.0])], [np.array([-1, 2])], [np.zeros((2, 3), int)]]
)
def test_articles_are_rows_of_ids(bad: list[np.ndarray]) -> None:
    with pytest.raises(CorpusError):
        Articles.of(bad)


# --- pickles ---------------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [0, 3])
def test_the_originals_joblib_files_are_read(tmp_path: Path, compress: int) -> None:
    stories = [np.arange(2000).reshape(1, -1), np.arange(1500, dtype=np.int32).reshape(1, -1)]
    path = tmp_path / "stories.jbl"
    joblib.dump(stories, path, compress=compress)
    with pytest.warns(TrustWarning, match="full rights"):
        found = read_articles(path, allow_pickle=True)
    assert all(np.array_equal(a, b[0]) for a, b in zip(found.ids, stories, strict=True))


def _dumped(folder: Path, content: object) -> Path:
    joblib.dump(content, folder / "content.jbl")
    return folder / "content.jbl"


def test_pairs_of_the_original_are_read_with_numpy_scalars(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    items = [(random.integers(0, 99, (1, 32)), np.float64(i / 7)) for i in range(9)]
    with pytest.warns(TrustWarning):
        found = load(_dumped(tmp_path, items), allow_pickle=True)
    assert found.ids_NT.shape == (9, 32)
    assert found.gain_nats_N == pytest.approx([i / 7 for i in range(9)])
    plain = tmp_path / "plain.pkl"
    plain.write_bytes(pickle.dumps(items))
    with pytest.warns(TrustWarning):
        assert np.array_equal(load(plain, allow_pickle=True).ids_NT, found.ids_NT)


def test_no_pickle_is_read_unless_asked_for_by_name(tmp_path: Path) -> None:
    path = _dumped(tmp_path, [np.arange(50).reshape(1, -1)])
    with pytest.raises(UsageError, match="--allow-pickle"):
        read_articles(path)
    with pytest.raises(UsageError, match="--allow-pickle"):
        load(path)


# --- stored files ----------------------------------------------------------------------------


def test_a_pickles_name_is_written_as_safetensors(tmp_path: Path) -> None:
    path = TensorFile("things").write(tmp_path / "pairs.jbl", {"a": np.arange(3)}, {"b": 1})
    assert path.name == "pairs.safetensors"
    assert not (tmp_path / "pairs.jbl").exists()
    assert tensor_path("x/model.pt").name == "model.safetensors"
    tensors, record = read(tmp_path / "pairs.jbl", "things")
    assert (tensors["a"].tolist(), record["b"]) == ([0, 1, 2], 1)


def test_another_kind_or_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = TensorFile("things").write(tmp_path / "a.safetensors", {"a": np.arange(3)}, {})
    with pytest.raises(StoredFileError, match="expected pairs"):
        read(path, "pairs")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(StoredFileError, match="make it again"):
        read(path, "things")
    with pytest.raises(PerplexitError, match="no such file"):
        read(tmp_path / "none.safetensors", "things")


def test_a_file_whose_record_has_blanks_as_older_ones_do_is_one_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    record = json.dumps({"kind": "things", "version": 1, "b": [1, 2]}, sort_keys=True)
    save_file({"a": np.arange(3)}, path, metadata={"perplexit": record})
    assert read(path, "things")[1]["b"] == [1, 2]
    TensorFile("things").write(path, {"a": np.arange(4)}, {})
    assert read(path, "things")[0]["a"].tolist() == [0, 1, 2, 3]
    with pytest.raises(OutputError, match="something else"):
        TensorFile("others").write(path, {"a": np.arange(4)}, {})


def test_pairs_come_back_raw_with_their_statistics(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    pairs = Pairs(
        random.integers(0, 9, (6, 4)).astype(np.int32),
        np.arange(6),
        random.normal(size=6),
        random.normal(size=6),
        {"mode": "exact"},
    )
    found = Pairs.open(pairs.save(tmp_path / "pairs.safetensors"))
    assert np.array_equal(found.gain_nats_N, pairs.gain_nats_N)
    statistics = found.record["statistics"]["perplexity"]
    assert statistics["mean"] == pytest.approx(pairs.gain_perplexity_N.mean())
    assert statistics["std"] == pytest.approx(pairs.gain_perplexity_N.std())
    z = np.array([gain for _, gain in found])
    assert (z.mean(), z.std()) == (pytest.approx(0, abs=1e-12), pytest.approx(1))


def test_gains_that_do_not_vary_cannot_be_normalised() -> None:
    with pytest.raises(UsageError, match="collect more pairs"):
        GainStatistics.of(np.ones(4))
    with pytest.raises(StoredFileError, match="pairs of a context"):
        pairs_of([1, 2, 3])
