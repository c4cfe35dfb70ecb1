"""One test for each known fault, named after it (`test_a1_…`), and for its siblings."""
