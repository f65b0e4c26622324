"""`python -m benchmarks [--quick] [WORD ...]` with tests/ on the path: the rows whose names contain a word, or all of
them."""
import argparse
import sys
import time

import torch

from qcal_nb.models import require_smollm2

from .model_rows import ROWS
from .results import FILE, table, write
from .rows import THREADS
from .sides import FULL, QUICK


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks", description="qcal_nb beside llm-compressor, in this process")
    parser.add_argument("words", nargs="*", help="rows whose names contain one of these; all rows without any")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, to see whether everything runs; writes no file"
    )
    options = parser.parse_args(argv)
    words = [word.casefold() for word in options.words]
    chosen = [r for r in ROWS if not words or any(word in r.name.casefold() for word in words)]
    if not chosen: parser.error(f"no row is named like that; there are: {', '.join(r.name for r in ROWS)}")
    if not options.quick and any(row.real for row in chosen): require_smollm2()  # now rather than after ten minutes
    torch.set_num_threads(THREADS)
    results, began = [], time.perf_counter()
    for row in chosen:
        print(f"{time.perf_counter() - began:5.0f} s  {row.name}: {row.what}", file=sys.stderr, flush=True)
        found = row.run(QUICK if options.quick else FULL)
        if not options.quick: write(row.name, row.what, found)
        results += found
    print(table(results))
    where = "nothing was written" if options.quick else f"written to {FILE.relative_to(FILE.parents[2])}"
    print(f"{time.perf_counter() - began:.0f} s at {THREADS} threads, agreement at one; {where}")


if __name__ == "__main__": main()
