"""The types of the records inside `run.json`, for what reads them back; there may be more keys."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, NotRequired, TypedDict, Union, get_args, get_origin, get_type_hints

from perplexit.session_descriptions import ModelDescription, SessionDescription


def _record_of(kind: type) -> Any:
    """Return the type of a dataclass's record as JSON, in which any key may be missing."""
    hints = get_type_hints(kind)
    return TypedDict(  # type: ignore[operator]
        kind.__name__, {f.name: NotRequired[_json_type(hints[f.name])] for f in fields(kind)}
    )


def _json_type(hint: Any) -> Any:
    if get_origin(hint) is Union or isinstance(hint, UnionType):
        return Union[tuple(_json_type(part) for part in get_args(hint))]  # noqa: UP007
    if is_dataclass(hint):
        return _record_of(hint)  # type: ignore[arg-type]
    if get_origin(hint) is tuple:
        return list[get_args(hint)[0]]  # type: ignore[misc]
    if get_origin(hint) is Mapping:
        return dict[str, Any]
    return float | None if hint is float else hint


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
    "model": _record_of(ModelDescription),
    "session": _record_of(SessionDescription),
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
