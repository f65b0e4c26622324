"""What several tests of reports need."""
from dataclasses import replace

import torch

from qcal_nb.records import About
from qcal_nb.records import CalibrationRecord
from qcal_nb.stats import TensorStats, measure

EVIL = "<script>window.broken = true</script><img src=x onerror='window.broken = true'>\"'&"


def odd_record():
    "NaN, a tensor that nobody saw, zeros, an expert without tokens, and names and texts that are HTML."
    x = torch.tensor([[1.0, -2.0, 3.0, 4.0]])
    loud = measure(x, batch=0)
    loud = replace(loud, top=tuple(replace(e, token=EVIL, context=EVIL) for e in loud.top))
    tensors = {(EVIL, "input"): loud, ("broken", "input"): measure(torch.tensor([[1.0, torch.nan, torch.inf, 2.0]]), 0),
               ("never", "input"): TensorStats(), ("zeros", "input"): measure(torch.zeros(2, 4), 0)}
    types = {name: EVIL for name, _ in tensors}
    return CalibrationRecord(tensors, types, about=About(model=EVIL, name=EVIL), spans=((0, 1),), level_tokens={0: 4},
            expert_tokens={"layers.0.experts.3": 0})
