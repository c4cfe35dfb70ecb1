"""B8: where a window's losses depend on its batch, `eval` says so and records it."""

import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from onnxruntime.quantization import QuantType, quantize_dynamic

import perplexit as px
from perplexit.inputs.id_lines import import_id_lines
from perplexit.program_record import PROGRAM_FILE
from perplexit.sessions.onnx import OnnxInferenceSession
from perplexit.sessions.onnx.program_folder import _rounded_together
from perplexit.sessions.pytorch import PytorchInferenceSession
from tests.contract.test_cached_onnx import with_weights_laid_out
from tests.trust.loading_models import VOCAB_SIZE, WINDOWS, llama, saved


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A program with logits, as another exporter leaves it: without Perplexit's record."""
    folder = tmp_path_factory.mktemp("onnx")
    model = saved(llama(), folder / "model")
    px.compile(model, to="onnx", output=folder / "program", perplexity=False)
    (folder / "program" / PROGRAM_FILE).unlink()
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB_SIZE}
    (folder / "program" / "config.json").write_text(json.dumps(config))
    return folder / "program"


@pytest.fixture(scope="module")
def dynamic(program, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dynamic")
    graph = onnx.load(str(program / "model.onnx"))
    with_weights_laid_out(graph.graph)
    onnx.save(graph, str(folder / "float.onnx"))
    quantize_dynamic(
        str(folder / "float.onnx"),
        str(folder / "model.onnx"),
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul"],
    )
    (folder / "float.onnx").unlink()
    shutil.copy(program / "config.json", folder)
    return folder


def small_ids(tmp_path):
    lines = [" ".join(map(str, window.ids_T[:20])) for window in WINDOWS]
    path = tmp_path / "ids.txt"
    path.write_text("\n".join(lines))
    return path


def evaluated(session, tmp_path):
    tokens = import_id_lines(small_ids(tmp_path), output=tmp_path / "ids.safetensors")
    return px.evaluate(session, tokens)


def says_so(run):
    weights = run.session["settings"]["weights"]
    return weights["batch_invariant"] is False and any("batch" in text for text in run.warnings)


def test_b8_a_dynamic_int8_program_says_that_losses_depend_on_the_batch(program, dynamic, tmp_path):
    session = OnnxInferenceSession(dynamic, threads=1)
    alone = np.concatenate([session.token_nll([window])[0] for window in WINDOWS])
    together = np.concatenate(session.token_nll(WINDOWS))
    assert np.abs(alone - together).max() > 1e-4
    run = evaluated(session, tmp_path)
    assert says_so(run)
    assert "DynamicQuantizeLinear" in run.session["settings"]["weights"]["activations"]
    plain = evaluated(OnnxInferenceSession(program, threads=1), tmp_path)
    assert "weights" not in plain.session["settings"]
    assert not any("beside a window in its batch" in text for text in plain.warnings)


def test_b8_sibling_operators_in_branches_and_functions(program, dynamic, tmp_path):
    graph = onnx.load(str(dynamic / "model.onnx"))
    body = helper.make_graph(list(graph.graph.node), "branch", [], list(graph.graph.output))
    branch = helper.make_node("If", ["flag"], [x.name for x in graph.graph.output])
    branch.attribute.append(helper.make_attribute("then_branch", body))
    branch.attribute.append(helper.make_attribute("else_branch", body))
    del graph.graph.node[:]
    graph.graph.node.append(branch)
    assert "DynamicQuantizeLinear" in _rounded_together(graph)
    assert _rounded_together(onnx.load(str(program / "model.onnx"))) is None


def modules():
    plain = llama()
    yield (
        "torch.ao",
        torch.ao.quantization.quantize_dynamic(plain, {torch.nn.Linear}, dtype=torch.qint8),
    )
    torchao = pytest.importorskip("torchao.quantization")
    for name, config in {
        "8da4w": torchao.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4, weight_granularity=torchao.granularity.PerGroup(32)
        ),
        "int8dyn": torchao.Int8DynamicActivationInt8WeightConfig(),
    }.items():
        model = llama()
        torchao.quantize_(model, config)
        yield name, model


def test_b8_sibling_modules_that_are_handed_in(tmp_path):
    for name, module in modules():
        run = evaluated(PytorchInferenceSession(module), tmp_path)
        assert says_so(run), name
    run = evaluated(PytorchInferenceSession(llama()), tmp_path)
    assert "weights" not in run.session["settings"]


@pytest.mark.parametrize(
    ("precision", "invariant"),
    [("8da4w", False), ("llm-int8", False), ("int8", True), ("nf4", True)],
)
def test_b8_sibling_quantizations_on_loading(tmp_path, precision, invariant):
    folder = saved(llama(), tmp_path / "model")
    run = evaluated(PytorchInferenceSession(folder, quantization=precision), tmp_path)
    assert run.session["settings"]["weights"]["batch_invariant"] is invariant
    assert says_so(run) is not invariant


def test_b8_sibling_an_openvino_that_rounds_activations_all_the_same(tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    from perplexit.sessions import openvino as session_module  # noqa: PLC0415 - optional

    program = px.compile(saved(llama(), tmp_path / "m"), to="openvino", output=tmp_path / "p")
    run = evaluated(px.load_session(f"openvino:{program.folder}"), tmp_path)
    assert "weights" not in run.session["settings"]
    opened = session_module.open_program

    def rounding(*args, **options):
        program = opened(*args, **options)
        for says in program.properties.values():
            says["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "32"
        return program

    monkeypatch.setattr(session_module, "open_program", rounding)
    (tmp_path / "again").mkdir()
    assert says_so(evaluated(px.load_session(f"openvino:{program.folder}"), tmp_path / "again"))
