"""Each reader: the sound files it is shown, how they are changed, and how they are read."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

import gguf
import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from safetensors.numpy import load_file, save_file

from perplexit import program_record as p
from perplexit.checkpoints.adapters import find_adapter
from perplexit.checkpoints.identity import read_config, weight_files, weights_fingerprint
from perplexit.cli.record_tables import run_table, runs_table
from perplexit.comparison import compare_runs
from perplexit.igf.articles import Articles
from perplexit.igf.experiment_file import Experiment
from perplexit.igf.learners import RidgeLearner, load_learner, save_learner
from perplexit.igf.pairs import Pairs
from perplexit.inputs.gguf_header_check import metadata_fingerprint
from perplexit.inputs.id_lines import import_id_lines
from perplexit.inputs.kl_base_file import MAGIC, KlBaseFile
from perplexit.inputs.preparing import prepare
from perplexit.inputs.token_file import TokenFile
from perplexit.inputs.tokenizer_sources import load_tokenizer
from perplexit.inputs.windows import WindowIds
from perplexit.program_record import ProgramMetadata
from perplexit.quantization.gguf_header import read_gguf_header
from perplexit.reference.states import FOLDER, ReferenceStates, StatesWriter
from perplexit.runs.level_tables import export_tokens
from perplexit.runs.run import Run
from perplexit.runs.run_figures import verify_run
from perplexit.runs.store import RunStore, ScoredBatch, UnreadableRun, find_runs
from perplexit.sessions.loss_file import RecordedInferenceSession
from perplexit.sessions.pytorch.placement import read_device_map
from perplexit.sessions.registry import split_address
from perplexit.token_columns import TokenDetails
from tests.forged_token_files import content_of, write_forged
from tests.proofs.fuzz.mutations import changed_array, changed_bytes, changed_json, changed_table
from tests.report_runs import toy_runs
from tests.unit import tokenizer_zoo as zoo

Change = Callable[[Path, Random], None]


@dataclass(frozen=True)
class Reader:
    """make: writes sound files into a folder. change: spoils them. read: reads all there is.

    `read` raises AssertionError where what it was given without an error makes no sense.
    """

    name: str
    make: Callable[[Path], None]
    change: Change
    read: Callable[[Path], Any]


def json_file(name: str) -> Change:
    """A change of one JSON file."""

    def change(folder: Path, random: Random) -> None:
        path = folder / name
        path.write_bytes(changed_json(json.loads(path.read_text("utf-8")), random))

    return change


def lines_file(name: str) -> Change:
    """A change of a file with one JSON document on each line."""

    def change(folder: Path, random: Random) -> None:
        lines = (folder / name).read_bytes().splitlines()
        at = random.randrange(len(lines))
        lines[at] = changed_json(json.loads(lines[at]), random)
        data = b"\n".join(lines)
        (folder / name).write_bytes(changed_bytes(data, random) if random.random() < 0.1 else data)

    return change


def bytes_file(name: str) -> Change:
    """A change of a file's bytes."""

    def change(folder: Path, random: Random) -> None:
        path = folder / name
        path.write_bytes(changed_bytes(path.read_bytes(), random))

    return change


def one_of(*changes: Change) -> Change:
    """One of these changes."""
    return lambda folder, random: random.choice(changes)(folder, random)


def tensors_file(name: str, *, record: str | None = None) -> Change:
    """A change of a safetensors file: a tensor, its set of tensors, its record, its header."""

    def change(folder: Path, random: Random) -> None:
        path = folder / name
        kind = random.randrange(5)
        if kind == 0:
            path.write_bytes(changed_header(path.read_bytes(), random))
            return
        if kind == 1:
            path.write_bytes(changed_bytes(path.read_bytes(), random))
            return
        tensors = load_file(path)
        metadata = header_of(path.read_bytes()).get("__metadata__") or {}
        if kind == 2 and record is not None:
            text = changed_json(json.loads(metadata[record]), random)
            metadata[record] = text.decode("utf-8", errors="replace")
        elif kind == 3:
            name_ = random.choice(sorted(tensors))
            tensors[name_ + "x"] = tensors.pop(name_)
        else:
            name_ = random.choice(sorted(tensors))
            tensors[name_] = np.ascontiguousarray(changed_array(tensors[name_], random))
        save_file(tensors, path, metadata=metadata)

    return change


