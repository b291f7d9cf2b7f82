# SPDX-License-Identifier: Apache-2.0
"""The numbers in README.md come from the reference records, and from nowhere else."""

import re
import textwrap
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import pytest

from aiterlab import records
from aiterlab.attention import tables
from aiterlab.spec_decode import tables as spec_tables
from aiterlab.suite.benchmark import GOALS, PROFILE, summary

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "results" / "reference"
RECORDS = sorted(REFERENCE.rglob("record.json"))  # of a simulated machine NOTEBOOK/, else MACHINE/NOTEBOOK/
AUDIT = "03_audit_backend_selection"
KERNELS, EAGLE = "04_run_attention_kernels", "05_run_eagle_spec_decode"
LARGEST_BYTES = {KERNELS: 2_000_000, EAGLE: 3_500_000}  # every sample, every round


def block(name: str) -> str:
    """The text of one block of README.md that is filled by this file."""
    (found,) = re.findall(
        rf"<!-- {name}: begin\..*?-->\n(.*?)<!-- {name}: end -->", (ROOT / "README.md").read_text(), re.S
    )
    return found


def of_gpus(stem: str) -> list[tuple[Path, dict]]:
    """The reference records of one notebook that were measured on a GPU, each with its path."""
    found = [(path, records.load_record(path)) for path in sorted(REFERENCE.glob(f"*/{stem}/record.json"))]
    return [(path, record) for path, record in found if record["card"]["device_kind"] == "gpu"]


def made(record: dict) -> str:
    """Commit and day of a record."""
    return f"commit {record['provenance']['git_commit'][:7]}, {record['provenance']['utc'][:10]}"


def numbers() -> str:
    """Render the block from results/reference/: one line per notebook, with the record's own finding."""
    lines = ["| notebook | cells | finding | from |", "|---|---|---|---|"]
    for path in sorted(REFERENCE.glob("*/record.json")):
        record = records.load_record(path)
        source = f"{made(record)}, simulated machine"
        lines.append(f"| `{record['stem']}` | {record['cells_total']} | {record['finding']} | {source} |")
    return "\n".join(lines) + "\n"


def audit() -> str:
    """Render the audit's block: what the newest tree breaks, each with its command, and since when statements are."""
    parts = []
    for path in sorted(REFERENCE.glob(f"{AUDIT}/record.json")):
        record = records.load_record(path)
        newest, folder = record["looked_at"], path.parent.relative_to(ROOT).as_posix()
        about = f"**{newest}** ({made(record)}; [{folder}]({folder}))"
        found = [row for row in record["found"] if row["tree"] == newest]
        lines = [(f"{row['statement']}: {row['what']}", f"`{row['command']}`") for row in found]
        pool = {name: values[0] for name, values in record["pace"].items()}
        cost = f"{pool['cells asked']:,} cells in {pool['seconds'] / 60:.0f} minutes on {pool['workers']} cores"
        parts.append(f"{about}, {record['headline']}; {cost}. {record['agreement']}\n")
        parts.append(_rows(["what contradicts the policy", "the command that shows it"], lines))
        shown = ["statement", "first broken", "last broken", "holds again in"]
        spans = zip(*([name or "–" for name in record["spans"][column]] for column in shown), strict=True)
        parts.append(_rows(shown, spans))
    return "\n".join(parts)


def _rows(header: list[str], lines: Iterable[Iterable[str]]) -> str:
    table = [header, ["---"] * len(header), *([str(cell).replace("|", "\\|") for cell in line] for line in lines)]
    return "\n".join("| " + " | ".join(line) + " |" for line in table) + "\n"


def kernels() -> str:
    """Render the kernels' block: for each GPU with a reference record its finding, and what each case reached."""
    parts = []
    for path, record in of_gpus(KERNELS):
        report = path.parent.relative_to(ROOT).as_posix()
        device = f"{record['card']['device_name']}, {record['timed_dtype']}"
        parts.append(f"**{device}** ({made(record)}; [{report}]({report})): {record['finding']}\n")
        table = tables.comparison(pd.DataFrame(record["ratios"]))
        lines = [[*table.columns], ["---"] * len(table.columns), *table.values.tolist()]
        rendered = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
        parts.append(rendered.replace(tables.JOINED, "").replace("\u00a0", " "))
    return "\n".join(parts) or "No GPU has been measured yet.\n"


