"""The atlas: what one dropout network is worth, over data sets, sizes, widths, rates and noise.

| file | holds |
|---|---|
| `cells.py` | the cells, each a study, and the settings that all share |
| `rows.py` | what a study says, as a row of the table |
| `report.py` | the sentences, the table and the page |
| `figure.py` | the figure |
| `command.py` | runs the cells, the cheapest first |

To add a cell, name it in `make_groups` of `cells.py`.
"""
