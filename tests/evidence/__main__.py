"""`python -m evidence [--model NAME] [--again | --forecast] [PART ...]` with tests/ on the path: what is missing in
results.json, of the parts that are named, or of all."""
import argparse
import time

import torch

from .parts import PARTS, run
from .results import Results
from .subjects import SUBJECTS


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parts = "; ".join(f"{name}: {part.what}" for name, part in PARTS.items())
    parser = argparse.ArgumentParser(prog="evidence", description="Forecast against measured.", epilog=parts)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}; all without any")
    parser.add_argument("--model", action="append", choices=list(SUBJECTS), help="only this one; may come twice")
    parser.add_argument("--again", action="store_true", help="find rows again that are there already")
    parser.add_argument(
        "--forecast", action="store_true", help="the same, but keep what was measured of recipes that stay the same"
    )
    options = parser.parse_args(argv)
    unknown = [name for name in options.parts if name not in PARTS]
    if unknown: parser.error(f"no part is named {unknown[0]!r}; there are: {', '.join(PARTS)}")
    return options


def main(argv: list[str] | None = None) -> None:
    options = parsed(argv)
    subjects = [SUBJECTS[name] for name in options.model or SUBJECTS]
    parts = options.parts or list(PARTS)
    for subject in subjects: subject.require()      # now rather than after ten minutes
    torch.set_num_threads(1)
    results, began = Results(), time.perf_counter()
    for subject in subjects:
        for part in parts if options.again or options.forecast else ():
            results.outdate(subject.name, part, keep_measured=options.forecast)
        run(subject, parts, results)
    print(f"{time.perf_counter() - began:.0f} s; written to {results.path.relative_to(results.path.parents[2])}")


if __name__ == "__main__": main()
