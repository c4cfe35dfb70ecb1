"""explain: planted differences are named, and their contributions add up to the whole."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner

import perplexit as px
from perplexit.cli.app import app
from perplexit.diagnosis import Explanation
from perplexit.diagnosis.input_steps import first_difference, rewindowed, text_aspects
from perplexit.errors import FingerprintMismatchError
from perplexit.inputs.token_file import TokenFile
from perplexit.runs.run import Run
from tests.toy_sessions import BigramSession
from tests.unseen_text import DOCUMENTS

TEXTS = list(DOCUMENTS[1:4])
Measure = Callable[..., Run]


@pytest.fixture(scope="module")
def letters_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer without a merge, whose ids the tiny models have too."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|bos|>": 0} | {letter: 1 + index for index, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|bos|>"])
    path = tmp_path_factory.mktemp("letters") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def measure(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Measure:
    """A stored run of the tiny Llama (or `model`) over texts under the options given."""
    made: dict[str, Run] = {}
    alive: list[object] = []  # a session is known by its address, which no other may have later

    def run(
        texts: object = TEXTS,
        *,
        model: object = tiny_llama_dir,
        dtype: str | None = None,
        **options,
    ) -> Run:
        key = repr((texts, model, dtype, sorted(options.items(), key=str)))
        if key not in made:
            folder = tmp_path_factory.mktemp("run")
            options = {"tokenizer": tiny_llama_dir, "max_length": 64, "stride": 32} | options
            options = {name: value for name, value in options.items() if value != "default"}
            tokens = px.prepare(texts, output=folder / "in.safetensors", **options)
            alive.append(model)
            made[key] = px.evaluate(
                model, tokens, dtype=dtype, run=folder / "run", other_tokenizer=True
            )
        return made[key]

    return run


def adds_up(explanation: Explanation, first: Run, second: Run) -> None:
    assert explanation.total_nats == pytest.approx(
        math.log(second.perplexity / first.perplexity), abs=1e-9
    )
    assert sum(step.nats for step in explanation.steps) == pytest.approx(
        explanation.total_nats, abs=1e-12
    )
    assert explanation.steps[0].perplexity_before == pytest.approx(first.perplexity)
    assert explanation.steps[-1].perplexity_after == pytest.approx(second.perplexity)


# --- the planted differences, one at a time ----------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"bos": "first"}, {"bos"}),
        ({"stride": 16}, {"stride"}),
        ({"dtype": "bfloat16"}, {"dtype"}),
        ({"max_length": 48}, {"max_length"}),
        ({"texts": [text.replace("\n", "\r\n") for text in TEXTS]}, {"newlines"}),
        ({"texts": [*TEXTS[:2], TEXTS[2].replace("balance", "ballast")]}, {"text"}),
    ],
    ids=["bos", "stride", "dtype", "max_length", "newline", "text"],
)
def test_one_planted_difference_is_named_and_nothing_else(
    measure: Measure, options: dict[str, object], expected: set[str]
) -> None:
    options = dict(options)
    first, second = measure(), measure(options.pop("texts", TEXTS), **options)
    found = px.explain(first, second)
    assert set(found.aspects) == expected
    assert len(found.steps) == 1  # the two runs are its ends: nothing to measure
    assert set(found.steps[0].aspects) == expected
    assert found.notes == ()
    adds_up(found, first, second)


def test_a_planted_tail_is_named(measure: Measure) -> None:
    """vLLM's chunks keep the tail, the GPTQ papers' drop it."""
    text = ["\n\n".join(DOCUMENTS)]
    options = {"max_length": 2048, "stride": "default"}
    kept = measure(text, protocol="vllm", **options)
    dropped = measure(text, protocol="gptq-2048", **options)
    found = px.explain(kept, dropped)
    assert set(found.aspects) == {"protocol", "tail"}
    number = kept.num_tokens - dropped.num_tokens
    sentence = next(d.sentence for d in found.differences if d.aspect == "tail")
    assert sentence == f"tokens at documents' ends that one run alone scores: {number} and 0"
    adds_up(found, kept, dropped)


@pytest.mark.trap(8)
@pytest.mark.trap(13)
def test_a_planted_denominator_is_named(measure: Measure, tmp_path: Path) -> None:
    """The same text and windows, but only the answers' tokens are scored and divided by."""
    corpus = tmp_path / "answers.jsonl"
    rows = [{"prompt": text[:40], "text": text[40:]} for text in TEXTS]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    first, second = measure(), measure(corpus, prompt_key="prompt")
    assert first.text_fingerprint == second.text_fingerprint
    found = px.explain(first, second)
    assert found.aspects == ("denominator",)
    assert f"divided by {first.num_tokens:,} and {second.num_tokens:,}" in str(found)
    adds_up(found, first, second)


