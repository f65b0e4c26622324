"""The panels of the workbench, each of them a widget by itself."""

from .code import CodePanel
from .comparison import ObserverComparison
from .explorer import RangeExplorer
from .inspector import HistogramInspector
from .schemes import SchemeComparison
from .stepper import LifecycleStepper
from .workbench import Workbench

__all__ = [
    "CodePanel",
    "HistogramInspector",
    "LifecycleStepper",
    "ObserverComparison",
    "RangeExplorer",
    "SchemeComparison",
    "Workbench",
]
