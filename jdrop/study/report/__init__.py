"""Reports a comparison: sentences, the table in the terminal, and a folder of files."""

from jdrop.study.report.cautions import cautions
from jdrop.study.report.page import write
from jdrop.study.report.sentence import sentence
from jdrop.study.report.terminal import terminal

__all__ = ["cautions", "sentence", "terminal", "write"]
