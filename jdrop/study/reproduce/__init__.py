"""Published results, reproduced: the paper's protocol, and its numbers beside ours.

| file | holds |
|---|---|
| `protocol.py` | what a protocol is; which of our numbers agree with the paper's |
| `published.py` | the published numbers, each with its source |
| `uci.py` | the UCI tables of regression and their standard splits |
| `regression.py` | networks of all splits, trained at once and read |
| `classification.py` | networks of classes, and averages of all subsets of them |
| `uci_*.py`, `mnist_*.py`, `warde_farley.py` | a protocol each |
| `runner.py` | runs a protocol in a folder, part by part |
| `report.py` | the table, the figure and the page |

To add a protocol, write a module with `make_protocol()` and name it in `PROTOCOLS`.
"""

PROTOCOLS = {
    "uci-dropout": "jdrop.study.reproduce.uci_dropout",
    "uci-ensemble-of-ten": "jdrop.study.reproduce.uci_ensemble_of_ten",
    "uci-ensembles": "jdrop.study.reproduce.uci_ensembles",
    "mnist-lenet": "jdrop.study.reproduce.mnist_lenet",
    "mnist-dropout": "jdrop.study.reproduce.mnist_dropout",
    "warde-farley": "jdrop.study.reproduce.warde_farley",
}
"""By name for the command, the module whose `make_protocol()` returns the protocol."""
