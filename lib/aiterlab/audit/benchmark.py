# SPDX-License-Identifier: Apache-2.0
"""How fast the pool of probes is, beside a pool of cold processes on the same cells.

Run as `python -m aiterlab.audit.benchmark release:0.32.0 regressed`. Cold processes take so long that a random part of
the cells has to do; the pool answers all of them. What both answered is compared, too.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from math import ceil
from pathlib import Path

from aiterlab import host, paths, records, trees
from aiterlab.audit import matrix
from aiterlab.probes import Progress, pool


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m aiterlab.audit.benchmark", description=__doc__.split("\n\n")[0])
    parser.add_argument("trees", nargs="+", metavar="TREE", help=trees.tree.GRAMMAR)
    parser.add_argument("--cold", type=int, default=16, metavar="N", help="cells to ask cold as well (%(default)s)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes at a time; the usable cores by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to leave the numbers")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[paths.RUN_DIR_VARIABLE] = folder
        numbers = measure(options.trees, options.cold, options.workers)
    if options.json:
        records.atomic_write_text(options.json, json.dumps(numbers, indent=1))
    print(json.dumps(numbers, indent=1))
    return 1 if numbers["different_facts"] else 0


def measure(names: list[str], cold: int, workers: int | None) -> dict:
    """Ask the default matrix of each tree in the pool, and a part of it cold."""
    cells = [cell for name in names for cell in matrix.default(trees.get(name))]
    progress = Progress(stream=sys.stderr)
    pooled_s, pooled_cpu_s, rows = _timed(lambda: pool.ask(cells, workers=workers, progress=progress))
    share = min(1.0, cold / len(cells))
    asked = ceil(share * len(cells))
    cold_s, cold_cpu_s, different = _timed(
        lambda: pool.compare_cold(cells, rows, share=share, workers=workers, progress=Progress(stream=sys.stderr))
    )
    return {
        "trees": names,
        "workers": workers or host.usable_cores(),
        "load_average": round(os.getloadavg()[0], 1),
        "cells": len(cells),
        "groups": len({cell.group for cell in cells}),
        "unanswered_cells": sum(row["verdict"] == "no answer" for row in rows),
        "pool_s": round(pooled_s, 1),
        "pool_s_per_cell": round(pooled_s / len(cells), 3),
        "pool_cpu_s_per_cell": round(pooled_cpu_s / len(cells), 3),
        "cold_cells": asked,
        "cold_s_per_cell": round(cold_s / asked, 3),
        "cold_cpu_s_per_cell": round(cold_cpu_s / asked, 3),
        "times_faster": round(cold_s / asked / (pooled_s / len(cells)), 1),
        "times_less_cpu": round(cold_cpu_s / asked / (pooled_cpu_s / len(cells)), 1),
        "different_facts": different,
    }


def _timed(run):
    def cpu_s() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    start, start_cpu_s = time.monotonic(), cpu_s()
    result = run()
    return time.monotonic() - start, cpu_s() - start_cpu_s, result


if __name__ == "__main__":
    sys.exit(main())
