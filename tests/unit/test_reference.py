"""KL from stored hidden states and from two sessions in step, against whole logits in float64."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import rel_entr
from transformers import AutoModelForCausalLM

import perplexit as px
from perplexit.errors import (
    CapabilityError,
    FingerprintMismatchError,
    ResumeError,
    RunError,
    UsageError,
)
from perplexit.inputs.token_file import TokenFile
from perplexit.reference.states import ReferenceStates
from tests.tiny_models import save_tiny_model
from tests.toy_sessions import BigramSession

TEXTS = ["The ferry left at four, and with it the last chance to be home by dark."] * 3 + ["Short."]


@pytest.fixture(scope="module")
def tokens(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenFile:
    output = tmp_path_factory.mktemp("input") / "in.safetensors"
    return px.prepare(TEXTS, tokenizer=tiny_llama_dir, max_length=24, stride=10, output=output)


@pytest.fixture(scope="module")
def noisy_dir(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with noise in one layer."""
    folder = save_tiny_model("llama", tmp_path_factory.mktemp("noisy"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(3)
    with torch.no_grad():
        weight = model.model.layers[1].mlp.down_proj.weight
        weight.add_(torch.randn_like(weight) * 0.05)
    model.save_pretrained(folder)
    return folder


def divergences_by_hand(reference: Path, candidate: Path, tokens: TokenFile) -> dict[str, list]:
    models = [
        AutoModelForCausalLM.from_pretrained(x, dtype=torch.float32).eval()
        for x in (reference, candidate)
    ]
    found: dict[str, list] = {"kl": [], "reverse_kl": [], "same_top1": [], "delta_p": []}
    for index in range(tokens.num_windows):
        window = tokens.window_ids(index)
        ids = torch.tensor([window.ids_T.tolist()])
        with torch.no_grad():
            p, q = (m(ids).logits[0].double().softmax(-1).numpy() for m in models)
        for position in window.targets_N.tolist():
            a, b, target = p[position - 1], q[position - 1], int(window.ids_T[position])
            found["kl"].append(rel_entr(a, b).sum())
            found["reverse_kl"].append(rel_entr(b, a).sum())
            found["same_top1"].append(a.argmax() == b.argmax())
            found["delta_p"].append(b[target] - a[target])
    return found


@pytest.mark.parametrize("kind", ["stored", "stored in memory", "in step"])
def test_kl_is_the_one_from_whole_logits(
    tiny_llama_dir: Path, noisy_dir: Path, tokens: TokenFile, tmp_path: Path, kind: str
) -> None:
    reference: object = f"hf:{tiny_llama_dir}"
    if kind != "in step":
        folder = tmp_path / "reference" if kind == "stored" else None
        reference = px.evaluate(reference, tokens, save_reference=True, run=folder)
        assert reference.saved_reference["self_kl_max"] <= 1e-9
    if kind == "stored":
        reference = tmp_path / "reference"
    run = px.evaluate(noisy_dir, tokens, reference=reference, run=tmp_path / "run", top_k=2)
    expected = divergences_by_hand(tiny_llama_dir, noisy_dir, tokens)
    rows = px.Run.open(tmp_path / "run").tokens
    np.testing.assert_allclose(rows.kl, expected["kl"], atol=1e-5)
    assert np.mean(expected["kl"]) > 1e-4  # there is something to measure
    np.testing.assert_allclose(rows.reverse_kl, expected["reverse_kl"], atol=1e-5)
    np.testing.assert_array_equal(rows.same_top1, expected["same_top1"])
    np.testing.assert_allclose(rows.delta_p, expected["delta_p"], atol=1e-5)
    plain = px.evaluate(noisy_dir, tokens)
    np.testing.assert_allclose(run.tokens.nll, plain.tokens.nll, atol=1e-5)
    assert run.reference["weights_fingerprint"] != run.model["weights_fingerprint"]


@pytest.mark.trap(16)
def test_trap_16_the_floor_of_the_storage_is_measured_and_reported(
    tiny_llama_dir: Path, tokens: TokenFile, tmp_path: Path
) -> None:
    for dtype, low, high in (("float32", 0.0, 1e-9), ("float16", 1e-12, 1e-4)):
        folder = tmp_path / dtype
        saved = px.evaluate(
            tiny_llama_dir, tokens, save_reference=True, reference_dtype=dtype, run=folder
        )
        assert low <= saved.saved_reference["self_kl_mean"] <= high
        again = px.evaluate(tiny_llama_dir, tokens, reference=folder)
        assert low <= again.tokens.kl.mean() <= high
        assert again.tokens.same_top1.mean() > 0.99
        assert ReferenceStates(folder).windows == set(range(tokens.num_windows))


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("float16", 2)])
def test_a_reference_is_its_states_and_nothing_like_its_logits(
    tiny_llama_dir: Path, tokens: TokenFile, tmp_path: Path, dtype: str, width: int
) -> None:
    """Bytes a token are the hidden size's: of 576 against 49,152 logits, 1/43 and 1/85 of fp16."""
    saved = px.evaluate(
        tiny_llama_dir, tokens, save_reference=True, reference_dtype=dtype, run=tmp_path / "run"
    )
    hidden_size = json.loads((tiny_llama_dir / "config.json").read_text())["hidden_size"]
    files = [x for x in (tmp_path / "run" / "reference").rglob("*") if x.is_file()]
    assert not [x for x in files if "head" in x.name]  # kept by fingerprint
    stored = sum(x.stat().st_size for x in files)
    payload = saved.num_tokens * hidden_size * width
    assert payload <= stored <= payload + 4096 * len(files)


@pytest.mark.trap(18)
def test_what_cannot_be_compared_is_refused(
    tiny_llama_dir: Path, tokens: TokenFile, tmp_path: Path
) -> None:
    reference = tmp_path / "reference"
    px.evaluate(tiny_llama_dir, tokens, save_reference=True, run=reference)
    with pytest.raises(UsageError, match="both were asked for"):
        px.evaluate(tiny_llama_dir, tokens, save_reference=True, reference=reference)
    with pytest.raises(CapabilityError, match="whole distributions"):
        px.evaluate(BigramSession(vocab_size=320), tokens, reference=reference)
    with pytest.raises(CapabilityError, match="final hidden states"):
        px.evaluate(BigramSession(vocab_size=320), tokens, save_reference=True)
    px.evaluate(tiny_llama_dir, tokens, run=tmp_path / "plain")
    with pytest.raises(RunError, match="save-reference"):
        px.evaluate(tiny_llama_dir, tokens, reference=tmp_path / "plain")
    other = px.prepare(
        ["Another text."], tokenizer=tiny_llama_dir, output=tmp_path / "other.safetensors"
    )
    with pytest.raises(FingerprintMismatchError, match="another"):
        px.evaluate(tiny_llama_dir, other, reference=reference)
    with pytest.raises(ResumeError, match="reference"):
        px.evaluate(tiny_llama_dir, tokens, reference=reference, run=tmp_path / "plain")


def test_a_flipped_bit_in_the_states_is_an_error(
    tiny_llama_dir: Path, tokens: TokenFile, tmp_path: Path
) -> None:
    px.evaluate(tiny_llama_dir, tokens, save_reference=True, run=tmp_path / "reference")
    path = next((tmp_path / "reference" / "reference").glob("states-*"))
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(bytes(data))
    with pytest.raises(RunError, match="damaged"):
        px.evaluate(tiny_llama_dir, tokens, reference=tmp_path / "reference")
