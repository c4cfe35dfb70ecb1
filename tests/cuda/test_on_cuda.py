"""What only a CUDA device shows: true float32, queues, graphs, kernels, memory and its end."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import perplexit as px
from perplexit.inputs.token_file import TokenFile
from perplexit.sessions.pytorch import PytorchInferenceSession
from tests.oracles import random_window
from tests.tiny_models import VOCAB_SIZE

WINDOWS = [random_window(n, length, VOCAB_SIZE, index=n) for n, length in enumerate((48, 41, 9))]


def largest_difference(left, right):
    assert [len(a) for a in left] == [len(b) for b in right]
    return max(float(np.abs(a - b).max()) for a, b in zip(left, right, strict=True))


@pytest.fixture(scope="module")
def tokens(tiny_llama_dir, tmp_path_factory: pytest.TempPathFactory) -> TokenFile:
    return px.prepare(
        ["The loss of a token is the logarithm of its probability. " * 20, "Short."],
        tokenizer=tiny_llama_dir,
        max_length=64,
        stride=32,
        output=tmp_path_factory.mktemp("input") / "in.safetensors",
    )


@pytest.fixture(scope="module")
def expected(tiny_llama_dir):
    return PytorchInferenceSession(tiny_llama_dir, device="cpu").token_nll(WINDOWS)


@pytest.mark.trap(36)
def test_float32_is_float32_even_where_the_process_allows_tf32(tiny_llama_dir, expected) -> None:
    torch.set_float32_matmul_precision("high")
    try:
        session = PytorchInferenceSession(tiny_llama_dir, device="cuda")
        assert largest_difference(session.token_nll(WINDOWS), expected) < 2e-5
        assert torch.get_float32_matmul_precision() == "high", "left as it was"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.trap(41)
def test_the_softmax_over_bfloat16_layers_is_float32(tiny_llama_dir, expected) -> None:
    session = PytorchInferenceSession(tiny_llama_dir, device="cuda", dtype="bfloat16")
    on_cpu = PytorchInferenceSession(tiny_llama_dir, device="cpu", dtype="bfloat16")
    mean = np.mean(np.concatenate(session.token_nll(WINDOWS)))
    assert abs(mean - np.mean(np.concatenate(on_cpu.token_nll(WINDOWS)))) < 0.05
    assert len(np.unique(np.concatenate(session.token_nll(WINDOWS)))) > 80, "not 8 bits of mantissa"


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_layers_and_cuda_graphs_give_the_same(tiny_llama_dir, expected, mode) -> None:
    session = PytorchInferenceSession(tiny_llama_dir, device="cuda", compile_mode=mode)
    for _ in range(4):  # warm-up, recording, replays
        assert largest_difference(session.token_nll(WINDOWS), expected) < 1e-4
    alone = session.token_nll(WINDOWS[1:2])
    assert largest_difference(alone, expected[1:2]) < 1e-4


@pytest.mark.parametrize(
    ("head", "package"), [("liger", "liger_kernel"), ("cce", "cut_cross_entropy")]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fused_heads_give_the_same(tiny_llama_dir, head: str, package: str, dtype: str) -> None:
    pytest.importorskip(package, reason=f"THE HEAD {head} WAS NOT RUN: {package} is not installed")
    plain = PytorchInferenceSession(tiny_llama_dir, device="cuda", dtype=dtype)
    fused = PytorchInferenceSession(tiny_llama_dir, device="cuda", dtype=dtype, head=head)
    difference = largest_difference(fused.token_nll(WINDOWS), plain.token_nll(WINDOWS))
    # cce keeps its tiles in float32, where the model's own head rounds them to bfloat16.
    assert difference < (1e-4 if dtype == "float32" else 0.1)
    assert fused.description.settings["head"] == f"{head} (fused)"


def test_flash_attention_gives_the_same(tiny_llama_dir) -> None:
    pytest.importorskip("flash_attn", reason="FLASH ATTENTION 2 WAS NOT RUN: not installed")
    options = {"device": "cuda", "dtype": "bfloat16"}
    flash = PytorchInferenceSession(tiny_llama_dir, attention="flash_attention_2", **options)
    sdpa = PytorchInferenceSession(tiny_llama_dir, **options)
    assert largest_difference(flash.token_nll(WINDOWS), sdpa.token_nll(WINDOWS)) < 0.2


def test_a_queued_run_is_the_batches_one_by_one(tiny_llama_dir, tokens, monkeypatch) -> None:
    session = PytorchInferenceSession(tiny_llama_dir, device="cuda")
    assert session.queues
    queued = px.evaluate(session, tokens, batch_size=4, top_k=2)
    monkeypatch.setattr(PytorchInferenceSession, "queues", False)
    plain = px.evaluate(session, tokens, batch_size=4, top_k=2)
    for name in ("nll", "rank", "entropy", "top_ids"):
        assert np.array_equal(getattr(queued.tokens, name), getattr(plain.tokens, name)), name


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_layers_off_the_device_are_fetched(tiny_llama_dir, expected, place: str) -> None:
    device_map = {
        "model.embed_tokens": "cuda:0",
        "model.layers.0": place,
        "model.layers.1": "cuda:0",
        "model.norm": "cuda:0",
        "model.rotary_emb": "cuda:0",
        "lm_head": "cuda:0",
    }
    session = PytorchInferenceSession(tiny_llama_dir, device_map=device_map)
    assert session.description.device == "cuda:0"
    assert largest_difference(session.token_nll(WINDOWS), expected) < 2e-5


def test_two_devices(tiny_llama_dir, expected) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("TWO DEVICES WERE NOT TESTED: there is one")
    first, second = ("cuda:0",) * 3, ("cuda:1",) * 3
    names = ("model.embed_tokens", "model.rotary_emb", "model.layers.0")
    rest = ("model.layers.1", "model.norm", "lm_head")
    device_map = dict(zip((*names, *rest), (*first, *second), strict=True))
    spread = PytorchInferenceSession(tiny_llama_dir, device_map=device_map)
    assert spread.description.device == "cuda:1"
    assert largest_difference(spread.token_nll(WINDOWS), expected) < 2e-5
    split = PytorchInferenceSession(tiny_llama_dir, tensor_parallel=2)
    try:
        assert largest_difference(split.token_nll(WINDOWS), expected) < 1e-4
    finally:
        split.close()


@pytest.fixture(scope="module")
def wide_model() -> torch.nn.Module:
    """A small body under a vocabulary of 64k: whole logits would be its largest tensor by far."""
    config = LlamaConfig(
        vocab_size=65_536,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to("cuda", torch.bfloat16)


def _wide_tokens(folder, count: int) -> TokenFile:
    lines = folder / "ids.txt"
    generator = np.random.default_rng(0)
    rows = [" ".join(map(str, generator.integers(0, 60_000, 1024))) for _ in range(count)]
    lines.write_text("\n".join(rows) + "\n")
    return px.import_id_lines(lines, output=folder / "wide.safetensors")


def test_the_record_tells_working_memory_from_weights(wide_model, tmp_path) -> None:
    run = px.evaluate(PytorchInferenceSession(wide_model), _wide_tokens(tmp_path, 8), batch_size=8)
    peaks = run.peak_memory_bytes
    weights = sum(p.numel() * p.element_size() for p in wide_model.parameters())
    assert peaks["torch_device"] >= weights + peaks["torch_device_beyond_weights"]
    whole_logits = 8 * 1023 * 65_536 * 2
    assert 0 < peaks["torch_device_beyond_weights"] < 0.6 * whole_logits


def test_where_memory_runs_out_batches_are_halved(wide_model, tmp_path) -> None:
    tokens = _wide_tokens(tmp_path, 64)
    # 8 MiB of logits at a time, so that the layers' own memory decides: 4 KB an id and more.
    session = PytorchInferenceSession(wide_model, max_logits_bytes=8 << 20)
    expected = px.evaluate(session, tokens, batch_size=1)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    room = torch.cuda.memory_allocated() + (160 << 20)
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        run = px.evaluate(session, tokens, batch_size=64)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert run.batch_plan["limits"][-1]["max_windows"] < 64
    assert run.nll_sum == pytest.approx(expected.nll_sum, rel=1e-3)
