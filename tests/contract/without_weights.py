"""Contract factories of the sessions that see no weights: a server's, a table's, a recording's."""

import json
import math
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from perplexit.inputs.windows import WindowIds
from perplexit.sessions.base import InferenceSession
from perplexit.sessions.loss_file import RecordedInferenceSession
from perplexit.sessions.pytorch import PytorchInferenceSession
from tests.markov_server import MarkovServer, serving
from tests.tiny_models import VOCAB_SIZE


class ModelServer(MarkovServer):
    """A right server whose model is a PyTorch one; each id's text is its number."""

    def __init__(self, model: torch.nn.Module, **options: Any) -> None:
        super().__init__(styles=("echo",), **options)
        self.model = model.eval()

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        ids = [int(index) for index in body["prompt"]]
        with torch.no_grad():
            logits_TV = self.model(torch.tensor([ids])).logits[0].double()
        logprobs_TV = logits_TV.log_softmax(-1)
        best = logprobs_TV[-1].topk(5)
        top = {f"t{i}": float(x) for i, x in zip(best.indices, best.values, strict=True)}
        values: list[float | None] = [float(best.values[0])]
        out = [int(best.indices[0])]
        if body.get("echo"):
            scored = logprobs_TV[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0]
            values = [None, *scored.tolist(), *values]
            out = [*ids, *out]
        logprobs = {
            "tokens": [f"t{index}" for index in out],
            "token_logprobs": values,
            "top_logprobs": [None] * (len(out) - 1) + [top],
        }
        choice = {"index": 0, "text": "", "finish_reason": "length", "logprobs": logprobs}
        return {"id": "1", "object": "text_completion", "created": 0, "model": "chain",
                "choices": [choice]}  # fmt: skip


def completions(folder: Path) -> InferenceSession:
    """The completions session before a server of the checkpoint, which ends with the session."""
    module = pytest.importorskip("perplexit.sessions.completions")
    stack = ExitStack()
    model = AutoModelForCausalLM.from_pretrained(folder)
    server = stack.enter_context(serving(ModelServer(model)))

    class Served(module.CompletionsInferenceSession):
        def close(self) -> None:
            super().close()
            stack.close()

    return Served(f"{server.url}#chain")


class BigramModel(torch.nn.Module):
    """p(next | previous) alone, as a causal language model."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(11)
        logits = torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=generator, dtype=torch.float64)
        self.logprobs_VV = torch.nn.Parameter((2 * logits).log_softmax(-1), requires_grad=False)

    def forward(self, ids_BT: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logprobs_VV[ids_BT])


def bigram_model(folder: Path) -> torch.nn.Module:
    """The oracle of `ngram`; the checkpoint plays no part."""
    del folder
    return BigramModel()


def ngram(folder: Path) -> InferenceSession:
    """KenLM over an ARPA file with every bigram of BigramModel; words are decimal ids."""
    module = pytest.importorskip("perplexit.sessions.ngram")
    del folder
    table = (BigramModel().logprobs_VV / math.log(10)).tolist()
    lines = ["\\data\\", f"ngram 1={VOCAB_SIZE + 3}", f"ngram 2={VOCAB_SIZE**2}", "", "\\1-grams:"]
    lines += ["-5\t<unk>\t0", "-99\t<s>\t0", "-5\t</s>\t0"]
    lines += [*(f"-3\t{index}\t0" for index in range(VOCAB_SIZE)), "", "\\2-grams:"]
    lines += [f"{x:.9f}\t{a} {b}" for a, row in enumerate(table) for b, x in enumerate(row)]
    path = Path(tempfile.mkdtemp()) / "bigrams.arpa"
    path.write_text("\n".join([*lines, "", "\\end\\", ""]), encoding="utf-8")
    session: InferenceSession = module.NgramInferenceSession(path)
    return session


class _Replayed(RecordedInferenceSession):
    """Records each call's windows with PyTorch as a device would, then reads the recording."""

    def __init__(self, folder: Path) -> None:
        self._device = PytorchInferenceSession(folder)
        self._file = Path(tempfile.mkdtemp()) / "recording.jsonl"
        self._file.write_text("", encoding="utf-8")
        super().__init__(self._file)

    def token_nll(self, windows: Any) -> Any:
        numbered = [WindowIds(i, w.ids_T, w.targets_N) for i, w in enumerate(windows)]
        lines = []
        for window, nll_N in zip(numbered, self._device.token_nll(numbered), strict=True):
            logprobs: list[float | None] = [None] * len(window.ids_T)
            for target, nll in zip(window.targets_N, nll_N, strict=True):
                logprobs[target] = -float(nll)
            record = {"window": window.index, "ids": window.ids_T.tolist(), "logprobs": logprobs}
            lines.append(json.dumps(record) + "\n")
        self._file.write_text("".join(lines), encoding="utf-8")
        return RecordedInferenceSession(self._file).token_nll(numbered)


def recorded(folder: Path) -> InferenceSession:
    """A recording of whatever is asked."""
    return _Replayed(folder)
