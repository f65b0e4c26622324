"""Observers: they watch tensors and conclude scales. Importing this package registers all of them."""

from .base import Counts, Observer, QParamsDict, about_to_change, all_or_nothing, carry_into, fuse, qparams_for
from .base import refuse_pickle
from .flatten import ACTIVATIONS, BASE_NAMES, check_args, check_base_name, flatten_for_calibration, kind_of
from .hearing import NOBODY, current_feed, feed_owner, feeding, owned_by, unobserved
from .memo import Answers, TensorMemo, sharing
from .registry import Registry, find_observer, observer_key
from .spec import (
    ObserverSpec,
    DEFAULT_ARGS,
    args_or_default,
    specs_from_args,
    specs_from_config,
    known_kwargs,
    label_of,
    name_and_kwargs,
    new_observer,
    observer_name,
)

# Tables list observers in the order in which they are registered, which is this one.
from .minmax import MemorylessMinMaxObserver, MinMaxObserver, StaticMinMaxObserver
from .mse import FourOverSixObserver, MSEObserver, MemorylessMSEObserver, NVFP4ExpandedMSEObserver
from .imatrix import IMatrixMSEObserver, NVFP4ExpandedIMatrixObserver
from .histogram import EntropyObserver, HistogramMSEObserver, HistogramObserver, PercentileObserver
from .fisher import CLIPS, FisherMSEObserver, clip_costs, clipped_end

__all__ = [
    "ACTIVATIONS",
    "Answers",
    "BASE_NAMES",
    "CLIPS",
    "Counts",
    "DEFAULT_ARGS",
    "EntropyObserver",
    "FisherMSEObserver",
    "FourOverSixObserver",
    "HistogramMSEObserver",
    "HistogramObserver",
    "IMatrixMSEObserver",
    "MSEObserver",
    "MemorylessMSEObserver",
    "MemorylessMinMaxObserver",
    "MinMaxObserver",
    "NOBODY",
    "NVFP4ExpandedIMatrixObserver",
    "NVFP4ExpandedMSEObserver",
    "Observer",
    "ObserverSpec",
    "PercentileObserver",
    "QParamsDict",
    "Registry",
    "StaticMinMaxObserver",
    "TensorMemo",
    "about_to_change",
    "all_or_nothing",
    "args_or_default",
    "carry_into",
    "check_args",
    "check_base_name",
    "clip_costs",
    "clipped_end",
    "current_feed",
    "feed_owner",
    "feeding",
    "find_observer",
    "flatten_for_calibration",
    "fuse",
    "kind_of",
    "known_kwargs",
    "label_of",
    "name_and_kwargs",
    "new_observer",
    "observer_key",
    "observer_name",
    "owned_by",
    "qparams_for",
    "refuse_pickle",
    "sharing",
    "specs_from_args",
    "specs_from_config",
    "unobserved",
]
