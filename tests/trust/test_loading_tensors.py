"""B1: a checkpoint is loaded as it lies on disk, or refused with the names of what has no place."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from perplexit.checkpoints.loading import load_checkpoint
from perplexit.errors import ModelError
from tests.trust.loading_models import SIZES, edited, llama, losses, oracle, oracle_of, saved


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return saved(llama(), tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def expected(plain):
    return oracle_of(plain)


def refused(folder, *names):
    with pytest.raises(ModelError) as raised:
        load_checkpoint(folder)
    for name in names:
        assert name in str(raised.value)


def test_b1_biases_that_the_config_does_not_mention_are_refused(tmp_path):
    model = llama(attention_bias=True)
    folder = saved(model, tmp_path / "biased")
    right = oracle(model)
    assert np.abs(losses(folder) - right).max() < 1e-4
    bare = edited(folder, tmp_path / "bare", without=("attention_bias",))
    refused(bare, "self_attn.k_proj.bias", "config.json")
    assert np.abs(oracle_of(bare) - right).max() > 0.1  # what would have been reported


def test_b1_fewer_layers_in_the_config_than_on_disk(tmp_path):
    folder = saved(llama(num_hidden_layers=4), tmp_path / "four")
    half = edited(folder, tmp_path / "half", config={"num_hidden_layers": 2})
    refused(half, "model.layers.2.", "number of layers")


def test_b1_integer_weights_without_a_quantization_config(plain, tmp_path):
    def quantized(tensors):
        out = {}
        for name, tensor in tensors.items():
            if "_proj" in name:
                scale = tensor.abs().amax(1, keepdim=True) / 127
                out[name] = (tensor / scale).round().to(torch.int8)
                out[f"{name}_scale"] = scale
            else:
                out[name] = tensor
        return out

    refused(edited(plain, tmp_path / "int8", tensors=quantized), "weight_scale", "quantization")


def test_b1_sibling_integers_alone(plain, tmp_path):
    """Without scales transformers finds nothing odd: names and shapes are right."""
    folder = edited(
        plain,
        tmp_path / "bare",
        tensors=lambda t: {k: (v * 50).to(torch.int8) if "_proj" in k else v for k, v in t.items()},
    )
    refused(folder, "I8", "integers")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_b1_sibling_other_floats_are_what_they_are(plain, tmp_path, dtype):
    folder = edited(
        plain, tmp_path / "cast", tensors=lambda t: {k: v.to(dtype) for k, v in t.items()}
    )
    assert np.abs(losses(folder) - oracle_of(folder)).max() < 1e-4


def test_b1_a_tied_reward_model_is_refused(tmp_path):
    torch.manual_seed(3)
    config = llama(tie_word_embeddings=True).config
    config.num_labels = 1
    folder = saved(LlamaForSequenceClassification(config), tmp_path / "reward")
    refused(folder, "score.weight")


def test_b1_lora_matrices_left_inside_are_refused(plain, tmp_path):
    def with_lora(tensors):
        name = "model.layers.0.self_attn.q_proj"
        extra = {
            f"{name}.lora_A.weight": torch.randn(4, 64),
            f"{name}.lora_B.weight": torch.randn(64, 4),
        }
        return {**tensors, **extra}

    refused(edited(plain, tmp_path / "lora", tensors=with_lora), "lora_A.weight", "lora_B.weight")


def test_b1_sibling_an_adapter_beside_the_weights_is_not_added_in_silence(plain, tmp_path):
    """transformers loads such an adapter onto the model, and reports on the adapter alone."""
    folder = edited(plain, tmp_path / "both")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    refused(folder, "adapter_config.json", "--adapter")


def test_b1_sibling_mlp_biases_and_norms_of_queries_and_keys(plain, tmp_path):
    biased = saved(llama(mlp_bias=True), tmp_path / "mlp")
    refused(edited(biased, tmp_path / "bare", without=("mlp_bias",)), "mlp.down_proj.bias")
    torch.manual_seed(1)
    qwen = saved(Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)), tmp_path / "qwen")
    as_llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    folder = edited(qwen, tmp_path / "normed", config=as_llama, without=("layer_types",))
    refused(folder, "q_norm.weight", "k_norm.weight")


@pytest.mark.parametrize(("on_disk", "said"), [(4, 3), (3, 4)])
def test_b1_sibling_another_number_of_experts(tmp_path, on_disk, said):
    torch.manual_seed(1)
    config = MixtralConfig(**SIZES, num_local_experts=on_disk, num_experts_per_tok=2)
    folder = saved(MixtralForCausalLM(config), tmp_path / "moe")
    assert np.abs(losses(folder) - oracle_of(folder)).max() < 1e-4
    refused(edited(folder, tmp_path / "other", config={"num_local_experts": said}))


@pytest.mark.parametrize("vocab_size", [250, 300])
def test_b1_sibling_another_vocabulary_size(plain, tmp_path, vocab_size):
    refused(edited(plain, tmp_path / "vocab", config={"vocab_size": vocab_size}))


def test_b1_sibling_a_head_beside_tied_embeddings(tmp_path):
    folder = saved(llama(tie_word_embeddings=True), tmp_path / "tied")
    right = oracle_of(folder)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]

    def with_head(scale):
        return lambda tensors: {**tensors, "lm_head.weight": scale * embedding}

    equal = edited(folder, tmp_path / "equal", tensors=with_head(1.0))
    assert np.abs(losses(equal) - right).max() < 1e-4
    other = edited(folder, tmp_path / "other", tensors=with_head(1.01))
    refused(other, "lm_head.weight", "tie_word_embeddings")


def test_b1_sibling_an_untied_model_without_its_head(plain, tmp_path):
    def headless(tensors):
        return {k: v for k, v in tensors.items() if k != "lm_head.weight"}

    refused(edited(plain, tmp_path / "headless", tensors=headless), "lm_head.weight")


@pytest.mark.parametrize("prefix", ["", "model.model."])
def test_b1_sibling_a_base_model_s_names(plain, expected, tmp_path, prefix):
    """Without the prefix, or with it twice, the tensors are the same ones."""
    folder = edited(
        plain,
        tmp_path / "names",
        tensors=lambda t: {
            prefix + k.removeprefix("model.") if k.startswith("model.") else k: v
            for k, v in t.items()
        },
    )
    assert np.abs(losses(folder) - expected).max() < 1e-4


def test_b1_sibling_one_tensor_under_two_names(plain, tmp_path):
    folder = edited(
        plain,
        tmp_path / "twice",
        tensors=lambda t: {**t, "norm.weight": 2 * t["model.norm.weight"]},
    )
    refused(folder, "norm.weight", "model.norm.weight")


def shards(plain, folder):
    tensors = load_file(plain / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    folder = edited(plain, folder)
    (folder / "model.safetensors").unlink()
    for file, part in parts.items():
        save_file({k: tensors[k] for k in part}, folder / file, metadata={"format": "pt"})
    index = {name: file for file, part in parts.items() for name in part}
    return folder, index, tensors


def write_index(folder, index):
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": index}))


def test_b1_sibling_shards_and_their_index(plain, expected, tmp_path):
    folder, index, tensors = shards(plain, tmp_path / "good")
    write_index(folder, index)
    assert np.abs(losses(folder) - expected).max() < 1e-4
    name = sorted(tensors)[0]
    write_index(folder, {**index, name: "model-2.safetensors"})
    refused(folder, name, "model-1.safetensors")
    write_index(folder, {**index, "model.extra.weight": "model-2.safetensors"})
    refused(folder, "model.extra.weight", "no file")
    write_index(folder, {**index, name: "model-3.safetensors"})
    refused(folder, "model-3.safetensors")
    write_index(folder, index)
    save_file({k: tensors[k] for k in sorted(tensors)[:2]}, folder / "model-2.safetensors")
    refused(folder, "both hold")


def test_b1_sibling_two_sets_of_weights_in_one_folder(plain, tmp_path):
    folder, index, tensors = shards(plain, tmp_path / "two")
    write_index(folder, index)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, "one set of weights")


def test_b1_sibling_another_file_of_weights_named_by_the_config(plain, tmp_path):
    folder = edited(plain, tmp_path / "named", config={"transformers_weights": "b.safetensors"})
    save_file(load_file(folder / "model.safetensors"), folder / "b.safetensors")
    refused(folder, "transformers_weights")


def test_b1_sibling_pickled_weights(plain, tmp_path):
    folder = edited(plain, tmp_path / "pickle")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin")


def test_b1_harmless_extras_stay_silent(plain, expected, tmp_path, caplog, capfd):
    def extras(tensors):
        more = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(8) for i in range(2)}
        more["vision_tower.layers.0.weight"] = torch.rand(3, 3)
        return {**tensors, **more}

    folder = edited(plain, tmp_path / "extras", tensors=extras)
    assert np.abs(losses(folder) - expected).max() < 1e-4
    assert not caplog.records
    assert "inv_freq" not in "".join(capfd.readouterr())


def test_b1_harmless_masks_of_gpt2(tmp_path, caplog):
    torch.manual_seed(2)
    sizes = {"vocab_size": 257, "n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 4}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=1)
    folder = saved(GPT2LMHeadModel(config), tmp_path / "gpt2")
    right = oracle_of(folder)

    def masks(tensors):
        mask = torch.ones(1, 1, 128, 128).tril()
        more = {f"transformer.h.{i}.attn.bias": mask.to(torch.uint8) for i in range(2)}
        more |= {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
        return {**tensors, **more}

    masked = edited(folder, tmp_path / "masked", tensors=masks)
    assert np.abs(losses(masked) - right).max() < 1e-4
    assert not caplog.records


def test_b1_a_null_quantization_config_is_none(plain, expected, tmp_path):
    folder = edited(plain, tmp_path / "null", config={"quantization_config": None})
    assert np.abs(losses(folder) - expected).max() < 1e-4
    full = edited(plain, tmp_path / "full", config={"quantization_config": {"quant_method": "fp8"}})
    refused(full, "fp8")
