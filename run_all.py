#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Run the notebooks and render what they found: the list of runs. The command line is `aiterlab.suite.cli`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from aiterlab.suite import cli
from aiterlab.suite.runs import Row

STANDARD_TREES = ("release:0.15.1", "regressed", "release:0.16.0", "release:0.32.0")

SHAPE_CELLS = ("8b:1x128", "8b:8x2048", "8b:64x128", "8b:1x16384", "8b:1x32768")

ROWS = (
    Row(
        stem="01_reproduce_regression",
        minutes=5,
        needs="any CPU, 4 GB memory, network on the first run",
        memory_gb=4,
        profiles={
            "smoke": {
                "profile": "smoke",
                "trees": [*STANDARD_TREES[:3]],
                "architectures": ["gfx942"],
            },
            "standard": {},
            "full": {"profile": "full", "trees": ["release:0.15.0", *STANDARD_TREES, "release:0.17.0"]},
        },
    ),
    Row(
        stem="02_apply_fix",
        minutes=5,
        after=("01_reproduce_regression",),  # whose answers to the same questions it finds there
        needs="any CPU, 4 GB memory, network on the first run",
        memory_gb=4,
        profiles={
            "smoke": {
                "profile": "smoke",
                "architectures": ["gfx942"],
            },
            "standard": {},
            "full": {"profile": "full"},
        },
    ),
    Row(
        stem="03_audit_backend_selection",
        minutes=5,
        needs="any CPU, 6 GB memory, network on the first run",
        memory_gb=6,
        profiles={
            "smoke": {
                "profile": "smoke",
                "trees": ["regressed", "release:0.16.0"],
                "architectures": ["gfx942", "gfx1100"],
                "cold_share": 0.002,
            },
            "standard": {},
            "full": {
                "profile": "full",
                "trees": ["releases:..0.15.1", "regressed", "hotfixed", "releases:0.16.0.."],
            },
        },
    ),
    Row(
        stem="04_run_attention_kernels",
        minutes=2,
        needs="any CPU, 4 GB memory; full: a GPU, 16 GB of its memory",
        memory_gb=4,
        measures_time="on a GPU",
        resources={"full": {"gpu": 1}},
        profiles={
            "smoke": {
                "profile": "smoke",
                "cases": ["decode_2x64", "verify_q4_2x64", "extend_q16_1x48", "prefill_2x32", "gather_2x64"],
                "checks": "tiny",
                "rounds": 1,
                "architectures": ["gfx942"],
                "compiled": ["verify_q4_1x32k"],
            },
            "standard": {},
            "full": {"profile": "full", "rounds": 50, "architectures": ["gfx942", "gfx950", "gfx90a", "gfx1100"]},
        },
    ),
    Row(
        stem="05_run_eagle_spec_decode",
        minutes=5,
        needs="any CPU, 8 GB memory; full: a GPU, 80 GB of its memory",
        memory_gb=8,
        measures_time="always",
        reads=("models", "results/reference"),
        resources={"full": {"gpu": 1}},
        profiles={
            "smoke": {
                "profile": "smoke",
                "draft_tokens": [2],
                "count": 4,
                "output_tokens": 24,
                "samples": 100,
                "rounds": 1,
                "cells": ["1x128"],
                "accuracy": {"aiterlab_arithmetic": 10},
                "beside": ["sabotage", "backends", "serve", "tensor 2"],
                "trees": ["regressed", "release:0.16.0"],
            },
            "standard": {},
            "full": {
                "profile": "full",
                "draft_tokens": [1, 2, 3, 4, 5, 6, 7],
                "count": 64,
                "output_tokens": 192,
                "samples": 1000,
                "rounds": 18,
                "cells": ["1x128", "64x128", *SHAPE_CELLS],
                "accuracy": {"aiterlab_arithmetic": 200},
            },
        },
    ),
    Row(
        stem="06_plot_accuracy_latency",
        minutes=0.3,
        needs="any CPU, 2 GB memory; the records of the others, or those of the repository",
        after=("01_reproduce_regression", "02_apply_fix", "04_run_attention_kernels", "05_run_eagle_spec_decode"),
        reads=("results/reference",),
        profiles={"smoke": {"profile": "smoke"}, "standard": {}, "full": {"profile": "full"}},
    ),
)


def main(argv: Sequence[str] | None = None, rows: Sequence[Row] = ROWS, notebooks: Path | None = None) -> int:
    """Run the command line and return its exit code; `rows` and `notebooks` default to the project's own."""
    return cli.main(argv, rows, notebooks)


if __name__ == "__main__":
    sys.exit(main())
