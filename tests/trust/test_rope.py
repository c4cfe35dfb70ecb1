"""B3: a window's losses depend on that window alone: whatever the batch, the order, a resume."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
)

from perplexit.checkpoints.length_dependent_rope import LengthDependentRope
from perplexit.compilation.targets import compile
from perplexit.errors import CapabilityError, CompilationError, ModelError
from perplexit.igf.losses import ContextScorer, context_losses
from perplexit.inputs.windows import WindowIds
from perplexit.sessions.llamacpp import LlamaCppInferenceSession
from perplexit.sessions.onnx import OnnxInferenceSession
from perplexit.sessions.prefill_decode import cached_session
from perplexit.sessions.pytorch import PytorchInferenceSession
from tests.oracles import oracle_details, random_window, window_of

VOCAB, BORDER = 96, 64
LENGTHS = (100, 65, 64, 90, 20)  # beyond the border, one beyond, at it; not in order
TOLERANCE = 1e-4  # nats of one token, float32 against float64
_FREQUENCIES = 8  # of a head of 16

LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * n for n in range(_FREQUENCIES)],
    "long_factor": [3.0 + 0.5 * n for n in range(_FREQUENCIES)],
    "original_max_position_embeddings": BORDER,
    "factor": 4.0,
    "rope_theta": 10_000.0,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
DEFAULT = {"rope_type": "default", "rope_theta": 10_000.0}
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def longrope_llama() -> nn.Module:
    config = LlamaConfig(**_SIZES, max_position_embeddings=4 * BORDER, rope_parameters=LONGROPE)
    return LlamaForCausalLM(config)


def dynamic_llama() -> nn.Module:
    config = LlamaConfig(**_SIZES, max_position_embeddings=BORDER, rope_parameters=DYNAMIC)
    return LlamaForCausalLM(config)


def rope_for_each_kind_of_layer() -> nn.Module:
    config = Gemma3TextConfig(
        **_SIZES,
        head_dim=16,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=BORDER,
        rope_parameters={"sliding_attention": DEFAULT, "full_attention": DYNAMIC},
    )
    return Gemma3ForCausalLM(config)


def rope_with_a_rule_of_its_own() -> nn.Module:
    """Phi-MoE scales its angles by one of two numbers, in code of its own."""
    config = PhimoeConfig(
        **_SIZES,
        num_local_experts=2,
        num_experts_per_tok=1,
        max_position_embeddings=4 * BORDER,
        rope_parameters={**LONGROPE, "short_mscale": 1.0, "long_mscale": 1.5},
    )
    return PhimoeForCausalLM(config)


MODELS = {
    "longrope": longrope_llama,
    "dynamic": dynamic_llama,
    "sibling, by kind of layer": rope_for_each_kind_of_layer,
    "sibling, a rule of its own": rope_with_a_rule_of_its_own,
}


def _saved(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return _saved(MODELS[request.param](), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def longrope(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return _saved(longrope_llama(), tmp_path_factory.mktemp("longrope"))


def _windows(lengths: tuple[int, ...] = LENGTHS) -> list[WindowIds]:
    return [random_window(n, size, VOCAB, index=n) for n, size in enumerate(lengths)]


def _oracle(folder: Path, windows: list[WindowIds]) -> list[np.ndarray]:
    fresh = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return [oracle_details(copy.deepcopy(fresh), window).nll_N for window in windows]


def _assert_equal(got: list[np.ndarray], right: list[np.ndarray]) -> None:
    for place, (one, other) in enumerate(zip(got, right, strict=True)):
        np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE, err_msg=str(place))


def test_b3_the_batch_the_order_and_a_resume_change_nothing(folder):
    windows, session = _windows(), PytorchInferenceSession(folder)
    right = _oracle(folder, windows)
    assert abs(right[0][:30] - _oracle(folder, _windows((31,)))[0]).max() > 0.01  # length matters
    _assert_equal(session.token_nll(windows), right)
    _assert_equal([session.token_nll([window])[0] for window in windows], right)
    _assert_equal(session.token_nll(windows[::-1])[::-1], right)
    _assert_equal([d.nll_N for d in session.token_details(windows)], right)
    _assert_equal(PytorchInferenceSession(folder).token_nll(windows[3:]), right[3:])


@pytest.mark.parametrize(("prompt_len", "chunk"), [(1, 1), (10, 7), (80, 3)])
def test_b3_a_cache_crosses_no_border(folder, prompt_len, chunk):
    windows, session = _windows(), PytorchInferenceSession(folder)
    cached = cached_session(session, prompt_len=prompt_len, decode_chunk=chunk)
    _assert_equal(cached.token_nll(windows), _oracle(folder, windows))


def test_b3_sibling_a_module_that_has_seen_longer_windows(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    windows = _windows()
    right = _oracle(folder, windows)
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 200, dtype=torch.int64))
    _assert_equal(PytorchInferenceSession(model).token_nll(windows), right)


def test_b3_sibling_a_window_is_as_long_as_its_ids_not_as_its_targets(folder):
    """What follows the last target is part of the window, and decides on which side it falls."""
    window = random_window(3, 90, VOCAB, targets=range(1, 40))
    session = PytorchInferenceSession(folder)
    right = _oracle(folder, [window])
    _assert_equal(session.token_nll([window]), right)
    _assert_equal(cached_session(session, prompt_len=8).token_nll([window]), right)


def test_b3_sibling_hidden_states_for_a_reference(folder):
    windows, session = _windows(), PytorchInferenceSession(folder)
    for window, states, right in zip(
        windows, session.target_hidden_states(windows), _oracle(folder, windows), strict=True
    ):
        logprobs = torch.log_softmax(torch.from_numpy(session.logits_of(states)).double(), -1)
        targets = torch.from_numpy(window.ids_T[window.targets_N].astype(np.int64))
        _assert_equal([-logprobs.gather(1, targets[:, None])[:, 0].numpy()], [right])


def test_b3_layers_that_run_elsewhere_are_refused_by_name(longrope):
    with pytest.raises(CapabilityError, match=r"--compile.*RoPE of LlamaForCausalLM \(longrope\)"):
        PytorchInferenceSession(longrope, compile_mode="default")


@pytest.mark.parametrize("to", ["onnx", "openvino", "tvm", "pt2", "gguf"])
def test_b3_programs_are_refused_by_name(longrope, tmp_path, to):
    pytest.importorskip({"gguf": "llama_cpp", "pt2": "torch"}.get(to, to))
    options = {} if to == "gguf" else {"max_length": BORDER + 1}
    with pytest.raises(CompilationError, match="longrope"):
        compile(longrope, to=to, output=tmp_path / "program", **options)
    assert not (tmp_path / "program").exists()


@pytest.mark.parametrize("model", [longrope_llama, dynamic_llama])
def test_b3_a_program_below_the_border_is_right(tmp_path, model):
    torch.manual_seed(0)
    folder = _saved(model(), tmp_path / "model")
    with pytest.raises(CompilationError, match=f"--max-length {BORDER} or less"):
        compile(folder, to="onnx", output=tmp_path / "program")
    compile(folder, to="onnx", output=tmp_path / "program", max_length=BORDER)
    windows = _windows((BORDER, 30))
    session = OnnxInferenceSession(tmp_path / "program")
    _assert_equal(session.token_nll(windows), _oracle(folder, windows))


def test_b3_sibling_a_program_made_elsewhere(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(**_SIZES, max_position_embeddings=4 * BORDER)
    folder = _saved(LlamaForCausalLM(config), tmp_path / "model")
    compile(folder, to="onnx", output=tmp_path / "program", perplexity=False)
    (tmp_path / "program" / "program.json").unlink()
    said = {**json.loads((folder / "config.json").read_text()), "rope_parameters": LONGROPE}
    (tmp_path / "program" / "config.json").write_text(json.dumps(said))
    session = OnnxInferenceSession(tmp_path / "program")
    session.token_nll(_windows((BORDER,)))
    with pytest.raises(CapabilityError, match=f"windows of at most {BORDER} ids, got one of 65"):
        session.token_nll(_windows((BORDER + 1,)))


@pytest.mark.parametrize(("model", "border"), [(longrope_llama, BORDER), (dynamic_llama, BORDER)])
def test_b3_the_border_is_found_by_what_is_computed(model, border):
    with torch.no_grad():
        rope = LengthDependentRope.of(model())
        assert rope is not None
        assert rope.border(1000) == border
        assert rope.border(border) is None


def test_b3_sibling_static_kinds_are_left_alone():
    for rope in (DEFAULT, {**DYNAMIC, "rope_type": "linear"}, {**DYNAMIC, "rope_type": "yarn"}):
        config = LlamaConfig(**_SIZES, max_position_embeddings=BORDER, rope_parameters=dict(rope))
        assert LengthDependentRope.of(LlamaForCausalLM(config)) is None


class _Toy(nn.Module):
    """Logits of each id by a table, times a number that `rule` makes of all ids of a call."""

    def __init__(self, rule) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.table_VV = nn.Parameter(torch.randn(VOCAB, VOCAB, generator=generator))
        self.rule = rule

    def get_input_embeddings(self) -> SimpleNamespace:
        return SimpleNamespace(weight=self.table_VV)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table_VV[input_ids] * self.rule(input_ids))


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(lambda ids: 1 + ids[:, :1, None].float().mean() / VOCAB, id="batch"),
        pytest.param(lambda ids: 1 + 0.01 * ids.shape[1], id="length"),
    ],
)
def test_b3_sibling_models_whose_windows_are_not_their_own_run_alone_and_whole(rule):
    model = _Toy(rule)
    session, windows = PytorchInferenceSession(model), _windows((40, 30, 30, 12))
    assert session.description.settings["windows_alone"] is True
    right = [oracle_details(model, window).nll_N for window in windows]
    _assert_equal(session.token_nll(windows), right)
    _assert_equal(session.token_nll(windows[::-1])[::-1], right)


def test_b3_sibling_a_model_drawn_at_random_is_refused():
    with pytest.raises(ModelError, match="change from call to call"):
        PytorchInferenceSession(_Toy(lambda ids: 1 + torch.rand(())))


def test_b3_sibling_a_model_that_remembers_earlier_calls_is_refused():
    calls = []
    with pytest.raises(ModelError, match="change from call to call"):
        PytorchInferenceSession(_Toy(lambda ids: 1.0 + len(calls.append(1) or calls)))


def test_b3_sibling_positions_that_start_after_the_padding_id(tmp_path):
    torch.manual_seed(0)
    sizes = {**_SIZES, "is_decoder": True}
    del sizes["num_key_value_heads"]
    model = RobertaForCausalLM(
        RobertaConfig(**{**sizes, "pad_token_id": 1, "bos_token_id": 0}, max_position_embeddings=32)
    )
    folder = _saved(model, tmp_path / "model")
    ids_T = np.random.default_rng(0).integers(3, VOCAB, 33).astype(np.int32)
    session = PytorchInferenceSession(folder)
    fits = [window_of(ids_T[:30])]
    _assert_equal(session.token_nll(fits), _oracle(folder, fits))
    with pytest.raises(ModelError, match="at most 30 ids"):
        session.token_nll([window_of(ids_T)])


def test_b3_sibling_positions_in_a_table_that_is_no_embedding(tmp_path):
    torch.manual_seed(0)
    config = GPTJConfig(
        vocab_size=VOCAB, n_positions=32, n_embd=64, n_layer=2, n_head=4, rotary_dim=8,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    session = PytorchInferenceSession(_saved(GPTJForCausalLM(config), tmp_path / "model"))
    session.token_nll(_windows((32,)))
    with pytest.raises(ModelError, match="windows of at most 32 ids, for which GPTJForCausalLM"):
        session.token_nll(_windows((40,)))
    with pytest.raises(ModelError, match="at most 32 ids"):
        cached_session(session, prompt_len=4).token_nll(_windows((40,)))


def test_b3_sibling_information_gain_measures_each_context_at_its_own_length(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for length in (100, 65, 20):
        window = random_window(length, length, VOCAB)
        right = float(_oracle(folder, [window])[0].mean())
        ids_1T = torch.tensor([window.ids_T.tolist()])
        assert float(context_losses(model, ids_1T)[0].detach()) == pytest.approx(
            right, abs=TOLERANCE
        )
        assert ContextScorer(model).losses(ids_1T)[0] == pytest.approx(right, abs=TOLERANCE)


def _longrope_gguf(folder: Path, border: int) -> tuple[Path, nn.Module]:
    """A GGUF with both factors of a LongRoPE, and the same model in PyTorch."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    torch.manual_seed(0)
    sizes = {**_SIZES, "max_position_embeddings": 1024}
    rope = {**LONGROPE, "original_max_position_embeddings": border, "attention_factor": 1.0}
    model = LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=rope)).eval()
    plain = LlamaForCausalLM(LlamaConfig(**sizes))
    plain.load_state_dict(model.state_dict())
    compile(_saved(plain, folder / "model"), to="gguf", output=folder / "program")
    reader = gguf.GGUFReader(next((folder / "program").glob("*.gguf")))
    writer = gguf.GGUFWriter(folder / "long.gguf", "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
    writer.add_rope_scaling_orig_ctx_len(border)
    writer.add_rope_scaling_attn_factors(1.0)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for kind in ("long", "short"):
        factors = np.array(LONGROPE[f"{kind}_factor"], np.float32)
        writer.add_tensor(f"rope_factors_{kind}.weight", factors)
    for write in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{write}_to_file")()
    writer.close()
    return folder / "long.gguf", model


def test_b3_sibling_llama_cpp_chooses_by_its_context_and_not_by_the_window(tmp_path):
    path, model = _longrope_gguf(tmp_path, border=256)
    windows = _windows((200, 400, 256, 257, 100))
    right = [oracle_details(model, window).nll_N for window in windows]
    session = LlamaCppInferenceSession(path)
    _assert_equal(session.token_nll(windows), right)
    _assert_equal(session.token_nll(windows[::-1])[::-1], right)
    _assert_equal([session.token_nll([window])[0] for window in windows], right)


def test_b3_sibling_a_border_that_llama_cpp_steps_over_is_refused(tmp_path):
    path, model = _longrope_gguf(tmp_path, border=64)
    session = LlamaCppInferenceSession(path)
    long = _windows((90,))
    _assert_equal(session.token_nll(long), [oracle_details(model, long[0]).nll_N])
    for _ in range(2):
        with pytest.raises(CapabilityError, match="long factors of the LongRoPE"):
            session.token_nll(_windows((60,)))
