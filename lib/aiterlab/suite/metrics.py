# SPDX-License-Identifier: Apache-2.0
"""Declare every number of the records that is shown, compared or listed as a sample: the one place that knows them.

A metric says where its rows lie in the record, which columns name the case, what unit it has, which direction is
better, how much change is nothing, and whether another machine may be compared. `samples.csv`, the summary, the index
and `compare` all read this list. To have a new number of a record compared, add a line here.
"""

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median
from typing import Any

from aiterlab.suite.results import number

Case = tuple[tuple[str, str], ...]
Rows = Iterable[Mapping[str, Any]]
EVERY_PARAMETER = ("*",)
_SAY_LITTLE = frozenset({"auto", "present", "absent", "unset", "True", "False"})


class Better(StrEnum):
    """Which change of a metric is an improvement."""

    LOWER = "lower"
    HIGHER = "higher"
    EXACT = "the same"  # a count that has to be found again; fewer is better once the source under study is another
    WITHIN = "within its limit"  # an error beside its tolerance: how far below does not matter


@dataclass(frozen=True)
class Metric:
    """One quantity of one notebook's record.

    Attributes:
        table: key of the record that holds the rows, a function from the record to them, or "" for the record itself.
        value: column of the value; "" takes the median of the samples.
        labels: columns that name the case; equal labels are compared with each other.
        tolerance: relative change of the median that counts as none.
        timed: holds on one machine alone.
        low, high: columns of the 20th and 80th percentile, or of another interval that the record states.
        stderr: column of a standard error, in place of the two.
        samples: column with the list of raw samples.
        limit: column of the value that must not be exceeded, or the value itself.
        reason: column that says why a value is missing.
        depends: parameters besides the labels that the value depends on.
        compared, listed: whether `compare` and `samples.csv` take it.
        key: the cases that the summary shows, as labels and their values; "@name" takes the value from the record.
    """

    stem: str
    name: str
    table: str | Callable[[Mapping[str, Any]], Rows]
    value: str
    unit: str
    better: Better
    labels: tuple[str, ...] = ()
    tolerance: float = 0.0
    timed: bool = False
    low: str | None = None
    high: str | None = None
    stderr: str | None = None
    samples: str | None = None
    limit: str | float | None = None
    reason: str = "reason"
    depends: tuple[str, ...] = ()
    compared: bool = True
    listed: bool = True
    key: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Observation:
    """A metric's value in one case, with its spread and raw samples; None where it is missing, with the reason."""

    metric: Metric
    case: Case
    value: float | None
    low: float | None = None
    high: float | None = None
    limit: float | None = None
    samples: tuple[float | None, ...] = ()
    reason: str | None = None


def observe(metric: Metric, record: Mapping[str, Any]) -> Iterator[Observation]:
    """Yield the metric's observations in `record`; what the record does not hold, or holds in another form, is none."""
    for row in rows_of(record, metric.table):
        value = number(row.get(metric.value)) if metric.value else None
        samples = row.get(metric.samples) if metric.samples else None
        numbers = tuple(number(item) for item in samples) if isinstance(samples, list) else ()
        known = sorted(item for item in numbers if item is not None)
        if not metric.value and known:
            value = median(known)
        low, high = (number(row.get(column)) if column else None for column in (metric.low, metric.high))
        if low is None and high is None and len(known) > 1:
            low, high = quantile(known, 0.2), quantile(known, 0.8)
        if metric.stderr and value is not None and (error := number(row.get(metric.stderr))) is not None:
            low, high = value - 2 * error, value + 2 * error
            if metric.unit == "share":
                low, high = max(low, 0.0), min(high, 1.0)
        if low == high:  # one sample, or one value each time: nothing is known of the spread
            low = high = None
        limit = number(row.get(metric.limit)) if isinstance(metric.limit, str) else metric.limit
        reason = None
        if value is None and (metric.value or not known):
            reason = str(row.get(metric.reason) or "not recorded")
        case = tuple((label, _words(row.get(label))) for label in metric.labels)
        yield Observation(metric, case, value, low, high, limit, numbers, reason)


