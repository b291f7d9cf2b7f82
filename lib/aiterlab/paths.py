# SPDX-License-Identifier: Apache-2.0
"""Know where things lie: the only module that names a directory.

Notebooks, the runner and the caches ask here, so that a notebook works the same in an editor, in the runner and in an
installed package, and no cell ever holds a path.
"""

import os
from pathlib import Path

RUN_DIR_VARIABLE = "AITERLAB_RUN_DIR"
CACHE_VARIABLE = "AITERLAB_CACHE"
STARTED_IN_VARIABLE = "AITERLAB_STARTED_IN"
CELLS_NAME = "cells"
SOURCE_NAME = "source.json"  # what git said of this code, where it lies without its repository


def project_root() -> Path:
    """Return the folder that holds `run_all.py`: beside this package, else around the working directory.

    A package installed without its repository has no such folder; the working directory stands in, which is where its
    user expects `results/` to appear.
    """
    here = Path.cwd()
    # In a checkout the package lies in lib/, in a copy that travelled at the top, where Ray's workers import from.
    for folder in (*Path(__file__).resolve().parents[1:3], here, *here.parents):
        if (folder / "run_all.py").is_file():
            return folder
    return here


def as_typed(path: str) -> Path:
    """Return a path that a user typed, made absolute where they typed it; a kernel runs in another folder."""
    return (Path(os.environ.get(STARTED_IN_VARIABLE, "")) / Path(path).expanduser()).resolve()


def notebooks_dir() -> Path:
    """Return the folder of the notebooks."""
    return project_root() / "notebooks"


def models_dir() -> Path:
    """Return the folder of the bundled target, its drafts and their held-out texts."""
    return project_root() / "models"


def results_dir() -> Path:
    """Return the folder under which every run leaves one folder of its own."""
    return project_root() / "results"


def cache_dir() -> Path:
    """Return the folder for downloads and unpacked trees; everything in it may be deleted at any time."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification says that a relative XDG_CACHE_HOME is to be ignored.
    root = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
    return root / "aiterlab"


def run_dir() -> Path:
    """Return the folder of this run, which the runner names in the environment.

    Without it (a notebook opened by hand) that is `results/interactive/`: trying a cell never touches a run's results.
    """
    run = os.environ.get(RUN_DIR_VARIABLE)
    return Path(run) if run else results_dir() / "interactive"


def output_dir(stem: str) -> Path:
    """Return, created, the folder in which the notebook `stem` leaves its record and figures."""
    if not stem or Path(stem).name != stem:
        raise ValueError(f"a notebook's stem is a plain name such as '01_reproduce_regression', not {stem!r}")
    folder = run_dir() / stem
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cells_dir() -> Path:
    """Return, created, the folder that keeps the answers of this run's probes, shared by its notebooks."""
    folder = run_dir() / CELLS_NAME
    folder.mkdir(parents=True, exist_ok=True)
    return folder
