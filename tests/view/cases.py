"""Seeded cases: tensors of all kinds, formats and ranges with Python's numbers, and Node.js for JavaScript's."""
import json
import math
import random
import shutil
import subprocess

import torch

from qcal_nb.analysis import result_by_hand, result_row
from qcal_nb.records import result_from_stats
from qcal_nb.session import FORMATS, args_for
from qcal_nb.stats import measure
from qcal_nb.view import arithmetic
from qcal_nb.view.packing import histogram_bytes, stats_head

OBSERVERS = ("static_minmax", "percentile", "entropy", "histogram_mse")
EQUAL = ("low", "high", "scale", "zero", "levels")
CLOSE = dict(sqnr=1e-9, bits=1e-9, clipped=1e-12)     # dB, bits, a share

CHECK = """
const tensors = INPUT.heads.map(({ head, bytes }) => {
  return { ...head, ...bucketsAt(Uint8Array.from(bytes), 0, head.buckets) };
});
const spelled = (x) => (typeof x !== "number" || Number.isFinite(x) ? x : String(x));
const answer = ({ tensor, format: name, symmetric, clip, observer }) => {
  const t = tensors[tensor];
  const f = format(name, symmetric);
  const range = observer ? atOnce(OBSERVERS[observer](t, f)) : null;
  const scaled = range ? { ...range, ...scaleOf(range.low, range.high, f, t.dtype) } : byHand(t, f, clip);
  const found = { ...scaled, ...qualityOf(t, f, scaled) };
  return Object.fromEntries(Object.entries(found).map(([k, v]) => [k, spelled(v)]));
};
process.stdout.write(JSON.stringify(INPUT.cases.map(answer)));
"""


def normal(seed, *shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tensors():
    "Statistics by name: ordinary ones, and what may go wrong."
    plain = normal(1, 4, 512, 64)
    massive = plain.clone()
    massive[:, 0, 3] = 900.0
    return {name: measure(value) for name, value in dict(
        float32=plain, bfloat16=plain.bfloat16(), float16=plain.half(), float64=plain[:1].double() * 1.1,
        massive=massive.bfloat16(), massive32=massive, positive=plain.abs() + 0.5, negative=-plain.abs().bfloat16(),
        tiny=plain[:1] * 1e-38, large=plain[:1] * 1e35, zeros=torch.zeros(1, 8, 4), one=torch.full((1, 1, 1), 0.3),
        few=torch.tensor([[[-1.5, 0.0, 2.0, 2.0]]]).bfloat16(), skewed=plain.exp(),
    ).items()}


def python_says(stats, case):
    args = args_for(case["format"], case["symmetric"])
    if case["observer"]: found = result_from_stats(stats, "input", case["observer"], args)
    else: found = result_by_hand(stats, "input", args, case["clip"])
    row = result_row(found, stats)
    names = dict(low="min", high="max", scale="scale", zero="zero_point", levels="levels_used", sqnr="sqnr_db",
                 bits="effective_bits", clipped="clipped", bound="bound_db")
    return {name: float(row[column]) for name, column in names.items()}


def seeded_cases(n, n_observers, seed=0):
    "`n` ranges by hand, and as many for each observer as are asked for."
    draw = random.Random(seed)
    stats = tensors()
    cases = []
    for i in range(n + n_observers * len(OBSERVERS)):
        name = draw.choice(FORMATS)
        symmetric = not name.startswith("int") or draw.random() < 0.6
        clip = 1.0 if draw.random() < 0.1 else 10 ** draw.uniform(-2.5, 0)
        observer = OBSERVERS[i % len(OBSERVERS)] if i >= n else ""
        case = dict(tensor=draw.randrange(len(stats)), format=name, symmetric=symmetric, clip=clip, observer=observer)
        cases.append(case)
    heads = [dict(head=stats_head(one, 0), bytes=list(histogram_bytes(one.histogram))) for one in stats.values()]
    expected = [python_says(list(stats.values())[case["tensor"]], case) for case in cases]
    return dict(heads=heads, cases=cases), expected


def node(code):
    "What a script prints."
    done = subprocess.run([shutil.which("node"), "-"], input=code, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def javascript_says(asked, text=None):
    return json.loads(node(f"const INPUT = {json.dumps(asked)};\n{text or arithmetic()}\n{CHECK}"))


def is_same(a, b): return a == b or (math.isnan(a) and math.isnan(b))


def differences(asked, expected, answers):
    "What is not as Python says, a line each."
    found = []
    for case, want, got in zip(asked["cases"], expected, answers):
        got = {name: float(value) for name, value in got.items()}
        wrong = [name for name in EQUAL if not is_same(want[name], got[name])]
        wrong += [name for name, most in CLOSE.items()
                  if not is_same(want[name], got[name]) and not abs(want[name] - got[name]) <= most]
        found += [f"{case}: {name} {want[name]!r} != {got[name]!r}" for name in wrong]
    return found
