"""Models to try things on: the embedded Llama, SmolLM2 from PyPI, texts, and outliers on demand."""

from .outliers import inject_outliers
from .smollm2 import load_smollm2, require_smollm2
from .texts import calibration_texts, evaluating, heldout_texts, perplexity, positions_of, usual_length
from .tiny_llama import load_tiny_llama, no_progress_bars

__all__ = [
    "calibration_texts",
    "evaluating",
    "heldout_texts",
    "inject_outliers",
    "load_smollm2",
    "load_tiny_llama",
    "no_progress_bars",
    "perplexity",
    "positions_of",
    "require_smollm2",
    "usual_length",
]
