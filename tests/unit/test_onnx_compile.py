"""Compilation to ONNX: what the program holds, and what is refused."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModelForCausalLM

import perplexit.compilation.onnx_build as onnx_build
from perplexit.compilation.body_and_head import rows_at_a_time
from perplexit.compilation.program_build import ProgramBuild
from perplexit.compilation.targets import compile
from perplexit.errors import (
    CapabilityError,
    CompilationError,
    ModelError,
    QuantizationError,
    UsageError,
)
from perplexit.program_record import ProgramMetadata
from perplexit.quantization.onnx_blocks import QuantizedWeight, _blocks_of
from perplexit.quantization.precisions import WeightBlocks
from perplexit.sessions.onnx import OnnxInferenceSession
from perplexit.sessions.prefill_decode import cached_session
from perplexit.sessions.pytorch import PytorchInferenceSession
from tests.oracles import random_window
from tests.tiny_models import VOCAB_SIZE

WINDOWS = [random_window(seed, length, VOCAB_SIZE) for seed, length in enumerate((96, 40, 7))]


def all_nll(folder):
    session = OnnxInferenceSession(folder, threads=1)
    return np.concatenate(session.token_nll(WINDOWS))


@pytest.fixture(scope="module")
def llama_program(tiny_llama_dir, tmp_path_factory):
    return compile(tiny_llama_dir, to="onnx", output=tmp_path_factory.mktemp("programs") / "llama")


def graph_of(program):
    return onnx.load(program.folder / "model.onnx", load_external_data=False).graph


def test_a_perplexity_program_takes_ids_and_targets_and_gives_no_logits(llama_program):
    graph = graph_of(llama_program)
    assert [x.name for x in graph.input] == [
        "input_ids",
        "attention_mask",
        "target_rows",
        "target_ids",
    ]
    assert [x.name for x in graph.output] == ["nll"]
    assert len(graph.output[0].type.tensor_type.shape.dim) == 1
    assert llama_program.metadata.perplexity
    assert llama_program.metadata.head_rows == rows_at_a_time(VOCAB_SIZE)


def test_the_head_works_on_a_chunk_of_rows_at_a_time(llama_program):
    nodes = graph_of(llama_program).node
    scan = next(node for node in nodes if node.op_type == "Scan")
    body = next(attribute.g for attribute in scan.attribute if attribute.name == "body")
    # transposed once, outside; multiplied by inside, and only there
    (head,) = (node.output[0] for node in nodes if "lm_head.weight" in node.input)
    assert [node.op_type for node in body.node if head in node.input] == ["MatMul"]
    assert not any(head in node.input for node in nodes)


def test_more_targets_than_one_chunk_agree_with_one_at_a_time(llama_program):
    windows = [random_window(seed, 200, VOCAB_SIZE) for seed in range(4)]
    assert sum(len(w.targets_N) for w in windows) > 2 * llama_program.metadata.head_rows
    session = OnnxInferenceSession(llama_program.folder, threads=1)
    together = session.token_nll(windows)
    for window, nll in zip(windows, together, strict=True):
        assert np.allclose(session.token_nll([window])[0], nll, atol=1e-5)


def test_rows_of_the_head_fit_its_budget_within_bounds():
    assert rows_at_a_time(49_152) == 80
    assert rows_at_a_time(320) == 256
    assert rows_at_a_time(1_000_000) == 32


def test_the_record_tells_of_checkpoint_and_verification(llama_program, tiny_llama_dir):
    metadata = ProgramMetadata.read(llama_program.folder)
    assert metadata == llama_program.metadata
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    assert metadata.model.architecture == "LlamaForCausalLM"
    assert metadata.model.num_parameters == sum(p.numel() for p in model.parameters())
    assert (metadata.model.vocab_size, metadata.model.max_length) == (VOCAB_SIZE, 256)
    assert metadata.verification.num_tokens == 100
    assert metadata.verification.max_abs_nll_difference < 1e-4
    assert {"model.onnx", "model.onnx.data"} == {file.name for file in metadata.files}


def test_nothing_of_this_machine_is_left_in_the_graph(llama_program):
    content = (llama_program.folder / "model.onnx").read_bytes()
    assert b"site-packages" not in content
    assert str(Path(onnx_build.__file__).parent).encode() not in content


@pytest.mark.trap(35)
@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("perplexity", [True, False])
def test_every_recipe_really_quantizes_conv1d_too(request, tmp_path, name, precision, perplexity):
    """Trap 35: a GPT-2, whose Conv1D exports as Gemm, was left alone and called quantized."""
    folder = request.getfixturevalue(f"tiny_{name}_dir")
    full = compile(folder, to="onnx", output=tmp_path / "full", perplexity=perplexity)
    blocks = compile(
        folder, to="onnx", output=tmp_path / "q", quantization=precision, perplexity=perplexity
    )
    change = np.abs(all_nll(blocks.folder) - all_nll(full.folder)).mean()
    assert 1e-4 < change < 1
    record = blocks.metadata.quantization
    nodes = [node for node in graph_of(blocks).node if node.op_type == "MatMulNBits"]
    assert record.num_modules == len(nodes) == {"llama": 14, "gpt2": 8}[name]
    assert not any(node.op_type == "Gemm" for node in graph_of(blocks).node)
    assert record.effective_bits < 24  # the embedding and the head stay; they are most of the model
    assert "lm_head.weight" in record.unquantized
    size = {file.name: file.num_bytes for file in blocks.metadata.files}["model.onnx.data"]
    assert size < {file.name: file.num_bytes for file in full.metadata.files}["model.onnx.data"]


@pytest.mark.trap(35)
def test_a_graph_without_constant_products_is_refused(tmp_path, tiny_llama_dir, monkeypatch):
    """Trap 35: zero quantized modules are an error, and leave nothing behind."""
    everything = AutoModelForCausalLM.from_pretrained(tiny_llama_dir).state_dict()
    quantize = onnx_build.quantize_weights
    monkeypatch.setattr(
        onnx_build, "quantize_weights", lambda m, b, keep: quantize(m, b, keep=set(everything))
    )
    with pytest.raises(QuantizationError, match="found none"):
        compile(tiny_llama_dir, to="onnx", output=tmp_path / "q", quantization="int4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.trap(37)
def test_activations_stay_float32(tmp_path, tiny_llama_dir):
    """Trap 37: with int8 activations the nll would depend on what else is in the batch."""
    program = compile(tiny_llama_dir, to="onnx", output=tmp_path / "q", quantization="int8")
    levels = {
        attribute.i
        for node in graph_of(program).node
        for attribute in node.attribute
        if attribute.name == "accuracy_level"
    }
    assert levels == {1}
    # PyTorch with the very weights that the blocks stand for: no room for rounded activations
    assert "the weights that the int8 blocks stand for" in program.metadata.verification.reference
    assert program.metadata.verification.max_abs_nll_difference < 1e-4


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(64, 24), (50, 7)])  # 50: the last block is padded
@pytest.mark.parametrize("transposed", [True, False])
def test_blocks_stand_for_nearly_the_weight(bits, shape, transposed):
    weight_KN = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    blocks = WeightBlocks(bits)
    codes, scales = _blocks_of(weight_KN, blocks)
    weight = QuantizedWeight("w", codes, scales, shape[0], transposed, blocks).dequantized()
    weight = weight.T if transposed else weight
    assert weight.shape == shape
    largest_step = np.abs(scales).max()
    assert 0 < np.abs(weight - weight_KN).max() <= largest_step * 1.01


def test_a_program_that_disagrees_with_its_checkpoint_is_not_kept(
    tmp_path, tiny_llama_dir, monkeypatch
):
    honest = ProgramBuild.checkpoint_losses
    monkeypatch.setattr(ProgramBuild, "checkpoint_losses", lambda build: honest(build) + 0.01)
    with pytest.raises(CompilationError, match=r"within 0\.001 nats"):
        compile(tiny_llama_dir, to="onnx", output=tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def test_a_nan_in_the_program_is_not_kept(tmp_path, tiny_llama_dir):
    broken = tmp_path / "broken"
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    with torch.no_grad():
        model.lm_head.weight[7, 0] = float("nan")
    model.save_pretrained(broken)
    with pytest.raises(CompilationError, match="nan"):
        compile(broken, to="onnx", output=tmp_path / "p")


def test_a_second_compilation_is_the_same_to_the_last_byte(
    tmp_path, llama_program, tiny_llama_dir, monkeypatch
):
    monkeypatch.setenv("PERPLEXIT_CACHE", str(tmp_path / "cache"))
    for name in ("exported", "from the cache"):
        again = compile(tiny_llama_dir, to="onnx", output=tmp_path / name)
        assert again.metadata.files == llama_program.metadata.files, name


def test_a_damaged_cache_costs_time_and_nothing_else(
    tmp_path, llama_program, tiny_llama_dir, monkeypatch
):
    cache = tmp_path / "cache"
    monkeypatch.setenv("PERPLEXIT_CACHE", str(cache))
    compile(tiny_llama_dir, to="onnx", output=tmp_path / "first")
    (graph,) = (cache / "onnx-graphs").iterdir()
    graph.write_bytes(graph.read_bytes()[:1000])
    second = compile(tiny_llama_dir, to="onnx", output=tmp_path / "second")
    assert second.metadata.files == llama_program.metadata.files


def test_another_checkpoint_is_not_taken_from_the_cache(tmp_path, tiny_llama_dir, llama_program):
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    model.save_pretrained(other)
    program = compile(other, to="onnx", output=tmp_path / "p")
    assert np.abs(all_nll(program.folder) - all_nll(llama_program.folder)).mean() > 1e-2


def test_a_program_replaces_a_program(tmp_path, tiny_llama_dir):
    output = tmp_path / "p"
    assert compile(tiny_llama_dir, to="onnx", output=output).metadata.perplexity
    compile(tiny_llama_dir, to="onnx", output=output, perplexity=False, force=True)
    assert not ProgramMetadata.read(output).perplexity
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_a_folder_of_something_else_is_left_alone(tmp_path, tiny_llama_dir):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="holds something else"):
        compile(tiny_llama_dir, to="onnx", output=tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_a_failed_compilation_leaves_the_program_before(tmp_path, tiny_llama_dir, llama_program):
    output = Path(shutil.copytree(llama_program.folder, tmp_path / "p"))
    with pytest.raises(ModelError):
        compile(tmp_path / "no-such-model", to="onnx", output=output)
    ProgramMetadata.read(output).check_files(output)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("perplexity", [True, False])
def test_a_float16_program_keeps_its_head_in_float32(request, tmp_path, name, perplexity):
    folder = request.getfixturevalue(f"tiny_{name}_dir")
    program = compile(folder, to="onnx", output=tmp_path / "p", dtype="fp16", perplexity=perplexity)
    types = {x.name: x.data_type for x in graph_of(program).initializer}
    assert types["lm_head.weight"] == onnx.TensorProto.FLOAT
    halves = [name for name, kind in types.items() if kind == onnx.TensorProto.FLOAT16]
    assert len(halves) >= 8  # matrices and norms of the layers
    assert (program.metadata.dtype, program.metadata.verification.reference) == (
        "float16",
        "the checkpoint in PyTorch, its body in float16 and its head in float32",
    )
    full = PytorchInferenceSession(folder)
    exact = np.concatenate(full.token_nll(WINDOWS))
    session = OnnxInferenceSession(program.folder, threads=1)
    difference = np.abs(np.concatenate(session.token_nll(WINDOWS)) - exact)
    assert 1e-5 < difference.max() < 0.05  # it did happen, and little is lost
    assert session.description.dtype == "float16"
    with pytest.raises(CapabilityError, match="compiled in float16"):
        OnnxInferenceSession(program.folder, dtype="float32")
    if not perplexity:
        assert program.metadata.cache.dtype == "float16"
        cached = cached_session(session, prompt_len=5)
        assert cached.description.settings["cache"]["dtype"] == "float16"
        decoded = np.concatenate(cached.token_nll(WINDOWS))
        assert np.abs(decoded - np.concatenate(session.token_nll(WINDOWS))).max() < 0.05


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"to": "abacus"}, CapabilityError, "abacus"),
        ({"dtype": "bf16"}, CapabilityError, "float32 or float16"),
        ({"dtype": "fp16", "quantization": "int8"}, CapabilityError, "leave one out"),
        ({"dtype": "int3"}, UsageError, "dtype"),
        ({"quantization": "nf4"}, QuantizationError, "int8, int4"),
        ({"device": "cuda"}, CapabilityError, "cpu"),
        ({"max_length": 1}, UsageError, "at least 2"),
        ({"batch_size": 0}, UsageError, "from 1 to"),
    ],
)
def test_what_cannot_be_done_is_refused_before_loading(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        compile("no-such-model", output=tmp_path / "p", **({"to": "onnx"} | options))
    assert list(tmp_path.iterdir()) == []
