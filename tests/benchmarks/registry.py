"""Where the rows of the benchmark are registered: a name, a sentence and a function each, in the order of the table."""
from collections.abc import Callable
from dataclasses import dataclass


from .results import Result
from .sides import Size

SMALL = 25.0  # seconds for the rounds of a row about a few per cent, where noise matters most


@dataclass(frozen=True)
class Row:
    "A name to ask for, a sentence, and the function."

    name: str
    what: str
    run: Callable[[Size], list[Result]]
    real: bool = False  # whether it needs SmolLM2, unless the size names another model


ROWS: list[Row] = []


def row(name: str, what: str, real: bool = False) -> Callable:
    "Register a function as a row."
    def add(run: Callable[[Size], list[Result]]) -> Callable[[Size], list[Result]]:
        ROWS.append(Row(name, what, run, real))
        return run
    return add
