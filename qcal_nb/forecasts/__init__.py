"""What a scheme will cost a model's predictions, told from one recording with gradients."""

from ..evaluate import Allocation, STATE_WORDS, Spared, allocate, forecast, forecast_modules, pareto, spare

__all__ = [
    "Allocation",
    "STATE_WORDS",
    "Spared",
    "allocate",
    "forecast",
    "forecast_modules",
    "pareto",
    "spare",
]
