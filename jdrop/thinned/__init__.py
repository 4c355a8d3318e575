"""Thinned training: in each step some units are deleted and the smaller network is trained.

`thin` makes of a network one that is trained so: `structure` finds what belongs to the units of a
layer, `thinning` takes it out and puts it back, in `blocks` of arrays. `freeze_deleted` gives
training at full size the same rule.
"""

from jdrop.thinned.optimizer import freeze_deleted as freeze_deleted
from jdrop.thinned.structure import ThinningError as ThinningError
from jdrop.thinned.thinning import Thinning as Thinning
from jdrop.thinned.thinning import Units as Units
from jdrop.thinned.thinning import thin as thin
