"""The protocol of figures 9 to 11: its networks, its averages against loops, its parts, curves."""

import gzip

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdrop import inference, metrics, scale_weights
from jdrop.network import dropout_sites, predict
from jdrop.study.data import images, no_progress
from jdrop.study.data.dataset import stratified
from jdrop.study.models import MLP, Model
from jdrop.study.reproduce import published, report, runner
from jdrop.study.reproduce import srivastava_curves as curves
from jdrop.study.reproduce import srivastava_figures as figures
from jdrop.study.reproduce import srivastava_networks as networks
from jdrop.study.reproduce.protocol import Options, PartResult

SHARES = {20: 0.5, 60: 1.0}
FRACTION = 1e-4
"""Ten updates, and a hundredth of the hidden units."""


def made_up_digits(folder):
    """Writes 60 training and 20 test images as gzipped IDX files."""
    generator = np.random.default_rng(0)
    (folder / "mnist").mkdir(parents=True)
    for images_file, labels_file, count in ((*images.FILES[:2], 60), (*images.FILES[2:], 20)):
        labels = np.resize(np.arange(10, dtype=np.uint8), count)
        # The column that is bright tells the class.
        pixels = generator.integers(0, 60, (count, 28, 28), np.uint8)
        pixels[np.arange(count), :, 2 * labels] = 250
        for name, array in ((images_file, pixels), (labels_file, labels)):
            header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
            path = folder / "mnist" / f"{name}.gz"
            path.write_bytes(gzip.compress(header + array.tobytes()))


def make_small(patch):
    """Makes three parts of few networks and few masks."""
    for module in (figures, curves):
        patch.setattr(module, "UPDATE_SHARES", SHARES)
        patch.setattr(module, "ENSEMBLE_SIZE", 2)
        patch.setattr(module, "LARGEST_ENSEMBLE", 3)
        patch.setattr(module, "NUM_MASKS", 4)
    patch.setattr(figures, "SHOWN_MASKS", (1, 4))
    patch.setattr(figures, "PARTS_9", {"Figure 9, keep 0.1 and 1": (0.1, 1.0)})


@pytest.fixture(scope="module")
def reproduction(tmp_path_factory):
    """A run of small networks, and its folder, with the report."""
    folder = tmp_path_factory.mktemp("srivastava")
    made_up_digits(folder)
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        options = Options(folder, splits=2, fraction=FRACTION)
        protocol = figures.make_protocol()
        out = folder / "out"
        result = runner.reproduce(protocol, options, out, lambda _: None, no_progress)
        report.write(result, "jdrop reproduce srivastava-figures", out)
    return result, out


def test_all_parts_have_a_finite_value_for_each_seed(reproduction):
    result, _ = reproduction
    assert list(result.results) == [
        "Figure 10, 20 examples",
        "Figures 10 and 11, 60 examples",
        "Figure 9, keep 0.1 and 1",
    ]
    rows = {row: values for part in result.results.values() for row, values in part.values.items()}
    masks = ["Figure 11, 1 mask", *(f"Figure 11, {count} masks" for count in (2, 3, 4))]
    averages = ["Figure 11, 1 network", *(f"Figure 11, {count} networks" for count in (2, 3))]
    points = [f"Figure 9{panel}, keep {keep}" for panel in "ab" for keep in ("0.1", "1")]
    sizes = ["Figure 10, 20 examples", "Figure 10, 60 examples"]
    assert set(rows) == {*masks, *averages, *points, *sizes}
    numbers = [values for row in rows.values() for values in row.values()]
    assert {len(values) for values in numbers} == {2}
    assert np.isfinite(numbers).all()
    assert result.results["Figure 10, 20 examples"].epochs == 5
    assert result.results["Figures 10 and 11, 60 examples"].paper_epochs == 100_000


def test_differences_are_those_of_the_rows(reproduction):
    result, _ = reproduction
    rows = {row: values for part in result.results.values() for row, values in part.values.items()}
    row = rows["Figure 10, 60 examples"]
    for name, other in (("difference", "plain"), ("ensemble-difference", "ensemble")):
        for ending in ("", "-nll"):
            expected = np.subtract(row[f"dropout{ending}"], row[f"{other}{ending}"])
            np.testing.assert_allclose(row[name + ending], expected)
    # The average of three networks, whose single errors have the mean of the row.
    np.testing.assert_allclose(rows["Figure 11, 1 network"]["networks-curve"], row["plain"])
    largest, last = rows["Figure 11, 3 networks"], rows["Figure 11, 4 masks"]
    expected = np.subtract(last["monte-carlo"], largest["largest"])
    np.testing.assert_allclose(largest["largest-difference"], expected)
    expected = np.subtract(last["monte-carlo"], row["dropout"])
    np.testing.assert_allclose(last["mask-difference"], expected)
    narrow, wide = (rows[f"Figure 9{panel}, keep 0.1"] for panel in "ab")
    expected = np.subtract(wide["dropout"], narrow["dropout"])
    np.testing.assert_allclose(wide["panel-difference"], expected)
    expected = np.subtract(narrow["dropout"], rows["Figure 9a, keep 1"]["plain"])
    np.testing.assert_allclose(narrow["difference"], expected)


