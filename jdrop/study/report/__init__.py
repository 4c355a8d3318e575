"""Reports a comparison: the sentence, the table in the terminal, and a folder of files."""

from jdrop.study.report.page import write
from jdrop.study.report.sentence import sentence
from jdrop.study.report.tables import terminal

__all__ = ["sentence", "terminal", "write"]
