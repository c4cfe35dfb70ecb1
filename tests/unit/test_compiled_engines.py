"""Programs of OpenVINO, TVM and AOTInductor: what they hold, and what is refused."""

import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from perplexit.compilation.targets import compile
from perplexit.errors import CapabilityError, ModelError, QuantizationError, UsageError
from perplexit.sessions.base import DetailedSession, LogitsSession
from perplexit.sessions.registry import load_session
from tests.oracles import oracle_details, random_window
from tests.tiny_models import VOCAB_SIZE

WINDOWS = [random_window(seed, length, VOCAB_SIZE) for seed, length in enumerate((96, 40, 7))]


def nll_of(folder, **options):
    session = load_session(folder, threads=1, **options)
    try:
        return np.concatenate(session.token_nll(WINDOWS)), session.description
    finally:
        session.close()


@pytest.fixture(scope="module")
def openvino_program(tiny_llama_dir, tmp_path_factory):
    pytest.importorskip("openvino")
    return compile(tiny_llama_dir, to="openvino", output=tmp_path_factory.mktemp("ov") / "p").folder


@pytest.fixture(scope="module")
def tvm_program(tiny_llama_dir, tmp_path_factory):
    pytest.importorskip("tvm")
    output = tmp_path_factory.mktemp("tvm") / "p"
    options = {"quantization": "q4f16_0", "max_length": 96}
    return compile(tiny_llama_dir, to="tvm", output=output, **options)


@pytest.fixture(scope="module")
def oracle(tiny_llama_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir).eval()
    return model, np.concatenate([oracle_details(model, window).nll_N for window in WINDOWS])


@pytest.mark.trap(36)
def test_openvinos_float32_is_float32_and_the_record_says_so(openvino_program, oracle):
    """Trap 36: by default this engine computes in bfloat16 and calls it float32."""
    nll, description = nll_of(openvino_program)
    assert np.abs(nll - oracle[1]).max() < 1e-4
    says = description.settings["properties"]["program"]
    assert says["INFERENCE_PRECISION_HINT"] == "f32"
    assert says["KV_CACHE_PRECISION"] == "f32"
    assert says["DYNAMIC_QUANTIZATION_GROUP_SIZE"] == "0"
    assert description.threads == 1


@pytest.mark.trap(41)
def test_a_bfloat16_body_keeps_a_float32_head(openvino_program, oracle):
    """Trap 41: with the head in bfloat16 too, every loss is wrong by tenths of a nat."""
    model, exact = oracle
    try:
        nll, description = nll_of(openvino_program, dtype="bf16")
    except CapabilityError:
        pytest.skip("this processor has no bfloat16")
    assert description.dtype == "bfloat16"
    properties = description.settings["properties"]
    assert properties["body"]["INFERENCE_PRECISION_HINT"] == "bf16"
    assert properties["head"]["INFERENCE_PRECISION_HINT"] == "f32"
    in_pytorch = _pytorch_bfloat16_body(model)
    assert np.abs(nll - exact).max() > 1e-3  # it did happen
    assert abs(nll.mean() - in_pytorch.mean()) < 0.02
    assert np.abs(nll - in_pytorch).max() < 0.3


def _pytorch_bfloat16_body(model):
    body = AutoModelForCausalLM.from_pretrained(model.config.name_or_path, dtype=torch.bfloat16)
    losses = []
    for window in WINDOWS:
        ids = torch.from_numpy(window.ids_T.astype(np.int64))[None]
        with torch.no_grad():
            hidden_TD = body.model(ids).last_hidden_state[0].float()
            logprobs_TV = (hidden_TD @ model.lm_head.weight.T).double().log_softmax(-1)
        losses.append(-logprobs_TV[:-1].gather(1, ids[0, 1:, None])[:, 0].numpy())
    return np.concatenate(losses)


@pytest.mark.trap(35)
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_nncf_compresses_gpt2_too_and_leaves_the_head(tiny_gpt2_dir, tmp_path, precision):
    """Trap 35: GPT-2's Conv1D was left alone elsewhere and called quantized."""
    pytest.importorskip("nncf")
    program = compile(tiny_gpt2_dir, to="openvino", output=tmp_path / "p", quantization=precision)
    record = program.metadata.quantization
    assert record.num_modules >= 8
    assert record.library.startswith("nncf")
    assert record.num_bytes < 4 * program.metadata.model.num_parameters / 3
    assert record.effective_bits < 24
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2_dir).eval()
    exact = np.concatenate([oracle_details(model, window).nll_N for window in WINDOWS])
    nll, description = nll_of(program.folder, quantization=precision)
    assert 1e-4 < np.abs(nll - exact).mean() < 1
    assert description.quantization.num_modules == record.num_modules
    (alone,) = load_session(program.folder, threads=1).token_nll(WINDOWS[1:2])
    assert np.abs(alone - nll[95:134]).max() < 1e-5  # activations are not rounded: trap 37