def eagle() -> str:
    """Render the block on speculative decoding: for each machine with a reference record what it found, then the shape
    of Llama-3.1-8B, or where there are several GPUs their ranks.
    """
    parts = []
    for path, record in of_gpus(EAGLE):
        report, gpus = path.parent.relative_to(ROOT).as_posix(), len(record["provenance"]["accelerators"])
        device = f"{gpus} x {record['card']['device_name']}" if gpus > 1 else record["card"]["device_name"]
        about = f"**{device}** ({made(record)}; [{report}]({report}))"
        if gpus > 1:
            ranks = "".join(f"- {row['verdict']}\n" for row in record["ranks"])
            parts += [f"{about}: {record['lossless']}. {record['others']}\n", ranks]
            continue
        parts.append(f"{about}: {record['finding']}\n")
        parts.append(_markdown(spec_tables.ratios([row for row in record["ratios"] if row["K"]])))
        parts.append(_markdown(by_draft_tokens([row for row in record["predictions"] if row["group"] == "shape"])))
    return "\n".join(parts)


def runner() -> str:
    """Render the runner's block: what it adds to nbclient, and its time beside papermill's."""
    record = records.load_record(REFERENCE / "cpu" / "runner" / "record.json")
    facts, found = record["provenance"], summary({name: row for name, row in record.items() if isinstance(row, list)})
    whole, single, notebook_s, cell_s, least = (found[name] for name in (*GOALS, "whole_least_ratio"))
    said = f"""
        `python -m aiterlab.suite.benchmark --whole` on {facts["cpu_usable_count"]} cores ({facts["cpu_model"]};
        {made(record)}): beyond nbclient alone the runner takes {notebook_s:+.2f} s a notebook, whose kernel it forks,
        and {cell_s * 1000:.1f} ms a cell. All notebooks, profile {PROFILE}, take {whole:.2f} of the time that papermill
        takes, one after another; it keeps {least:.0%} of the cores busy, so no order of the same work has a smaller
        share. One notebook alone takes {single:.2f} of it.
    """
    return textwrap.fill(" ".join(said.split()), 120) + "\n"


def by_draft_tokens(rows: list[dict]) -> pd.DataFrame:
    """Speed-up for each K: measured, the cost model's in brackets; backends that were timed at one K alone left out."""
    shown = {}
    for row in rows:
        cell = shown.setdefault((row["backend"], row["batch"], row["context"]), {})
        cell[f"K = {row['K']}"] = f"{row['measured_speed_up']:.2f} ({row['predicted_speed_up']:.2f})"
    columns = [f"K = {k}" for k in range(1, 8)]
    lines = [
        {"sequences x context": f"{where[1]} x {where[2]}"} | cell for where, cell in shown.items() if len(cell) > 1
    ]
    return pd.DataFrame(lines, columns=["sequences x context", *columns])


def _markdown(table: pd.DataFrame) -> str:
    """A table as README.md holds it; large numbers whole, others to two places."""
    cells = [[_cell(value) for value in row] for row in table.itertuples(index=False, name=None)]
    lines = [[*table.columns], ["---"] * len(table.columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _cell(value) -> str:
    return f"{value:,.{0 if value >= 100 else 2}f}" if isinstance(value, float) else str(value)


def test_numbers_in_readme_are_those_of_the_reference_records():
    assert block("numbers") == numbers(), f"replace the block by:\n{numbers()}"


def test_the_audit_in_readme_is_that_of_the_reference_record():
    assert block("audit") == audit(), f"replace the block by:\n{audit()}"


def test_kernels_in_readme_are_those_of_the_reference_records():
    assert block("kernels") == kernels(), f"replace the block by:\n{kernels()}"


def test_the_runner_in_readme_is_that_of_the_reference_record():
    assert block("runner") == runner(), f"replace the block by:\n{runner()}"


def test_speculative_decoding_in_readme_is_that_of_the_reference_records():
    assert block("eagle") == eagle(), f"replace the block by:\n{eagle()}"


def test_there_are_records_of_the_notebooks_on_the_simulated_machine():
    assert {path.parent.name for path in REFERENCE.glob("*/record.json")} == {
        "01_reproduce_regression",
        "02_apply_fix",
        "03_audit_backend_selection",
    }


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.parent.relative_to(REFERENCE).as_posix())
def test_reference_records_are_from_clean_commits(path):
    record = records.load_record(path)
    assert record["provenance"]["git_dirty"] is False
    assert record["stem"] == path.parent.name
    assert path.stat().st_size < LARGEST_BYTES.get(path.parent.name, 400_000)
