"""The table of what `bench/run.py` measures: questions, workloads, contenders, aims."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sidebyside.contenders import CEILING
from sidebyside.records import BEST, SAME_TEXT, Aim

GPT2_POSITIONS = 1024
IDS_PER_TURN = 2048


@dataclass(frozen=True, slots=True)
class Section:
    """An entry of the table: an alternation, or a function that measures and returns a record.

    contenders: who take turns. base: the one that the others are compared with. reference: the one
        whose losses are compared token by token.
    function:   `module:function`, called with a Bench in a process of its own.
    opt_in:     measured only where it is asked for by name.
    windows:    full windows in a turn; with `strided`, one text of that many windows' ids, scored
        every half window.
    check, check_windows: windows of which length, and how many, all contenders score in full first,
        so that their losses can be compared; None where a turn's own losses do.
    threads, rounds: in place of the bench's own.
    """

    name: str
    question: str
    contenders: tuple[str, ...] = ()
    aims: tuple[Aim, ...] = ()
    function: str = ""
    opt_in: bool = False
    base: str = "plain loop"
    reference: str = "perplexit"
    model: str = ""
    dtype: str = "float32"
    max_length: int = 0
    windows: int = 0
    strided: bool = False
    check: int | None = None
    check_windows: int = 1
    threads: int | None = None
    rounds: int | None = None
    random_ids: bool = False
    device: str = "cpu"
    batch_size: int | None = None

    def of(self, model: str, max_length: int, windows: int, **changes: Any) -> "Section":
        """Return the section of a model and a window length; its name says both."""
        name = f"{model}-{self.name}-{max_length}"
        sized = replace(self, name=name, model=model, max_length=max_length, windows=windows)
        return replace(sized, **changes)


@dataclass(frozen=True, slots=True)
class Axis:
    """One size that is varied: windows, length or vocabulary, whichever is None."""

    label: str
    sizes: tuple[int, ...]
    windows: int | None
    length: int | None
    vocabulary: int | None
    layers: int = 6

    def at(self, size: int) -> tuple[int, int, int]:
        """Return (windows, length, vocabulary) of one point."""
        fixed = (self.windows, self.length, self.vocabulary)
        windows, length, vocabulary = (size if value is None else value for value in fixed)
        return windows, length, vocabulary


def _whole_windows(ceiling: float) -> tuple[Aim, ...]:
    """Return the aims of whole windows."""
    return (
        Aim("speed", "perplexit", "plain loop", 1.08),
        Aim("speed", "perplexit", "lm-eval", 1.15),
        Aim("ceiling", "perplexit", "", ceiling),
        Aim("peak", "perplexit", "plain loop", 0.25),
        Aim("peak", "perplexit", "lm-eval", 0.25),
    )


def _cached(*names: str) -> tuple[Aim, ...]:
    """Return the aims of decoding."""
    speeds = [Aim("speed", name, "one token a call", 10.0) for name in names]
    return (*speeds, *(Aim("token", name, "", 1e-3) for name in names))


def _openvino(*programs: str) -> tuple[Aim, ...]:
    """Return the aims of OpenVINO's programs."""
    fp32 = Aim("speed", "openvino fp32", "plain loop", 1.2), Aim("token", "openvino fp32", "", 1e-3)
    speeds = [Aim("speed", name, "plain loop", 1.7) for name in programs]
    references = [f"perplexit{' bf16' * (name == 'openvino bf16')}" for name in programs]
    near = [Aim("perplexity", *pair, 5e-3) for pair in zip(programs, references, strict=True)]
    best = Aim("best", BEST, "lm-eval", 2.0), Aim("perplexity", BEST, "lm-eval", SAME_TEXT)
    return (*fp32, *speeds, *near, *best)


