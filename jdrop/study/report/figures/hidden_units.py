"""Figures of hidden units: co-adaptation and first-layer weights."""

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jdrop.statistics import Interval
from jdrop.study.report.figures.style import (
    add_grid,
    axis_label,
    interval_arrays,
    legend_above,
    new_figure,
    style_of,
)
from jdrop.study.results import Comparison
from jdrop.study.scores import SCORES

MAX_TILES = 64


def co_adaptation(comparison: Comparison) -> Figure | None:
    """Correlation and sparsity of hidden units, and the effect of deleting them."""
    results = comparison.co_adaptation
    if not results or not next(iter(results.values())).correlation:
        return None
    figure = new_figure(6)
    (correlation_axes, zero_axes), (deletion_axes, histogram_axes) = figure.subplots(2, 2)
    correlations = {networks: result.correlation for networks, result in results.items()}
    zero_shares = {networks: result.zero_share for networks, result in results.items()}
    _draw_layer_bars(correlation_axes, correlations, "mean |correlation| of units")
    _draw_layer_bars(zero_axes, zero_shares, "share of activations that are 0")
    score = next(iter(next(iter(results.values())).deletion))
    for networks, result in results.items():
        color, _ = style_of(networks)
        values = np.array(result.deletion[score]) * SCORES[score].scale
        deleted = np.array(result.deleted) * 100
        deletion_axes.plot(deleted, values, color=color, label=networks)
        layer = list(result.activation_counts)[-1]
        counts = result.activation_counts[layer]
        low, high = result.activation_min[layer], result.activation_max[layer]
        edges = np.linspace(low, high, len(counts) + 1)
        histogram_axes.plot((edges[1:] + edges[:-1]) / 2, counts, color=color, label=networks)
    deletion_axes.set_xlabel("hidden units deleted (%)")
    deletion_axes.set_ylabel(f"test {axis_label(score)}")
    histogram_axes.set_yscale("log")
    histogram_axes.set_xlabel("activation, last hidden layer")
    histogram_axes.set_ylabel("share")
    for axes in (correlation_axes, zero_axes, deletion_axes, histogram_axes):
        add_grid(axes)
    legend_above(figure, deletion_axes)
    return figure


def _draw_layer_bars(
    axes: Axes, by_networks: Mapping[str, Mapping[str, Interval]], label: str
) -> None:
    """Draws a bar for each layer and each method, beside each other."""
    for index, (networks, by_layer) in enumerate(by_networks.items()):
        mean, low, high = interval_arrays(list(by_layer.values()))
        x = np.arange(len(by_layer)) + 0.4 * index - 0.2
        errors = np.stack([mean - low, high - mean])
        color, _ = style_of(networks)
        axes.bar(x, mean, 0.36, yerr=errors, color=color, label=networks, alpha=0.85)
    num_layers = len(next(iter(by_networks.values())))
    axes.set_xticks(range(num_layers), [f"layer {layer + 1}" for layer in range(num_layers)])
    axes.set_ylabel(label)


def features(comparison: Comparison) -> Figure | None:
    """First-layer weights as images: of units, or of a convolution's filters."""
    weights_by_networks = {
        networks: np.array(result.features)
        for networks, result in comparison.co_adaptation.items()
        if result.features is not None
    }
    if not weights_by_networks:
        return None
    figure = new_figure(3.6)
    panels = figure.subplots(1, len(weights_by_networks), squeeze=False)[0]
    for axes, (networks, weights) in zip(panels, weights_by_networks.items(), strict=True):
        shown = weights[:MAX_TILES]
        axes.imshow(_tile(shown), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        axes.set_title(f"{networks}: {len(shown)} tiles", loc="left")
        axes.set_axis_off()
    return figure


def _tile(weights: np.ndarray) -> np.ndarray:
    """Arranges square images in a grid, each divided by its largest absolute weight."""
    side = math.isqrt(weights.shape[1])
    num_columns = math.ceil(math.sqrt(len(weights)))
    num_rows = -(-len(weights) // num_columns)
    canvas = np.full((num_rows * (side + 1), num_columns * (side + 1)), np.nan)
    for index, weight in enumerate(weights):
        row, column = divmod(index, num_columns)
        top, left = row * (side + 1), column * (side + 1)
        largest = np.abs(weight).max() or 1
        canvas[top : top + side, left : left + side] = weight.reshape(side, side) / largest
    return canvas
