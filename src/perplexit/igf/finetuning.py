"""Fine-tuning with a filter: candidate contexts are judged before the model reads them.

Each step takes the next `batch_size` accepted candidates; the step's gradient is that of their
mean loss, in as many pieces as memory asks for. `seed_compatible` reproduces the original, which
cleared the gradient at every candidate: its step uses the last accepted context alone.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from perplexit.atomic_files import write_atomically
from perplexit.errors import NonFiniteError, ResumeError, UsageError
from perplexit.fingerprints import canonical_json
from perplexit.igf.articles import Articles
from perplexit.igf.finetune_curve import FinetuneCurve, FinetuneProgress
from perplexit.igf.learners import learner_fingerprint
from perplexit.igf.losses import ContextScorer, context_losses, ids_on_device
from perplexit.igf.model_identity import measurement_of_model
from perplexit.igf.optimizer_step import trainable_parameters
from perplexit.igf.random_contexts import Contexts, ContextStream, check_disjoint, derived_seed
from perplexit.igf.resumable_work import require_same
from perplexit.igf.selection import Selection, all_candidates
from perplexit.igf.training_options import FinetuneSettings
from perplexit.untrusted_files import Expected, parse_json
from perplexit.untrusted_tensors import opened_tensors

_FILE = "checkpoint.safetensors"
_EXPECTED = Expected("a checkpoint of this model", ResumeError, "remove it, or name another folder")
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class _State(TypedDict):
    step: int
    candidate: int
    curve: FinetuneCurve


class _Record(TypedDict):
    conditions: dict[str, Any]
    state: _State


def finetune_model(
    model: nn.Module,
    train: Articles,
    test: Contexts,
    *,
    selection: Selection | None = None,
    settings: FinetuneSettings | None = None,
    checkpoint: str | Path | None = None,
    progress: Callable[[FinetuneProgress], None] | None = None,
) -> FinetuneCurve:
    """Fine-tune `model` in place and return its curve on the test contexts.

    checkpoint: a folder; weights, optimizer and curve are kept there at every evaluation. After a
        kill the same call continues from the last one and ends with the same weights.
    Raises CorpusError where train and test share an article, NonFiniteError where the loss
    diverges, UsageError where the filter accepts next to nothing.
    """
    settings = settings or FinetuneSettings()
    check_disjoint(train=train, test=test)
    tuning = _Tuning(model, train, test, selection or all_candidates(), settings)
    folder = None if checkpoint is None else Path(checkpoint)
    if folder is not None:
        tuning.resume(folder)
    if not tuning.curve.steps:
        tuning.evaluate(0)
    for step in range(tuning.step, settings.steps):
        train_loss = tuning.take_step(step)
        if (step + 1) % settings.eval_interval == 0 or step + 1 == settings.steps:
            tuning.evaluate(step + 1)
            if folder is not None:
                tuning.save(folder)
        if progress is not None:
            latest = tuning.curve.perplexities()[-1]
            progress(
                FinetuneProgress(step + 1, settings.steps, train_loss, latest, tuning.candidate)
            )
    model.eval()
    return tuning.curve


class _Tuning:
    """The state of one fine-tuning between steps: model, optimizer, next candidate, curve."""

    def __init__(
        self,
        model: nn.Module,
        train: Articles,
        test: Contexts,
        selection: Selection,
        settings: FinetuneSettings,
    ) -> None:
        self.curve = FinetuneCurve()
        self.candidate = 0
        self.step = 0
        self._model = model
        self._selection = selection
        self._settings = settings
        self._stream = ContextStream(train, settings.context_length, settings.seed)
        self._articles = train, test
        self._test_NT = ids_on_device(model, test.ids_NT)
        self._parameters = trainable_parameters(model)
        self._scorer = ContextScorer(model)
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=settings.learning_rate, weight_decay=0.0
        )

    @cached_property
    def _conditions(self) -> dict[str, Any]:
        """Return what must be equal for a checkpoint to be continued; ask before the first step."""
        train, test = self._articles
        learner = self._selection.learner
        return {
            "settings": {k: v for k, v in asdict(self._settings).items() if k != "steps"},
            "selection": {
                **self._selection.to_json(),
                "learner_fingerprint": None if learner is None else learner_fingerprint(learner),
                "seed": self._selection.seed,
            },
            "measurement": measurement_of_model(self._model),
            "test": test.fingerprint(),
            "train": int(np.bitwise_xor.reduce(train.fingerprints())),
        }

    def save(self, folder: Path) -> None:
        """Replace the checkpoint in `folder`: weights, optimizer and curve, whole or not at all."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in _trainable(self._model):
            moments = self._optimizer.state.get(parameter, {})
            found = {"weight": parameter} | {k: moments[k] for k in _MOMENTS if k in moments}
            for kind, tensor in found.items():
                tensors[f"{kind}.{name}"] = tensor.detach().cpu().contiguous()
        state = {"step": self.step, "candidate": self.candidate, "curve": asdict(self.curve)}
        record = canonical_json({"conditions": self._conditions, "state": state})
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(
            folder / _FILE, lambda p: save_file(tensors, p, metadata={"record": record})
        )

    def resume(self, folder: Path) -> None:
        """Restore the checkpoint in `folder`, where there is one.

        Raises ResumeError where it was made under other conditions or is damaged.
        """
        path, wanted = folder / _FILE, self._conditions
        if not path.exists():
            return
        with opened_tensors(path, _EXPECTED, framework="pt") as file:
            text = (file.metadata() or {})["record"]
            record = parse_json(text, _EXPECTED, _Record, place=path)
            require_same(record["conditions"], wanted, "fine-tuning", path)
            names = set(file.keys())
            for name, parameter in _trainable(self._model):
                parameter.data.copy_(file.get_tensor(f"weight.{name}"))
                self._optimizer.state[parameter] = {
                    kind: file.get_tensor(f"{kind}.{name}").to(
                        "cpu" if kind == "step" else parameter.device
                    )
                    for kind in _MOMENTS
                    if f"{kind}.{name}" in names
                }
        state = record["state"]
        self.step, self.candidate, self.curve = state["step"], state["candidate"], state["curve"]
        self.curve.num_steps_resumed = self.step

    def evaluate(self, step: int) -> None:
        """Add a point to the curve."""
        began = time.perf_counter()
        self._model.eval()
        self.curve.steps.append(step)
        self.curve.test_loss.append(self._scorer.mean_loss(self._test_NT))
        self.curve.num_candidates.append(self.candidate)
        self.curve.seconds["evaluate"] += time.perf_counter() - began

    def take_step(self, step: int) -> float:
        """Take one optimizer step; return the mean loss of its contexts before it, in nats."""
        began = time.perf_counter()
        batch_BT = ids_on_device(self._model, self._accepted(step))
        selected = time.perf_counter()
        total = self._settings.schedule_steps
        decay = 1.0 if total is None else max(0.0, 1 - step / total)
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.learning_rate * decay
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._accumulate(batch_BT, step)
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"expected a finite loss, got {loss} at step {step}; lower the learning rate, or "
                "load the model in float32"
            )
        torch.nn.utils.clip_grad_norm_(self._parameters, self._settings.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step = step + 1
        self.curve.train_loss.append(loss)
        self.curve.tokens_trained += int(batch_BT.numel())
        self.curve.seconds["select"] += selected - began
        self.curve.seconds["train"] += time.perf_counter() - selected
        return loss

    def _accumulate(self, batch_BT: Tensor, step: int) -> float:
        self._model.train(self._settings.dropout)
        with torch.random.fork_rng(devices=[], enabled=self._settings.dropout), torch.enable_grad():
            if self._settings.dropout:
                torch.manual_seed(derived_seed(self._settings.seed, 2, step))
            if self._settings.seed_compatible:
                return last_context_gradient(self._model, batch_BT)
            return mean_gradient(self._model, batch_BT, self._settings.micro_batch)

    def _accepted(self, step: int) -> NDArray[np.int32]:
        """Return the ids of the next accepted candidates, [B, T]."""
        found: list[NDArray[np.int32]] = []
        wanted, first = self._settings.batch_size, self.candidate
        while wanted > 0:
            seen = self.candidate - first
            if seen >= self._settings.max_candidates:
                raise UsageError(
                    f"expected the filter {self._selection.name} to accept "
                    f"{self._settings.batch_size} contexts, got "
                    f"{self._settings.batch_size - wanted} of {seen} at step {step}; lower the "
                    "threshold, or use a quantile"
                )
            found.append(self._accepted_of_next(step, wanted))
            wanted -= len(found[-1])
        return np.concatenate(found)

    def _accepted_of_next(self, step: int, wanted: int) -> NDArray[np.int32]:
        """Return the ids of at most `wanted` accepted ones among the next candidates."""
        ids_NT = self._stream.take(self.candidate, self._settings.batch_size).ids_NT
        accepts = self._selection.accepts(ids_NT, self.candidate, step, self._losses)
        rows = np.flatnonzero(accepts)[:wanted]
        # After a full batch the next step looks at the rest, with its own threshold.
        used = len(ids_NT) if len(rows) < wanted else int(rows[-1]) + 1
        self.candidate += used
        self.curve.tokens_judged += used * ids_NT.shape[1]
        if self._selection.costs_forward_pass:
            self.curve.tokens_scored += int(ids_NT.size)
        return ids_NT[rows]

    def _losses(self, ids_NT: NDArray[np.int32]) -> NDArray[np.float64]:
        return self._scorer.losses(ids_on_device(self._model, ids_NT))


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def mean_gradient(model: nn.Module, batch_BT: Tensor, micro_batch: int) -> float:
    """Add the gradient of the batch's mean loss to `.grad`; return that loss.

    Pieces are weighted by their share of contexts, so any `micro_batch` gives the same gradient.
    """
    total = 0.0
    for piece in torch.split(batch_BT, micro_batch):
        loss = context_losses(model, piece).sum() / len(batch_BT)
        torch.autograd.backward(loss)
        total += float(loss.detach())
    return total


def last_context_gradient(model: nn.Module, batch_BT: Tensor) -> float:
    """Leave the last context's gradient in `.grad`, as the original does; return the mean loss.

    The original clears the gradient before every context.
    """
    total = 0.0
    for context in batch_BT:
        model.zero_grad(set_to_none=True)
        total += mean_gradient(model, context[None], 1)
    return total / len(batch_BT)
