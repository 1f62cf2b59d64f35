"""What an adapter gained and what its base lost, measured and reported: see compare.py and report.py."""

from ..data.files import read_documents, read_questions
from .compare import answer, base_retention, compare_with_base, expert_use, score, threshold_curve
from .report import ReportCallback, evaluate_adapter, read_point, write_report

__all__ = [
    "ReportCallback",
    "answer",
    "base_retention",
    "compare_with_base",
    "evaluate_adapter",
    "expert_use",
    "read_documents",
    "read_point",
    "read_questions",
    "score",
    "threshold_curve",
    "write_report",
]
