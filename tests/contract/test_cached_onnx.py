"""Prefill and decode on ONNX Runtime: our programs, and those of other exporters."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicLayer

from perplexit.compilation.targets import compile
from perplexit.errors import CapabilityError, ModelError
from perplexit.program_record import PROGRAM_FILE
from perplexit.sessions.base import CachingSession
from perplexit.sessions.onnx import OnnxInferenceSession
from perplexit.sessions.prefill_decode import cached_session
from perplexit.sessions.pytorch import PytorchInferenceSession
from perplexit.sessions.registry import split_address
from tests.oracles import random_window
from tests.tiny_models import VOCAB_SIZE

WINDOW = 24
WINDOWS = [
    random_window(0, WINDOW, VOCAB_SIZE, index=0),
    random_window(1, WINDOW, VOCAB_SIZE, index=1),
    random_window(2, 9, VOCAB_SIZE, index=2),
    random_window(3, 20, VOCAB_SIZE, range(7, 20, 3), index=3),
]


def largest_difference(left, right):
    assert [len(a) for a in left] == [len(b) for b in right]
    return max(float(np.abs(a - b).max()) for a, b in zip(left, right, strict=True) if len(a))


@pytest.fixture(scope="module")
def programs(request, tmp_path_factory):
    """(checkpoint, folder of its program with a cache) by the model's name."""
    made = {}

    def program(name):
        if name not in made:
            checkpoint = request.getfixturevalue(f"tiny_{name}_dir")
            output = tmp_path_factory.mktemp("cached") / name
            made[name] = (
                checkpoint,
                compile(checkpoint, to="onnx", output=output, perplexity=False).folder,
            )
        return made[name]

    return program


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("model", ["gpt2", "llama", "gemma2"])
def test_every_prompt_len_gives_the_losses_of_the_whole_window(programs, model, batch):
    checkpoint, folder = programs(model)
    windows = WINDOWS[:batch]
    session = OnnxInferenceSession(folder, threads=1)
    assert isinstance(session, CachingSession)
    whole = session.token_nll(windows)
    assert largest_difference(whole, PytorchInferenceSession(checkpoint).token_nll(windows)) < 1e-4
    for prompt_len in range(1, WINDOW + 1):
        for decode_chunk in (1, 5):
            cached = cached_session(session, prompt_len=prompt_len, decode_chunk=decode_chunk)
            got = cached.token_nll(windows)
            assert largest_difference(whole, got) < 1e-4, (prompt_len, decode_chunk)


@pytest.mark.trap(20)
def test_the_same_request_twice_gives_the_same_losses(programs):
    """Trap 20: nothing is left in a cache from one request to the next."""
    cached = cached_session(OnnxInferenceSession(programs("llama")[1], threads=1), prompt_len=7)
    first, second = cached.token_nll(WINDOWS), cached.token_nll(WINDOWS)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.trap(20)
def test_logits_cut_short_by_a_cache_are_an_error(programs, monkeypatch):
    """Trap 20: a program that gives fewer rows than it was fed ids is caught, not averaged."""
    session = OnnxInferenceSession(programs("llama")[1], threads=1)
    cached = cached_session(session, prompt_len=8)
    run = session._run_values

    def truncated(names, feed):
        logits, *presents = run(names, feed)
        array = logits.numpy()
        cut = array[:, 2:] if array.shape[1] > 2 else array
        return [type(logits).ortvalue_from_numpy(np.ascontiguousarray(cut)), *presents]

    monkeypatch.setattr(session, "_run_values", truncated)
    with pytest.raises(ModelError, match=r"at 8 positions .* cuts them short"):
        cached.token_nll(WINDOWS)


