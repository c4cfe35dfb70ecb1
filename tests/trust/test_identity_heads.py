"""The head of a saved reference: kept where its address does not give it again, and proven."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import perplexit as px
from perplexit.errors import CapabilityError, FingerprintMismatchError, ModelError, RunError
from perplexit.inputs.token_file import TokenFile
from perplexit.sessions.pytorch import PytorchInferenceSession
from tests.tiny_models import save_tiny_model

peft = pytest.importorskip("peft")

TEXTS = [f"Document {n}: the ferry left at four, and nobody saw it come back." for n in range(3)]
# Every scheme of PyTorch's, with the head where it does not go that far by itself.
SCHEMES = [
    "q4f16_0",
    "int8:head",
    "int4:head",
    "nf4:head",
    "fp4:head",
    "mxfp4:head",
    "mxfp6:head",
    "mxfp8:head",
    "8da4w:head",
    "llm-int8:head",
]
ROUND_THEIR_INPUTS = ("8da4w:head", "llm-int8:head")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("heads")


@pytest.fixture(scope="module")
def model_dir(folder: Path) -> Path:
    return save_tiny_model("llama", folder / "llama")


@pytest.fixture(scope="module")
def tokens(model_dir: Path, folder: Path) -> TokenFile:
    return px.prepare(TEXTS, tokenizer=model_dir, max_length=32, output=folder / "in.safetensors")


@pytest.fixture(scope="module")
def plain(model_dir: Path) -> PytorchInferenceSession:
    """The candidate of most tests: the checkpoint in float32."""
    return PytorchInferenceSession(model_dir)


def kl_by_hand(reference: nn.Module, candidate: Path, tokens: TokenFile) -> np.ndarray:
    """KL(reference ‖ candidate) of each target in float64, by whole forward passes."""
    fresh = AutoModelForCausalLM.from_pretrained(candidate, dtype=torch.float32).eval()
    found = []
    for index in range(tokens.num_windows):
        window = tokens.window_ids(index)
        ids = torch.tensor([window.ids_T.tolist()])
        with torch.no_grad():
            p, q = (m(ids).logits[0].double().log_softmax(-1) for m in (reference, fresh))
        rows = torch.from_numpy(window.targets_N.astype(np.int64) - 1)
        found.append((p.exp() * (p - q)).sum(-1)[rows].numpy())
    return np.concatenate(found)


def largest_kl(run: px.Run) -> float:
    return float(np.abs(run.tokens.kl).max())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a1_a_reference_of_a_quantized_head_is_the_session_itself(
    model_dir: Path,
    plain: PytorchInferenceSession,
    tokens: TokenFile,
    tmp_path: Path,
    scheme: str,
) -> None:
    session = PytorchInferenceSession(model_dir, quantization=scheme)
    saved = px.evaluate(session, tokens, save_reference=True, run=tmp_path / "run")
    rounding = scheme in ROUND_THEIR_INPUTS
    assert (tmp_path / "run" / "reference" / "head.safetensors").exists() != rounding
    again = px.evaluate(session, tokens, reference=tmp_path / "run")
    assert largest_kl(again) <= (1e-3 if rounding else 1e-9)
    stored = px.evaluate(plain, tokens, reference=tmp_path / "run")
    expected = kl_by_hand(session.module, model_dir, tokens)
    assert expected.mean() > 1e-4  # there is something to lose
    tolerance = {"atol": 2e-2} if scheme == "llm-int8:head" else {"atol": 2e-5, "rtol": 1e-4}
    np.testing.assert_allclose(stored.tokens.kl, expected, **tolerance)
    live = px.evaluate(plain, tokens, reference=session)
    np.testing.assert_allclose(stored.tokens.kl, live.tokens.kl, **tolerance)
    assert px.compare(saved, stored).divergences is not None
    assert px.compare(saved, live).divergences is not None


@pytest.fixture(scope="module")
def adapters(model_dir: Path, folder: Path) -> dict[str, Path]:
    """LoRA that leaves the head alone, that changes it, and a head of its own."""
    found = {}
    for name, changes in {
        "layers": {"target_modules": ["q_proj", "down_proj"]},
        "head": {"target_modules": ["q_proj", "lm_head"]},
        "own head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    }.items():
        torch.manual_seed(7)
        config = peft.LoraConfig(
            r=4, lora_alpha=12, task_type="CAUSAL_LM", init_lora_weights=False, **changes
        )
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config)
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if "modules_to_save" in key:
                    weight.add_(0.1 * torch.randn_like(weight))
        model.save_pretrained(folder / name)
        found[name] = folder / name
    return found


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("name", ["layers", "head", "own head"])
def test_a1_a_reference_with_an_adapter_can_be_compared_with(
    model_dir: Path,
    plain: PytorchInferenceSession,
    adapters: dict[str, Path],
    tokens: TokenFile,
    name: str,
    merge: bool,
) -> None:
    session = PytorchInferenceSession(model_dir, adapter=adapters[name], merge_adapter=merge)
    saved = px.evaluate(session, tokens, save_reference=True)
    stored = px.evaluate(plain, tokens, reference=saved)
    expected = kl_by_hand(session.module, model_dir, tokens)
    np.testing.assert_allclose(stored.tokens.kl, expected, atol=2e-5, rtol=1e-4)
    assert expected.mean() > 1e-3
    assert largest_kl(px.evaluate(session, tokens, reference=saved)) <= 1e-8


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "cohere", "granite"])
@pytest.mark.parametrize("quantized", [False, True])
def test_a1_a_reference_of_a_model_from_memory_keeps_scale_soft_cap_and_bias(
    model_dir: Path,
    plain: PytorchInferenceSession,
    tokens: TokenFile,
    tmp_path: Path,
    name: str,
    quantized: bool,
) -> None:
    """Quantized: the head is written out from what it does, not from its weights."""
    where = save_tiny_model(name, tmp_path / name)
    session = (
        PytorchInferenceSession(where, quantization="int8:head")
        if quantized
        else PytorchInferenceSession(AutoModelForCausalLM.from_pretrained(where).eval())
    )
    saved = px.evaluate(session, tokens, save_reference=True, run=tmp_path / "run")
    assert saved.model["address"].startswith("hf:" if quantized else "module:")
    assert largest_kl(px.evaluate(session, tokens, reference=tmp_path / "run")) <= 1e-8
    stored = px.evaluate(plain, tokens, reference=tmp_path / "run")
    expected = kl_by_hand(session.module, model_dir, tokens)
    np.testing.assert_allclose(stored.tokens.kl, expected, atol=5e-5, rtol=1e-4)


class NormInHead(nn.Module):
    """A model whose final norm, multiplier, bias and soft-cap come after its layers."""

    base_model_prefix = "model"

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.model = _Layers()
        self.norm = norm
        self.lm_head = nn.Linear(32, 320)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **_: Any) -> Any:
        states = self.model(input_ids=input_ids, inputs_embeds=inputs_embeds)[0]
        logits = self.lm_head(self.norm(states))
        return _Logits(logits=6.0 * torch.tanh(0.5 * logits / 6.0))


class _Logits(dict):
    __getattr__ = dict.__getitem__


class _Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(320, 32), nn.Linear(32, 32)

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **_: Any) -> Any:
        before = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        states = before + torch.tanh(self.mix(before))
        return _States((states,))


class _States(tuple):
    @property
    def last_hidden_state(self) -> Any:
        return self[0]


@pytest.mark.parametrize("norm", [nn.LayerNorm(32), nn.RMSNorm(32, eps=1e-5)])
def test_a1_sibling_a_final_norm_after_the_states_is_kept(
    tokens: TokenFile, tmp_path: Path, norm: nn.Module
) -> None:
    session = PytorchInferenceSession(NormInHead(norm).eval())
    assert not session.description.settings["head"].startswith("whole")
    px.evaluate(session, tokens, save_reference=True, run=tmp_path / "run")
    head = load_file(tmp_path / "run" / "reference" / "head.safetensors")
    assert {"weight", "bias", "norm.weight"} <= set(head)
    assert largest_kl(px.evaluate(session, tokens, reference=tmp_path / "run")) <= 1e-8


def test_a1_sibling_a_reference_in_bfloat16_and_in_float16_states(
    model_dir: Path, tokens: TokenFile, tmp_path: Path
) -> None:
    for dtype, states in (("bfloat16", "float32"), ("float32", "float16")):
        session = PytorchInferenceSession(model_dir, dtype=dtype, quantization="q4f16_0")
        where = tmp_path / dtype
        saved = px.evaluate(session, tokens, save_reference=True, reference_dtype=states, run=where)
        again = px.evaluate(session, tokens, reference=where)
        assert again.tokens.kl.mean() <= max(2e-4, 2 * saved.saved_reference["self_kl_mean"])


def test_a1_sibling_cached_mode_keeps_the_head_too(
    model_dir: Path, tokens: TokenFile, tmp_path: Path
) -> None:
    options = {"quantization": "q4f16_0", "mode": "cached", "prompt_len": 4, "decode_chunk": 4}
    px.evaluate(model_dir, tokens, save_reference=True, run=tmp_path / "run", **options)
    again = px.evaluate(model_dir, tokens, reference=tmp_path / "run", **options)
    assert largest_kl(again) <= 1e-8


def test_a1_sibling_the_checkpoint_may_be_gone_where_the_head_is_kept(
    model_dir: Path, tokens: TokenFile, tmp_path: Path
) -> None:
    moving = shutil.copytree(model_dir, tmp_path / "moving")
    px.evaluate(moving, tokens, quantization="q4f16_0", save_reference=True, run=tmp_path / "run")
    shutil.rmtree(moving)
    stored = px.evaluate(model_dir, tokens, quantization="q4f16_0", reference=tmp_path / "run")
    assert largest_kl(stored) <= 1e-9


def test_a1_sibling_a_checkpoint_that_changed_since_it_was_loaded(
    model_dir: Path, plain: PytorchInferenceSession, tokens: TokenFile, tmp_path: Path
) -> None:
    """The head is kept where the fingerprint was taken before; no other model's is taken after."""
    moving = shutil.copytree(model_dir, tmp_path / "moving")
    known, unknown = PytorchInferenceSession(moving), PytorchInferenceSession(moving)
    assert known.model.weights_fingerprint
    weights = load_file(moving / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] * 1.5
    (moving / "model.safetensors").unlink()
    save_file(weights, moving / "model.safetensors", metadata={"format": "pt"})
    px.evaluate(known, tokens, save_reference=True, run=tmp_path / "run")
    assert largest_kl(px.evaluate(plain, tokens, reference=tmp_path / "run")) <= 1e-9
    with pytest.raises(ModelError, match="changed since"):
        px.evaluate(unknown, tokens, save_reference=True, run=tmp_path / "other")


