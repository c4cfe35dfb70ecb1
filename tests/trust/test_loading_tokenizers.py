"""B7: an input of another tokenizer than the model's own is refused; the same one, saved
otherwise, is not."""

import json
import shutil

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from typer.testing import CliRunner

import perplexit as px
from perplexit.cli.app import app
from perplexit.errors import FingerprintMismatchError
from perplexit.inputs.id_lines import export_id_lines, import_id_lines

TEXT = ["Twelve windows were counted; 1,024 ids in each, and the last one shorter. " * 3] * 3


@pytest.fixture(scope="module")
def right(tiny_llama_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("right") / "input.safetensors"
    return px.prepare(TEXT, tokenizer=str(tiny_llama_dir), max_length=32, output=path)


def prepared(tokenizer, tmp_path):
    return px.prepare(TEXT, tokenizer=tokenizer, max_length=32, output=tmp_path / "in.safetensors")


def edited(folder, tmp_path, change):
    """A copy of the model whose tokenizer.json is another."""
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    path = copy / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return copy


def shuffled_ids():
    """Bytes as ids in another order than the model's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def test_b7_an_input_of_another_tokenizer_is_refused(tiny_llama_dir, tmp_path, monkeypatch):
    tokens = prepared(shuffled_ids(), tmp_path)

    def never(*args, **options):
        raise AssertionError("the model was loaded before its tokenizer was compared")

    monkeypatch.setattr("perplexit.sessions.registry.load_session", never)
    with pytest.raises(FingerprintMismatchError) as raised:
        px.evaluate(f"hf:{tiny_llama_dir}", tokens)
    for part in ("another vocabulary", "document 0: id", "--tokenizer", "--other-tokenizer"):
        assert part in str(raised.value)


def test_b7_going_on_is_recorded(tiny_llama_dir, tmp_path):
    tokens = prepared(shuffled_ids(), tmp_path)
    run = px.evaluate(f"hf:{tiny_llama_dir}", tokens, other_tokenizer=True)
    assert run.tokenizer_check["same"] is False
    assert "document 0: id" in run.tokenizer_check["difference"]
    assert any("another tokenizer" in text for text in run.warnings)


def test_b7_the_command(tiny_llama_dir, tmp_path):
    tokens = prepared(shuffled_ids(), tmp_path)
    command = ["eval", str(tiny_llama_dir), str(tokens.path), "--run", str(tmp_path / "run")]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 1
    done = CliRunner().invoke(app, [*command, "--other-tokenizer", "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["tokenizer_check"]["same"] is False


def test_b7_the_same_tokenizer_by_its_fingerprint(tiny_llama_dir, right):
    run = px.evaluate(f"hf:{tiny_llama_dir}", right)
    assert (run.tokenizer_check["same"], run.tokenizer_check["compared_by"]) == (
        True,
        "fingerprint",
    )


def add_special(content):
    entry = dict(content["added_tokens"][-1])
    content["added_tokens"].append({**entry, "id": 320, "content": "<|tool|>"})


def other_metadata(content):
    content["truncation"] = {
        "direction": "Right", "max_length": 512, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip


def merges_as_pairs(content):
    content["model"]["merges"] = [
        merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]
    ]


@pytest.mark.parametrize("change", [add_special, other_metadata, merges_as_pairs])
def test_b7_sibling_one_tokenizer_saved_otherwise(tiny_llama_dir, right, tmp_path, change):
    folder = edited(tiny_llama_dir, tmp_path, change)
    run = px.evaluate(f"hf:{folder}", right)
    assert run.tokenizer_check["same"] is True
    expected = px.evaluate(f"hf:{tiny_llama_dir}", right)
    assert run.perplexity == expected.perplexity


def no_merges(content):
    content["model"]["merges"] = content["model"]["merges"][:3]


def digits_apart(content):
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    content["pre_tokenizer"] = json.loads(tokenizer.to_str())["pre_tokenizer"]


def lower_case(content):
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.normalizer = normalizers.Lowercase()
    content["normalizer"] = json.loads(tokenizer.to_str())["normalizer"]


@pytest.mark.parametrize("change", [no_merges, digits_apart, lower_case])
def test_b7_sibling_other_merges_splits_and_normalisers(tiny_llama_dir, right, tmp_path, change):
    """The ids stand for the same bytes, and the text becomes others of them."""
    folder = edited(tiny_llama_dir, tmp_path, change)
    with pytest.raises(FingerprintMismatchError, match="splits text otherwise"):
        px.evaluate(f"hf:{folder}", right)


def test_b7_sibling_ids_without_text_cannot_be_compared(tiny_llama_dir, right, tmp_path):
    lines = tmp_path / "ids.txt"
    export_id_lines(right, lines)
    tokens = import_id_lines(lines, output=tmp_path / "ids.safetensors")
    run = px.evaluate(f"hf:{tiny_llama_dir}", tokens)
    assert run.tokenizer_check["compared_by"] == "nothing"


def test_b7_sibling_a_model_without_a_tokenizer(tiny_llama_dir, right, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(tiny_llama_dir, folder, ignore=shutil.ignore_patterns("*token*"))
    run = px.evaluate(f"hf:{folder}", right)
    assert run.tokenizer_check is None


def test_b7_sibling_a_program_asks_its_checkpoint(tiny_llama_dir, right, tmp_path):
    program = px.compile(tiny_llama_dir, to="onnx", output=tmp_path / "program").folder
    assert px.evaluate(f"onnx:{program}", right).tokenizer_check["same"] is True
    with pytest.raises(FingerprintMismatchError):
        px.evaluate(f"onnx:{program}", prepared(shuffled_ids(), tmp_path))


def test_b7_sibling_a_gguf_file_tells_its_vocabulary(tiny_llama_dir, right, tmp_path):
    pytest.importorskip("llama_cpp")
    program = px.compile(tiny_llama_dir, to="gguf", output=tmp_path / "program").folder
    for address in (f"gguf:{program / 'model.gguf'}", f"hf:{program / 'model.gguf'}"):
        run = px.evaluate(address, right)
        assert run.tokenizer_check["same"] is True
        with pytest.raises(FingerprintMismatchError, match="another vocabulary"):
            px.evaluate(address, prepared(shuffled_ids(), tmp_path))


def test_b7_an_open_session_is_compared_too(tiny_llama_dir, tmp_path):
    session = px.load_session(f"hf:{tiny_llama_dir}")
    with pytest.raises(FingerprintMismatchError):
        px.evaluate(session, prepared(shuffled_ids(), tmp_path))
    session.close()


def test_b7_fingerprints_of_inputs_are_as_they_were(right):
    """Nothing of the comparison is part of an input's identity."""
    assert np.array_equal(right.token_ids, px.TokenFile.open(right.path).token_ids)
    assert "check" not in json.dumps(dict(right.spec))
