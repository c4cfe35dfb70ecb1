"""A token file whose hashes are right is still refused where it makes no sense (fault D5)."""

import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from perplexit.errors import TokenFileError
from perplexit.inputs.id_lines import import_id_lines
from perplexit.inputs.preparing import prepare
from perplexit.inputs.protocol_table import PROTOCOLS
from perplexit.inputs.tensor_container import header_bytes, read_container
from perplexit.inputs.token_file import TokenFile
from tests.forged_token_files import forge
from tests.unit import tokenizer_zoo as zoo

TEXTS = [
    {"text": "The quick brown fox jumps over the lazy dog.", "kind": "a", "prompt": "Say: "},
    {"text": "Größe 漢字 🙂 and more words to read here", "kind": "b", "prompt": ""},
    {"text": "It's 4 o'clock and all is well, said the clock.", "kind": "a", "prompt": "Now "},
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("input") / "input.safetensors"
    prepare(
        TEXTS,
        tokenizer=zoo.byte_level(),
        output=path,
        max_length=12,
        stride=6,
        domain_key="kind",
        prompt_key="prompt",
    )
    return path


@pytest.fixture(scope="module")
def prefixed(tmp_path_factory):
    path = tmp_path_factory.mktemp("input") / "bos.safetensors"
    texts = [row["text"] for row in TEXTS]
    prepare(texts, tokenizer=zoo.metaspace_byte_fallback(), output=path, max_length=12, bos="every")
    return path


def refused(source, tmp_path, change, words):
    forged = forge(source, tmp_path / "forged.safetensors", change)
    with pytest.raises(TokenFileError, match=words) as caught:
        TokenFile.open(forged)
    assert str(forged) in str(caught.value)


def test_an_unchanged_file_opens_with_its_fingerprint(path, tmp_path):
    forged = forge(path, tmp_path / "same.safetensors", lambda spec, tensors: None)
    assert TokenFile.open(forged).input_fingerprint == TokenFile.open(path).input_fingerprint


def change_window(row, **columns):
    names = ("document", "start", "stop", "target_start", "target_stop", "prefix_mode", "prefix_id")

    def change(spec, tensors):
        for name, value in columns.items():
            tensors["windows"][row, names.index(name)] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        change_window(-1, stop=1 << 32),  # a window of 16 GiB
        change_window(0, stop=1 << 62),
        change_window(0, start=-1),
        change_window(0, start=-(1 << 63)),
        change_window(1, document=99),
        change_window(1, document=-1),
        change_window(0, start=9, stop=3),
        change_window(0, target_stop=4_000),
        change_window(0, target_start=0),
        change_window(0, prefix_mode=7),
        change_window(0, prefix_mode=1),
        change_window(0, prefix_id=3),
    ],
)
def test_d5_a_window_that_cannot_be(path, tmp_path, change):
    refused(path, tmp_path, change, r"window \d+ = .*outside its document or scores a token")


def test_d5_a_window_into_the_next_document(path, tmp_path):
    def change(spec, tensors):
        ends = tensors["windows"][:, 0] == 0
        tensors["windows"][np.flatnonzero(ends)[-1], 2] += 3

    refused(path, tmp_path, change, "outside its document")


@pytest.mark.parametrize("row", [0, 1, -1])
def test_d5_doubled_windows(path, tmp_path, row):
    def change(spec, tensors):
        table = tensors["windows"]
        tensors["windows"] = np.insert(table, row % len(table), table[row], axis=0)

    refused(path, tmp_path, change, "scores a target for a second time")


def test_d5_sibling_a_target_in_two_windows(path, tmp_path):
    refused(path, tmp_path, change_window(1, target_start=7), "second time")


def test_d5_sibling_windows_out_of_order(path, tmp_path):
    def change(spec, tensors):
        tensors["windows"] = np.ascontiguousarray(tensors["windows"][::-1])

    refused(path, tmp_path, change, "out of order")