def saved_reference(model_dir: Path, tokens: TokenFile, where: Path, **options: Any) -> Path:
    px.evaluate(model_dir, tokens, save_reference=True, run=where, **options)
    return where


@pytest.fixture(scope="module")
def quantized_reference(model_dir: Path, tokens: TokenFile, folder: Path) -> Path:
    return saved_reference(model_dir, tokens, folder / "q4", quantization="q4f16_0")


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


@pytest.mark.parametrize("damage", ["missing", "a flipped bit", "cut off", "another head", "text"])
def test_a1_a_damaged_or_missing_head_is_a_stated_error(
    quantized_reference: Path,
    plain: PytorchInferenceSession,
    tokens: TokenFile,
    tmp_path: Path,
    damage: str,
) -> None:
    where = shutil.copytree(quantized_reference, tmp_path / "run")
    head = where / "reference" / "head.safetensors"
    data = head.read_bytes()
    if damage == "missing":
        head.unlink()
    elif damage == "a flipped bit":
        head.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    elif damage == "cut off":
        head.write_bytes(data[:1000])
    elif damage == "another head":
        save_file({"weight": torch.zeros(4, 4)}, head)
    else:
        head.write_text("a head")
    with pytest.raises(RunError, match="head"):
        px.evaluate(plain, tokens, reference=where)


