"""References of which a part is known: bounds that hold, and llama.cpp's base file read right."""

import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, rel_entr
from transformers import AutoModelForCausalLM

import perplexit as px
from perplexit.errors import FingerprintMismatchError, ModelError, RunError, VocabularyError
from perplexit.functional.divergence import PartialDistributions, partial_divergences
from perplexit.inputs.kl_base_file import KlBaseFile
from perplexit.inputs.token_file import TokenFile
from tests.tiny_models import save_tiny_model
from tests.unseen_text import DOCUMENTS


def top_k_of(logp_NV: np.ndarray, targets_N: np.ndarray, k: int) -> PartialDistributions:
    """What an engine gives: the K most likely tokens, and the target."""
    known = np.full_like(logp_NV, -np.inf)
    for row, (logp_V, target) in enumerate(zip(logp_NV, targets_N, strict=True)):
        kept = [*np.argsort(-logp_V)[:k], target]
        known[row, kept] = logp_V[kept]
    cap_N = np.exp(np.sort(logp_NV)[:, -k])
    tail_N = np.maximum(1 - np.exp(known).sum(-1), 0)
    return PartialDistributions(*map(torch.from_numpy, (known, tail_N, cap_N)), num_known=k)


@given(
    seed=st.integers(0, 10_000),
    k=st.integers(1, 60),
    sharpness=st.floats(0.1, 12.0),
    noise=st.floats(0.0, 6.0),
)
@settings(max_examples=200, deadline=None)
def test_the_bounds_hold_for_every_reference(
    seed: int, k: int, sharpness: float, noise: float
) -> None:
    random = np.random.default_rng(seed)
    logits_NV = random.normal(0, sharpness, (4, 60))
    candidate_NV = logits_NV + random.normal(0, noise, logits_NV.shape)
    targets_N = random.integers(0, 60, 4)
    p, q = (np.exp(log_softmax(x, -1)) for x in (logits_NV, candidate_NV))
    found = partial_divergences(
        top_k_of(log_softmax(logits_NV, -1), targets_N, k),
        torch.from_numpy(candidate_NV),
        torch.from_numpy(targets_N),
    )
    kl, reverse = rel_entr(p, q).sum(-1), rel_entr(q, p).sum(-1)
    middle = (p + q) / 2
    js = (rel_entr(p, middle).sum(-1) + rel_entr(q, middle).sum(-1)) / 2
    slack = 1e-9
    assert (found.kl_N.numpy() <= kl + slack).all()
    assert (found.kl_high_N.numpy() >= kl - slack).all()
    assert (found.reverse_kl_N.numpy() <= reverse + slack).all()
    assert (found.js_N.numpy() <= js + slack).all()
    assert (found.kl_N.numpy() >= 0).all()
    np.testing.assert_array_equal(found.same_top1_N, p.argmax(-1) == q.argmax(-1))
    rows = np.arange(4)
    delta_p = q[rows, targets_N] - p[rows, targets_N]
    np.testing.assert_allclose(found.delta_p_N, delta_p, atol=1e-6)
    if k == 60:
        np.testing.assert_allclose(found.kl_N, kl, atol=1e-9)
        np.testing.assert_allclose(found.kl_high_N, kl, atol=1e-9)


def test_the_upper_bound_is_attained_by_the_worst_reference() -> None:
    """The tail's mass on the tokens that the candidate finds least likely, as much as each can."""
    q = np.array([0.4, 0.3, 0.16, 0.08, 0.04, 0.015, 0.005])
    p = np.array([0.5, 0.2, 0.0, 0.0, 0.0, 0.1, 0.2])
    with np.errstate(divide="ignore"):
        known = np.where(np.arange(7) < 2, np.log(p), -np.inf)
    given_ = PartialDistributions(
        torch.from_numpy(known[None]), torch.tensor([0.3]), torch.tensor([0.2]), num_known=2
    )
    found = partial_divergences(given_, torch.from_numpy(np.log(q))[None], torch.tensor([0]))
    assert found.kl_high_N.item() == pytest.approx(rel_entr(p, q).sum())
    assert found.kl_N.item() == pytest.approx(
        0.5 * math.log(0.5 / 0.4) + 0.2 * math.log(0.2 / 0.3) + 0.3 * math.log(0.3 / 0.3)
    )


def write_kl_base(path: Path, num_context: int, chunks: list[list[int]], logits: list) -> None:
    """llama.cpp's file, a value at a time, from the description of its format.

    logits[c][k]: of chunk c, what its id num_context / 2 + 1 + k was predicted with.
    """
    vocab_size = len(logits[0][0])
    with path.open("wb") as file:
        file.write(b"_logits_")
        file.write(struct.pack("<Iii", num_context, vocab_size, len(chunks)))
        for ids in chunks:
            file.write(struct.pack(f"<{num_context}i", *ids))
        for rows in logits:
            assert len(rows) == num_context - 1 - num_context // 2
            for row in rows:
                largest = max(row)
                lowest = max(min(row), largest - 16)
                log_sum = math.log(sum(math.exp(x - largest) for x in row))
                scale = (largest - lowest) / 65535
                file.write(struct.pack("<ff", scale, lowest - largest - log_sum))
                steps = [round((x - lowest) / scale) if x > lowest else 0 for x in row]
                file.write(struct.pack(f"<{vocab_size}H", *steps))
                if vocab_size % 2:
                    file.write(b"\0\0")


