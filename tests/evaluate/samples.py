"""What several tests of the evaluation need."""
import math

from torch.nn.functional import log_softmax

from qcal_nb.evaluate.divergence import logits_of
from qcal_nb.evaluate import compare_observers, compare_schemes, sensitivity
from qcal_nb.models import evaluating

QUIET = dict(progress=False)
W4 = {"weights": dict(num_bits=4, strategy="channel")}
W4A4 = W4 | {"input_activations": dict(num_bits=4, strategy="tensor", observer="static_minmax")}
NVFP4A16 = "NVFP4A16"


class Counting:
    "Counts the forward passes of a model; from `stop_at` on each raises `error`."

    def __init__(self, model, stop_at=math.inf, error=KeyboardInterrupt):
        self.n, self.stop_at, self.error = 0, stop_at, error
        self.handle = model.register_forward_pre_hook(self)

    def __call__(self, *_):
        self.n += 1
        if self.n >= self.stop_at: raise self.error("stopped by a test")


def direct(logits, original, batch):
    "Loss, KL and top-1 by float64 formulas, position by position."
    loss = kl = same = n = 0
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for row in range(ids.shape[0]):
        for t in range(ids.shape[1] - 1):
            if not (mask[row, t] and mask[row, t + 1]): continue
            q, p = (log_softmax(x[row, t].double(), -1) for x in (logits, original))
            n, loss, kl = n + 1, loss - q[ids[row, t + 1]].item(), kl + (p.exp() * (p - q)).sum().item()
            same += int(logits[row, t].argmax() == original[row, t].argmax())
    return n, loss / n, kl / n, same / n


def current_logits(model, batch):
    with evaluating(model): return logits_of(model, batch)


CALLS = {"compare_schemes": lambda m, d, e: compare_schemes(m, d, ["FP8", "INT8_STATIC"], eval_data=e, **QUIET),
         "sensitivity": lambda m, d, e: sensitivity(m, d, "FP8", eval_data=e, **QUIET),
         "compare_observers": lambda m, d, e: compare_observers(m, d, ["static_minmax", "minmax"], **QUIET)}