@pytest.mark.parametrize("prompt_len", [1, 6])
def test_the_bug_of_the_seeds_decode_loop_would_be_seen(programs, monkeypatch, prompt_len):
    """There, the logits after token 0 were scored against token 2, and token 1 never."""
    session = OnnxInferenceSession(programs("llama")[1], threads=1)
    whole = session.token_nll(WINDOWS)
    cached = cached_session(session, prompt_len=prompt_len)
    opened = session.open_cache

    def off_by_one(windows):
        cache = opened(windows)
        feed = cache.feed

        def shifted(ids_BT, *, first_row, start, picked):
            rows = feed(ids_BT, first_row=first_row, start=start, picked=picked)
            details = rows.details

            class Shifted:
                array = staticmethod(rows.array)

                @staticmethod
                def details(ids_N, **options):
                    ids = [
                        windows[row].ids_T[min(start + column + 2, len(windows[row].ids_T) - 1)]
                        for row, column in zip(*picked, strict=True)
                    ]
                    return details(np.array(ids, np.int64), **options)

            return Shifted()

        cache.feed = shifted
        return cache

    assert largest_difference(whole, cached.token_nll(WINDOWS)) < 1e-4
    monkeypatch.setattr(session, "open_cache", off_by_one)
    assert largest_difference(whole, cached.token_nll(WINDOWS)) > 0.5


@pytest.mark.trap(37)
def test_rounded_activations_make_the_losses_depend_on_the_block(programs, tmp_path):
    """Trap 37: prefill and decode differ under dynamic quantization; the shape is on record."""
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415 - logs

    folder = foreign_copy(programs("llama")[1], tmp_path / "float", with_weights_laid_out)
    quantized = tmp_path / "dynamic"
    quantized.mkdir()
    quantize_dynamic(
        str(folder / "model.onnx"),
        str(quantized / "model.onnx"),
        op_types_to_quantize=["MatMul"],
        weight_type=QuantType.QInt8,
    )
    operators = {node.op_type for node in onnx.load(str(quantized / "model.onnx")).graph.node}
    assert "MatMulInteger" in operators
    session = OnnxInferenceSession(quantized, threads=1)
    as_whole, by_token = (
        cached_session(session, prompt_len=n).token_nll(WINDOWS) for n in (WINDOW, 1)
    )
    assert largest_difference(as_whole, by_token) > 1e-3
    exact = OnnxInferenceSession(folder, threads=1)
    one, other = (cached_session(exact, prompt_len=n).token_nll(WINDOWS) for n in (WINDOW, 1))
    assert largest_difference(one, other) < 1e-4
    description = cached_session(session, prompt_len=5, decode_chunk=2).description
    assert (description.prompt_len, description.decode_chunk) == (5, 2)


def foreign_copy(folder, target, edit=None, *, config=True):
    """The program without its record, its graph edited, as another exporter would leave it."""
    target.mkdir(parents=True)
    for path in folder.iterdir():
        if path.name != PROGRAM_FILE:
            shutil.copy(path, target / path.name)
    if config:
        (target / "config.json").write_text(
            json.dumps({"architectures": ["TinyForCausalLM"], "vocab_size": VOCAB_SIZE})
        )
    if edit is not None:
        model = onnx.load(str(target / "model.onnx"))
        edit(model.graph)
        onnx.save(model, str(target / "model.onnx"))
    return target


