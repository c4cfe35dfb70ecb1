"""What MemoryTracker's two costly figures cost: traced Python objects, counted torch operations."""

from timeit import repeat

import torch

import perplexit as px

NUM_OBJECTS = 200_000
NUM_OPERATIONS = 20_000


def small_objects_seconds() -> float:
    """Return the seconds of the fastest of five rounds of making small objects."""
    return min(repeat(lambda: [str(number) for number in range(NUM_OBJECTS)], number=1))


def operation_micros() -> float:
    """Return the microseconds of one torch operation, of the fastest of five rounds."""

    def work() -> None:
        total = torch.ones(64)
        for _ in range(NUM_OPERATIONS):
            total = total + 1

    return 1e6 / NUM_OPERATIONS * min(repeat(work, number=1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    objects, plain = small_objects_seconds(), operation_micros()
    with px.MemoryTracker(torch_cpu=False):
        traced = small_objects_seconds()
    with px.MemoryTracker(python=False):
        counted = operation_micros()
    with px.MemoryTracker():
        both = operation_micros()
    print(f"small objects: {traced / objects:.1f} times slower while traced")
    print(f"torch operations: + {counted - plain:.0f} µs each while counted")
    print(f"torch operations: + {both - plain:.0f} µs each with both")
