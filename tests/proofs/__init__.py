"""Long proofs. `make test` runs a seeded tenth of each; `make fuzz`, `make sweep`, … run them whole."""
