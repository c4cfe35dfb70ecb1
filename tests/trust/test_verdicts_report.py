"""A3: the report draws what the comparison holds, and each series under its own run's name."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import perplexit as px
from perplexit.report import chart_drawings as charts
from perplexit.report.labelled_runs import LabelledRuns
from perplexit.report.run_charts import agreement_rows, charts_of, kl_rows
from perplexit.report.token_data import token_data
from perplexit.runs.run import Run
from tests.report_runs import toy_runs, with_kl

TEXTS = ["A measurement belongs to one reference and to no other. " * 40, "A second text. " * 20]


@pytest.fixture(scope="module")
def runs(byte_tokenizer_json: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """A reference and seven candidates, none of them scored with a reference."""
    noises = [0.1 * (n + 1) for n in range(7)]
    return toy_runs(tmp_path_factory.mktemp("runs"), TEXTS, byte_tokenizer_json, noises=noises)


@pytest.fixture
def specs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is handed to the drawing library, without drawing it."""
    found: list[dict[str, Any]] = []

    def kept(spec: dict[str, Any]) -> str:
        found.append(spec)
        return "<svg></svg>"

    monkeypatch.setattr(charts, "drawn", kept)
    return found


def colours_of(spec: dict[str, Any]) -> dict[str, str]:
    """Run → colour of every scale in a chart, which must agree."""
    scales = []
    for layer in [spec, *spec.get("layer", [])]:
        colour = layer.get("encoding", {}).get("color")
        if isinstance(colour, dict) and "scale" in colour:
            scales.append(
                dict(zip(colour["scale"]["domain"], colour["scale"]["range"], strict=True))
            )
    assert scales
    assert all(scale == scales[0] for scale in scales)
    return scales[0]


def drawn_runs(spec: dict[str, Any]) -> set[str]:
    return {row["run"] for row in spec["data"]["values"]}


@pytest.mark.parametrize("count", [2, 4, 8])
def test_a3_any_subset_with_kl_is_drawn_under_its_own_name_and_colour(
    runs: list[Run], specs: list[dict[str, Any]], count: int
) -> None:
    """All subsets of 1, 3 and 7 candidates: 1 + 7 + 127 reports."""
    for size in range(1, count):
        for chosen in combinations(range(1, count), size):
            own = [with_kl(run, runs[0]) if n in chosen else run for n, run in enumerate(runs)]
            labelled = LabelledRuns.of(own[:count], num_most_changed=0)
            specs.clear()
            made = [chart.name for chart in charts_of(labelled)]
            spec = specs[made.index("kl")]
            expected = {labelled.labels[n]: f"var(--run{n})" for n in chosen}
            assert drawn_runs(spec) == set(expected)
            assert colours_of(spec) == expected


def test_a3_every_chart_gives_a_run_one_colour(
    runs: list[Run], specs: list[dict[str, Any]]
) -> None:
    own = [with_kl(run, runs[0]) if n in (2, 5) else run for n, run in enumerate(runs)]
    labelled = LabelledRuns.of(own)
    colour = {label: f"var(--run{n})" for n, label in enumerate(labelled.labels)}
    charts_of(labelled)
    assert len(specs) >= 6
    for spec in specs:
        found = colours_of(spec)
        assert drawn_runs(spec) <= set(found)
        assert found == {label: colour[label] for label in found}


def test_a3_a_kl_that_compare_refused_is_nowhere_in_the_report(
    runs: list[Run], tmp_path: Path
) -> None:
    """The candidate was scored against runs[2], and the report's reference is runs[0]."""
    candidate = with_kl(runs[1], runs[2])
    comparison = px.compare(runs[0], candidate)
    assert comparison.divergences is None
    assert any("another" in warning for warning in comparison.warnings)
    labelled = LabelledRuns.of([runs[0], candidate])
    assert kl_rows(labelled) == []
    data = token_data(labelled, tokens=None, max_tokens=10**6, max_alternatives=0)
    assert [run["kl"] for run in data["runs"]] == [None, None]
    assert "kl" not in [chart.name for chart in charts_of(labelled)]
    page = px.write_report([runs[0], candidate], tmp_path / "r.html").path.read_text("utf-8")
    assert 'id="chart-kl"' not in page
    assert "of the reference from the candidate" not in page  # the table's row of KL


