"""Nothing of the user's is overwritten: outputs onto inputs and onto what others made."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import perplexit as px
from perplexit import igf
from perplexit.cli import demo
from perplexit.cli.app import app
from perplexit.errors import OutputError, PerplexitError, RunError
from perplexit.igf.pairs import Pairs
from perplexit.program_record import (
    ProgramFile,
    ProgramMemory,
    ProgramMetadata,
    ProgramModel,
    ProgramShapes,
    ProgramVerification,
)
from tests.toy_sessions import BigramSession

TEXT = "Years of work, in one file.\nNobody has a copy of it."
run = CliRunner()


def call(*arguments: object) -> tuple[int, str]:
    """The exit code and the message of a command; a traceback fails the test."""
    result = run.invoke(app, list(map(str, arguments)), catch_exceptions=False)
    return result.exit_code, result.stderr


def refused(*arguments: object, path: Path, reason: str) -> None:
    """The command is refused with exit code 1, with and without --force; `path` stays as it is."""
    before = path.read_bytes()
    for force in ((), ("--force",)):
        code, message = call(*arguments, *force)
        assert code == 1, message
        assert reason in message
        assert path.read_bytes() == before


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """A folder to work in, with one text."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "own.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory, byte_tokenizer_json) -> tuple[Path, Path]:
    """Folders of two runs over one text."""
    folder = tmp_path_factory.mktemp("runs")
    tokens = px.prepare([TEXT * 9], tokenizer=byte_tokenizer_json, output=folder / "t.safetensors")
    for seed in (0, 1):
        px.evaluate(BigramSession(seed=seed), tokens, run=folder / f"run-{seed}")
    return folder / "run-0", folder / "run-1"


def test_d1_prepare_does_not_destroy_its_corpus(work, byte_tokenizer_json):
    options = ("--tokenizer", byte_tokenizer_json)
    for name in ("own.txt", "./own.txt", work / "own.txt", "../work/own.txt"):
        refused(
            *("prepare", "own.txt", *options, "-o", name),
            path=work / "own.txt",
            reason="what this command reads",
        )
    assert sorted(os.listdir(work)) == ["own.txt"]


def test_d1_sibling_links_to_the_corpus_are_the_corpus(work, byte_tokenizer_json):
    os.symlink("own.txt", "soft.safetensors")
    os.link("own.txt", "hard.safetensors")
    os.symlink(work, "../again")
    for name in ("soft.safetensors", "hard.safetensors", "../again/own.txt"):
        arguments = ("prepare", "own.txt", "--tokenizer", byte_tokenizer_json, "-o", name)
        refused(*arguments, path=work / "own.txt", reason="what this command reads")


def test_d1_sibling_anything_else_of_the_users_stays(work, byte_tokenizer_json):
    (work / "other.safetensors").write_text("not a token file, and somebody's own")
    refused(
        *("prepare", "own.txt", "--tokenizer", byte_tokenizer_json, "-o", "other.safetensors"),
        path=work / "other.safetensors",
        reason="something else",
    )
    copy = shutil.copy(byte_tokenizer_json, work / "tokenizer.json")
    arguments = ("prepare", "own.txt", "--tokenizer", copy, "-o", "tokenizer.json")
    refused(*arguments, path=Path(copy), reason="what this command reads")


def test_d1_sibling_folders_devices_and_dangling_links_are_no_files(work, byte_tokenizer_json):
    os.symlink("nowhere", "dangling")
    (work / "folder").mkdir()
    places = {
        "-": "standard output",
        "/dev/null": "no ordinary file",
        "folder": "a folder",
        "dangling": "does not exist",
    }
    for place, reason in places.items():
        for force in ((), ("--force",)):
            code, message = call(
                *("prepare", "own.txt", "--tokenizer", byte_tokenizer_json, "-o", place, *force)
            )
            assert code == 1
            assert reason in message
    assert Path("/dev/null").is_char_device()
    assert os.readlink("dangling") == "nowhere"


def test_d1_sibling_the_refusal_comes_before_any_work(work):
    """A tokenizer that does not exist would be the next thing to be missed."""
    code, message = call("prepare", "own.txt", "--tokenizer", "no-such", "-o", "own.txt")
    assert code == 1
    assert "what this command reads" in message