@pytest.mark.parametrize("protocol", ["qefficient", "mlc"])
def test_d5_protocols_that_score_overlaps_twice_open_but_not_with_doubled_windows(
    tmp_path, protocol
):
    output = tmp_path / "input.safetensors"
    texts = [row["text"] for row in TEXTS]
    made = prepare(
        texts,
        tokenizer=zoo.byte_level(),
        output=output,
        protocol=protocol,
        max_length=16,
        stride=4,
    )
    assert made.num_targets > len(made.token_ids) * 2

    def change(spec, tensors):
        tensors["windows"] = np.repeat(tensors["windows"], 2, axis=0)

    refused(output, tmp_path, change, "fed twice")


@pytest.mark.parametrize("protocol", sorted(PROTOCOLS))
@pytest.mark.parametrize("bos", ["auto", "none"])
def test_every_protocol_still_opens(tmp_path, protocol, bos):
    entry = PROTOCOLS[protocol]
    if bos not in ("auto", *entry.bos):
        pytest.skip("not allowed by the protocol")
    texts = [" ".join(row["text"] for row in TEXTS) * (60 if entry.fixed_length else 1)] * 2
    free = entry.max_length is not None and not entry.fixed_length
    made = prepare(
        texts,
        tokenizer=zoo.metaspace_byte_fallback(),
        output=tmp_path / "input.safetensors",
        protocol=protocol,
        bos=bos,
        **({"max_length": 16} if free else {}),
    )
    assert TokenFile.open(made.path).num_targets == made.num_targets > 0


def test_id_lines_still_open(tmp_path):
    lines = tmp_path / "ids.txt"
    lines.write_text("1 2 3\n4 5\n\n7 8 9 10\n")
    assert import_id_lines(lines, output=tmp_path / "x.safetensors").num_windows == 3


@pytest.mark.parametrize(
    ("name", "index", "value", "words"),
    [
        ("token_ids", 3, -1, "the id -1"),
        ("token_ids", 3, 1 << 30, "the id 1073741824"),
        ("document_starts", 0, 1, "do not begin at 0"),
        ("document_starts", 1, 10_000, "document_starts"),
        ("document_starts", 1, -3, "document_starts"),
        ("document_starts", -1, 40, "document_starts|no document|outside its document"),
        ("byte_starts", 2, 1 << 40, "byte_starts"),
        ("byte_starts", 5, 0, "byte_starts"),
        ("byte_starts", -1, 3, "byte_starts"),
        ("document_domains", 0, 2, "a domain that is none"),
        ("document_domains", 0, -2, "a domain that is none"),
        ("text_bytes", 4, 0xFF, "no UTF-8"),
        ("text_bytes", -1, 0xE6, "within a character"),
    ],
)
def test_d5_sibling_a_value_out_of_its_range(path, tmp_path, name, index, value, words):
    def change(spec, tensors):
        tensors[name][index] = value

    refused(path, tmp_path, change, words)


def test_d5_sibling_a_document_that_begins_within_a_letter(path, tmp_path):
    def change(spec, tensors):
        text = tensors["text_bytes"].tobytes().decode()
        at = len(text[: text.index("漢") + 1].encode()) - 1  # the last byte of the character
        tensors["byte_starts"][tensors["document_starts"][1]] = at
        tensors["byte_starts"] = np.maximum.accumulate(tensors["byte_starts"])

    refused(path, tmp_path, change, "begins within a letter")


def test_d5_sibling_a_mask_of_other_than_true_and_false(path, tmp_path):
    def change(spec, tensors):
        tensors["scored_mask"].view(np.uint8)[3] = 2

    refused(path, tmp_path, change, "scored_mask")


@pytest.mark.parametrize("name", ["scored_mask", "num_words", "byte_starts", "document_domains"])
def test_d5_sibling_a_tensor_of_another_length(path, tmp_path, name):
    def change(spec, tensors):
        tensors[name] = tensors[name][:-1]

    refused(path, tmp_path, change, "of shape")


