"""Bytes of CPU tensors that torch operations made, which no allocator statistic tells.

Imported only where the program has loaded torch itself.
"""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class CpuTensorBytes(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's base has no types
    """While entered: bytes held by the CPU storages that operations of this thread returned.

    Each storage counts once, from the operation that returned it until it is freed. Not counted:
    storages that an operation was given from outside, a kernel's own scratch space, the inside of
    a program compiled by torch.compile (it stays compiled), other threads.
    """

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Return True: a measurement leaves compiled code compiled."""
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch's default wraps `__torch_dispatch__` in the compiler, and importing that takes
        # seconds and tens of megabytes: inside the very stretch that is measured.
        return False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # as above
        self.current_bytes = 0
        self.peak_bytes = 0
        # Bytes counted for each storage alive; None for one that came from outside.
        self._size_of: dict[int, int | None] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operation; count the storages that it is the first to return."""
        kwargs = kwargs or {}
        # `torch.tensor(...)` shows its new tensor to the dispatcher first as this one's argument.
        if func is not torch.ops.aten.lift_fresh.default:
            self._note((args, kwargs), new=False)
        result = func(*args, **kwargs)
        self._note(result, new=True)
        self.peak_bytes = max(self.peak_bytes, self.current_bytes)
        return result

    def _note(self, tree: Any, *, new: bool) -> None:
        for leaf in tree_leaves(tree):
            # Fake and other wrapper tensors own no memory; sparse ones have no single storage.
            if type(leaf) not in (torch.Tensor, torch.nn.Parameter) or leaf.device.type != "cpu":
                continue
            if leaf.layout is torch.strided:
                self._note_storage(leaf.untyped_storage(), new=new)

    def _note_storage(self, storage: torch.UntypedStorage, *, new: bool) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        if key not in self._size_of:
            weakref.finalize(storage, self._forget, key).atexit = False
            self._size_of[key] = 0 if new else None
        counted = self._size_of[key]
        if counted is not None:  # an operation may have resized it since
            self._size_of[key] = num_bytes
            self.current_bytes += num_bytes - counted

    def _forget(self, key: int) -> None:
        self.current_bytes -= self._size_of.pop(key, None) or 0
