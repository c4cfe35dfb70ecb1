"""KenLM: n-gram models in ARPA or KenLM's binary form, as used to filter web corpora.

A session gets ids, and an n-gram model knows words. The word of an id is line `id` of a
`vocabulary.txt` beside the model; without one it is the id written in decimal, which is what a
model trained on exported id lines (`perplexit prepare --export-ids`) has.
"""

import hashlib
import math
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Unpack

import kenlm
import numpy as np
from numpy.typing import NDArray

from perplexit.checkpoints.identity import weights_fingerprint
from perplexit.errors import ModelError, VocabularyError
from perplexit.inputs.windows import WindowIds
from perplexit.session_descriptions import ModelDescription, SessionDescription
from perplexit.sessions.base import ClosedByWith
from perplexit.sessions.options import EngineOptions, engine_options, without_settings
from perplexit.untrusted_files import LARGEST_TABLE, Expected, check_regular, read_bytes, stated

_EXPECTED = Expected("an ARPA or KenLM binary model", ModelError, "write it again")
_VOCABULARY = Expected("one word on each line", ModelError, "write the vocabulary again")
_LN_10 = math.log(10.0)
_ANY_ID = np.iinfo(np.int32).max
_NO_UNKNOWN = -100.0  # KenLM's log10 p(<unk>) for a model without <unk>
_BOS = "<s>"
_ONLY = without_settings(
    "an n-gram model",
    "it is a table that KenLM looks up on the CPU; leave the option out",
    values=("cpu", "float32", "fp32"),
)


