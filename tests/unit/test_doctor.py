"""The doctor finds each planted fault by its name and nothing else, and passes healthy models."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

import perplexit as px
from perplexit.cli.app import app
from perplexit.diagnosis import Diagnosis
from perplexit.diagnosis.doctor_checks import CHECKS
from perplexit.diagnosis.doctor_probe import packaged_text
from perplexit.errors import UsageError
from perplexit.inputs.token_file import TokenFile
from perplexit.inputs.windows import WindowIds
from perplexit.sessions.pytorch import PytorchInferenceSession
from tests.contract import without_weights
from tests.tiny_models import _SIZES, BOS, EOS, VOCAB_SIZE, byte_tokenizer
from tests.unseen_text import DOCUMENTS


@pytest.fixture(scope="module")
def trained_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that has learned a little English (three seconds), with its tokenizer."""
    ids = torch.tensor(byte_tokenizer().encode("\n\n".join(DOCUMENTS)).ids)
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**(_SIZES | {"initializer_range": 0.05})))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(80):
        starts = torch.randint(len(ids) - 256, (4,), generator=generator)
        batch = torch.stack([ids[start : start + 256] for start in starts])
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("trained")
    model.save_pretrained(folder)
    saved_tokenizer(folder, byte_tokenizer())
    return folder


def saved_tokenizer(folder: Path, tokenizer: Tokenizer) -> Path:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)
    fast.save_pretrained(folder)
    return folder


def adding(*prefix: str) -> Tokenizer:
    """The byte tokenizer with a template that puts `prefix` before a text."""
    tokenizer = byte_tokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single=" ".join([*prefix, "$A"]), special_tokens=[(BOS, 0)]
    )
    return tokenizer


def letters() -> Tokenizer:
    """Another model's tokenizer: the same size, the ids of the merges in another order."""
    content = json.loads(byte_tokenizer().to_str())
    vocab = content["model"]["vocab"]
    order = np.random.default_rng(0).permutation(np.arange(2, VOCAB_SIZE))
    content["model"]["vocab"] = {
        token: index if index < 2 else int(order[index - 2]) for token, index in vocab.items()
    }
    return Tokenizer.from_str(json.dumps(content))


def prepared(folder: Path, tokenizer: object, **options: object) -> TokenFile:
    return px.prepare(
        ["\n\n".join(DOCUMENTS)],
        tokenizer=tokenizer,
        output=folder / "in.safetensors",
        **({"max_length": 256} | options),
    )


def loaded(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder)


# --- the planted faults ------------------------------------------------------------------------


def bos_twice(folder: Path, tmp_path: Path) -> Diagnosis:
    return px.doctor(folder, tokenizer=adding(BOS, BOS))


def bos_twice_in_the_input(folder: Path, tmp_path: Path) -> Diagnosis:
    tokens = px.prepare([BOS * 2 + DOCUMENTS[0]], tokenizer=folder, max_length=128)
    return px.doctor(folder, tokens)


def bos_missing(folder: Path, tmp_path: Path) -> Diagnosis:
    tokenizer = adding(BOS)
    return px.doctor(folder, prepared(tmp_path, tokenizer, bos="none"), tokenizer=tokenizer)