WHOLE = ("perplexit", "plain loop", "lm-eval", CEILING)
OTHERS = ("perplexit nll", "hf evaluate", "mlc's hf loop", "llama.cpp")
PYTORCH = ("perplexit", "perplexit bf16")
OPENVINO = ("openvino bf16", "openvino int8", "openvino int8 bf16")
CACHED = ("perplexit cached, 64 windows", "perplexit cached, 128 a call")
ON_CUDA = ("perplexit, compiled head", "perplexit", "lm-eval", "lm-eval's algorithm", CEILING)
GROWING: dict[str, Any] = {
    "contenders": ("perplexit nll", "plain loop"),
    "reference": "perplexit nll",
}
GROWING |= {"threads": 1, "rounds": 3, "random_ids": True, "opt_in": True}
FP32 = Section("fp32", "Whole windows, float32: how fast?", WHOLE, _whole_windows(0.75))
STRIDED = Section(
    "strided",
    "Half a window of context before every new half: how fast?",
    ("perplexit", "hf guide"),
    (Aim("speed", "perplexit", "hf guide", 1.2),),
    base="hf guide",
    strided=True,
)
BEST_ENGINE = Section(
    "openvino",
    "What is the fastest way to float32's perplexity?",
    (*PYTORCH, "openvino fp32", *OPENVINO, "plain loop", "lm-eval"),
    _openvino(*OPENVINO),
)
DECODING = Section(
    "cached",
    "Decoding against a key/value cache: how fast?",
    (*CACHED, "one token a call"),
    _cached(*CACHED),
    base="one token a call",
    reference="one token a call",
)
BF16 = replace(
    FP32,
    name="bf16",
    question="Whole windows, bfloat16: how fast?",
    dtype="bfloat16",
    aims=_whole_windows(0.60),
)
CUDA = Section(
    "cuda",
    "On a CUDA device: how fast, and how near to the device's own products?",
    ON_CUDA,
    (
        Aim("ceiling", "perplexit, compiled head", "", 0.60),
        Aim("speed", "perplexit, compiled head", "lm-eval", 1.30),
        Aim("peak", "perplexit, compiled head", "lm-eval", 0.10),
    ),
    base="lm-eval",
    random_ids=True,
)
FUNCTIONS = (
    Section(
        "overhead",
        "What does an evaluation cost beside its model?",
        function="sidebyside.overhead:measure",
        aims=(Aim("overhead", "", "", 0.03),),
    ),
    Section(
        "prepare",
        "How long does `prepare` take beside the tokenizer's own batch encoding?",
        function="sidebyside.preparing:measure_beside_encoding",
        aims=(Aim("prepare", "", "", 1.2),),
    ),
    Section(
        "igf",
        "How many labels of information gain a second, against the original's way?",
        function="igf_labels:measure_in_turns",
    ),
    Section(
        "1gb",
        "Does memory stay flat while 1 GB of documents is prepared?",
        function="sidebyside.preparing:measure_large_corpus",
        opt_in=True,
    ),
    Section(
        "growth-documents",
        "How do `prepare` and `evaluate` grow with the number of documents?",
        function="sidebyside.preparing:measure_many_documents",
        opt_in=True,
    ),
)
AXES = {
    "window": Axis("ids per window", (256, 512, 1024, 2048, 4096, 8192), 1, None, 16384),
    "vocabulary": Axis("vocabulary", (8192, 16384, 32768, 65536, 131072), 2, 512, None, layers=2),
    "batch": Axis("windows of 256 ids in a batch", (1, 2, 4, 8, 16, 32), None, 256, 16384),
}
SMALL_LLAMA = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 4,
    "max_position_embeddings": 65536,
}
# name → the function that makes the checkpoint, and what it is given beside a folder.
MODELS: dict[str, tuple[Any, ...]] = {
    "demo": ("sidebyside.checkpoints:demo_model",),
    "gpt2": ("sidebyside.checkpoints:random_gpt2",),
}
KINDS = {kind.name: kind for kind in (FP32, BF16, STRIDED, BEST_ENGINE, DECODING, CUDA)}


def alternations(
    models: Sequence[str],
    lengths: tuple[int, ...],
    ids_per_turn: int = IDS_PER_TURN,
    fewest: int = 2,
) -> Iterator[Section]:
    """Yield every alternation that is measured by default.

    The second model's turns have half the ids: it says whether the first was an exception.
    fewest: windows in a turn, however long they are: threads, since Perplexit gives each its own.
    """
    for number, model in enumerate(models):
        first = number == 0
        longest = GPT2_POSITIONS if model == "gpt2" else max(lengths)
        kept = tuple(length for length in lengths if length <= longest)
        middle = kept[min(1, len(kept) - 1)]
        ids = ids_per_turn if first else ids_per_turn // 2
        for length in kept:
            more = {"contenders": (*WHOLE[:-1], *OTHERS, CEILING)} if length == middle else {}
            yield FP32.of(model, length, max(fewest, ids // length), **(more if first else {}))
        yield STRIDED.of(model, middle, max(2 * fewest, ids_per_turn // middle))
        if first:
            windows = max(fewest, ids // middle)
            # More ids for the perplexities than a turn has: bfloat16 takes thousands to tell apart.
            check = {"check": middle, "check_windows": 2 * windows}
            yield BEST_ENGINE.of(model, middle, windows, **check)
            yield DECODING.of(model, middle, max(1, ids // middle), check=min(128, middle // 2))
        for length in kept:
            yield BF16.of(model, length, max(fewest, ids // length))


def growth_sections() -> Iterator[Section]:
    """Yield the points of each axis, smallest first: `growth-AXIS-SIZE`.

    The models are random Llamas: the question is how a cost grows, and not how large it is. So
    time is the processor's, on one thread: other work on the machine does not move it.
    """
    for name, axis in AXES.items():
        for size in axis.sizes:
            windows, length, vocabulary = axis.at(size)
            model = f"llama-{vocabulary}-{axis.layers}"
            config = SMALL_LLAMA | {"vocab_size": vocabulary, "num_hidden_layers": axis.layers}
            MODELS[model] = ("sidebyside.checkpoints:random_llama", config)
            question = f"How do time and memory grow with the {name}? At {size}."
            point = Section("", question, **GROWING).of(model, length, windows)
            yield replace(point, name=f"growth-{name}-{size}")


def aims_of(name: str) -> tuple[Aim, ...]:
    """Return the aims of the entry that a record's name belongs to; of growth there are none."""
    kind = KINDS.get(name.rsplit("-", 2)[min(1, name.count("-"))])
    return kind.aims if kind else {entry.name: entry.aims for entry in FUNCTIONS}.get(name, ())


def section_order(name: str) -> tuple[str, int, int]:
    """Return where a section comes in a table: by model, what is measured, and size."""
    model, kind, size = name.rsplit("-", 2)
    return model, [*KINDS, *AXES].index(kind), int(size)
