# SPDX-License-Identifier: Apache-2.0
"""Check implementations on workloads, time what was right, and lose nothing of it.

Every answer is written to a journal beside the record as soon as it is there: a study that is stopped, or whose GPU
fails, leaves what it had found.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence

import pandas as pd
import torch

from aiterlab import paths, records
from aiterlab.attention.providers.place import Place
from aiterlab.attention.providers.provider import Implementation
from aiterlab.attention.workloads import Workload
from aiterlab.measure import checks
from aiterlab.measure.checks import Check
from aiterlab.measure.timing import Stopwatch
from aiterlab.progress import Progress

JOURNAL_NAME = "journal.jsonl"
SAMPLE_DECIMALS = 2  # of microseconds: a GPU's events resolve about 0.5
Report = Callable[[int, int, float], None]

_WHERE = ("workload", "operation", "dtype", "kv_dtype", "layout", "provider", "implementation")
CHECKED = [*_WHERE, "group", *(field.name for field in dataclasses.fields(Check))]
TIMED = [*_WHERE, "bytes_moved", "flops", "note", "method", "overhead_us", "reason", "median_us", "p20_us", "p80_us"]
TIMED += ["samples", "samples_us"]


class Study:
    """The implementations of one run, their checks and their times.

    Attributes:
        checked: one row per check so far, in order, refusals included
        timed: one row per timing so far; times in microseconds
    """

    def __init__(self, stem: str, place: Place, implementations: Sequence[Implementation], seed: int) -> None:
        """Begin a study whose journal lies beside the record of the notebook `stem`; an older journal is replaced."""
        self.place, self.implementations, self.seed = place, tuple(implementations), seed
        self.checked: list[dict] = []
        self.timed: list[dict] = []
        self._answers: dict[Workload, dict[str, tuple[Implementation, Check]]] = {}
        self._journal = paths.output_dir(stem) / JOURNAL_NAME
        self._journal.write_text("")

    def check(
        self,
        group: str,
        workloads: Iterable[Workload],
        implementations: Sequence[Implementation] | None = None,
        progress: Report | None = None,
    ) -> None:
        """Check implementations (all by default) on every workload of an operation that they have.

        Args:
            group: what the workloads are: cases, sweep, adversarial
        """
        chosen = self.implementations if implementations is None else implementations
        for workload in _told(list(workloads), progress or Progress(what="workloads checked")):
            answers = self._answers.setdefault(workload, {})
            able = [i for i in chosen if workload.operation in i.limits.operations]
            for implementation, check in _checks(workload, able, self.seed, self.place.device):
                answers[implementation.label] = implementation, check
                self._note(
                    self.checked, _where(workload, implementation) | {"group": group} | dataclasses.asdict(check)
                )

    def time(self, workloads: Iterable[Workload], rounds: int = 0, progress: Report | None = None) -> None:
        """Time what has passed its check on each workload.

        Args:
            rounds: samples of each; 0: what suits the device
        """
        watch = Stopwatch(self.place.device, rounds or None)
        for workload in _told(list(workloads), progress or Progress(what="workloads timed")):
            pairs = [(i, check) for i, check in self._answers.get(workload, {}).values() if check.outcome != "refused"]
            error, before = None, len(watch.timings)
            try:
                with _quiet():
                    watch.measure(workload, pairs, self.seed)
            except Exception as exception:  # such as memory that does not suffice: the next workload may fit
                error = _reason(exception)
            finally:
                for (implementation, _), timing in zip(pairs, watch.timings[before:], strict=False):
                    self._note(self.timed, _timed(workload, implementation, timing, error))

    @property
    def checks(self) -> pd.DataFrame:
        """`checked` as a table."""
        return pd.DataFrame(self.checked, columns=CHECKED)

    @property
    def timings(self) -> pd.DataFrame:
        """`timed` as a table."""
        return pd.DataFrame(self.timed, columns=TIMED)

    def peak_memory_bytes(self) -> int | None:
        """The most memory of the GPU that torch has used in this process; None on a CPU."""
        return None if self.place.device == "cpu" else torch.cuda.max_memory_allocated()

    def _note(self, rows: list[dict], row: dict) -> None:
        rows.append(row)
        records.append_line(self._journal, row)


def with_dtype(workloads: Iterable[Workload], dtypes: Iterable[str]) -> tuple[Workload, ...]:
    """Every workload in every dtype, under the same name."""
    return tuple(dataclasses.replace(w, dtype=dtype) for dtype in dtypes for w in workloads)


def _checks(
    workload: Workload, implementations: Sequence[Implementation], seed: int, device: str
) -> Iterator[tuple[Implementation, Check]]:
    """Check one workload: the inputs with poison, and those without for who reads whole pages, are made once."""
    able = [i for i in implementations if i.supports(workload)]
    made, error = {}, None
    try:
        for poison in {not i.reads_whole_pages for i in able}:
            made[poison] = workload.make(seed, device, poison=poison)
    except Exception as exception:  # of the device: it is out of memory, or an earlier kernel has broken it
        error = f"its inputs could not be made: {_reason(exception)}"
    for implementation in implementations:
        if not (answer := implementation.supports(workload)):
            yield implementation, Check("refused", answer.reason)
        elif error:
            yield implementation, Check("failed", error)
        else:
            yield implementation, _check(implementation, made[not implementation.reads_whole_pages])


def _check(implementation: Implementation, inputs) -> Check:
    try:
        with _quiet():
            return checks.check(implementation, inputs)
    except Exception as exception:  # not of the implementation: of the reference, on a device that fails
        return Check("failed", f"not comparable: {_reason(exception)}")


def _where(workload: Workload, implementation: Implementation) -> dict:
    w = workload
    values = w.name, w.operation, w.dtype, w.kv_dtype, w.layout, implementation.provider, implementation.name
    return dict(zip(_WHERE, values, strict=True))


def _timed(workload: Workload, implementation: Implementation, timing, error: str | None) -> dict:
    """One timing with the work it was for; samples rounded to what the clock resolves."""
    row = {
        name: value for name, value in timing.row().items() if name not in ("workload", "provider", "implementation")
    }
    row |= {name: row[name] and round(row[name], SAMPLE_DECIMALS) for name in ("median_us", "p20_us", "p80_us")}
    row["samples_us"] = [round(sample, SAMPLE_DECIMALS) for sample in row["samples_us"]]
    if error and not row["samples_us"]:
        row["reason"] = error
    work = {"bytes_moved": workload.bytes_moved(), "flops": workload.flops(), "note": implementation.note}
    return _where(workload, implementation) | work | row


def _reason(exception: Exception) -> str:
    return f"{type(exception).__name__}: {str(exception).strip().partition(chr(10))[0]}"


def _told(workloads: list[Workload], progress: Report) -> Iterator[Workload]:
    started = time.monotonic()
    for done, workload in enumerate(workloads, 1):
        yield workload
        progress(done, len(workloads), time.monotonic() - started)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Triton's interpreter computes both sides of every mask, and NumPy warns of the side that is thrown away."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning)
        yield
