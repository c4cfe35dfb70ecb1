"""checkpoints/: identity, finding, loading, and the one-time conversion of a GGUF."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from perplexit.checkpoints import identity
from perplexit.checkpoints.gguf_dequantized import dequantized_folder
from perplexit.checkpoints.identity import weights_fingerprint
from perplexit.checkpoints.loading import load_checkpoint
from perplexit.checkpoints.location import find_checkpoint
from perplexit.errors import MissingPackageError, ModelError
from tests.tiny_models import TINY_MODELS


@pytest.fixture
def folder(tmp_path, tiny_llama_dir):
    """A copy of the tiny Llama that a test may damage."""
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip_a_bit(path, offset=-5):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_a_copy_has_the_same_fingerprint_and_one_flipped_weight_bit_another(folder, tiny_llama_dir):
    assert weights_fingerprint(folder) == weights_fingerprint(tiny_llama_dir)
    flip_a_bit(folder / "model.safetensors")
    assert weights_fingerprint(folder) != weights_fingerprint(tiny_llama_dir)


def test_the_configuration_is_part_of_the_identity_but_not_who_saved_it(folder, tiny_llama_dir):
    edit_config(folder, transformers_version="5.0.0", _name_or_path="elsewhere")
    assert weights_fingerprint(folder) == weights_fingerprint(tiny_llama_dir)
    edit_config(folder, rope_parameters={"rope_theta": 5.0, "rope_type": "default"})
    assert weights_fingerprint(folder) != weights_fingerprint(tiny_llama_dir)


def test_every_shard_is_part_of_the_identity_and_must_be_there(tmp_path):
    TINY_MODELS["llama"]().save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    before = weights_fingerprint(tmp_path)
    load_checkpoint(tmp_path)
    flip_a_bit(shards[-1])
    assert weights_fingerprint(tmp_path) != before
    shards[0].unlink()
    with pytest.raises(ModelError, match=r"names model-00001.*download complete"):
        load_checkpoint(tmp_path)


def test_the_remembered_digest_of_a_large_file_is_not_used_after_a_change(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("PERPLEXIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(identity, "_LARGE_FILE_BYTES", 0)
    monkeypatch.setattr(identity, "_SETTLED_SECONDS", -1.0)
    before = weights_fingerprint(folder)
    assert list((tmp_path / "cache" / "digests").iterdir())
    assert weights_fingerprint(folder) == before
    stat = (folder / "model.safetensors").stat()
    time.sleep(0.02)
    flip_a_bit(folder / "model.safetensors")
    os.utime(folder / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert weights_fingerprint(folder) != before


def test_a_freshly_written_file_is_not_remembered(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PERPLEXIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(identity, "_LARGE_FILE_BYTES", 0)
    flip_a_bit(folder / "model.safetensors")
    flip_a_bit(folder / "config.json", offset=0)
    flip_a_bit(folder / "config.json", offset=0)
    weights_fingerprint(folder)
    assert not (tmp_path / "cache" / "digests").exists()


def test_a_bare_path_and_the_hf_prefix_name_the_same_checkpoint(folder):
    bare, prefixed = find_checkpoint(folder), find_checkpoint(f"hf:{folder}")
    assert bare == prefixed
    assert bare.address == f"hf:{folder}"
    assert bare.revision is None


def test_weights_are_loaded_exactly_and_in_evaluation_mode(folder):
    model = load_checkpoint(folder).model
    assert not model.training
    stored = load_file(folder / "model.safetensors")
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in stored.items())


def test_missing_weights_are_an_error_not_random_numbers(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj"):
        load_checkpoint(folder)


def test_weights_of_another_shape_are_an_error(folder):
    edit_config(folder, intermediate_size=48)
    with pytest.raises(ModelError, match=r"shape|size mismatch"):
        load_checkpoint(folder)


def test_pickled_weights_are_refused_with_the_command_that_converts_them(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*save_pretrained"):
        load_checkpoint(folder)


def test_quantized_checkpoints_are_refused(folder):
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match=r"already quantized.*gptq"):
        load_checkpoint(folder)


def test_remote_code_is_never_run(folder, tmp_path):
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    edit_config(
        folder,
        model_type="evil",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    )
    with pytest.raises(ModelError, match="never run"):
        load_checkpoint(folder)
    assert not (tmp_path / "ran").exists()


def test_an_encoder_decoder_and_a_model_without_a_head_are_refused(tmp_path):
    sizes = {"vocab_size": 20, "num_layers": 1}
    T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_heads=2, **sizes)).save_pretrained(tmp_path / "t5")  # fmt: skip  # noqa: E501
    with pytest.raises(ModelError, match="encoder-decoder"):
        load_checkpoint(tmp_path / "t5")
    config = BertConfig(vocab_size=20, hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
    BertModel(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match="not there"):
        load_checkpoint(tmp_path / "bert")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf:/nowhere/at/all", "no such folder"),
        ("hf:nobody/nothing", "nobody/nothing"),
        ("hf:nowhere.gguf", "expected a .gguf file"),
        ("hf:{folder}/model.safetensors", "folder that holds config.json"),
        ("hf:{folder}/..", "no config.json"),
    ],
)
def test_an_address_that_leads_nowhere_says_what_was_expected(folder, address, message):
    with pytest.raises(ModelError, match=message):
        load_checkpoint(address.format(folder=folder))


def test_a_hub_id_is_resolved_to_its_commit(folder, tmp_path, monkeypatch):
    """From a hub cache on disk: nothing is fetched."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--tiny"
    snapshot = repository / "snapshots" / commit
    shutil.copytree(folder, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for address in ("hf:someone/tiny", "hf:someone/tiny@main", f"hf:someone/tiny@{commit}"):
        source = find_checkpoint(address)
        assert source.address == f"hf:someone/tiny@{commit}"
        assert source.revision == commit
        assert source.fingerprint == weights_fingerprint(folder)
    with pytest.raises(ModelError, match="someone/tiny@other"):
        find_checkpoint("hf:someone/tiny@other")


def test_a_file_that_only_calls_itself_gguf_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"<html>not found</html>")
    with pytest.raises(ModelError, match=r"begins with b'<htm'"):
        dequantized_folder(tmp_path / "model.gguf")