def header_of(data: bytes) -> dict[str, Any]:
    """The JSON header of a safetensors document."""
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def changed_header(data: bytes, random: Random) -> bytes:
    """A safetensors document whose header was changed; its length in front is right, mostly."""
    body = data[8 + int.from_bytes(data[:8], "little") :]
    text = changed_json(header_of(data), random)
    length = len(text) if random.random() < 0.8 else random.choice([0, 2**40, 2**63, len(text) * 2])
    return length.to_bytes(8, "little") + text + body


def parquet_file(name: str) -> Change:
    """A change of a Parquet file: its table, or its bytes."""

    def change(folder: Path, random: Random) -> None:
        path = folder / name
        if random.random() < 0.35:
            path.write_bytes(changed_bytes(path.read_bytes(), random))
            return
        pq.write_table(changed_table(pq.read_table(path), random), path, compression="zstd")

    return change


def csv_file(name: str) -> Change:
    """A change of the table in a CSV file."""

    def change(folder: Path, random: Random) -> None:
        table = changed_table(pa_csv.read_csv(folder / name), random)
        pa_csv.write_csv(table, folder / name)

    return change


# ---- token files ---------------------------------------------------------------------------


def _make_token_file(folder: Path) -> None:

    rows = [
        {"text": "The quick brown fox jumps over the lazy dog.", "kind": "a", "prompt": "Say: "},
        {"text": "Größe 漢字 🙂 and more words to read", "kind": "b", "prompt": ""},
    ]
    prepare(
        rows,
        tokenizer=zoo.metaspace_byte_fallback(),
        output=folder / "input.safetensors",
        max_length=12,
        stride=6,
        bos="first",
        domain_key="kind",
        prompt_key="prompt",
    )


def _change_token_file(folder: Path, random: Random) -> None:

    path = folder / "input.safetensors"
    kind = random.randrange(6)
    if kind == 0:
        path.write_bytes(changed_header(path.read_bytes(), random))
    elif kind == 1:
        path.write_bytes(changed_bytes(path.read_bytes(), random))
    else:  # every hash is computed again
        spec, tensors = content_of(path)
        text = json.dumps(spec, sort_keys=True, separators=(",", ":"))
        if kind == 2:
            text = changed_json(spec, random).decode("utf-8", errors="replace")
        elif kind == 3:
            table = tensors["windows"]
            row, column = random.randrange(len(table)), random.randrange(7)
            delta = random.choice([-2, -1, 1, 2, 100])
            table[row, column] += delta
        else:
            name = random.choice(sorted(tensors))
            wanted = tensors[name].dtype
            tensors[name] = changed_array(tensors[name], random)
            if tensors[name].dtype.kind == "f":
                tensors[name] = tensors[name].astype(wanted)
        write_forged(folder / "forged", text, tensors, path)
        (folder / "forged").replace(path)


def _read_token_file(folder: Path) -> None:

    tokens = TokenFile.open(folder / "input.safetensors")
    assert repr(tokens)
    assert isinstance(tokens.domains, tuple)
    targets = []
    for index in range(tokens.num_windows):
        window = tokens.window_ids(index)
        assert window.ids_T.min(initial=0) >= 0
        assert window.ids_T.max(initial=0) < tokens.vocab_size
        assert (window.targets_N >= 1).all()
        assert (window.targets_N < len(window.ids_T)).all()
        document = tokens.windows[index].document
        own = tokens.target_tokens(index)
        low, high = tokens.document_starts[document : document + 2]
        assert ((own >= low) & (own < high)).all()
        targets += own.tolist()
    if tokens.protocol not in ("qefficient", "mlc"):
        assert len(targets) == len(set(targets)), "a target is scored twice"
    assert tokens.target_counts().min(initial=0) >= 0
    bytes(tokens.text_bytes).decode("utf-8")


