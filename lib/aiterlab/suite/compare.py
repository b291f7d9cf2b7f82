# SPDX-License-Identifier: Apache-2.0
"""`run_all.py compare A B`: what changed between two runs, or a run and the reference; Markdown, HTML, an exit code."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from aiterlab import paths
from aiterlab.records import atomic_write_text
from aiterlab.security import scrub
from aiterlab.suite import changes, comparison
from aiterlab.suite.judgement import Verdict
from aiterlab.suite.markdown import Block, compose, escape

EXIT_CODES = {Verdict.SAME: 0, Verdict.BETTER: 0, Verdict.WORSE: 1, Verdict.NOT_COMPARABLE: 3}
EXIT_BAD_INPUT = 2
LIMIT_BYTES = 64_000  # a review comment takes 65,536 characters
_MOST_CHANGES = 40
EPILOG = """\
A and B are each one of: a run's folder or its name under results/, `latest`, a notebook's folder in a run, a
record.json, or `reference` (the records in the repository; the other side decides of which machine). A is the
earlier one: "worse" says that B is.

a number has changed if the medians lie further apart than the metric's tolerance and their intervals from the 20th
to the 80th percentile do not meet. times of different machines are never compared, nor a CPU's with the reference,
since processors of one name differ too much; answers and counts are compared.

a notebook of which A has a record and B has none is worse, unless B was planned without it (--only) or it was
skipped or interrupted there. that both ended alike, well or badly, says nothing.

examples:
  python run_all.py compare reference latest
  python run_all.py compare results/20261127T100000Z-standard latest --html comparison.html
  python run_all.py compare before/04_run_attention_kernels/record.json after/04_run_attention_kernels/record.json

exit codes:
  0  same or better
  1  something is worse
  2  bad input: one side is no run, notebook or record, or a file cannot be written
  3  nothing could be compared; the reasons are in the output
"""


def main(argv: Sequence[str] | None = None, results: Path | None = None) -> int:
    """Run the command line `run_all.py compare` and return its exit code; `results` defaults to the project's own."""
    options = _parser().parse_args(argv)
    results = results or paths.results_dir()
    try:
        sides = [comparison.find_side(name, results) for name in (options.first, options.second)]
        compared = comparison.compare_sides(*sides)
        text = to_markdown(compared)
        if options.markdown:
            atomic_write_text(options.markdown, text)
        if options.html:
            from aiterlab.suite.pages import comparison_page

            atomic_write_text(options.html, comparison_page(compared))
    except (comparison.SourceError, OSError) as error:
        print(f"run_all.py compare: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_CODES[compared.verdict]


def to_markdown(compared: comparison.Comparison) -> str:
    """Return the comparison as Markdown that a review comment can hold."""
    title = Block([f"# {escape(compared.first)} and {escape(compared.second)}"])
    return scrub(compose([title, *changes.to_blocks(compared, _MOST_CHANGES)], LIMIT_BYTES))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run_all.py compare",
        description="Compare two runs: parameters, environment, endings, answers, and metrics with their spread.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("first", metavar="A", help="the earlier side")
    parser.add_argument("second", metavar="B", help="the later side")
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="also write the Markdown that is printed")
    parser.add_argument("--html", metavar="FILE", type=Path, help="also write one self-contained HTML page")
    return parser
