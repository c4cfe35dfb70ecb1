"""The window generators against dull loops written from the protocols' definitions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perplexit.inputs.protocol_table import mlc_windows, qefficient_windows
from perplexit.inputs.windows import (
    COLUMNS,
    PrefixMode,
    WindowTable,
    disjoint_windows,
    document_windows,
    sliding_windows,
)

BOS = "B"
BOS_ID = 7
lengths = st.lists(st.integers(0, 70), min_size=1, max_size=4)
policies = st.sampled_from(["none", "first", "every"])


def as_fed(table):
    """Each row as (document, what is fed: token indices or BOS, the token indices scored)."""
    rows = []
    for window in WindowTable(table):
        fed = list(range(window.start, window.stop))
        if window.prefix_mode is PrefixMode.INSERT:
            assert window.prefix_id == BOS_ID
            fed = [BOS, *fed]
        else:
            assert window.prefix_mode is PrefixMode.NONE
            assert window.prefix_id == -1
        rows.append((window.document, fed, list(range(window.target_start, window.target_stop))))
    return rows


def sequence(length, bos):
    """The ids of a document as the policy `first` sees them."""
    return [BOS, *range(length)] if bos == "first" and length else list(range(length))


def dull_sliding(lengths, max_length, stride, bos):
    rows = []
    for document, length in enumerate(lengths):
        ids = sequence(length, bos)
        prefix = [BOS] if bos == "every" else []
        room = max_length - len(prefix)
        scored = set() if prefix else set(ids[:1])  # nothing predicts the first id
        start = 0
        while any(token not in scored for token in ids):
            stop = min(start + room, len(ids))
            if stop == len(ids):
                start = max(0, stop - room)
            window = ids[start:stop]
            targets = [token for token in window if token not in scored]
            rows.append((document, prefix + window, targets))
            scored.update(targets)
            start += min(stride, max_length - 1)
    return rows


def dull_disjoint(lengths, max_length, bos, keep_tail=True):
    rows = []
    for document, length in enumerate(lengths):
        ids = sequence(length, bos)
        prefix = [BOS] if bos == "every" else []
        room = max_length - len(prefix)
        for start in range(0, len(ids), room):
            fed = prefix + ids[start : start + room]
            if len(fed) >= 2 and (keep_tail or len(fed) == max_length):
                rows.append((document, fed, fed[1:]))
    return rows


def dull_overlapping(lengths, max_length, stride, bos, *, tails):
    rows = []
    for document, length in enumerate(lengths):
        ids = sequence(length, bos)
        last = len(ids) if tails else len(ids) - max_length + 1
        for start in range(0, last, stride):
            fed = ids[start : start + max_length]
            if len(fed) >= 2:
                rows.append((document, fed, fed[1:]))
    return rows


@st.composite
def frames(draw):
    max_length = draw(st.integers(2, 20))
    return max_length, draw(st.integers(1, max_length))


@settings(deadline=None)
@given(lengths, frames(), policies)
def test_sliding_equals_the_dull_loop(lengths, frame, bos):
    max_length, stride = frame
    table = sliding_windows(lengths, max_length=max_length, stride=stride, bos=bos, bos_id=BOS_ID)
    assert as_fed(table) == dull_sliding(lengths, max_length, stride, bos)


@settings(deadline=None)
@given(lengths, frames(), st.booleans(), policies)
def test_disjoint_equals_the_dull_loop(lengths, frame, keep_tail, bos):
    table = disjoint_windows(
        lengths, max_length=frame[0], bos=bos, bos_id=BOS_ID, keep_tail=keep_tail
    )
    assert as_fed(table) == dull_disjoint(lengths, frame[0], bos, keep_tail)


@settings(deadline=None)
@given(lengths, frames(), st.sampled_from(["none", "first"]))
def test_qefficient_equals_the_dull_loop(lengths, frame, bos):
    max_length, stride = frame
    table = qefficient_windows(
        lengths, max_length=max_length, stride=stride, bos=bos, bos_id=BOS_ID
    )
    assert as_fed(table) == dull_overlapping(lengths, max_length, stride, bos, tails=False)


@settings(deadline=None)
@given(lengths, frames(), st.sampled_from(["none", "first"]))
def test_mlc_equals_the_dull_loop(lengths, frame, bos):
    max_length, stride = frame
    table = mlc_windows(lengths, max_length=max_length, stride=stride, bos=bos, bos_id=BOS_ID)
    assert as_fed(table) == dull_overlapping(lengths, max_length, stride, bos, tails=True)


@settings(deadline=None)
@given(lengths, policies)
def test_document_is_one_window_a_document(lengths, bos):
    rows = as_fed(document_windows(lengths, bos=bos, bos_id=BOS_ID))
    expected = []
    for document, length in enumerate(lengths):
        fed = list(range(length)) if bos == "none" else [BOS, *range(length)]
        if len(fed) >= 2 and length:
            expected.append((document, fed, fed[1:]))
    assert rows == expected


@pytest.mark.trap(7)
@pytest.mark.trap(8)
@settings(deadline=None)
@given(lengths, frames(), policies)
def test_trap_7_and_8_sliding_scores_each_target_exactly_once(lengths, frame, bos):
    """Bitmap of scored positions: all of a document but (without a BOS) its first id, each once."""
    max_length, stride = frame
    table = sliding_windows(lengths, max_length=max_length, stride=stride, bos=bos, bos_id=BOS_ID)
    for document, length in enumerate(lengths):
        times = np.zeros(length, dtype=int)
        for found, _, targets in as_fed(table):
            if found == document:
                times[targets] += 1
        expected = np.ones(length, dtype=int)
        if bos == "none":
            expected[:1] = 0
        np.testing.assert_array_equal(times, expected)
    counted = int((table[:, 4] - table[:, 3]).sum())
    assert counted == sum(max(0, n - (bos == "none")) for n in lengths)


@settings(deadline=None)
@given(lengths, frames(), policies)
def test_windows_fit_and_have_context_before_every_target(lengths, frame, bos):
    max_length, stride = frame
    options = {"max_length": max_length, "bos": bos, "bos_id": BOS_ID}
    for table in (
        sliding_windows(lengths, stride=stride, **options),
        disjoint_windows(lengths, **options),
    ):
        for _, fed, targets in as_fed(table):
            assert 2 <= len(fed) <= max_length
            assert targets
            assert fed[-len(targets) :] == targets  # targets end the window
            assert len(fed) > len(targets)  # something stands before the first


@settings(deadline=None)
@given(lengths, frames(), policies)
def test_the_last_sliding_window_is_full_length_where_the_document_allows(lengths, frame, bos):
    max_length, stride = frame
    table = sliding_windows(lengths, max_length=max_length, stride=stride, bos=bos, bos_id=BOS_ID)
    last = {document: fed for document, fed, _ in as_fed(table)}
    for document, fed in last.items():
        assert fed[-1] == lengths[document] - 1
        possible = lengths[document] + (bos != "none")
        assert len(fed) == min(max_length, possible)


@pytest.mark.trap(2)
@settings(deadline=None)
@given(lengths, frames())
def test_trap_2_bos_every_stands_before_every_window(lengths, frame):
    max_length, stride = frame
    options = {"max_length": max_length, "bos": "every", "bos_id": BOS_ID}
    for table in (
        sliding_windows(lengths, stride=stride, **options),
        disjoint_windows(lengths, **options),
    ):
        assert all(fed[0] == BOS and fed.count(BOS) == 1 for _, fed, _ in as_fed(table))


@pytest.mark.trap(2)
@settings(deadline=None)
@given(lengths, frames())
def test_trap_2_bos_first_stands_before_each_document_once(lengths, frame):
    max_length, stride = frame
    table = sliding_windows(
        lengths, max_length=max_length, stride=stride, bos="first", bos_id=BOS_ID
    )
    fed_by_document = {}
    for document, fed, _ in as_fed(table):
        fed_by_document.setdefault(document, []).append(fed)
    for windows in fed_by_document.values():
        assert windows[0][0] == BOS
        # a window of the whole document may start there too: it is then the only one
        assert [BOS in fed for fed in windows[1:]] == [False] * (len(windows) - 1)


@pytest.mark.trap(30)
def test_trap_30_the_short_tail_is_a_window_of_its_own_length():
    table = disjoint_windows([10], max_length=4)
    assert as_fed(table) == [
        (0, [0, 1, 2, 3], [1, 2, 3]),
        (0, [4, 5, 6, 7], [5, 6, 7]),
        (0, [8, 9], [9]),
    ]
    assert (table[:, 4] - table[:, 3]).tolist() == [3, 3, 1]


def test_a_known_sliding_table():
    table = sliding_windows([10, 1, 0, 3], max_length=6, stride=3)
    assert table.tolist() == [
        [0, 0, 6, 1, 6, 0, -1],
        [0, 3, 9, 6, 9, 0, -1],
        [0, 4, 10, 9, 10, 0, -1],
        [3, 0, 3, 1, 3, 0, -1],
    ]
    assert table.dtype == np.int64


def test_the_table_reads_by_row_and_by_column():
    table = WindowTable(
        disjoint_windows([5, 3], max_length=3, bos="first", bos_id=BOS_ID),
    )
    assert len(table) == 3
    assert table[0].prefix_mode is PrefixMode.INSERT
    for name in COLUMNS:
        column = table.array[:, COLUMNS.index(name)]
        np.testing.assert_array_equal(column, getattr(table, name))
        assert column.tolist() == [int(getattr(row, name)) for row in table]
    assert table.fed_lengths().tolist() == [3, 3, 3]


def test_no_documents_and_empty_documents_give_an_empty_table():
    for lengths in ([], [0], [0, 1]):
        assert sliding_windows(lengths, max_length=4, stride=2).shape == (0, 7)
        assert disjoint_windows(lengths, max_length=4).shape == (0, 7)
        assert mlc_windows(lengths, max_length=4, stride=2).shape == (0, 7)