def test_a3_agreement_that_belongs_to_another_reference_is_not_drawn(runs: list[Run]) -> None:
    """The refused `same_top1` says always; the alternatives of both runs say what is true."""
    wrong = with_kl(runs[7], runs[2], scale=0.0)
    wrong = replace(
        wrong, loaded_tokens=wrong.tokens.with_columns(same_top1=np.ones(len(wrong.tokens), bool))
    )
    found = agreement_rows(LabelledRuns.of([runs[0], wrong]))
    true = agreement_rows(LabelledRuns.of([runs[0], runs[7]]))
    assert [row["share"] for row in found] == [row["share"] for row in true]
    assert min(float(row["share"]) for row in found) < 1


def test_a3_sibling_a_kl_that_is_not_finite_is_not_drawn(runs: list[Run]) -> None:
    candidate = with_kl(runs[3], runs[0])
    kl = candidate.tokens.kl.copy()
    kl[4] = np.inf
    broken = replace(candidate, loaded_tokens=candidate.tokens.with_columns(kl=kl))
    labelled = LabelledRuns.of([runs[0], broken])
    assert "kl" not in labelled.comparisons[0].divergences.columns
    assert kl_rows(labelled) == []
    data = token_data(labelled, tokens=None, max_tokens=10**6, max_alternatives=0)
    assert data["runs"][1]["kl"] is None
    for rows in labelled.comparisons[0].buckets.values():
        assert all("mean_kl" not in row and "top1_agreement" in row for row in rows)


def test_a3_sibling_agreement_of_a_candidate_among_others_keeps_its_colour(
    runs: list[Run], specs: list[dict[str, Any]]
) -> None:
    """Only the third candidate recorded alternatives: the others have no series and no legend."""
    bare = [
        run
        if n in (0, 3)
        else replace(
            run, loaded_tokens=run.tokens.with_columns(top_ids=None, top_logprobs=None, rank=None)
        )
        for n, run in enumerate(runs)
    ]
    labelled = LabelledRuns.of(bare)
    made = [chart.name for chart in charts_of(labelled)]
    spec = specs[made.index("agreement")]
    assert colours_of(spec) == {labelled.labels[3]: "var(--run3)"}
    assert drawn_runs(spec) == {labelled.labels[3]}


def test_a3_sibling_the_kl_of_a_token_is_the_candidates_own(runs: list[Run]) -> None:
    """A token that either run has no finite loss for has no KL in the text; all others theirs."""
    candidate = with_kl(runs[4], runs[0])
    nll = candidate.tokens.nll.copy()
    nll[[3, 30]] = np.nan
    candidate = replace(candidate, loaded_tokens=candidate.tokens.with_columns(nll=nll))
    labelled = LabelledRuns.of([runs[0], runs[1], candidate])
    kl_R = labelled.comparisons[1].tokens.kl_of_rows()
    assert np.flatnonzero(np.isnan(kl_R)).tolist() == [3, 30]
    kept = np.isfinite(kl_R)
    np.testing.assert_array_equal(kl_R[kept], candidate.tokens.kl[kept].astype(np.float64))
    assert labelled.comparisons[0].tokens.kl_of_rows() is None


def test_a3_sibling_a_changed_choice_is_never_shown_as_the_same_token(runs: list[Run]) -> None:
    """Two tokens tie for the first place: the KL's columns saw the other one of them."""
    candidate = with_kl(runs[1], runs[0], scale=0.0)
    same = np.ones(len(candidate.tokens), dtype=bool)
    tops = [run.tokens.top_ids[:, 0] for run in (runs[0], candidate)]
    same[np.flatnonzero(tops[0] == tops[1])[0]] = False
    columns = candidate.tokens.with_columns(same_top1=same)
    (flip,) = px.compare(runs[0], replace(candidate, loaded_tokens=columns)).flips.listed
    assert flip.reference_top1 is not None
    assert flip.candidate_top1 is None


def test_a3_sibling_the_drawing_itself_has_the_runs_colours(runs: list[Run]) -> None:
    own = [with_kl(run, runs[0]) if n in (1, 2, 3) else run for n, run in enumerate(runs)]
    labelled = LabelledRuns.of(own)
    svg = next(chart.svg for chart in charts_of(labelled) if chart.name == "kl")
    for n, label in enumerate(labelled.labels):
        assert (f'stroke="var(--run{n})"' in svg) == (n in (1, 2, 3))
        assert (f">{label}</text>" in svg) == (n in (1, 2, 3))


def test_a3_sibling_a_comparison_in_json_holds_no_columns(runs: list[Run]) -> None:
    comparison = px.compare(runs[0], with_kl(runs[1], runs[0]))
    assert "tokens" not in comparison.to_json()
    assert len(repr(comparison)) < 50_000