def test_d1_sibling_a_folder_never_eats_its_own_output(work, byte_tokenizer_json):
    options = ("--tokenizer", byte_tokenizer_json)
    code, message = call("prepare", ".", *options, "-o", "out.txt")
    assert code == 1
    assert "outside the corpus" in message
    code, message = call("prepare", ".", *options, "-o", "a.safetensors", "--export-ids", "ids.txt")
    assert code == 1
    assert sorted(os.listdir(work)) == ["own.txt"]
    assert call("prepare", ".", *options, "-o", "a.safetensors")[0] == 0
    first = px.TokenFile.open("a.safetensors")
    assert first.num_documents == 1
    assert call("prepare", ".", *options, "-o", "a.safetensors")[0] == 0  # the same once more
    assert px.TokenFile.open("a.safetensors").input_fingerprint == first.input_fingerprint


def test_d1_sibling_another_token_file_needs_force(work, byte_tokenizer_json):
    (work / "new.txt").write_text("Another text.")
    (work / "ids.txt").write_text("1 2 3\n")
    options = ("--tokenizer", byte_tokenizer_json, "-o", "x.safetensors")
    assert call("prepare", "own.txt", *options)[0] == 0
    before = Path("x.safetensors").read_bytes()
    for changed in (("new.txt", *options), ("own.txt", *options, "--protocol", "disjoint")):
        code, message = call("prepare", *changed)
        assert code == 1
        assert "--force" in message
        assert Path("x.safetensors").read_bytes() == before
    code, message = call("prepare", "ids.txt", "--from-ids", "-o", "x.safetensors")
    assert code == 1
    assert call("prepare", "new.txt", *options, "--force")[0] == 0
    assert Path("x.safetensors").read_bytes() != before


def test_d1_sibling_ids_and_checked_data_are_inputs_too(work, byte_tokenizer_json):
    options = ("--tokenizer", byte_tokenizer_json)
    assert call("prepare", "own.txt", *options, "-o", "x.safetensors")[0] == 0
    token_file = work / "x.safetensors"
    arguments = ("prepare", "own.txt", *options, "--check-overlap", "x.safetensors")
    refused(*arguments, "-o", "x.safetensors", path=token_file, reason="what this command reads")
    (work / "mine.ids").write_text("1 2 3\n")
    refused(
        *("prepare", "own.txt", *options, "-o", "y.safetensors", "--export-ids", "mine.ids"),
        path=work / "mine.ids",
        reason="something else",
    )
    code, message = call(
        *("prepare", "own.txt", *options, "-o", "z.safetensors", "--export-ids", "z.safetensors")
    )
    assert code == 1
    assert "two outputs" in message
    assert sorted(os.listdir(work)) == ["mine.ids", "own.txt", "x.safetensors"]
    with pytest.raises(OutputError):
        px.import_id_lines("mine.ids", output="mine.ids", force=True)
    with pytest.raises(OutputError):
        px.export_id_lines(px.TokenFile.open("x.safetensors"), "x.safetensors")


def _program(folder: Path) -> Path:
    """A folder with a program of another checkpoint."""
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"a program")
    ProgramMetadata(
        engine="onnx",
        perplexity=True,
        dtype="float32",
        opset=20,
        shapes=ProgramShapes(),
        model=ProgramModel("hf:other", "Llama", 9, "another", 320),
        memory=ProgramMemory(1, 1),
        verification=ProgramVerification("", 1, 0.0),
        files=(ProgramFile("model.onnx", 9, "0"),),
    ).write(folder)
    return folder


def test_d1_compile_keeps_another_program(work, tiny_llama_dir):
    program = _program(work / "program") / "program.json"
    before = program.read_bytes()
    code, message = call("compile", tiny_llama_dir, "--to", "onnx", "-o", "program")
    assert code == 1
    assert "another one" in message
    assert "--force" in message
    assert program.read_bytes() == before


def test_d1_sibling_a_program_with_somebodys_notes_beside_it_stays(work, tiny_llama_dir):
    (_program(work / "program") / "notes.txt").write_text(TEXT)
    arguments = ("compile", tiny_llama_dir, "--to", "onnx", "-o", "program")
    refused(*arguments, path=work / "program" / "notes.txt", reason="something else")


