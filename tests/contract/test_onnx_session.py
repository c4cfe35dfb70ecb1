"""What an ONNX session promises beyond the suite that every session passes."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from perplexit.compilation.targets import compile
from perplexit.errors import CapabilityError, EngineOutOfMemoryError, ModelError, UsageError
from perplexit.sessions.base import DetailedSession, InferenceSession
from perplexit.sessions.onnx.session import OnnxCachingSession, OnnxInferenceSession
from tests.oracles import random_window
from tests.tiny_models import VOCAB_SIZE

WINDOWS = [random_window(seed, length, VOCAB_SIZE) for seed, length in enumerate((60, 33, 5, 2))]


@pytest.fixture(scope="module")
def loss_folder(tiny_llama_dir, tmp_path_factory):
    output = tmp_path_factory.mktemp("onnx") / "loss"
    return compile(tiny_llama_dir, to="onnx", output=output, quantization="int8").folder


@pytest.fixture(scope="module")
def logits_folder(tiny_llama_dir, tmp_path_factory):
    output = tmp_path_factory.mktemp("onnx") / "logits"
    return compile(tiny_llama_dir, to="onnx", output=output, perplexity=False).folder


@pytest.fixture(scope="module")
def fixed_folder(tiny_llama_dir, tmp_path_factory):
    output = tmp_path_factory.mktemp("onnx") / "fixed"
    return compile(tiny_llama_dir, to="onnx", output=output, batch_size=2, max_length=60).folder


def test_only_a_program_with_logits_claims_to_see_distributions(loss_folder, logits_folder):
    loss, logits = OnnxInferenceSession(loss_folder), OnnxInferenceSession(logits_folder)
    assert isinstance(loss, InferenceSession)
    assert not isinstance(loss, DetailedSession)
    assert isinstance(logits, DetailedSession)
    assert type(logits) is OnnxCachingSession


def test_the_description_says_what_is_in_effect(loss_folder):
    session = OnnxInferenceSession(loss_folder, threads=1)
    description = session.description
    assert description.engine == "onnxruntime"
    assert (description.dtype, description.device, description.threads) == ("float32", "cpu", 1)
    assert description.quantization.name == "int8"
    assert description.quantization.num_modules == 14
    assert description.quantization.num_bytes > 0
    assert description.settings["weights"]["accuracy_level"] == 1
    assert description.settings["providers"] == ["CPUExecutionProvider"]
    assert session.model.address == f"onnx:{loss_folder}"


def test_fixed_shapes_give_the_same_losses_as_any_shapes(fixed_folder, tiny_llama_dir):
    session = OnnxInferenceSession(fixed_folder, threads=1)
    assert session.max_batch_size(60) == 2
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir).eval()
    for window, nll in zip(WINDOWS, session.token_nll(WINDOWS), strict=True):
        ids = torch.from_numpy(window.ids_T).long()
        with torch.no_grad():
            logprobs = model(ids[None]).logits[0].double().log_softmax(-1)
        expected = -logprobs[window.targets_N - 1, ids[window.targets_N]]
        assert np.allclose(nll, expected.numpy(), atol=2e-5)


def test_a_window_longer_than_the_compiled_shape_is_refused(fixed_folder):
    with pytest.raises(CapabilityError, match=r"windows of 60 ids, got one of 61"):
        OnnxInferenceSession(fixed_folder).token_nll([random_window(0, 61, VOCAB_SIZE)])


def test_dtype_and_quantization_cannot_be_changed_afterwards(loss_folder):
    OnnxInferenceSession(loss_folder, dtype="fp32", quantization="8bit").close()
    with pytest.raises(CapabilityError, match="compiled in float32, got dtype bf16"):
        OnnxInferenceSession(loss_folder, dtype="bf16")
    with pytest.raises(CapabilityError, match="weights are int8, got quantization 'int4'"):
        OnnxInferenceSession(loss_folder, quantization="int4")


def test_a_device_that_this_build_lacks_is_refused(loss_folder, monkeypatch):
    monkeypatch.setattr(
        "perplexit.sessions.onnx.session.onnxruntime.get_available_providers",
        lambda: ["CPUExecutionProvider"],
    )
    with pytest.raises(CapabilityError, match="onnxruntime-gpu"):
        OnnxInferenceSession(loss_folder, device="cuda")
    with pytest.raises(UsageError, match="cpu or cuda"):
        OnnxInferenceSession(loss_folder, device="abacus")


def test_a_bare_onnx_file_is_refused(loss_folder):
    with pytest.raises(ModelError, match=r"bare \.onnx file"):
        OnnxInferenceSession(loss_folder / "model.onnx")


def test_damaged_weights_are_refused(loss_folder, tmp_path):
    for file in loss_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.onnx.data"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ModelError, match="not the file that was compiled"):
        OnnxInferenceSession(tmp_path)


def test_running_out_of_memory_has_its_own_error(loss_folder, monkeypatch):
    session = OnnxInferenceSession(loss_folder)

    class Full:
        def run(self, *_):
            raise RuntimeError(
                "[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer"
            )

    monkeypatch.setattr(session, "_session", Full())
    with pytest.raises(EngineOutOfMemoryError, match="Failed to allocate"):
        session.token_nll(WINDOWS)


def test_a_closed_session_says_so(loss_folder):
    session = OnnxInferenceSession(loss_folder)
    session.close()
    with pytest.raises(UsageError, match="closed"):
        session.token_nll(WINDOWS)


def test_batches_shrink_with_the_window_and_with_logits(loss_folder, logits_folder):
    session = OnnxInferenceSession(loss_folder)
    assert session.max_batch_size(1024) <= session.max_batch_size(64) <= 64
    assert OnnxInferenceSession(logits_folder).max_batch_size(10**6) == 1