def test_a_damaged_gguf_leaves_no_half_made_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PERPLEXIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ModelError, match=r"cannot dequantize model\.gguf.*gguf:"):
        dequantized_folder(tmp_path / "model.gguf")
    assert list((tmp_path / "cache" / "checkpoints").iterdir()) == []


def test_without_accelerate_the_message_is_the_install_command(tmp_path, monkeypatch):
    monkeypatch.setenv("PERPLEXIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("perplexit.checkpoints.gguf_dequantized.find_spec", lambda name: None)
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(MissingPackageError, match=r"pip install 'perplexit\[pytorch\]'"):
        dequantized_folder(tmp_path / "model.gguf")


@pytest.mark.real_model
def test_a_gguf_is_dequantized_once_into_a_plain_float32_folder(real_model_dir, real_gguf_path):
    assert dequantized_folder(real_gguf_path) == real_model_dir
    source = find_checkpoint(f"hf:{real_gguf_path}")
    assert source.fingerprint == weights_fingerprint(real_gguf_path)
    assert source.folder == real_model_dir
    assert (real_model_dir / "tokenizer.json").is_file()
    config = json.loads((real_model_dir / "config.json").read_text())
    assert "quantization_config" not in config
    dtypes = {t.dtype for t in load_file(real_model_dir / "model.safetensors").values()}
    assert dtypes == {torch.float32}
    tensors = load_file(real_model_dir / "model.safetensors")
    weights = tensors["model.layers.7.mlp.gate_proj.weight"][:50].reshape(-1, 32).numpy()
    # 4-bit blocks of 32 with a scale and a minimum: at most 16 values in each block.
    assert max(len(np.unique(block)) for block in weights) <= 16
