import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

# NumPy draws the test data, since its generators compile nothing.


@pytest.fixture
def rng():
    return np.random.default_rng(2012)


@pytest.fixture
def predictions(rng):
    """Random predictions of 7 members, `[member, batch, class]`, and labels."""
    log_probs = scipy.special.log_softmax(2 * rng.normal(size=(7, 300, 5)), -1)
    return jnp.asarray(log_probs, jnp.float32), jnp.asarray(rng.integers(5, size=300))


@pytest.fixture
def informed(predictions, rng):
    """The same predictions, and labels drawn from the first member's logits, halved."""
    logits = np.asarray(predictions[0][0]) / 2
    return predictions[0], jnp.asarray((logits + rng.gumbel(size=logits.shape)).argmax(-1))


@pytest.fixture
def wide_probs(predictions):
    """The same predictions as probabilities in float64, which sum to 1."""
    probs = np.exp(np.asarray(predictions[0], np.float64))
    return probs / probs.sum(-1, keepdims=True)
