"""Rows taken a block at a time, all blocks of one size."""

_TILE = 16  # rows that a matrix product's kernel takes at a time


def equal_blocks(num_rows: int, most: int) -> list[slice]:
    """Return blocks that cover rows 0 … `num_rows` in order, all of one size up to `most`.

    The last may begin before the one before it has ended. A block of another size would be another
    product: oneDNN prepares each shape once, at half a megabyte of memory, and thin ones are slow.
    """
    if num_rows <= most:
        return [slice(0, num_rows)]
    count = -(-num_rows // most)
    size = min(most, -(-num_rows // (count * _TILE)) * _TILE)
    starts = (min(index * size, num_rows - size) for index in range(count))
    return [slice(start, start + size) for start in starts]
