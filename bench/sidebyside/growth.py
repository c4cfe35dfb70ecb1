"""How time and memory grow: with the window, the vocabulary, the batch, the number of documents.

Models are random Llamas, made for one question each: what is asked for is how a cost grows, and
not how large it is. So time is the processor's, on one thread: other work on the machine does not
move it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sidebyside.contenders import Setting
from sidebyside.figures import growth_exponent
from sidebyside.measuring import in_own_process
from sidebyside.pool import Pool, prepare_turn
from sidebyside.telling import Telling
from sidebyside.workloads import Workload

WAYS = ("perplexit nll", "plain loop")
TURNS = 3


@dataclass(frozen=True, slots=True)
class Axis:
    """One size that is varied, and what is held fixed.

    windows, length, vocabulary: None for the one that is varied.
    """

    name: str
    label: str
    sizes: tuple[int, ...]
    windows: int | None
    length: int | None
    vocabulary: int | None
    layers: int = 6

    def at(self, size: int) -> tuple[int, int, int]:
        """(windows, length, vocabulary) of one point."""
        return (
            size if self.windows is None else self.windows,
            size if self.length is None else self.length,
            size if self.vocabulary is None else self.vocabulary,
        )


AXES = (
    Axis("window", "ids a window", (256, 512, 1024, 2048, 4096, 8192), 1, None, 16384),
    Axis("vocabulary", "vocabulary", (8192, 16384, 32768, 65536, 131072), 2, 512, None, layers=2),
    Axis("batch", "windows of 256 ids in a batch", (1, 2, 4, 8, 16, 32), None, 256, 16384),
)
DOCUMENTS = (1_000, 4_000, 16_000, 64_000)


def random_llama(folder: Path, vocabulary: int, layers: int) -> Path:
    """A Llama of hidden size 256 with random weights; called in a process of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed  # noqa: PLC0415 - heavy

    if not (folder / "config.json").exists():
        set_seed(0)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=65536,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def measure_axis(axis: Axis, folder: Path, threads: int, told: Telling) -> dict[str, Any]:
    """Processor seconds and peak bytes of both ways at each size, smallest first."""
    ids = folder / "random-ids.npy"
    most = max(windows * length for windows, length, _ in map(axis.at, axis.sizes))
    np.save(ids, np.random.default_rng(0).integers(0, 8000, most + 1).astype(np.int32))
    points: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with Pool(folder / "logs") as pool:
        for size in axis.sizes:
            windows, length, vocabulary = axis.at(size)
            name = f"llama-{vocabulary}-{axis.layers}"
            model = in_own_process(
                "sidebyside.growth:random_llama", folder / "models" / name, vocabulary, axis.layers
            )
            setting = Setting(str(model), "float32", threads, str(folder / "scratch"))
            workload = Workload.of_windows(ids, windows, length)
            for way, point in _points(pool, setting, workload):
                told(f"{axis.name} {size}: {way}")
                points[way].append({"size": size, **point})
            if axis.vocabulary is None:
                pool.close()
    return {"label": axis.label, "points": points, "exponents": exponents(points)}


def _points(
    pool: Pool, setting: Setting, workload: Workload
) -> Iterator[tuple[str, dict[str, float]]]:
    Path(setting.scratch).mkdir(parents=True, exist_ok=True)
    for way in WAYS:
        worker = pool.worker(way, setting)
        prepare_turn(worker, workload)
        peak = worker.ask(do="memory")["peak_bytes"]
        # The least of the processor's: what disturbs a turn only ever adds to it.
        seconds = min(worker.ask(do="turn")["cpu_seconds"] for _ in range(TURNS))
        yield way, {"seconds": seconds, "peak_bytes": peak}


def exponents(points: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Of each way: how seconds and bytes grow over all sizes, and over the last doubling or so."""
    found: dict[str, dict[str, float]] = {}
    for way, rows in points.items():
        sizes = [row["size"] for row in rows]
        found[way] = {}
        for cost in ("seconds", "peak_bytes"):
            values = [max(row[cost], 1e-9) for row in rows]
            found[way][cost] = growth_exponent(sizes, values)
            found[way][f"{cost}_at_the_end"] = growth_exponent(sizes[-2:], values[-2:])
    return found
