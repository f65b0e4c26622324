"""Calibrate and inspect quantization of language models, from a notebook."""

__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .models import load_tiny_llama
    from .pipelines import calibrate
    from .records import CalibrationRecord, record
    from .workbench import Workbench

_homes = {
    "CalibrationRecord": "records",
    "Workbench": "workbench",
    "calibrate": "pipelines",
    "load_tiny_llama": "models",
    "record": "records",
}

__all__ = ["CalibrationRecord", "Workbench", "__version__", "calibrate", "load_tiny_llama", "record"]


def __getattr__(name: str):
    "Import a public name from its module on first use, so that `import qcal_nb` alone stays light."
    if name not in _homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = import_module(f".{_homes[name]}", __name__)
    value = globals()[name] = getattr(home, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_homes})
