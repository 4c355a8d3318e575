"""Is one dropout network enough, or should several networks be averaged? On your data.

The settings are tiny, so that this takes seconds. Leave them out for an answer that you can trust.
"""

import flax.linen as nn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jdrop
import jdrop.linen


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Dense(64)(x))
        x = jdrop.linen.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(10)(x)


images, labels = load_digits(return_X_y=True)
train_x, test_x, train_y, test_y = train_test_split(
    images / 16, labels, train_size=300, random_state=0
)

comparison = jdrop.compare(
    Net(),
    train_x,
    train_y,
    test_x,
    test_y,
    replicates=3,  # How often everything is repeated with other seeds: intervals come from it.
    ensemble_size=4,  # Plain networks in the largest average.
    epochs=10,
    controls=False,  # Train no networks of equal budget,
    theory=False,  # and none for the claims of the theory.
    # out="folder" keeps a report, figures, numbers and predictions there.
)

# The first point is one network: trained with dropout, read once without it.
one_network = comparison.method("dropout").points[0]
for score in ("nll", "error"):
    print(f"{score}: one dropout network is worth {one_network.worth[score]} plain networks")

# "2.1 [1.4, 3.0]": as good as the average of 2.1 plain networks, 95 % interval 1.4 to 3.0.
# "≤1": one plain network does as well. ">4": the average of all four is not as good.
# "not resolved": these settings cannot tell; repeat and train more, or test on more examples.
test = one_network.against_ensemble["nll"]
print(f"against the average of all four, margin {test.margin} nats: {test.verdict}")
