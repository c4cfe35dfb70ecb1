"""Every precision of the PyTorch engine: it happens, it is counted, it stays in its band."""

import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import perplexit as px
from perplexit.errors import MissingPackageError, QuantizationError, UsageError
from perplexit.quantization import pytorch_quantization
from perplexit.quantization.llamacpp_library import FILE_TYPES
from perplexit.quantization.precisions import known_precisions, precisions_by_engine
from perplexit.quantization.pytorch_quantization import pytorch_recipe, quantize_model
from perplexit.sessions.registry import load_session
from tests.oracles import random_window
from tests.tiny_models import VOCAB_SIZE

pytest.importorskip("torchao")
pytest.importorskip("bitsandbytes")

EVERY = known_precisions("pytorch")
DYNAMIC = ("llm-int8", "8da4w")
PLAIN = tuple(name for name in EVERY if pytorch_recipe(name).keeps_plain_weights)
WINDOWS = [
    random_window(0, 48, VOCAB_SIZE, index=0),
    random_window(1, 30, VOCAB_SIZE, index=1),
    random_window(2, 9, VOCAB_SIZE, index=2),
]


def losses(session, windows=WINDOWS):
    return np.concatenate(session.token_nll(windows))


def plain_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def weights_and_bits(session):
    quantization = session.description.quantization
    return quantization, session.description.settings["weights"]


@pytest.mark.trap(35)
@pytest.mark.parametrize("precision", [*EVERY, *(f"{p}:head" for p in EVERY if p != "q4f16_0")])
def test_a_model_of_conv1d_layers_is_really_quantized(precision, tiny_gpt2_dir):
    """Trap 35: no library knows GPT-2's Conv1D; each would leave all but the head alone."""
    before = losses(load_session(f"hf:{tiny_gpt2_dir}"))
    session = load_session(f"hf:{tiny_gpt2_dir}", quantization=precision)
    after = losses(session)
    quantization, _ = weights_and_bits(session)
    num_layers = 8 + (precision.endswith(":head")) + 3 * (precision == "q4f16_0")
    assert quantization.num_modules == num_layers
    assert quantization.name == precision
    difference = np.abs(after - before)
    assert difference.max() > 1e-3
    assert difference.mean() < 1.0
    layers = [p for n, p in plain_model(tiny_gpt2_dir).named_parameters() if ".h." in n]
    num_quantized = sum(p.numel() for p in layers if p.ndim == 2)
    bits = pytorch_recipe(precision).recipe.weights.bits
    assert quantization.num_bytes * 8 >= bits * num_quantized
    # the layers' own outputs have moved: what is left unquantized is the embeddings alone
    assert all("h.0" not in name for name in quantization.unquantized)


@pytest.mark.parametrize("precision", EVERY)
def test_what_is_recorded_is_what_the_model_holds(precision, tiny_llama_dir):
    session = load_session(f"hf:{tiny_llama_dir}", quantization=precision)
    quantization, weights = weights_and_bits(session)
    whole = precision == "q4f16_0"
    assert quantization.library in ("bitsandbytes", "torchao", "perplexit")
    assert quantization.num_modules == (16 if whole else 14)
    assert session.model.num_parameters == sum(
        p.numel() for p in plain_model(tiny_llama_dir).parameters()
    )
    left = () if whole else ("lm_head.weight", "model.embed_tokens.weight")
    assert quantization.unquantized == left
    bits = {4: (4.25, 5.0), 6: (6.25, 6.25), 8: (8.25, 9.0)}[weights["bits"]]
    num_quantized = _num_quantized(tiny_llama_dir, whole)
    assert bits[0] <= 8 * quantization.num_bytes / num_quantized <= bits[1]
    assert quantization.effective_bits < 22
    assert weights["batch_invariant"] is (precision not in DYNAMIC)


def _num_quantized(folder, whole):
    parameters = plain_model(folder).named_parameters()
    return sum(p.numel() for n, p in parameters if p.ndim == 2 and (whole or "proj" in n))


@pytest.mark.parametrize(
    ("precision", "most"),
    [("int8", 0.3), ("llm-int8", 0.3), ("mxint8", 0.5), ("mxfp6", 1.0), ("int4", 4), ("nf4", 4)],
)
def test_losses_move_but_not_far_on_a_tiny_random_model(precision, most, tiny_llama_dir):
    difference = losses(load_session(f"hf:{tiny_llama_dir}")) - losses(
        load_session(f"hf:{tiny_llama_dir}", quantization=precision)
    )
    assert 1e-3 < np.abs(difference).max() < most


