"""Text → token ids → windows → one frozen file. Nothing below it ever tokenises."""