class NgramInferenceSession(ClosedByWith):
    """An n-gram model; each target given the up to `order - 1` words before it in its window.

    A window whose first id has the word `<s>` starts in KenLM's sentence-begin state; any other
    starts without context. A word that the model does not know has the probability of `<unk>`,
    and `num_unknown` counts them. Raises ModelError, CapabilityError.
    """

    def __init__(
        self, path: str | Path, *, address: str | None = None, **options: Unpack[EngineOptions]
    ) -> None:
        engine_options("ngram", options, only=_ONLY)  # a look-up per token: KenLM has no threads
        file = Path(path)
        self._kenlm = _loaded(file)
        self._words, vocabulary_file = _vocabulary(file)
        self._has_unknown = self._kenlm.score("\x00", bos=False, eos=False) > _NO_UNKNOWN
        self.num_unknown = 0
        self.model = ModelDescription(
            address=address or f"ngram:{file}",
            architecture=f"{self._kenlm.order}-gram",
            num_parameters=_num_ngrams(file),
            weights_fingerprint=_fingerprint(file, vocabulary_file),
            vocab_size=_ANY_ID if self._words is None else len(self._words),
        )
        self.description = SessionDescription(
            engine="kenlm",
            version=version("kenlm"),
            dtype="float32",
            device="cpu",
            threads=1,
            settings={
                "order": self._kenlm.order,
                "words": "decimal ids" if vocabulary_file is None else vocabulary_file.name,
                "unknown": "<unk>" if self._has_unknown else "refused",
            },
        )

    def token_nll(self, windows: Sequence[WindowIds]) -> list[NDArray[np.float32]]:
        """Return each target's nll in nats (KenLM's log10 times ln 10); see InferenceSession."""
        return [self._window_nll(window) for window in windows]

    def max_batch_size(self, window_length: int) -> int:
        """Return as many windows as are wanted: nothing but the result is kept."""
        return max(1, (1 << 20) // max(1, window_length))

    def close(self) -> None:
        """Release the model."""
        self._kenlm = None

    def _window_nll(self, window: WindowIds) -> NDArray[np.float32]:
        words = [self._word(int(index), window) for index in window.ids_T]
        logprobs_T = np.zeros(len(words))
        before, after = kenlm.State(), kenlm.State()
        first = 0
        self._kenlm.NullContextWrite(before)
        if words and words[0] == _BOS:
            self._kenlm.BeginSentenceWrite(before)
            first = 1
        unknown_T = np.zeros(len(words), dtype=bool)
        for position in range(first, len(words)):
            found = self._kenlm.BaseFullScore(before, words[position], after)
            logprobs_T[position] = found.log_prob
            unknown_T[position] = found.oov
            before, after = after, before
        self._count_unknown(window, unknown_T, words)
        return (-_LN_10 * logprobs_T[window.targets_N]).astype(np.float32)

    def _count_unknown(
        self, window: WindowIds, unknown_T: NDArray[np.bool_], words: list[str]
    ) -> None:
        unknown = window.targets_N[unknown_T[window.targets_N]]
        if len(unknown) and not self._has_unknown:
            position = int(unknown[0])
            raise VocabularyError(
                f"expected words that {self.model.address} knows, got {words[position]!r} (id "
                f"{int(window.ids_T[position])}, window {window.index}, position {position}), and "
                "the model has no <unk> to give it a probability; retrain it with one "
                "(lmplz does so), or put the right vocabulary.txt beside it"
            )
        self.num_unknown += len(unknown)

    def _word(self, index: int, window: WindowIds) -> str:
        if self._words is None:
            return str(index)
        if not 0 <= index < len(self._words):
            raise VocabularyError(
                f"expected ids below {len(self._words)}, the lines of vocabulary.txt, got {index} "
                f"in window {window.index}; use the tokenizer that the vocabulary was written from"
            )
        return self._words[index]


def _loaded(file: Path) -> "kenlm.Model":
    if not file.is_file():
        raise ModelError(f"expected an ARPA or KenLM binary file, found none at {file}")
    config = kenlm.Config()
    config.show_progress = False
    config.arpa_complain = kenlm.ARPALoadComplain.NONE
    check_regular(file, _EXPECTED)
    try:
        return kenlm.Model(str(file), config)
    except Exception as error:  # OSError, or bytes of the file that are no text in its message
        lines = str(error).splitlines() or [type(error).__name__]
        raise ModelError(
            f"expected an ARPA or KenLM binary model in {file}, which KenLM cannot read: "
            f"{lines[-1][:300]}"
        ) from error


def _vocabulary(file: Path) -> tuple[tuple[str, ...] | None, Path | None]:
    """Return (the word of each id, the file that says so); (None, None) for decimal ids."""
    for beside in (file.with_name(f"{file.name}.vocabulary.txt"), file.parent / "vocabulary.txt"):
        if beside.is_file():
            # split("\n"), not splitlines(): a word may hold U+2028 and its like
            data = read_bytes(beside, _VOCABULARY, largest=LARGEST_TABLE)
            with stated(beside, _VOCABULARY):
                words = tuple(data.decode("utf-8").removesuffix("\n").split("\n"))
            _check_words(words, beside)
            return words, beside
    return None, None


def _check_words(words: tuple[str, ...], file: Path) -> None:
    for index, word in enumerate(words):
        if word.split() != [word]:  # KenLM divides at blanks: it would look up something else
            raise ModelError(
                f"expected one word without blanks on each line of {file}, got {word!r} on line "
                f"{index + 1}; write blanks inside a token as the model's training text did"
            )


def _fingerprint(file: Path, vocabulary_file: Path | None) -> str:
    """Return the model file's SHA-256; with a vocabulary, which decides the words, of both."""
    if vocabulary_file is None:
        return weights_fingerprint(file)
    both = weights_fingerprint(file) + weights_fingerprint(vocabulary_file)
    return hashlib.sha256(both.encode()).hexdigest()


def _num_ngrams(file: Path) -> int:
    """Return how many n-grams an ARPA file's header declares; 0 for a binary file."""
    total = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines):
            if line.startswith(b"ngram "):
                with stated(file, _EXPECTED):
                    total += max(0, int(line.partition(b"=")[2]))
            elif line.startswith(b"\\1-grams") or number > 100 or len(line) > 10_000:
                break
    return total
