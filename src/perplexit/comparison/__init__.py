"""Two runs over the same tokens: paired ratio, interval, verdict, most changed tokens."""

from perplexit.comparison.comparing import compare
from perplexit.comparison.record import ChangedToken, Comparison, DomainRatio, Verdict

__all__ = ["ChangedToken", "Comparison", "DomainRatio", "Verdict", "compare"]