# ---- runs ----------------------------------------------------------------------------------


def _make_runs(folder: Path) -> None:

    tokenizer = folder / "tokenizer.json"
    zoo.byte_level().save(str(tokenizer))
    toy_runs(folder, ["A text to score, twice over.", "And one more."], tokenizer, max_length=16)
    tokenizer.unlink()
    (folder / "noise-0.4").rename(folder / "other")


def _hash_again(folder: Path) -> None:
    """Let run.json record the token table that is there, as a forger would."""
    record = json.loads((folder / "run.json").read_text("utf-8"))
    record["tokens_sha256"] = hashlib.sha256((folder / "tokens.parquet").read_bytes()).hexdigest()
    (folder / "run.json").write_text(json.dumps(record), "utf-8")


def _change_tokens(folder: Path, random: Random) -> None:
    parquet_file("other/tokens.parquet")(folder, random)
    _hash_again(folder / "other")


def _read_run_record(folder: Path) -> None:

    found = find_runs(folder)  # one bad folder never hides the others
    assert len(found) == 2
    readable = [run for run in found if not isinstance(run, UnreadableRun)]
    assert any(run.folder.name == "full" for run in readable)
    runs_table([run.to_json() for run in readable], [str(run.folder) for run in readable])
    run = Run.open(folder / "other")
    assert str(run)
    run_table(run.to_json())
    json.dumps(run.to_json(), allow_nan=False)


def _read_run_tokens(folder: Path) -> None:

    run = Run.open(folder / "other")
    tokens = run.tokens
    assert len(tokens.document) == len(tokens.nll)
    verify_run(folder / "other")
    export_tokens(folder / "other", folder / "out.csv")
    str(compare_runs(folder / "full", [folder / "other"]))


def _make_parts(folder: Path) -> None:

    with RunStore(folder / "run") as store:
        details = TokenDetails({"nll": np.ones(5, np.float32), "rank": np.ones(5, np.int32)})
        store.add(ScoredBatch(0, 2, np.arange(2), np.array([2, 3]), details, 0.1))
        store.commit()


def _change_parts(folder: Path, random: Random) -> None:
    parts = folder / "run" / "parts"
    (path,) = parts.glob("part-*")
    tensors_file(path.name, record="seconds")(parts, random)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    path.rename(path.with_name(f"part-{0:012d}-{2:012d}-{digest}.safetensors"))


def _read_parts(folder: Path) -> None:

    for part in RunStore(folder / "run").parts():
        assert len(part.window_W) == len(part.num_targets_W)
        assert all(len(c) == part.num_targets_W.sum() for c in part.details.columns.values())
        assert part.seconds + part.decode_seconds > -1e300


# ---- references ----------------------------------------------------------------------------


def _make_states(folder: Path) -> None:

    writer = StatesWriter(folder / FOLDER)
    states = np.ones((3, 4), np.float32)
    writer.add([0, 1], [states, states[:2]])
    writer.keep_measured({"self_kl_mean": 1e-9, "self_kl_max": 1e-8, "proof": None})
    writer.finish({"weights_fingerprint": "w", "head": "its own"})


def _change_states(folder: Path, random: Random) -> None:
    inner = folder / "reference"
    if random.random() < 0.4:
        json_file(random.choice(["reference.json", "measured.json"]))(inner, random)
        return
    (path,) = inner.glob("states-*")
    tensors_file(path.name)(inner, random)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:24]
    path.rename(inner / f"states-{digest}.safetensors")


def _read_states(folder: Path) -> None:

    StatesWriter(folder / "reference").measured()
    states = ReferenceStates(folder)
    assert isinstance(states.record, dict)
    for window in states.windows:
        assert window >= 0
        assert states.of_window(window).ndim == 2