def test_a1_a_head_that_does_not_fit_is_refused_with_the_reason(
    model_dir: Path, quantized_reference: Path, tokens: TokenFile, tmp_path: Path
) -> None:
    """As an older Perplexit saved it: no proof, no head, and the record of another precision."""
    where = shutil.copytree(quantized_reference, tmp_path / "run")
    for name in ("reference/reference.json", "run.json"):
        record = json.loads((where / name).read_text())
        saved = record.get("saved_reference", record)
        for key in ("proof", "head_file"):
            saved.pop(key)
        (where / name).write_text(json.dumps(record))
    (where / "reference" / "head.safetensors").unlink()
    # Quantized again in the same way, the head is the same: proven on the window, and right.
    run = px.evaluate(model_dir, tokens, quantization="q4f16_0", reference=where)
    assert largest_kl(run) <= 1e-9
    edit(where / "run.json", lambda record: record["session"].update(quantization=None))
    with pytest.raises(FingerprintMismatchError, match=r"losses differ by .* nats a token"):
        px.evaluate(model_dir, tokens, reference=where)


def test_a1_an_older_reference_is_opened_and_proven(
    model_dir: Path, tokens: TokenFile, tmp_path: Path
) -> None:
    where = saved_reference(model_dir, tokens, tmp_path / "run")
    assert not (where / "reference" / "head.safetensors").exists()
    edit(where / "reference" / "reference.json", lambda record: record.pop("proof"))
    assert largest_kl(px.evaluate(model_dir, tokens, reference=where)) <= 1e-9


