"""The table of what `bench/run.py` measures: questions, workloads, contenders, aims."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from perplexit.resources.engine_tricks import ENGINE_TRICKS
from sidebyside.contenders import CEILING, FUSED_ON_CUDA
from sidebyside.records import BEST, SAME_TEXT, Aim

GPT2_POSITIONS = 1024
IDS_PER_TURN = 2048


@dataclass(frozen=True, slots=True)
class Section:
    """An entry of the table: an alternation, or a function that measures and returns a record.

    kind:       the table's entry; name: the same with model and size, where it has them.
    contenders: who take turns; losses are compared, token by token, with the first one's. base: the
        one whose speed the others' is compared with.
    function:   `MODULE:FUNCTION`, called with a Bench in a process of its own; it returns a record
        with "rows", one mapping of columns to values per row of its table.
    opt_in:     measured only where it is asked for by name. quick: what `--quick` changes.
    windows:    full windows in a turn; with `strided`, one text of that many windows' ids, scored
        every half window; 0: IDS_PER_TURN ids, and at least a window per thread.
    check, check_windows: windows of which length, and how many, all contenders score in full first,
        so that their losses can be compared; None where a turn's own losses do.
    threads, rounds: in place of the bench's own.
    """

    kind: str
    question: str
    contenders: tuple[str, ...] = ()
    aims: tuple[Aim, ...] = ()
    name: str = ""
    function: str = ""
    opt_in: bool = False
    quick: Mapping[str, Any] = field(default_factory=dict)
    unit: str = "tokens"
    base: str = "plain loop"
    model: str = "demo"
    dtype: str = "float32"
    max_length: int = 0
    windows: int = 0
    strided: bool = False
    check: int | None = None
    check_windows: int = 1
    counts_tensors: bool = False
    threads: int | None = None
    rounds: int | None = None
    random_ids: bool = False
    device: str = "cpu"
    batch_size: int | None = None

    def of(self, model: str, max_length: int, windows: int, **changes: Any) -> "Section":
        """Return the section of a model and a window length; its name says both."""
        name = f"{model}-{self.kind}-{max_length}"
        sized = replace(self, name=name, model=model, max_length=max_length, windows=windows)
        return replace(sized, **changes)


def _speeds(limit: float, base: str, *names: str) -> tuple[Aim, ...]:
    return tuple(Aim("speed", name, base, limit) for name in names)


def _whole_windows(ceiling: float) -> tuple[Aim, ...]:
    return (
        *_speeds(1.08, "plain loop", "perplexit"),
        *_speeds(1.15, "lm-eval", "perplexit"),
        Aim("ceiling", "perplexit", "", ceiling),
        *(Aim("peak", "perplexit", base, 0.25) for base in ("plain loop", "lm-eval")),
    )


WHOLE = ("perplexit", "plain loop", "lm-eval", CEILING)
OTHERS = ("perplexit nll", "hf evaluate", "mlc's hf loop", "llama.cpp")
PYTORCH = ("perplexit", "perplexit bf16")
OPENVINO = ("openvino bf16", "openvino int8", "openvino int8 bf16")
CACHED = ("perplexit cached, 64 windows", "perplexit cached, 128 a call")
ON_CUDA = ("perplexit, compiled head", "perplexit", "lm-eval", "lm-eval's algorithm", CEILING)
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
FP32 = Section("fp32", "Whole windows, float32: how fast?", WHOLE, _whole_windows(0.75))
BF16 = replace(
    FP32,
    kind="bf16",
    question="Whole windows, bfloat16: how fast?",
    dtype="bfloat16",
    aims=_whole_windows(0.60),
)
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
    (
        *_speeds(1.2, "plain loop", "openvino fp32"),
        Aim("token", "openvino fp32", "", 1e-3),
        *_speeds(1.7, "plain loop", *OPENVINO),
        Aim("perplexity", "openvino bf16", "perplexit bf16", 5e-3),
        *(Aim("perplexity", name, "perplexit", 5e-3) for name in OPENVINO[1:]),
        Aim("best", BEST, "lm-eval", 2.0),
        Aim("perplexity", BEST, "lm-eval", SAME_TEXT),
    ),
)
DECODING = Section(
    "cached",
    "Decoding against a key/value cache: how fast?",
    ("one token a call", *CACHED),
    (
        *_speeds(10.0, "one token a call", *CACHED),
        *(Aim("token", name, "", 1e-3) for name in CACHED),
    ),
    base="one token a call",
)
SIZED = (FP32, BF16, STRIDED, BEST_ENGINE, DECODING)
IGF_WAYS = ("original", "exact", "first-order", "directional", "context pass", "forward")
IGF = Section(
    "igf",
    "How many labels of information gain a second, against the original's way?",
    tuple(f"igf {way}" for way in IGF_WAYS),
    base="igf original",
    unit="labels",
    windows=100,  # of the objective
    max_length=32,
    rounds=2,  # the original takes long
    quick={"windows": 8, "rounds": 1},
)
CUDA = Section(
    "cuda",
    "On a CUDA device: how fast, and how near to the device's own products?",
    (*ON_CUDA, *FUSED_ON_CUDA),
    (
        Aim("ceiling", "perplexit, compiled head", "", 0.60),
        Aim("speed", "perplexit, compiled head", "lm-eval", 1.30),
        Aim("peak", "perplexit, compiled head", "lm-eval", 0.10),
    ),
    opt_in=True,
    base="lm-eval",
    model="llama-large",
    dtype="bfloat16",
    windows=32,
    max_length=4096,
    rounds=7,
    random_ids=True,
    device="cuda",
    batch_size=1,
    quick={"model": "gpt2", "windows": 2, "max_length": 256, "rounds": 2, "device": "cpu"},
)


def _against(name: str, short: str) -> Section:
    """Return the section of one way to score, in this version and in that of `--against`."""
    return Section(
        f"against-{name.replace('perplexit', 'pytorch')}-{short}",
        f"{name}, {short}: how fast beside the version of `--against`?",
        (name, f"{name}, before"),
        opt_in=True,
        base=f"{name}, before",
        dtype=DTYPES[short],
        max_length=1024,
        rounds=7,
        quick={"max_length": 256, "rounds": 2},
    )


def _trick(trick: str, short: str) -> Section:
    """Return the section of one engine trick: scoring with it and without it."""
    engine = trick.partition("_")[0]
    name = engine if engine in ("openvino", "tvm") else "perplexit nll"
    return replace(
        _against(name, short),
        kind=f"trick-{trick}-{short}",
        question=f"What does the engine trick {trick} gain in {short}, in speed and in memory?",
        contenders=(name, f"{name} without {trick}"),
        base=f"{name} without {trick}",
    )


MEASURED = {
    "engines": ("engines:every_engine", "Every engine and precision, on one text."),
    "1gb": ("preparing:large_corpus", "Does memory stay flat while 1 GB of text is prepared?"),
    "reference": ("exactness:stored_reference", "How exact is the KL of a stored reference?"),
    "rounded-twice": ("exactness:rounded_twice", "What does int4 cost on weights rounded before?"),
    "loss-drift": ("exactness:loss_drift", "How far are real losses from independent?"),
    "igf-fidelity": ("igf_labels:fidelity", "How well do fast labels agree with exact ones?"),
}
MEASURED |= {
    f"igf-{setting}": (
        f"igf_experiments:experiment:{setting}",
        f"What does information gain filtration gain, setting {setting}?",
    )
    for setting in ("shift", "same-domain", "longer", "demo")
}
FIXED = (
    Section(
        "overhead",
        "What does an evaluation cost beside its model?",
        ("run", "run, replayed"),
        (Aim("share", "run, replayed", "run", 0.03),),
        base="run",
        windows=10,
        max_length=1024,
        rounds=2,
        quick={"max_length": 256},
    ),
    Section(
        "prepare",
        "How long does `prepare` take beside the tokenizer's own batch encoding?",
        aims=(Aim("row", "times `encode_batch`", "", 1.2),),
        function="preparing:beside_encoding",
    ),
    IGF,
    replace(
        IGF,
        kind="igf-memory",
        question="How much memory do labels of information gain take, set-up included?",
        opt_in=True,
        windows=34,
        rounds=1,
        counts_tensors=True,
    ),
    *(
        Section(kind, question, function=function, opt_in=True)
        for kind, (function, question) in MEASURED.items()
    ),
    *(
        Section(
            f"program-memory-{engine}",
            "What does a window of 1024 ids add to a program, head inside and with logits?",
            (engine, f"{engine}, logits"),
            opt_in=True,
            base=f"{engine}, logits",
            model="llama-shallow",
            windows=1,
            max_length=1024,
            threads=1,
            rounds=1,
            random_ids=True,
        )
        for engine in ("pt2", "tvm")
    ),
    *(
        Section(
            f"memory-tracker-{base}",
            f"What does MemoryTracker cost {base}, with Python traced and torch counted?",
            (base, *(f"{base}, {counted}" for counted in counting)),
            opt_in=True,
            base=base,
            unit=base,
            windows=1,
            max_length=32,
            threads=1,
        )
        for base, counting in {"objects": ("traced",), "operations": ("counted", "both")}.items()
    ),
    *(_trick(trick, short) for trick in ENGINE_TRICKS for short in DTYPES),
    *(_against(name, short) for name in ("perplexit", "openvino") for short in DTYPES),
    CUDA,
)
GROWTH = Section(
    "growth",
    "How do time and memory grow with one size?",
    ("perplexit nll", "plain loop"),
    opt_in=True,
    threads=1,
    rounds=3,
    random_ids=True,
)
KINDS = {section.kind: section for section in (*SIZED, *FIXED, GROWTH)}
SMALL_LLAMA = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 4,
    "max_position_embeddings": 65536,
}
SHALLOW_LLAMA = {
    "vocab_size": 49_152,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
LARGE_LLAMA = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "rope_theta": 500_000.0,
    "max_position_embeddings": 8192,
    "dtype": "bfloat16",
}
# name → the function that makes the checkpoint, and what it is given beside a folder.
MODELS: dict[str, tuple[Any, ...]] = {
    "demo": ("checkpoints:demo_model",),
    "gpt2": ("checkpoints:random_gpt2",),
    "llama-large": ("checkpoints:random_llama", LARGE_LLAMA),
    "llama-shallow": ("checkpoints:random_llama", SHALLOW_LLAMA),
}


def alternations(
    models: Sequence[str],
    lengths: tuple[int, ...],
    ids_per_turn: int = IDS_PER_TURN,
    fewest: int = 2,
) -> Iterator[Section]:
    """Yield the alternations of every model and window length.

    The second model has the middle length alone and turns of half the ids: it says whether the
    first was an exception.
    fewest: windows in a turn, however long they are: threads, since Perplexit gives each its own.
    """
    for number, model in enumerate(models):
        first = number == 0
        longest = GPT2_POSITIONS if model == "gpt2" else max(lengths)
        kept = tuple(length for length in lengths if length <= longest)
        middle = kept[min(1, len(kept) - 1)]
        ids = ids_per_turn if first else ids_per_turn // 2
        for length in kept if first else (middle,):
            more = {"contenders": (*WHOLE[:-1], *OTHERS, CEILING)} if length == middle else {}
            windows = max(fewest, ids // length)
            yield FP32.of(model, length, windows, **(more if first else {}))
            yield BF16.of(model, length, windows)
        yield STRIDED.of(model, middle, max(2 * fewest, ids_per_turn // middle))
        if first:
            windows = max(fewest, ids // middle)
            # More ids for the perplexities than a turn has: bfloat16 takes thousands to tell apart.
            check = {"check": middle, "check_windows": 2 * windows}
            yield BEST_ENGINE.of(model, middle, windows, **check)
            yield DECODING.of(model, middle, max(1, ids // middle), check=min(128, middle // 2))


def fixed_sections(quick: bool, fewest: int) -> Iterator[Section]:
    """Yield the sections of one size. fewest: windows in a turn."""
    for section in FIXED:
        changed = replace(section, **section.quick) if quick else section
        if changed.contenders and not changed.windows:
            usual = fewest if quick else IDS_PER_TURN // changed.max_length
            changed = replace(changed, windows=max(fewest, usual))
        yield replace(changed, name=changed.kind)


def section_order(kind: str, name: str) -> tuple[int, list[tuple[int, str]]]:
    """Return where a record comes in the report: by the table's entry, by model, by size."""
    return list(KINDS).index(kind), [
        (int(part), "") if part.isdigit() else (0, part) for part in name.split("-")
    ]
