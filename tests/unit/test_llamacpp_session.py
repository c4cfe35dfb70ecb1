"""llama.cpp's session: effective settings, isolation of windows, memory, the packaged model."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

import perplexit as px
from perplexit.compilation.gguf_file import write_gguf
from perplexit.errors import CapabilityError, ModelError, QuantizationError
from perplexit.inputs.windows import WindowIds
from perplexit.sessions.llamacpp import LlamaCppInferenceSession
from tests.oracles import oracle_details, random_window
from tests.tiny_models import VOCAB_SIZE


@pytest.fixture(scope="module")
def tiny(tiny_llama_dir, tmp_path_factory):
    """(path of a float32 GGUF file, the checkpoint that it was written from)."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir).eval()
    path = write_gguf(
        tmp_path_factory.mktemp("gguf") / "tiny.gguf",
        config=model.config.to_dict(),
        state=model.state_dict(),
        tokenizer_json=tiny_llama_dir / "tokenizer.json",
    )
    return path, model


@pytest.mark.trap(36)
def test_float32_is_float32_and_the_effective_settings_are_llamacpp_s_own_words(tiny):
    """Trap 36: llama.cpp's defaults (f16 KV cache, flash attention) are not used unasked."""
    path, model = tiny
    window = random_window(0, 200, VOCAB_SIZE)
    expected = oracle_details(model, window).nll_N
    session = LlamaCppInferenceSession(path, threads=1)
    settings = session.description.settings
    assert (settings["kv_cache"], settings["flash_attention"]) == ("float32", "disabled")
    assert session.description.dtype == "float32"
    assert np.abs(session.token_nll([window])[0] - expected).max() < 1e-4
    session.close()
    half = LlamaCppInferenceSession(path, dtype="fp16", threads=1)
    assert half.description.settings["kv_cache"] == half.description.dtype == "float16"
    assert np.abs(half.token_nll([window])[0] - expected).max() > 1e-4
    half.close()


@pytest.mark.trap(32)
def test_no_key_or_value_outlives_its_window(tiny):
    """Trap 32: the cache is cleared; a window's losses do not depend on those before it."""
    session = LlamaCppInferenceSession(tiny[0], threads=1)
    windows = [random_window(seed, 90, VOCAB_SIZE, index=seed) for seed in range(3)]
    alone = session.token_nll(windows[:1])[0]
    session.token_nll(windows[1:])
    again = session.token_nll(windows)[0]
    assert np.array_equal(alone, again)
    # an overlapping window, as `sliding` gives them: computed anew from its own first id
    overlapping = WindowIds(9, windows[0].ids_T[30:], np.arange(1, 60))
    expected = oracle_details(tiny[1], overlapping).nll_N
    assert np.abs(session.token_nll([overlapping])[0] - expected).max() < 1e-4
    session.close()


def test_chunks_do_not_show_in_the_losses(tiny, monkeypatch):
    window = random_window(3, 230, VOCAB_SIZE, range(7, 230, 2))
    results = []
    for elements in (1 << 24, 64 * VOCAB_SIZE, 33 * VOCAB_SIZE):
        monkeypatch.setattr("perplexit.sessions.llamacpp._CHUNK_ELEMENTS", elements)
        session = LlamaCppInferenceSession(tiny[0], threads=1)
        results.append(session.token_nll([window])[0])
        session.close()
    assert np.abs(results[0] - results[1]).max() < 1e-5
    assert np.abs(results[0] - results[2]).max() < 1e-5


@pytest.mark.trap(3)
def test_ids_go_in_as_they_are_no_bos_is_added(tiny):
    """Traps 3 and 39: the engine adds nothing, whatever the file says of a BOS."""
    ids = random_window(4, 20, VOCAB_SIZE).ids_T
    session = LlamaCppInferenceSession(tiny[0], threads=1)
    with_bos = WindowIds(0, np.concatenate([[0], ids]).astype(np.int32), np.arange(1, 21))
    without = WindowIds(1, ids, np.arange(1, 20))
    for window, nll in zip(
        (with_bos, without), session.token_nll([with_bos, without]), strict=True
    ):
        assert np.abs(nll - oracle_details(tiny[1], window).nll_N).max() < 1e-4
    session.close()


