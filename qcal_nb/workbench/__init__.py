"""The workbench: `Workbench(model, data, tokenizer)`, a notebook's page for one calibration."""

from ..widgets import Workbench

__all__ = [
    "Workbench",
]
