# SPDX-License-Identifier: Apache-2.0
"""Write what stands at the top of a run's folder: the index, the summary, the samples and the records' schema."""

from pathlib import Path

from aiterlab.suite.pages import write_index
from aiterlab.suite.results import read_run
from aiterlab.suite.samples import write_samples
from aiterlab.suite.schema import write_schema
from aiterlab.suite.summary import against_reference, write_summary


def write_bundle(run_dir: Path | str, results: Path | None = None) -> list[Path]:
    """Write all four into the run's folder and return their paths; `results` is where `reference/` lies.

    Cheap enough for the end of every run, and right for one that failed, was interrupted or never got far: what is
    missing is said, never an error.
    """
    run = read_run(run_dir)
    comparison = against_reference(run, results)
    return [
        write_samples(run),
        write_schema(run.folder),
        write_summary(run, comparison),
        write_index(run, comparison),
    ]
