"""The options of an engine, declared once: type, help and default of each.

The command line makes its options of these entries, `evaluate`, `doctor` and `load_session` take
them as keywords, and a session takes those that mean something to it. A new option is one entry
here, and its use in a session.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypedDict

from perplexit.declared_options import Option, check_numbers, declared
from perplexit.errors import CapabilityError, UsageError
from perplexit.quantization.precisions import precisions_by_engine

DeviceMap = Mapping[str, str | int]


class EngineOptions(TypedDict, total=False):
    """How a model is loaded. What is left out, or None, is the engine's default."""

    dtype: Annotated[str | None, Option("float32, bfloat16 or float16. [default: float32]")]
    quantization: Annotated[
        str | None, Option(f"The weights' precision. {precisions_by_engine()}.", metavar="Q")
    ]
    device: Annotated[
        str | None,
        Option(
            "PyTorch: cpu, cuda, cuda:N, mps, or auto (layers are spread over all devices). ONNX "
            "Runtime: an execution provider. Others: what the program or library was built for. "
            "[default: PyTorch takes cuda where there is one, else cpu]"
        ),
    ]
    threads: Annotated[int | None, Option("CPU threads. [default: the engine's own]", lowest=1)]
    adapter: Annotated[
        str | Path | None,
        Option("Folder of a PEFT adapter (LoRA and similar) for the model.", metavar="DIR"),
    ]
    merge_adapter: Annotated[
        bool, Option("Add the adapter into the weights before scoring.", default=False)
    ]
    attention: Annotated[
        str | None, Option("PyTorch: sdpa, eager or flash_attention_2. [default: sdpa]")
    ]
    head: Annotated[
        str | None,
        Option(
            "PyTorch: how hidden states become losses: chunked; compiled (torch.compile); on CUDA "
            "also liger and cce, which give only the loss. [default: chunked]"
        ),
    ]
    compile_mode: Annotated[
        str | None,
        Option(
            "PyTorch: compile the layers; reduce-overhead replays CUDA graphs.",
            flag="--compile",
            metavar="default|reduce-overhead",
        ),
    ]
    device_map: Annotated[
        DeviceMap | str | Path | None,
        Option(
            "PyTorch: a JSON object of modules and their devices (cuda:0, cpu, disk). --device "
            "auto makes one.",
            metavar="FILE",
        ),
    ]
    tensor_parallel: Annotated[
        int | None,
        Option("PyTorch: split every layer over N processes, one per GPU.", metavar="N", lowest=2),
    ]


class ScoringOptions(EngineOptions, total=False):
    """How a model is loaded, and how windows go through it."""

    mode: Annotated[
        Literal["full", "cached"],
        Option("Whole windows, or prefill and decode against a key/value cache.", default="full"),
    ]
    prompt_len: Annotated[
        int | None, Option("Ids of the prefill, with --mode cached. [default: 1]", lowest=1)
    ]
    decode_chunk: Annotated[
        int | None, Option("Ids per decode call, with --mode cached. [default: 1]", lowest=1)
    ]
    reference_dtype: Annotated[
        Literal["float32", "float16"],
        Option("How --save-reference stores the hidden states.", default="float32"),
    ]


@dataclass(frozen=True, slots=True)
class Only:
    """The values of an option that an engine takes, and the message for any other (with {got})."""

    message: str
    values: tuple[str, ...] = ()


TAKEN_BY_MOST = ("dtype", "quantization", "device", "threads")
_ADAPTER_REMEDY = (
    "adapters are for hf: (PyTorch). For another engine, merge the adapter into the checkpoint, "
    "save that, and compile it"
)


DECLARED = {name: option for name, (_, option) in declared(ScoringOptions).items()}
_DEFAULTS = {name: DECLARED[name].default for name in EngineOptions.__annotations__}


def given_options(kind: type[EngineOptions], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are not None and differ from their defaults.

    Raises UsageError for a name that `kind` does not have, and for a number out of range.
    """
    known = kind.__annotations__
    for name, value in options.items():
        if name not in known:
            raise UsageError(f"expected one of the options {', '.join(known)}; got {name!r:.60}")
        if DECLARED[name].lowest is not None:
            check_numbers(**{name: value})
    return {n: x for n, x in options.items() if x is not None and x != DECLARED[n].default}


def without_settings(model: str, reason: str, values: tuple[str, ...] = ()) -> dict[str, Only]:
    """Return what a kind of model takes that leaves no choice of dtype, quantization, device.

    reason: why, and what to do instead. values: those that change nothing.
    """
    return {
        name: Only(f"expected no --{name} for {model}, got {{got!r}}: {reason}", values)
        for name in ("dtype", "quantization", "device")
    }


def engine_options(
    prefix: str,
    options: Mapping[str, Any],
    *,
    only: Mapping[str, Only] = MappingProxyType({}),
    taken: Sequence[str] = TAKEN_BY_MOST,
) -> EngineOptions:
    """Return all options for the engine with this prefix, with defaults for those left out.

    only: options of which the engine takes some values. taken: options that it takes at all.
    Raises CapabilityError for an option or a value that the engine does not take, and what
    `given_options` raises.
    """
    given = given_options(EngineOptions, options)
    for name, value in given.items():
        if name not in taken:
            remedy = _ADAPTER_REMEDY if "adapter" in name else "leave it out"
            raise CapabilityError(
                f"the engine {prefix!r} has no option {name}, got {str(value)!r}; {remedy}"
            )
        if name in only and value not in only[name].values:
            raise CapabilityError(only[name].message.format(got=value))
    return EngineOptions(**{**_DEFAULTS, **given})  # type: ignore[typeddict-item]
