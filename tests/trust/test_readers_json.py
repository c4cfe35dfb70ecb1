"""The JSON reader: what it refuses, and in which words."""

import os
import threading
from dataclasses import dataclass, field
from typing import Any, TypedDict

import pytest

from perplexit.errors import RunError
from perplexit.untrusted_files import (
    Expected,
    check_regular,
    open_regular,
    parse_json,
    read_json,
    stated,
)

EXPECTED = Expected("a record", RunError, "make it again")


class Model(TypedDict):
    address: str
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Record:
    model: Model
    figures: tuple[float, ...] = ()
    more: dict[str, Any] = field(default_factory=dict)


def parsed(text: str | bytes, schema: Any = dict[str, Any], **options: Any) -> Any:
    return parse_json(text, EXPECTED, schema, place="run.json", **options)


def test_a_right_document_becomes_its_type() -> None:
    found = parsed('{"model": {"address": "hf:x", "vocab_size": 3}, "figures": [1, 2.5]}', Record)
    assert found == Record({"address": "hf:x", "vocab_size": 3}, (1.0, 2.5))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"model": {"address": 5, "vocab_size": 3}}', r"\$\.model\.address.*`str`.*`int`"),
        ('{"model": {"address": "x", "vocab_size": true}}', r"vocab_size.*`int`.*`bool`"),
        ('{"model": {"address": "x", "vocab_size": 3.0}}', r"vocab_size.*`int`.*`float`"),
        ('{"model": {"address": "x"}}', r"\$\.model.*vocab_size"),
        ('{"model": {"address": "x", "vocab_size": 3}, "figures": [1, null]}', r"figures\[1\]"),
        ("[]", r"`\$`.*`object`.*`array`"),
        ("7", "`object`"),
    ],
)
def test_d6_a_value_of_another_type_is_named_by_its_path(text: str, words: str) -> None:
    with pytest.raises(RunError, match=words):
        parsed(text, Record)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested"),
        ("[" * 70 + "]" * 70, "nested deeper than 64"),
        ('{"a": ' + "9" * 5000 + "}", "5,000 digits"),
        ('{"a": 1e999}', "too large"),
        ('{"a": NaN}', "NaN"),
        ('{"a": [-Infinity]}', "-Infinity"),
        (r'{"a": "\ud800"}', "surrogate"),
        (r'{"\uDfff": 1}', "surrogate"),
        ('{"a": {"b": 1, "b": 2}}', "'b' twice"),
        ('{"a": 1', "line 1"),
        (b'{"a": "\xff"}', "utf-8"),
        (b"\x00" * 50, "cannot be read as JSON"),
        ("", "cannot be read as JSON"),
    ],
)
def test_d6_what_json_does_not_mean_is_refused(text: str | bytes, words: str) -> None:
    with pytest.raises(RunError, match=words) as caught:
        parsed(text, Any)
    message = str(caught.value)
    assert message.startswith("expected a record in run.json, got ")
    assert message.endswith("; make it again")
    assert len(message) < 600


def test_non_finite_numbers_only_where_they_are_allowed() -> None:
    assert parsed('{"limit": [0.0, Infinity]}', non_finite=True) == {"limit": [0.0, float("inf")]}
    assert parsed(r'{"a": "\ud83d\ude00"}') == {"a": "😀"}  # a whole pair is text


def test_a_large_file_is_refused_before_it_is_read(tmp_path: Any) -> None:
    path = tmp_path / "run.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse: reading it would take a terabyte
    with pytest.raises(RunError, match=r"1,099,511,627,776 bytes"):
        read_json(path, EXPECTED, dict[str, Any])


def test_d6_sibling_what_is_no_regular_file_is_refused_at_once(tmp_path: Any) -> None:
    os.mkfifo(tmp_path / "pipe")
    found: list[BaseException] = []

    def read() -> None:
        for name in ("pipe", ".", "none"):
            try:
                read_json(tmp_path / name, EXPECTED, dict[str, Any])
            except RunError as error:
                found.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive(), "opening a named pipe waits for a writer"
    pipe, folder, none = map(str, found)
    assert "named pipe" in pipe
    assert "folder" in folder
    assert "no such file" in none
    with pytest.raises(RunError, match="device"):
        open_regular("/dev/zero", EXPECTED)
    with pytest.raises(RunError, match="no such file"):
        check_regular(tmp_path / "none", EXPECTED)


class PanicException(BaseException):
    """Named as Rust libraries' panics are in Python."""


@pytest.mark.parametrize(
    "cause",
    [
        KeyError("x"),
        RecursionError(),
        OverflowError("big"),
        PermissionError(13, "Permission denied"),
        PanicException("p"),
    ],
)
def test_every_failure_becomes_a_stated_error(cause: BaseException) -> None:
    with pytest.raises(RunError, match="make it again") as caught, stated("a.bin", EXPECTED):
        raise cause
    assert caught.value.__cause__ is cause


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_what_is_no_failure_passes(kind: type[BaseException]) -> None:
    with pytest.raises(kind), stated("a.bin", EXPECTED):
        raise kind
