"""The published numbers, each with its source."""

from collections.abc import Mapping

from jdrop.study.reproduce.protocol import Published

Numbers = Mapping[tuple[str, str], Published]
"""By row and measure."""


def _numbers(
    rows: Mapping[str, str], measures: tuple[str, ...], replicates: Mapping[str, int]
) -> Numbers:
    """Reads lines such as "5.23±0.12 -3.04±0.02", a number for each measure.

    Args:
        rows: by row, its line; "-" where the paper has no number.
        measures: the names of the numbers in a line.
        replicates: by row, over how many splits or seeds its numbers are means; 20 by default.
    """
    numbers = {}
    for row, line in rows.items():
        for measure, text in zip(measures, line.split(), strict=True):
            if text == "-":
                continue
            value, _, spread = text.partition("±")
            count = replicates.get(row, 20)
            numbers[row, measure] = Published(value, spread or None, count)
    return numbers


UCI_DROPOUT = _numbers(
    {
        "Yacht": "1.1766±0.0965 1.1093±0.0872 0.0674±0.0147 -1.554±0.028",
        "Energy": "1.678±0.042 1.663±0.044 0.0145±0.0082 -1.985±0.020",
        "Concrete": "5.232±0.120 5.230±0.121 0.0019±0.0051 -3.039±0.021",
        "Wine": "0.6201±0.0092 0.6202±0.0090 -0.0000±0.0006 -0.933±0.015",
        "Power": "4.021±0.042 4.022±0.042 -0.0007±0.0004 -2.795±0.011",
        "Naval": "0.00622±0.00009 0.00547±0.00007 0.00075±0.00007 3.805±0.011",
        "Protein": "4.354±0.022 4.356±0.022 -0.0015±0.0007 -2.891±0.005",
    },
    ("weight-scaling", "monte-carlo", "difference", "log-likelihood"),
    {"Protein": 5},
)
"""Means and standard errors over the splits, of three files for each data set: `test_rmse.txt`,
`test_MC_rmse.txt` and `test_ll.txt` of `results` in github.com/yaringal/DropoutUncertaintyExps at
commit a6259f1. Table 1 of Gal and Ghahramani 2016, arXiv:1506.02142, has the second and the last
column, with two decimals.
"""
