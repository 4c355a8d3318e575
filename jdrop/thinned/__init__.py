"""Thinned training: each step deletes some units and trains the smaller network.

`thin` makes a network that is trained in this way. `freeze_deleted` does the same for steps at full
size: it leaves the weights of deleted units unchanged.
"""

from jdrop.thinned.optimizer import freeze_deleted
from jdrop.thinned.step import ThinnedStep
from jdrop.thinned.thinning import thin
from jdrop.thinned.units import ThinningError, UnitGroup

__all__ = ["ThinnedStep", "ThinningError", "UnitGroup", "freeze_deleted", "thin"]
