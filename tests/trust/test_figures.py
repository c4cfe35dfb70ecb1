"""Figures that say no more than is known: intervals, too little text, words of a protocol."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import perplexit as px
from perplexit.cli.demo import NOTES
from perplexit.cli.record_tables import run_table
from perplexit.inputs.encoded_batch import EncodedBatch
from perplexit.inputs.protocol_table import PROTOCOLS
from perplexit.inputs.token_file import TokenFile
from perplexit.metrics.bounded_intervals import averaged, share_interval
from perplexit.metrics.intervals import clusters_for, ratio_interval
from perplexit.runs.run import RUN_FILE, Run
from perplexit.runs.run_figures import figures_of
from perplexit.runs.run_tokens import RunTokens
from tests.simulated_losses import MEAN
from tests.simulated_runs import document_runs, drifting_runs
from tests.toy_sessions import BigramSession

PLAIN = {"protocol": {"aggregate": "tokens"}}
LINES = "The wells of the high villages are deep. A shallow one fails in a dry year.\n"


def record_of(tokens, **options):
    given = {"confidence": 0.95, "on_non_finite": "error", "spec": PLAIN} | options
    return figures_of(tokens, **given)


def one_run(num_documents: int = 40, seed: int = 1, **options):
    return next(document_runs(1, num_documents, seed, length_spread=0.5, **options))


def ratio_oracle(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """The delete-one-document jackknife of a ratio, written out: (ratio, standard error)."""
    ratios = [
        np.delete(sums, left_out).sum() / np.delete(counts, left_out).sum()
        for left_out in range(len(sums))
    ]
    ratio = sums.sum() / counts.sum()
    number = len(sums)
    return ratio, math.sqrt((number - 1) / number * sum((r - ratio) ** 2 for r in ratios))


# --- C1: ratios from their own two sums --------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "column", "scale"),
    [
        ("bits_per_byte", "num_bytes", lambda nats: nats / math.log(2)),
        ("byte_perplexity", "num_bytes", math.exp),
        ("word_perplexity", "num_words", math.exp),
    ],
)
def test_c1_a_ratio_has_the_interval_of_its_own_two_sums(name, column, scale) -> None:
    from scipy import stats  # noqa: PLC0415 - the oracle's quantile

    tokens = one_run()
    record = record_of(tokens)
    sums = np.bincount(tokens.document, weights=tokens.nll.astype(np.float64))
    counts = np.bincount(tokens.document, weights=getattr(tokens, column))
    ratio, error = ratio_oracle(sums, counts)
    shares = counts / counts.sum()
    reach = error * stats.t.ppf(0.975, 1 / (shares @ shares) - 1)
    assert record[name] == pytest.approx(scale(ratio))
    assert record[f"{name}_low"] == pytest.approx(scale(ratio - reach), rel=1e-9)
    assert record[f"{name}_high"] == pytest.approx(scale(ratio + reach), rel=1e-9)


def test_c1_the_interval_of_bits_per_byte_is_not_that_of_the_loss_in_another_unit() -> None:
    """Tokens per byte vary between documents: what was scaled before was too narrow by half."""
    record = record_of(one_run())
    width = (record["bits_per_byte_high"] - record["bits_per_byte_low"]) / record["bits_per_byte"]
    nats = math.log(record["perplexity_high"] / record["perplexity_low"]) / math.log(
        record["perplexity"]
    )
    assert width > 1.5 * nats


def test_c1_sibling_every_domain_and_their_mean_have_their_own_interval() -> None:
    tokens = one_run(60, num_domains=2)
    record = record_of(tokens)
    inside = tokens.domain == 1
    sums = np.bincount(tokens.document[inside], weights=tokens.nll[inside])[1::2]
    counts = np.bincount(tokens.document[inside], weights=tokens.num_bytes[inside])[1::2]
    own = ratio_interval(sums, counts, "document", 0.95).scaled(1 / math.log(2))
    row = record["domains"][1]
    assert row["bits_per_byte_low"] == pytest.approx(own.low)
    assert row["bits_per_byte_high"] == pytest.approx(own.high)
    assert row["perplexity_low"] < row["perplexity"] < row["perplexity_high"]
    assert (row["num_clusters"], row["interval_method"]) == (30, "document")
    low, high = record["macro_average_perplexity_low"], record["macro_average_perplexity_high"]
    assert low < record["macro_average_perplexity"] < high


@pytest.mark.parametrize("aggregate", ["window-means", "window-perplexities", "hf-guide"])
def test_c1_sibling_a_tools_own_aggregate_has_an_interval(aggregate: str) -> None:
    protocol = {"aggregate": aggregate, "stride": 256, "max_length": 512}
    tokens = next(drifting_runs(1, 4096, 256, 3, rho=0.3))
    record = record_of(tokens, spec={"protocol": protocol})
    low, high = record["protocol_perplexity_low"], record["protocol_perplexity_high"]
    assert 1 <= low < record["protocol_perplexity"] < high
    means = tokens.nll.reshape(-1, 256).mean(1)
    if aggregate == "window-means":  # equal windows: the same figure as the loss itself
        assert record["protocol_perplexity"] == pytest.approx(math.exp(means.mean()))
        assert low == pytest.approx(record["perplexity_low"])


def test_c1_sibling_the_mean_over_domains_is_satterthwaites() -> None:
    """Two domains of equal variance and degrees: the textbook interval of a mean of two."""
    random = np.random.default_rng(0)
    parts = []
    for _ in range(2):
        sums = random.gamma(4, 1, 30)
        parts.append(ratio_interval(sums, np.ones(30), "document", 0.95))
    found = averaged(parts, 0.95)
    total = sum(part.standard_error**2 for part in parts)
    assert found.standard_error == pytest.approx(math.sqrt(total) / 2)
    assert 29 <= found.degrees_of_freedom <= 58


def test_c1_sibling_bits_of_each_run_in_a_comparison_by_bytes(tmp_path: Path, byte_tokenizer_json):
    texts = [LINES * (2 + index % 3) for index in range(24)]
    runs = [
        px.evaluate(session, prepared(texts, byte_tokenizer_json, protocol=protocol))
        for session, protocol in (
            (BigramSession(), "document"),
            (BigramSession(seed=1), "disjoint"),
        )
    ]
    found = px.compare_bytes(*runs)
    for name in ("bits_per_byte_reference", "bits_per_byte_candidate"):
        ends = (getattr(found, f"{name}_low"), getattr(found, f"{name}_high"))
        assert ends[0] < getattr(found, name) < ends[1]
    assert found.figures()["bits_per_byte_candidate"].has_interval


@given(st.integers(0, 2**32 - 1), st.integers(4, 60))
def test_c1_whatever_the_losses_ends_are_possible_and_hold_the_value(seed, num_windows) -> None:
    random = np.random.default_rng(seed)
    tokens = next(drifting_runs(1, num_windows * 6, 6, seed, rho=0.3))
    tokens = tokens.with_columns(nll=random.gamma(0.05, 20, len(tokens)))
    record = record_of(tokens)
    for name, least in (("perplexity", 1), ("bits_per_byte", 0), ("word_perplexity", 1)):
        low, high = record[f"{name}_low"], record[f"{name}_high"]
        if low is not None:
            assert least <= low
            assert low <= record[name]
        if high is not None and record[name] is not None:
            assert record[name] <= high
        else:
            assert name in record["reasons"] or f"{name}_high" in record["reasons"]


def test_c1_sibling_agreement_of_all_tokens_is_no_proof_of_agreement_everywhere() -> None:
    clusters = clusters_for(np.repeat(np.arange(30), 20), np.repeat(np.arange(30), 20))
    found = share_interval(np.ones(600), clusters)
    assert found.high == 1.0
    assert found.low == pytest.approx(1 / (1 + 2.045**2 / 600), rel=1e-3)
    assert share_interval(np.zeros(600), clusters).low == 0.0
    assert share_interval(np.zeros(600), clusters).high > 0


# --- the record, its versions -------------------------------------------------------------------


def prepared(texts: list[str], tokenizer, **options) -> TokenFile:
    return px.prepare(texts, tokenizer=tokenizer, **({"protocol": "document"} | options))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, byte_tokenizer_json) -> Path:
    texts = [LINES * (1 + index % 4) for index in range(24)]
    folder = tmp_path_factory.mktemp("figures") / "run"
    px.evaluate(BigramSession(), prepared(texts, byte_tokenizer_json), run=folder)
    return folder


def test_c1_run_json_has_the_ends_of_every_ratio(run_folder: Path) -> None:
    record = json.loads((run_folder / RUN_FILE).read_text())
    assert record["schema_version"] == 2
    for name in ("perplexity", "bits_per_byte", "byte_perplexity", "word_perplexity"):
        assert record[f"{name}_low"] < record[name] < record[f"{name}_high"]
    assert px.verify_run(run_folder) == []


def version_one(folder: Path, target: Path) -> Path:
    """The same run as version 1 recorded it: no ends but two, those of bits per byte scaled."""
    target.mkdir()
    (target / "tokens.parquet").write_bytes((folder / "tokens.parquet").read_bytes())
    record = json.loads((folder / RUN_FILE).read_text())
    for name in ("byte_perplexity", "word_perplexity", "protocol_perplexity"):
        del record[f"{name}_low"], record[f"{name}_high"]
    for key in ("macro_average_perplexity_low", "macro_average_perplexity_high"):
        record.pop(key, None)
    per_byte = record["num_tokens"] / record["num_bytes"] / math.log(2)
    for end in ("low", "high"):
        record[f"bits_per_byte_{end}"] = math.log(record[f"perplexity_{end}"]) * per_byte
    (target / RUN_FILE).write_text(json.dumps(record | {"schema_version": 1}))
    return target


def test_c1_a_run_of_version_one_is_read_and_verified(run_folder: Path, tmp_path: Path) -> None:
    folder = version_one(run_folder, tmp_path / "old")
    run = Run.open(folder)
    assert run.schema_version == 1
    assert run.word_perplexity_low is None
    assert px.verify_run(folder) == []
    assert px.compare(folder, run_folder).ppl_ratio == 1


@pytest.mark.parametrize("name", ["perplexity", "perplexity_high", "word_perplexity", "num_bytes"])
def test_c1_sibling_a_wrong_figure_of_version_one_is_found(
    run_folder: Path, tmp_path: Path, name: str
) -> None:
    folder = version_one(run_folder, tmp_path / "old")
    record = json.loads((folder / RUN_FILE).read_text())
    record[name] = record[name] * 2
    (folder / RUN_FILE).write_text(json.dumps(record))
    assert any(line.startswith(f"{name}:") for line in px.verify_run(folder))


def test_c1_the_commands_table_shows_every_interval(run_folder: Path) -> None:
    shown = dict(rows_of_table(json_of(run_folder)))
    for name in ("perplexity", "bits per byte", "byte perplexity", "word perplexity"):
        assert re.fullmatch(r"[\d.e+]+ \[[\d.e+]+, [\d.e+]+\]", shown[name]), shown[name]
    assert "24 clusters" in shown["interval"]


def json_of(folder: Path) -> dict:
    return json.loads((folder / RUN_FILE).read_text())


# --- C4: too little text ------------------------------------------------------------------------


def rows_of_table(record: dict) -> list[tuple[str, str]]:
    return list(zip(*(column._cells for column in run_table(record).columns), strict=True))


def test_c4_too_little_text_is_one_sentence_with_how_much_would_do(byte_tokenizer_json) -> None:
    tokens = prepared(["Twenty-four bytes of it."], byte_tokenizer_json, protocol="sliding")
    run = px.evaluate(BigramSession(), tokens)
    assert (run.perplexity_low, run.bits_per_byte_high, run.word_perplexity_low) == (None,) * 3
    rows = rows_of_table(run.to_json())
    said = [value for name, value in rows if "too few" in value]
    assert len(said) == 1
    found = re.fullmatch(
        r"too few tokens for an interval: \d+ tokens in 1 window, and at least 4 windows are "
        r"needed; about ([\d,]+) tokens would give the perplexity to about ± 10 %",
        said[0],
    )
    assert found is not None, said
    spread = float(run.tokens.nll.astype(float).std())
    enough = max(3 * (1.96 * spread / math.log(1.1)) ** 2, 1024 + 3 * 512)
    assert enough <= int(found[1].replace(",", "")) <= 1.12 * enough
    assert not any(name.startswith("no ") for name, _ in rows)
    assert all("1 clusters" not in value for _, value in rows)


def test_c4_sibling_enough_is_enough(byte_tokenizer_json) -> None:
    """A text as long as the sentence says has an interval, of about the width it says."""
    text = "It rained. " * 3
    few = px.evaluate(BigramSession(), prepared([text], byte_tokenizer_json, protocol="disjoint"))
    enough = int(
        re.search(r"about ([\d,]+) tokens would", few.reasons["perplexity_low"])[1].replace(",", "")
    )
    tokens_each = few.num_tokens + 1
    more = px.evaluate(
        BigramSession(),
        prepared(
            [text * math.ceil(enough / tokens_each)], byte_tokenizer_json, protocol="disjoint"
        ),
    )
    assert more.perplexity_low is not None
    assert more.perplexity_high / more.perplexity_low < 1.1**2.5


def test_c4_sibling_three_windows_claim_nothing_four_do(byte_tokenizer_json) -> None:
    for number, known in ((3, False), (4, True)):
        tokens = prepared([LINES] * number, byte_tokenizer_json)
        runs = [px.evaluate(BigramSession(seed=seed), tokens, top_k=1) for seed in (0, 1)]
        assert (runs[0].perplexity_low is not None) == known
        compared = px.compare(*runs)
        assert (compared.ppl_ratio_low is not None) == known
        agreement = compared.figures()["top1_agreement"]
        assert agreement.should_have_interval
        assert agreement.has_interval == known
        if known:
            assert 0 <= agreement.low <= agreement.value <= agreement.high <= 1


def test_c4_ends_are_possible_on_a_handful_of_tokens() -> None:
    """Four windows of six tokens, one of them hard: perplexity from 0.05, bits from -0.8 before."""
    tokens = next(drifting_runs(1, 24, 6, 5, rho=0.0))
    losses = np.full(24, 0.1, dtype=np.float32)
    losses[20:] = 9.0
    record = record_of(tokens.with_columns(nll=losses))
    assert record["perplexity_low"] == 1.0
    assert record["bits_per_byte_low"] == 0.0
    assert record["word_perplexity_low"] == 1.0


def test_c4_sibling_a_domain_with_too_few_windows_says_so() -> None:
    tokens = one_run(21, num_domains=1)
    lonely = np.where(tokens.document == 20, 1, 0).astype(np.int32)
    record = record_of(RunTokens({**tokens.columns, "domain": lonely}, domains=("many", "one")))
    many, one = record["domains"]
    assert many["perplexity_low"] is not None
    assert one["perplexity_low"] is None
    assert "1 window, and at least 4" in one["reasons"]["perplexity_low"]
    assert record["macro_average_perplexity_low"] is None
    assert "1 window" in record["reasons"]["macro_average_perplexity_low"]


# --- C5: the words of a protocol are those of its tool ------------------------------------------

SPACES = (" ", "\n", "\t", "\x0b", "\x0c", "\x1c", "\x1f", "\x85", "\u00a0", "\u2028", "\u3000")
TEXTS = [
    "plain words here",
    "a trailing newline\n",
    "  leading blanks and a trailing tab\t",
    "\n\nempty lines\n\n\nbetween\n\n",
    "wide\u3000spaces\u00a0of\u2003many kinds\u3000",
    "\x1cseparators\x1dof\x1efiles\x1f",
    "\u200bzero width is no space\u200b",
    "\n",
    " ",
    "é\u00a0",
]


def count_words(text: str) -> int:
    """Return lm-eval's own count, by its own function where it is installed."""
    task = pytest.importorskip("lm_eval.api.task")
    return task.PerplexityTask.count_words(text)


