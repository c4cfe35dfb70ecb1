"""Protocols: options settled or refused, other tools' windows, own aggregates."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perplexit.errors import EmptyScoreError, UsageError
from perplexit.inputs.protocol_table import PROTOCOLS
from perplexit.inputs.protocols import protocol_perplexity, resolve_protocol
from perplexit.inputs.windows import PrefixMode, WindowTable

BOS_ID, EOS_ID = 7, 8
TOKENS = {"bos_id": BOS_ID, "eos_id": EOS_ID}


def as_fed(table):
    """Each row as (ids fed: token indices or "P", token indices scored)."""
    rows = []
    for window in WindowTable(table):
        fed = list(range(window.start, window.stop))
        if window.prefix_mode is PrefixMode.INSERT:
            fed = ["P", *fed]
        elif window.prefix_mode is PrefixMode.OVERWRITE:
            fed = ["P", *fed[1:]]
        rows.append((fed, list(range(window.target_start, window.target_stop))))
    return rows


# --- options ---------------------------------------------------------------------------------


def test_defaults():
    found = {
        name: (plan.max_length, plan.stride, plan.bos, plan.joined_with, plan.aggregate)
        for name in PROTOCOLS
        for plan in [resolve_protocol(name, **TOKENS)]
    }
    assert found == {
        "sliding": (1024, 512, "none", None, "tokens"),
        "disjoint": (1024, None, "none", None, "tokens"),
        "document": (None, None, "none", None, "tokens"),
        "qefficient": (2048, 1024, "none", "\n\n", "tokens"),
        "mlc": (256, 128, "none", "\n\n", "window-means"),
        "hf-guide": (1024, 512, "none", "\n\n", "hf-guide"),
        "hf-evaluate": (1024, None, "first", None, "window-perplexities"),
        "lm-eval": (2048, None, "first", None, "tokens"),
        "llama-cpp": (512, None, "none", "\n\n", "tokens"),
        "gptq-2048": (2048, None, "none", "\n\n", "tokens"),
        "vllm": (1023, None, "none", "\n\n", "tokens"),
    }
    assert all(entry.name == name for name, entry in PROTOCOLS.items())
    assert {name for name, entry in PROTOCOLS.items() if entry.version != 1} == {"lm-eval"}


def test_auto_follows_the_tokenizer():
    assert resolve_protocol("sliding", **TOKENS).prefix_id == -1
    plan = resolve_protocol("sliding", added_prefix_id=5, **TOKENS)
    assert (plan.bos, plan.prefix_id) == ("first", 5)


@pytest.mark.trap(4)
def test_trap_4_eos_is_never_the_prefix_unless_the_protocol_says_so():
    """BOS ≠ EOS: the BOS is taken; without a BOS the answer is an error, never the EOS."""
    for policy in ("first", "every"):
        assert resolve_protocol("sliding", bos=policy, **TOKENS).prefix_id == BOS_ID
        with pytest.raises(UsageError, match="needs a tokenizer with a BOS token"):
            resolve_protocol("sliding", bos=policy, bos_id=None, eos_id=EOS_ID)
    with pytest.raises(UsageError, match="needs a tokenizer with a BOS token"):
        resolve_protocol("hf-evaluate", bos_id=None, eos_id=EOS_ID)
    assert resolve_protocol("lm-eval", bos_id=BOS_ID, eos_id=EOS_ID).prefix_id == BOS_ID
    assert resolve_protocol("lm-eval", bos_id=None, eos_id=EOS_ID).prefix_id == EOS_ID


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("slidng", {}, "Unknown protocol 'slidng'. Known: sliding, disjoint"),
        ("sliding", {"max_length": 1}, "at least 2"),
        ("sliding", {"max_length": 8, "stride": 9}, "between 1 and max_length = 8, got 9"),
        ("sliding", {"stride": 0}, "between 1 and max_length"),
        ("sliding", {"stride": -3}, "between 1 and max_length"),
        ("sliding", {"bos": "always"}, "bos must be one of auto, none, first, every"),
        ("disjoint", {"stride": 4}, "has no stride"),
        ("document", {"stride": 4}, "has no stride"),
        ("qefficient", {"bos": "every"}, "allows bos none, first or auto"),
        ("mlc", {"bos": "every"}, "allows bos none, first or auto"),
        ("lm-eval", {"bos": "none"}, "allows bos first or auto"),
        ("llama-cpp", {"stride": 256}, "has no stride"),
        ("gptq-2048", {"max_length": 1024}, "fixes max_length = 2048"),
    ],
)
def test_options_that_contradict_are_refused(name, options, message):
    with pytest.raises(UsageError, match=message):
        resolve_protocol(name, **options, **TOKENS)


def test_a_document_longer_than_its_one_window_is_refused_with_the_way_out():
    plan = resolve_protocol("document", max_length=8)
    assert len(plan.windows([8, 3])) == 2
    with pytest.raises(UsageError, match=r"document 12 needs 9.*'sliding'"):
        plan.windows([8, 3, 9], first_document=10)
    with_bos = resolve_protocol("document", max_length=8, bos="first", **TOKENS)
    with pytest.raises(UsageError, match="document 0 needs 9"):
        with_bos.windows([8])


@pytest.mark.trap(3)
@pytest.mark.parametrize(
    ("name", "bos"),
    [
        (name, bos)
        for name in ("sliding", "disjoint", "document", "mlc", "lm-eval")
        for bos in PROTOCOLS[name].bos
        if bos != "none"
    ],
)
def test_trap_3_a_document_with_a_bos_of_its_own_is_fed_one(name, bos):
    """Its windows leave its own BOS out and insert the protocol's: ids as if there were one."""
    plan = resolve_protocol(name, max_length=6 if name != "document" else None, bos=bos, **TOKENS)
    own = plan.windows([10, 10], own_bos_D=[True, False])
    plain = plan.windows([9, 10])
    np.testing.assert_array_equal(own[:, [0, 5, 6]], plain[:, [0, 5, 6]])
    of_first = own[:, 0] == 0
    np.testing.assert_array_equal(own[of_first, 1:5] - 1, plain[of_first, 1:5])
    np.testing.assert_array_equal(own[~of_first], plain[~of_first])
    assert own[of_first, 1].min() == 1
    # without a BOS policy the document's own is context like any other id
    none = resolve_protocol("sliding", max_length=6, bos="none", **TOKENS)
    np.testing.assert_array_equal(none.windows([10], own_bos_D=[True]), none.windows([10]))


