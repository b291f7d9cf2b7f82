# SPDX-License-Identifier: Apache-2.0
"""Cells and what is made of them: verdicts, keys, tables, sentences and figures, all on synthetic answers."""

import copy
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from matplotlib.patches import Rectangle

from aiterlab import plots
from aiterlab.machines import Machine
from aiterlab.machines.description import with_switch
from aiterlab.probes import EXPLICIT, TRAP, Cell, Verdict, ablation, cells, comparisons, findings, grid, tables, verdict
from aiterlab.trees import Tree

MESSAGE = f"{TRAP} 'flash_attn_varlen_func'"
SHUFFLE = cells.SHUFFLE_SWITCH


def tree(name="t", fingerprint="f" * 64, environment=None, folder="/cache/a") -> Tree:
    return Tree(name, Path(folder), Path(folder) / "vllm", fingerprint, "a test", environment=environment or {})


def error(kind, message, file="vllm/a.py", raised_in="vllm") -> dict:
    at = {"file": file, "line": 3, "function": "forward", "source": "aiter.f()"}
    told = {"type": kind, "message": message, "raised_at": at, "raised_in": raised_in}
    return {"outcome": "error", **told, "frames": [at]}


OK = {"outcome": "ok", "max_abs_error": 0.001, "tolerance": 0.004}
WRONG = {"outcome": "wrong", "max_abs_error": 0.5, "tolerance": 0.004}
TRAPPED = error("AttributeError", MESSAGE)
NO_OP = error("AttributeError", "'_OpNamespace' 'aiter' object has no attribute 'paged_attention_v1'")
NO_CUDA = "Torch not compiled with CUDA enabled"
NO_AITER = error("ModuleNotFoundError", "No module named 'aiter'")


def driven(prefill=OK, extend=OK, decode=OK) -> dict:
    steps = {"prefill": prefill, "extend": extend, "decode": decode, "gather_then_attend": OK}
    return {"selection": {"outcome": "ok", "backend": EXPLICIT, "drive": copy.deepcopy(steps)}}


OTHER = {"selection": {"outcome": "ok", "backend": "TRITON_ATTN"}}
NOT_VALID = "Selected backend ROCM_AITER_FA is not valid: compute capability"
PLATFORM = "vllm/platforms/rocm.py"
VERDICTS = [
    (driven(), Verdict.WORKS),
    (OTHER, Verdict.OTHER),
    ({"selection": error("ValueError", NOT_VALID, PLATFORM)}, Verdict.REFUSED),
    ({"selection": error("NotImplementedError", NOT_VALID, "vllm/attention/selector.py")}, Verdict.REFUSED),
    ({"selection": error("ValueError", NOT_VALID)}, Verdict.BROKEN),
    ({"selection": error("ValueError", "too many values to unpack", PLATFORM)}, Verdict.BROKEN),
    ({"selection": NO_AITER}, Verdict.MISSING),
    (driven(NO_AITER, NO_AITER, NO_AITER), Verdict.MISSING),
    (driven(prefill=TRAPPED, extend=TRAPPED, decode=NO_OP), Verdict.TRAPPED),
    (driven(extend=TRAPPED), Verdict.TRAPPED),
    (driven(prefill=error("TypeError", MESSAGE)), Verdict.BROKEN),
    (driven(decode=NO_OP), Verdict.BROKEN),
    (driven(decode=WRONG), Verdict.BROKEN),
    (driven(prefill=NO_AITER, decode=NO_OP), Verdict.BROKEN),
    ({}, Verdict.UNANSWERED),
    (driven(decode=error("NotImplementedError", "no stand-in", raised_in="aiterlab")), Verdict.UNANSWERED),
    (driven(decode=error("NotImplementedError", "no stand-in", raised_in="vllm")), Verdict.BROKEN),
    ({"selection": error("ModuleNotFoundError", "No module named 'triton'")}, Verdict.UNANSWERED),
    ({"selection": error("AssertionError", NO_CUDA, raised_in="torch")}, Verdict.UNANSWERED),
    ({"platform": {"outcome": "ok", "is_rocm": False}, **OTHER}, Verdict.UNANSWERED),
]


@pytest.mark.parametrize(("facts", "expected"), VERDICTS)
def test_verdict(facts, expected):
    assert verdict(facts) is expected


def test_every_verdict_can_be_reached_and_has_a_square_of_its_own():
    assert {expected for _, expected in VERDICTS} == set(Verdict)
    assert set(plots.VERDICTS) == {str(member) for member in Verdict}
    assert len({sign for _, sign, _ in plots.VERDICTS.values()}) == len(plots.VERDICTS)


