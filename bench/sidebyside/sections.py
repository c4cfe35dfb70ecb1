"""What `bench/run.py` measures: each section one model, dtype and window, and who takes turns."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sidebyside.contenders import PROGRAMS

EVERYWHERE = ("perplexit", "plain loop", "lm-eval", "gemm")
OTHERS = ("perplexit nll", "hf evaluate", "mlc's hf loop", "llama.cpp")
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
GPT2_POSITIONS = 1024
KINDS = ("fp32", "bf16", "strided", "openvino", "cached")
IDS_A_TURN = 2048


@dataclass(frozen=True, slots=True)
class Section:
    """One alternation.

    base:      whom the others are held against. reference: whose losses, token by token.
    windows:   full windows a turn; with `stride`, one text of that many windows' ids.
    check, check_windows: windows of which length, and how many, are first scored by all in full,
               to tell their losses apart; None where a turn's own losses do.
    """

    name: str
    model: str
    dtype: str
    max_length: int
    contenders: tuple[str, ...]
    windows: int
    base: str = "plain loop"
    reference: str = "perplexit"
    stride: int | None = None
    check: int | None = None
    check_windows: int = 1

    def program_of(self, contender: str) -> tuple[str, str | None] | None:
        """(engine, quantization) of the program that a contender runs; None: the checkpoint."""
        return PROGRAMS.get(contender)


@dataclass(frozen=True, slots=True)
class Script:
    """A measurement that is no alternation: a module of this package that writes its own record.

    opt_in: measured only where it is asked for by name.
    """

    name: str
    module: str
    opt_in: bool = False


SCRIPTS = (
    Script("overhead", "sidebyside.overhead"),
    Script("prepare", "sidebyside.preparing"),
    Script("igf", "sidebyside.igf_labelling"),
    Script("1gb", "sidebyside.flat_memory", opt_in=True),
)


def sections(
    models: Mapping[str, Path],
    lengths: tuple[int, ...],
    ids_a_turn: int = IDS_A_TURN,
    fewest: int = 2,
) -> Iterator[Section]:
    """Every alternation, in an order in which few workers are loaded twice.

    The second model's turns have half the ids: it says whether the first was an exception.
    fewest: windows a turn, however long they are: threads, since Perplexit gives each its own.
    """
    for number, model in enumerate(models):
        first = number == 0
        longest = GPT2_POSITIONS if model == "gpt2" else max(lengths)
        kept = tuple(length for length in lengths if length <= longest)
        middle = kept[min(1, len(kept) - 1)]
        ids = ids_a_turn if first else ids_a_turn // 2
        for length in kept:
            others = OTHERS if first and length == middle else ()
            yield whole_windows(model, "fp32", length, max(fewest, ids // length), others)
        yield strided(model, middle, max(2 * fewest, ids_a_turn // middle))
        if first:
            yield openvino(model, middle, max(fewest, ids // middle))
            yield cached(model, middle, ids // middle)
        for length in kept:
            yield whole_windows(model, "bf16", length, max(fewest, ids // length))


def section_order(name: str) -> tuple[str, int, int]:
    """Where a section comes in a table: by model, what is measured, and window."""
    model, kind, length = name.rsplit("-", 2)
    return model, KINDS.index(kind), int(length)


def whole_windows(
    model: str, label: str, length: int, windows: int, others: tuple[str, ...] = ()
) -> Section:
    """Full windows, each in one forward pass."""
    *most, gemm = EVERYWHERE
    contenders = (*most, *others, gemm)
    name = f"{model}-{label}-{length}"
    return Section(name, model, DTYPES[label], length, contenders, windows)


def strided(model: str, length: int, windows: int) -> Section:
    """Half a window of context before every new half."""
    return Section(
        f"{model}-strided-{length}",
        model,
        "float32",
        length,
        ("perplexit", "hf guide"),
        windows,
        base="hf guide",
        stride=length // 2,
    )


def openvino(model: str, length: int, windows: int) -> Section:
    """Everything that might be the fastest, against the plain loop and the harness in float32."""
    ours = ("openvino fp32", "openvino bf16", "openvino int8", "openvino int8 bf16")
    contenders = ("perplexit", "perplexit bf16", *ours, "plain loop", "lm-eval")
    name = f"{model}-openvino-{length}"
    # More ids for the perplexities than a turn has: bfloat16 takes thousands to tell apart.
    return Section(
        name,
        model,
        "float32",
        length,
        contenders,
        windows,
        check=length,
        check_windows=2 * windows,
    )


def cached(model: str, length: int, windows: int) -> Section:
    """Decode against a cache, as compiled programs are run."""
    ours = ("perplexit cached, 64 windows", "perplexit cached, 128 a call")
    return Section(
        f"{model}-cached-{length}",
        model,
        "float32",
        length,
        (*ours, "one token a call"),
        max(1, windows),
        base="one token a call",
        reference="one token a call",
        check=min(128, length // 2),
    )
