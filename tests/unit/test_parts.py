"""Windows divided among workers: in order, nothing lost, and nobody idle for long."""

import numpy as np
import pytest

from perplexit.inputs.windows import balanced_parts


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([], []),
        ([1024], [1]),
        ([1024, 1024], [1, 1]),
        ([1024] * 3, [1, 1, 1]),
        ([1024] * 4, [1, 1, 1, 1]),
        ([256] * 8, [4, 4]),
        ([256] * 9, [2, 2, 3, 2]),
        ([4096, 4096], [1, 1]),
        ([900, 300, 300, 300], [1, 3]),
        ([3], [1]),
        ([9, 3, 3, 3], [1, 3]),
    ],
)
def test_parts_have_about_the_same_number_of_ids(lengths, expected):
    parts = balanced_parts(lengths, workers=2, most_ids=1024)
    assert [len(part) for part in parts] == expected


@pytest.mark.parametrize("workers", [1, 2, 3, 16])
def test_every_window_is_in_one_part_and_no_part_is_large(workers):
    generator = np.random.default_rng(0)
    for _ in range(200):
        lengths = np.sort(generator.integers(1, 3000, generator.integers(1, 60)))[::-1].tolist()
        parts = balanced_parts(lengths, workers=workers, most_ids=1024)
        assert [place for part in parts for place in part] == list(range(len(lengths)))
        sums = [sum(lengths[place] for place in part) for part in parts]
        # Cut where a window's middle falls: half a window too many on either side at most.
        most = max(1024, np.mean(lengths))
        assert all(
            total <= most + lengths[part[0]]
            for part, total in zip(parts, sums, strict=True)
            if len(part) > 1
        )
