"""lm-evaluation-harness itself: `HFLM.loglikelihood_rolling` on a loaded model."""

import io
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from typing import Any

from lm_eval.api.instance import Instance  # type: ignore[import-untyped]
from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped]
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from sidebyside.contenders import Contender, Scored, Setting
from sidebyside.transformers_loops import load_transformers
from sidebyside.workloads import Workload


class IdTexts(HFLM):  # type: ignore[misc] # it has no types
    """The harness's own model class, whose texts are ids separated by blanks.

    So it scores the ids of everybody else; no other method is replaced.
    """

    def tok_encode(self, string: str, *_: Any, **__: Any) -> list[int]:
        """The ids that the text spells."""
        return [int(word) for word in string.split()]


@dataclass(frozen=True)
class RollingLoglikelihood:
    """A model of transformers under the harness, one window a batch as it does by itself."""

    model: Any
    tokenizer: Any

    def prepare(self, workload: Workload) -> Callable[[], Scored]:
        """`loglikelihood_rolling` of one document, whose prefix token is the text's first id."""
        ids = workload.text_ids.tolist()
        peer = IdTexts(
            pretrained=self.model,
            tokenizer=self.tokenizer,
            max_length=workload.max_length - 1,
            prefix_token_id=ids[0],
            device="cpu",
        )
        request = Instance("loglikelihood_rolling", {}, (" ".join(map(str, ids[1:])),), 0)

        def turn() -> Scored:
            with redirect_stderr(io.StringIO()):  # its progress bars
                logprob = peer.loglikelihood_rolling([request], disable_tqdm=True)[0]
            return Scored(-logprob, workload.num_targets)

        return turn


def rolling_loglikelihood(setting: Setting) -> Contender:
    """The harness with the checkpoint loaded in the asked dtype."""
    # It is asked for its special tokens alone.
    names = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    fast: Any = PreTrainedTokenizerFast
    return RollingLoglikelihood(
        load_transformers(setting), fast(tokenizer_object=names, eos_token="?")
    )
