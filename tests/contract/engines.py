"""The sessions that the contract suite runs against. An engine joins with one entry here.

Each factory takes a tiny checkpoint's folder and returns an open session and the PyTorch model
that the oracle asks. A factory whose package is missing skips.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from perplexit.quantization.mx_formats import FP6_E2M3, mx_round_trip
from perplexit.sessions.base import InferenceSession
from perplexit.sessions.prefill_decode import cached_session
from perplexit.sessions.pytorch import PytorchInferenceSession
from tests.contract import without_weights

TINY = ("llama", "gpt2", "gemma2", "cohere", "granite")


@dataclass(frozen=True)
class Engine:
    """How an engine opens a tiny checkpoint, on which of them it runs, and how exact it is.

    tolerance: largest difference in nats a token from the float64 oracle of the same weights.
    batch_tolerance: the same between two batches.
    oracle: what the oracle asks.
    knows_weights: whether the session can see the model's size, vocabulary and precision.
    sees_far: whether a prediction depends on every id before it.
    """

    open: Callable[[Path], InferenceSession]
    models: tuple[str, ...] = TINY
    tolerance: float = 2e-5
    batch_tolerance: float = 1e-5
    oracle: Callable[[Path], torch.nn.Module] = AutoModelForCausalLM.from_pretrained
    knows_weights: bool = True
    sees_far: bool = True


def _whole_forward(folder: Path) -> InferenceSession:
    """PyTorch over a model of which nothing is known but its forward."""

    class Opaque(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask=None):
            return (self.model(input_ids, attention_mask=attention_mask).logits,)

    return PytorchInferenceSession(Opaque(AutoModelForCausalLM.from_pretrained(folder)))


def _bare(folder: Path) -> InferenceSession:
    """PyTorch over a module that takes no mask, so that nothing may be padded."""

    class Bare(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids).logits

    return PytorchInferenceSession(Bare(AutoModelForCausalLM.from_pretrained(folder)))


def _quantized(precision: str) -> Callable[[Path], InferenceSession]:
    """PyTorch with its weights in another precision."""

    def open_quantized(folder: Path) -> InferenceSession:
        pytest.importorskip("torchao")
        pytest.importorskip("bitsandbytes")
        return PytorchInferenceSession(folder, quantization=precision)

    return open_quantized


def _quantized_oracle(precision: str) -> Callable[[Path], torch.nn.Module]:
    """The checkpoint with each layer's weights sent through the format by themselves."""

    def oracle(folder: Path) -> torch.nn.Module:
        model = AutoModelForCausalLM.from_pretrained(folder)
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear | Conv1D) and "head" not in name:
                transposed = isinstance(module, Conv1D)
                weight = module.weight.data.t() if transposed else module.weight.data
                back = _there_and_back(weight.contiguous(), precision)
                module.weight.data = back.t().contiguous() if transposed else back
        return model

    return oracle


def _there_and_back(weight: torch.Tensor, precision: str) -> torch.Tensor:
    if precision == "nf4":
        from bitsandbytes import functional  # noqa: PLC0415

        codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        return functional.dequantize_4bit(codes, state)
    if precision == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_  # noqa: PLC0415

        layer = torch.nn.Linear(*weight.t().shape, bias=False)
        layer.weight = torch.nn.Parameter(weight)
        quantize_(layer, Int8WeightOnlyConfig(set_inductor_config=False))
        return layer.weight.dequantize().detach()
    return mx_round_trip(weight, FP6_E2M3)


def _llamacpp(folder: Path) -> InferenceSession:
    """llama.cpp over a float32 GGUF file written from the checkpoint."""
    gguf_file = pytest.importorskip("perplexit.compilation.gguf_file")
    from perplexit.sessions.llamacpp import LlamaCppInferenceSession  # noqa: PLC0415

    model = AutoModelForCausalLM.from_pretrained(folder)
    path = gguf_file.write_gguf(
        Path(tempfile.mkdtemp()) / "model.gguf",
        config=model.config.to_dict(),
        state=model.state_dict(),
        tokenizer_json=folder / "tokenizer.json",
    )
    return LlamaCppInferenceSession(path, threads=1)


