"""The sections of `sections.toml`, and those that follow from a list: models, sizes, tricks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from perplexit.resources.engine_tricks import ENGINE_TRICKS
from sidebyside.contenders import TABLES

GPT2_POSITIONS = 1024
IDS_PER_TURN = 2048
OTHERS = ("perplexit nll", "hf evaluate", "mlc's hf loop", "llama.cpp")
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
SIZED = ("fp32", "bf16", "strided", "openvino", "cached")  # sections of a model and a length


@dataclass(frozen=True, slots=True)
class Section:
    """An entry of the table: an alternation, or a function that measures and returns a record.

    kind:       the table's entry; name: the same with model and size, where it has them.
    aims:       limits: a name of MEASURES, a contender, another one where it needs it, the limit.
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
    mirrored:   the second half of the rounds follows a loading in reverse order; see decision 15.
    warms_up:   a turn comes before the one whose memory counts. A program that keeps the buffers of
        its fixed shapes takes all of its memory in the first.
    """

    kind: str
    question: str
    contenders: Sequence[str] = ()
    aims: Sequence[Sequence[Any]] = ()
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
    mirrored: bool = False
    warms_up: bool = True
    device: str = "cpu"
    batch_size: int | None = None

    def of(self, model: str, max_length: int, windows: int, **changes: Any) -> "Section":
        """Return the section of a model and a window length; its name says both."""
        changes |= {"model": model, "max_length": max_length, "windows": windows}
        return replace(self, name=f"{model}-{self.kind}-{max_length}", **changes)


def _trick(trick: str, short: str) -> Section:
    """Return the section of one engine trick: scoring with it and without it."""
    engine = trick.partition("_")[0]
    name = {"openvino": "openvino", "tvm": "tvm 32"}.get(engine, "perplexit nll")
    without = f"{name} without {trick}"
    question = f"What does the engine trick {trick} gain in {short}, in speed and in memory?"
    options = TABLES["trick"] | TABLES["slow-trick"].get(trick, {}) | {"dtype": DTYPES[short]}
    return Section(f"trick-{trick}-{short}", question, (name, without), base=without, **options)


_TRICKS = [_trick(trick, short) for trick in ENGINE_TRICKS for short in DTYPES]
KINDS = {kind: Section(kind, **entry) for kind, entry in TABLES["sections"].items()}
KINDS |= {section.kind: section for section in _TRICKS}


def alternations(
    models: Sequence[str], lengths: Sequence[int], ids_per_turn: int = IDS_PER_TURN, fewest: int = 2
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
            fp32, windows = KINDS["fp32"], max(fewest, ids // length)
            others = OTHERS if first and length == middle else ()
            yield fp32.of(model, length, windows, contenders=(*fp32.contenders, *others))
            yield KINDS["bf16"].of(model, length, windows)
        yield KINDS["strided"].of(model, middle, max(2 * fewest, ids_per_turn // middle))
        if first:
            windows = max(fewest, ids // middle)
            # More ids for the perplexities than a turn has: bfloat16 takes thousands to tell apart.
            check = {"check": middle, "check_windows": 2 * windows}
            yield KINDS["openvino"].of(model, middle, windows, **check)
            check = {"check": min(128, middle // 2)}
            yield KINDS["cached"].of(model, middle, max(1, ids // middle), **check)


def fixed_sections(quick: bool, fewest: int) -> Iterator[Section]:
    """Yield the sections of one size. fewest: windows in a turn."""
    for section in [KINDS[kind] for kind in KINDS if kind not in (*SIZED, "growth")]:
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
