"""The plot of the page that no run's own report has."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.evidence.summary import TEST_AUC, Comparison, Summary

_INK, _MUTED, _GRID, _ABOVE, _BELOW = "#22262e", "#6b7280", "#e6e8ec", "#1f8a70", "#b3423a"
_WIDTH, _ROW, _FRAME = 11.6, 0.27, 1.0  # inches


def differences(summary: Summary) -> Figure | None:
    """Test AUC of every method minus the baseline's, a panel a data set, a dot a seed."""
    found = {name: summary.comparisons(name, TEST_AUC) for name in summary.data_sets}
    found = {name: comparisons for name, comparisons in found.items() if comparisons}
    if not found:
        return None
    methods = [method for method in summary.methods if method != summary.grid.baseline]
    figure = Figure(figsize=(_WIDTH, _ROW * len(methods) + _FRAME), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False, sharex=True, sharey=True)[0]
    for axes, (data_set, comparisons) in zip(panels, found.items(), strict=True):
        axes.set_title(data_set, loc="left", fontsize=9.5)
        _draw(axes, {methods.index(method): one for method, one in comparisons.items()})
    panels[0].set_yticks(range(len(methods)), [summary.title(method) for method in methods])
    panels[0].set_ylim(len(methods) - 0.4, -0.6)
    figure.supxlabel("difference of test AUC", fontsize=9, color=_MUTED)
    return figure


def _draw(axes: Axes, comparisons: dict[int, Comparison]) -> None:
    """Bars and dots by place from above."""
    axes.axvline(0.0, color=_MUTED, linewidth=1)
    for place, one in comparisons.items():
        color = _ABOVE if one.mean > 0 else _BELOW
        axes.barh(place, one.mean, height=0.62, color=color, alpha=0.8 if one.is_significant else 0.35)
        axes.plot(one.differences, np.full(len(one.differences), place), "o", markersize=3, color=_INK)
    axes.grid(axis="x", color=_GRID)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.tick_params(axis="y", length=0, labelsize=9)
    axes.tick_params(axis="x", labelsize=8.5)
    axes.spines[["top", "right", "left"]].set_visible(False)