def test_equal_questions_have_one_key_wherever_their_tree_lies_and_whatever_it_is_called():
    key = Cell(tree(), Machine(), None).key("c")
    assert Cell(tree(), Machine(), None).key("c") == key
    assert Cell(tree(name="other", folder="/elsewhere"), Machine(), None).key("c") == key
    assert len(key) == 32


CHANGED = {
    "fingerprint": Cell(tree(fingerprint="0" * 64), Machine(), None),
    "variables of the tree": Cell(tree(environment={"AITERLAB_HOTFIX": "1"}), Machine(), None),
    "architecture": Cell(tree(), Machine(arch="gfx950"), None),
    "AITER": Cell(tree(), Machine(aiter=False), None),
    "flash-attn": Cell(tree(), Machine(flash_attn=False), None),
    "switch unset to 0": Cell(tree(), with_switch(Machine(), "0"), None),
    "switch unset to 1": Cell(tree(), with_switch(Machine(), "1"), None),
    "another switch": Cell(tree(), Machine(switches={SHUFFLE: "1"}), None),
    "selection": Cell(tree(), Machine(), EXPLICIT),
    "native": Cell(tree(), Machine("native"), None),
}


def test_any_change_is_another_question():
    keys = {name: cell.key("c") for name, cell in CHANGED.items()}
    keys |= {"nothing": Cell(tree(), Machine(), None).key("c"), "context": Cell(tree(), Machine(), None).key("d")}
    assert len(set(keys.values())) == len(keys)


def test_the_grid_of_the_notebook_has_240_different_cells():
    four = [tree(str(i), str(i)) for i in range(4)]
    asked = grid(four, ["gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201"], ["unset", "0", "1"])
    assert len(asked) == 240 == len({cell.key("") for cell in asked})
    assert {cell.coordinates()["switch"] for cell in asked} == {"unset", "0", "1"}
    assert sum(cell.explicit is None for cell in asked) == 120


def test_native_appears_once_because_aiter_is_there_or_not():
    asked = grid([tree()], ["native", "gfx942"], ["unset", "1"])
    native = [cell for cell in asked if not cell.machine.simulated]
    assert (len(native), len(asked)) == (4, 12)
    assert {cell.coordinates()["aiter"] for cell in native} == {"as found"}
    assert all(cell.coordinates()["arch"] == "native" for cell in native)


def test_a_tree_named_twice_is_an_error():
    with pytest.raises(ValueError, match="named twice: a"):
        grid([tree("a"), tree("b"), tree("a")], ["gfx942"], ["0"])


@pytest.mark.parametrize("axes", [(["gfx000"], ["0"]), (["gfx942"], ["2"]), (["gfx942"], [""])])
def test_an_unknown_architecture_or_position_is_an_error(axes):
    with pytest.raises(ValueError, match=r"unknown (architecture|switch position)"):
        grid([tree()], *axes)


def test_ablation_asks_each_tree_with_the_plain_and_the_shuffled_cache():
    asked = ablation([tree("a"), tree("b")], "gfx942")
    found = [(cell.tree.name, cell.machine.switches.get(SHUFFLE), cell.explicit) for cell in asked]
    assert found == [(name, position, EXPLICIT) for name in "ab" for position in (None, "1")]


def row(cell: Cell, facts: dict) -> dict:
    rest = {"reused": False, "seconds": 1.0, "peak_memory_bytes": 1, "no_answer_reason": None, "aiter_log": []}
    return cell.coordinates() | {"verdict": str(verdict(facts)), "facts": facts} | rest


def small_table(trapped: bool) -> list[dict]:
    """Two trees, two architectures; in the tree `bad` an explicit choice meets the builtin, unless the switch is on."""
    rows = []
    for cell in grid([tree("good", "0"), tree("bad", "1")], ["gfx942", "gfx1100"], ["unset", "1"], aiter=(True,)):
        meets = trapped and cell.tree.name == "bad" and cell.explicit and cell.machine.switch == "unset"
        facts = driven(prefill=TRAPPED, extend=TRAPPED, decode=NO_OP) if meets else driven() if cell.explicit else OTHER
        rows.append(row(cell, copy.deepcopy(facts)))
    return rows


def test_frame_has_a_line_per_cell_and_none_for_what_was_not_found():
    table = tables.frame([*small_table(True), row(CHANGED["native"], {})])
    assert len(table) == 17
    first = table.iloc[0]
    assert (first.tree, first.selection, first.backend) == ("good", "auto", "TRITON_ATTN")
    assert pd.isna(first.prefill)
    bad = table[(table.tree == "bad") & (table.selection == EXPLICIT)].iloc[0]
    assert bad.prefill_error == f"AttributeError: {MESSAGE}"
    assert (bad.extend, bad.gather_then_attend) == ("error", "ok")
    assert pd.isna(bad.prefill_max_abs_error)
    assert table.iloc[-1].verdict == "no answer"
    assert pd.isna(table.iloc[-1].available)


