"""The published numbers, each with its source."""

from collections.abc import Mapping

from jdrop.study.reproduce.protocol import Published, Statement

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

_ENSEMBLES = _numbers(
    {
        "Yacht": "1.58±0.48 1.18±0.21",
        "Energy": "2.09±0.29 1.38±0.22",
        "Concrete": "6.03±0.58 3.06±0.18",
        "Wine": "0.64±0.04 0.94±0.12",
        "Power": "4.11±0.17 2.79±0.04",
        "Naval": "0.00±0.00 -5.63±0.05",
        "Protein": "4.71±0.06 2.83±0.02",
    },
    ("ensemble-rmse", "ensemble-nll"),
    {"Protein": 5},
)

UCI_ENSEMBLES = {
    (row, f"{training}-{measure}"): number
    for training in ("stated", "short")
    for (row, measure), number in _ENSEMBLES.items()
}
"""Means and standard deviations over the splits, from Table 1 of Lakshminarayanan et al. 2017,
arXiv:1612.01474, columns "Deep Ensembles". They stand beside two learning rates.
"""

UCI_ENSEMBLE_OF_TEN = _numbers(
    {
        "Yacht": "0.666±0.223 -1.250±0.070 0.697±0.192 -1.260±0.063 -0.010±0.049",
        "Energy": "0.539±0.062 -1.212±0.024 0.540±0.062 -1.214±0.022 -0.002±0.018",
        "Concrete": "4.826±0.737 -2.937±0.114 4.824±0.599 -2.935±0.110 0.002±0.045",
        "Wine": "0.622±0.037 -0.928±0.058 0.620±0.037 -0.931±0.057 -0.003±0.014",
        "Power": "4.014±0.169 -2.808±0.040 4.014±0.166 -2.805±0.036 0.003±0.019",
        "Naval": "0.00074±0.00021 4.450±0.010 0.00074±0.00007 4.450±0.003 0.001±0.009",
        "Protein": "4.274±0.052 -2.871±0.004 4.262±0.034 -2.873±0.008 -0.002±0.009",
    },
    ("one-rmse", "one-ll", "averaged-rmse", "averaged-ll", "averaged-difference"),
    {"Protein": 5},
)
"""Means and standard deviations over the splits, of the files in `results` (one network) and
`results_ensemble` (ten) in github.com/omegafragger/DropoutUncertaintyExps at commit 912d4aa. The
last column is the paired difference of the log-likelihoods.
"""

WARDE_FARLEY = {
    **{
        (row, measure): Statement("no clear difference", "0")
        for row in ("toy", "MNIST 2, 3", "MNIST 4, 9")
        for measure in ("scaling-difference", "pool-difference")
    },
    ("MNIST, ten digits", "untied-difference"): Statement("untied is worse", "+"),
}
"""What Warde-Farley et al. 2014, arXiv:1312.6197, say of the test error, as summaries of the paper
have it: weight scaling matches the geometric average; the arithmetic average is not better; and
ensembles of networks with untied masks stay worse than one dropout network. These are no quotes.
"""

MNIST_LENET = _numbers(
    {
        "MNIST": "0.037 0.016 99.1 99.4",
        "Fashion-MNIST": "0.321 0.200 91.0 93.2",
    },
    ("one-nll", "ten-nll", "one-accuracy", "ten-accuracy"),
    {"MNIST": 1, "Fashion-MNIST": 1},
)
"""The tables of `baselines/mnist/README.md` in github.com/google/uncertainty-baselines at commit
62d8d92, rows "Deterministic" and "Ensemble (size=10)". They have no spreads.
"""

MNIST_DROPOUT = _numbers(
    {
        "898-1532": "1.05 -",
        "3 x 1024": "1.25 -",
        "3 x 1024, max-norm": "1.06 -",
        "3 x 1024, Ma et al.": "1.19±0.02 1.04±0.02",
        "3 x 1024, max-norm, Ma et al.": "1.05±0.03 1.02±0.02",
    },
    ("scaling-error", "masks-error"),
    {
        "898-1532": 1,
        "3 x 1024": 1,
        "3 x 1024, max-norm": 1,
        "3 x 1024, Ma et al.": 5,
        "3 x 1024, max-norm, Ma et al.": 5,
    },
)
"""Test errors in percent. 898-1532: `pylearn2/scripts/papers/dropout/mnist.yaml` in
github.com/lisa-lab/pylearn2, in its first comment, without a number of runs. 3 x 1024: Table 2 of
Srivastava et al. 2014, JMLR 15:1929. Ma et al. 2017, arXiv:1609.08017: the same networks by weight
scaling and by 100 masks, five runs.
"""

SRIVASTAVA_FIGURES: Mapping[tuple[str, str], Published | Statement] = {
    ("Figure 9a, keep 0.1", "dropout"): Published("2.7", None, 1),
    ("Figure 9b, keep 0.1", "dropout"): Published("1.7", None, 1),
    ("Figure 9b, keep 0.1", "panel-difference"): Statement("9b is better", "-"),
    **{
        (f"Figure 9{panel}, keep 0.5", "difference"): Statement("dropout is better", "-")
        for panel in "ab"
    },
    **{
        (f"Figure 9a, keep {keep_prob}", "flat-difference"): Statement("flat", "0")
        for keep_prob in (0.4, 0.8)
    },
    **{
        (f"Figure 10, {size} examples", "difference"): Statement("no gain", "0+")
        for size in ("100", "500")
    },
    **{
        (f"Figure 10, {size} examples", "difference"): Statement("a gain", "-")
        for size in ("5,000", "10,000", "50,000")
    },
    ("Figure 11, 1 mask", "mask-difference"): Statement("WS is better", "+"),
    **{
        (f"Figure 11, {count} masks", "mask-difference"): Statement("as good, or better", "0-")
        for count in (50, 120)
    },
}
"""What Srivastava et al. 2014, JMLR 15:1929, sections 7.3 to 7.5, say of Figures 9 to 11, as
summaries of the paper have it. They state two errors, 2.7 and 1.7. That weight scaling is better
than 1 mask follows from them: masks reach it at about 50. At 1,000 examples of Figure 10 no summary
says whether there is a gain.
"""
