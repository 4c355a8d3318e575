"""What jdrop does with the models of public code bases: the table of a documentation page.

Each check runs one function of jdrop on one model of `SIGNATURES`, and returns what its cell says.
"""

import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from signatures import OWN_MASKS, SIGNATURES, Signature

import jdrop
import jdrop.linen
import jdrop.nnx
from jdrop import ensemble, inference, thinned
from jdrop.network import Network, consumed_keys, predict
from jdrop.study.data import from_arrays
from jdrop.study.models import Model, ModelError, check_model

pytestmark = pytest.mark.grid

PAGE = Path(__file__).parents[1] / "scripts" / "docs" / "pages" / "any_model.md"
LABELS = jnp.array([0, 1, 2, 0])


def check_swap(signature: Signature) -> str:
    """All layers become jdrop's, and the parameters stay."""
    module = signature.module
    if isinstance(module, nn.Module):
        swapped = signature.network_of(jdrop.linen.swap(module))
    else:
        swapped = signature.network_of(lambda rngs: jdrop.nnx.swap(module(rngs=rngs)))
    inputs, key = signature.inputs, jax.random.key(0)
    before, after = (
        jax.eval_shape(network.init, key, inputs) for network in (signature.network, swapped)
    )
    assert before["params"] == after["params"]
    kinds = {site.kind for site in jdrop.audit(swapped, inputs).sites}
    layers = kinds - {"hand-written"}
    assert layers <= {"jdrop"}
    return "yes" if layers else "no layer"


def check_audit(signature: Signature) -> str:
    """Every layer is found, is on in training only, and has a key of its own."""
    report = jdrop.audit(signature.network, signature.inputs)
    assert report.sites
    assert all(site.on_in_training and not site.on_in_evaluation for site in report.sites)
    assert not any(site.shares_key_with for site in report.sites)
    by_hand = [site for site in report.sites if site.kind == "hand-written"]
    assert len(report.faults) == len(by_hand)
    assert all("signatures.py:" in site.name for site in by_hand)
    return "finds own masks" if by_hand else "yes"


def check_as_network(signature: Signature) -> str:
    """A pass draws masks if it has a key, and only then; `test_signatures.py` runs the passes."""
    network, inputs = signature.network, signature.inputs
    variables = jax.eval_shape(network.init, jax.random.key(0), inputs)
    assert consumed_keys(network, variables, inputs)
    outputs = jax.eval_shape(lambda variables: network(variables, inputs, None), variables)
    assert outputs.shape == (4, 3)
    given = {"call": signature.call, "outputs": signature.outputs}
    return ", ".join(f"`{name}=`" for name, value in given.items() if value is not None) or "yes"


def fit(network: Network, signature: Signature) -> None:
    """Trains two members for an epoch of one step."""
    init_key, fit_key = jax.random.split(jax.random.key(0))
    state = ensemble.init_ensemble(
        init_key,
        network,
        optax.sgd(0.1),
        signature.inputs,
        ensemble_size=2,
        loss_fn=signature.loss_fn,
    )
    trained, losses = ensemble.fit_ensemble(
        fit_key, state, signature.inputs, LABELS, num_epochs=1, batch_size=4
    )
    assert losses.shape == (2, 1)
    assert jnp.isfinite(losses).all()
    leaves = [jax.tree.leaves(each.variables["params"]) for each in (state, trained)]
    changed = [not jnp.array_equal(a, b) for a, b in zip(*leaves, strict=True)]
    # Not all: the bias of attention keys has no gradient, and a unit may be off for all examples.
    assert sum(changed) > len(changed) / 2


def check_fit_ensemble(signature: Signature) -> str:
    """Two members train on all inputs."""
    fit(signature.network, signature)
    return "yes" if signature.outputs is None else "`loss_fn=`"


def check_monte_carlo(signature: Signature) -> str:
    """Averages over masks are normalised, and differ from weight scaling."""
    network, inputs = signature.network, signature.inputs
    variables = network.init(jax.random.key(0), inputs)
    log_probs = inference.monte_carlo(jax.random.key(1), network, variables, inputs, num_samples=3)
    assert log_probs.shape == (4, 3)
    assert jnp.allclose(jax.nn.logsumexp(log_probs, -1), 0, atol=1e-5)
    assert not jnp.allclose(log_probs, predict(None, network, variables, inputs))
    return "yes"


def check_thin(signature: Signature) -> str:
    """Layers whose units no residual branch adds to others are thinned, and train."""
    network, inputs = signature.network, signature.inputs
    try:
        network, cell = thinned.thin(network, inputs, block_size=1), "yes"
    except thinned.ThinningError as error:
        if "no layer is to be thinned" in str(error):
            return "own masks"
        (others,) = re.findall(r"rates=(\{.*?\})", str(error))
        assert others == "{'drop': 0.5}"
        network, cell = thinned.thin(network, inputs, {"drop": 0.5}, block_size=1), "hidden layer"
    assert [(unit.size, unit.kept_blocks) for unit in network.step_rule.units] == [(8, 4)]
    fit(network, signature)
    return cell


def check_compare(signature: Signature) -> str:
    """The comparison accepts the model, its inputs and its outputs."""
    inputs = signature.inputs
    data = from_arrays("examples", inputs, LABELS, inputs, LABELS)
    model = Model(signature.network)
    shapes = jax.eval_shape(model.plain.init, jax.random.key(0), inputs)
    if not consumed_keys(model.plain, shapes, inputs):
        assert check_model(model, data) == 3
        return "yes"
    with pytest.raises(ModelError, match=r"must draw nothing.*signatures\.py:"):
        check_model(model, data)
    return "refuses own masks"


CHECKS = {
    "swap": check_swap,
    "audit": check_audit,
    "as_network": check_as_network,
    "fit_ensemble": check_fit_ensemble,
    "monte_carlo": check_monte_carlo,
    "thin": check_thin,
    "compare": check_compare,
}


def table() -> dict[str, dict[str, str]]:
    """The page's table: by row and column, the text of the cell."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    ((start, titles),) = ((index, row) for index, row in enumerate(cells) if row[0] == "code base")
    assert [title.strip("`") for title in titles[1:]] == list(CHECKS)
    return {row[0]: dict(zip(CHECKS, row[1:], strict=True)) for row in cells[start + 2 :]}


def test_the_page_has_a_row_for_each_model():
    assert list(table()) == list(SIGNATURES)
    assert set(OWN_MASKS) == {
        name for name, row in table().items() if row["audit"] == "finds own masks"
    }


@pytest.mark.parametrize("column", CHECKS)
@pytest.mark.parametrize("name", SIGNATURES)
def test_a_cell_of_the_page_says_what_happens(name, column):
    # Compiling each of these programs would take much longer than running it once.
    with jax.disable_jit():
        assert CHECKS[column](SIGNATURES[name]) == table()[name][column]
