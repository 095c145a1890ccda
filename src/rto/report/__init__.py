"""What a run leaves behind: its log, and one page that shows it.

Only the log is imported here, because every training loop uses it. The page is made by
:func:`rto.report.html.write_report`, which needs matplotlib and jinja2.
"""

from __future__ import annotations

from rto.report.log import Progress, RunLog, read_metrics, read_samples

__all__ = ["Progress", "RunLog", "read_metrics", "read_samples"]
