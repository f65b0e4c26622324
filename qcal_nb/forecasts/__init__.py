"""What a scheme will cost a model's predictions, told from one recording with gradients."""

from ..evaluate import STATE_WORDS, forecast, forecast_modules

__all__ = [
    "STATE_WORDS",
    "forecast",
    "forecast_modules",
]
