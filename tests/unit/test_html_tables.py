"""What notebooks show: short reprs, and small HTML tables in which every text is escaped."""

from html.parser import HTMLParser

import pytest

from perplexit.comparison.byte_comparison import ByteComparison
from perplexit.comparison.token_comparison import Comparison
from perplexit.diagnosis import Diagnosis, Difference, Explanation, Finding, Step
from perplexit.runs.html_table import html_table

HOSTILE = "<script>alert('x')</script> & \"y\""
RUN = {"folder": None, "model": {"address": HOSTILE}, "session": {"engine": "pytorch"}}


def comparison() -> Comparison:
    return Comparison(
        verdict="worse",
        perplexity_reference=18.0,
        perplexity_candidate=None,
        log_perplexity_difference=0.0198,
        log_perplexity_difference_low=0.01,
        log_perplexity_difference_high=0.03,
        ppl_ratio=1.02,
        ppl_ratio_low=1.01,
        ppl_ratio_high=1.03,
        num_tokens=1000,
        num_unpaired=0,
        max_abs_nll_difference=1.0,
        mean_abs_nll_difference=0.1,
        confidence=0.95,
        interval_method="document",
        num_clusters=24,
        margin=1e-5,
        input_fingerprint="0" * 64,
        reference=RUN,
        candidate=RUN,
        warnings=(HOSTILE,),
    )


def byte_comparison() -> ByteComparison:
    return ByteComparison(
        verdict="better",
        bits_per_byte_reference=1.1,
        bits_per_byte_candidate=1.0,
        bits_per_byte_difference=-0.1,
        bits_per_byte_difference_low=-0.12,
        bits_per_byte_difference_high=-0.08,
        log_difference=-0.07,
        log_difference_low=-0.083,
        log_difference_high=-0.055,
        byte_ratio=0.93,
        byte_ratio_low=0.92,
        byte_ratio_high=0.94,
        bits_per_byte_ratio=0.91,
        bits_per_byte_ratio_low=None,
        bits_per_byte_ratio_high=None,
        num_bytes=4000,
        num_segments=900,
        num_tokens_reference=1000,
        num_tokens_candidate=1100,
        num_unaligned_bytes_reference=0,
        num_unaligned_bytes_candidate=0,
        confidence=0.99,
        interval_method="document",
        num_clusters=24,
        margin=1e-5,
        text_fingerprint="0" * 64,
        same_tokenizer=False,
        reference=RUN,
        candidate=RUN,
        warnings=(HOSTILE,),
    )


def explanation() -> Explanation:
    return Explanation(
        first={},
        second={},
        differences=(Difference("dtype", "float32", "bfloat16", HOSTILE),),
        steps=(Step(("dtype",), 0.0125, 18.0, 18.2, None, None, 1000, 1000),),
        total_nats=0.0125,
        notes=(HOSTILE,),
    )


def diagnosis() -> Diagnosis:
    return Diagnosis(
        model={"address": HOSTILE},
        session={"engine": "pytorch", "dtype": "float32"},
        input_fingerprint=None,
        max_length=1024,
        findings=(
            Finding("finite", "pass", "all losses are finite", 0, 0),
            Finding("batch", "fail", HOSTILE, 0.25, 0.002, "evaluate with --batch-size 1"),
        ),
        seconds=1.0,
    )


@pytest.mark.parametrize(
    ("found", "shown", "in_table"),
    [
        (comparison(), "worse: perplexity ratio 1.02 [1.01, 1.03]", "[1.01, 1.03]"),
        (byte_comparison(), "better: byte ratio 0.93 [0.92, 0.94]", "[0.92, 0.94]"),
        (explanation(), "+0.0125 nats per token: dtype", "+0.012500"),
        (diagnosis(), "fail: ", "→ evaluate with --batch-size 1"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_notebooks_show_a_short_repr_and_an_escaped_table(
    found: Comparison | ByteComparison | Explanation | Diagnosis, shown: str, in_table: str
) -> None:
    name = type(found).__name__
    assert repr(found).startswith(f"{name}(")
    assert shown in repr(found)
    assert len(repr(found)) < 200
    page = found._repr_html_()
    assert in_table in page
    assert f"<strong>{name}: " in page
    assert page.count("<script") == 0
    assert "&lt;script&gt;" in page
    assert balanced(page)


def test_a_table_of_names_and_values_has_no_head() -> None:
    page = html_table("Run", [("perplexity", "18.3\n[17.1, 19.6]")])
    assert "<thead>" not in page
    assert "18.3<br>[17.1, 19.6]</td>" in page
    assert page.count('scope="row"') == 1
    assert balanced(page)


def balanced(page: str) -> bool:
    """Tell whether every element that is opened is closed, in order."""
    open_tags: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag != "br":
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    Reader().feed(page)
    return not open_tags