def test_documents_are_numbered_from_the_first():
    plan = resolve_protocol("sliding", max_length=6)
    assert plan.windows([5, 5], first_document=40)[:, 0].tolist() == [40, 41]


def test_the_record_holds_every_option():
    plan = resolve_protocol("sliding", max_length=64, bos="every", **TOKENS)
    assert plan.to_json() == {
        "name": "sliding",
        "version": 1,
        "max_length": 64,
        "stride": 32,
        "bos": "every",
        "prefix_id": BOS_ID,
        "joined_with": None,
        "aggregate": "tokens",
    }


# --- other tools' windows ----------------------------------------------------------------------

tool_frames = st.integers(2, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


@settings(deadline=None)
@given(st.integers(0, 80), tool_frames, st.sampled_from(["none", "first"]))
def test_hf_guide_equals_its_loop(length, frame, bos):
    max_length, stride = frame
    plan = resolve_protocol("hf-guide", max_length=max_length, stride=stride, bos=bos, **TOKENS)
    sequence = (["P"] if bos == "first" and length else []) + list(range(length))
    expected, previous_end = [], 0
    for begin in range(0, len(sequence), stride):
        end = min(begin + max_length, len(sequence))
        fed, new = sequence[begin:end], end - previous_end
        # labels of the others are -100, and the shift drops the label of position 0
        targets = [t for i, t in enumerate(fed) if i >= len(fed) - new and i > 0]
        if targets:
            expected.append((fed, targets))
        previous_end = end
        if end == len(sequence):
            break
    assert as_fed(plan.windows([length])) == expected


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=3), st.integers(2, 12))
def test_lm_eval_equals_its_own_function(lengths, max_length):
    utils = pytest.importorskip("lm_eval.utils")
    table = resolve_protocol("lm-eval", max_length=max_length, **TOKENS).windows(lengths)
    for document, length in enumerate(lengths):
        theirs = [
            ([*context, int(targets[-1])], [int(target) for target in targets])
            for context, targets in utils.get_rolling_token_windows(
                list(range(length)), prefix_token="P", max_seq_len=max_length, context_len=1
            )
        ]
        assert as_fed(table[table[:, 0] == document]) == theirs


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(2, 12), st.booleans())
def test_llama_cpp_equals_its_loop(length, max_length, add_bos):
    plan = resolve_protocol(
        "llama-cpp", max_length=max_length, added_prefix_id=BOS_ID if add_bos else None
    )
    tokens = (["P"] if add_bos and length else []) + list(range(length))
    expected = []
    for chunk in range(len(tokens) // max_length):
        fed = tokens[chunk * max_length : (chunk + 1) * max_length]
        targets = fed[max_length // 2 + 1 :]
        if add_bos:
            fed = ["P", *fed[1:]]
        if targets:
            expected.append((fed, targets))
    assert as_fed(plan.windows([length])) == expected


def test_llama_cpp_scores_255_of_512():
    table = resolve_protocol("llama-cpp", added_prefix_id=BOS_ID).windows([1100])
    assert (table[:, 4] - table[:, 3]).tolist() == [255, 255]
    assert table[:, 5].tolist() == [PrefixMode.INSERT, PrefixMode.OVERWRITE]


@pytest.mark.trap(6)
def test_trap_6_overwriting_loses_a_token_and_inserting_none():
    overwrite = resolve_protocol("llama-cpp", max_length=8, added_prefix_id=BOS_ID).windows([31])
    insert = resolve_protocol("disjoint", max_length=8, bos="every", **TOKENS).windows([31])

    def fed(table):
        return {token for ids, _ in as_fed(table) for token in ids if token != "P"}

    assert fed(overwrite) == set(range(31)) - {7, 15, 23}
    assert fed(insert) == set(range(31))
    assert all(ids[0] == "P" for ids, _ in as_fed(overwrite) + as_fed(insert))


def test_gptq_drops_the_tail_and_vllm_keeps_it():
    gptq = resolve_protocol("gptq-2048").windows([5000])
    assert gptq[:, 1:5].tolist() == [[0, 2048, 1, 2048], [2048, 4096, 2049, 4096]]
    vllm = resolve_protocol("vllm").windows([2050])
    assert vllm[:, 1:3].tolist() == [[0, 1023], [1023, 2046], [2046, 2050]]


def test_hf_evaluate_cuts_documents_off():
    table = resolve_protocol("hf-evaluate", max_length=6, **TOKENS).windows([20, 3, 1, 0])
    assert as_fed(table) == [
        (["P", 0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
        (["P", 0, 1, 2], [0, 1, 2]),
        (["P", 0], [0]),
    ]


# --- aggregates ----------------------------------------------------------------------------------

NLL = np.array([1.0, 2.0, 3.0, 5.0, 7.0], dtype=np.float32)
WINDOW = np.array([0, 0, 0, 1, 1])


@pytest.mark.trap(7)
@pytest.mark.parametrize(
    ("aggregate", "expected"),
    [
        ("tokens", math.exp(18 / 5)),
        ("window-means", math.exp((2 + 6) / 2)),
        ("window-perplexities", (math.exp(2) + math.exp(6)) / 2),
        ("hf-guide", math.exp((3 * 2 + 1 * 6) / 4)),  # the second window counts one too few
    ],
)
def test_trap_7_each_aggregate_is_named_and_in_closed_form(aggregate, expected):
    protocol = {"aggregate": aggregate, "stride": 2, "max_length": 4}
    assert protocol_perplexity(protocol, NLL, WINDOW) == pytest.approx(expected, rel=1e-12)


def test_hf_guide_without_overlap_is_the_plain_mean():
    protocol = {"aggregate": "hf-guide", "stride": 4, "max_length": 4}
    found = protocol_perplexity(protocol, NLL, WINDOW)
    assert found == pytest.approx(math.exp(18 / 5), rel=1e-12)


def test_nothing_scored_has_no_perplexity():
    with pytest.raises(EmptyScoreError):
        protocol_perplexity({"aggregate": "tokens"}, NLL[:0], WINDOW[:0])
