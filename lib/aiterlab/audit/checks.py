# SPDX-License-Identifier: Apache-2.0
"""The checks behind the statements: which answers speak to a statement, and which of them contradict it.

Each check looks at answers alone: what was chosen, what was refused, what was imported. None knows a version, so the
same checks judge a release, a branch and a patch. Where a statement compares cells, its check finds the contrasts among
the rows that it is given; rows that hold none are no evidence for either side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from aiterlab.audit import reading, wording
from aiterlab.audit.judgement import Violation
from aiterlab.audit.reading import Ending
from aiterlab.machines.description import SWITCH_POSITIONS
from aiterlab.policy import MAIN_SWITCH

# Taken from the blog of 2026-02-27: with the switch on, vLLM selects these by itself on the GPUs it names.
DOCUMENTED_DEFAULT = {"decoder": {"ROCM_AITER_FA"}, "mla": {"ROCM_AITER_MLA", "ROCM_AITER_TRITON_MLA"}}
DOCUMENTED_ON = ("gfx942", "gfx950")
# What the comments of vllm/envs.py say which sub-switch is for: the kind of layer and the backends it governs.
GOVERNED = {
    "VLLM_ROCM_USE_AITER_MHA": ("decoder", {"ROCM_AITER_FA"}),
    "VLLM_ROCM_USE_AITER_MLA": ("mla", {"ROCM_AITER_MLA", "ROCM_AITER_TRITON_MLA"}),
    "VLLM_ROCM_USE_AITER_UNIFIED_ATTENTION": ("decoder", {"ROCM_AITER_UNIFIED_ATTN"}),
    "VLLM_USE_AITER_UNIFIED_ATTENTION": ("decoder", {"ROCM_AITER_UNIFIED_ATTN"}),
}

Found = Iterator[Violation | None]


def explicit_choice(rows: Sequence[dict]) -> Found:
    """An accepted choice is used; one that is not accepted is refused on purpose."""
    for row in filter(reading.is_explicit, rows):
        asked, how = row["selection"], reading.ending(row)
        if how is Ending.CHOSEN and asked not in reading.names_of_chosen(row):
            selection = row["facts"]["selection"]
            dropped = selection.get("asked_with") is not None and selection["requested"] is None
            by = "because the configuration dropped the choice" if dropped else "without a refusal"
            yield Violation(f"{asked} is asked for and {reading.chosen(row)} is used, {by}", (row,))
        elif how is Ending.FELL and not _lacks_aiter(row):
            yield Violation(f"{asked} is asked for and ends in {reading.reason(row)}", (row,))
        else:
            yield None


def availability(rows: Sequence[dict]) -> Found:
    """Neither what the tree calls available nor what it refuses depends on the main switch."""
    groups = sorted(reading.contrasts(rows, "switch"), key=lambda group: (reading.is_explicit(group[0]), _least(group)))
    told = set()
    for group in groups:
        group = sorted(group, key=lambda row: SWITCH_POSITIONS.index(row["switch"]))
        machine = tuple(group[0][name] for name in ("arch", "aiter", "flash_attn"))
        if machine not in told and reading.available(group[0]) is not None:
            told.add(machine)
            said = {row["switch"]: reading.available(row) for row in group}
            yield _moved("AITER is {}", {True: "available", False: "not available"}, said, group)
        if reading.is_explicit(group[0]):
            endings = {row["switch"]: reading.ending(row) for row in group}
            said = {switch: how is Ending.CHOSEN for switch, how in endings.items()}
            words = {True: "accepted", False: "met by an error" if Ending.FELL in endings.values() else "refused"}
            yield _moved(f"the explicit choice of {group[0]['selection']} is {{}}", words, said, group)


def _moved(subject: str, words: dict[bool, str], said: dict[str, bool], group: list[dict]) -> Violation | None:
    """What one answer makes of the switch's positions, if it is not the same in all of them."""
    if len(set(said.values())) == 1:
        return None
    parts = [
        f"{words[answer]} with {MAIN_SWITCH} {wording.listed([s for s, a in said.items() if a is answer], 'or')}"
        for answer in (True, False)
    ]
    other = next(row for row in group if said[row["switch"]] is not said[group[0]["switch"]])
    return Violation(subject.format(" but ".join(parts)), (group[0], other))


def _least(group: list[dict]) -> tuple:
    return min(map(reading.weight, group))


def switched_off(rows: Sequence[dict]) -> Found:
    """With the switch off, nothing imports AITER or chooses a backend of it that was not asked for by name."""
    default_on = any(row["switch"] == "unset" and row["facts"].get("policy", {}).get("enabled") for row in rows)
    off = ("0",) if default_on else ("0", "unset")
    for row in rows:
        asked = reading.needs_aiter(row["selection"]) or reading.BACKEND_VARIABLE in row["switches"]
        if asked or row["aiter"] == "absent" or row["switch"] not in off:
            continue
        if reading.is_auto(row) and reading.needs_aiter(reading.chosen(row)):
            yield Violation(f"auto-selection takes {reading.chosen(row)} although the switch is off", (row,))
        elif imports := row["facts"].get("aiter_imports"):
            at = f"{imports[0]['file']}:{imports[0]['line']}"
            yield Violation(f"{at} imports AITER although the switch is off", (row,))
        else:
            yield None


