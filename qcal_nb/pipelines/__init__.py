"""Data on its way through a model: any form of text to batches, whole passes, block by block."""

from .basic import PIPELINES, calibrate
from .context import attention_used, calibration_context, check_attention
from .data import (
    RepeatableBatches,
    Running,
    batches,
    check_mask,
    expected_batches,
    feed,
    mask_in_words,
    not_empty,
    numbered,
    reads_two_sequences,
    running_of,
    warn_if_too_long,
    warn_of_padding,
)
from .sequential import PROPAGATE

__all__ = [
    "PIPELINES",
    "PROPAGATE",
    "RepeatableBatches",
    "Running",
    "attention_used",
    "batches",
    "calibrate",
    "calibration_context",
    "check_attention",
    "check_mask",
    "expected_batches",
    "feed",
    "mask_in_words",
    "not_empty",
    "numbered",
    "reads_two_sequences",
    "running_of",
    "warn_if_too_long",
    "warn_of_padding",
]
