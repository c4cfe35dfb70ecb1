"""Divergences in a comparison, gates on the command line, and candidates in one order."""

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import perplexit as px
from perplexit.cli.app import app
from perplexit.comparison import ranked
from tests.tiny_models import save_tiny_model
from tests.toy_sessions import BigramSession

TEXTS = [f"Document {n}: the ferry left at four, and nobody saw it come back." for n in range(24)]


@pytest.fixture(scope="module")
def runs(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`reference` (its states kept), `same`, and `noisy` with noise in one layer."""
    folder = tmp_path_factory.mktemp("runs")
    tokens = px.prepare(
        TEXTS, tokenizer=tiny_llama_dir, max_length=32, output=folder / "in.safetensors"
    )
    px.evaluate(tiny_llama_dir, tokens, save_reference=True, run=folder / "reference")
    px.evaluate(
        tiny_llama_dir, tokens, reference=folder / "reference", run=folder / "same", batch_size=1
    )
    noisy = save_tiny_model("llama", folder / "noisy-model")
    model = AutoModelForCausalLM.from_pretrained(noisy, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layers.0" in name and weight.ndim == 2:
                weight.add_(torch.randn_like(weight) * 0.2)
    model.save_pretrained(noisy)
    px.evaluate(noisy, tokens, reference=folder / "reference", run=folder / "noisy")
    px.evaluate(
        tiny_llama_dir,
        tokens,
        reference=folder / "reference",
        run=folder / "int8",
        quantization="int8",
    )
    return folder


def test_a_comparison_sums_up_the_divergences(runs: Path) -> None:
    comparison = px.compare(runs / "reference", runs / "noisy")
    kl = px.Run.open(runs / "noisy").tokens.kl
    figures = comparison.figures()
    assert figures["mean_kl"].value == pytest.approx(kl.mean(dtype=np.float64))
    assert figures["mean_kl"].low < figures["mean_kl"].value < figures["mean_kl"].high
    assert figures["max_kl"].value == kl.max()
    assert 0 < figures["top1_agreement"].value < 1
    assert comparison.divergences.floor[1] <= 1e-9
    for name in ("position", "frequency", "confidence"):
        rows = comparison.buckets[name]
        assert sum(row["num_tokens"] for row in rows) == comparison.num_tokens
        total = sum(row["num_tokens"] * row["mean_kl"] for row in rows)
        assert total / comparison.num_tokens == pytest.approx(figures["mean_kl"].value)
    assert "same top 1:" in str(comparison)
    json.dumps(comparison.to_json(), allow_nan=False)


def test_the_same_weights_have_no_divergence(runs: Path) -> None:
    comparison = px.compare(runs / "reference", runs / "same")
    assert comparison.figures()["max_kl"].value < 1e-9
    assert comparison.figures()["top1_agreement"].value == 1
    assert comparison.verdict == "equivalent"


def test_divergences_from_another_reference_are_left_out_and_said(runs: Path) -> None:
    comparison = px.compare(runs / "noisy", runs / "same")
    assert comparison.divergences is None
    assert any("another model" in warning for warning in comparison.warnings)


def invoke(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_gates_pass_and_fail_by_exit_code_and_name_gate_figure_interval(
    runs: Path, tmp_path: Path
) -> None:
    gates = ["--gate", "fp16", "--gate", "mean_kl<=0.02", "--gate", "top1_agreement>=0.97"]
    code, out, _ = invoke("compare", runs / "reference", runs / "same", *gates, "--json")
    assert code == 0
    assert [gate["passed"] for gate in json.loads(out)["gates"]] == [True] * 3
    files = ["--junit", tmp_path / "ci" / "gates.xml", "--markdown", tmp_path / "gates.md"]
    code, _, err = invoke("compare", runs / "reference", runs / "noisy", *gates, *files)
    assert code == 3
    assert "mean_kl<=0.02" in err
    assert "top1_agreement>=0.97" in err
    assert "[" in err.splitlines()[-1]
    root = ElementTree.parse(tmp_path / "ci" / "gates.xml").getroot()
    assert int(root[0].get("failures")) >= 2
    assert "**FAIL**" in (tmp_path / "gates.md").read_text()
    assert invoke("compare", runs / "reference", runs / "same", "--gate", "mean_kl=1")[0] == 2


def test_a_quantized_model_within_bounds_passes_the_gates_that_a_damaged_one_fails(
    runs: Path,
) -> None:
    assert px.Run.open(runs / "int8").session["quantization"]["num_modules"] > 0
    gates = ["--gate", "mx", "--gate", "mean_kl<=0.001", "--gate", "top1_agreement>=0.9"]
    code, out, err = invoke("compare", runs / "reference", runs / "int8", *gates, "--json")
    assert code == 0, err
    assert [gate["passed"] for gate in json.loads(out)["gates"]] == [True] * 3
    kl = px.Run.open(runs / "int8").tokens.kl
    assert 0 < kl.mean() < 0.001  # something was quantized, and little was lost
    assert invoke("compare", runs / "reference", runs / "noisy", *gates)[0] == 3


def test_candidates_are_ranked_and_ties_are_ties(runs: Path) -> None:
    paths = [runs / "noisy", runs / "same", runs / "reference"]
    code, out, err = invoke("compare", runs / "reference", *paths, "--json")
    assert code == 0
    ranks = [document["rank"] for document in json.loads(out)]
    assert ranks in ([3, 1, 1], [1, 2, 2])  # noise can help a random model
    assert "ranking" in err


def test_a_rank_is_by_what_can_be_told_apart(tmp_path: Path, byte_tokenizer_json: Path) -> None:
    tokens = px.prepare(
        TEXTS, tokenizer=byte_tokenizer_json, max_length=32, output=tmp_path / "in.safetensors"
    )
    found = [px.evaluate(BigramSession(seed=seed), tokens) for seed in (0, 0, 1)]
    comparisons = [px.compare(found[0], run) for run in found]
    places = ranked([(str(n), run) for n, run in enumerate(found)], comparisons)
    by_name = {place.name: place.rank for place in places}
    assert by_name["0"] == by_name["1"] != by_name["2"]


def test_a_noise_floor_widens_what_counts_as_equal(runs: Path) -> None:
    assert px.compare(runs / "reference", runs / "noisy").verdict in ("worse", "better")
    wide = px.compare(runs / "reference", runs / "noisy", noise_floor=50.0)
    assert wide.verdict == "equivalent"