def test_a_tools_own_average_is_a_denominator_of_its_own(measure: Measure) -> None:
    options = {"max_length": 512, "stride": "default", "bos": "first"}
    plain = measure(protocol="document", **options)
    tools = measure(protocol="hf-evaluate", **options)
    found = px.explain(plain, tools)
    assert set(found.aspects) == {"protocol", "denominator"}
    assert "the mean of the windows' perplexities" in str(found)
    assert found.total_nats == 0.0  # `perplexity` is the same; `protocol_perplexity` is not
    assert tools.protocol_perplexity != pytest.approx(tools.perplexity)


def test_a_planted_tokenizer_is_named(measure: Measure, letters_json: Path) -> None:
    first, second = measure(), measure(tokenizer=letters_json)
    found = px.explain(first, second)
    assert found.aspects == ("tokenizer",)
    assert "not comparable" in found.notes[0]
    assert found.steps[0].bits_per_byte_after == pytest.approx(second.bits_per_byte)
    adds_up(found, first, second)


def test_a_planted_engine_is_named(
    measure: Measure, tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pytest.importorskip("onnxruntime")
    program = tmp_path_factory.mktemp("program") / "onnx"
    px.compile(tiny_llama_dir, to="onnx", output=program)
    first, second = measure(), measure(model=program)
    found = px.explain(first, second)
    assert "engine" in found.aspects
    assert not {"text", "tokenizer", "bos", "stride", "dtype", "denominator"} & set(found.aspects)
    assert abs(found.total_nats) < 1e-4
    adds_up(found, first, second)


def test_runs_under_the_same_conditions_differ_in_nothing(measure: Measure) -> None:
    first = measure()
    found = px.explain(first.folder, first)
    assert found.differences == ()
    assert found.total_nats == 0.0
    assert "nothing differs" in str(found)


# --- several at once: each step against its own evaluation --------------------------------------


def test_each_contribution_is_what_an_evaluation_of_its_own_gives(measure: Measure) -> None:
    first = measure()
    second = measure(
        [text.replace("\n", "\r\n") for text in TEXTS], bos="first", stride=8, dtype="bfloat16"
    )
    found = px.explain(first, second)
    assert [step.aspects for step in found.steps] == [
        ("newlines",),
        ("bos",),
        ("stride",),
        ("dtype",),
    ]
    windows = [text.replace("\n", "\r\n") for text in TEXTS]
    between = [measure(windows), measure(windows, bos="first")]
    between.append(measure(windows, bos="first", stride=8))
    for step, run in zip(found.steps, between, strict=False):
        assert step.perplexity_after == pytest.approx(run.perplexity, rel=1e-6)
        assert step.num_tokens_after == run.num_tokens
    assert all(step.nats != 0 for step in found.steps)
    adds_up(found, first, second)
    backwards = px.explain(second, first)
    assert backwards.total_nats == pytest.approx(-found.total_nats)
    adds_up(backwards, second, first)


def test_other_protocols_are_walked_through_their_settings(measure: Measure) -> None:
    first = measure(["\n\n".join(TEXTS)], bos="first", max_length=80, stride=40)
    second = measure(["\n\n".join(TEXTS)], protocol="llama-cpp", max_length=32, stride="default")
    found = px.explain(first, second)
    assert {"bos", "max_length", "protocol", "stride", "tail", "denominator"} == set(found.aspects)
    assert len(found.steps) >= 2
    adds_up(found, first, second)


def test_without_the_model_the_whole_is_one_step_and_the_reason_is_told(measure: Measure) -> None:
    first, second = (
        measure(model=BigramSession()),
        measure(model=BigramSession(), bos="first", stride=8),
    )
    alone = px.explain(first, second)
    assert [step.aspects for step in alone.steps] == [("bos", "stride")]
    assert "toy:bigram is not at hand" in alone.notes[0]
    adds_up(alone, first, second)
    session = BigramSession()
    told = px.explain(first, second, model=session)
    assert [step.aspects for step in told.steps] == [("bos",), ("stride",)]
    assert told.steps[1].nats == pytest.approx(0.0, abs=1e-9)  # a bigram needs no more context
    assert not session.closed
    adds_up(told, first, second)
    wrong = px.explain(first, second, model=BigramSession(seed=3))
    assert len(wrong.steps) == 1
    assert "has weights 'w3', not 'w0'" in wrong.notes[0]


def test_with_the_second_model_alone_the_session_is_turned_first(measure: Measure) -> None:
    first = measure(model=BigramSession(seed=1))
    second = measure(model=BigramSession(), bos="first")
    found = px.explain(first, second, model=BigramSession())
    assert [step.aspects for step in found.steps] == [("weights",), ("bos",)]
    adds_up(found, first, second)


def test_what_is_no_longer_there_is_not_guessed_at(measure: Measure, tmp_path: Path) -> None:
    first, second = measure(model=BigramSession()), measure(model=BigramSession(), stride=8)
    texts = ["Gone. " + text for text in TEXTS]
    gone = measure(texts, model=BigramSession(), stride=8)
    moved = tmp_path / "elsewhere.safetensors"
    Path(gone.input_path).rename(moved)
    found = px.explain(first, gone, model=BigramSession())
    assert set(found.aspects) == {"text", "stride"}
    assert len(found.steps) == 1
    assert "name both with --input" in found.notes[0]
    named = px.explain(first, gone, model=BigramSession(), inputs=[moved])
    assert [step.aspects for step in named.steps] == [("text",), ("stride",)]
    with pytest.raises(FingerprintMismatchError, match="one of the runs scored"):
        px.explain(first, second, inputs=[moved])
    assert px.explain(first, gone, measure=False).steps == ()


def test_plain_id_lines_are_one_step_that_cannot_be_taken_apart(
    measure: Measure, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    first = measure()
    px.export_id_lines(TokenFile.open(first.input_path), tmp_path / "ids.txt")
    tokens = px.import_id_lines(tmp_path / "ids.txt", output=tmp_path / "ids.safetensors")
    second = px.evaluate(tiny_llama_dir, tokens, run=tmp_path / "run")
    found = px.explain(first, second)
    assert "an input holds ids alone" in found.differences[0].sentence
    assert len(found.steps) == 1
    assert "cannot be turned alone" in found.notes[0]
    adds_up(found, first, second)


def test_sessions_differ_by_name(measure: Measure) -> None:
    """Weights, version, settings and quantization of stored runs, without any model."""
    record = measure(model=BigramSession()).to_json()
    other = json.loads(json.dumps(record))
    other["model"]["weights_fingerprint"] = "w9"
    other["session"] |= {
        "version": "2",
        "device": "cuda",
        "settings": {"attention": "eager"},
        "quantization": {"name": "int8", "library": "toy", "effective_bits": 8.5},
    }
    other["threads"] = 7
    found = px.explain(Run.from_json(record), Run.from_json(other), measure=False)
    assert found.aspects == (
        "weights",
        "engine version",
        "device",
        "quantization",
        "settings",
        "threads",
    )
    assert "int8 by toy (8.5 bits per parameter)" in str(found)


# --- texts --------------------------------------------------------------------------------------


@pytest.mark.trap(1)
@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (["a\nb"], ["a\r\nb"], ("newlines",)),
        (["a\nb "], ["a\nb"], ("trailing whitespace",)),
        (["a  \nb"], ["a\r\nb"], ("newlines", "trailing whitespace")),
        (["a\n"], ["a"], ("outer whitespace",)),
        (["a", "b"], ["a\n\nb"], ("document joining",)),
        (["\ufeffa"], ["a"], ("byte order mark",)),
        (["e\u0301"], ["é"], ("Unicode form",)),
        (["a\n\n\nb"], ["a\nb"], ("blank lines",)),
        (["it 's @-@ so"], ["it's@-@so"], ("whitespace",)),
        (["Der Kran"], ["der kran"], ("letter case",)),
        (["one"], ["two"], ("text",)),
        (["same"], ["same"], ()),
    ],
)
def test_trap_1_what_makes_two_versions_of_a_text_differ(first, second, expected) -> None:
    sides = [[text.encode() for text in side] for side in (first, second)]
    assert text_aspects(*sides) == expected
    assert text_aspects(*reversed(sides)) == expected


