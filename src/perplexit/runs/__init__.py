"""The record of an evaluation, in memory and as a folder on disk. No engine is imported here."""
