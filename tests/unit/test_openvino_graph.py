"""The graph that OpenVINO programs are made of: its head in blocks, its attention in blocks."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PhiConfig, PhiForCausalLM

from perplexit.program_batches import ProgramCalls
from perplexit.program_record import ProgramShapes
from tests.oracles import oracle_details, random_window
from tests.tiny_models import VOCAB_SIZE

pytest.importorskip("openvino")
from perplexit.compilation import openvino_head
from perplexit.compilation.openvino_attention import QUERY_BLOCKS
from perplexit.compilation.openvino_graph import convert_graph
from perplexit.quantization.openvino_engine import open_program

SHORT = [random_window(seed, length, VOCAB_SIZE) for seed, length in enumerate((61, 9, 33))]


def nll_of(model, windows, shapes=None):
    shapes = shapes or ProgramShapes()
    graph = convert_graph(model, perplexity=True, shapes=shapes)
    program = open_program(graph, threads=1)
    return np.concatenate(ProgramCalls(program.run, shapes).nll(windows))


def exact_nll(model, windows):
    return np.concatenate([oracle_details(model, window).nll_N for window in windows])


def tiny_phi():
    """A head with a bias, which must be cut into the same blocks."""
    torch.manual_seed(3)
    config = PhiConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    model = PhiForCausalLM(config).eval()
    nn.init.normal_(model.lm_head.bias, std=2.0)
    nn.init.normal_(model.lm_head.weight, std=0.5)
    return model


@pytest.mark.parametrize("name", ["gemma2", "cohere", "phi"])
def test_the_head_is_the_models_own(name, request):
    """Soft-cap, scale and bias are there."""
    if name == "phi":
        model = tiny_phi()
    else:
        folder = request.getfixturevalue(f"tiny_{name}_dir")
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert np.abs(nll_of(model, SHORT) - exact_nll(model, SHORT)).max() < 1e-4


def test_no_more_logits_than_those_of_a_turn_are_ever_made(tiny_llama_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    graph = convert_graph(model, perplexity=True, shapes=ProgramShapes())
    (loop,) = (op for op in graph.get_ops() if op.get_type_name() == "Loop")
    products = [op for op in loop.get_function().get_ops() if op.get_type_name() == "MatMul"]
    assert [list(op.get_output_shape(0))[-2:] for op in products] == [[128, VOCAB_SIZE]]
    body = [op for op in graph.get_ops() if op.get_type_name() == "MatMul"]
    last = [op.get_output_partial_shape(0)[-1] for op in body]
    assert all(axis.is_dynamic or axis.get_length() != VOCAB_SIZE for axis in last)


@pytest.mark.parametrize("num_targets", [127, 128, 129, 257])
def test_targets_that_fill_the_last_turn_and_those_that_do_not(num_targets, llama_graph):
    model, program = llama_graph
    windows = [
        random_window(seed, n + 1, VOCAB_SIZE) for seed, n in enumerate((99, num_targets - 99))
    ]
    nll = np.concatenate(ProgramCalls(program.run, ProgramShapes()).nll(windows))
    assert len(nll) == num_targets
    assert np.abs(nll - exact_nll(model, windows)).max() < 1e-4


@pytest.mark.parametrize(
    ("vocab_size", "rows"), [(320, 128), (49_152, 128), (262_144, 64), (1_000_000, 32)]
)
def test_how_many_rows(vocab_size, rows):
    assert openvino_head.head_rows(vocab_size) == rows


@pytest.mark.parametrize("length", [2, 3, 4, 5, 7, 8, 61])
def test_windows_shorter_than_the_blocks_of_queries(length, llama_graph):
    """Of two ids, two of the four blocks of queries are empty."""
    model, program = llama_graph
    windows = [random_window(length, length, VOCAB_SIZE)]
    nll = np.concatenate(ProgramCalls(program.run, ProgramShapes()).nll(windows))
    assert np.abs(nll - exact_nll(model, windows)).max() < 1e-4


@pytest.fixture(scope="module")
def llama_graph(tiny_llama_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir).eval()
    graph = convert_graph(model, perplexity=True, shapes=ProgramShapes())
    return model, open_program(graph, threads=1)


def test_no_block_of_queries_is_multiplied_with_keys_behind_it(tiny_llama_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir).eval()
    shapes = ProgramShapes(batch_size=1, length=64)
    graph = convert_graph(model, perplexity=True, shapes=shapes)
    attentions = [
        op for op in graph.get_ordered_ops() if op.get_type_name() == "ScaledDotProductAttention"
    ]
    assert len(attentions) == QUERY_BLOCKS * model.config.num_hidden_layers
    places = [[int(op.get_input_shape(i)[2]) for i in range(3)] for op in attentions]
    assert sorted(set(map(tuple, places))) == [(16, seen, seen) for seen in (16, 32, 48, 64)]
    windows = [random_window(5, 64, VOCAB_SIZE)]
    assert np.abs(nll_of(model, windows, shapes) - exact_nll(model, windows)).max() < 1e-4


def test_a_head_of_several_modules(tiny_llama_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir).eval()
    model.lm_head = nn.Sequential(model.lm_head, nn.Tanh())
    assert np.abs(nll_of(model, SHORT) - exact_nll(model, SHORT)).max() < 1e-4