def test_c5_lm_eval_words_are_those_of_lm_eval(tiny_llama_dir) -> None:
    for text in TEXTS:
        tokens = prepared_for_lm_eval([text], tiny_llama_dir)
        run = px.evaluate(BigramSession(), tokens)
        assert run.num_words == count_words(text), repr(text)
        assert run.num_bytes == len(text.encode())
        expected = math.exp(run.nll_sum / count_words(text))
        assert run.word_perplexity == pytest.approx(expected) or math.isinf(expected)


def test_c5_sibling_several_documents_an_empty_one_too(tiny_llama_dir) -> None:
    """lm-eval counts one word for an empty document, in which nothing is scored."""
    texts = [*TEXTS, "", "last\n"]
    run = px.evaluate(BigramSession(), prepared_for_lm_eval(texts, tiny_llama_dir))
    assert run.num_words == sum(map(count_words, texts))
    assert run.num_bytes == sum(len(text.encode()) for text in texts)
    assert run.word_perplexity == pytest.approx(math.exp(run.nll_sum / run.num_words))


def prepared_for_lm_eval(texts: list[str], tokenizer) -> TokenFile:
    return px.prepare(texts, tokenizer=tokenizer, protocol="lm-eval", max_length=8)


@given(st.lists(st.text(alphabet=st.sampled_from(["a", "é", "\u3042", *SPACES])), min_size=1))
def test_c5_any_text_has_the_words_of_re_split(texts: list[str]) -> None:
    encoded = [text.encode() for text in texts]
    lengths = np.array([len(text) for text in encoded], dtype=np.int64)
    batch = EncodedBatch.of(
        np.zeros(int(lengths.sum()), np.int32),
        lengths,
        np.ones(int(lengths.sum()), np.int64),
        encoded,
    ).with_split_words()
    for index, text in enumerate(texts):
        words = batch.num_words[batch.document_starts[index] : batch.document_starts[index + 1]]
        assert int(words.sum()) == (len(re.split(r"\s+", text)) if text else 0)