def test_quantizing_the_head_leaves_a_tied_embedding_as_it_was(tiny_gpt2_dir):
    for precision in ("mxfp4:head", "int8:head", "nf4:head"):
        model = plain_model(tiny_gpt2_dir)
        embedding = model.transformer.wte.weight.detach().clone()
        done = quantize_model(model, pytorch_recipe(precision))
        assert torch.equal(model.transformer.wte.weight, embedding)
        assert model.lm_head.weight is not model.transformer.wte.weight
        assert done.settings["tied_head"] == "a quantized copy; the embedding is as it was"
    model = plain_model(tiny_gpt2_dir)
    done = quantize_model(model, pytorch_recipe("q4f16_0"))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert done.settings["tied_head"] == "quantized with its embedding"
    shared_once = quantize_model(plain_model(tiny_gpt2_dir), pytorch_recipe("q4f16_2")).num_bytes
    tables = sum(m.weight.numel() for m in (model.transformer.wte, model.transformer.wpe))
    assert done.num_bytes - shared_once == tables * 4.5 / 8


@pytest.mark.trap(38)
@pytest.mark.parametrize("precision", [*PLAIN, "mxfp4:head"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_saved_after_scoring_and_loaded_again_it_scores_the_same(
    precision, kind, request, tmp_path, monkeypatch
):
    """Trap 38, where the weights stay plain tensors."""
    monkeypatch.setenv("PERPLEXIT_KERNELS", "plain")  # as the quantized model's own
    session = load_session(
        f"hf:{request.getfixturevalue(f'tiny_{kind}_dir')}", quantization=precision
    )
    before = losses(session)
    session.module.save_pretrained(tmp_path)
    assert np.array_equal(losses(load_session(f"hf:{tmp_path}")), before)


@pytest.mark.trap(38)
@pytest.mark.parametrize("precision", ["nf4", "fp4", "llm-int8", "int8", "int4"])
def test_packed_weights_are_not_repacked_by_scoring_and_not_saved_as_a_checkpoint(
    precision, tiny_llama_dir, tmp_path
):
    """Trap 38: bitsandbytes repacks 4-bit weights in the first forward pass on some CPUs."""
    session = load_session(f"hf:{tiny_llama_dir}", quantization=precision)
    fresh = quantize_model(plain_model(tiny_llama_dir), pytorch_recipe(precision))
    untouched = _state(tiny_llama_dir, precision)
    before = losses(session)
    state = session.module.state_dict()
    assert fresh.num_modules == 14
    assert state.keys() == untouched.keys()
    for name, tensor in untouched.items():
        left, right = _plain(state[name]), _plain(tensor)
        assert torch.equal(left, right), name
    assert np.array_equal(losses(session), before)  # nor does reading the state change anything
    with pytest.raises(QuantizationError, match="save the checkpoint before"):
        session.module.save_pretrained(tmp_path)


def _state(folder, precision):
    model = plain_model(folder)
    quantize_model(model, pytorch_recipe(precision))
    return model.state_dict()


def _plain(value):
    codes = getattr(value, "qdata", value)
    return codes if isinstance(codes, torch.Tensor) else torch.tensor(0)


def test_four_bit_layers_compute_in_the_session_s_dtype(tiny_llama_dir):
    """On CPUs with AVX512-BF16 bitsandbytes would silently compute in bfloat16."""
    session = load_session(f"hf:{tiny_llama_dir}", quantization="nf4")
    losses(session)
    layer = session.module.model.layers[0].mlp.up_proj
    assert layer.weight.quant_state.dtype == torch.float32
    assert layer.weight.quant_state.absmax.dtype == torch.float32
    from bitsandbytes.functional import dequantize_4bit  # noqa: PLC0415

    plain = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    hidden = torch.randn(5, 32)
    with torch.inference_mode():
        assert torch.allclose(layer(hidden), hidden @ plain.T, atol=1e-5)


@pytest.mark.trap(37)
def test_rounded_activations_make_losses_depend_on_the_batch_and_the_record_says_so(
    tiny_llama_dir, tmp_path
):
    """Trap 37: LLM.int8() picks its outlier columns over the whole batch."""
    session = load_session(f"hf:{tiny_llama_dir}", quantization="llm-int8")
    alone = np.concatenate([losses(session, [window]) for window in WINDOWS])
    assert np.abs(alone - losses(session)).max() > 1e-4
    assert session.description.settings["weights"]["batch_invariant"] is False
    tokens = px.prepare(["Some text. " * 30], tokenizer=str(tiny_llama_dir), max_length=32,
                        stride=16, output=tmp_path / "in.safetensors")  # fmt: skip
    run = px.evaluate(session, tokens)
    assert any("batch" in warning for warning in run.warnings)
    assert not px.evaluate(f"hf:{tiny_llama_dir}", tokens, quantization="int8").warnings


def test_a_layer_s_library_says_nothing_on_stderr(tiny_llama_dir, capfd):
    for precision in ("llm-int8", "nf4", "int8", "mxfp8"):
        losses(load_session(f"hf:{tiny_llama_dir}", quantization=precision))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("precision", ["int7", "q8_0", ""])
def test_an_unknown_name_lists_what_pytorch_takes(precision):
    with pytest.raises(QuantizationError, match=r"nf4.*llm-int8.*mxfp6.*q4f16_0"):
        load_session("hf:nowhere", quantization=precision)  # before the model is looked for


@pytest.mark.parametrize("precision", ["nf4:all", "q4f16_0:head", "int8:"])
def test_another_reach_than_the_head_is_refused(precision):
    with pytest.raises(UsageError, match="expected"):
        pytorch_recipe(precision)


@pytest.mark.parametrize(("precision", "package"), [("nf4", "bitsandbytes"), ("int8", "torchao")])
def test_a_missing_package_is_named_with_its_command(
    precision, package, tiny_llama_dir, monkeypatch
):
    submodule = {"torchao": "torchao.quantization"}.get(package, package)
    monkeypatch.setitem(sys.modules, submodule, None)
    monkeypatch.delitem(sys.modules, pytorch_quantization._HOMES[package], raising=False)
    with pytest.raises(MissingPackageError, match=rf"{package}.*perplexit\[quantization\]"):
        quantize_model(plain_model(tiny_llama_dir), pytorch_recipe(precision))


def test_a_model_that_is_open_already_is_not_quantized(tiny_llama_dir):
    from perplexit.sessions.pytorch import PytorchInferenceSession  # noqa: PLC0415

    with pytest.raises(UsageError, match="loaded model"):
        PytorchInferenceSession(plain_model(tiny_llama_dir), quantization="int8")


@pytest.mark.trap(35)
def test_nothing_to_quantize_is_refused(tiny_llama_dir):
    """Trap 35: a model without linear layers, and one whose inputs fit no group."""

    class Bag(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(8, 8)

    with pytest.raises(QuantizationError, match="found none"):
        quantize_model(Bag(), pytorch_recipe("mxint8"))
    odd = torch.nn.Sequential(torch.nn.Linear(33, 8))
    with pytest.raises(QuantizationError, match="whole groups of 32"):
        quantize_model(odd, pytorch_recipe("int4"))


def test_conv1d_weights_are_grouped_along_their_inputs():
    conv = torch.nn.Sequential(Conv1D(8, 32))
    with torch.no_grad():
        conv[0].weight.copy_(torch.linspace(-1, 1, 8).expand(32, 8))
    linear = torch.nn.Sequential(torch.nn.Linear(32, 8))
    linear[0].weight = torch.nn.Parameter(conv[0].weight.detach().t().clone())
    for model in (conv, linear):
        quantize_model(model, pytorch_recipe("q4f16_2"))
    assert torch.equal(conv[0].weight.t(), linear[0].weight)


def test_damaged_weights_are_refused_by_name(tiny_llama_dir, tmp_path):
    model = plain_model(tiny_llama_dir)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    for precision in ("mxfp8", "mxint8", "q4f16_0"):
        with pytest.raises(QuantizationError, match="damaged"):
            quantize_model(model, pytorch_recipe(precision))


def test_one_table_says_what_each_engine_takes():
    text = precisions_by_engine()
    for name in EVERY:
        assert name in text
    assert text.startswith("pytorch: nf4")
    assert "onnx (made by compile): int8, int4" in text
    plain = ("float32", "float16", "bfloat16")
    on_loading = set(known_precisions("gguf", on_loading=True))
    assert on_loading == {name for name in FILE_TYPES if name not in plain}


def test_resuming_in_another_precision_is_refused(tiny_llama_dir, tmp_path):
    tokens = px.prepare(["Some text. " * 30], tokenizer=str(tiny_llama_dir), max_length=32,
                        stride=16, output=tmp_path / "in.safetensors")  # fmt: skip
    px.evaluate(f"hf:{tiny_llama_dir}", tokens, run=tmp_path / "run", quantization="int8")
    with pytest.raises(px.errors.ResumeError, match="quantization: recorded int8, now mxint8"):
        px.evaluate(f"hf:{tiny_llama_dir}", tokens, run=tmp_path / "run", quantization="mxint8")