def rows_of(record: Mapping[str, Any], table: str | Callable[[Mapping[str, Any]], Rows]) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a table, which a record keeps as columns, as a list of objects, or as itself (table "")."""
    if callable(table):
        yield from table(record)
        return
    found = record.get(table) if table else [record]
    if isinstance(found, Mapping):
        columns = {name: column for name, column in found.items() if isinstance(column, list)}
        for index in range(min(map(len, columns.values()), default=0)):
            yield {name: column[index] for name, column in columns.items()}
    elif isinstance(found, list):
        yield from (row for row in found if isinstance(row, Mapping))


def case_words(case: Case, labels: Container[str] | None = None) -> str:
    """Return a case in a few words: the values of `labels` (default: all), named where a value alone says little."""
    told = [(name, value) for name, value in case if value and (labels is None or name in labels)]
    words = (f"{name} {value}" if len(value) < 3 or value in _SAY_LITTLE else value for name, value in told)
    return " ".join(words) or "-"


def quantile(ordered: Sequence[float], share: float) -> float:
    """Return the quantile of sorted numbers, linear between neighbours, as numpy has it."""
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def metrics_of(stem: str) -> tuple[Metric, ...]:
    """Return the metrics of one notebook."""
    return tuple(metric for metric in METRICS if metric.stem == stem)


def _words(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _broken_statements(record: Mapping[str, Any]) -> Rows:
    """Unfold `verdicts`: tree, statement, and "broken 3/32" as the count of cells that break the statement."""
    verdicts = record.get("verdicts")
    for tree, statements in (verdicts if isinstance(verdicts, Mapping) else {}).items():
        for statement, words in (statements if isinstance(statements, Mapping) else {}).items():
            found = re.search(r"(\d+)/\d+", str(words))
            yield {"tree": tree, "statement": statement, "broken": int(found[1]) if found else None, "reason": words}


def _differences_to_upstream(record: Mapping[str, Any]) -> Rows:
    if "differences_to_upstream" in record:
        yield {"rows": sum(1 for _ in rows_of(record, "differences_to_upstream"))}


_CELL = ("tree", "arch", "aiter", "switch", "selection", "shuffle_switch")
_KERNEL = ("workload", "dtype", "kv_dtype", "layout", "provider", "implementation")
_ENGINE = ("group", "engine", "batch", "context", "acceptance")
_CODE = ("arch", "provider", "launcher", "workload", "kernel")
_PROMPTS = ("models", "count", "output_tokens", "seed")


def _cells(stem: str, table: str = "cells") -> Iterator[Metric]:
    for step in ("prefill", "extend", "decode"):
        value, limit = f"{step}_max_abs_error", f"{step}_tolerance"
        yield Metric(stem, f"{step}_max_abs_error" if table == "cells" else f"{table}_{value}", table, value,
                     "absolute", Better.WITHIN, _CELL, limit=limit, reason="no_answer_reason")  # fmt: skip
    yield Metric(stem, "cell_seconds" if table == "cells" else f"{table}_seconds", table, "seconds", "s",
                 Better.LOWER, _CELL, timed=True, reason="no_answer_reason", compared=False)  # fmt: skip


def _over(other: str, words: str) -> Metric:
    return Metric("04_run_attention_kernels", f"speed_over_{other}", "ratios", f"over_{other}", f"× {words}",
                  Better.HIGHER, ("workload", "k_and_v"), tolerance=0.1, timed=True, low=f"over_{other}_low",
                  high=f"over_{other}_high", depends=("shape",), key={})  # fmt: skip


# fmt: off
METRICS: tuple[Metric, ...] = (
    Metric("01_reproduce_regression", "cells_total", "", "cells_total", "cells", Better.EXACT,
           depends=EVERY_PARAMETER, key={}),
    Metric("01_reproduce_regression", "cells_trapped", "", "cells_trapped", "cells", Better.EXACT,
           depends=EVERY_PARAMETER, key={}),
    *_cells("01_reproduce_regression"),
    Metric("02_apply_fix", "cells_total", "", "cells_total", "cells", Better.EXACT, depends=EVERY_PARAMETER),
    Metric("02_apply_fix", "cells_trapped_before", "", "cells_trapped_before", "cells", Better.EXACT,
           depends=EVERY_PARAMETER, key={}),
    Metric("02_apply_fix", "cells_trapped_after", "", "cells_trapped_after", "cells", Better.LOWER,
           depends=EVERY_PARAMETER, key={}),
    Metric("02_apply_fix", "differences_to_upstream", _differences_to_upstream, "rows", "facts", Better.LOWER,
           depends=EVERY_PARAMETER, key={}),
    *_cells("02_apply_fix"),
    *_cells("02_apply_fix", "part_cells"),
    Metric("03_audit_backend_selection", "cells_total", "", "cells_total", "cells", Better.EXACT,
           depends=EVERY_PARAMETER, key={}),
    Metric("03_audit_backend_selection", "cells_unanswered", "", "cells_unanswered", "cells", Better.LOWER,
           depends=EVERY_PARAMETER, key={}),
    Metric("03_audit_backend_selection", "statement_broken", _broken_statements, "broken", "cells", Better.EXACT,
           ("tree", "statement"), depends=("cold_share", "seed"), key={"tree": "@looked_at"}),
    Metric("03_audit_backend_selection", "seconds_a_cell", "pace", "seconds a cell", "s", Better.LOWER, ("how",),
           timed=True, depends=EVERY_PARAMETER),
    Metric("04_run_attention_kernels", "error_over_tolerance", "checks", "error_over_tolerance", "of the tolerance",
           Better.WITHIN, _KERNEL, limit=1.0),
    Metric("04_run_attention_kernels", "latency", "timings", "median_us", "µs", Better.LOWER, _KERNEL, tolerance=0.1,
           timed=True, low="p20_us", high="p80_us", samples="samples_us", depends=("shape",),
           key={"provider": "suite"}),
    _over("fa3", "FA3"),
    _over("vllm_triton", "vLLM's Triton"),
    Metric("04_run_attention_kernels", "share_of_ceiling", "ratios", "share_of_ceiling", "of the ceiling",
           Better.HIGHER, ("workload", "k_and_v"), tolerance=0.1, timed=True, depends=("shape",), listed=False),
    Metric("04_run_attention_kernels", "ceiling", "ceilings", "", "µs", Better.LOWER, ("name", "work"), tolerance=0.1,
           timed=True, samples="samples_us"),
    Metric("04_run_attention_kernels", "scratch_bytes", "kernels", "scratch_bytes", "B", Better.LOWER, _CODE),
    Metric("04_run_attention_kernels", "waves_per_simd", "kernels", "waves_per_simd", "waves", Better.HIGHER, _CODE),
    Metric("05_run_eagle_spec_decode", "tokens_differing", "greedy", "different", "requests", Better.LOWER,
           ("task", "base", "engine"), depends=_PROMPTS),
    Metric("05_run_eagle_spec_decode", "acceptance_length", "accepted", "acceptance_length", "tokens a step",
           Better.HIGHER, ("group", "engine", "task", "temperature"), tolerance=0.03, low="acceptance_length_low",
           high="acceptance_length_high", depends=_PROMPTS, key={"group": "models"}),
    Metric("05_run_eagle_spec_decode", "accepted_per_position", "accepted", "accepted", "tokens", Better.HIGHER,
           ("group", "engine", "task", "temperature"), samples="accepted_per_position", compared=False),
    Metric("05_run_eagle_spec_decode", "decode_speed", "times", "steady_tok_s", "tok/s", Better.HIGHER, _ENGINE,
           tolerance=0.1, timed=True, low="steady_p20_tok_s", high="steady_tok_s", depends=("models", "seed"),
           listed=False, key={"group": "models"}),
    Metric("05_run_eagle_spec_decode", "step_time", "times", "step_ms", "ms", Better.LOWER, _ENGINE, tolerance=0.1,
           timed=True, low="step_ms", high="step_p80_ms", depends=("models", "seed"), listed=False),
    Metric("05_run_eagle_spec_decode", "step_time", "timed", "step_ms", "ms", Better.LOWER,
           (*_ENGINE, "round", "marked"), timed=True, low="step_p20_ms", high="step_p80_ms", compared=False),
    Metric("05_run_eagle_spec_decode", "score", "scores", "value", "share", Better.HIGHER,
           ("engine", "task", "filter", "shots"), stderr="stderr", depends=("models", "accuracy", "seed"),
           key={}),
)
# fmt: on