def test_c5_sibling_both_definitions_know_the_same_white_space() -> None:
    found = [chr(code) for code in range(0x110000) if re.fullmatch(r"\s", chr(code))]
    assert all(not mark.split() for mark in found)
    assert len(found) == sum(1 for code in range(0x110000) if chr(code).isspace())


def test_c5_sibling_no_other_protocol_has_a_tool_that_counts_words(byte_tokenizer_json) -> None:
    """The default keeps its own definition, runs of characters that are no white space."""
    assert {name for name, entry in PROTOCOLS.items() if entry.words == "pieces"} == {"lm-eval"}
    tokens = prepared(["  two words\n", " a b c "], byte_tokenizer_json)
    assert int(tokens.num_words.astype(int).sum()) == 5
    assert MEAN > 1


# --- C6: what is said of a further 4 bits -------------------------------------------------------


def test_c6_the_demo_and_the_page_say_what_was_measured() -> None:
    """`bench/run.py --only rounded-twice`: int4 costs 1.074 times more on rounded weights."""
    page = (Path(__file__).parents[2] / "docs" / "quantization.md").read_text(encoding="utf-8")
    said = " ".join(NOTES)
    assert "costs more on weights that were rounded before" in said
    assert "4 bits cost more on weights that were rounded before" in page
    assert "costs less" not in said + page
