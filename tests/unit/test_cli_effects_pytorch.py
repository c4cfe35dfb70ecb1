"""Trap 33: `eval` with each of PyTorch's own options: the record differs, the figures do not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import perplexit as px
from perplexit.cli.app import app
from perplexit.errors import CapabilityError

TEXT = "The loss of a token is measured. A window is what a pass sees. " * 6
MAP = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
MAP |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}


@pytest.fixture(scope="module")
def evaluated(
    tiny_llama_dir, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Any]]:
    folder = tmp_path_factory.mktemp("effects")
    tokens = folder / "in.safetensors"
    px.prepare([TEXT], tokenizer=tiny_llama_dir, output=tokens, max_length=32, stride=16)
    (folder / "map.json").write_text(json.dumps(MAP))
    numbers = iter(range(99))

    def evaluate(*options: str, exit_code: int = 0) -> dict[str, Any]:
        words = [word.replace("MAP", str(folder / "map.json")) for word in options]
        run = folder / f"run{next(numbers)}"
        base = ["eval", str(tiny_llama_dir), str(tokens), "--run", str(run), "--json"]
        result = CliRunner().invoke(app, [*base, *words])
        assert result.exit_code == exit_code, result.stderr
        if exit_code:
            return {"message": result.stderr}
        document: dict[str, Any] = json.loads(result.stdout)
        assert [path.name for path in folder.glob(f"{run.name}/run.json")] == ["run.json"]
        return document

    return evaluate


@pytest.mark.trap(33)
@pytest.mark.parametrize(
    ("options", "setting", "expected"),
    [
        (["--attention", "eager"], "attention", "eager"),
        (["--device", "auto"], "modules_by_device", None),
        (["--device-map", "MAP"], "modules_by_device", {"cpu": 5, "disk": 1}),
        (["--head", "compiled"], "head", "chunked (linear), compiled log-sum-exp"),
        pytest.param(["--compile", "default"], "compile", "default", marks=pytest.mark.slow),
        pytest.param(["--tensor-parallel", "2"], "tensor_parallel", 2, marks=pytest.mark.slow),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_trap_33_an_option_of_pytorch_shows_in_the_record(
    evaluated: Callable[..., dict[str, Any]], options: list[str], setting: str, expected: object
) -> None:
    if "--tensor-parallel" in options and torch.cuda.is_available():
        pytest.skip("two CUDA devices are needed where there is one: see tests/cuda")
    plain, changed = evaluated(), evaluated(*options)
    assert changed["nll_sum"] == pytest.approx(plain["nll_sum"], rel=1e-5)
    assert changed["num_tokens"] == plain["num_tokens"]
    assert changed["session"]["settings"].get(setting) != plain["session"]["settings"].get(setting)
    if expected is not None:
        assert changed["session"]["settings"][setting] == expected


@pytest.mark.trap(33)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--head", "liger", "--device", "cpu"], "CUDA kernels"),
        (["--head", "cce", "--device", "cpu"], "CUDA kernels"),
        (["--attention", "flash_attention_2", "--device", "cpu"], "CUDA alone"),
        (["--compile", "reduce-overhead", "--device", "cpu"], "CUDA graphs"),
        (["--compile", "default", "--mode", "cached"], "--mode full"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_trap_33_an_option_without_an_effect_here_is_refused(
    evaluated: Callable[..., dict[str, Any]], options: list[str], message: str
) -> None:
    assert message in evaluated(*options, exit_code=1)["message"].replace("\n", " ")


@pytest.mark.trap(33)
@pytest.mark.parametrize("option", ["head", "attention", "compile_mode", "device_map"])
def test_trap_33_another_engine_refuses_the_options_of_pytorch(tmp_path: Path, option: str) -> None:
    with pytest.raises(CapabilityError, match=f"'ngram' has no option {option}"):
        px.load_session(f"ngram:{tmp_path / 'model.arpa'}", **{option: "default"})
