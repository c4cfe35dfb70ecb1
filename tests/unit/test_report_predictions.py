"""The report beyond perplexity: divergences with Δp, changed first choices, other tokens."""

import json
import re
from html import unescape
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM

import perplexit as px
from perplexit.report.labelled_runs import LabelledRuns
from perplexit.report.run_tables import aligned_rows, changed_choices, prediction_rows
from tests.report_runs import toy_runs
from tests.tiny_models import save_tiny_model
from tests.toy_sessions import BigramSession

TEXTS = ["Ein Tee, bitte — <b>without</b> sugar & milk 🙂. " * 6, "Zwei.", "Three cups, four. " * 9]


@pytest.fixture(scope="module")
def letters_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer without a merge."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    path = tmp_path_factory.mktemp("letters") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def text_of(page: Path) -> str:
    """What a reader sees, without the script and the data."""
    body = re.sub(r"(?s)<(script|style)\b.*?</\1>", " ", page.read_text("utf-8"))
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


def test_changed_first_choices_stand_in_the_page_as_text(
    byte_tokenizer_json: Path, tmp_path: Path
) -> None:
    runs = toy_runs(tmp_path, TEXTS, byte_tokenizer_json, noises=(1.5,))
    labelled = LabelledRuns.of(runs)
    (changed,) = changed_choices(labelled)
    flips = labelled.comparisons[0].flips
    assert f"{flips.count:,} of {flips.num_tokens:,}" in changed.says
    px.write_report(runs, tmp_path / "r.html")
    shown = text_of(tmp_path / "r.html")
    assert "First choices that changed" in shown
    assert changed.says[1:] in shown
    assert "<b>without</b>" not in (tmp_path / "r.html").read_text("utf-8")


def test_divergences_with_delta_p_have_a_table(tiny_llama_dir: Path, tmp_path: Path) -> None:
    tokens = px.prepare(
        TEXTS, tokenizer=tiny_llama_dir, max_length=24, output=tmp_path / "in.safetensors"
    )
    other = save_tiny_model("llama", tmp_path / "other")
    network = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
    with torch.no_grad():
        network.lm_head.weight.mul_(2)
    network.save_pretrained(other)
    px.evaluate(tiny_llama_dir, tokens, save_reference=True, run=tmp_path / "full")
    px.evaluate(other, tokens, reference=tmp_path / "full", run=tmp_path / "other-run")
    px.evaluate(tiny_llama_dir, tokens, run=tmp_path / "plain")
    runs = [px.Run.open(tmp_path / name) for name in ("full", "other-run", "plain")]
    rows = {row.name: row.cells for row in prediction_rows(LabelledRuns.of(runs))}
    assert {"KL", "Δp", "Δp, root mean square", "Δp, 0.1 %", "same first choice"} <= set(rows)
    assert rows["KL"][0].interval.startswith("[")
    assert rows["KL"][1].value == "–"
    px.write_report(runs, tmp_path / "r.html")
    assert "How far predictions moved" in text_of(tmp_path / "r.html")
    px.write_report(runs[::2], tmp_path / "plain.html")
    assert "How far predictions moved" not in text_of(tmp_path / "plain.html")


def test_runs_in_other_tokens_are_set_beside_byte_by_byte(
    byte_tokenizer_json: Path, letters_json: Path, tmp_path: Path
) -> None:
    runs = toy_runs(tmp_path / "a", TEXTS, byte_tokenizer_json, noises=(0.5,))
    letters = px.prepare(
        TEXTS, tokenizer=letters_json, max_length=64, output=tmp_path / "letters.safetensors"
    )
    other = px.evaluate(BigramSession(400, seed=3), letters, run=tmp_path / "letters")
    written = px.write_report([runs[0], other, runs[1]], tmp_path / "r.html")
    (row,) = aligned_rows(written.runs)
    shown = text_of(tmp_path / "r.html")
    assert row["label"] == "letters"
    assert "Other tokens, byte by byte" in shown
    assert "cannot be compared" in shown
    assert row["difference_interval"] in shown
    assert f"{other.perplexity:,.2f}" not in shown  # no perplexity a token of another tokenizer
    assert [run["label"] for run in written.to_json()["runs"]] == ["full", "noise-0.5"]
    assert written.to_json()["aligned"][0]["unit"] == "byte"
    json.dumps(written.to_json(), allow_nan=False)
    alone = px.write_report([runs[0], other], tmp_path / "alone.html")
    assert alone.headline.startswith("Byte by byte, letters ")
    assert "bits per byte" in alone.headline
