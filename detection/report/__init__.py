"""One HTML page about a run, or about several side by side: what their logs say, and what an evaluation adds."""

from detection.report.page import write_report

__all__ = ["write_report"]
