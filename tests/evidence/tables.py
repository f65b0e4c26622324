"""What the page shows: tables and sentences, computed from the rows of the file."""
import math
import re
from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd

from qcal_nb.forecasts import STATE_WORDS

from .results import Results, Row

SURE = 2.0          # standard errors from which on a difference counts
PLAIN = "as it is"  # the row of a scheme that the others are set against


def mean_of(row: Row) -> float:
    "The measured KL over the texts, which all have the same number of tokens."
    return float(np.mean(row["kls"]))


def error_of(values: Iterable[float]) -> float:
    "The standard error of the mean over texts."
    values = np.asarray(values)
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def rank_correlation(a: Iterable[float], b: Iterable[float]) -> float:
    "Spearman's."
    return float(pd.Series(list(a)).rank().corr(pd.Series(list(b)).rank()))


# --- schemes ---


def other_forecasts(results: Results, model: str) -> pd.DataFrame:
    "A row a scheme, a column for each recording of other texts."
    columns = {name: pd.Series(row["forecasts"], dtype=float) for name, row in results.of(model, "texts").items()}
    return pd.DataFrame(columns)


def schemes(results: Results, model: str) -> pd.DataFrame:
    """A row a scheme, from small to large: forecast and measured KL, the standard error of the latter over texts, their
    ratio, and the lowest and highest ratio with the recordings of other texts beside."""
    rows = {name: row for name, row in results.of(model, "schemes").items() if "forecast" in row}
    table = pd.DataFrame({
        "forecast": {name: row["forecast"] for name, row in rows.items()},
        "measured": {name: mean_of(row) for name, row in rows.items()},
        "error": {name: error_of(row["kls"]) for name, row in rows.items()},
        "state": {name: row["state"] for name, row in rows.items()},
    })
    said = other_forecasts(results, model).reindex(table.index)
    said.insert(0, "here", table.forecast)
    over = said.div(table.measured, axis=0)
    table.insert(3, "ratio", table.forecast / table.measured)
    table.insert(4, "lowest", over.min(axis=1))
    table.insert(5, "highest", over.max(axis=1))
    return table.sort_values("measured")


def without_forecast(results: Results, model: str) -> dict[str, str]:
    "Scheme -> why it has no forecast or does not fit."
    return {name: row["why"] for name, row in results.of(model, "schemes").items() if row.get("why")}


def ratios(table: pd.DataFrame, state: str) -> str:
    "`0.69 to 0.96`: from the lowest to the highest ratio of the schemes in a state, over all recordings."
    some = table[table.state == state]
    return f"{some.lowest.min():.2f} to {some.highest.max():.2f}" if len(some) else "none"


# --- modules ---


def ranks(results: Results, model: str) -> pd.DataFrame:
    """A row a scheme: how many modules were measured alone, Spearman's rank correlation of forecast and measured, the
    lowest on one text alone, and the sum of the forecasts over that of the measured KLs."""
    found: dict[str, Row] = {}
    rows = list(results.of(model, "modules").values())
    for scheme in dict.fromkeys(row["scheme"] for row in rows):
        some = [row for row in rows if row["scheme"] == scheme]
        said = [row["forecast"] for row in some]
        by_text = np.array([row["kls"] for row in some])
        measured = by_text.mean(1)
        found[scheme] = dict(
            modules=len(some),
            spearman=rank_correlation(said, measured),
            lowest=min(rank_correlation(said, column) for column in by_text.T),
            texts=by_text.shape[1],
            ratio=sum(said) / measured.sum(),
        )
    return pd.DataFrame(found).T.astype({"modules": int, "texts": int})


def by_kind(results: Results, model: str) -> pd.DataFrame:
    "A row for each kind of module, a column a scheme: the sum of its forecasts over that of the KLs measured alone."
    rows = results.of(model, "modules").values()
    table = pd.DataFrame([dict(scheme=row["scheme"], kind=row["module"].rpartition(".")[2], forecast=row["forecast"],
                               measured=mean_of(row)) for row in rows])
    sums = table.groupby(["kind", "scheme"]).sum()
    return (sums.forecast / sums.measured).unstack()


def alone_and_together(results: Results, model: str) -> pd.DataFrame:
    """A row a scheme, of a model whose modules were all measured alone: the sum of their KLs, the KL of all together,
    and the first over the second."""
    rows = results.of(model, "modules").values()
    table = pd.DataFrame([dict(scheme=row["scheme"], sum_alone=mean_of(row)) for row in rows])
    found = table.groupby("scheme", sort=False).sum()
    found["together"] = [mean_of(results.of(model, "schemes")[name]) for name in found.index]
    return found.assign(ratio=found.sum_alone / found.together)


# --- budgets ---


def budgets(results: Results, model: str) -> pd.DataFrame:
    "A row a recipe, by bytes: how it was chosen, what it is, forecast and measured KL with its standard error."
    rows = results.of(model, "budget").values()
    table = pd.DataFrame([dict(
        share=row.get("share"), chosen_by=row["way"], MB=row["bytes"] / 1e6, mix=row["mix"], forecast=row["forecast"],
        measured=mean_of(row), error=error_of(row["kls"]),
    ) for row in rows])
    return table.sort_values(["MB", "measured"], ignore_index=True)


