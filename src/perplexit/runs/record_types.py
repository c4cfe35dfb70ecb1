"""The types of the records inside `run.json`, for what reads them back; there may be more keys."""

from typing import Any, NotRequired, TypedDict


class ModelRecord(TypedDict):
    """The model that was measured."""

    address: NotRequired[str]
    architecture: NotRequired[str]
    num_parameters: NotRequired[int]
    weights_fingerprint: NotRequired[str]
    vocab_size: NotRequired[int]
    max_length: NotRequired[int | None]
    adapter: NotRequired[dict[str, Any] | None]


class QuantizationRecord(TypedDict):
    """What a quantization did."""

    name: NotRequired[str]
    library: NotRequired[str]
    num_modules: NotRequired[int]
    num_bytes: NotRequired[int]
    effective_bits: NotRequired[float | None]
    unquantized: NotRequired[list[str]]


class SessionRecord(TypedDict):
    """The conditions of the measurement."""

    engine: NotRequired[str]
    version: NotRequired[str]
    dtype: NotRequired[str]
    device: NotRequired[str]
    quantization: NotRequired[QuantizationRecord | None]
    threads: NotRequired[int | None]
    settings: NotRequired[dict[str, Any]]
    mode: NotRequired[str]
    prompt_len: NotRequired[int | None]
    decode_chunk: NotRequired[int | None]


class ProtocolRecord(TypedDict):
    """The protocol of the input."""

    name: NotRequired[str]
    version: NotRequired[int]
    max_length: NotRequired[int | None]
    stride: NotRequired[int | None]
    bos: NotRequired[str]
    prefix_id: NotRequired[int]
    joined_with: NotRequired[str | None]
    aggregate: NotRequired[str]


class TokenizerRecord(TypedDict):
    """The tokenizer of the input."""

    vocab_size: NotRequired[int]
    bos_id: NotRequired[int | None]


class UnscoredRecord(TypedDict):
    """What the protocol's tool counts of documents without a token."""

    num_bytes: int
    num_words: int


class CorpusRecord(TypedDict):
    """What was read into the input."""

    without_tokens: NotRequired[UnscoredRecord]


class SpecRecord(TypedDict):
    """What the input says of itself."""

    protocol: NotRequired[ProtocolRecord]
    tokenizer: NotRequired[TokenizerRecord]
    domains: NotRequired[list[str]]
    corpus: NotRequired[CorpusRecord]


class ReferenceRecord(TypedDict):
    """What divergences were measured from."""

    kind: NotRequired[str]
    address: NotRequired[str]
    weights_fingerprint: NotRequired[str]
    engine: NotRequired[str | None]
    dtype: NotRequired[str | None]
    self_kl_mean: NotRequired[float | None]
    self_kl_max: NotRequired[float | None]


class NoiseFloorRecord(TypedDict):
    """The model against itself in other batches."""

    nats_a_token: float


NESTED: dict[str, Any] = {
    "model": ModelRecord,
    "session": SessionRecord,
    "input_spec": SpecRecord,
    "reference": ReferenceRecord | None,
    "noise_floor": NoiseFloorRecord | None,
    "reasons": dict[str, str],
    "seconds": dict[str, float | None],
}


class _Addressed(TypedDict):
    address: str


class _Engined(TypedDict):
    engine: str
    dtype: str


class _Prepared(TypedDict):
    protocol: dict[str, Any]


class CompleteRun(TypedDict):
    """What every complete run says."""

    model: _Addressed
    session: _Engined
    input_spec: _Prepared
    num_tokens: int
