"""Pictures of records and tables, in matplotlib."""

from .budget import plot_pareto
from .choices import observer_to_draw, plot_convergence, plot_observers, plot_scales, plot_sensitivity
from .gallery import plot_phases
from .model import clips_of, plot_density, plot_ranges
from .style import (
    BASE_COLORS,
    NAMED,
    PHASE_COLORS,
    dark,
    data_of,
    drawn,
    light,
    new_axes,
    say_nothing,
    symlog_from,
    to_png,
)
from .tensor import HAND, LiveHistogram, fixed_axes, plot_channels, plot_histogram, plot_timeline

__all__ = [
    "BASE_COLORS",
    "HAND",
    "LiveHistogram",
    "NAMED",
    "PHASE_COLORS",
    "clips_of",
    "dark",
    "data_of",
    "drawn",
    "fixed_axes",
    "light",
    "new_axes",
    "observer_to_draw",
    "plot_channels",
    "plot_convergence",
    "plot_density",
    "plot_histogram",
    "plot_observers",
    "plot_pareto",
    "plot_phases",
    "plot_ranges",
    "plot_scales",
    "plot_sensitivity",
    "plot_timeline",
    "say_nothing",
    "symlog_from",
    "to_png",
]