def test_a1_sibling_a_head_from_memory_that_rounds_its_inputs_is_refused_when_saving(
    model_dir: Path, tokens: TokenFile, tmp_path: Path
) -> None:
    module = PytorchInferenceSession(model_dir, quantization="8da4w:head").module
    with pytest.raises(CapabilityError, match="--reference MODEL"):
        px.evaluate(
            PytorchInferenceSession(module), tokens, save_reference=True, run=tmp_path / "run"
        )
    assert not (tmp_path / "run" / "reference").exists()


@pytest.mark.real_model
def test_a1_real_model_a_quantized_reference_is_itself_and_stored_is_live(
    real_model_dir: Path, tmp_path: Path
) -> None:
    """SmolLM2-135M in q4f16_0, head and embedding included: rebuilt by fp32's head it gave 0.13."""
    text = (
        "The ferry left at four, and with it the last chance to be home by dark. Nobody on the "
        "quay had thought to ask when the next one was, because there had always been a next one. "
    )
    tokens = px.prepare(
        [text * 2], tokenizer=real_model_dir, max_length=64, output=tmp_path / "in.safetensors"
    )
    quantized = PytorchInferenceSession(real_model_dir, quantization="q4f16_0")
    px.evaluate(quantized, tokens, save_reference=True, run=tmp_path / "q4")
    assert largest_kl(px.evaluate(quantized, tokens, reference=tmp_path / "q4")) <= 1e-6
    plain = PytorchInferenceSession(real_model_dir)
    live = px.evaluate(plain, tokens, reference=quantized).tokens.kl
    quantized.close()
    stored = px.evaluate(plain, tokens, reference=tmp_path / "q4").tokens.kl
    np.testing.assert_allclose(stored, live, atol=1e-5, rtol=1e-4)
    assert stored.mean() > 0.1
    print(f"KL(q4f16_0 ‖ fp32): stored {stored.mean():.6f}, live {live.mean():.6f}")