def documented_default(rows: Sequence[dict]) -> Found:
    """With the switch on and nothing else set, the backend that the documentation names is chosen where it can be."""
    for row in filter(reading.is_auto, rows):
        wanted = DOCUMENTED_DEFAULT.get(row["kind"])
        asked = wanted and row["switch"] == "1" and not reading.others(row) and row["role"] == "target"
        if not asked or row["aiter"] == "absent" or row["arch"] not in DOCUMENTED_ON:
            continue
        if reading.ending(row) is Ending.CHOSEN and reading.names_of_chosen(row) & wanted:
            yield None
            continue
        named = _accepted(rows, row, wanted)
        unasked = named is None and (reading.ending(row) is Ending.REFUSED or not reading.plain_layer(row))
        if named is False or unasked:
            continue
        got = reading.chosen(row) or reading.reason(row)
        evidence = () if reading.plain_layer(row) else (_by_name(rows, row, wanted)[0],)
        yield Violation(f"auto-selection takes {got}, not {min(wanted)}, although the switch is on", (row, *evidence))


def sub_switches(rows: Sequence[dict]) -> Found:
    """A sub-switch that is off keeps its backend out; one that is on brings it in, unless another one comes first."""
    for row in filter(reading.is_auto, rows):
        if row["switch"] != "1" or row["aiter"] == "absent":
            continue
        mine = {name: backends for name, (kind, backends) in GOVERNED.items() if kind == row["kind"]}
        chosen = reading.names_of_chosen(row) if reading.ending(row) is Ending.CHOSEN else set()
        got = reading.chosen(row) or reading.reason(row)
        wanted = set().union(*(backends for name, backends in mine.items() if row["switches"].get(name) != "0"))
        for name in mine:
            if name not in row["switches"]:
                continue
            if row["switches"][name] == "0":
                what = f"auto-selection takes {got} although {name} is 0"
                yield Violation(what, (row,)) if chosen & mine[name] else None
            elif _can_be_had(rows, row, mine[name]):
                yield None if chosen & wanted else Violation(f"auto-selection takes {got} although {name} is 1", (row,))


def architecture(rows: Sequence[dict]) -> Found:
    """Where the tree itself does not count the GPU as supported by AITER, it refuses AITER's backends by name."""
    supported = reading.supported(rows)
    for row in filter(reading.is_explicit, rows):
        asked = row["aiter"] != "absent" and row["switch"] == "1" and reading.needs_aiter(row["selection"])
        if not asked or supported.get(row["arch"], True):
            continue
        if reading.ending(row) is Ending.REFUSED or not _would_be_accepted(rows, row, supported):
            yield None
        else:
            how = "accepted" if reading.ending(row) is Ending.CHOSEN else f"met by {reading.reason(row)}"
            yield Violation(f"{row['selection']} is {how} on a GPU that this tree does not count as supported", (row,))


def missing_library(rows: Sequence[dict]) -> Found:
    """Without AITER, a backend that needs it is refused, or its import fails, before the first token."""
    for row in filter(reading.is_explicit, rows):
        if row["aiter"] != "absent" or not reading.needs_aiter(row["selection"]):
            continue
        accepted = reading.ending(row) is Ending.CHOSEN and reading.needs_aiter(reading.chosen(row))
        what = f"{row['selection']} is accepted although AITER is not installed"
        yield Violation(what, (row,)) if accepted else None


def only_available(rows: Sequence[dict]) -> Found:
    """Auto-selection takes no backend of AITER where AITER is not installed or not supported."""
    supported = reading.supported(rows)
    for row in filter(reading.is_auto, rows):
        absent = row["aiter"] == "absent"
        if not absent and (row["switch"] != "1" or supported.get(row["arch"], True)):
            continue
        why = "AITER is not installed" if absent else "this tree does not count the GPU as supported"
        if reading.needs_aiter(reading.chosen(row)):
            yield Violation(f"auto-selection takes {reading.chosen(row)} although {why}", (row,))
        elif reading.ending(row) is Ending.FELL and _lacks_aiter(row):
            yield Violation(f"auto-selection ends in {reading.reason(row)} although another backend is there", (row,))
        else:
            yield None