def _onnx(**options: object) -> Callable[[Path], InferenceSession]:
    """ONNX Runtime over a program compiled from the checkpoint."""

    def open_program(folder: Path) -> InferenceSession:
        onnx = pytest.importorskip("perplexit.sessions.onnx")
        from perplexit.compilation.targets import compile  # noqa: PLC0415

        program = compile(folder, to="onnx", output=Path(tempfile.mkdtemp()), **options)
        return onnx.OnnxInferenceSession(program.folder, threads=1)

    return open_program


def _program(engine: str, class_name: str, **options: object) -> Callable[[Path], InferenceSession]:
    """A session of `class_name` over a program compiled from the checkpoint for `engine`."""

    def open_program(folder: Path) -> InferenceSession:
        module = pytest.importorskip(f"perplexit.sessions.{engine}")
        from perplexit.compilation.targets import compile  # noqa: PLC0415

        program = compile(folder, to=engine, output=Path(tempfile.mkdtemp()), **options)
        return getattr(module, class_name)(program.folder, threads=1)

    return open_program


def _openvino(**options: object) -> Callable[[Path], InferenceSession]:
    return _program("openvino", "OpenVinoInferenceSession", **options)


def _cached(
    open_session: Callable[[Path], InferenceSession], **sizes: int
) -> Callable[[Path], InferenceSession]:
    """An engine's session by prefill and decode."""

    def open_cached(folder: Path) -> InferenceSession:
        return cached_session(open_session(folder), **sizes)

    return open_cached


def _tvm(**options: object) -> Callable[[Path], InferenceSession]:
    return _program("tvm", "TvmInferenceSession", **options)


def _pt2(**options: object) -> Callable[[Path], InferenceSession]:
    return _program("pt2", "Pt2InferenceSession", **options)


ENGINES = {
    "pytorch": Engine(PytorchInferenceSession),
    "pytorch-small-chunks": Engine(
        lambda folder: PytorchInferenceSession(folder, max_logits_bytes=7 * 320 * 4)
    ),
    "pytorch-whole-forward": Engine(_whole_forward),
    "pytorch-nf4": Engine(_quantized("nf4"), ("llama", "gpt2"), oracle=_quantized_oracle("nf4")),
    "pytorch-int8": Engine(
        _quantized("int8"), ("llama", "gemma2"), oracle=_quantized_oracle("int8")
    ),
    "pytorch-mxfp6": Engine(
        _quantized("mxfp6"), ("llama", "gpt2"), oracle=_quantized_oracle("mxfp6")
    ),
    "llamacpp": Engine(_llamacpp, models=("llama",)),
    # llama.cpp looks GELU up in a table of 16-bit floats, whatever the weights are
    "llamacpp-gelu-table": Engine(_llamacpp, models=("gpt2",), tolerance=5e-3),
    "onnx": Engine(_onnx()),
    "onnx-logits": Engine(_onnx(perplexity=False)),
    "onnx-fixed-shapes": Engine(_onnx(batch_size=3, max_length=128), models=("llama", "gpt2")),
    "openvino": Engine(_openvino()),
    "openvino-logits": Engine(_openvino(perplexity=False), models=("llama", "gemma2")),
    "openvino-fixed-shapes": Engine(_openvino(batch_size=3, max_length=128), models=("gpt2",)),
    "pytorch-cached": Engine(_cached(PytorchInferenceSession, prompt_len=5)),
    "pytorch-cached-by-chunks": Engine(
        _cached(PytorchInferenceSession, prompt_len=16, decode_chunk=7)
    ),
    "onnx-cached": Engine(
        _cached(_onnx(perplexity=False), prompt_len=5), models=("llama", "gpt2", "gemma2")
    ),
    "onnx-cached-fixed-batch": Engine(
        _cached(_onnx(perplexity=False, batch_size=3), prompt_len=5), models=("llama",)
    ),
    "tvm": Engine(_tvm(max_length=128), models=("llama", "gemma2")),
    "tvm-logits": Engine(_tvm(max_length=128, batch_size=3, perplexity=False), models=("gpt2",)),
    "pt2": Engine(_pt2(max_length=128), models=("llama",)),
    "completions": Engine(without_weights.completions, models=("llama",), knows_weights=False),
    "ngram": Engine(
        without_weights.ngram,
        models=("llama",),
        oracle=without_weights.bigram_model,
        knows_weights=False,
        sees_far=False,
    ),
    "recorded": Engine(without_weights.recorded, models=("llama",), knows_weights=False),
    "pytorch-no-mask": Engine(_bare, models=("llama", "gemma2")),
}
