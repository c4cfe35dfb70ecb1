"""Run: the record of one session over one input, as `run.json` holds it."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, NotRequired, TypedDict, get_type_hints

from perplexit.errors import RunError
from perplexit.fingerprints import sha256_of_file
from perplexit.runs.html_table import html_table
from perplexit.runs.measurement import (
    measurement_fingerprint,
    measurement_of,
    plain_json,
    signature_of,
)
from perplexit.runs.record_types import NESTED, CompleteRun
from perplexit.runs.run_tokens import RunTokens
from perplexit.untrusted_files import Expected, read_json, stated, typed

SCHEMA_VERSION = 2
READABLE_VERSIONS = (1, SCHEMA_VERSION)
_EXPECTED = Expected("a run's record", RunError, "evaluate again")
_LARGEST = 64 << 20  # bytes: an input with hundreds of thousands of domains
RUN_FILE = "run.json"
TOKENS_FILE = "tokens.parquet"


@dataclass(frozen=True, repr=False)
class Run:
    """One model on one engine over one prepared input: the figures and their conditions.

    Every field is a key of `run.json`. A figure that does not exist or is not finite is None, and
    `reasons` says why. `nll_sum` is in nats; `perplexity` is always exp(nll_sum / num_tokens);
    `protocol_perplexity` is the protocol's own aggregate where it differs, else None.
    """

    schema_version: int
    perplexit_version: str
    status: str  # "running", "interrupted" or "complete"
    created: str  # UTC, ISO 8601

    perplexity: float | None = None
    perplexity_low: float | None = None
    perplexity_high: float | None = None
    protocol_perplexity: float | None = None
    protocol_perplexity_low: float | None = None
    protocol_perplexity_high: float | None = None
    nll_sum: float | None = None
    num_tokens: int | None = None
    num_bytes: int | None = None
    num_words: int | None = None
    bits_per_byte: float | None = None
    bits_per_byte_low: float | None = None
    bits_per_byte_high: float | None = None
    byte_perplexity: float | None = None
    byte_perplexity_low: float | None = None
    byte_perplexity_high: float | None = None
    word_perplexity: float | None = None
    word_perplexity_low: float | None = None
    word_perplexity_high: float | None = None
    macro_average_perplexity: float | None = None
    macro_average_perplexity_low: float | None = None
    macro_average_perplexity_high: float | None = None
    domains: list[dict[str, Any]] = field(default_factory=list)
    loss_by_position: list[dict[str, Any]] = field(default_factory=list)
    num_non_finite: int = 0

    confidence: float = 0.95
    interval_method: str | None = None
    num_clusters: int | None = None

    input_path: str | None = None  # where the input was; it is known by its fingerprint alone
    input_fingerprint: str = ""
    text_fingerprint: str = ""
    tokenizer_fingerprint: str = ""
    tokenizer_check: dict[str, Any] | None = None  # whether it is the model's own, and by what
    protocol: str = ""
    input_spec: dict[str, Any] = field(default_factory=dict)
    num_documents: int = 0
    num_windows: int = 0
    num_windows_resumed: int = 0

    measurement_fingerprint: str = ""  # of all that decides the numbers beside the input
    model: dict[str, Any] = field(default_factory=dict)
    session: dict[str, Any] = field(default_factory=dict)
    threads: int | None = None
    top_k: int = 0
    on_non_finite: str = "error"
    batch_plan: dict[str, Any] = field(default_factory=dict)

    seconds: dict[str, float | None] = field(default_factory=dict)  # load, prefill, decode, total
    tokens_per_second: float | None = None
    peak_memory_bytes: dict[str, int | None] = field(default_factory=dict)

    reference: dict[str, Any] | None = None  # what the divergence columns were measured from
    saved_reference: dict[str, Any] | None = None  # of a run whose hidden states are kept

    noise_floor: dict[str, Any] | None = None  # the model against itself in other batches

    tokens_sha256: str | None = None  # of tokens.parquet
    reasons: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    folder: Path | None = field(default=None, compare=False, metadata={"json": False})
    states_folder: Any = field(
        default=None, compare=False, repr=False, metadata={"json": False}
    )  # of a run in memory: a TemporaryDirectory with its hidden states
    loaded_tokens: RunTokens | None = field(
        default=None, compare=False, repr=False, metadata={"json": False}
    )

    @classmethod
    def open(cls, folder: str | Path) -> "Run":
        """Return the run that a folder holds, complete or not.

        Raises RunError where there is none, it cannot be read, or its schema is another.
        """
        folder = Path(folder)
        path = folder / RUN_FILE if folder.is_dir() else folder
        if not path.exists():
            raise RunError(
                f"expected a run folder with a {RUN_FILE} in it, got {folder}; "
                "`perplexit eval MODEL INPUT --run FOLDER` makes one"
            )
        record = read_json(path, _EXPECTED, dict[str, Any], largest=_LARGEST)
        return cls.from_json(record, folder=path.parent)

    @classmethod
    def from_json(cls, record: Mapping[str, Any], *, folder: Path | None = None) -> "Run":
        """Return the run of a `run.json` document; raises RunError for another schema."""
        version = record.get("schema_version") if isinstance(record, Mapping) else None
        if version not in READABLE_VERSIONS:
            raise RunError(
                f"expected a run of schema version {' or '.join(map(str, READABLE_VERSIONS))}, "
                f"got {version!r:.40}"
                f"{f' in {folder}' if folder else ''}; use the Perplexit that wrote it, "
                "or evaluate again"
            )
        place = folder or "a run"
        checked = typed(record, _EXPECTED, _record_type(), place=place)
        if checked["status"] == "complete":
            typed(record, _EXPECTED, CompleteRun, place=place)
        known = {f.name for f in fields(cls) if f.metadata.get("json", True)}
        return cls(**{k: v for k, v in record.items() if k in known}, folder=folder)

    def __post_init__(self) -> None:
        """Take the fingerprint of the measurement where it is not given: in a new or older run."""
        if not self.measurement_fingerprint:
            fingerprint = measurement_fingerprint(self.measurement)
            object.__setattr__(self, "measurement_fingerprint", fingerprint)

    def identified(self) -> "Run":
        """Return the run with the fingerprint of what it records now."""
        return replace(self, measurement_fingerprint="")

    @property
    def measurement(self) -> dict[str, Any]:
        """Return all that decides the numbers beside the input; see `measurement_of`."""
        return measurement_of(
            self.model,
            self.session,
            on_non_finite=self.on_non_finite,
            batch_plan=self.batch_plan,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the `run.json` document: plain JSON values, every number finite or null."""
        record = {
            f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get("json", True)
        }
        record["signature"] = self.signature
        return {key: plain_json(value) for key, value in record.items()}

    @cached_property
    def tokens(self) -> RunTokens:
        """Return the per-token results in window order, read from `tokens.parquet` on first use.

        Raises RunError where the run is not complete.
        """
        if self.loaded_tokens is not None:
            return self.loaded_tokens
        return RunTokens.read(self.whole_tokens_file())

    def whole_tokens_file(self) -> Path:
        """Return the path of a complete run's `tokens.parquet`, which is the one that was recorded.

        Raises RunError where the run is not complete, or its tokens are missing or others.
        """
        if self.folder is None or self.status != "complete":
            raise RunError(
                f"expected a complete run, got one that is {self.status}"
                f"{f' in {self.folder}' if self.folder else ''}; "
                "finish it with `perplexit eval` and the same --run"
            )
        damage = self.damage()
        if damage is not None:
            raise RunError(
                f"expected the tokens of the complete run {self.folder}, but {damage}; evaluate "
                "again with the same --run"
            )
        return self.folder / TOKENS_FILE

    def damage(self) -> str | None:
        """Return what is wrong with the tokens of a complete run on disk; None if nothing.

        A run whose tokens are missing, or have another hash than was recorded, is not complete.
        """
        if self.folder is None or self.status != "complete":
            return None
        path = self.folder / TOKENS_FILE
        if not path.is_file():
            return f"its {TOKENS_FILE} is missing"
        with stated(path, _EXPECTED):
            found = None if self.tokens_sha256 is None else sha256_of_file(path)
        if found != self.tokens_sha256:
            return f"its {TOKENS_FILE} is not the file that was recorded (its SHA-256 differs)"
        return None

    @property
    def signature(self) -> str:
        """Return one line that says what was measured: protocol, input, precision and engine."""
        return signature_of(self)

    def to_pandas(self, level: str = "token", *, tokens: Any = None) -> Any:
        """Return a DataFrame of one row per "token", "word", "window" or "document".

        tokens: for words, the run's input where it is not at its place any more.
        Raises what `level_table` raises; MissingPackageError where pandas is not installed.
        """
        tables = import_module("perplexit.runs.level_tables")  # which needs this module
        return tables.level_frame(self, level, tokens=tokens)

    def __str__(self) -> str:
        if self.perplexity is None:
            return f"{self.status} run of {self.model.get('address')}"
        interval = (
            f" [{self.perplexity_low:.4f}, {self.perplexity_high:.4f}]"
            if self.perplexity_low is not None and self.perplexity_high is not None
            else ""
        )
        return (
            f"perplexity {self.perplexity:.4f}{interval} over {self.num_tokens} tokens, "
            f"{self.session.get('engine')} {self.session.get('dtype')}, {self.model.get('address')}"
        )

    def __repr__(self) -> str:
        return f"Run({self})"

    def _repr_html_(self) -> str:
        figures = ("perplexity", "bits_per_byte", "word_perplexity")
        rows = [
            (
                name.replace("_", " "),
                f"{value:.4f}",
                "" if low is None or high is None else f"[{low:.4f}, {high:.4f}]",
            )
            for name in figures
            if (value := getattr(self, name)) is not None
            for low, high in [(getattr(self, f"{name}_low"), getattr(self, f"{name}_high"))]
        ]
        counted = "" if self.num_tokens is None else f"{self.num_tokens:,} tokens"
        why_no_interval = self.reasons.get("perplexity_low")
        notes = [self.signature, *filter(None, [why_no_interval]), *self.warnings]
        title = f"{self.model.get('address')}: {counted or self.status}"
        header = ("figure", "value", f"{100 * self.confidence:g} % interval")
        return html_table(title, rows, header=header, notes=notes)


@cache
def _record_type() -> Any:
    """Return the type of a `run.json`: the fields of Run, with the nested records' types."""
    hints = get_type_hints(Run) | NESTED
    fields_of_json = [f for f in fields(Run) if f.metadata.get("json", True)]
    return TypedDict(  # type: ignore[operator]
        "RunRecord",
        {
            f.name: hints[f.name]
            if f.default is MISSING and f.default_factory is MISSING
            else NotRequired[hints[f.name]]
            for f in fields_of_json
        },
    )