def chunk_logits(model: Path, tokens: TokenFile) -> tuple[list[list[int]], list]:
    """(the ids of each window, the logits that its targets were predicted with)."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    chunks, logits = [], []
    for index in range(tokens.num_windows):
        window = tokens.window_ids(index)
        with torch.no_grad():
            found = network(torch.tensor([window.ids_T.tolist()])).logits[0].double()
        chunks.append(window.ids_T.tolist())
        # tiny models are nearly uniform: sharpened, the clamp has something to do
        logits.append((found[window.targets_N - 1]).tolist())
    return chunks, logits


@pytest.fixture(scope="module")
def sharp_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose logits reach over far more than 16 nats, as those of real models do."""
    folder = save_tiny_model("llama", tmp_path_factory.mktemp("sharp"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        head = model.lm_head.weight
        head.mul_(3.5 / (head.std() * head.shape[1] ** 0.5))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def noisy_dir(sharp_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_model("llama", tmp_path_factory.mktemp("noisy"))
    model = AutoModelForCausalLM.from_pretrained(sharp_dir, dtype=torch.float32)
    torch.manual_seed(5)
    with torch.no_grad():
        weight = model.model.layers[1].mlp.down_proj.weight
        weight.add_(torch.randn_like(weight) * weight.std() * 0.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokens(sharp_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenFile:
    output = tmp_path_factory.mktemp("input") / "in.safetensors"
    return px.prepare(
        DOCUMENTS, tokenizer=sharp_dir, protocol="llama-cpp", max_length=32, output=output
    )


@pytest.fixture(scope="module")
def base(sharp_dir: Path, tokens: TokenFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.kld"
    write_kl_base(path, 32, *chunk_logits(sharp_dir, tokens))
    return path


def whole_kl(reference: Path, candidate: Path, tokens: TokenFile) -> np.ndarray:
    (_, ours), (_, theirs) = (chunk_logits(x, tokens) for x in (reference, candidate))
    pairs = [(np.array(a), np.array(b)) for a, b in zip(ours, theirs, strict=True)]
    return np.concatenate(
        [rel_entr(*(np.exp(log_softmax(x, -1)) for x in pair)).sum(-1) for pair in pairs]
    )


def test_the_base_file_gives_the_kl_of_whole_logits(
    sharp_dir: Path, noisy_dir: Path, tokens: TokenFile, base: Path, tmp_path: Path
) -> None:
    run = px.evaluate(noisy_dir, tokens, reference=base, run=tmp_path / "run")
    expected = whole_kl(sharp_dir, noisy_dir, tokens)
    assert expected.mean() > 0.01
    rows = KlBaseFile(base).rows(0, 0, 15)
    assert np.isinf(rows.logp_NV).any()  # the clamp was at work
    np.testing.assert_allclose(run.tokens.kl, expected, atol=2e-3, rtol=5e-3)
    assert run.tokens.kl.mean() == pytest.approx(expected.mean(), abs=2e-4, rel=2e-3)
    assert run.reference["kind"] == "llama.cpp base file"
    assert run.reference["weights_fingerprint"] == KlBaseFile(base).fingerprint


@pytest.mark.trap(16)
def test_trap_16_the_base_files_floor_is_stated_and_covers_a_models_kl_with_itself(
    sharp_dir: Path, tokens: TokenFile, base: Path
) -> None:
    run = px.evaluate(sharp_dir, tokens, reference=base)
    floor = run.reference["self_kl_mean"]
    assert 1e-9 < floor < 1e-3
    assert run.tokens.kl.mean() <= floor
    assert run.tokens.same_top1.mean() > 0.95


def test_a_base_file_over_other_ids_is_refused_with_what_differs(
    sharp_dir: Path, tokens: TokenFile, base: Path, tmp_path: Path
) -> None:
    def prepared(name: str, **options: object) -> TokenFile:
        output = tmp_path / f"{name}.safetensors"
        return px.prepare(DOCUMENTS, tokenizer=sharp_dir, output=output, **options)

    cases = {
        "protocol is disjoint": prepared("a", protocol="disjoint", max_length=32),
        "have \\[64\\] ids, the chunks 32": prepared("b", protocol="llama-cpp", max_length=64),
    }
    for message, other in cases.items():
        with pytest.raises(FingerprintMismatchError, match=message):
            px.evaluate(sharp_dir, other, reference=base)
    data = bytearray(base.read_bytes())
    data[20 + 4 * 40] ^= 1  # an id of the second chunk
    changed = tmp_path / "changed.kld"
    changed.write_bytes(data)
    with pytest.raises(FingerprintMismatchError, match="1 ids of window 1 differ: at position 8"):
        px.evaluate(sharp_dir, tokens, reference=changed)
    changed.write_bytes(base.read_bytes()[:-2])
    with pytest.raises(ModelError, match="cut off"):
        px.evaluate(sharp_dir, tokens, reference=changed)


def test_a_bos_written_over_chunk_starts_is_no_difference(sharp_dir: Path, tmp_path: Path) -> None:
    tokens = px.prepare(
        DOCUMENTS,
        tokenizer=sharp_dir,
        protocol="llama-cpp",
        bos="first",
        max_length=32,
        output=tmp_path / "in.safetensors",
    )
    chunks, logits = chunk_logits(sharp_dir, tokens)
    for index in range(1, tokens.num_windows):  # the file has the ids as they were tokenised
        start = int(tokens.windows.array[index, 1])
        assert chunks[index][0] != tokens.token_ids[start]
        chunks[index][0] = int(tokens.token_ids[start])
    write_kl_base(tmp_path / "base.kld", 32, chunks, logits)
    run = px.evaluate(sharp_dir, tokens, reference=tmp_path / "base.kld")
    assert run.tokens.kl.max() < 1e-3


def test_a_run_with_alternatives_is_a_reference_with_bounds(
    sharp_dir: Path, noisy_dir: Path, tokens: TokenFile, tmp_path: Path
) -> None:
    expected = whole_kl(sharp_dir, noisy_dir, tokens)
    widths = []
    for k in (5, 50):
        px.evaluate(sharp_dir, tokens, top_k=k, run=tmp_path / f"top{k}")
        run = px.evaluate(
            noisy_dir, tokens, reference=tmp_path / f"top{k}", run=tmp_path / f"candidate{k}"
        )
        rows = px.Run.open(tmp_path / f"candidate{k}").tokens
        assert (rows.kl <= expected * (1 + 1e-5) + 1e-5).all()
        assert (rows.kl_high >= expected * (1 - 1e-5) - 1e-5).all()
        assert (rows.top_k_agreement is None) == (k < 10)
        assert run.reference["kind"] == f"top {k} and a tail"
        widths.append(float((rows.kl_high - rows.kl).mean()))
    assert widths[1] < widths[0]
    px.evaluate(sharp_dir, tokens, run=tmp_path / "plain")
    with pytest.raises(RunError, match="--top-k 20"):
        px.evaluate(noisy_dir, tokens, reference=tmp_path / "plain")


def test_a_comparison_with_a_partial_reference_gives_bounds_and_gates_on_the_upper(
    sharp_dir: Path, noisy_dir: Path, tokens: TokenFile, tmp_path: Path
) -> None:
    px.evaluate(sharp_dir, tokens, top_k=5, run=tmp_path / "top5")
    px.evaluate(noisy_dir, tokens, reference=tmp_path / "top5", run=tmp_path / "run")
    comparison = px.compare(tmp_path / "top5", tmp_path / "run")
    figures = comparison.figures()
    expected = whole_kl(sharp_dir, noisy_dir, tokens).mean()
    assert figures["mean_kl"].value <= expected <= figures["mean_kl_high"].value
    assert figures["mean_kl"].high == figures["mean_kl_high"].high
    assert "at most" in str(comparison)
    bound = (figures["mean_kl"].value + figures["mean_kl_high"].value) / 2
    compared = px.compare_runs(tmp_path / "top5", [tmp_path / "run"], gates=[f"mean_kl<={bound}"])
    assert compared.failed


def test_another_vocabulary_is_refused(sharp_dir: Path, tokens: TokenFile, tmp_path: Path) -> None:
    chunks, logits = chunk_logits(sharp_dir, tokens)
    shorter = [[row[:-1] for row in rows] for rows in logits]
    write_kl_base(tmp_path / "base.kld", 32, chunks, shorter)
    with pytest.raises(VocabularyError, match="319"):
        px.evaluate(sharp_dir, tokens, reference=tmp_path / "base.kld")


def test_the_base_file_is_a_run_of_its_own_that_candidates_are_compared_with(
    sharp_dir: Path, noisy_dir: Path, tokens: TokenFile, base: Path, tmp_path: Path
) -> None:
    recorded = px.evaluate(f"recorded:{base}", tokens, run=tmp_path / "base")
    plain = px.evaluate(sharp_dir, tokens)
    error = plain.tokens.nll - recorded.tokens.nll
    clamped = np.abs(error) > 1e-3
    assert (error[clamped] > 0).all()  # a lower bound, and counted
    assert clamped.sum() == recorded.session["settings"]["num_clamped_targets"]
    px.evaluate(noisy_dir, tokens, reference=base, run=tmp_path / "noisy")
    found = px.compare(tmp_path / "base", tmp_path / "noisy")
    expected = whole_kl(sharp_dir, noisy_dir, tokens)
    assert found.figures()["mean_kl"].value == pytest.approx(expected.mean(), rel=2e-3, abs=2e-4)
    assert found.divergences.floor[0] > 0
    assert "the reference with itself" in str(found)
    assert not any("another model" in text for text in found.warnings)