def test_trapped_failures_and_truth_table_say_the_same():
    rows = small_table(True)
    table = tables.frame(rows)
    met = tables.trapped(table)
    assert set(zip(met.tree, met.switch, met.selection, strict=True)) == {("bad", "unset", EXPLICIT)}
    found = tables.failures(rows)
    lines = [(failure["step"], failure["cells"], failure["raised_at"]["line"]) for failure in found]
    assert lines == [("prefill", 2, 3), ("extend", 2, 3), ("decode", 2, 3)]
    words = tables.truth_table(table)
    assert list(words.index) == [("good", "gfx942, gfx1100"), ("bad", "gfx942, gfx1100")]
    assert words.loc[("bad", "gfx942, gfx1100"), (EXPLICIT, "AITER present", "unset")] == "builtin trap"
    assert (words == "builtin trap").to_numpy().sum() == 1
    assert MESSAGE in tables.traceback_text(found[0])


def test_differences_names_the_fact_and_refuses_unequal_questions():
    table = tables.frame(small_table(True))
    good, bad = (table[table.tree == name] for name in ("good", "bad"))
    found = comparisons.differences(good, bad, ["verdict", "backend", "available"])
    assert set(zip(found.arch, found.fact, found.left, found.right, strict=True)) == {
        (arch, "verdict", "works", "builtin trap") for arch in ("gfx942", "gfx1100")
    }
    assert comparisons.differences(good, good.assign(tree="again"), ["verdict"]).empty
    with pytest.raises(ValueError, match="not asked the same questions"):
        comparisons.differences(good, bad.iloc[1:], ["verdict"])


def test_parts_marks_what_differs_from_the_whole():
    whole, lacking = driven(), driven(decode=NO_OP)
    rows = [
        row(cell, facts | {"policy": {"available": True, "shuffle_kv_cache_enabled": shuffled}})
        for name, facts in (("whole", whole), ("lacking", lacking))
        for cell in ablation([tree(name)], "gfx942")
        for shuffled in [bool(cell.machine.switches)]
    ]
    table = comparisons.parts(tables.frame(rows), whole="whole")
    marked = table.apply(lambda column: column.str.startswith("»"))
    assert not marked.loc["whole"].any()
    assert set(marked.columns[marked.loc["lacking"]]) == {"decode", "shuffled decode"}
    assert "paged_attention_v1" in table.loc["lacking", "decode"]


def test_findings_count_what_the_table_holds():
    none, some = (tables.frame(small_table(trapped)) for trapped in (False, True))
    assert findings.regression(none) == (
        "None of 16 cells meets Python's builtin aiter in place of the module (good and bad)."
    )
    assert findings.regression(some) == (
        "2 of 16 cells end in Python's builtin aiter, all of them in bad; with AITER installed it takes an explicit "
        "choice of the backend and the switch at unset; never in good."
    )
    assert findings.other_failures(tables.failures(small_table(True))) == "No other question failed."
    broken = driven() | {"eagle": error("TypeError", "no such field")}
    told = findings.other_failures(tables.failures([row(CHANGED["selection"], broken)]))
    assert "t, eagle: TypeError: no such field (1 cells, raised in vllm)" in told
    good, bad = (some[some.tree == name] for name in ("good", "bad"))
    sentence = findings.fix(bad, good, comparisons.differences(bad, good, ["verdict"]))
    assert "from 2 to 0 of 8 cells, changes 2 verdicts" in sentence
    assert "differs in 2 facts" in sentence


def test_the_figure_has_a_square_per_cell_and_says_its_finding():
    table = tables.frame(small_table(True))
    figure = plots.truth_table(table, "2 of 16 cells")
    squares = [patch for ax in figure.axes for patch in ax.patches if isinstance(patch, Rectangle)]
    assert len(squares) == len(table) == 16
    assert figure.get_suptitle() == "2 of 16 cells"
    trap = [text for ax in figure.axes for text in ax.texts if text.get_text() == plots.VERDICTS["builtin trap"][1]]
    assert len(trap) == 2
    plt.close(figure)


def test_the_accuracy_figure_marks_a_step_without_result_by_a_cross():
    steps = tables.accuracy(tables.frame(small_table(True)))
    assert len(steps) == 8 * 3
    figure = plots.accuracy(steps, "below a quarter")
    assert figure.axes[0].get_title(loc="left") == "below a quarter"
    at = [point for group in figure.axes[0].collections for point in group.get_offsets().tolist()]
    assert sum(x == 6.0 for x, _ in at) == steps.max_abs_error.isna().sum() == 6
    plt.close(figure)
