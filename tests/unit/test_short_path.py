"""The path of a loss: few frames from `evaluate` to the head's product, few containers to `Run`."""

import gc
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import perplexit as px
from perplexit.inputs.token_file import TokenFile
from perplexit.token_columns import TokenDetails

MOST_FRAMES, MOST_CONTAINERS = 12, 4


@pytest.fixture(scope="module")
def tokens(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenFile:
    folder = tmp_path_factory.mktemp("short-path")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 30)
    return px.prepare(folder / "text.txt", tokenizer=tiny_llama_dir, max_length=64, stride=32)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}], ids=["blocked head", "whole logits"])
def test_frames_from_evaluate_to_the_product_of_the_head(
    tokens: TokenFile, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, options: Any
) -> None:
    found: list[list[str]] = []
    product = torch.mm

    def counted(*given: Any, **more: Any) -> torch.Tensor:
        frame, names = sys._getframe(1), []
        while frame is not None:
            names.append(frame.f_code.co_name)
            if names[-1] == "evaluate":
                if "score_all" in names and "_call_impl" not in names:  # no layer, no probe
                    found.append(names)
                break
            frame = frame.f_back
        return product(*given, **more)

    monkeypatch.setattr(torch, "mm", counted)
    run = px.evaluate(tiny_llama_dir, tokens, **options)
    assert run.num_tokens == tokens.num_targets
    assert found
    assert max(map(len, found)) <= MOST_FRAMES, found[-1]


def test_containers_from_the_head_to_the_run(tokens: TokenFile, tiny_llama_dir: Path) -> None:
    """Every kind of object of Perplexit that holds losses itself, while an evaluation runs."""
    kinds: set[str] = set()

    def look(_: object) -> None:
        for held in gc.get_objects():
            kind = type(held)
            if not str(kind.__module__).startswith("perplexit."):
                continue
            columns = getattr(held, "columns", None)
            values = [*columns.values()] if isinstance(columns, dict) else []
            names = [*columns] if isinstance(columns, dict) else []
            for name in getattr(kind, "__slots__", ()) or vars(held):
                values.append(getattr(held, name, None))
                names.append(name)
            arrays = [isinstance(value, np.ndarray | torch.Tensor) for value in values]
            if any("nll" in name and array for name, array in zip(names, arrays, strict=True)):
                kinds.add(kind.__name__)

    run = px.evaluate(tiny_llama_dir, tokens, batch_size=2, progress=look)
    look(run)
    assert TokenDetails.__name__ in kinds
    # TokenStatistics lives only while a batch is scored; the run holds its RunTokens.
    assert len(kinds | {"TokenStatistics", "Run"}) <= MOST_CONTAINERS, kinds
