# SPDX-License-Identifier: Apache-2.0
"""Write `summary.md`: a run on one page of Markdown, verdict first, small enough for a job summary or a comment."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from aiterlab import paths
from aiterlab.records import atomic_write_text
from aiterlab.security import scrub
from aiterlab.suite import changes, status
from aiterlab.suite.comparison import Comparison, compare_sides, reference_side, run_side
from aiterlab.suite.judgement import Verdict
from aiterlab.suite.markdown import Block, bullets, compose, escape, link, table
from aiterlab.suite.metrics import Metric, Observation, case_words, metrics_of, observe
from aiterlab.suite.results import Entry, Run, text
from aiterlab.suite.samples import SAMPLES_NAME
from aiterlab.suite.schema import SCHEMA_NAME
from aiterlab.suite.wording import (
    commit_words,
    duration_words,
    processor_words,
    reused_words,
    spread_words,
    value_words,
)

SUMMARY_NAME = "summary.md"
INDEX_NAME = "index.html"
LIMIT_BYTES = 64_000
_MOST_CHANGES = 8  # of each notebook
_MOST_CASES = 6  # of each key metric
_AGAINST_REFERENCE = {
    Verdict.WORSE: "{} worse than the reference",
    Verdict.BETTER: "{} better than the reference, none worse",
    Verdict.SAME: "the same as the reference",
    Verdict.NOT_COMPARABLE: "not comparable with the reference",
}


@dataclass(frozen=True)
class KeyMetric:
    """What a reader should see of one metric: some cases, each in words, and how many more there are."""

    metric: Metric
    shown: tuple[tuple[str, Observation], ...]
    more: int


def write_summary(run: Run, comparison: Comparison | None) -> Path:
    """Write `summary.md` of a run that has been read and compared."""
    return atomic_write_text(run.folder / SUMMARY_NAME, scrub(summarize(run, comparison)))


def summarize(run: Run, comparison: Comparison | None) -> str:
    """Return the summary, at most `LIMIT_BYTES` long and never cut within a table's row."""
    words, _ = verdict_of(run, comparison)
    facts = [f"Run `{escape(run.name)}`", f"commit {escape(commit_words(run.provenance))}"]
    facts += [escape(said) for said in (processor_words(run.provenance),) if said]
    blocks = [
        Block([f"# {escape(words, 1000)}", "", f"{', '.join(facts)}. {link('Report of the run', INDEX_NAME)}."]),
        bullets("Findings", [f"`{escape(entry.stem)}`: {escape(entry.finding, 1200)}" for entry in found_by(run)])
        if found_by(run)
        else Block(["No notebook has a finding."]),
    ]
    if comparison is None:
        blocks.append(Block(["## Against the reference", "", "There is no reference record to compare with."]))
    else:
        blocks.append(Block(["## Against the reference"]))
        blocks += changes.to_blocks(comparison, _MOST_CHANGES, whole=False)
    blocks.append(table(["notebook", "ending", "took", "finding, or why not"], _endings(run), title="Endings"))
    rows = list(_key_rows(run))
    if rows:
        headers = ["notebook", "metric", "case", "value", "spread", "unit"]
        blocks.append(table(headers, rows, title="Key metrics", tail=[f"All samples: {_file(run, SAMPLES_NAME)}."]))
    links = [f"`{escape(entry.stem)}`: {', '.join(_links(entry))}" for entry in run.entries if entry.files]
    links.append(", ".join(_file(run, name) for name in (INDEX_NAME, SAMPLES_NAME, SCHEMA_NAME)))
    return compose([*blocks, bullets("Files", links)], LIMIT_BYTES)


def verdict_of(run: Run, comparison: Comparison | None) -> tuple[str, bool]:
    """Return the verdict in one line, and whether every notebook ended well; a worse number alone is no bad end."""
    if not run.entries:
        return "No notebook has left anything", False
    good = [entry for entry in run.entries if entry.ok]
    told = f"{len(good)} of {len(run.entries)} notebooks ok"
    bad = Counter(entry.ending for entry in run.entries if not entry.ok)
    if bad:
        told += f"; {', '.join(f'{count} {ending}' for ending, count in bad.items())}"
        worst = next(entry for entry in run.entries if not entry.ok)
        told += f": {worst.stem}" + (f" ({text(worst.status.get('reason'))})" if worst.said != "-" else "")
    reused = sum(bool(entry.status.get("reused_from")) for entry in run.entries)
    if reused:
        told += f"; {reused} reused from an earlier run"
    if text(run.facts.get("status")) == status.INTERRUPTED:
        told += "; the run was interrupted"
    if comparison:
        told += f"; {_AGAINST_REFERENCE[comparison.verdict].format(comparison.counts[comparison.verdict])}"
    return told, not bad and text(run.facts.get("status")) in (None, status.OK)


def found_by(run: Run) -> list[Entry]:
    """Return the notebooks that have a finding."""
    return [entry for entry in run.entries if entry.finding]


def key_metrics(entry: Entry) -> Iterator[KeyMetric]:
    """Yield the metrics of one notebook that a reader should see first."""
    record = entry.record or {}
    for metric in metrics_of(entry.stem):
        if metric.key is None:
            continue
        wanted = {name: str(record.get(want[1:])) if want[0] == "@" else want for name, want in metric.key.items()}
        found = [seen for seen in observe(metric, record) if wanted.items() <= dict(seen.case).items()]
        found = [seen for seen in found if seen.value is not None]
        # What is the same in all cases tells none of them apart.
        telling = {label for label in metric.labels if len({dict(seen.case)[label] for seen in found}) > 1}
        shown = tuple((case_words(seen.case, telling), seen) for seen in found[:_MOST_CASES])
        if shown:
            yield KeyMetric(metric, shown, len(found) - len(shown))


def against_reference(run: Run, results: Path | None = None) -> Comparison | None:
    """Compare the run with the reference records of its class of machine; None if no notebook has one."""
    reference = reference_side(results or paths.results_dir())
    known = {record.get("stem") for record in reference.references}
    entries = {entry.stem: entry for entry in run.entries if entry.stem in known}
    return compare_sides(reference, run_side(run, entries)) if entries else None


def _endings(run: Run) -> Iterator[list[str]]:
    for entry in run.entries:
        said = "; ".join(filter(None, [reused_words(entry.status), entry.said]))
        name = escape(entry.stem)
        if "report.html" in entry.files:
            name = link(entry.stem, f"{entry.stem}/report.html")
        yield [name, f"**{escape(entry.ending)}**", duration_words(entry.seconds), escape(said, 160)]


def _key_rows(run: Run) -> Iterator[list[str]]:
    for entry in run.entries:
        for key in key_metrics(entry):
            name = key.metric.name.replace("_", " ")
            for case, seen in key.shown:
                cells = (entry.stem, name, case, value_words(seen.value), spread_words(seen), key.metric.unit)
                yield [escape(cell) for cell in cells]
            if key.more:
                yield [escape(entry.stem), escape(name), f"… and {key.more} more", "", "", ""]


def _links(entry: Entry) -> list[str]:
    return [link(words, f"{entry.stem}/{name}") for name, words in entry.files.items()]


def _file(run: Run, name: str) -> str:
    return link(name, name)