def gains(results: Results, model: str) -> pd.DataFrame:
    "A row a budget, a column a way to choose: the measured KL over that of the choice by forecast."
    table = budgets(results, model).dropna(subset="share")
    wide = table.pivot(index="share", columns="chosen_by", values="measured")
    return wide.div(wide.forecast, axis=0).drop(columns="forecast").add_prefix("by ")


# --- advice ---


def advice(results: Results, model: str) -> pd.DataFrame:
    """A row for each thing that might be done, the worst first: forecast and measured KL; the difference to the scheme
    as it is with the standard error of the differences, text by text; how many times less it costs, and whether that
    is sure."""
    rows = results.of(model, "advice")
    plain = np.array(rows[PLAIN]["kls"])
    found: dict[str, Row] = {}
    for name, row in rows.items():
        differences = np.array(row["kls"]) - plain
        by, off = float(differences.mean()), error_of(differences)
        found[name] = dict(
            forecast=row.get("forecast", math.nan), measured=mean_of(row), error=error_of(row["kls"]), change=by,
            change_error=off, times_less=plain.mean() / mean_of(row), verdict=verdict(by, off), spared=row["spared"],
            advised=row["advised"],
        )
    return pd.DataFrame(found).T.infer_objects().sort_values("measured", ascending=False)


def verdict(change: float, error: float) -> str:
    if abs(change) <= SURE * error: return "no difference"
    return "better" if change < 0 else "worse"


# --- what is promised ---


def forecasts(results: Results) -> pd.DataFrame:
    "A row for each forecast of whole recipes that was measured: model, part, name, state, measured over forecast."
    rows = [row for row in results.rows.values() if "state" in row and row["forecast"] > 0]
    return pd.DataFrame([dict(model=row["model"], part=row["part"], name=row["name"], state=row["state"],
                              forecast=row["forecast"], over=mean_of(row) / row["forecast"]) for row in rows])


def promised(state: str) -> tuple[float, float]:
    "From how many times the forecast to how many a state says that measured was; no limits where it names none."
    found = [float(number) for number in re.findall(r"[\d.]+", STATE_WORDS[state])]
    return (0.0, math.inf) if not found else (0.0, found[0]) if len(found) == 1 else (found[0], found[1])


def promises(results: Results) -> pd.DataFrame:
    """A row a state: its words, how many forecasts, measured over forecast from the lowest to the highest, and how many
    are below and above what it says."""
    table = forecasts(results)
    found: dict[str, Row] = {}
    for state, some in table.groupby("state", sort=False).over:
        low, high = promised(state)
        found[state] = dict(
            says=STATE_WORDS[state], forecasts=len(some), lowest=some.min(), median=some.median(), highest=some.max(),
            below=int((some < low).sum()), above=int((some > high).sum()),
        )
    return pd.DataFrame(found).T.reindex([state for state in STATE_WORDS if state in found])


def broken_promises(results: Results) -> pd.DataFrame:
    "The forecasts whose state says less than was measured."
    table = forecasts(results)
    above = [over > promised(state)[1] for state, over in zip(table.state, table.over)]
    return table[above].sort_values("over", ascending=False, ignore_index=True)


# --- what counts besides ---


def lengths(results: Results, model: str) -> pd.DataFrame:
    "A row a scheme: forecast and measured on short texts and on those of the other parts, and the forecasts' ratio."
    short, usual = results.of(model, "length"), results.of(model, "schemes")
    table = pd.DataFrame({name: dict(
        forecast_short=row["forecast"], measured_short=mean_of(row), forecast=usual[name]["forecast"],
        measured=mean_of(usual[name]),
    ) for name, row in short.items()}).T
    table["forecasts"] = table.forecast_short / table.forecast
    table["measureds"] = table.measured_short / table.measured
    return table


def costs(results: Results, model: str) -> pd.Series:
    """Seconds of the processor: a forward pass, recordings without and with gradients, as medians of rounds, and over
    the forward pass of their round; a forecast, as the median over schemes, the longest, and for 100M parameters."""
    row = results.of(model, "cost")["recording"]
    times = {name: np.array(row[name]) for name in ("forward", "record", "gradients")}
    found = {f"{name}, s": float(np.median(values)) for name, values in times.items()}
    found |= {f"{name} / forward": float(np.median(times[name] / times["forward"])) for name in ("record", "gradients")}
    seconds = [one["seconds"] for one in results.of(model, "schemes").values() if "seconds" in one]
    found |= {"a forecast, s": float(np.median(seconds)), "the longest, s": max(seconds)}
    return pd.Series(found | {"longest for 100M parameters, s": max(seconds) / row["parameters"] * 1e8})


def measured_when(results: Results) -> pd.DataFrame:
    "A row for each model and part: rows, dates, the highest load average, machines."
    table = pd.DataFrame(results.rows.values())
    groups = table.groupby(["model", "part"], sort=False)
    return groups.agg(
        rows=("name", "size"), first=("date", "min"), last=("date", "max"), load=("load", "max"),
        machine=("machine", lambda values: "; ".join(dict.fromkeys(values))),
    )


def models(results: Results) -> list[str]: return list(dict.fromkeys(model for model, _, _ in results.rows))


def named(found: Mapping[str, float]) -> str:
    "`a 0.1, b 0.2`, for a sentence."
    return ", ".join(f"{name} {value:.2g}" for name, value in found.items())
