"""What a scheme will cost a model's predictions, told from one recording with gradients."""

from ..evaluate import Allocation, STATE_WORDS, allocate, forecast, forecast_modules, pareto

__all__ = [
    "Allocation",
    "STATE_WORDS",
    "allocate",
    "forecast",
    "forecast_modules",
    "pareto",
]