def bos_missed_by_the_model(folder: Path, tmp_path: Path) -> Diagnosis:
    """Nothing says that the model wants a BOS, but without one it knows nothing."""
    model = loaded(folder)

    def blind(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return torch.where((args[0][:, :1] == 0)[..., None], output, output.flip(-1))

    model.model.embed_tokens.register_forward_hook(blind)
    return px.doctor(PytorchInferenceSession(model), tokenizer=folder)


def tokenizer_of_another_model(folder: Path, tmp_path: Path) -> Diagnosis:
    return px.doctor(folder, prepared(tmp_path, letters()))


def padding_attended(folder: Path, tmp_path: Path) -> Diagnosis:
    class PadsLeft(PytorchInferenceSession):
        def token_nll(self, windows):
            longest = max(len(window.ids_T) for window in windows)
            padded = []
            for window in windows:
                pad = longest - len(window.ids_T)
                ids_T = np.concatenate((np.full(pad, 1, np.int32), window.ids_T))
                padded.append(WindowIds(window.index, ids_T, window.targets_N + pad))
            return super().token_nll(padded)

    return px.doctor(PadsLeft(folder))


def batch_shared(folder: Path, tmp_path: Path) -> Diagnosis:
    """As with activation scales taken over the whole batch."""

    class Coupled(PytorchInferenceSession):
        def token_nll(self, windows):
            return [nll_N * (1 + 0.01 * (len(windows) - 1)) for nll_N in super().token_nll(windows)]

    return px.doctor(Coupled(folder))


def dropout_left_on(folder: Path, tmp_path: Path) -> Diagnosis:
    model = loaded(folder)
    session = PytorchInferenceSession(model)
    model.model.embed_tokens.register_forward_hook(
        lambda module, args, output: functional.dropout(output, 0.1, training=True)
    )
    return px.doctor(session, tokenizer=folder)


def nan_at_a_position(folder: Path, tmp_path: Path) -> Diagnosis:
    model = loaded(folder)
    session = PytorchInferenceSession(model)

    def poison(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, 150:151] = torch.nan
        return output

    model.model.norm.register_forward_hook(poison)
    return px.doctor(session, tokenizer=folder)


def truncated_prefix_cache(folder: Path, tmp_path: Path) -> Diagnosis:
    """A second request gives losses from where its prefix left the cache."""

    class Remembers(PytorchInferenceSession):
        seen: ClassVar[set[bytes]] = set()

        def token_nll(self, windows):
            results = []
            for window, nll_N in zip(windows, super().token_nll(windows), strict=True):
                known = window.ids_T.tobytes() in self.seen
                self.seen.add(window.ids_T.tobytes())
                results.append(nll_N[-1:] if known else nll_N)
            return results

    return px.doctor(Remembers(folder))


def stale_prefix_cache(folder: Path, tmp_path: Path) -> Diagnosis:
    """A second request has all its losses, but those of a rounded cache."""

    class Rounds(PytorchInferenceSession):
        seen: ClassVar[set[bytes]] = set()

        def token_nll(self, windows):
            results = []
            for window, nll_N in zip(windows, super().token_nll(windows), strict=True):
                known = window.ids_T.tobytes() in self.seen
                self.seen.add(window.ids_T.tobytes())
                results.append(nll_N.round(1) if known else nll_N)
            return results

    return px.doctor(Rounds(folder))


def vocabulary_mismatch(folder: Path, tmp_path: Path) -> Diagnosis:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<extra 1>", "<extra 2>"])
    return px.doctor(folder, tokenizer=tokenizer)


def attention_broken_beyond_a_length(folder: Path, tmp_path: Path) -> Diagnosis:
    model = loaded(folder)
    session = PytorchInferenceSession(model)

    def broken(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, 160:] = output[:, 160:].flip(-1)
        return output

    model.model.norm.register_forward_hook(broken)
    return px.doctor(session, tokenizer=folder)


def masked_token(folder: Path, tmp_path: Path) -> Diagnosis:
    """The logit of the end of text, used as padding, is pushed down."""
    model = loaded(folder)

    def mask(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[..., 1] = -1e9
        return output

    model.lm_head.register_forward_hook(mask)
    return px.doctor(PytorchInferenceSession(model), tokenizer=folder)


def scored_off_by_one(folder: Path, tmp_path: Path) -> Diagnosis:
    """Logits of position i against id i + 2, as the first seed's ONNX path did."""
    model = loaded(folder)

    class Shifted(PytorchInferenceSession):
        def token_nll(self, windows):
            results = []
            for window in windows:
                ids_T = torch.from_numpy(window.ids_T.astype(np.int64))
                with torch.no_grad():
                    logprobs_TV = self.module(ids_T[None]).logits[0].log_softmax(-1)
                wrong_T = torch.cat((ids_T[2:], ids_T[-1:]))
                nll_T = -logprobs_TV[:-1].gather(1, wrong_T[:, None])[:, 0]
                results.append(nll_T.numpy()[window.targets_N - 1])
            return results

    return px.doctor(Shifted(model), tokenizer=folder)


def late_positions(model: torch.nn.Module) -> None:
    """Decoded ids are put one position late, as by a cache that counts from 1."""

    def late(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if int(kwargs["position_ids"].min()) > 0:
            kwargs = kwargs | {"position_ids": kwargs["position_ids"] + 1}
        return args, kwargs

    model.model.rotary_emb.register_forward_pre_hook(late, with_kwargs=True)


def cache_off_by_one(folder: Path, tmp_path: Path) -> Diagnosis:
    """It goes wrong where the engine's own probe of its cache does not see it."""

    class Unprobed(PytorchInferenceSession):
        def open_cache(self, windows):
            cache = super().open_cache(windows)
            if not self.module.model.rotary_emb._forward_pre_hooks:
                late_positions(self.module)
            return cache

    return px.doctor(Unprobed(loaded(folder)), tokenizer=folder)


def cache_off_by_one_throughout(folder: Path, tmp_path: Path) -> Diagnosis:
    model = loaded(folder)
    late_positions(model)
    return px.doctor(PytorchInferenceSession(model), tokenizer=folder)


def weights_that_fit_no_tokenizer(folder: Path, tmp_path: Path) -> Diagnosis:
    """The model's folder itself holds another model's tokenizer."""
    loaded(folder).save_pretrained(tmp_path)
    return px.doctor(saved_tokenizer(tmp_path, letters()))


FAULTS: list[tuple[Callable[[Path, Path], Diagnosis], str, str]] = [
    (bos_twice, "bos", r"1 of 1 windows begin with the BOS \(id 0\) twice"),
    (bos_twice_in_the_input, "bos", "windows begin with the BOS"),
    (bos_missing, "bos", "no window begins with it"),
    (bos_missed_by_the_model, "bos", r"without one the same tokens cost \+1"),
    (tokenizer_of_another_model, "tokenizer", "prepared with another tokenizer: document 0: id"),
    (padding_attended, "padding", "alone and padded differ by up to"),
    (batch_shared, "batch", "together and in reverse differ"),
    (dropout_left_on, "dropout", "differ by up to"),
    (nan_at_a_position, "finite", "the first is nan at position 151"),
    (truncated_prefix_cache, "prefix cache", "second identical request gives 4 of"),
    (stale_prefix_cache, "prefix cache", "the third repeats the second"),
    (vocabulary_mismatch, "vocabulary", "the tokenizer has 322 ids .* the model 320 rows"),
    (attention_broken_beyond_a_length, "position", "long context makes the text harder"),
    (
        masked_token,
        "probabilities",
        "1 of 320 ids can never be predicted, as their logits are masked: 1",
    ),
    (scored_off_by_one, "alignment", "changes earlier losses by up to"),
    (cache_off_by_one, "decode", "differ from the whole forward pass by up to .* position 2 on"),
    (cache_off_by_one_throughout, "decode", "differ by"),
    (weights_that_fit_no_tokenizer, "level", "with its ids shuffled"),
]


@pytest.mark.trap(3)
@pytest.mark.trap(9)
@pytest.mark.trap(18)
@pytest.mark.trap(19)
@pytest.mark.trap(20)
@pytest.mark.trap(22)
@pytest.mark.trap(25)
@pytest.mark.trap(27)
@pytest.mark.parametrize(("plant", "name", "says"), FAULTS, ids=lambda x: getattr(x, "__name__", x))
def test_a_planted_fault_is_found_by_its_name_and_nothing_else_fails(
    trained_dir: Path,
    tmp_path: Path,
    plant: Callable[[Path, Path], Diagnosis],
    name: str,
    says: str,
) -> None:
    diagnosis = plant(trained_dir, tmp_path)
    assert diagnosis.named("fail") == (name,), str(diagnosis)
    assert diagnosis.status == "fail"
    finding = diagnosis[name]
    assert re.search(says, finding.sentence), finding
    assert finding.advice
    assert f"failed: {name}" in str(diagnosis)


def test_a_jump_is_placed_where_it_is(trained_dir: Path, tmp_path: Path) -> None:
    sentence = attention_broken_beyond_a_length(trained_dir, tmp_path)["position"].sentence
    place = int(sentence.partition("position ")[2].partition(" ")[0])
    assert 96 <= place <= 192


# --- the healthy -------------------------------------------------------------------------------


def assert_healthy(diagnosis: Diagnosis) -> None:
    assert diagnosis.named("fail") == (), str(diagnosis)
    assert diagnosis.max_length >= 64
    for name in ("vocabulary", "finite", "prefix cache", "dropout", "determinism", "alignment"):
        assert diagnosis[name].status == "pass", str(diagnosis)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "cohere", "granite"])
def test_healthy_tiny_models_pass(name: str, request: pytest.FixtureRequest) -> None:
    diagnosis = px.doctor(request.getfixturevalue(f"tiny_{name}_dir"))
    assert_healthy(diagnosis)
    for check in ("batch", "padding", "decode", "probabilities", "bos", "position"):
        assert diagnosis[check].status == "pass", str(diagnosis)
    assert diagnosis["level"].status == "warn"  # random weights predict nothing
    assert "untrained" in diagnosis["level"].sentence


def test_a_healthy_trained_model_passes_everything(trained_dir: Path, tmp_path: Path) -> None:
    diagnosis = px.doctor(trained_dir, prepared(tmp_path, trained_dir))
    assert diagnosis.status == "pass", str(diagnosis)
    assert diagnosis.named("skipped") == (), str(diagnosis)
    assert diagnosis.input_fingerprint is not None


def test_a_healthy_onnx_program_passes(trained_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    for perplexity in (True, False):
        folder = tmp_path / f"program-{perplexity}"
        px.compile(trained_dir, to="onnx", output=folder, perplexity=perplexity)
        diagnosis = px.doctor(folder)  # the tokenizer is the checkpoint's
        assert_healthy(diagnosis)
        for check in ("batch", "padding", "probabilities", "level", "position"):
            assert diagnosis[check].status == "pass", str(diagnosis)


def test_programs_of_fixed_shapes_are_asked_for_what_they_take(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    px.compile(tiny_llama_dir, to="onnx", output=tmp_path / "p", max_length=64, batch_size=2)
    diagnosis = px.doctor(tmp_path / "p")
    assert_healthy(diagnosis)
    assert diagnosis.max_length == 64
    assert diagnosis["position"].status == "skipped"


def test_a_healthy_gguf_passes_and_its_own_tokenizer_is_compared(
    trained_dir: Path, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    px.compile(trained_dir, to="gguf", output=tmp_path / "g", perplexity=False)
    diagnosis = px.doctor(f"gguf:{tmp_path / 'g'}", tokenizer=trained_dir)
    assert_healthy(diagnosis)
    assert "engine's own tokenizer gives the same ids" in diagnosis["tokenizer"].sentence
    other = px.doctor(f"gguf:{tmp_path / 'g'}", tokenizer=letters())
    assert other.named("fail") == ("tokenizer",), str(other)
    assert "engine's own tokenizer gives other ids" in other["tokenizer"].sentence


def test_a_healthy_n_gram_model_passes(tiny_llama_dir: Path) -> None:
    pytest.importorskip("kenlm")
    session = without_weights.ngram(tiny_llama_dir)
    diagnosis = px.doctor(session, tokenizer=byte_tokenizer())
    session.close()
    assert diagnosis.named("fail") == (), str(diagnosis)
    for name in ("finite", "dropout", "batch", "padding", "alignment", "position"):
        assert diagnosis[name].status == "pass", str(diagnosis)
    assert diagnosis["vocabulary"].status == "skipped"


def test_a_healthy_server_passes(tiny_llama_dir: Path) -> None:
    pytest.importorskip("httpx2")
    session = without_weights.completions(tiny_llama_dir)
    diagnosis = px.doctor(session, tokenizer=byte_tokenizer(), max_length=64)
    session.close()
    assert diagnosis["finite"].status == "pass", str(diagnosis)
    assert diagnosis["vocabulary"].status == "skipped"
    # the test server spells the id 7 "t7": another vocabulary than the tokenizer's
    assert diagnosis.named("fail") == ("tokenizer",), str(diagnosis)
    assert "the engine spells id" in diagnosis["tokenizer"].sentence


@pytest.mark.real_model
@pytest.mark.slow
def test_the_real_model_passes(real_model_dir: Path) -> None:
    diagnosis = px.doctor(real_model_dir)
    assert diagnosis.status == "pass", str(diagnosis)
    assert diagnosis.max_length == 1024
    assert diagnosis.named("skipped") == ("tokenizer",)
    assert diagnosis["level"].figure > 2


# --- what the doctor promises besides ----------------------------------------------------------


def test_what_rests_on_a_failure_is_skipped_and_says_so(trained_dir: Path, tmp_path: Path) -> None:
    diagnosis = nan_at_a_position(trained_dir, tmp_path)
    assert diagnosis["level"].status == "skipped"
    assert diagnosis["level"].sentence == "tells nothing while 'finite' fails"
    assert [finding.check for finding in diagnosis.findings] == [check.name for check in CHECKS]


def test_an_error_of_the_engine_is_a_finding(trained_dir: Path) -> None:
    class Short(PytorchInferenceSession):
        def token_nll(self, windows):
            results = super().token_nll(windows)
            return results if len(windows) == 1 else [nll_N[:-1] for nll_N in results]

    diagnosis = px.doctor(Short(trained_dir))
    assert diagnosis.named("fail") == ("batch",)
    assert "losses per window as before" in diagnosis["batch"].sentence


def test_a_lower_precision_warns_and_passes_with_wider_limits(trained_dir: Path) -> None:
    diagnosis = px.doctor(trained_dir, dtype="bf16")
    assert diagnosis.named("fail") == (), str(diagnosis)
    assert diagnosis["dtype"].status == "pass"  # asked for
    assert diagnosis["padding"].limit == 0.5
    session = PytorchInferenceSession(trained_dir, dtype="bf16")  # not asked for by the doctor
    assert px.doctor(session)["dtype"].status == "warn"


def test_a_precision_that_is_not_in_effect_fails(trained_dir: Path, monkeypatch) -> None:
    monkeypatch.setattr(
        "perplexit.sessions.registry.load_session",
        lambda model, **_: PytorchInferenceSession(model, dtype="bf16"),
    )
    diagnosis = px.doctor(trained_dir, dtype="float32")
    assert diagnosis.named("fail") == ("dtype",), str(diagnosis)
    diagnosis = px.doctor(trained_dir, quantization="int8")
    assert diagnosis.named("fail") == ("dtype",), str(diagnosis)


def test_windows_longer_than_the_model_was_made_for_warn(tiny_llama_dir: Path) -> None:
    text = ["\n\n".join(DOCUMENTS)]
    tokens = px.prepare(text, tokenizer=tiny_llama_dir, max_length=400)
    finding = px.doctor(tiny_llama_dir, tokens)["window length"]
    assert (finding.status, finding.figure, finding.limit) == ("warn", 400, 256)


def test_rows_without_a_token_are_named(trained_dir: Path) -> None:
    model = loaded(trained_dir)
    model.resize_token_embeddings(VOCAB_SIZE + 8, mean_resizing=False)
    diagnosis = px.doctor(PytorchInferenceSession(model), tokenizer=trained_dir)
    assert diagnosis["vocabulary"].status == "pass"
    assert "rows 320 to 327 (8) have no token" in diagnosis["vocabulary"].sentence


def test_a_recording_is_held_against_its_input(tiny_llama_dir: Path, tmp_path: Path) -> None:
    tokens = prepared(tmp_path, tiny_llama_dir)
    session = PytorchInferenceSession(tiny_llama_dir)
    lines = []
    for row in range(tokens.num_windows):
        window = tokens.window_ids(row)
        logprobs: list[float | None] = [None] * len(window.ids_T)
        for target, nll in zip(window.targets_N, session.token_nll([window])[0], strict=True):
            logprobs[target] = -float(nll)
        lines.append(
            json.dumps({"window": row, "ids": window.ids_T.tolist(), "logprobs": logprobs})
        )
    path = tmp_path / "recording.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    diagnosis = px.doctor(f"recorded:{path}", tokens)
    assert diagnosis.named("fail") == ()
    assert diagnosis["finite"].status == "pass"
    assert diagnosis["dropout"].sentence == "a recording computes nothing"


def test_without_a_tokenizer_or_an_input_there_is_nothing_to_examine_with(
    tiny_llama_dir: Path,
) -> None:
    session = PytorchInferenceSession(loaded(tiny_llama_dir))
    with pytest.raises(UsageError, match="--tokenizer"):
        px.doctor(session)


def test_options_of_loading_are_refused_for_an_open_session(tiny_llama_dir: Path) -> None:
    session = PytorchInferenceSession(tiny_llama_dir)
    with pytest.raises(UsageError, match="load_session"):
        px.doctor(session, dtype="bf16")
    with pytest.raises(UsageError, match="max_length"):
        px.doctor(session, max_length=1)
    assert px.doctor(session, max_length=100).max_length == 100  # and it stays open


def test_the_progress_names_every_check(tiny_llama_dir: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    px.doctor(tiny_llama_dir, progress=lambda *update: seen.append(update))
    assert [name for name, _, _ in seen] == [check.name for check in CHECKS]
    assert {total for _, _, total in seen} == {len(CHECKS)}


def test_every_check_needs_only_earlier_ones() -> None:
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    for number, check in enumerate(CHECKS):
        assert set(check.needs) <= set(names[:number])


def test_the_packaged_text_fills_the_longest_window() -> None:
    assert 10_000 < len(packaged_text()) < 20_000


def test_the_command_prints_findings_and_exits_with_1_on_a_failure(
    trained_dir: Path, tmp_path: Path
) -> None:
    prepared(tmp_path, letters())
    command = ["doctor", str(trained_dir), str(tmp_path / "in.safetensors")]
    bad = CliRunner().invoke(app, command)
    assert bad.exit_code == 1
    assert "failed: tokenizer" in bad.stderr
    assert bad.stdout == ""
    as_json = CliRunner().invoke(app, [*command, "--json"])
    assert as_json.exit_code == 1
    assert "failed: tokenizer" in as_json.stderr
    record = json.loads(as_json.stdout)
    assert record["status"] == "fail"
    assert record["counts"]["fail"] == 1
    finding = next(entry for entry in record["findings"] if entry["check"] == "tokenizer")
    assert set(finding) == {"check", "status", "sentence", "figure", "limit", "advice"}
    good = CliRunner().invoke(app, ["doctor", str(trained_dir)])
    assert (good.exit_code, good.stdout) == (0, "")
    assert "no check failed" in good.stderr
