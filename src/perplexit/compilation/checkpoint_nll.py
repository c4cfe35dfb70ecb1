"""The losses of a loaded checkpoint, which a program made from it is held against.

Shape suffixes: T = ids of the window, V = vocabulary.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def window_nll(model: Any, ids_T: torch.Tensor) -> NDArray[np.float64]:
    """The nll of each id but the first, in nats, by one forward pass and a float64 log-softmax."""
    logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0, :-1]
    logprobs_TV = logits_TV.double().log_softmax(-1)
    nll: NDArray[np.float64] = -logprobs_TV.gather(1, ids_T[1:, None])[:, 0].numpy()
    return nll
