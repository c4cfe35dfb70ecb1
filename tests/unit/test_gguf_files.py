"""GGUF files written from checkpoints: what llama.cpp computes from them, types, vocabulary."""

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import perplexit as px
from perplexit.compilation.gguf_file import WRITTEN_TYPES, llamacpp_nll, write_gguf
from perplexit.errors import CapabilityError, CompilationError, QuantizationError
from perplexit.quantization.gguf_header import read_gguf_header
from perplexit.quantization.llamacpp_library import quantize_gguf, requantized_gguf
from perplexit.sessions.registry import load_session
from tests.oracles import oracle_details, random_window
from tests.tiny_models import BOS, EOS, VOCAB_SIZE, byte_tokenizer

WINDOW = random_window(0, 60, VOCAB_SIZE)


def _oracle(model: torch.nn.Module) -> np.ndarray:
    return oracle_details(model, WINDOW).nll_N


def _write(folder, path, precision="float32", **changes):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    config = {**model.config.to_dict(), **changes}
    write_gguf(
        path,
        config=config,
        state=model.state_dict(),
        tokenizer_json=folder / "tokenizer.json",
        precision=precision,
    )
    return model


@pytest.fixture
def llama_f32(tiny_llama_dir, tmp_path):
    path = tmp_path / "f32.gguf"
    _write(tiny_llama_dir, path)
    return path


# largest difference a token; GPT-2's GELU is a table of 16-bit floats in llama.cpp
@pytest.mark.parametrize(("name", "tolerance"), [("llama", 2e-5), ("gpt2", 5e-3)])
def test_llamacpp_computes_the_checkpoint_s_losses_from_the_file(
    name, tolerance, request, tmp_path
):
    folder = request.getfixturevalue(f"tiny_{name}_dir")
    model = _write(folder, tmp_path / "m.gguf")
    difference = np.abs(llamacpp_nll(tmp_path / "m.gguf", WINDOW.ids_T) - _oracle(model)).max()
    assert difference < tolerance


