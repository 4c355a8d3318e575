"""Reports a comparison: the answer, the table in the terminal, and a folder of files."""

from jdrop.study.report.cautions import cautions
from jdrop.study.report.page import write
from jdrop.study.report.sentence import answer
from jdrop.study.report.terminal import terminal

__all__ = ["answer", "cautions", "terminal", "write"]
