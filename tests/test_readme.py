# SPDX-License-Identifier: Apache-2.0
"""The numbers in README.md come from the reference records, and from nowhere else."""

import re
from pathlib import Path

from aiterlab import records

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"<!-- numbers: begin\..*?-->\n(.*?)<!-- numbers: end -->", re.S)


def numbers() -> str:
    """Render the block from results/reference/: one line per notebook, with the record's own finding."""
    lines = ["| notebook | cells | finding | from |", "|---|---|---|---|"]
    for path in sorted((ROOT / "results" / "reference").glob("*/record.json")):
        record = records.load_record(path)
        made = f"commit {record['provenance']['git_commit'][:7]}, {record['provenance']['utc'][:10]}, simulated machine"
        lines.append(f"| `{record['stem']}` | {record['cells_total']} | {record['finding']} | {made} |")
    return "\n".join(lines) + "\n"


def test_numbers_in_readme_are_those_of_the_reference_records():
    (written,) = BLOCK.findall((ROOT / "README.md").read_text())
    assert written == numbers(), f"replace the block by:\n{numbers()}"


def test_reference_records_are_from_clean_commits():
    paths = list((ROOT / "results" / "reference").glob("*/record.json"))
    assert len(paths) == 2
    for path in paths:
        provenance = records.load_record(path)["provenance"]
        assert provenance["git_dirty"] is False
        assert path.stat().st_size < 400_000