def _make_base_file(folder: Path) -> None:

    num_context, vocab_size, num_chunks = 8, 11, 3
    random = np.random.default_rng(0)
    data = MAGIC + np.array([num_context, vocab_size, num_chunks], "<i4").tobytes()
    data += random.integers(0, vocab_size, num_chunks * num_context).astype("<i4").tobytes()
    for _ in range(num_chunks * (num_context - 1 - num_context // 2)):
        data += np.array([16 / 65535, -16.5], "<f4").tobytes()
        data += random.integers(0, 65535, 2 * ((vocab_size + 1) // 2)).astype("<u2").tobytes()
    (folder / "base.kld").write_bytes(data)


def _change_base_file(folder: Path, random: Random) -> None:
    path = folder / "base.kld"
    data = bytearray(path.read_bytes())
    if random.random() < 0.6:  # one of its numbers, or one row's scale
        at = random.choice(
            [8, 12, 16, 20 + 4 * random.randrange(24), 116 + 16 * random.randrange(9)]
        )
        kind = random.choice(["<i4", "<f4"])
        value = changed_array(np.frombuffer(data[at : at + 4], kind), random)
        data[at : at + 4] = value.tobytes()[:4]
        path.write_bytes(data)
    else:
        path.write_bytes(changed_bytes(bytes(data), random))


def _read_base_file(folder: Path) -> None:

    file = KlBaseFile(folder / "base.kld")
    assert file.ids.min() >= 0
    assert file.ids.max() < file.vocab_size
    for chunk in range(file.num_chunks):
        rows = file.rows(chunk, 0, file.num_targets)
        assert rows.floor().shape == (file.num_targets,)
        assert np.isfinite(rows.scale_N).all()


# ---- recordings ----------------------------------------------------------------------------


def _recording_rows() -> list[dict[str, Any]]:
    first = {
        "model": {"vocab_size": 50, "num_parameters": 3, "architecture": "x"},
        "session": {"engine": "e", "settings": {"a": 1}},
        "log_base": 2,
    }
    windows = [
        {
            "window": index,
            "ids": [5, 7, 9],
            "logprobs": [None, -1.5, -0.2],
            "top_ids": [None, [7, 8], [9]],
            "top_logprobs": [None, [-1.5, -2.0], [-0.2]],
        }
        for index in range(3)
    ]
    return [first, *windows]


def _make_recording(folder: Path) -> None:
    lines = [json.dumps(row) for row in _recording_rows()]
    (folder / "r.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    sidecar = {"model": {"vocab_size": 60}, "session": {"version": "1"}}
    (folder / "r.jsonl.json").write_text(json.dumps(sidecar), "utf-8")


def _make_recorded_table(folder: Path) -> None:

    table = pa.table(
        {
            "window": [0, 0, 1, 1],
            "position": [1, 2, 1, 2],
            "token_id": [7, 9, 7, 9],
            "logprob": [-1.5, -0.2, -1.0, -0.1],
            "top_ids": [[7, 8], [9], [7], [9]],
            "top_logprobs": [[-1.5, -2.0], [-0.2], [-1.0], [-0.1]],
        }
    )
    pq.write_table(
        table.replace_schema_metadata({"perplexit": '{"log_base": 10}'}), folder / "r.parquet"
    )
    pa_csv.write_csv(table.drop_columns(["top_ids", "top_logprobs"]), folder / "r.csv")


def _read_recording(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:

        session = RecordedInferenceSession(folder / name)
        assert session.model.vocab_size > 0
        window = WindowIds(0, np.array([5, 7, 9], np.int32), np.array([1, 2]))
        (nll,) = session.token_nll([window])
        assert nll.shape == (2,)
        json.dumps(session.description.settings)

    return read


# ---- models and programs -------------------------------------------------------------------


def _make_program(folder: Path) -> None:

    (folder / "model.onnx").write_bytes(b"graph")
    metadata = p.ProgramMetadata(
        engine="onnx",
        perplexity=True,
        dtype="float32",
        opset=21,
        shapes=p.ProgramShapes(1, 16, 15),
        model=p.ProgramModel("hf:x", "Llama", 10, "w", 320, 256),
        memory=p.ProgramMemory(100, 1),
        verification=p.ProgramVerification("the checkpoint", 10, 1e-6),
        files=p.files_of(folder),
        quantization=p.ProgramQuantization("int4", "lib", 3, 100, 4.5, ("a",), {"block": 32}),
        cache=p.ProgramCache(2, 64, "float32"),
    )
    metadata.write(folder)


def _read_program(folder: Path) -> None:

    split_address(str(folder))
    program = ProgramMetadata.read(folder, engine="onnx")
    program.check_files(folder)
    assert isinstance(program.model.vocab_size, int)
    assert isinstance(program.verification.max_abs_nll_difference, float)
    json.dumps(program.to_json())


def _make_gguf(folder: Path) -> None:

    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_context_length(64)
    writer.add_string("general.name", "tiny")
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(20)])
    writer.add_array("tokenizer.ggml.token_type", [1] * 20)
    writer.add_float32("llama.rope.freq_base", 1e4)
    writer.add_tensor("token_embd.weight", np.ones((20, 8), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _read_gguf(folder: Path) -> None:

    assert len(metadata_fingerprint(folder / "model.gguf")) == 64
    header = read_gguf_header(folder / "model.gguf")
    assert header.num_parameters >= 0


def _change_gguf(folder: Path, random: Random) -> None:
    """Mostly a number of the header: every count, length, type, size and offset is one."""
    path = folder / "model.gguf"
    data = bytearray(path.read_bytes())
    if random.random() < 0.5:
        at = random.choice([8, 16, 24, *range(24, 700, 4)])
        value = changed_array(np.frombuffer(data[at : at + 8], "<i8"), random)
        data[at : at + 8] = value.tobytes()[:8]
        path.write_bytes(data)
    else:
        path.write_bytes(changed_bytes(bytes(data), random))


def _make_tokenizer(folder: Path) -> None:

    zoo.metaspace_byte_fallback().save(str(folder / "tokenizer.json"))
    configuration = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "special": True},
        "model_max_length": 10**30,
        "added_tokens_decoder": {"0": {"content": "<unk>", "special": True}},
        "extra_special_tokens": {},
        "additional_special_tokens": ["<more>"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(configuration), "utf-8")


def _change_tokenizer(folder: Path, random: Random) -> None:
    if random.random() < 0.25:  # an id of a vocabulary, or of an added token
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text("utf-8"))
        ids = content["model"]["vocab"]
        new = random.choice([200_000_000, 2**31, 2**32, 10**6, -1, 400])
        if random.random() < 0.5:
            ids[random.choice(sorted(ids))] = new
        else:
            random.choice(content["added_tokens"])["id"] = new
        path.write_text(json.dumps(content), "utf-8")
        return
    json_file(random.choice(["tokenizer.json", "tokenizer_config.json"]))(folder, random)


def _read_tokenizer(folder: Path) -> None:

    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size > 0
    assert len(tokenizer.fingerprint) == 64
    batch = tokenizer.encode_batch(["The quick brown fox."])
    assert batch.ids.min(initial=0) >= 0
    json.dumps(tokenizer.to_json())


def _make_checkpoint(folder: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 320,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "time_step_limit": [0.0, 1e9],
    }
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    save_file({"a": np.ones(3, np.float32)}, folder / "model-1.safetensors")
    save_file({"b": np.ones(3, np.float32)}, folder / "model-2.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")


def _read_checkpoint(folder: Path) -> None:

    assert isinstance(read_config(folder), dict)
    assert all(file.parent == folder for file in weight_files(folder))
    assert len(weights_fingerprint(folder)) == 64


def _make_adapter(folder: Path) -> None:
    config = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": "x", "target_modules": ["q"]}
    (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    save_file({"lora_A": np.ones((4, 8), np.float32)}, folder / "adapter_model.safetensors")


def _read_adapter(folder: Path) -> None:

    adapter = find_adapter(folder)
    assert isinstance(adapter.kind, str)
    assert len(adapter.fingerprint) == 64


def _make_device_map(folder: Path) -> None:
    content = {"model.embed_tokens": "cpu", "model.layers.0": 0, "lm_head": "disk"}
    (folder / "map.json").write_text(json.dumps(content), "utf-8")


def _read_device_map(folder: Path) -> None:

    found = read_device_map(folder / "map.json")
    assert all(isinstance(value, str | int) for value in found.values())


# ---- IGF -----------------------------------------------------------------------------------


def _make_igf(folder: Path) -> None:

    ids = np.arange(12, dtype=np.int32).reshape(3, 4)
    gains = np.array([0.1, -0.2, 0.3])
    Pairs(ids, np.arange(3), gains, gains, {"mode": "exact"}).save(folder / "pairs.safetensors")
    Articles((ids[0], ids[1]), ("a", "b")).save(folder / "articles.safetensors")
    save_learner(
        RidgeLearner(np.ones(20, np.float32), 0.5, {"r2": 0.1}), folder / "learner.safetensors"
    )


def _read_igf(folder: Path) -> None:

    pairs = Pairs.open(folder / "pairs.safetensors")
    assert np.isfinite(pairs.gain_nats_N).all()
    assert len(list(pairs)) == len(pairs.article_N)
    articles = Articles.open(folder / "articles.safetensors")
    assert len(articles.ids) == len(articles.names)
    assert all((ids >= 0).all() for ids in articles.ids)
    learner = load_learner(folder / "learner.safetensors")
    assert np.isfinite(learner.predict(np.zeros((1, 4), np.int32))).all()


def _make_experiment(folder: Path) -> None:
    curve = {f"{kind}_perplexity": [9.0, 8.0] for kind in ("median", "low", "high")}
    method = {
        "num_seeds": 3,
        "steps": [0, 10],
        **curve,
        "acceptance": 0.5,
        "tokens_trained": 100,
        "tokens_scored": 200,
        "tokens_judged": 200,
        "seconds": {"select": 1.0, "train": 2.0, "evaluate": 0.5},
    }
    paired = {
        "method": "igf-ridge",
        "num_seeds": 3,
        "ratio": 0.98,
        "ratio_low": 0.97,
        "ratio_high": 0.99,
        "seeds_better": 3,
        "p_t_holm": 0.01,
        "p_wilcoxon_holm": 0.2,
        "curve_ratio": 0.99,
        "steps_to_reference_end": 8,
    }
    document = {
        "kind": "igf-experiment",
        "schema_version": 1,
        "title": "t",
        "status": "complete",
        "reference": "random",
        "plan": {"confidence": 0.95, "methods": ["random", "igf-ridge"], "seeds": [1, 2, 3]},
        "methods": {"random": method, "igf-ridge": method},
        "comparisons": [paired],
    }
    (folder / "experiment.json").write_text(json.dumps(document), "utf-8")


def _read_experiment(folder: Path) -> None:

    experiment = Experiment.open(folder)
    assert experiment.methods
    assert all(np.isfinite(m.median).all() for m in experiment.methods)
    assert isinstance(experiment.title, str)


# ---- plain text ----------------------------------------------------------------------------


def _make_id_lines(folder: Path) -> None:
    (folder / "ids.txt").write_text("1 2 3\n4 5\n\n7 8 9 10\n", "utf-8")


def _change_id_lines(folder: Path, random: Random) -> None:
    path = folder / "ids.txt"
    words = path.read_text("utf-8").split(" ")
    place = random.randrange(len(words))
    hostile = [
        "-1",
        "99999999999",
        "9" * 6_000,
        "1.5",
        "x",
        "\u0663",
        "²",
        "",
        "0x10",
        "1e3",
        "\x00",
    ]
    words[place] = random.choice(hostile)
    path.write_text(" ".join(words), "utf-8")
    if random.random() < 0.4:
        bytes_file("ids.txt")(folder, random)


def _read_id_lines(folder: Path) -> None:

    tokens = import_id_lines(folder / "ids.txt", output=folder / "out.safetensors")
    assert tokens.num_targets > 0
    assert tokens.token_ids.min() >= 0


def _make_arpa(folder: Path) -> None:
    words = [*map(str, range(12)), "<unk>", "<s>", "</s>"]
    lines = ["\\data\\", f"ngram 1={len(words)}", "ngram 2=2", "", "\\1-grams:"]
    lines += [f"-1.5\t{word}\t-0.3" for word in words]
    lines += ["", "\\2-grams:", "-0.5\t1 2", "-0.7\t2 3", "", "\\end\\", ""]
    (folder / "model.arpa").write_text("\n".join(lines), "utf-8")


def _change_arpa(folder: Path, random: Random) -> None:
    path = folder / "model.arpa"
    lines = path.read_text("utf-8").split("\n")
    at = random.randrange(len(lines))
    hostile = [
        "ngram 1=99999999999",
        "ngram 3=5",
        "ngram 2=-1",
        "-nan\t1 2",
        "5\t3",
        "\\3-grams:",
        "",
    ]
    if random.random() < 0.6:
        lines[at] = random.choice(hostile)
        path.write_text("\n".join(lines), "utf-8")
    else:
        path.write_bytes(changed_bytes(path.read_bytes(), random))


def _read_arpa(folder: Path) -> None:
    from perplexit.sessions.ngram import NgramInferenceSession  # noqa: PLC0415 - KenLM has no wheel and may be missing

    session = NgramInferenceSession(folder / "model.arpa")
    window = WindowIds(0, np.array([1, 2, 3], np.int32), np.array([1, 2]))
    (nll,) = session.token_nll([window])
    assert nll.shape == (2,)
    assert session.model.num_parameters >= 0


READERS = (
    Reader("token-file", _make_token_file, _change_token_file, _read_token_file),
    Reader("run-record", _make_runs, json_file("other/run.json"), _read_run_record),
    Reader("run-tokens", _make_runs, _change_tokens, _read_run_tokens),
    Reader("run-parts", _make_parts, _change_parts, _read_parts),
    Reader("reference-states", _make_states, _change_states, _read_states),
    Reader("kl-base-file", _make_base_file, _change_base_file, _read_base_file),
    Reader(
        "recording-lines",
        _make_recording,
        one_of(lines_file("r.jsonl"), json_file("r.jsonl.json")),
        _read_recording("r.jsonl"),
    ),
    Reader(
        "recording-parquet",
        _make_recorded_table,
        parquet_file("r.parquet"),
        _read_recording("r.parquet"),
    ),
    Reader(
        "recording-csv",
        _make_recorded_table,
        one_of(csv_file("r.csv"), bytes_file("r.csv")),
        _read_recording("r.csv"),
    ),
    Reader("program", _make_program, json_file("program.json"), _read_program),
    Reader("gguf-header", _make_gguf, _change_gguf, _read_gguf),
    Reader("tokenizer", _make_tokenizer, _change_tokenizer, _read_tokenizer),
    Reader(
        "checkpoint",
        _make_checkpoint,
        one_of(json_file("config.json"), json_file("model.safetensors.index.json")),
        _read_checkpoint,
    ),
    Reader(
        "adapter",
        _make_adapter,
        one_of(json_file("adapter_config.json"), tensors_file("adapter_model.safetensors")),
        _read_adapter,
    ),
    Reader("device-map", _make_device_map, json_file("map.json"), _read_device_map),
    Reader(
        "igf-stored",
        _make_igf,
        one_of(
            *(
                tensors_file(f"{name}.safetensors", record="perplexit")
                for name in ("pairs", "articles", "learner")
            )
        ),
        _read_igf,
    ),
    Reader("igf-experiment", _make_experiment, json_file("experiment.json"), _read_experiment),
    Reader("id-lines", _make_id_lines, _change_id_lines, _read_id_lines),
    *(
        [Reader("arpa", _make_arpa, _change_arpa, _read_arpa)]
        if find_spec("kenlm") is not None
        else []
    ),
)


def fresh_copy(sound: Path, target: Path) -> Path:
    """A copy of the sound files, for one case."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(sound, target)
    return target
