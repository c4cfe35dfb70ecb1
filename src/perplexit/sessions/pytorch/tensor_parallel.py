"""Tensor parallelism: every layer split over processes, of which the first one leads.

The leader starts the others on this machine and alone reads windows, keeps results and writes
the run. Before each step it broadcasts what the step is and its tensors; the others take the step
too, since every layer needs all of them. So resuming, batching and reports know nothing of it.

Shape suffixes: B = rows, T = ids of a row, N = rows for the head, D = hidden size.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from perplexit.checkpoints.loading import load_checkpoint
from perplexit.checkpoints.module_call import Past, config_integer, num_embeddings
from perplexit.errors import CapabilityError, ModelError, PerplexitError, UsageError
from perplexit.sessions.pytorch.device_choice import scoring_settings
from perplexit.sessions.pytorch.forward import ForwardPass, WrappedForward
from perplexit.sessions.pytorch.forward_probe import find_forward

_STOP, _ROWS, _HEAD = range(3)
_HEADER_LENGTH = 4  # step, two sizes, whether there is a mask
_LONGEST_WAIT = timedelta(minutes=30)  # a follower waits this long for the next step
_GRACE_SECONDS = 10.0
_NO_CACHE = (
    "a model split by --tensor-parallel has its keys and values in several processes; use "
    "--mode full"
)

# What a follower process runs; it is told the rest as JSON.
_FOLLOWER = (
    "import sys; from perplexit.sessions.pytorch.tensor_parallel import follow; follow(sys.argv[1])"
)


class ProcessGroup:
    """The processes that a leader started, and the collectives' process group they share.

    Raises UsageError for fewer than two processes, CapabilityError where they cannot be had.
    """

    def __init__(self, size: int, device: str | None, threads: int) -> None:
        device_type = _accelerator_type()
        _check_group(size, device, device_type)
        self.size, self.device_type = size, device_type
        self.device = torch.device(device_type, 0) if device_type != "cpu" else torch.device("cpu")
        self._threads = threads
        self._port = _free_port()
        self._followers: list[subprocess.Popen[bytes]] = []
        self._open = False
        self.in_step = False  # still so after a step that was interrupted: nobody listens then
        # A session that failed to open, or was forgotten, must not leave processes behind.
        self._abandoned = weakref.finalize(self, _end, self._followers, 0.0)

    def start(self, **loading: Any) -> None:
        """Start the followers, which load the model in the same way, and join them."""
        for rank in range(1, self.size):
            told = {"rank": rank, "size": self.size, "port": self._port, "threads": self._threads}
            self._followers.append(
                subprocess.Popen(
                    [sys.executable, "-c", _FOLLOWER, json.dumps({**told, **loading})],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C is the leader's to answer
                    env={**os.environ, "LOCAL_RANK": str(rank)},
                )
            )
        self._open = True
        try:
            _join(0, self.size, self._port, self.device)
        except (RuntimeError, ValueError) as error:
            raise self.failure(error) from error

    def failure(self, error: BaseException) -> ModelError:
        """Return the error to raise where a step fails: no process continues alone."""
        codes = [process.poll() for process in self._followers]
        ended = ", ".join(f"{n + 1}: exit code {c}" for n, c in enumerate(codes) if c is not None)
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        self.close(at_once=True)
        return ModelError(
            f"tensor parallelism over {self.size} processes failed ({reason}"
            f"{'; ended: ' + ended if ended else ''}); their messages are above. Where memory ran "
            "out, give a smaller --batch-size: a split batch cannot be halved"
        )

    def announce(self, step: int, *numbers: int) -> None:
        """Tell the followers which step comes next, and the sizes of its tensors."""
        header = torch.zeros(_HEADER_LENGTH, dtype=torch.int64)
        header[: 1 + len(numbers)] = torch.tensor([step, *numbers])
        dist.broadcast(header.to(self.device), 0)

    @contextmanager
    def step(self, step: int, *numbers: int) -> Iterator[None]:
        """Tell the followers of a step that is taken within; raise `failure` where it fails."""
        self.in_step = True
        try:
            self.announce(step, *numbers)
            yield
        except RuntimeError as error:
            raise self.failure(error) from error
        self.in_step = False

    def stop(self) -> None:
        """Let the followers go; harmless once they have gone."""
        if self._open and not self.in_step:
            with suppress(RuntimeError):  # one that has ended needs no word
                self.announce(_STOP)
        self.close(at_once=self.in_step)

    def close(self, *, at_once: bool = False) -> None:
        """End the followers and leave the process group; harmless when repeated."""
        if not self._open:
            return
        self._open = False
        self._abandoned.detach()
        _end(self._followers, 0.0 if at_once else _GRACE_SECONDS)


def _end(followers: list[subprocess.Popen[bytes]], grace_seconds: float) -> None:
    """Wait for the followers, kill those that stay, and leave the process group."""
    deadline = time.monotonic() + grace_seconds
    for process in followers:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if dist.is_initialized():
        dist.destroy_process_group()


def _accelerator_type() -> str:
    """Return where transformers puts a split model: CUDA where there is some, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _check_group(size: int, device: str | None, device_type: str) -> None:
    if size < 2:
        raise UsageError(f"expected --tensor-parallel of 2 processes or more, got {size}")
    if device is not None and device != device_type:
        raise UsageError(
            f"expected --device {device_type} with --tensor-parallel on this machine, got "
            f"{device!r}; each process takes a device of its own, so leave --device out"
        )
    if device_type == "cuda" and size > torch.cuda.device_count():
        raise CapabilityError(
            f"expected at most {torch.cuda.device_count()} processes, one for each CUDA device, "
            f"got --tensor-parallel {size}"
        )
    if not dist.is_available():
        raise CapabilityError(
            "this build of PyTorch has no torch.distributed, which "
            "--tensor-parallel needs; install another build"
        )
    if dist.is_initialized():
        raise UsageError(
            "expected no torch.distributed process group yet (Perplexit starts the processes "
            "itself: no torchrun), but this process is in one; close the other session first"
        )


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


