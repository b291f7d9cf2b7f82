# SPDX-License-Identifier: Apache-2.0
"""What are the parameters of one notebook? A closed model, which also writes the cell that declares them.

A value is taken as it is or refused, never converted: "1e5" is no number and 1 is no name. Whatever is wrong is one
line that says what to write instead.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

LONGEST_LINE = 120  # the formatter's, in pyproject.toml
_Item = TypeVar("_Item")


class ParameterError(ValueError):
    """A parameter that cannot be used; the message is one line that says what to write instead."""


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """Word the message about a name that does not exist, with the likeliest intended one."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    mend = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(filter(None, known)) or 'none'}"
    return f"{what} {name!r}; {mend}"


def complaint(error: Mapping[str, Any], where: str, wanted: str) -> str:
    """Word one of pydantic's errors: where, what is wrong, what was given, and what is `wanted` instead."""
    where += "".join(f"[{part!r}]" for part in error["loc"] if part != "[key]")
    given = error["input"]
    if error["type"] == "value_error":
        return f"{where}: {error['ctx']['error']}"
    # pydantic has the choices as a sentence only; none of ours holds a quote
    choices = re.findall(r"'([^']*)'", error["ctx"]["expected"]) if error["type"] == "literal_error" else []
    if choices and isinstance(given, str):
        return unknown(f"{where}: unknown choice", given, choices)
    said = error["msg"].replace(" after validation", "")
    return f"{where}: {said[0].lower()}{said[1:]}; got {shortened(given)}, wanted {wanted}"


def shortened(value: Any) -> str:
    """Return a value as it is written in Python, on one line and without the rest of what is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def refuse_lone_surrogates(value: Any, where: str) -> None:
    """Raise ParameterError over text that UTF-8 cannot hold: half a pair of code units, or a byte of another code."""
    try:
        json.dumps(value, ensure_ascii=False, default=repr, skipkeys=True).encode()
    except UnicodeEncodeError:
        raise ParameterError(f"{where}: got {shortened(value)}, which is no text in UTF-8; write it in UTF-8") from None


def _once(items: list) -> list:
    twice = [item for index, item in enumerate(items) if item in items[:index]]
    if twice:
        raise ValueError(f"{shortened(twice[0])} is there twice; name each once")
    return items


Each = Annotated[list[_Item], AfterValidator(_once), Field(json_schema_extra={"uniqueItems": True})]
Some = Annotated[Each[_Item], Field(min_length=1)]


def written_as(pattern: str, what: str, grammar: str, words: Iterable[str] = ()) -> Any:
    """Return the type of a str that `pattern` matches whole.

    Args:
        what: what such a str names, for the message: "tree".
        grammar: the pattern in words, for the message.
        words: some that match; the message asks whether the nearest of them was meant.
    """

    def check(text: str) -> str:
        if re.fullmatch(pattern, text):
            return text
        close = difflib.get_close_matches(text, list(words), n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown {what} {shortened(text)}; {hint}write {grammar}")

    schema = {"type": "string", "pattern": f"^({pattern})$", "description": grammar}
    return Annotated[str, AfterValidator(check), WithJsonSchema(schema)]


class NotebookParameters(BaseModel):
    """The parameters of a notebook: names, types, bounds, choices, defaults and help, in the order of its cell.

    What stands here every notebook has, and only its record reads.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    profile: Literal["smoke", "standard", "full"] = Field(
        "standard", description="smoke, standard or full; kept in the record"
    )

    @classmethod
    def checked(cls, values: Mapping[str, Any], where: str, hints: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Return all parameters, `values` laid over the defaults.

        Args:
            where: the notebook's stem, which opens every message.
            hints: what to add to the message about an error of pydantic's, by the error's type.

        Raises:
            ParameterError: the first of them that is unknown or wrong.
        """
        refuse_lone_surrogates(dict(values), where)
        try:
            return cls.model_validate(dict(values)).model_dump()
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise ParameterError(cls._said(first, where) + (hints or {}).get(first["type"], "")) from None

    @classmethod
    def _said(cls, error: Mapping[str, Any], where: str) -> str:
        name, *spot = error["loc"] or ("",)
        if error["type"] == "extra_forbidden":
            return unknown(f"{where}: unknown parameter", name, cls.model_fields)
        if not name:  # a rule about several, whose message names them
            return f"{where}: {error['ctx']['error']}"
        wanted = f"{cls.annotation(name)} such as {shortened(cls.defaults()[name])}"
        return complaint({**error, "loc": spot}, f"{where}.{name}", wanted)

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Return every parameter's default."""
        return cls().model_dump()

    @classmethod
    def annotation(cls, name: str) -> str:
        """Return a parameter's type as its cell says it, for which papermill knows plain types alone."""
        return _plain(cls.model_fields[name].annotation)

    @classmethod
    def cell(cls) -> str:
        """Return the source of the parameters cell."""
        return "\n".join(
            _assignment(f"{name}: {cls.annotation(name)} = ", cls.defaults()[name], f"  # {field.description}")
            for name, field in cls.model_fields.items()
        )


def _plain(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _plain(arguments[0])
    if origin is Literal:
        return type(arguments[0]).__name__
    if origin in (list, dict):
        return f"{origin.__name__}[{', '.join(map(_plain, arguments))}]"
    return annotation.__name__


def _assignment(start: str, value: Any, comment: str) -> str:
    line = start + _literal(value) + comment
    if len(line) <= LONGEST_LINE or not isinstance(value, list):
        return line
    # papermill reads the help from the last line
    return "\n".join([f"{start}[", *(f"    {_literal(item)}," for item in value), f"]{comment}"])


def _literal(value: Any) -> str:
    """Return a value as the formatter writes it."""
    match value:
        case str():
            return json.dumps(value, ensure_ascii=False)
        case list():
            return f"[{', '.join(map(_literal, value))}]"
        case dict():
            return "{" + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    return repr(value)
