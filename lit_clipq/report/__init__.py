"""Reports: one page, figures and tables from the results of any number of runs."""

from lit_clipq.report.points import Finding, Point, read_points
from lit_clipq.report.write import Report, write_report

__all__ = ["Finding", "Point", "Report", "read_points", "write_report"]
