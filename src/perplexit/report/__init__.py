"""Runs → one self-contained HTML file: verdict, intervals, charts, and the text itself.

Nothing here scores anything: every figure comes from the runs' records, from `compare`, or from
the metrics over the stored tokens.
"""

from perplexit.report.report_file import Report, write_report

__all__ = ["Report", "write_report"]
