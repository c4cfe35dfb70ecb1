"""Rows by blocks of one size: all of them, in order, in as few blocks as can be."""

from hypothesis import given
from hypothesis import strategies as st

from perplexit.functional.nll import equal_blocks


@given(num_rows=st.integers(0, 5000), most=st.integers(1, 600))
def test_blocks_of_one_size_cover_every_row_in_order(num_rows, most):
    blocks = equal_blocks(num_rows, most)
    assert len({block.stop - block.start for block in blocks}) == 1
    assert blocks[0].stop - blocks[0].start <= most
    assert len(blocks) == max(1, -(-num_rows // most))
    done = 0
    for block in blocks:
        assert block.start <= done  # no gap
        assert block.stop > done or num_rows == 0  # and none in vain
        done = block.stop
    assert done == num_rows


def test_few_rows_are_done_twice():
    assert equal_blocks(511, 256) == [slice(0, 256), slice(255, 511)]
    assert equal_blocks(600, 256) == [slice(0, 208), slice(208, 416), slice(392, 600)]
    assert equal_blocks(512, 512) == [slice(0, 512)]