@pytest.mark.parametrize("rope", ["llama3", "linear"])
def test_scaled_rotary_positions_and_a_wide_head_are_carried(rope, tmp_path):
    torch.manual_seed(0)
    scaling = {"rope_type": rope, "factor": 4.0, "rope_theta": 500.0}
    if rope == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        scaling |= {"original_max_position_embeddings": 32}
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, initializer_range=0.2,
        max_position_embeddings=256, rope_parameters=scaling, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    record = {**config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    path = write_gguf(
        tmp_path / "m.gguf", config=record, state=model.state_dict(), tokenizer_json=None
    )
    assert np.abs(llamacpp_nll(path, WINDOW.ids_T) - _oracle(model)).max() < 2e-5
    without = {key: value for key, value in record.items() if key != "rope_parameters"}
    without["rope_theta"] = 500.0
    other = write_gguf(
        tmp_path / "o.gguf", config=without, state=model.state_dict(), tokenizer_json=None
    )
    assert np.abs(llamacpp_nll(other, WINDOW.ids_T) - _oracle(model)).max() > 1e-3


def test_every_written_type_is_what_the_header_says(tiny_llama_dir, tmp_path):
    changes = {}
    for precision, (matrix_type, _) in WRITTEN_TYPES.items():
        path = tmp_path / f"{precision}.gguf"
        model = _write(tiny_llama_dir, path, precision)
        header = read_gguf_header(path)
        assert header.tensor_types[matrix_type.name] == (21 if precision == "float32" else 16)
        changes[precision] = np.abs(llamacpp_nll(path, WINDOW.ids_T) - _oracle(model)).max()
        if precision in ("float32", "float16", "bfloat16"):
            assert header.quantization is None
            assert header.matrix_dtype == precision
        else:
            assert header.quantization.name == precision
            assert header.quantization.num_modules == 16
            bits = {"q8_0": 8.5, "q5_1": 6, "q5_0": 5.5, "q4_1": 5, "q4_0": 4.5, "mxfp4": 4.25}
            assert bits[precision] < header.quantization.effective_bits < bits[precision] + 0.2
    assert changes["float32"] < 2e-5 < changes["float16"] < changes["bfloat16"]
    assert changes["bfloat16"] < changes["q8_0"] < changes["q4_1"]


@pytest.mark.trap(35)
def test_a_model_whose_rows_fit_no_block_is_refused(tmp_path):
    """Trap 35: a quantization that quantizes nothing must not pass as one."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=24, intermediate_size=40, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    record = {**config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    common = {"config": record, "state": model.state_dict(), "tokenizer_json": None}
    with pytest.raises(QuantizationError, match="block of 32"):
        write_gguf(tmp_path / "q.gguf", precision="q4_0", **common)


def test_what_gguf_cannot_carry_is_refused_by_name(tiny_llama_dir, tiny_gemma2_dir, tmp_path):
    with pytest.raises(CompilationError, match="Gemma2ForCausalLM"):
        _write(tiny_gemma2_dir, tmp_path / "m.gguf")
    with pytest.raises(CompilationError, match="dynamic"):
        _write(tiny_llama_dir, tmp_path / "m.gguf", rope_parameters={"rope_type": "dynamic"})
    with pytest.raises(CompilationError, match="sliding window"):
        _write(tiny_llama_dir, tmp_path / "m.gguf", sliding_window=16)


def test_the_vocabulary_is_the_tokenizer_s(llama_f32):
    import llama_cpp  # noqa: PLC0415

    model = llama_cpp.Llama(str(llama_f32), vocab_only=True, verbose=False)
    tokenizer = byte_tokenizer()
    text = "Whoever measures twice, Maß für Maß: 12 34.\n"
    ids = model.tokenize(text.encode(), add_bos=False, special=False)
    assert ids == tokenizer.encode(text).ids
    assert (model.token_bos(), model.token_eos()) == (0, 1)
    types = gguf.GGUFReader(llama_f32).fields["tokenizer.ggml.token_type"].contents()
    assert [types[tokenizer.token_to_id(x)] for x in (BOS, EOS)] == [gguf.TokenType.CONTROL] * 2
    model.close()


def test_llamacpp_s_quantizer_makes_the_other_types(llama_f32, tmp_path):
    path = quantize_gguf(llama_f32, tmp_path / "q.gguf", "q4_k_m", threads=1)
    # rows of 32 fit no K-block of 256: llama.cpp takes its stated substitutes
    assert read_gguf_header(path).tensor_types == {"F32": 5, "Q5_0": 13, "Q8_0": 3}
    with pytest.raises(QuantizationError, match="q4_k_m"):
        quantize_gguf(llama_f32, tmp_path / "q.gguf", "q9_z")
    (tmp_path / "no.gguf").write_bytes(b"GGUF")
    with pytest.raises(QuantizationError, match="could not make q8_0"):
        quantize_gguf(tmp_path / "no.gguf", tmp_path / "out.gguf", "q8_0")
    assert not (tmp_path / "out.gguf").exists()


def test_a_requantized_file_is_made_once_and_kept(llama_f32, tmp_path, monkeypatch):
    monkeypatch.setenv("PERPLEXIT_CACHE", str(tmp_path / "cache"))
    first = requantized_gguf(llama_f32, "q5_0", threads=1)
    stamp = first.stat().st_mtime_ns
    assert requantized_gguf(llama_f32, "q5_0", threads=1) == first
    assert first.stat().st_mtime_ns == stamp
    assert requantized_gguf(first, "q5_0") == first
    assert requantized_gguf(llama_f32, None) == llama_f32


@pytest.mark.parametrize("precision", [None, "q4_k_m", "mxfp4"])
def test_compile_makes_a_folder_that_load_session_opens(precision, tiny_llama_dir, tmp_path):
    program = px.compile(tiny_llama_dir, to="gguf", output=tmp_path / "p", quantization=precision)
    record = program.metadata
    assert sorted(file.name for file in record.files) == ["model.gguf"]
    assert (tmp_path / "p" / "program.json").is_file()
    assert (record.quantization and record.quantization.name) == precision
    assert not record.perplexity
    oracle = AutoModelForCausalLM.from_pretrained(tiny_llama_dir).eval()
    expected = _oracle(oracle)
    nll = []
    for address in (tmp_path / "p", f"gguf:{tmp_path}/p", f"gguf:{tmp_path}/p/model.gguf"):
        session = load_session(address, threads=1)
        assert (session.description.quantization is None) == (precision is None)
        nll.append(session.token_nll([WINDOW])[0])
        session.close()
    assert np.array_equal(nll[0], nll[1])
    assert np.array_equal(nll[0], nll[2])
    difference = np.abs(nll[0] - expected).max()
    assert difference < 2e-5 if precision is None else difference > 1e-3


def test_options_without_meaning_for_gguf_are_refused(tiny_llama_dir, tmp_path):
    for options in ({"max_length": 64}, {"batch_size": 2}, {"device": "cuda"}):
        with pytest.raises(CapabilityError):
            px.compile(tiny_llama_dir, to="gguf", output=tmp_path / "p", **options)
    with pytest.raises(CapabilityError, match="both"):
        px.compile(
            tiny_llama_dir, to="gguf", output=tmp_path / "p", quantization="q8_0", dtype="fp16"
        )
    with pytest.raises(QuantizationError, match="q4_k_m"):
        px.compile(tiny_llama_dir, to="gguf", output=tmp_path / "p", quantization="int3")
    assert not (tmp_path / "p").exists()


def test_a_checkpoint_that_gguf_would_change_is_refused(tiny_llama_dir, tmp_path, monkeypatch):
    """The built file is compared with the checkpoint: a wrong row order must not pass."""
    from perplexit.compilation import gguf_tensors  # noqa: PLC0415

    monkeypatch.setattr(gguf_tensors, "_interleaved", lambda array, num_heads: array)
    with pytest.raises(CompilationError, match="nats a token apart"):
        px.compile(tiny_llama_dir, to="gguf", output=tmp_path / "p")
    assert not (tmp_path / "p").exists()