def draft_and_target(rows: Sequence[dict]) -> Found:
    """Asked for the same, both layers get the same; and where a draft has a choice of its own, only that one counts."""
    for group in reading.contrasts(rows, "role"):
        target, draft = sorted(group, key=lambda row: row["role"] != "target")
        said = [reading.chosen(row) or str(reading.ending(row)) for row in (target, draft)]
        asked = f"asked for {target['selection']}" if reading.is_explicit(target) else "with nothing asked for"
        what = f"{asked}, the target's layer gets {said[0]} and the draft's {said[1]}"
        yield None if said[0] == said[1] else Violation(what, (target, draft))
    alone = {tuple(reading.place(row).items()): row for row in rows if reading.is_auto(row)}
    for row in filter(reading.is_explicit, rows):
        inherited = row["facts"].get("target_choice", {}).get("backend")
        own = (row["facts"]["selection"].get("asked_through") or "").startswith("speculative_config")
        left = alone.get(tuple({**reading.place(row), "selection": "auto"}.items()))
        if not own or left is None or None in (inherited, reading.chosen(left)):
            continue
        if inherited in reading.names_of_chosen(left):
            yield None
        else:
            what = f"{row['selection']} is asked for the target alone, and the draft gets {inherited} too"
            yield Violation(what, (left, row))


def unknown_names(rows: Sequence[dict]) -> Found:
    """A variable that this tree does not know, or knows and ignores, stops vLLM before it starts."""
    for row in rows:
        environment = row["facts"].get("environment") or {}
        unknown = environment.get("unknown") or ()
        named = row["switches"].get(reading.BACKEND_VARIABLE)
        if unknown:
            names = ", ".join(unknown)
            stopped = reading.ending(row) is not Ending.CHOSEN and any(name in reading.reason(row) for name in unknown)
            how = "is answered by a warning" if environment.get("warned") else "passes without a word"
            way = "; only an option makes it an error" if environment.get("raised") else ""
            what = f"{names}, which this tree does not know, {how}{way}"
            yield None if stopped else Violation(what, (row,))
        elif named and not reading.is_explicit(row) and reading.ending(row) is Ending.CHOSEN:
            what = f"{reading.BACKEND_VARIABLE}={named} is known and ignored: {reading.chosen(row)} is used"
            yield None if named in reading.names_of_chosen(row) else Violation(what, (row,))


def bound_names(rows: Sequence[dict]) -> Found:
    """No builtin stands in for a name that the chosen backend uses, and every name of its own module is bound.

    Modules that backends of other platforms share bind names for those; such a name counts only if a builtin hides
    that it is missing.
    """
    for row in rows:
        selection = row["facts"]["selection"]
        if selection.get("unbound") is None or row["aiter"] == "absent":
            continue
        own = selection["backend_class"].rpartition(".")[0]
        met = [
            name
            for name in selection["unbound"]
            if name.get("kept_off") is None and (name["builtin"] or name["module"] == own)
        ]
        for name in met:
            instead = f"Python's builtin {name['name']} stands in for it" if name["builtin"] else "a NameError waits"
            what = f"{name['file']}:{name['line']} uses `{name['name']}`, which is not bound: {instead}"
            yield Violation(what, (row,))
        if not met:
            yield None


def _lacks_aiter(row: dict) -> bool:
    error = row["facts"]["selection"]
    return row["aiter"] == "absent" and reading.is_import_error(error) and "aiter" in error["message"]


def _by_name(rows: Sequence[dict], auto: dict, backends: set[str]) -> list[dict]:
    """The cells that ask for one of `backends` by name where `auto` asks for nothing."""
    here = {name: auto[name] for name in ("arch", "aiter", "switch", *reading.LAYER)}
    return [
        row
        for row in rows
        if row["selection"] in backends and not reading.others(row) and all(row[n] == v for n, v in here.items())
    ]


def _accepted(rows: Sequence[dict], auto: dict, backends: set[str]) -> bool | None:
    """Whether one of `backends` can be had by name where `auto` asks for nothing; None if that was not asked."""
    named = _by_name(rows, auto, backends)
    return any(reading.ending(row) is not Ending.REFUSED for row in named) if named else None


def _can_be_had(rows: Sequence[dict], auto: dict, backends: set[str]) -> bool:
    """Whether the tree counts the GPU as supported and, where that was asked, accepts one of `backends` by name."""
    policy = auto["facts"].get("policy", {})
    said = policy.get("available")
    return bool(policy.get("enabled") if said is None else said) and _accepted(rows, auto, backends) is not False


def _would_be_accepted(rows: Sequence[dict], refused: dict, supported: dict[str, bool]) -> bool:
    """Whether the same choice for the same layer is accepted on some supported GPU, or was not asked there."""
    elsewhere = [
        row
        for row in rows
        if supported.get(row["arch"])
        and row["selection"] == refused["selection"]
        and all(row[name] == refused[name] for name in reading.LAYER)
    ]
    return not elsewhere or any(reading.ending(row) is Ending.CHOSEN for row in elsewhere)
