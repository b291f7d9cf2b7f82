# SPDX-License-Identifier: Apache-2.0
"""The JSON Schema (Draft 2020-12) of a record: what `records.save_record` writes for every notebook.

The frame is closed where readers rely on it: the stem, the finding, the parameters, the provenance. Beside it a record
holds flat snake_case keys with the unit in the name; null says that a value is missing.
"""

from pathlib import Path
from typing import Any

from aiterlab.records import atomic_write_text, dump_json
from aiterlab.suite.metrics import METRICS

SCHEMA_NAME = "record.schema.json"
UNITS = ("ms", "us", "s", "bytes", "tok_s", "tflop_s", "tb_s", "total")


def record_schema() -> dict[str, Any]:
    """Return the schema."""
    text, number, flag = {"type": "string"}, {"type": "number"}, {"type": "boolean"}
    numbers = {"type": "array", "items": _nullable(number)}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "urn:aiterlab:record",
        "title": "Record of one notebook",
        "type": "object",
        "required": ["stem", "finding", "parameters", "provenance"],
        "properties": {
            "stem": {"type": "string", "pattern": "^[0-9]{2}_[a-z0-9_]+$"},
            "finding": {**_nullable(text), "description": "the sentence that answers the notebook's question"},
            "machine_simulated": {**_nullable(flag), "description": "whether the machine was a described one"},
            "trees": {
                "description": "states of vLLM's source: what each is, and the hash of its files",
                "type": "object",
                "additionalProperties": {"type": "array", "prefixItems": [text, text], "minItems": 2},
            },
            "parameters": {"oneOf": [{"type": "null"}, {"$ref": "#/$defs/parameters"}]},
            "provenance": {"$ref": "#/$defs/provenance"},
        },
        "patternProperties": {
            f"_({'|'.join(UNITS)})$": {"anyOf": [_nullable(number), numbers, {"$ref": "#/$defs/table"}]}
        },
        "propertyNames": {"pattern": "^[a-z][a-z0-9_]*$"},
        "allOf": [_tables_of(stem) for stem in dict.fromkeys(metric.stem for metric in METRICS)],
        "$defs": {
            "table": {
                "description": "rows: an object of columns of one length, or a list of objects",
                "oneOf": [
                    {"type": "object", "additionalProperties": {"type": "array"}},
                    {"type": "array", "items": {"type": "object"}},
                ],
            },
            "parameters": {
                "type": "object",
                "required": ["profile"],
                "properties": {"profile": text},
                "propertyNames": {"pattern": "^[A-Za-z_][A-Za-z0-9_]*$"},
            },
            "provenance": {
                "type": "object",
                "required": ["utc", "git_commit", "git_dirty", "python", "platform", "versions", "missing"],
                "properties": {
                    "utc": {"type": "string", "format": "date-time"},
                    "git_commit": {"type": ["string", "null"], "pattern": "^[0-9a-f]{7,64}$"},
                    "git_dirty": _nullable(flag),
                    "python": text,
                    "platform": text,
                    "cpu_model": _nullable(text),
                    "cpu_count": _nullable({"type": "integer", "minimum": 1}),
                    "cpu_usable_count": _nullable({"type": "integer", "minimum": 1}),
                    "memory_bytes": _nullable({"type": "integer", "minimum": 1}),
                    "accelerators": {"type": ["array", "null"], "items": text},
                    "versions": {"type": "object", "additionalProperties": _nullable(text)},
                    "environment": {"type": "object", "additionalProperties": text},
                    "missing": {
                        "description": "why a fact is null",
                        "type": "object",
                        "additionalProperties": text,
                    },
                },
            },
        },
    }


def write_schema(run_dir: Path | str) -> Path:
    """Write `record.schema.json` into the run's folder."""
    return atomic_write_text(Path(run_dir) / SCHEMA_NAME, dump_json(record_schema()))


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    return {**schema, "type": [schema["type"], "null"]}


def _tables_of(stem: str) -> dict[str, Any]:
    """Say of one notebook's record that the tables and counts which readers take are of the form that they expect."""
    found: dict[str, Any] = {}
    for metric in METRICS:
        if metric.stem == stem and metric.table == "":
            found[metric.value] = {"type": ["integer", "null"]}
        elif metric.stem == stem and isinstance(metric.table, str):
            found[metric.table] = {"$ref": "#/$defs/table"}
    return {
        "if": {"properties": {"stem": {"const": stem}}},
        "then": {"properties": found, "required": sorted(found)},
    }
