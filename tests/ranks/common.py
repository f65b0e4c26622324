"""What cases of ranks share: what a call says, the scales of a model, and which texts a rank is given."""
import torch

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


def mixture():
    """A mixture of eight experts, and token ids: all for one process; of two, the second rank has two tokens, so that
    most experts are seen on the first alone."""
    from transformers import MixtralConfig, MixtralForCausalLM
    model = MixtralForCausalLM(MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=1, max_position_embeddings=64
    )).eval()
    rank, size = rank_and_size()
    data = [torch.arange(i, 64, 3)[None] for i in range(3)] + [torch.tensor([[7, 9]])]
    return model, data if size == 1 else [data[:3], data[3:]][rank]
