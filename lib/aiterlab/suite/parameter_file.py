# SPDX-License-Identifier: Apache-2.0
"""Read parameters of several notebooks from one JSON file."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from aiterlab.suite.notebook_parameters import MODELS
from aiterlab.suite.parameter_model import ParameterError, unknown


def read_parameter_file(path: Path | str, known: Iterable[str] = tuple(MODELS)) -> dict[str, dict[str, Any]]:
    """Return `{stem: {name: value}}`; names and values are checked where the notebook is known, not here.

    Args:
        known: the stems that there are.

    Raises:
        ParameterError: the file cannot be read, is not JSON (NaN and Infinity are not), says a key twice, or names a
            notebook that there is not.
    """
    known = list(known)
    try:
        whole = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_once, parse_constant=_refuse)
    except OSError as error:
        raise ParameterError(f"{path}: {error.strerror}; name a JSON file of parameters") from None
    except UnicodeDecodeError as error:
        raise ParameterError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ParameterError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise ParameterError(f"{path}: {error}") from None
    shape = '{"01_reproduce_regression": {"workers": 2}}'
    if not isinstance(whole, dict):
        raise ParameterError(f"{path}: holds a {type(whole).__name__}; write it as {shape}")
    for stem, values in whole.items():
        if stem not in known:
            raise ParameterError(unknown(f"{path}: unknown notebook", stem, known))
        if not isinstance(values, dict):
            raise ParameterError(f"{path}: {stem} holds a {type(values).__name__}; write it as {shape}")
    return whole


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is there twice; leave one out")
        found[key] = value
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON; a number is finite, or null where it may be missing")