def test_d5_sibling_a_prefix_outside_the_vocabulary(prefixed, tmp_path):
    def change(spec, tensors):
        tensors["windows"][:, 6] = 1 << 20
        spec["protocol"]["prefix_id"] = 1 << 20

    refused(prefixed, tmp_path, change, "the prefix 1048576")


def test_d5_sibling_a_prefix_that_is_not_the_protocols(prefixed, tmp_path):
    refused(prefixed, tmp_path, change_window(0, prefix_id=5), "prefixes other than")


def test_d5_sibling_a_window_longer_than_its_protocol_allows(path, tmp_path):
    def change(spec, tensors):
        spec["protocol"]["max_length"] = 8

    refused(path, tmp_path, change, "longer than its protocol's")


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("protocol",), "sliding"),
        (("protocol", "name"), 3),
        (("protocol", "max_length"), "12"),
        (("protocol", "max_length"), -5),
        (("protocol", "aggregate"), "best"),
        (("tokenizer", "vocab_size"), 1e9),
        (("tokenizer", "vocab_size"), 1 << 70),
        (("tokenizer", "vocab_size"), -1),
        (("domains",), {"a": 1}),
        (("has_text",), "yes"),
        (("corpus", "skipped"), [1]),
    ],
)
def test_d5_sibling_a_spec_of_wrong_types(path, tmp_path, keys, value):
    def change(spec, tensors):
        place = spec
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    refused(path, tmp_path, change, "expected a token file")


def test_d7_declared_shapes_are_held_against_the_file(path, tmp_path):
    metadata, _ = read_container(path)
    for shape in ([1 << 32, 1 << 32], [1 << 62], [1 << 33, 7]):
        header = header_bytes([], metadata)[8:].decode().rstrip()
        entry = f'"windows":{{"data_offsets":[0,0],"dtype":"I64","shape":{shape}}}}}'
        text = (header[:-1] + "," + entry.replace(" ", "")).encode()
        text += b" " * (-len(text) % 8)
        forged = tmp_path / "forged.safetensors"
        forged.write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(TokenFileError, match=r"forged\.safetensors"):
            TokenFile.open(forged)


def test_d8_an_input_that_is_cut_off_while_it_is_scored_is_an_error(path, tmp_path):
    used = tmp_path / "input.safetensors"
    shutil.copy(path, used)
    tokens = TokenFile.open(used)
    assert len(tokens.window_ids(0).ids_T) == 12
    os.truncate(used, 100)
    with pytest.raises(TokenFileError, match=r"changed meanwhile.*100 now"):
        tokens.window_ids(0)


def test_d8_sibling_an_input_that_is_rewritten_while_it_is_scored_is_an_error(path, tmp_path):
    used = tmp_path / "input.safetensors"
    shutil.copy(path, used)
    tokens = TokenFile.open(used)
    time.sleep(0.02)  # the clock of file times moves in steps
    with used.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    with pytest.raises(TokenFileError, match="changed meanwhile"):
        tokens.window_ids(0)


def test_an_input_that_is_replaced_as_a_whole_goes_on_as_it_was(path, tmp_path):
    used = tmp_path / "input.safetensors"
    shutil.copy(path, used)
    tokens = TokenFile.open(used)
    expected = tokens.window_ids(1).ids_T.tolist()
    other = tmp_path / "other"
    other.write_bytes(b"something else")
    other.replace(used)
    assert tokens.window_ids(1).ids_T.tolist() == expected
    used.unlink()
    assert tokens.window_ids(1).ids_T.tolist() == expected


def test_d6_sibling_a_named_pipe_for_an_input_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    found = []

    def read(place: Path):
        try:
            TokenFile.open(place)
        except TokenFileError as error:
            found.append(str(error))

    for place in (tmp_path / "pipe", tmp_path):
        thread = threading.Thread(target=read, args=(place,), daemon=True)
        thread.start()
        thread.join(5)
    assert [("named pipe" in words, "folder" in words) for words in found] == [
        (True, False),
        (False, True),
    ]
