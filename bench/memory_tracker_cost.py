"""What MemoryTracker's two costly figures cost: traced Python objects, counted torch operations."""

import time
from collections.abc import Callable

import torch

import perplexit as px

NUM_OBJECTS = 200_000
NUM_OPERATIONS = 20_000


def make_objects() -> None:
    [str(number) for number in range(NUM_OBJECTS)]


def run_operations() -> None:
    total = torch.ones(64)
    for _ in range(NUM_OPERATIONS):
        total = total + 1


def fastest(work: Callable[[], None], rounds: int = 5) -> float:
    """Seconds of the fastest of `rounds` rounds."""
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def main() -> None:
    torch.set_num_threads(1)
    plain_objects, plain_operations = fastest(make_objects), fastest(run_operations)
    with px.MemoryTracker(torch_cpu=False):
        traced = fastest(make_objects)
    with px.MemoryTracker(python=False):
        counted = fastest(run_operations)
    with px.MemoryTracker():
        both = fastest(run_operations)
    micro = 1e6 / NUM_OPERATIONS
    print(f"small objects: {traced / plain_objects:.1f} times slower while traced")
    print(f"torch operations: + {(counted - plain_operations) * micro:.0f} µs each while counted")
    print(f"torch operations: + {(both - plain_operations) * micro:.0f} µs each with both")


if __name__ == "__main__":
    main()