def test_d1_sibling_compile_never_replaces_its_checkpoint(work, tiny_llama_dir):
    model = Path(shutil.copytree(tiny_llama_dir, work / "model"))
    for output in (model, work):
        refused(
            *("compile", f"hf:{model}", "--to", "onnx", "-o", output),
            path=model / "config.json",
            reason="what this command reads",
        )


def test_d1_report_keeps_a_page_of_the_users(work, two_runs):
    (work / "page.html").write_text("<html>mine</html>")
    refused("report", *two_runs, "-o", "page.html", path=work / "page.html", reason="something")
    assert call("report", *two_runs, "-o", "own.html")[0] == 0
    assert call("report", *two_runs, "-o", "own.html")[0] == 0  # the same page
    before = Path("own.html").read_bytes()
    code, message = call("report", two_runs[0], "-o", "own.html")
    assert code == 1
    assert "--force" in message
    assert Path("own.html").read_bytes() == before
    assert call("report", two_runs[0], "-o", "own.html", "--force")[0] == 0
    assert Path("own.html").read_bytes() != before


def test_d1_markdown_is_appended_to_a_summary(work, two_runs):
    summary = work / "summary.md"
    summary.write_text("# An earlier step")
    gates = ("--gate", "ppl_ratio<=9", "--gate-on", "value")  # too few windows for an interval
    assert call("compare", *two_runs, *gates, "--markdown", summary)[0] == 0
    first = summary.read_text()
    assert first.startswith("# An earlier step\n\n| candidate |")
    assert call("compare", *two_runs, *gates, "--markdown", summary)[0] == 0
    assert summary.read_text() == first + "\n" + first.removeprefix("# An earlier step\n\n")


def test_d1_sibling_gates_are_written_to_no_other_file(work, two_runs, monkeypatch):
    gates = ("compare", *two_runs, "--gate", "ppl_ratio<=9", "--gate-on", "value")
    record = two_runs[0] / "run.json"
    refused(*gates, "--markdown", record, path=record, reason="another kind")
    refused(*gates, "--markdown", "own.txt", path=work / "own.txt", reason="another kind")
    (work / "bytes").write_bytes(b"\x00\xff")
    refused(*gates, "--markdown", "bytes", path=work / "bytes", reason="no text")
    (work / "results.xml").write_text("<results/>")
    refused(*gates, "--junit", "results.xml", path=work / "results.xml", reason="something else")
    assert call(*gates, "--junit", "gates.xml")[0] == 0
    assert call(*gates, "--junit", "gates.xml")[0] == 0
    assert call(*gates, "--gate", "ppl_ratio<=8", "--junit", "gates.xml")[0] == 1
    assert call(*gates, "--gate", "ppl_ratio<=8", "--junit", "gates.xml", "--force")[0] == 0
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(work / "own.txt"))
    assert call(*gates, "--markdown", "own.txt")[0] == 0
    assert (work / "own.txt").read_text().startswith(TEXT + "\n\n| candidate |")


def test_d1_sibling_exports_keep_runs_and_tables(work, two_runs):
    tokens = two_runs[0] / "tokens.parquet"
    export = ("runs", "export", two_runs[0])
    refused(*export, "-o", tokens, path=tokens, reason="what this command reads")
    (work / "mine.csv").write_text("a,b\n1,2\n")
    refused(*export, "-o", "mine.csv", path=work / "mine.csv", reason="something else")
    refused(*export, "--words", "-o", "mine.csv", path=work / "mine.csv", reason="something else")
    for name in ("t.csv", "t.jsonl", "t.parquet"):
        assert call(*export, "-o", name)[0] == 0
        assert call(*export, "-o", name)[0] == 0
        assert call("runs", "export", two_runs[1], "-o", name)[0] == 1
        assert call("runs", "export", two_runs[1], "-o", name, "--force")[0] == 0
        assert call("runs", "export", two_runs[1], "--words", "-o", name, "--force")[0] == 1


def test_d1_sibling_a_link_stays_a_link(work, two_runs):
    (work / "elsewhere").mkdir()
    assert call("report", *two_runs, "-o", "elsewhere/page.html")[0] == 0
    os.symlink("elsewhere/page.html", "latest.html")
    assert call("report", two_runs[0], "-o", "latest.html", "--force")[0] == 0
    assert os.readlink("latest.html") == "elsewhere/page.html"
    assert call("report", two_runs[0], "-o", "elsewhere/page.html")[0] == 0  # what is there now


