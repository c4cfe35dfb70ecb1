"""Tiny random checkpoints with a small byte-level tokenizer, made on the spot from fixed seeds.

The weights are drawn with a wide spread, so that the predictions are far from uniform and a
mistake in a soft-cap, a scale or a mask changes the nll visibly.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

VOCAB_SIZE = 320
MAX_LENGTH = 256
BOS, EOS = "<|bos|>", "<|eos|>"
_TEXT = (
    "The loss of a token is the negative logarithm of its probability. A window is what one "
    "forward pass sees. Its tokens are scored once; the tokens before them are its context. "
    "Whoever measures twice and gets the same number has measured. Ein Maß für Überraschung."
)


def byte_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer of VOCAB_SIZE ids: bos 0, eos 1; it adds neither itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise RuntimeError(f"the tiny tokenizer has {tokenizer.get_vocab_size()} ids")
    return tokenizer


_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LENGTH,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}


def tiny_llama() -> torch.nn.Module:
    """A Llama of two layers with its own (untied) head."""
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**_SIZES, tie_word_embeddings=False))


def tiny_gpt2() -> torch.nn.Module:
    """A GPT-2 of two layers: learned positions, Conv1D weights, tied head, dropout 0.1."""
    torch.manual_seed(2)
    config = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=MAX_LENGTH,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    return GPT2LMHeadModel(config)


def tiny_gemma2() -> torch.nn.Module:
    """A Gemma-2 with a sliding layer of 16 ids and tight soft-caps on attention and logits."""
    torch.manual_seed(3)
    config = Gemma2Config(
        **_SIZES,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=16,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=4.0,
    )
    return Gemma2ForCausalLM(config)


def tiny_cohere() -> torch.nn.Module:
    """A Cohere whose logits are multiplied by `logit_scale`."""
    torch.manual_seed(4)
    return CohereForCausalLM(CohereConfig(**_SIZES, logit_scale=0.25))


def tiny_granite() -> torch.nn.Module:
    """A Granite with embedding, residual and attention multipliers, and divided logits."""
    torch.manual_seed(5)
    config = GraniteConfig(
        **_SIZES,
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        attention_multiplier=0.3,
        logits_scaling=2.5,
    )
    return GraniteForCausalLM(config)


TINY_MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "gemma2": tiny_gemma2,
    "cohere": tiny_cohere,
    "granite": tiny_granite,
}


def save_tiny_model(name: str, folder: Path) -> Path:
    """The folder, filled with one of TINY_MODELS and the tokenizer as Hugging Face writes them."""
    model = TINY_MODELS[name]()
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(), bos_token=BOS, eos_token=EOS
    )
    tokenizer.save_pretrained(folder)
    return folder
