"""The report of igf experiments: figures as in their document, refusals, nothing unescaped."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import perplexit as px
from perplexit.cli.app import app
from perplexit.errors import RunError, UsageError
from perplexit.igf.experiment_file import Experiment, holds_experiment
from perplexit.report.experiment_charts import experiment_charts
from perplexit.report.experiment_section import experiment_sections, headline_of
from tests.report_experiments import document_of, experiment_folder
from tests.report_runs import toy_runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return experiment_folder(tmp_path_factory.mktemp("experiment"))


def test_an_experiment_is_read_as_it_was_written(folder: Path) -> None:
    document = document_of()
    found = Experiment.open(folder)
    assert [m.name for m in found.methods] == list(document["methods"])
    assert found.reference == "standard"
    assert (found.num_runs, found.total_runs) == (32, 32)
    for method in found.methods:
        assert list(method.median) == document["methods"][method.name]["median_perplexity"]
    row = found.comparison("igf-quantile")
    assert row is not None
    assert row.ratio == document["comparisons"][0]["ratio"]
    assert row.p_t == document["comparisons"][0]["p_t_holm"]
    assert found.comparison("standard") is None
    assert holds_experiment(folder)
    assert holds_experiment(folder / "experiment.json")
    assert not holds_experiment(folder.parent)


def test_verdicts_follow_the_corrected_test_and_the_side() -> None:
    found = Experiment.of(document_of())
    verdicts = {row.method: row.verdict(0.95) for row in found.comparisons}
    assert verdicts == {
        "igf-quantile": "better",
        "random-skip": "inconclusive",
        "high-loss": "worse",
    }
    assert headline_of(found).startswith("Selecting by igf-quantile ends at 0.7")


@pytest.mark.parametrize(
    ("gains", "says"),
    [
        ({"standard": 0.3, "high-loss": 0.1}, "Nothing beats standard: the other method is worse."),
        ({"standard": 0.3, "high-loss": 0.1, "igf-quantile": 0.1}, "all other methods are worse."),
        ({"standard": 0.3, "random-skip": 0.3}, "No method beats standard."),
        ({"standard": 0.3}, "standard has nothing to be compared with yet."),
    ],
)
def test_the_first_sentence_never_claims_a_win_that_is_none(gains: dict, says: str) -> None:
    assert says in headline_of(Experiment.of(document_of(gains)))


def test_the_chapter_holds_the_documents_figures(folder: Path) -> None:
    document = document_of()
    (section,) = experiment_sections([Experiment.open(folder)])
    rows = {row["name"]: row for row in section.methods}
    quantile = document["methods"]["igf-quantile"]
    assert float(rows["igf-quantile"]["perplexity"]) == pytest.approx(
        quantile["median_perplexity"][-1], rel=1e-3
    )
    assert float(rows["igf-quantile"]["ratio"]) == pytest.approx(
        document["comparisons"][0]["ratio"], rel=1e-3
    )
    assert rows["igf-quantile"]["better"] == "8 of 8"
    assert rows["igf-quantile"]["labels"] == "+ 228 for labels"
    assert rows["random-skip"]["labels"] == ""
    assert rows["igf-quantile"]["acceptance"] == "25 %"
    assert rows["standard"]["verdict"] is None
    assert dict(section.learner)["Spearman"] == "0.79"
    assert ("learning rate", "0.0005") in section.conditions
    assert [chart.name for chart in section.charts] == [
        "igf-1-curves",
        "igf-1-ratios",
        "igf-1-cost",
    ]
    costs = {row[0]: row[1:] for row in section.charts[2].rows}
    assert costs["igf-quantile"] == ("228.3", "0.1", "4.0")
    assert costs["high-loss"][0] == "0.0"


def test_an_unfinished_experiment_says_so_and_names_no_cost_that_is_unknown() -> None:
    document = document_of()
    document["status"] = "interrupted"
    document["plan"]["seeds"] = list(range(12))
    document["labelling"] = None
    (section,) = experiment_sections([Experiment.of(document)])
    assert "32 of 48 fine-tunings" in section.notes[0]
    assert "not recorded" in section.notes[1]
    assert {row[1] for row in section.charts[2].rows} == {"0.0", "–"}


def test_methods_without_a_comparison_keep_their_colours() -> None:
    document = document_of()
    del document["comparisons"][0]  # igf-quantile, the second of four
    ratios = experiment_charts(Experiment.of(document), "x")[1]
    used = set(re.findall(r"var\(--run(\d)\)", ratios.svg))
    assert used == {"2", "3"}


def broken(change: Any) -> dict[str, Any]:
    document = copy.deepcopy(document_of())
    change(document)
    return document


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "cannot be read as JSON"),
        ("[1, 2]", "of version None"),
        ('{"kind": "igf-experiment", "schema_version": 99}', "of version 99"),
        ('{"kind": "igf-experiment", "schema_version": 1}', "cannot be understood"),
        (broken(lambda d: d["methods"].clear()), "at least one finished fine-tuning"),
        (broken(lambda d: d["methods"]["standard"]["steps"].pop()), "a figure a step"),
        (broken(lambda d: d["comparisons"][0].pop("ratio")), "missing required field `ratio`"),
        (broken(lambda d: d.update(methods=[1])), "AttributeError"),
        (
            broken(lambda d: d["methods"]["standard"]["median_perplexity"].__setitem__(0, None)),
            "cannot be understood",
        ),
    ],
)
def test_a_damaged_experiment_is_refused(tmp_path: Path, content: Any, says: str) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "experiment.json").write_text(text, encoding="utf-8")
    with pytest.raises(RunError, match=re.escape(says)):
        px.write_report([tmp_path], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_a_title_of_any_characters_is_written(tmp_path: Path) -> None:
    document = document_of({"standard": 0.3, "\ud800\x1b": 0.6}, title="\ud800\x00\u2028")
    report = px.write_report([experiment_folder(tmp_path, document)], tmp_path / "r.html")
    assert "⟨U+D800⟩⟨U+001B⟩" in report.path.read_text(encoding="utf-8")


def test_refusals(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="perplexit igf experiment"):
        Experiment.open(tmp_path)
    with pytest.raises(UsageError, match="experiments alone"):
        px.write_report([folder], tmp_path / "r.html", labels=["one"])
    many = {f"m{i}": 0.1 for i in range(9)}
    with pytest.raises(UsageError, match="1 to 8 methods"):
        px.write_report([Experiment.of(document_of(many))], tmp_path / "r.html")


def test_charts_take_their_colours_from_the_page_and_escape_names() -> None:
    hostile = '"><script>alert(1)</script>'
    document = document_of({"standard": 0.3, hostile: 0.5, "a & b": 0.1})
    for chart in experiment_charts(Experiment.of(document), "x"):
        assert "<script" not in chart.svg
        assert "var(--" in chart.svg
        assert not re.search(r"style=|href=|url\(|<image|<foreignObject", chart.svg)


def test_the_command_writes_experiments_alone_and_beside_runs(
    folder: Path, byte_tokenizer_json: Path, tmp_path: Path
) -> None:
    runs = toy_runs(tmp_path / "runs", ["The loss of a token. " * 30], byte_tokenizer_json)
    for others in ([], [str(run.folder) for run in runs]):
        out = tmp_path / f"{len(others)}.html"
        result = CliRunner().invoke(
            app, ["report", *others, str(folder), "-o", str(out), "--json"], catch_exceptions=False
        )
        assert result.exit_code == 0, result.stderr
        summary = json.loads(result.stdout)
        assert [r["label"] for r in summary["runs"]] == [Path(other).name for other in others]
        (experiment,) = summary["experiments"]
        assert experiment["methods"][1]["verdict"] == "better"
        assert ("igf-quantile" in summary["headline"]) == (not others)
        page = out.read_text(encoding="utf-8")
        assert page.count('<section id="igf-1"') == 1
        assert ('id="text"' in page) == bool(others)
        assert page.count("<script") == (2 if others else 1)
