"""Data on its way through a model: any form of text to batches, one feed loop, whole passes or block by block."""

from .basic import PIPELINES, calibrate, scales_of_segment
from .batch import (
    Batch,
    as_batch,
    as_batches,
    check_ids,
    check_mask,
    feed,
    mask_in_words,
    no_more,
    not_empty,
    numbered,
    predicting,
    reads_two_sequences,
    running_batch,
    warn_if_too_long,
    warn_of_padding,
)
from .context import attention_used, calibration_context, check_attention
from .data import RepeatableBatches, batches, expected_batches
from .gradient_pass import backward, backward_context
from .loop import Fed, check_pipeline, passes, shown
from .sequential import PROPAGATE

__all__ = [
    "Batch",
    "Fed",
    "PIPELINES",
    "PROPAGATE",
    "RepeatableBatches",
    "as_batch",
    "as_batches",
    "attention_used",
    "backward",
    "backward_context",
    "batches",
    "calibrate",
    "calibration_context",
    "check_attention",
    "check_ids",
    "check_mask",
    "check_pipeline",
    "expected_batches",
    "feed",
    "mask_in_words",
    "no_more",
    "not_empty",
    "numbered",
    "passes",
    "predicting",
    "reads_two_sequences",
    "running_batch",
    "scales_of_segment",
    "shown",
    "warn_if_too_long",
    "warn_of_padding",
]
