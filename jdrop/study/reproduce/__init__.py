"""Published results, reproduced: the paper's protocol, and its numbers beside ours.

| file | holds |
|---|---|
| `protocol.py` | what a protocol is; which of our numbers agree with the paper's |
| `published.py` | the published numbers, each with its source |
| `uci.py` | the UCI tables of regression and their standard splits |
| `regression.py` | networks of all splits, trained at once and read |
| `classification.py` | networks of classes, and averages of all subsets of them |
| `srivastava_networks.py`, `srivastava_curves.py` | the networks and the curves of its figures |
| `runner.py` | runs a protocol in a folder, part by part |
| `report.py` | the table, the figure and the page |
| the others | a protocol each |

To add a protocol, write a module with `make_protocol()` and name it in `PROTOCOLS`. If it has
curves, write another module with `draw(results)` and name it in `CURVES`.
"""

PROTOCOLS = {
    "uci-dropout": "jdrop.study.reproduce.uci_dropout",
    "uci-ensemble-of-ten": "jdrop.study.reproduce.uci_ensemble_of_ten",
    "uci-ensembles": "jdrop.study.reproduce.uci_ensembles",
    "mnist-lenet": "jdrop.study.reproduce.mnist_lenet",
    "mnist-dropout": "jdrop.study.reproduce.mnist_dropout",
    "srivastava-figures": "jdrop.study.reproduce.srivastava_figures",
    "warde-farley": "jdrop.study.reproduce.warde_farley",
}
"""By name for the command, the module whose `make_protocol()` returns the protocol."""

CURVES = {"srivastava-figures": "jdrop.study.reproduce.srivastava_curves"}
"""By name of a protocol, the module whose `draw(results)` draws its curves.

The module is not part of the protocol, so another drawing makes no stored part stale.
"""