def test_the_first_difference_is_shown_in_its_context() -> None:
    one = ["ignored", "Grüße aus Skelby, " + "x" * 50 + " — the end"]
    other = ["ignored", one[1].replace("— the", "– the")]
    place = first_difference(*([text.encode() for text in side] for side in (one, other)))
    assert place.document == 1
    assert place.character == one[1].index("—")
    # the first two of the three bytes of both dashes are the same
    assert place.byte == len(one[1][: place.character].encode()) + 2
    assert "the end" in place.first
    assert "the end" in place.second
    assert first_difference([b"x"], [b"x"]) is None
    assert first_difference([b"x"], [b"xy"]).byte == 1


def test_a_run_without_its_input_still_shows_where_the_texts_part(
    measure: Measure, tmp_path: Path
) -> None:
    first = measure(model=BigramSession())
    changed = [TEXTS[0], TEXTS[1].replace("plumber", "plumper"), TEXTS[2]]
    second = measure(changed, model=BigramSession())
    for number, run in enumerate((first, second)):
        Path(run.input_path).rename(tmp_path / f"{number}")
    try:
        found = px.explain(first, second, measure=False)
    finally:
        for number, run in enumerate((first, second)):
            (tmp_path / f"{number}").rename(run.input_path)
    assert found.aspects == ("text",)
    assert "document 1" in found.differences[0].sentence
    assert "plumber" in found.differences[0].sentence


