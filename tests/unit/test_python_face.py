"""The Python face: models, modules and texts as people have them; frames; short reprs; misuse."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import perplexit as px

TEXT = "The committee met on Tuesday and discussed the budget for the coming year at length. " * 12


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "face-cache"))


@pytest.fixture(scope="module")
def module(tiny_llama_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama_dir)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama_dir)


@pytest.fixture
def text_path(tmp_path: Path) -> Path:
    path = tmp_path / "speech.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def run(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> px.Run:
    folder = tmp_path_factory.mktemp("face")
    (folder / "a.txt").write_text(TEXT)
    (folder / "b.txt").write_text(TEXT[:300] + "Nothing else was said.")
    tokens = px.prepare(
        [folder / "a.txt", folder / "b.txt"],
        tokenizer=tiny_llama_dir,
        output=folder / "in.safetensors",
        max_length=64,
        stride=32,
    )
    return px.evaluate(tiny_llama_dir, tokens, run=folder / "run")


def test_every_way_to_give_model_and_text_gives_one_number(
    tiny_llama_dir: Path, module: Any, tokenizer: Any, text_path: Path
) -> None:
    expected = px.perplexity(tiny_llama_dir, TEXT).perplexity
    with px.load_session(tiny_llama_dir) as session:
        runs = [
            px.perplexity(f"hf:{tiny_llama_dir}", text_path),
            px.perplexity(module, TEXT, tokenizer),
            px.perplexity((module, tokenizer), [TEXT]),
            px.evaluate((module, tokenizer), TEXT),
            px.evaluate(tiny_llama_dir, text_path),
            px.evaluate(session, [text_path]),
            px.perplexity(session, TEXT),
        ]
    assert [run.perplexity for run in runs] == [pytest.approx(expected, rel=1e-6)] * len(runs)


def test_protocol_and_engine_options_reach_their_places(tiny_llama_dir: Path) -> None:
    run = px.perplexity(tiny_llama_dir, TEXT, max_length=32, stride=16, dtype="bf16", top_k=2)
    assert run.input_spec["protocol"]["max_length"] == 32
    assert run.input_spec["protocol"]["stride"] == 16
    assert run.session["dtype"] == "bfloat16"
    assert run.tokens.top_ids.shape[1] == 2


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m, t, d: px.evaluate(m, t), "perplexity(model, texts, tokenizer)"),
        (lambda m, t, d: px.perplexity(m, TEXT), "(module, tokenizer)"),
        (lambda m, t, d: px.evaluate(m, [TEXT]), "(module, tokenizer)"),
        (lambda m, t, d: px.evaluate((m, TEXT), TEXT), "(module, tokenizer)"),
        (lambda m, t, d: px.evaluate(3, TEXT), "torch.nn.Module"),
        (lambda m, t, d: px.evaluate(d, []), "text"),
        (lambda m, t, d: px.evaluate(d, ""), "text"),
        (lambda m, t, d: px.evaluate(d, "speeches/none.txt"), "speeches/none.txt"),
        (lambda m, t, d: px.evaluate(d, TEXT, precision="int4"), "precision"),
        (lambda m, t, d: px.load_session(d, dtyp="bf16"), "dtyp"),
    ],
)
def test_misuse_of_the_first_minute_is_told_how_to_be_done(
    call: Any, said: str, module: Any, tokenizer: Any, tiny_llama_dir: Path
) -> None:
    with pytest.raises(px.UsageError) as caught:
        call(module, tokenizer, tiny_llama_dir)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 700


def test_sessions_are_closed_at_the_end_of_their_block(tiny_llama_dir: Path) -> None:
    with px.load_session(tiny_llama_dir) as session:
        assert session.model.vocab_size > 0
    with pytest.raises(px.UsageError, match="closed"):
        session.token_nll([])


def test_frames_of_every_level_add_up_to_the_run(run: px.Run) -> None:
    tokens, words, windows, documents = (
        run.to_pandas(level=level) for level in ("token", "word", "window", "document")
    )
    assert len(tokens) == run.num_tokens
    assert len(documents) == 2
    assert len(windows) == run.num_windows
    assert tokens["nll"].sum() == pytest.approx(run.nll_sum, rel=1e-6)
    for frame, column in ((words, "nll"), (windows, "nll_sum"), (documents, "nll_sum")):
        assert frame[column].sum() == pytest.approx(run.nll_sum, rel=1e-6)
    assert windows["perplexity"].iloc[0] == pytest.approx(
        np.exp(windows["nll_sum"].iloc[0] / windows["num_tokens"].iloc[0])
    )
    assert documents["source_file"].tolist()[0].endswith("a.txt")
    assert "".join(tokens["text"].iloc[:3])
    with pytest.raises(px.UsageError, match="window"):
        run.to_pandas(level="sentence")


def test_reprs_are_short_and_tables_are_escaped(run: px.Run) -> None:
    assert repr(run).startswith("Run(perplexity ")
    assert len(repr(run)) < 300
    comparison, explanation = px.compare(run, run), px.explain(run, run, measure=False)
    for each in (run, comparison, explanation):
        assert len(repr(each)) < 400, repr(each)
        html = each._repr_html_()
        assert html.startswith("<table")
        assert "<script" not in html
    assert f"{run.perplexity:.4f}" in run._repr_html_()
    hostile = px.Run.from_json(run.to_json() | {"warnings": ["<script>alert(1)</script>"]})
    assert "<script>" not in hostile._repr_html_()


def test_a_run_names_itself_in_one_line(run: px.Run) -> None:
    assert run.folder is not None
    recorded = json.loads((run.folder / "run.json").read_text())["signature"]
    assert recorded == run.signature
    parts = recorded.split("|")
    assert parts[:2] == ["ppl", "sliding.v1"]
    assert {"len:64", "stride:32", "fp32"} <= set(parts)
    assert f"text:{run.text_fingerprint[:6]}" in parts
    assert f"tok:{run.tokenizer_fingerprint[:6]}" in parts
    assert parts[-1] == "px-" + ".".join(px.__version__.split(".")[:2])


def test_errors_are_public() -> None:
    assert issubclass(px.UsageError, px.PerplexitError)
    assert issubclass(px.ResumeError, px.RunError)


def test_an_option_of_none_is_the_engine_s_default(tiny_llama_dir: Path) -> None:
    """Also for options whose default is not None, on an engine that has no such option."""
    nothing = dict.fromkeys(("dtype", "merge_adapter", "mode", "prompt_len", "reference_dtype"))
    run = px.evaluate(tiny_llama_dir, TEXT, **nothing)
    assert (run.session["mode"], run.session["dtype"]) == ("full", "float32")
    with px.load_session(tiny_llama_dir) as session:
        px.evaluate(session, TEXT, **nothing)


def test_the_table_of_a_run_says_why_it_has_no_interval(tiny_llama_dir: Path) -> None:
    assert (
        "too few tokens for an interval" in px.perplexity(tiny_llama_dir, TEXT[:90])._repr_html_()
    )
