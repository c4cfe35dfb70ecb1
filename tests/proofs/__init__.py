"""Long proofs. `make test` runs a seeded tenth of each; `make fuzz` and its like run all."""
