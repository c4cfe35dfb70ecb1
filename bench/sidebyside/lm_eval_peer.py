"""lm-evaluation-harness itself: `HFLM.loglikelihood_rolling` on a loaded model."""

import io
from contextlib import redirect_stderr
from functools import cache
from typing import Any

from lm_eval.api.instance import Instance  # type: ignore[import-untyped]
from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped]
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from sidebyside.contenders import Score, Scored, Setting, Workload
from sidebyside.transformers_loops import load_transformers


class IdTexts(HFLM):  # type: ignore[misc] # it has no types
    """The harness's own model class, for texts that are ids separated by blanks.

    So it scores the ids of everybody else; no other method is replaced.
    """

    def tok_encode(self, string: str, *_: Any, **__: Any) -> list[int]:
        """Return the ids that the text spells."""
        return [int(word) for word in string.split()]


def rolling_loglikelihood(setting: Setting) -> Score:
    """Open the harness with the checkpoint loaded in the asked dtype.

    A turn is `loglikelihood_rolling` of one document, whose prefix token is the text's first id,
    with one window in a batch (its default), unless the workload says otherwise.
    """
    model = load_transformers(setting)
    # The tokenizer is asked for its special tokens alone.
    names = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    fast: Any = PreTrainedTokenizerFast
    options = {"pretrained": model, "tokenizer": fast(tokenizer_object=names, eos_token="?")}

    @cache  # all of it is made in the first turn, which is not timed
    def made(workload: Workload) -> tuple[IdTexts, Instance, int]:
        windows = [window.ids_T.tolist() for window in workload.windows()]
        ids = windows[0] + [number for window in windows[1:] for number in window[1:]]
        sizes = {"max_length": workload.max_length - 1, "batch_size": workload.batch_size or 1}
        peer = IdTexts(prefix_token_id=ids[0], device=setting.device, **sizes, **options)
        text = " ".join(map(str, ids[1:]))
        return peer, Instance("loglikelihood_rolling", {}, (text,), 0), len(ids) - 1

    def score(workload: Workload) -> Scored:
        peer, request, num_tokens = made(workload)
        with redirect_stderr(io.StringIO()):  # its progress bars
            return Scored(-peer.loglikelihood_rolling([request], disable_tqdm=True)[0], num_tokens)

    return score