def _join(rank: int, size: int, port: int, device: torch.device) -> None:
    """Enter the process group of a leader on this machine."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=size,
        device_id=device if device.type == "cuda" else None,
        timeout=_LONGEST_WAIT,
    )


def check_split(module: nn.Module, size: int) -> None:
    """Raise CapabilityError where `size` processes cannot each have their part of every layer.

    Where no weight was split, every process would do everything.
    """
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = config_integer(module, name)
        if heads is not None and heads % size:
            raise CapabilityError(
                f"expected --tensor-parallel to divide the model's {name} of {heads}, got {size}; "
                "a head is computed by one process"
            )
    if not any(hasattr(parameter, "placements") for parameter in module.parameters()):
        raise CapabilityError(
            f"transformers has no plan for splitting {type(module).__name__} over processes; "
            "leave --tensor-parallel out, or spread its layers with --device auto"
        )


class LeadingForward(WrappedForward):
    """The leader's forward pass: each step is announced to the followers, then taken together."""

    def __init__(self, inner: ForwardPass, group: ProcessGroup) -> None:
        super().__init__(inner, why_no_cache=_NO_CACHE)
        self._group = group

    def rows(self, ids_BT: Tensor, mask_BT: Tensor | None, past: Past | None = None) -> Tensor:
        """Return the inner rows, whole in every process."""
        with self._group.step(_ROWS, *ids_BT.shape, mask_BT is not None):
            for tensor in (ids_BT, mask_BT):
                if tensor is not None:
                    dist.broadcast(tensor.contiguous(), 0)
            return self._inner.rows(ids_BT, mask_BT, past)

    def head(self, rows_NX: Tensor) -> Tensor:
        """Return the inner logits, whole in every process."""
        with self._group.step(_HEAD, *rows_NX.shape):
            rows_NX = rows_NX.contiguous()
            dist.broadcast(rows_NX, 0)
            return self._inner.head(rows_NX)


def _take_steps(forward: ForwardPass, device: torch.device, dtype: torch.dtype) -> None:
    """Take every step that the leader announces, as a follower, until it says stop."""
    while True:
        header = torch.zeros(_HEADER_LENGTH, dtype=torch.int64, device=device)
        dist.broadcast(header, 0)
        step, first, second, has_mask = header.tolist()
        if step == _STOP:
            return
        if step == _HEAD:
            rows_NX = torch.empty(first, second, dtype=dtype, device=device)
            dist.broadcast(rows_NX, 0)
            forward.head(rows_NX)
            continue
        ids_BT = torch.empty(first, second, dtype=torch.int64, device=device)
        dist.broadcast(ids_BT, 0)
        mask_BT = None
        if has_mask:
            mask_BT = torch.empty_like(ids_BT)
            dist.broadcast(mask_BT, 0)
        forward.rows(ids_BT, mask_BT)


def _end_with_leader() -> None:
    """End this process as soon as the one that started it has ended."""
    leader = os.getppid()

    def watch() -> None:
        while os.getppid() == leader:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def follow(told: str) -> None:
    """Serve the leader that started this process with `told`, a JSON object, until it stops."""
    _end_with_leader()
    try:
        _follow(json.loads(told))
    except PerplexitError:  # the leader meets the same, and says it
        sys.exit(1)


def _follow(settings: dict[str, Any]) -> None:
    rank, size, dtype = settings["rank"], settings["size"], settings["dtype"]
    kind = _accelerator_type()
    device = torch.device(kind, rank) if kind != "cpu" else torch.device("cpu")
    _join(rank, size, settings["port"], device)
    module = load_checkpoint(
        settings["model"], dtype=dtype, device=None, options=settings["options"], split_over=size
    ).model
    check_split(module, size)
    with scoring_settings(module, settings["threads"], owned=True):
        # The same probe as the leader's, step by step: it runs the layers too.
        forward, _ = find_forward(module, num_embeddings(module) or 2)
        _take_steps(forward, device, getattr(torch, dtype))
    dist.destroy_process_group()