def test_a_longer_window_gets_a_larger_context(tiny):
    session = LlamaCppInferenceSession(tiny[0], threads=1)
    for length in (5, 700, 40):  # beyond the 256 ids that it was made for, too
        window = random_window(length, length, VOCAB_SIZE)
        expected = oracle_details(tiny[1], window).nll_N
        assert np.abs(session.token_nll([window])[0] - expected).max() < 1e-4
    session.close()


def test_the_description_counts_what_is_quantized(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("PERPLEXIT_CACHE", str(tmp_path))
    plain = LlamaCppInferenceSession(tiny[0], threads=1)
    session = LlamaCppInferenceSession(tiny[0], quantization="q8_0", threads=1)
    quantization = session.description.quantization
    assert plain.description.quantization is None
    assert (quantization.name, quantization.num_modules) == ("q8_0", 16)
    assert 8.5 < quantization.effective_bits < 8.7
    assert quantization.unquantized == ()
    assert session.model.num_parameters == plain.model.num_parameters
    assert session.model.weights_fingerprint != plain.model.weights_fingerprint
    assert session.model.address == f"gguf:{tiny[0]}"
    window = random_window(0, 50, VOCAB_SIZE)
    difference = np.abs(session.token_nll([window])[0] - plain.token_nll([window])[0]).max()
    assert 1e-3 < difference < 1
    with pytest.raises(QuantizationError, match="expected a GGUF type"):
        LlamaCppInferenceSession(tiny[0], quantization="int3")
    plain.close()
    session.close()


def test_what_cannot_be_opened_is_a_stated_error(tmp_path):
    (tmp_path / "no.gguf").write_bytes(b"something else, and long enough to be a header")
    with pytest.raises(ModelError, match="GGUF"):
        LlamaCppInferenceSession(tmp_path / "no.gguf")
    with pytest.raises(ModelError, match="found none"):
        LlamaCppInferenceSession(tmp_path / "absent.gguf")
    with pytest.raises(ModelError, match=r"model\.gguf"):
        LlamaCppInferenceSession(tmp_path)


def test_a_device_that_the_build_lacks_is_refused(tiny, monkeypatch):
    monkeypatch.setattr("llama_cpp.llama_supports_gpu_offload", lambda: False)
    with pytest.raises(CapabilityError, match="cannot offload"):
        LlamaCppInferenceSession(tiny[0], device="cuda")


def test_nothing_is_printed(tiny):
    code = (
        "import sys; from perplexit.sessions.llamacpp import LlamaCppInferenceSession as S; "
        "S(sys.argv[1], threads=1).close()"
    )
    done = subprocess.run([sys.executable, "-c", code, tiny[0]], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")


_MEMORY = """
import resource, sys
import numpy as np
from perplexit.inputs.windows import WindowIds
from perplexit.sessions.llamacpp import LlamaCppInferenceSession
ids = np.random.default_rng(0).integers(0, 49152, 2048).astype(np.int32)
session = LlamaCppInferenceSession(sys.argv[1], threads=1)
session.token_nll([WindowIds(0, ids[:64], np.arange(1, 64))])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
session.token_nll([WindowIds(0, ids, np.arange(1, 2048))])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.real_model
@pytest.mark.slow
def test_the_logits_of_a_whole_window_never_exist(real_gguf_path):
    """2,048 x 49,152 logits are 384 MiB (and llama-cpp-python's `scores` as much again)."""
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY, real_gguf_path], capture_output=True, check=True, text=True
    )
    grown = int(done.stdout) * 1024
    kv_cache = 2048 * 30 * 2 * 192 * 4
    assert grown < kv_cache + 220 * 2**20


@pytest.mark.real_model
@pytest.mark.slow
def test_the_packaged_model_is_within_one_percent_of_pytorch(
    real_gguf_path, real_model_dir, real_text, tmp_path
):
    """As shipped (Q4_1 through llama.cpp's own kernels) against PyTorch on the same weights."""
    path = tmp_path / "input.safetensors"
    tokens = px.prepare(
        [real_text[:6000]], tokenizer=str(real_model_dir), protocol="disjoint",
        max_length=512, output=path,
    )  # fmt: skip
    reference = px.evaluate(f"hf:{real_model_dir}", tokens, threads=2)
    candidate = px.evaluate(str(real_gguf_path), tokens, threads=2)
    assert candidate.perplexity == pytest.approx(reference.perplexity, rel=0.01)
    assert Path(candidate.model["address"].removeprefix("gguf:")) == real_gguf_path
    quantization = candidate.session["quantization"]
    assert (quantization["name"], quantization["num_modules"]) == ("q4_1", 211)
