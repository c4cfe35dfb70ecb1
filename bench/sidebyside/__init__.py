"""Perplexit and its peers side by side: workers that take turns, and the table's arithmetic."""
