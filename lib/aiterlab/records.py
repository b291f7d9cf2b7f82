# SPDX-License-Identifier: Apache-2.0
"""Write down what a notebook found, so that tables, figures, tests and reports read one file and nobody reads stdout.

A record is one JSON object: flat snake_case keys with units in their names, raw counts kept, and null where a number is
missing. NaN and infinity are refused, because a reader cannot tell a missing measurement from a wrong one.
"""

import json
import math
import os
import re
import secrets
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aiterlab import provenance
from aiterlab.paths import output_dir
from aiterlab.security import scrub, scrub_tree

RECORD_NAME = "record.json"
UNFIT_NAME = "record.unfit.json"
FULL = "full"  # the profile whose numbers are quoted: each must say where it comes from
_KEY = re.compile(r"[a-z][a-z0-9_]*")
_ADDED_KEYS = ("stem", "parameters", "provenance")
_APPENDING = threading.Lock()  # a journal belongs to one process


class RecordError(ValueError):
    """A record that cannot be written or read, with the path of the offending key."""


def save_record(stem: str, record: dict[str, Any], *, parameters: dict[str, Any] | None) -> Path:
    """Write `record`, with the notebook's parameters and its provenance, and return the file's path.

    Args:
        stem: the notebook's name without its ending; decides the folder.
        record: flat snake_case keys; values are JSON (nested lists and objects are fine) with finite numbers.
        parameters: the effective parameters of the notebook, or None if it has none.

    Raises:
        RecordError: something that JSON cannot hold; or a profile `full` on a machine that cannot say where its numbers
            come from. What was measured is then kept beside, in `record.unfit.json`.
    """
    for key in record:
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            raise RecordError(f"{key!r}: a record's keys are snake_case names, units included (such as latency_ms)")
        if key in _ADDED_KEYS:
            raise RecordError(f"{key}: this key is written by save_record itself; choose another name")
    facts, known = provenance.collect(), provenance.resolved(record, parameters)
    facts |= known | {"missing": facts["missing"] | known["missing"]}
    whole = {"stem": stem, **record, "parameters": parameters, "provenance": facts}
    check_json(whole)
    text, folder = dump_json(scrub_tree(whole)), output_dir(stem)
    lacking = provenance.missing_for_full(facts) if (parameters or {}).get("profile") == FULL else []
    if lacking:
        atomic_write_text(folder / UNFIT_NAME, text)
        raise RecordError(
            f"a run of profile {FULL} must be able to record {'; '.join(lacking)}. What was measured is kept in "
            f"{stem}/{UNFIT_NAME}; run from a git checkout, in an environment made as environments/ says"
        )
    written = atomic_write_text(folder / RECORD_NAME, text)
    (folder / UNFIT_NAME).unlink(missing_ok=True)
    return written


def load_record(path: Path | str) -> dict[str, Any]:
    """Read a record back; refuses what `save_record` would not have written."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecordError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(record, dict):
        raise RecordError(f"{path}: a record is one JSON object, not a {type(record).__name__}")
    check_json(record)
    return record


def check_json(value: Any, path: str = "") -> None:
    """Raise RecordError, naming the key's path, unless `value` survives JSON unchanged and all numbers are finite."""
    where = path or "the record"
    if value is None or isinstance(value, bool | int | str):
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise RecordError(f"{where}: {value} is not a number that JSON can hold; write None where it is missing")
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise RecordError(f"{where}: the key {key!r} is a {type(key).__name__}; JSON has string keys only")
            check_json(item, f"{path}.{key}" if path else key)
        return
    if isinstance(value, list | tuple):
        for index, item in enumerate(value):
            check_json(item, f"{path}[{index}]")
        return
    raise RecordError(
        f"{where}: a {type(value).__name__} is not JSON; convert it (float(x), int(x), x.tolist(), str(x))"
    )


def dump_json(value: Any) -> str:
    """Format a JSON document for people and diffs: indented, keys in the order given, newline at the end."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def append_line(path: Path | str, row: Mapping[str, Any]) -> None:
    """Add one JSON object to a journal as a line, the whole of it or nothing; lines of several threads never mix.

    Raises RecordError over what a record could not hold either.
    """
    check_json(row)
    rest = (json.dumps(scrub_tree(row)) + "\n").encode("utf-8")
    with _APPENDING, open(path, "ab", buffering=0) as journal:
        before = os.fstat(journal.fileno()).st_size
        try:
            while rest:  # a disk that fills up takes a part, and refuses the next
                rest = rest[journal.write(rest) :]
        except BaseException:
            journal.truncate(before)
            raise


def scrub_file(path: Path) -> None:
    """Take home directories and secrets out of a text file that a process has written which knows of neither."""
    said = path.read_bytes()
    kept = scrub(said.decode("utf-8", errors="replace")).encode()
    if kept != said:
        atomic_write_bytes(path, kept)


def atomic_write_text(path: Path | str, text: str) -> Path:
    """Write text so that a reader sees the old file or the whole new one; creates the folder.

    Half of a surrogate pair, which UTF-8 does not have, is written as its escape (which in JSON stands for itself).
    """
    return atomic_write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def atomic_write_bytes(path: Path | str, data: bytes) -> Path:
    """Write bytes so that a reader sees the old file or the whole new one; creates the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Same folder, so that the rename stays on one file system. Not `tempfile`: its files are readable by their owner
    # alone, and results are made to be collected by others.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
