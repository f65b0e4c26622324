"""What cases of ranks share: what a call says, the scales of a model, and which texts a rank is given."""
from qcal_nb.models import calibration_texts
from qcal_nb.calibration import rank_and_size

WEIGHTS = dict(weights=dict(num_bits=8, strategy="channel"))


def said(function, *args, **kwargs):
    "The error that a call ends with, as text."
    try: function(*args, **kwargs)
    except Exception as error: return f"{type(error).__name__}: {error}"
    return "no error"


def scales(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith(("_scale", "_zero_point"))}


def texts():
    "Four texts: all of them for one process, three for the first rank and one for the second."
    rank, size = rank_and_size()
    return calibration_texts()[:4] if size == 1 else [calibration_texts()[:3], calibration_texts()[3:4]][rank]