def test_the_report_has_the_curves_and_says_what_the_fraction_changes(reproduction):
    _, out = reproduction
    markdown, html = ((out / name).read_text() for name in ("report.md", "report.html"))
    for name in ("figure-9", "figure-10", "figure-11"):
        assert (out / f"{name}.png").stat().st_size > 10_000
        assert f"({name}.png)" in markdown
        assert f'id="{name}-' in html
    for text in (markdown, html):
        assert "20-20-20 units in Figure 9a, with 3-3-5 kept units in Figure 9b" in text
        assert "10-10-20 in Figures 10 and 11" in text
        assert "5, 10 updates for 20, 60 examples" in text


def test_curves_need_no_part_but_their_own(reproduction, monkeypatch):
    make_small(monkeypatch)
    result, _ = reproduction
    assert curves.draw({}) == {}
    first, second, third = result.results.items()
    for part, names in ((first, {"figure-10"}), (second, {"figure-10", "figure-11"})):
        assert set(curves.draw(dict([part]))) == names
    assert set(curves.draw(dict([third]))) == {"figure-9"}


def test_a_training_error_of_zero_is_drawn():
    rows = {
        figures.row_9("a", keep): {"dropout": [1.0, 1.2], "training-error": [error, error]}
        for keep, error in ((0.4, 0.2), (0.6, 0.0))
    }
    figure, _ = curves.draw({"Figure 9": PartResult(rows, 1, 1, 0.0)})["figure-9"]
    training = figure.axes[2]
    drawn = training.transData.transform([(0.4, 0.2), (0.6, 0.0)])
    bottom, top = training.transAxes.transform([(0, 0), (0, 1)])[:, 1]
    assert np.isfinite(drawn).all()
    assert bottom - 1e-6 <= drawn[1, 1] < drawn[0, 1] < top


def test_the_drawing_is_no_part_of_the_program():
    files = {path.name for path in runner._program(runner.Path(figures.__file__))}
    assert files == {"srivastava_figures.py", "srivastava_networks.py"}


def test_every_published_row_and_measure_exists():
    measures = figures.make_protocol().measures
    rows = {figures.row_9(panel, keep) for panel in "ab" for keep in figures.KEEP_PROBS}
    rows |= {figures.row_10(size) for size in figures.UPDATE_SHARES}
    rows |= {figures.row_11(count, "masks") for count in figures.SHOWN_MASKS}
    for row, measure in published.SRIVASTAVA_FIGURES:
        assert row in rows
        assert measure in measures
    assert sorted(sum(figures.PARTS_9.values(), ())) == list(figures.KEEP_PROBS)


def test_keep_1_is_a_network_without_dropout(getkey):
    inputs = jnp.asarray(np.random.default_rng(0).uniform(size=(5, 7)), jnp.float32)
    network = networks.make_network((6, 4), 1 - 1.0, 0.0)
    variables = network.init(getkey(), inputs)
    with_key = network(variables, inputs, getkey())
    np.testing.assert_array_equal(with_key, network(variables, inputs, None))
    plain = Model(lambda: MLP((6, 4), 10, 0.5)).plain
    np.testing.assert_array_equal(with_key, plain(variables, inputs, None))


def test_dropout_is_that_of_the_paper(getkey):
    """Masks alone in training; at test, the weights times the keep probability."""
    inputs = jnp.asarray(np.random.default_rng(0).uniform(1, 2, size=(40, 3)), jnp.float32)
    network = networks.make_network((10,), 0.4, 0.2)
    variables = network.init(getkey(), inputs)
    rates = [site.rate for site in dropout_sites(network, variables, inputs)]
    assert rates == []  # The layers are replaced.
    layers = {
        "Dense_0": {"kernel": jnp.eye(3, 10), "bias": jnp.ones(10)},
        "Dense_1": {"kernel": jnp.eye(10), "bias": jnp.zeros(10)},
    }
    hidden = inputs @ layers["Dense_0"]["kernel"] + 1
    trained = np.asarray(network({"params": layers}, inputs, getkey()))
    # All units from the fourth on read no input: they are 1 where they are kept.
    assert set(np.unique(trained[:, 3:])) == {0.0, 1.0}
    # A unit of an input is 1, or 1 plus the input, or dropped.
    first = trained[:, :3]
    choices = np.stack([np.zeros_like(first), np.ones_like(first), np.asarray(hidden[:, :3])])
    assert (np.abs(choices - first).min(0) < 1e-6).all()
    plain = Model(lambda: MLP((10,), 10, 0.4, 0.2)).plain
    scaled = scale_weights(layers, {"Dense_0/kernel": 0.2, "Dense_1/kernel": 0.4})
    np.testing.assert_allclose(
        network({"params": layers}, inputs, None),
        plain({"params": scaled}, inputs, None),
        rtol=1e-4,
    )


