"""The documents of a token file, as the exact UTF-8 that was tokenised."""

from itertools import pairwise

import numpy as np

from perplexit.inputs.token_file import TokenFile


def documents_of(tokens: TokenFile) -> list[bytes]:
    """The UTF-8 of every document of a token file, in order."""
    data = np.asarray(tokens.text_bytes).tobytes()
    edges = np.asarray(tokens.byte_starts)[tokens.document_starts].tolist()
    return [data[begin:end] for begin, end in pairwise(edges)]
