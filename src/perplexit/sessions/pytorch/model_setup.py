"""From options to a model that is ready to score, and the description of what was set up."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from perplexit.checkpoints.length_dependent_rope import LengthDependentRope
from perplexit.checkpoints.module_call import dtype_name, num_embeddings
from perplexit.errors import CapabilityError, ModelError
from perplexit.session_descriptions import SessionDescription
from perplexit.sessions.pytorch.compiled import CompiledForward, with_head
from perplexit.sessions.pytorch.cpu_kernels.layout import heads_in_blocks, kernels_for
from perplexit.sessions.pytorch.cpu_kernels.window_threads import WindowThreads
from perplexit.sessions.pytorch.cuda import chunk_rows_for
from perplexit.sessions.pytorch.forward import ForwardPass, LinearHead
from perplexit.sessions.pytorch.forward_probe import find_forward
from perplexit.sessions.pytorch.loading import OpenedModule, open_module
from perplexit.sessions.pytorch.placement import (
    GatheredForward,
    LoadingOptions,
    embedding_device,
    places_of,
)
from perplexit.sessions.pytorch.tensor_parallel import LeadingForward
from perplexit.sessions.pytorch.window_batches import WindowBatches


@dataclass(frozen=True, slots=True)
class ReadyModel:
    """A module that is loaded and set up, what runs windows through it, and its description.

    id_limit: ids from 0 to below it have an embedding and a logit.
    """

    opened: OpenedModule
    windows: WindowBatches
    id_limit: int
    description: SessionDescription


def ready_model(
    model: str | Path | nn.Module,
    given: Mapping[str, Any],
    *,
    kernels: str | None,
    max_logits_bytes: int | None,
) -> ReadyModel:
    """Load the model and set it up as `given` says: every EngineOptions value by its name."""
    compiled = given["compile_mode"] is not None
    asked = LoadingOptions(**{each.name: given[each.name] for each in fields(LoadingOptions)})
    opened = open_module(model, asked, dtype=given["dtype"], threads=given["threads"])
    rope = _length_dependent_rope(opened, compiled=compiled)
    num_rows = num_embeddings(opened.module)
    with opened.scoring():
        on_kernels = kernels_for(opened, kernels, compiled=compiled)
        forward, num_logits = _first_forward(
            opened, num_rows or 2, blocked_head=heads_in_blocks(kernels)
        )
        forward = _wrapped(forward, opened, given["compile_mode"], given["head"])
    aside = on_kernels.get("windows_side_by_side") and opened.threads > 1
    threads = WindowThreads(opened.threads) if aside else None
    chunk_rows = chunk_rows_for(opened.device, num_logits, max_logits_bytes)
    windows = WindowBatches(forward, opened.device, chunk_rows, num_logits, threads, rope)
    description = _described(opened, windows, given["compile_mode"], on_kernels)
    return ReadyModel(opened, windows, min(num_rows or num_logits, num_logits), description)


def _first_forward(
    opened: OpenedModule, id_limit: int, *, blocked_head: bool
) -> tuple[ForwardPass, int]:
    """Find the forward pass of the module, when it runs for the first time; see `find_forward`.

    Raises ModelError too where spread layers cannot run: a tied head that a map puts elsewhere.
    """
    try:
        return find_forward(
            opened.module, id_limit, row_by_row=opened.batch_invariant, blocked_head=blocked_head
        )
    except (RuntimeError, ValueError, KeyError, NotImplementedError) as error:
        if opened.group is not None:
            raise opened.group.failure(error) from error
        if not opened.spread:
            raise
        raise ModelError(
            f"expected a device map that {type(opened.module).__name__} can run with, but it "
            f"fails ({type(error).__name__}: {str(error)[:200]}); keep what shares weights (a "
            "tied head and its embedding) on one device, or use the device auto"
        ) from error


def _wrapped(
    forward: ForwardPass, opened: OpenedModule, compile_mode: str | None, head: str | None
) -> ForwardPass:
    """Wrap the forward pass as asked for, innermost first; each wrapper says what it raises."""
    if compile_mode is not None:
        _check_compilable(opened, alone=forward.alone)
    if opened.group is not None:
        forward = LeadingForward(forward, opened.group)
    elif opened.spread:
        forward = GatheredForward(forward, embedding_device(opened.module), opened.device)
    if compile_mode is not None:
        forward = CompiledForward(forward, compile_mode, opened.device)
    return with_head(forward, head, opened.module, opened.device)


def _check_compilable(opened: OpenedModule, *, alone: bool) -> None:
    if opened.group is not None or opened.spread:
        raise CapabilityError(
            "--compile is for layers on one device in one process, but these are split; leave "
            "--compile or the split out"
        )
    if alone:
        raise CapabilityError(
            "--compile pads batches to a few shapes, but this model's predictions change with the "
            "batch or its padding; leave --compile out"
        )
    if not opened.batch_invariant:
        raise CapabilityError(
            "--compile pads batches to a few shapes, but this quantization rounds a whole batch "
            "together, padding included; leave one of the two out"
        )


def _length_dependent_rope(opened: OpenedModule, *, compiled: bool) -> LengthDependentRope | None:
    """Return the module's rotary embeddings that depend on a window's length; None without any.

    Raises CapabilityError where the layers run elsewhere than in this process's own forward.
    """
    with opened.scoring():
        rope = LengthDependentRope.of(opened.module)
    if rope is not None and (compiled or opened.group is not None):
        what = "--compile" if compiled else "--tensor-parallel"
        raise CapabilityError(
            f"expected a model whose layers {what} can run, but the RoPE of "
            f"{type(opened.module).__name__} ({rope.kinds}) depends on each window's length, "
            f"which must be set between calls; leave {what} out"
        )
    return rope


def _described(
    opened: OpenedModule,
    windows: WindowBatches,
    compile_mode: str | None,
    kernels: Mapping[str, Any],
) -> SessionDescription:
    """Describe PyTorch and the settings in effect; what was not asked for has no entry."""
    forward, rope = windows.forward, windows.rope
    config = getattr(opened.module, "config", None)
    settings: dict[str, Any] = {
        "transformers": transformers.__version__,
        "attention": getattr(config, "_attn_implementation", None),
        "head": forward.kind,
        "chunk_rows": windows.chunk_rows,
        "num_logits": windows.num_logits,
        "float32_matmul_precision": "highest",
    }
    asked_for: dict[str, Any] = {
        "windows_alone": forward.alone or None,
        "rope_by_window_length": rope and rope.kinds,
        "weights": opened.weights and dict(opened.weights),
        "compile": compile_mode,
        "modules_by_device": places_of(opened.module, opened.device) if opened.spread else None,
        "tensor_parallel": opened.group and opened.group.size,
        **kernels,
        "head_in_blocks": isinstance(forward.head, LinearHead) and forward.head.blocked,
        "head_library": getattr(forward, "library", None),
    }
    settings |= {name: value for name, value in asked_for.items() if value is not None}
    return SessionDescription(
        engine="pytorch",
        version=torch.__version__,
        dtype=dtype_name(opened.module),
        device=str(opened.device),
        quantization=opened.describe_quantization(),
        threads=opened.threads,
        settings=settings,
    )