def with_weights_laid_out(graph):
    """Transposed beforehand, since the dynamic quantizer sees weights only as they stand."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    for node in list(graph.node):
        if node.op_type == "Transpose" and node.input[0] in weights:
            turned = onnx.numpy_helper.to_array(weights[node.input[0]]).T
            graph.initializer.append(onnx.numpy_helper.from_array(turned.copy(), node.output[0]))
            graph.node.remove(node)


def rename(graph, change):
    names = {v.name: change(v.name) for v in (*graph.input, *graph.output)}
    for value in (*graph.input, *graph.output):
        value.name = names[value.name]
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]


def as_retained_state_names(graph):
    """`past_key.0` in, `past_key.0_RetainedState` out."""

    def change(name):
        kind, _, rest = name.partition(".")
        if kind not in ("past_key_values", "present"):
            return name
        layer, which = rest.split(".")
        return f"past_{which}.{layer}" + ("_RetainedState" if kind == "present" else "")

    rename(graph, change)


def as_merged_decoder(graph):
    """With a switch that this graph does not need, and `decoder` in the names."""
    rename(graph, lambda n: n.replace("present.", "present_key_values."))
    branch = helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1])
    graph.input.append(branch)


def with_last_position_alone(graph):
    """Only the last id's logits leave the graph."""
    graph.output[0].name = "logits"
    for node in graph.node:
        node.output[:] = ["all_logits" if n == "logits" else n for n in node.output]
    index = helper.make_tensor("last", TensorProto.INT64, [1], [-1])
    graph.initializer.append(index)
    graph.node.append(helper.make_node("Gather", ["all_logits", "last"], ["logits"], axis=1))


def with_half_precision_caches(graph):
    """float16 in and out, float32 within."""
    for value in graph.input:
        if value.name.startswith("past_key_values"):
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
            wide = f"{value.name}.wide"
            for node in graph.node:
                node.input[:] = [wide if n == value.name else n for n in node.input]
            graph.node.insert(
                0, helper.make_node("Cast", [value.name], [wide], to=TensorProto.FLOAT)
            )
    for value in graph.output:
        if value.name.startswith("present"):
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
            wide = f"{value.name}.wide"
            for node in graph.node:
                node.output[:] = [wide if n == value.name else n for n in node.output]
                node.input[:] = [wide if n == value.name else n for n in node.input]
            graph.node.append(
                helper.make_node("Cast", [wide], [value.name], to=TensorProto.FLOAT16)
            )


@pytest.mark.parametrize(
    ("edit", "tolerance"),
    [
        (None, 1e-4),
        (as_retained_state_names, 1e-4),
        (as_merged_decoder, 1e-4),
        (with_half_precision_caches, 2e-2),
    ],
)
def test_a_program_of_another_exporter_opens(programs, tmp_path, edit, tolerance):
    checkpoint, folder = programs("llama")
    session = OnnxInferenceSession(foreign_copy(folder, tmp_path / "f", edit), threads=1)
    expected = PytorchInferenceSession(checkpoint).token_nll(WINDOWS)
    assert largest_difference(session.token_nll(WINDOWS), expected) < 1e-4
    for prompt_len in (1, 6):
        got = cached_session(session, prompt_len=prompt_len).token_nll(WINDOWS)
        difference = largest_difference(got, expected)
        assert difference < tolerance
        if edit is with_half_precision_caches:
            assert difference > 1e-6  # the cache really is rounded
    assert split_address(tmp_path / "f")[0] == "onnx"
    assert session.model.architecture == "TinyForCausalLM"
    assert session.model.vocab_size == VOCAB_SIZE
    assert session.description.dtype == "float32"


def test_a_program_that_gives_the_last_position_alone_is_decoded(programs, tmp_path):
    checkpoint, folder = programs("llama")
    copy = foreign_copy(folder, tmp_path / "last", with_last_position_alone)
    session = OnnxInferenceSession(copy, threads=1)
    expected = PytorchInferenceSession(checkpoint).token_nll(WINDOWS)
    for prompt_len in (1, 6, WINDOW):
        cached = cached_session(session, prompt_len=prompt_len)
        assert largest_difference(cached.token_nll(WINDOWS), expected) < 1e-4
        assert cached.description.settings["cache"]["logits"] == "last position"
    with pytest.raises((CapabilityError, ModelError), match="--mode cached"):
        session.token_nll(WINDOWS)


def test_an_execution_provider_that_is_not_here_is_refused_with_those_that_are(programs):
    folder = programs("llama")[1]
    assert OnnxInferenceSession(folder, device="CPUExecutionProvider").description.settings[
        "providers"
    ] == ["CPUExecutionProvider"]
    with pytest.raises(CapabilityError, match=r"no DnnlExecutionProvider; it has .*CPUExecution"):
        OnnxInferenceSession(folder, device="dnnl")


