"""Measurements are known by their identity: what decides the numbers, and nothing else."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import perplexit as px
from perplexit.errors import FingerprintMismatchError, ResumeError
from perplexit.inputs.token_file import TokenFile
from perplexit.runs.measurement import measurement_differences
from perplexit.runs.run import Run
from tests.tiny_models import save_tiny_model
from tests.unit.test_partial_reference import chunk_logits, write_kl_base

peft = pytest.importorskip("peft")

TEXTS = [f"Document {n}: the ferry left at four, and nobody saw it come back." for n in range(6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("identity")


@pytest.fixture(scope="module")
def model_dir(folder: Path) -> Path:
    return save_tiny_model("llama", folder / "model")


@pytest.fixture(scope="module")
def tokens(model_dir: Path, folder: Path) -> TokenFile:
    return px.prepare(TEXTS, tokenizer=model_dir, max_length=24, output=folder / "in.safetensors")


@pytest.fixture(scope="module")
def adapter_dir(model_dir: Path, folder: Path) -> Path:
    config = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=["q_proj"], task_type="CAUSAL_LM",
        init_lora_weights=False,
    )  # fmt: skip
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    peft.get_peft_model(model, config).save_pretrained(folder / "adapter")
    return folder / "adapter"


# What is changed, one option in turn. Threads, addresses and folders are no part of an identity.
OPTIONS: dict[str, dict[str, Any]] = {
    "dtype": {"dtype": "bfloat16"},
    "quantization": {"quantization": "int8"},
    "quantization, head too": {"quantization": "int8:head"},
    "quantization of weights alone": {"quantization": "q4f16_0"},
    "attention": {"attention": "eager"},
    "cached": {"mode": "cached"},
    "prompt": {"mode": "cached", "prompt_len": 4},
    "decode chunk": {"mode": "cached", "prompt_len": 4, "decode_chunk": 3},
    "non-finite losses": {"on_non_finite": "count"},
    "adapter": {"adapter": "ADAPTER"},
    "merged adapter": {"adapter": "ADAPTER", "merge_adapter": True},
    "rounded activations": {"quantization": "8da4w", "batch_size": 2},
    "rounded activations in another batch": {"quantization": "8da4w", "batch_size": 1},
}


@pytest.fixture(scope="module")
def runs(model_dir: Path, adapter_dir: Path, tokens: TokenFile) -> dict[str, Run]:
    found = {"plain": px.evaluate(model_dir, tokens)}
    for name, options in OPTIONS.items():
        chosen = {k: adapter_dir if v == "ADAPTER" else v for k, v in options.items()}
        found[name] = px.evaluate(model_dir, tokens, **chosen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERPLEXIT_KERNELS", "plain")
        found["kernels"] = px.evaluate(model_dir, tokens)
    return found


def test_a_every_option_that_decides_losses_is_in_the_fingerprint(runs: dict[str, Run]) -> None:
    prints = {name: run.measurement_fingerprint for name, run in runs.items()}
    assert len(set(prints.values())) == len(prints), prints
    for name, run in runs.items():  # a pure function of the record
        again = Run.from_json({**run.to_json(), "measurement_fingerprint": ""})
        assert again.measurement_fingerprint == prints[name], name
        assert run.to_json()["measurement_fingerprint"] == prints[name]
        if name != "plain":
            assert measurement_differences(runs["plain"].measurement, run.measurement), name


def test_a_whatever_a_session_says_of_itself_is_in_the_fingerprint(runs: dict[str, Run]) -> None:
    """Compiled layers and heads, devices, versions: each entry of the record, one in turn."""
    plain = runs["plain"]
    for name in [*plain.session, "compile", "a setting of tomorrow"]:
        session = plain.session | {name: "another"}
        other = replace(plain, session=session, measurement_fingerprint="")
        assert other.measurement_fingerprint != plain.measurement_fingerprint, name
    settings = plain.session["settings"]
    unlike = {"keeps_freed_memory"}
    for name in [*settings, "compile", "modules_by_device", "tensor_parallel"]:
        session = plain.session | {"settings": settings | {name: "another"}}
        other = replace(plain, session=session, measurement_fingerprint="")
        differs = other.measurement_fingerprint != plain.measurement_fingerprint
        assert differs == (name not in unlike), name


def test_a_sibling_what_decides_nothing_is_not_in_the_fingerprint(
    runs: dict[str, Run], model_dir: Path, tokens: TokenFile, folder: Path
) -> None:
    elsewhere = shutil.copytree(model_dir, folder / "elsewhere")
    other = px.evaluate(elsewhere, tokens, threads=2, batch_size=1, top_k=3, confidence=0.9)
    assert other.model["address"] != runs["plain"].model["address"]
    assert other.measurement_fingerprint == runs["plain"].measurement_fingerprint


def test_a_a_run_of_an_older_schema_has_its_fingerprint_when_it_is_opened(
    model_dir: Path, tokens: TokenFile, tmp_path: Path
) -> None:
    run = px.evaluate(model_dir, tokens, run=tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record.pop("measurement_fingerprint") == run.measurement_fingerprint
    (tmp_path / "run" / "run.json").write_text(json.dumps(record | {"schema_version": 1}))
    assert Run.open(tmp_path / "run").measurement_fingerprint == run.measurement_fingerprint


@pytest.fixture(scope="module")
def referred(model_dir: Path, tokens: TokenFile, folder: Path) -> dict[str, Run]:
    """`a` with its states kept, and runs of the same weights that were measured otherwise."""
    a = px.evaluate(model_dir, tokens, save_reference=True, run=folder / "a", top_k=4)
    return {
        "a": a,
        "int8": px.evaluate(model_dir, tokens, quantization="int8"),
        "cached": px.evaluate(model_dir, tokens, mode="cached"),
        "eager": px.evaluate(model_dir, tokens, attention="eager"),
        "count": px.evaluate(model_dir, tokens, on_non_finite="count"),
        "against a": px.evaluate(model_dir, tokens, quantization="int4", reference=folder / "a"),
        "in step": px.evaluate(model_dir, tokens, quantization="int4", reference=str(model_dir)),
    }


def test_a2_kl_against_a_is_not_kl_against_another_run_of_the_same_weights(
    referred: dict[str, Run],
) -> None:
    a, candidate = referred["a"], referred["against a"]
    assert candidate.reference["measurement_fingerprint"] == a.measurement_fingerprint
    assert candidate.reference["input_fingerprint"] == a.input_fingerprint
    assert px.compare(a, candidate).divergences is not None
    comparison = px.compare(referred["int8"], candidate)
    assert comparison.divergences is None
    assert "confidence" not in comparison.buckets
    (warning,) = [text for text in comparison.warnings if "KL" in text]
    assert "quantization" in warning
    assert "int8" in warning
    # Its first choices were held against A's: B's are not known.
    assert comparison.flips is None or not comparison.flips.complete


@pytest.mark.parametrize(
    ("name", "said"),
    [("cached", "mode"), ("eager", "attention"), ("count", "on_non_finite")],
)
@pytest.mark.parametrize("candidate", ["against a", "in step"])
def test_a2_sibling_another_mode_attention_or_rule_is_another_reference(
    referred: dict[str, Run], name: str, said: str, candidate: str
) -> None:
    comparison = px.compare(referred[name], referred[candidate])
    assert comparison.divergences is None
    assert any("KL" in text and said in text for text in comparison.warnings)


def test_a2_sibling_a_reference_in_step_is_the_run_that_was_measured_so(
    referred: dict[str, Run],
) -> None:
    comparison = px.compare(referred["a"], referred["in step"])
    assert comparison.divergences is not None
    stored = px.compare(referred["a"], referred["against a"])
    assert comparison.figures()["mean_kl"].value == pytest.approx(
        stored.figures()["mean_kl"].value, rel=1e-4
    )


def test_a2_sibling_a_top_k_reference_is_known_by_its_measurement(
    referred: dict[str, Run], model_dir: Path, tokens: TokenFile
) -> None:
    top = px.evaluate(model_dir, tokens, top_k=4)
    bounded = px.evaluate(model_dir, tokens, quantization="int4", reference=top)
    assert px.compare(top, bounded).divergences is not None
    assert px.compare(referred["cached"], bounded).divergences is None


def test_a2_sibling_an_older_candidate_does_not_say_whom_it_was_held_against(
    referred: dict[str, Run],
) -> None:
    candidate = referred["against a"]
    kept = ("kind", "address", "weights_fingerprint", "engine", "dtype")
    older = replace(candidate, reference={key: candidate.reference[key] for key in kept})
    comparison = px.compare(referred["a"], older)
    assert comparison.divergences is None
    assert any("older Perplexit" in text for text in comparison.warnings)


def test_a2_sibling_another_protocol_over_the_same_text_has_no_kl(
    referred: dict[str, Run], model_dir: Path, tmp_path: Path
) -> None:
    other = px.prepare(
        TEXTS, tokenizer=model_dir, max_length=24, protocol="disjoint",
        output=tmp_path / "other.safetensors",
    )  # fmt: skip
    with pytest.raises(FingerprintMismatchError, match="over another"):
        px.evaluate(model_dir, other, reference=referred["a"])
    unlike = replace(
        referred["against a"],
        reference={**referred["against a"].reference, "input_fingerprint": "0" * 64},
    )
    assert px.compare(referred["a"], unlike).divergences is None


def test_a4_a_reference_of_another_precision_does_not_resume(
    model_dir: Path, tokens: TokenFile, tmp_path: Path
) -> None:
    session = px.load_session(model_dir, quantization="int8")
    px.evaluate(model_dir, tokens, reference=session, run=tmp_path / "run")
    with pytest.raises(ResumeError, match=r"reference\.measurement\.quantization"):
        px.evaluate(model_dir, tokens, reference=str(model_dir), run=tmp_path / "run")
    again = px.evaluate(model_dir, tokens, reference=session, run=tmp_path / "run")
    assert again.status == "complete"


def test_a4_sibling_a_changed_adapter_does_not_resume(
    model_dir: Path, adapter_dir: Path, tokens: TokenFile, tmp_path: Path
) -> None:
    changed = shutil.copytree(adapter_dir, tmp_path / "adapter")
    px.evaluate(model_dir, tokens, adapter=changed, run=tmp_path / "run")
    config = json.loads((changed / "adapter_config.json").read_text())
    (changed / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 24}))
    with pytest.raises(ResumeError, match="adapter"):
        px.evaluate(model_dir, tokens, adapter=changed, run=tmp_path / "run")


def test_a2_sibling_a_base_file_is_the_recorded_run_of_that_file(
    model_dir: Path, tmp_path: Path
) -> None:
    tokens = px.prepare(
        [" ".join(TEXTS)], tokenizer=model_dir, protocol="llama-cpp", max_length=32,
        output=tmp_path / "in.safetensors",
    )  # fmt: skip
    write_kl_base(tmp_path / "base.kld", 32, *chunk_logits(model_dir, tokens))
    recorded = px.evaluate(f"recorded:{tmp_path / 'base.kld'}", tokens)
    candidate = px.evaluate(model_dir, tokens, reference=tmp_path / "base.kld")
    assert px.compare(recorded, candidate).divergences is not None
    assert px.compare(px.evaluate(model_dir, tokens), candidate).divergences is None


def test_a_sibling_the_unit_of_a_recording_is_in_the_fingerprint(
    model_dir: Path, tokens: TokenFile, tmp_path: Path
) -> None:
    """It may stand in a file beside the recording, whose own hash is the same either way."""
    lines = []
    for index in range(tokens.num_windows):
        ids = tokens.window_ids(index).ids_T.tolist()
        logprobs = [None, *[-1.5] * (len(ids) - 1)]
        lines.append(json.dumps({"window": index, "ids": ids, "logprobs": logprobs}))
    recording = tmp_path / "device.jsonl"
    recording.write_text("\n".join(lines))
    nats = px.evaluate(f"recorded:{recording}", tokens)
    recording.with_name("device.jsonl.json").write_text(json.dumps({"log_base": 2}))
    bits = px.evaluate(f"recorded:{recording}", tokens)
    assert bits.nll_sum < nats.nll_sum
    assert bits.measurement_fingerprint != nats.measurement_fingerprint