# --- windows made anew, and the command ---------------------------------------------------------


def test_windows_made_anew_are_those_that_prepare_makes(tiny_llama_dir: Path) -> None:
    def prepared(**options: object) -> TokenFile:
        return px.prepare(TEXTS, tokenizer=tiny_llama_dir, **options)

    base = prepared(max_length=64, stride=32)
    for options in (
        {"max_length": 40, "stride": 8, "bos": "every"},
        {"protocol": "disjoint", "max_length": 33, "bos": "first"},
        {"protocol": "lm-eval", "max_length": 50},
        {"protocol": "hf-evaluate", "max_length": 70},
    ):
        wanted = prepared(**options)
        made = rewindowed(base, wanted.spec["protocol"])
        assert (made.windows.array == wanted.windows.array).all()
        assert made.input_fingerprint != base.input_fingerprint
    assert rewindowed(base, base.spec["protocol"] | {"stride": 65}) is None
    assert rewindowed(base, base.spec["protocol"] | {"prefix_id": "no"} | {"name": "x"}) is None


def test_the_command_prints_one_json_document(measure: Measure) -> None:
    first, second = measure(), measure(bos="first")
    command = ["explain", str(first.folder), str(second.folder), "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["aspects"] == ["bos"]
    assert record["steps"][0]["nats"] == pytest.approx(record["total_nats"])
    assert "the BOS before each document" in result.stderr
    assert "of which" in result.stderr
    unmeasured = CliRunner().invoke(app, [*command, "--no-measure"])
    assert json.loads(unmeasured.stdout)["steps"] == []