def test_d1_sibling_eval_keeps_somebodys_parts(work, byte_tokenizer_json):
    """A folder `parts/` of the user's alone looked like the beginning of a run."""
    tokens = px.prepare([TEXT], tokenizer=byte_tokenizer_json)
    (work / "out" / "parts").mkdir(parents=True)
    (work / "out" / "parts" / "thesis.txt").write_text(TEXT)
    with pytest.raises(RunError, match="other files"):
        px.evaluate(BigramSession(), tokens, run=work / "out")
    assert (work / "out" / "parts" / "thesis.txt").read_text() == TEXT


def test_d1_sibling_the_demos_text_is_not_written_over_another(work, monkeypatch):
    (work / "demo").mkdir()
    (work / "demo" / "speech.txt").write_text("my own speech")
    monkeypatch.setattr(demo, "packaged_file", lambda *_: work / "own.txt")
    with pytest.raises(OutputError, match=r"speech\.txt"):
        demo.score_four_ways(work / "demo")
    assert (work / "demo" / "speech.txt").read_text() == "my own speech"


def test_d1_sibling_igf_writes_over_nothing(work, tiny_gpt2_dir):
    (work / "pairs.safetensors").write_text("mine")
    (work / "other.seconds.json").write_text("[1, 2]")
    (work / "third.safetensors.parts").mkdir()
    (work / "third.safetensors.parts" / "mine.txt").write_text(TEXT)
    (work / "learner.json").write_text('{"mine": 1}')
    for name in ("pairs", "other", "third"):
        with pytest.raises(OutputError):
            igf.pairs_output(work / f"{name}.safetensors")
        code, _ = call("igf", "collect", ".", "--model", "no-such", "-o", f"{name}.safetensors")
        assert code == 1
    with pytest.raises(OutputError):
        igf.learner_output(work / "learner", force=True)
    assert (work / "third.safetensors.parts" / "mine.txt").read_text() == TEXT
    model = Path(shutil.copytree(tiny_gpt2_dir, work / "model"))
    tune = ("igf", "finetune", "own.txt", "--model", model)
    refused(*tune, "-o", model, path=model / "config.json", reason="what this command reads")
    with pytest.raises(OutputError, match="something else"):
        igf.save_model(igf.load_model(model), model, force=True)
    tuned = igf.save_model(igf.load_model(model), work / "tuned", request={"steps": 1})
    igf.save_model(igf.load_model(model), tuned, request={"steps": 1})
    with pytest.raises(OutputError, match="another one"):
        igf.save_model(igf.load_model(model), tuned, request={"steps": 2})
    igf.save_model(igf.load_model(tuned), tuned, request={"steps": 2}, force=True)
    (tuned / "notes.txt").write_text(TEXT)
    with pytest.raises(OutputError, match="something else"):
        igf.save_model(igf.load_model(model), tuned, request={"steps": 2}, force=True)
    (work / "results").mkdir()
    (work / "results" / "experiment.json").write_text("[]")
    (work / "results" / "conditions.json").write_text("{}")
    with pytest.raises(PerplexitError):
        igf.check_experiment_output(work / "results")


def test_d1_sibling_the_seeds_log_is_not_written_over_a_text(work, byte_tokenizer_json):
    rows = [[[1, 2, 3, 4, 5]]]
    with pytest.raises(OutputError):
        px.calculate_perplexity(rows, BigramSession(), 8, 1, "torch", 1, "own.txt", "toy")
    assert (work / "own.txt").read_text() == TEXT


def test_d1_sibling_pairs_are_told_by_their_content(work):
    ids = np.arange(12, dtype=np.int32).reshape(4, 3)
    gains = np.array([0.1, 0.2, 0.3, 0.5])
    found = Pairs(ids, np.arange(4), gains, gains, {"mode": "exact"})
    found.save("pairs.safetensors")
    found.save("pairs.safetensors")  # an older one of the same kind
    before = Path("pairs.safetensors").read_bytes()
    igf.pairs_output("pairs.safetensors")
    for force in (False, True):
        with pytest.raises(OutputError, match="something else"):
            igf.learner_output("pairs.safetensors", force=force)
        with pytest.raises(OutputError, match="something else"):
            px.prepare([TEXT], tokenizer="no-such", output="pairs.safetensors", force=force)
    assert Path("pairs.safetensors").read_bytes() == before