def test_networks_of_figure_9b_keep_equally_many_units():
    for keep_prob in figures.KEEP_PROBS:
        kept = np.multiply(figures.units_b(keep_prob, 1.0), keep_prob)
        np.testing.assert_allclose(kept, (256, 256, 512), atol=keep_prob / 2 + 1e-9)
    assert figures.units_b(0.1, 1.0) == (2560, 2560, 5120)
    assert figures.units_b(1.0, 0.25) == (128, 128, 256)


def test_training_sets_are_nested_and_have_all_classes_in_proportion():
    labels = np.random.default_rng(0).permutation(np.resize(np.arange(10), 200))
    small, large = (networks.training_rows(labels, size, 7, 3) for size in (20, 100))
    assert small.shape == (3, 20)
    for few, many in zip(small, large, strict=True):
        assert set(few) <= set(many)
        np.testing.assert_array_equal(np.bincount(labels[few]), np.full(10, 2))
        np.testing.assert_array_equal(np.bincount(labels[many]), np.full(10, 10))
    # Seeds have other sets, and more seeds keep the first ones.
    assert set(small[0]) != set(small[1])
    np.testing.assert_array_equal(networks.training_rows(labels, 20, 7, 2), small[:2])
    first = stratified(np.random.default_rng((7, 0)), labels, 20)
    np.testing.assert_array_equal(small[0], np.flatnonzero(first))


def test_the_average_of_k_masks_is_the_mean_of_k_probabilities(getkey):
    generator = np.random.default_rng(0)
    inputs = jnp.asarray(generator.uniform(size=(30, 5)), jnp.float32)
    labels = jnp.asarray(generator.integers(0, 10, 30))
    network = networks.make_network((8, 8), 0.5, 0.2)
    variables = jax.tree.map(lambda leaf: 4 * leaf, network.init(getkey(), inputs))
    key = getkey()
    errors, nlls = networks.mask_curve(
        jax.random.clone(key), network, variables, inputs, labels, num_masks=3
    )
    probs = []
    for sample in range(3):
        mask_key = jax.random.fold_in(jax.random.clone(key), sample)
        probs.append(np.exp(np.asarray(predict(mask_key, network, variables, inputs), float)))
        mean = np.mean(probs, 0)
        np.testing.assert_allclose(
            nlls[sample], -np.log(mean[np.arange(30), labels]).mean(), rtol=1e-4
        )
        np.testing.assert_allclose(
            errors[sample], 100 * (mean.argmax(1) != np.asarray(labels)).mean(), rtol=1e-5
        )
    assert np.abs(probs[0] - probs[1]).max() > 0.01
    library = inference.monte_carlo(
        jax.random.clone(key), network, variables, inputs, num_samples=3
    )
    np.testing.assert_allclose(nlls[2], metrics.nll(library, labels), rtol=1e-5)


def test_averages_of_networks_are_means_of_probabilities_of_disjoint_groups():
    logits = np.random.default_rng(0).normal(size=(2, 5, 6, 10)).astype(np.float32)
    log_probs = jax.nn.log_softmax(jnp.asarray(logits))
    averages = np.exp(networks.averages(log_probs, 2))
    probs = np.exp(np.asarray(log_probs))
    expected = np.stack([probs[:, 0:2].mean(1), probs[:, 2:4].mean(1)], axis=1)
    np.testing.assert_allclose(averages, expected, rtol=1e-5)
    np.testing.assert_allclose(
        np.exp(networks.averages(log_probs, 5))[:, 0], probs.mean(1), rtol=1e-5
    )
    labels = np.arange(6)
    errors, nlls = networks.score(jnp.log(jnp.asarray(expected)), jnp.asarray(labels))
    picked = expected[:, :, labels, labels]
    np.testing.assert_allclose(nlls, -np.log(picked).mean(-1), rtol=1e-4)
    np.testing.assert_allclose(errors, 100 * (expected.argmax(-1) != labels).mean(-1), rtol=1e-5)


def test_schedules_and_the_norm_of_weights():
    optimizer = networks.make_optimizer(20)
    params = {"kernel": jnp.zeros((4, 2)), "bias": jnp.zeros(2)}
    grads = {"kernel": -100 * jnp.ones((4, 2)), "bias": jnp.zeros(2)}

    @jax.jit
    def step(state, params):
        updates, state = optimizer.update(grads, state, params)
        return state, jax.tree.map(jnp.add, params, updates)

    state, rates, momenta = optimizer.init(params), [], []
    for _ in range(21):
        state, params = step(state, params)
        rates.append(float(state[0].hyperparams["learning_rate"]))
        momenta.append(float(state[0].hyperparams["momentum"]))
    np.testing.assert_allclose(rates, 0.1 * (1 - np.arange(21) / 20), atol=1e-7)
    np.testing.assert_allclose(momenta, [0.5, 0.725, *[0.95] * 19], rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(params["kernel"], axis=0), 3, rtol=1e-5)


def test_the_sentence_on_a_fraction_names_units_and_updates():
    sentence = figures.describe_fraction(0.0625)
    assert "512-512-512 units in Figure 9a, with 64-64-128 kept units" in sentence
    assert "256-256-512 in Figures 10 and 11" in sentence
    assert "625, 1,250, 3,120, 6,250, 6,200, 6,000 updates" in sentence
