"""Golden hashes of what each protocol makes of one small corpus with one stored tokenizer.

A change here is a change of a protocol (raise its version) or of the file format (raise its
version). To write the hashes anew: `python -m tests.golden.test_inputs_golden`.
"""

import hashlib
import json
from pathlib import Path

import pytest

from perplexit.inputs.corpus import documents
from perplexit.inputs.corpus_document import Keys
from perplexit.inputs.preparing import prepare
from perplexit.inputs.protocol_table import PROTOCOLS
from perplexit.inputs.token_file import TokenFile

DATA = Path(__file__).parent / "data" / "inputs"
EXPECTED = DATA / "expected.json"
REPEATS = 8  # so that the longest fixed window fits


def prepared(protocol: str) -> TokenFile:
    rows = [document.text for document in documents(DATA / "rows.jsonl", Keys())]
    fixed = PROTOCOLS[protocol].fixed_length or PROTOCOLS[protocol].max_length is None
    return prepare(
        rows * REPEATS,
        tokenizer=DATA / "tokenizer.json",
        protocol=protocol,
        max_length=None if fixed else 64,
    )


def hashes(tokens: TokenFile) -> dict[str, str | int]:
    return {
        "text": hashlib.sha256(tokens.text_bytes.tobytes()).hexdigest(),
        "ids": hashlib.sha256(tokens.token_ids.tobytes()).hexdigest(),
        "byte_starts": hashlib.sha256(tokens.byte_starts.tobytes()).hexdigest(),
        "windows": hashlib.sha256(tokens.windows.array.tobytes()).hexdigest(),
        "text_fingerprint": tokens.text_fingerprint,
        "tokenizer_fingerprint": tokens.tokenizer_fingerprint,
        "input_fingerprint": tokens.input_fingerprint,
        "num_windows": tokens.num_windows,
        "num_targets": tokens.num_targets,
    }


@pytest.mark.trap(1)
@pytest.mark.parametrize("protocol", sorted(PROTOCOLS))
def test_trap_1_text_ids_and_fingerprint_are_what_they_were(protocol: str) -> None:
    expected = json.loads(EXPECTED.read_text(encoding="utf-8"))
    assert sorted(expected) == sorted(PROTOCOLS)
    assert hashes(prepared(protocol)) == expected[protocol]


def test_the_stored_corpus_is_the_one_that_was_hashed() -> None:
    """Not changed by a checkout that translates line ends."""
    assert hashlib.sha256((DATA / "rows.jsonl").read_bytes()).hexdigest() == (
        "e31287ba967d6b392b8d54b3bb2c4e4d38fd05ed0d93901ae328034f511e22ac"
    )


if __name__ == "__main__":
    content = {protocol: hashes(prepared(protocol)) for protocol in sorted(PROTOCOLS)}
    EXPECTED.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
