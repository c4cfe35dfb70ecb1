"""The text that everything is measured on: State of the Union addresses, as ids."""

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from perplexit.cli.demo_files import TEXT_FILE, TEXT_PACKAGE, packaged_file

NUM_NEWEST = 4  # some 40,000 ids; the first is newer than the demo's model


def speeches(count: int) -> list[str]:
    """The newest addresses, newest first."""
    folder = packaged_file(TEXT_PACKAGE, TEXT_FILE).parent
    files = sorted(folder.glob("*.txt"), reverse=True)[:count]
    return [file.read_text(encoding="utf-8") for file in files]


def ids_of_speeches(tokenizer_folder: Path, path: Path) -> Path:
    """The newest addresses one after the other, int32, in the .npy at `path`."""
    if not path.exists():
        tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
        ids = tokenizer.encode("\n\n".join(speeches(NUM_NEWEST)), add_special_tokens=False).ids
        np.save(path, np.array(ids, np.int32))
    return path
