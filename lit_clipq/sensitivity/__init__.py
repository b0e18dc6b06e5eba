"""Sensitivity: what quantizing each layer, block, tower and operand costs, and why."""

from lit_clipq.sensitivity.analysis import Analysis, Placed, analyze
from lit_clipq.sensitivity.patterns import Patterns, worth_leaving
from lit_clipq.sensitivity.rows import Row, analysis_table

__all__ = ["Analysis", "Patterns", "Placed", "Row", "analysis_table", "analyze", "worth_leaving"]
