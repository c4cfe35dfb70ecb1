"""lm-evaluation-harness itself: `HFLM.loglikelihood_rolling` on a loaded model."""

import io
from contextlib import redirect_stderr
from typing import Any

from lm_eval.api.instance import Instance  # type: ignore[import-untyped]
from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped]
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from sidebyside.contenders import Prepare, Scored, Setting, Turn
from sidebyside.transformers_loops import load_transformers
from sidebyside.workloads import Workload


class IdTexts(HFLM):  # type: ignore[misc] # it has no types
    """The harness's own model class, for texts that are ids separated by blanks.

    So it scores the ids of everybody else; no other method is replaced.
    """

    def tok_encode(self, string: str, *_: Any, **__: Any) -> list[int]:
        """Return the ids that the text spells."""
        return [int(word) for word in string.split()]


def rolling_loglikelihood(setting: Setting) -> Prepare:
    """Open the harness with the checkpoint loaded in the asked dtype.

    A turn is `loglikelihood_rolling` of one document, whose prefix token is the text's first id,
    with one window in a batch (its default), unless the workload says otherwise.
    """
    model = load_transformers(setting)
    # The tokenizer is asked for its special tokens alone.
    names = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    fast: Any = PreTrainedTokenizerFast
    tokenizer = fast(tokenizer_object=names, eos_token="?")

    def prepare(workload: Workload) -> Turn:
        windows = [window.ids_T.tolist() for window in workload.windows()]
        ids = windows[0] + [number for window in windows[1:] for number in window[1:]]
        peer = IdTexts(
            pretrained=model,
            tokenizer=tokenizer,
            max_length=workload.max_length - 1,
            prefix_token_id=ids[0],
            batch_size=workload.batch_size or 1,
            device=setting.device,
        )
        request = Instance("loglikelihood_rolling", {}, (" ".join(map(str, ids[1:])),), 0)

        def turn() -> Scored:
            with redirect_stderr(io.StringIO()):  # its progress bars
                logprob = peer.loglikelihood_rolling([request], disable_tqdm=True)[0]
            return Scored(-logprob, len(ids) - 1)

        return turn

    return prepare
