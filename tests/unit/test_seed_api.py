"""The seeds' names: their parameters, their examples, and every kind of data loader."""

import inspect
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import perplexit as px
from perplexit.errors import (
    EmptyScoreError,
    EngineOutOfMemoryError,
    ModelError,
    NonFiniteError,
    UsageError,
    VocabularyError,
)
from perplexit.seed_api.loader_batches import window_batches
from tests.toy_sessions import BigramSession

VOCAB = 50
torch.set_num_threads(1)


class TinyModel(nn.Module):
    """A causal model of one's own: a running mean of embeddings, dropout, and a head."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(VOCAB, 16)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(16, VOCAB)
        self.calls: list[tuple[int, int]] = []

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.calls.append(tuple(ids.shape))
        hidden = self.embedding(ids).cumsum(1)
        counts = torch.arange(1, ids.shape[1] + 1)[:, None]
        return self.head(self.dropout(hidden / counts * 4))


@pytest.fixture
def model() -> TinyModel:
    return TinyModel()


@pytest.fixture
def rows() -> np.ndarray:
    return np.random.default_rng(0).integers(1, VOCAB, (5, 12))


def brute_force(model: TinyModel, rows: list[Any], skip: int | None = None) -> list[float]:
    """Losses in float64, a row at a time, dropout off."""
    model.eval().requires_grad_(False)
    losses = []
    for row in rows:
        ids = torch.as_tensor(np.asarray(row))
        logprobs = model(ids[None])[0].double().log_softmax(-1)
        losses += [
            -float(logprobs[t - 1, ids[t]]) for t in range(1, len(ids)) if int(ids[t]) != skip
        ]
    return losses


def mean_loss(loader: Any, model: TinyModel, **options: Any) -> float:
    options = {"ctx_len": 64, "batch_size": 2} | options
    return px.calculate_perplexity(
        loader, model, prompt_len=1, model_type="torch", log_file=None, model_name="m", **options
    )[1]


def test_the_seeds_parameters_in_the_seeds_order() -> None:
    def names(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert names(px.calculate_perplexity) == [
        "data_loader",
        "inference_session",
        "ctx_len",
        "prompt_len",
        "model_type",
        "batch_size",
        "log_file",
        "model_name",
    ]
    assert names(px.compute_perplexity) == ["model", "data_loader", "device", "pad_id"]
    assert inspect.signature(px.compute_perplexity).parameters["pad_id"].default == 0


def test_the_first_seeds_example_runs(tmp_path: Path, rows: np.ndarray, model: TinyModel) -> None:
    from perplexit import calculate_perplexity  # noqa: PLC0415 - the example's own line

    data_loader = torch.utils.data.DataLoader(torch.from_numpy(rows), batch_size=1)
    inference_session = px.PytorchInferenceSession(model)
    ctx_len = 2048
    prompt_len = 1
    model_type = "torch"
    batch_size = 1
    log_file = tmp_path / "perplexity.log"
    model_name = "model_name"

    perplexity, avg_loss = calculate_perplexity(
        data_loader,
        inference_session,
        ctx_len,
        prompt_len,
        model_type,
        batch_size,
        log_file,
        model_name,
    )
    expected = brute_force(model, list(rows))
    assert avg_loss == pytest.approx(np.mean(expected), rel=1e-6)
    assert perplexity == pytest.approx(math.exp(avg_loss))

    lines = log_file.read_text().splitlines()
    samples = [line for line in lines if line.startswith("sample_no")]
    assert len(samples) == len(rows)
    third = np.mean(expected[2 * 11 : 3 * 11])
    assert samples[2].startswith(f"sample_no: 2\tavg_loss: {third:.6f}")
    block = dict(line.split(": ", 1) for line in lines[len(samples) + 1 :])
    assert block["model_name"] == "model_name"
    assert block["model_type"] == "torch"
    assert (block["ctx_len"], block["prompt_len"], block["batch_size"]) == ("2048", "1", "1")
    assert (block["num_samples"], block["num_tokens"]) == ("5", "55")
    assert float(block["perplexity"]) == pytest.approx(perplexity, abs=1e-6)
    assert block["target for FP16"].startswith(f"{perplexity * 1.001:.6f}")
    assert block["target for MXFP6/MXINT8"].startswith(f"{perplexity * 1.01:.6f}")
    assert "95 %" in block["interval"]
    assert float(block["hours"]) >= 0


def test_the_log_file_is_written_anew(tmp_path: Path, rows: np.ndarray, model: TinyModel) -> None:
    log_file = tmp_path / "a.log"
    for _ in range(2):
        px.calculate_perplexity([rows], model, 64, 1, "torch", 2, log_file, "m")
    assert log_file.read_text().count("sample_no: 0\t") == 1


def test_the_fourth_seeds_examples_run(rows: np.ndarray, model: TinyModel) -> None:
    from perplexit import MemoryTracker, Timer, compute_perplexity  # noqa: PLC0415 - the examples' own line

    with MemoryTracker("Assembly") as tracker, Timer("Assembly") as timer:
        value = compute_perplexity(model, [torch.from_numpy(rows)], "cpu")
    print(f"Peak: {tracker.peak_mb:.1f} MB")
    assert timer.seconds > 0
    assert value == pytest.approx(math.exp(np.mean(brute_force(model, list(rows)))), rel=1e-6)


def test_torch_perplexity_gives_the_losses_of_each_row(rows: np.ndarray, model: TinyModel) -> None:
    losses = px.torch_perplexity([rows], model, 64)
    assert [len(nll) for nll in losses] == [11] * 5
    np.testing.assert_allclose(np.concatenate(losses), brute_force(model, list(rows)), rtol=1e-5)


def loaders(rows: np.ndarray) -> Iterator[tuple[str, Any]]:
    ones = np.ones_like(rows)
    tensors = torch.from_numpy(rows)
    data = torch.utils.data
    yield "array batches", [rows[:3], rows[3:]]
    yield "tensor batches", [tensors[:1], tensors[1:]]
    yield "single rows", list(rows)
    yield "lists of ids", [row.tolist() for row in rows]
    yield "lists of rows", [rows.tolist()]
    yield "list of tensors", [list(tensors)]
    yield "(ids, mask)", [(rows, ones)]
    yield "(ids, mask) of one row", [(rows[i], ones[i]) for i in range(5)]
    yield "dicts", [{"input_ids": tensors, "attention_mask": torch.ones_like(tensors)}]
    yield "dicts with labels", [{"input_ids": rows, "labels": rows}]
    yield "a generator", (row[None] for row in rows)
    yield "DataLoader of a TensorDataset", data.DataLoader(data.TensorDataset(tensors), 2)
    pairs = data.TensorDataset(tensors, torch.ones_like(tensors))
    yield "DataLoader of (ids, mask)", data.DataLoader(pairs, batch_size=2)
    yield (
        "DataLoader of dicts",
        data.DataLoader([{"input_ids": row} for row in tensors], batch_size=3),
    )


@pytest.mark.parametrize("kind", [name for name, _ in loaders(np.ones((5, 3), dtype=int))])
def test_every_kind_of_loader_gives_the_same_loss(
    kind: str, rows: np.ndarray, model: TinyModel
) -> None:
    loader = dict(loaders(rows))[kind]
    expected = np.mean(brute_force(model, list(rows)))
    assert mean_loss(loader, model) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.trap(9)
@pytest.mark.trap(10)
def test_trap_9_10_padding_on_either_side_changes_nothing(
    side: str, rows: np.ndarray, model: TinyModel
) -> None:
    texts = [row[: 4 + 2 * i] for i, row in enumerate(rows)]
    ids, mask = np.full((5, 12), 3), np.zeros((5, 12), dtype=int)
    for row, text in enumerate(texts):
        at = slice(0, len(text)) if side == "right" else slice(12 - len(text), 12)
        ids[row, at], mask[row, at] = text, 1
    expected = np.mean(brute_force(model, texts))
    assert mean_loss([(ids, mask)], model) == pytest.approx(expected, rel=1e-6)
    assert all(length <= 12 for _, length in model.calls[-5:])  # after the model itself was tried


@pytest.mark.trap(22)
def test_trap_22_a_real_token_with_the_pads_id_is_scored_where_a_mask_is_given(
    rows: np.ndarray, model: TinyModel
) -> None:
    rows[:, 5] = pad_id = 7
    ids = np.concatenate([rows, np.full((5, 3), pad_id)], axis=1)
    mask = np.concatenate([np.ones_like(rows), np.zeros((5, 3), dtype=int)], axis=1)
    with_mask = px.compute_perplexity(model, [(ids, mask)], "cpu", pad_id)
    assert with_mask == pytest.approx(math.exp(np.mean(brute_force(model, list(rows)))), rel=1e-6)
    without = px.compute_perplexity(model, [ids], "cpu", pad_id)
    skipping = brute_force(model, list(rows), skip=pad_id)
    assert without == pytest.approx(math.exp(np.mean(skipping)), rel=1e-6)
    assert without != pytest.approx(with_mask, rel=1e-6)


def test_labels_say_what_is_scored_and_the_rest_is_context(
    rows: np.ndarray, model: TinyModel
) -> None:
    labels = rows.copy()
    labels[:, :6] = -100
    losses = np.array(brute_force(model, list(rows))).reshape(5, 11)[:, 5:]
    loader = [{"input_ids": rows, "labels": labels}]
    assert mean_loss(loader, model) == pytest.approx(losses.mean(), rel=1e-6)
    assert px.compute_perplexity(model, loader) == pytest.approx(math.exp(losses.mean()), rel=1e-6)


@pytest.mark.trap(12)
@pytest.mark.trap(30)
def test_trap_30_rows_weigh_by_their_tokens_not_alike(rows: np.ndarray, model: TinyModel) -> None:
    texts = [rows[0], rows[1][:3]]
    losses = brute_force(model, texts)
    assert mean_loss([list(texts)], model) == pytest.approx(np.mean(losses), rel=1e-6)
    mean_of_means = (np.mean(losses[:11]) + np.mean(losses[11:])) / 2
    assert mean_loss([list(texts)], model) != pytest.approx(mean_of_means, rel=1e-4)


@pytest.mark.trap(25)
def test_trap_25_dropout_is_off_and_the_training_mode_comes_back(
    rows: np.ndarray, model: TinyModel
) -> None:
    model.train()
    model.head.eval()
    first = mean_loss([rows], model)
    assert first == mean_loss([rows], model)
    assert (model.training, model.dropout.training, model.head.training) == (True, True, False)


@pytest.mark.trap(23)
def test_trap_23_a_nan_is_an_error_that_names_its_place(rows: np.ndarray) -> None:
    bad = int(rows[3, 4])
    rows[rows == bad] = 0
    rows[3, 4] = bad
    session = BigramSession(VOCAB, bad_token=bad)
    with pytest.raises(NonFiniteError, match=f"window 3, position 4, token id {bad}"):
        px.calculate_perplexity([rows], session, 64, 1, "torch", 2, None, "m")


@pytest.mark.trap(33)
def test_trap_33_batch_size_takes_effect(rows: np.ndarray) -> None:
    session = BigramSession(VOCAB)
    for size in (1, 2, 5):
        session.batches.clear()
        px.calculate_perplexity([rows], session, 64, 1, "torch", size, None, "m")
        assert max(map(len, session.batches)) == size
        assert [row for batch in session.batches for row in batch] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("prompt_len", [1, 5, 11])
def test_prompt_len_does_not_change_the_figure(prompt_len: int, rows: np.ndarray) -> None:
    session = BigramSession(VOCAB)
    figures = px.calculate_perplexity([rows], session, 12, prompt_len, "torch", 2, None, "m")
    assert figures == px.calculate_perplexity([rows], session, 12, 1, "torch", 2, None, "m")


@pytest.mark.trap(11)
def test_the_loss_of_a_bfloat16_module_is_summed_in_wider_types(rows: np.ndarray) -> None:
    model = TinyModel().to(torch.bfloat16)
    model.eval()
    logits = torch.stack([model(torch.from_numpy(row)[None])[0] for row in rows])
    logprobs = logits.double().log_softmax(-1)[:, :-1]
    expected = -logprobs.gather(2, torch.from_numpy(rows)[:, 1:, None]).mean().item()
    assert mean_loss([rows], model) == pytest.approx(expected, abs=1e-5)


def test_infinity_only_past_the_limit_of_exp() -> None:
    """A mean loss of 500 nats is a number; the seed gave up at 100."""

    class Confident(nn.Module):
        def __init__(self, gap: float) -> None:
            super().__init__()
            self.gap = gap

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.tensor([self.gap, 0.0]).expand(*ids.shape, 2)

    ids = torch.ones(1, 4, dtype=torch.long)
    assert px.compute_perplexity(Confident(500), [ids]) == pytest.approx(math.exp(500))
    assert px.compute_perplexity(Confident(720), [ids]) == math.inf


def test_a_batch_that_does_not_fit_is_halved(rows: np.ndarray) -> None:
    small = BigramSession(VOCAB, memory_ids=24)
    figures = px.calculate_perplexity([rows], small, 64, 1, "torch", 5, None, "m")
    assert max(map(len, small.batches)) == 2
    roomy = BigramSession(VOCAB)
    assert figures == px.calculate_perplexity([rows], roomy, 64, 1, "torch", 5, None, "m")
    with pytest.raises(EngineOutOfMemoryError):
        px.torch_perplexity([rows], BigramSession(VOCAB, memory_ids=3), 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ctx_len": 1}, "ctx_len must be at least 2"),
        ({"prompt_len": 0}, "prompt_len must lie between 1 and"),
        ({"prompt_len": 64}, "prompt_len must lie between 1 and"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"model_type": "qpc"}, "model_type must be one of"),
        ({"ctx_len": 11}, r"at most ctx_len = 11 tokens, got 12 in row 0"),
        ({"inference_session": 3}, "expected an inference session"),
    ],
)
def test_wrong_arguments_are_said(options: dict[str, Any], message: str, rows: np.ndarray) -> None:
    arguments = {
        "data_loader": [rows],
        "inference_session": BigramSession(VOCAB),
        "ctx_len": 64,
        "prompt_len": 1,
        "model_type": "torch",
        "batch_size": 2,
        "log_file": None,
        "model_name": "m",
    }
    with pytest.raises(UsageError, match=message):
        px.calculate_perplexity(**(arguments | options))


def test_the_model_type_must_be_the_sessions_engine(rows: np.ndarray, model: TinyModel) -> None:
    with pytest.raises(UsageError, match="session runs on pytorch"):
        px.calculate_perplexity([rows], model, 64, 1, "onnx", 1, None, "m")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"ids": [[1, 2]]}, "must have 'input_ids'"),
        (([[1, 2]], [[1, 1]], [[1, 2]]), "must be ids or"),
        (([[1, 2, 3]], [[2, 3, 4]]), "mask of 3 zeros and ones"),
        (([[1, 2, 3]], [[1, 0, 1]]), "hole in the mask"),
        (([[1, 2, 3]], [[1, 1, 1], [1, 1, 1]]), "a row for each of its 1 rows"),
        ({"input_ids": [[1, 2, 3]], "labels": [[2, 3, 4]]}, "labels are not shifted"),
        ({"input_ids": [[1, 2, 3]], "labels": [[1, 2]]}, "a label for each of 3 ids"),
        (np.ones((2, 3)), "integer ids"),
        (3, "a batch of token ids"),
        (np.ones((2, 3, 4), dtype=int), "integer ids"),
        ("text", "a batch of token ids"),
    ],
)
def test_batches_that_cannot_be_read_are_refused(batch: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        list(window_batches([batch]))


@pytest.mark.parametrize("loader", [[], [np.ones((2, 1), dtype=int)], [np.zeros((0, 4), int)]])
def test_nothing_to_score_is_an_error_not_a_division_by_zero(
    loader: list[Any], model: TinyModel
) -> None:
    with pytest.raises(EmptyScoreError, match="at least one scored token"):
        mean_loss(loader, model)


def test_rows_too_short_to_score_are_counted_and_said(
    tmp_path: Path, rows: np.ndarray, model: TinyModel
) -> None:
    log_file = tmp_path / "a.log"
    px.calculate_perplexity([[[5], rows[0].tolist()]], model, 64, 1, "torch", 2, log_file, "m")
    text = log_file.read_text()
    assert "sample_no: 0\tavg_loss: -\tnum_tokens: 0\n" in text
    assert "num_samples: 2\nnum_tokens: 11\n" in text


@pytest.mark.trap(18)
def test_trap_18_ids_outside_the_models_vocabulary_are_refused(model: TinyModel) -> None:
    with pytest.raises(VocabularyError, match="tokenizer"):
        mean_loss([np.array([[1, VOCAB + 5, 2]])], model)


def test_a_module_that_does_not_predict_every_position_is_refused(rows: np.ndarray) -> None:
    class LastOnly(TinyModel):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids)[:, -1:]

    with pytest.raises(ModelError, match="expected logits of shape"):
        px.compute_perplexity(LastOnly(), [rows])


@pytest.mark.parametrize("kind", ["tuple", "mapping", "attribute"])
def test_logits_are_found_in_what_a_module_returns(
    kind: str, rows: np.ndarray, model: TinyModel
) -> None:
    class Output:
        def __init__(self, logits: torch.Tensor) -> None:
            self.logits = logits

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, ids: torch.Tensor) -> Any:
            logits = self.inner(ids)
            return {"tuple": (logits, None), "mapping": {"logits": logits}}.get(
                kind, Output(logits)
            )

    expected = px.compute_perplexity(model, [rows])
    assert px.compute_perplexity(Wrapped(), [rows]) == expected


@pytest.mark.parametrize("prompt_len", [1, 2, 5, 11])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_onnx_program_scores_by_prefill_and_decode_what_torch_scores_whole(
    onnx_folder: Path, tiny_llama_dir: Path, tmp_path: Path, prompt_len: int, batch_size: int
) -> None:
    """The seed scored token 0's logits against token 2, and misplaced labels for longer prompts."""
    random = np.random.default_rng(5)
    loader = [random.integers(0, 320, (2, 12)), random.integers(0, 320, (3, 12))]
    log = tmp_path / "log"
    expected = px.calculate_perplexity(
        loader, f"hf:{tiny_llama_dir}", 12, prompt_len, "torch", batch_size, None, "m"
    )
    got = px.calculate_perplexity(
        loader, f"onnx:{onnx_folder}", 12, prompt_len, "onnx", batch_size, log, "m"
    )
    assert got == pytest.approx(expected, rel=1e-5)
    assert "mode: cached" in log.read_text()
    assert f"prompt_len: {prompt_len}" in log.read_text()
    assert "num_tokens: 55" in log.read_text()  # every token of each row but its first


