# SPDX-License-Identifier: Apache-2.0
"""Word numbers, times and commits alike in every page and table."""

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from aiterlab.suite import status
from aiterlab.suite.metrics import Observation
from aiterlab.suite.results import text

# Colour of the banner; an ending that is not here is a failure.
TONES = {
    status.OK: "good",
    status.INTERRUPTED: "warn",
    status.CELL_SKIPPED: "idle",
    status.CELL_NOT_RUN: "idle",
}


def value_words(value: float | None) -> str:
    """Return a number with the digits that a reader needs, a dash where there is none."""
    if value is None:
        return "-"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.3g}"


def spread_words(seen: Observation) -> str:
    """Return the interval beside a median, and how many samples there are if they are in the record."""
    if seen.low is None or seen.high is None:
        return "-"
    count = f", {len(seen.samples)} samples" if len(seen.samples) > 1 else ""
    return f"{value_words(seen.low)} to {value_words(seen.high)}{count}"


def duration_words(seconds: float | None) -> str:
    """Return a duration as people say it."""
    if seconds is None:
        return "-"
    return f"{seconds:.1f} s" if seconds < 120 else f"{int(seconds // 60)} min {int(seconds % 60)} s"


def commit_words(facts: Mapping[str, Any]) -> str:
    """Return the commit and whether there were changes beside it, or why it is not known."""
    commit = facts.get("git_commit")
    if not commit:
        missing = facts.get("missing")
        return f"- ({(missing if isinstance(missing, Mapping) else {}).get('git_commit', 'not recorded')})"
    return f"{str(commit)[:12]}{' with uncommitted changes' if facts.get('git_dirty') else ''}"


def time_words(stamp: Any) -> str | None:
    """Return an ISO time to the second as people write it, in UTC; what is none is returned as it is."""
    try:
        return datetime.fromisoformat(stamp).astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (TypeError, ValueError):
        return text(stamp)


def processor_words(facts: Mapping[str, Any]) -> str:
    """Return processor, usable cores and memory in one line."""
    cores, memory = facts.get("cpu_usable_count"), facts.get("memory_bytes")
    parts = [
        facts.get("cpu_model"),
        f"{cores} cores" if cores else None,
        f"{memory / 2**30:.0f} GiB" if isinstance(memory, int | float) and memory else None,
    ]
    return ", ".join(str(part) for part in parts if part)


def reused_words(facts: Mapping[str, Any]) -> str | None:
    """Say from which run a notebook's result was taken over, and since when it stands; None if it is its run's own."""
    source, since = text(facts.get("reused_from")), text(facts.get("reused_since_utc"))
    return f"reused from run {source}{f', there since {time_words(since)}' if since else ''}" if source else None


def tone_of(ending: str) -> str:
    """Return the banner's colour class of an ending."""
    return TONES.get(ending, "bad")


def provenance_rows(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield every fact of a provenance as name and words; what is missing is a dash with its reason."""
    missing = facts.get("missing")
    missing = missing if isinstance(missing, Mapping) else {}
    for name, value in facts.items():
        if name == "missing":
            continue
        for inner, item in value.items() if isinstance(value, Mapping) else [("", value)]:
            path = f"{name}.{inner}" if inner else name
            words = item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)
            if item is None:
                words = f"- ({missing.get(path, 'not recorded')})"
            yield (inner or name.replace("_", " ")), words