def test_tvms_groups_are_those_of_the_q4f16_format(tvm_program, oracle):
    record = tvm_program.metadata.quantization
    assert record.num_modules == 16  # fourteen layers, the embedding and the head
    assert 4.5 <= record.effective_bits < 5
    assert tvm_program.metadata.verification.max_abs_nll_difference < 1e-4
    assert "q4f16_0 groups stand for" in tvm_program.metadata.verification.reference
    nll, description = nll_of(tvm_program.folder)
    assert 1e-3 < np.abs(nll - oracle[1]).mean() < 2
    assert description.quantization.name == "q4f16_0"
    assert {file.name for file in tvm_program.metadata.files} == {
        "model.so",
        "parameters.safetensors",
    }
    stored = load_file(tvm_program.folder / "parameters.safetensors").values()
    packed = [each for each in stored if each.dtype in (np.uint8, np.float16)]
    assert len(packed) == 2 * record.num_modules  # codes and scales, not what they unpack to
    unpacked = 4 * tvm_program.metadata.model.num_parameters
    assert sum(each.nbytes for each in packed) < unpacked / 6


def test_a_window_longer_than_a_fixed_program_is_refused(tvm_program):
    session = load_session(tvm_program.folder, threads=1)
    with pytest.raises(CapabilityError, match="--max-length 96"):
        session.token_nll([random_window(0, 97, VOCAB_SIZE)])


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no cores to be bound to here")
@pytest.mark.parametrize("threads", [None, 1, 2])
def test_tvm_leaves_its_caller_every_core(tvm_program, threads):
    """By itself it binds the calling thread to one core, and later engines share that core."""
    cores = os.sched_getaffinity(0)
    session = load_session(tvm_program.folder, threads=threads)
    session.token_nll(WINDOWS)
    assert os.sched_getaffinity(0) == cores


def test_a_perplexity_program_offers_neither_logits_nor_details(openvino_program):
    session = load_session(openvino_program, threads=1)
    assert not isinstance(session, LogitsSession)
    assert not isinstance(session, DetailedSession)


@pytest.mark.parametrize("device", ["cuda", "opencl", "vulkan"])
def test_a_device_that_tvm_lacks_is_named(tiny_llama_dir, tmp_path, device):
    tvm = pytest.importorskip("tvm")
    if tvm.get_global_func(f"device_api.{device}", True) and tvm.device(device).exist:
        pytest.skip(f"{device} is here")
    with pytest.raises(CapabilityError, match=f"{device}.*--device llvm"):
        compile(tiny_llama_dir, to="tvm", output=tmp_path / "p", device=device)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "fp16"}, CapabilityError, "float32 or bfloat16"),
        ({"quantization": "int8"}, CapabilityError, "not quantized"),
        ({"device": "npu"}, CapabilityError, "npu"),
    ],
)
def test_what_a_program_is_not_is_refused(openvino_program, options, error, message):
    with pytest.raises(error, match=message):
        load_session(openvino_program, **options)


def test_a_damaged_program_is_not_opened(openvino_program, tmp_path):
    folder = shutil.copytree(openvino_program, tmp_path / "p")
    content = bytearray((folder / "model.bin").read_bytes())
    content[100] ^= 1
    (folder / "model.bin").write_bytes(bytes(content))
    with pytest.raises(ModelError, match="not the file that was compiled"):
        load_session(folder)


def test_without_a_cpp_compiler_pt2_says_so(tiny_llama_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(CapabilityError, match=r"C\+\+ compiler"):
        compile(tiny_llama_dir, to="pt2", output=tmp_path / "p")


@pytest.mark.parametrize("to", ["tvm", "pt2"])
def test_a_window_longer_than_the_model_was_made_for_is_refused(tiny_llama_dir, tmp_path, to):
    pytest.importorskip({"pt2": "torch"}.get(to, to))
    with pytest.raises(UsageError, match="at most 256 ids"):
        compile(tiny_llama_dir, to=to, output=tmp_path / "p", max_length=100_000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["openvino", "tvm", "pt2"])
def test_a_precision_that_an_engine_lacks_lists_those_it_has(to, tmp_path):
    with pytest.raises(QuantizationError, match="engine"):
        compile("no-such-model", to=to, output=tmp_path / "p", quantization="nf4")