@pytest.mark.parametrize(
    ("model_type", "package"), [("openvino", "openvino"), ("gguf", "llama_cpp")]
)
def test_an_engine_that_scores_whole_windows_gives_the_figure_for_every_prompt_len(
    model_type: str, package: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    pytest.importorskip(package)
    program = px.compile(tiny_llama_dir, to=model_type, output=tmp_path / "program").folder
    rows, log = np.random.default_rng(5).integers(0, 320, (3, 12)), tmp_path / "log"
    expected = px.calculate_perplexity([rows], f"hf:{tiny_llama_dir}", 12, 1, "torch", 1, None, "m")
    for prompt_len in (1, 5, 11):
        got = px.calculate_perplexity([rows], program, 12, prompt_len, model_type, 2, log, "m")
        assert got == pytest.approx(expected, rel=1e-5)
        assert f"prompt_len: {prompt_len}\n" in log.read_text()
        assert "num_tokens: 33" in log.read_text()
        assert "mode: full" in log.read_text()  # and it says so: this engine has no cached mode
    with pytest.raises(UsageError, match=f"model_type={model_type!r}"):
        px.calculate_perplexity([rows], program, 12, 1, "torch", 1, None, "m")


def test_no_windows_is_a_stated_error(onnx_folder: Path) -> None:
    with pytest.raises(EmptyScoreError, match="at least one scored token"):
        px.calculate_perplexity([], f"onnx:{onnx_folder}", 12, 1, "onnx", 1, None, "m")


@pytest.fixture(scope="module")
def onnx_folder(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("seed-onnx") / "program"
    return px.compile(tiny_llama_dir, to="onnx", output=output, perplexity=False).folder
