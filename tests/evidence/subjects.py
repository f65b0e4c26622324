"""The two models, their texts, and how the KL of a recipe is measured: text by text, against the same model."""
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from qcal_nb.evaluate import named_schemes
from qcal_nb.evaluate.divergence import QuantizationSwitches, divergence_of, eval_batches, logits_of, undisturbed
from qcal_nb.lifecycle import QuantizationModifier, borrowed, observers_with_gradients
from qcal_nb.models import calibration_texts, heldout_texts, load_smollm2, load_tiny_llama, require_smollm2
from qcal_nb.pipelines import calibrate
from qcal_nb.records import CalibrationRecord, record
from qcal_nb.session import Session

LENGTH = 256                # tokens of every text: a forecast is of texts as long as those that are measured
RECORDED, MEASURED = 10, 8  # texts
AT_ONCE = 4                 # texts in a batch that is measured: the weights are quantized once for all of them
SEED = 0
STATIC = "INT8_STATIC"      # the scheme that the advice is about


def spread_out(found: Sequence[Any], n: int, first: int = 0) -> list[Any]:
    "`n` of them, evenly spaced, since neighbours are passages of one document. Another `first`, others."
    step = len(found) // n
    if not 0 <= first < step: raise ValueError(f"{n} texts from the {first}th on: only {len(found)} are long enough")
    return list(found[first::step][:n])


def ids_of(tokenizer: Any, texts: Iterable[str], n: int, length: int, first: int = 0) -> list[Tensor]:
    "Token ids (1, length) of `n` texts that have so many tokens, cut to them."
    ids = [tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, :length] for text in texts]
    return spread_out([one for one in ids if one.shape[1] == length], n, first)


def kl_of_texts(logits: Tensor, batch: dict[str, Tensor], original: Tensor) -> list[float]:
    "The KL of each text of a batch, nats per token."
    rows = range(len(logits))
    return [divergence_of(logits[i:i + 1], {key: value[i:i + 1] for key, value in batch.items()}, original[i:i + 1]).kl
            for i in rows]


@dataclass(frozen=True)
class Subject:
    "A model to gather evidence on. What takes long is made when it is first needed."

    name: str
    load: Callable[[torch.dtype], tuple[Module, Any]]
    group_size: int         # of schemes that have groups of integers
    findings: int           # how many of its findings have remedies
    every: int = 1          # of its Linears, one in so many is measured alone; all of them otherwise
    length: int = LENGTH
    recorded: int = RECORDED
    measured: int = MEASURED
    require: Callable[[], None] = field(default=lambda: None)

    @cached_property
    def _loaded(self) -> tuple[Module, Any]: return self.load(torch.float32)

    @property
    def model(self) -> Module: return self._loaded[0]

    @cached_property
    def in_bfloat16(self) -> Module:
        "The same weights as a checkpoint stores them: for bytes."
        return self.load(torch.bfloat16)[0]

    def calibration(self, first: int = 0) -> list[Tensor]:
        "The texts to record, or as many others."
        return ids_of(self._loaded[1], calibration_texts(), self.recorded, self.length, first)

    @cached_property
    def feeds(self) -> list[Tensor]: return self.calibration()

    @cached_property
    def held_out(self) -> list[dict[str, Tensor]]:
        ids = ids_of(self._loaded[1], heldout_texts(), self.measured, self.length)
        return eval_batches(list(torch.cat(ids).split(AT_ONCE)))

    @cached_property
    def originals(self) -> list[Tensor]:
        "The logits of the model as it is, of each batch."
        with undisturbed(self.model, "evidence"): return [logits_of(self.model, batch) for batch in self.held_out]

    @cached_property
    def record(self) -> CalibrationRecord: return self.recording(self.model, scheme=STATIC)

    def recording(self, model: Module, **options: Any) -> CalibrationRecord:
        return record(model, self.feeds, **dict(gradients=True, progress=False) | options)

    def of_texts(self, first: int) -> CalibrationRecord:
        "A recording of other texts."
        return record(self.model, self.calibration(first), scheme=STATIC, gradients=True, progress=False)

    def cut_to(self, length: int) -> "Subject":
        "The same model on shorter texts: as many tokens, in more texts."
        more = self.length // length
        return replace(self, length=length, recorded=more * self.recorded, measured=more * self.measured)

    def sample(self, names: Iterable[str]) -> list[str]:
        "One name in `every`, from a first one that the seed decides."
        names = list(names)
        return names[random.Random(SEED).randrange(self.every)::self.every]

    # --- measuring ---

    @contextmanager
    def quantized(self, scheme: Any) -> Iterator[Callable[..., list[float]]]:
        """Inside the block the model is calibrated, on the texts of the record if need be. What it gives measures the
        KL of each held-out text, in nats per token, with these modules quantized or with all of them."""
        modifier, = named_schemes([scheme]).values()
        originals = self.originals
        with self._calibrated(modifier):
            board = QuantizationSwitches(self.model)

            def measure(names: Iterable[str] | None = None) -> list[float]:
                with undisturbed(self.model, "evidence"), board.only(board.modules if names is None else names):
                    found = [kl_of_texts(logits_of(self.model, batch), batch, original)
                             for batch, original in zip(self.held_out, originals)]
                return sum(found, [])
            yield measure

    @contextmanager
    def _calibrated(self, modifier: QuantizationModifier) -> Iterator[None]:
        "Inside the block the model has the scales of a recipe: of the texts, or of the record if that needs gradients."
        if observers_with_gradients(modifier.resolved_config):
            session = Session(self.model, self.feeds, record=self.record, recipe=modifier)
            for step in (session.initialize, session.start, session.end): step()
            try: yield
            finally: session.reset()
        else:
            with borrowed(self.model, "evidence"):
                feeds = self.feeds if modifier.requires_calibration_data else None
                calibrate(self.model, feeds, modifier, progress=False)
                yield

    def kls(self, scheme: Any) -> list[float]:
        "The KL of each held-out text under a scheme."
        with self.quantized(scheme) as measure: return measure()


def recipe(**options: Any) -> QuantizationModifier:
    "A modifier that leaves the head as it is."
    return QuantizationModifier(**dict(ignore=["lm_head"]) | options)


SUBJECTS = {subject.name: subject for subject in (
    Subject("embedded", load_tiny_llama, 128, findings=1),
    Subject("SmolLM2", lambda dtype: load_smollm2(dtype, weights="dithered"), 64, findings=2, every=5,
            require=require_smollm2),
)}