def test_a_program_that_asks_for_something_unknown_is_refused_by_name(programs, tmp_path):
    def edit(graph):
        graph.input.append(helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, [1]))

    copy = foreign_copy(programs("llama")[1], tmp_path / "odd", edit)
    with pytest.raises(CapabilityError, match="takes pixel_values"):
        OnnxInferenceSession(copy)


CAPACITY, ROWS = 24, 3


class _RetainedLayer(DynamicLayer):
    """Keys and values of a fixed size; new ids are written at their positions."""

    def __init__(self, keys, values, position_ids):
        super().__init__()
        self.keys, self.values, self.place = keys, values, position_ids
        self.is_initialized = True

    def update(self, key_states, value_states, *_, **__):
        place = self.place[:, None, :, None].expand_as(key_states)
        self.keys = self.keys.scatter(2, place, key_states)
        self.values = self.values.scatter(2, place, value_states)
        return self.keys, self.values


class _RetainedProgram(torch.nn.Module):
    """One token in for each window, the logits of that position out; the cache stays inside."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, position_ids, *pasts):
        layers = [
            _RetainedLayer(*pair, position_ids)
            for pair in zip(pasts[::2], pasts[1::2], strict=True)
        ]
        seen = torch.arange(CAPACITY)[None, None, None, :] <= position_ids[:, None, :, None]
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
        output = self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=mask,
            past_key_values=Cache(layers=layers),
            use_cache=True,
        )
        return output.logits[:, -1:], *(x for layer in layers for x in (layer.keys, layer.values))


@pytest.fixture(scope="module")
def retained(tiny_llama_dir, tmp_path_factory) -> Path:
    """An opaque compiled program with static shapes, as an accelerator's compiler makes it."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, attn_implementation="eager").eval()
    folder = tmp_path_factory.mktemp("retained")
    module = _RetainedProgram(model).eval()
    ids = torch.ones(ROWS, 1, dtype=torch.long)
    pasts = [torch.zeros(ROWS, 2, CAPACITY, 8) for _ in range(4)]
    names = [f"past_{kind}.{layer}" for layer in range(2) for kind in ("key", "value")]
    program = torch.onnx.export(
        module,
        (ids, ids * 3, *pasts),
        input_names=["input_ids", "position_ids", *names],
        output_names=["logits", *(f"{name}_RetainedState" for name in names)],
        dynamo=True,
        opset_version=20,
        verbose=False,
    )
    program.save(str(folder / "model.onnx"))
    return folder


def test_static_shapes_and_a_retained_cache(retained, tiny_llama_dir):
    """Fixed batch, fixed cache, one token a call: more windows than rows, shorter ones padded."""
    session = OnnxInferenceSession(retained, threads=1)
    expected = PytorchInferenceSession(tiny_llama_dir).token_nll(WINDOWS)
    for prompt_len in (1, 5, WINDOW):
        cached = cached_session(session, prompt_len=prompt_len)
        assert cached.max_batch_size(WINDOW) == ROWS
        assert largest_difference(cached.token_nll(WINDOWS), expected) < 1e-4
    assert cached.description.settings["cache"]["kind"] == f"retained, {CAPACITY} ids"
    with pytest.raises(CapabilityError, match=r"one position at a time .* --mode cached"):
        session.token_nll(WINDOWS)
    with pytest.raises(CapabilityError, match=f"keeps {CAPACITY} ids in its cache, got a window"):
        cached.token_nll([random_window(0, CAPACITY + 2, VOCAB_SIZE)])


def test_a_program_with_the_head_inside_cannot_decode(tiny_llama_dir, tmp_path):
    folder = compile(tiny_llama_dir, to="onnx", output=tmp_path / "p").folder
    with pytest.raises(CapabilityError, match="--no-perplexity"):
        cached_session(OnnxInferenceSession(folder))
