# SPDX-License-Identifier: Apache-2.0
"""The audit as the notebook asks it: which trees, what is kept, what the detector and the probes say of one place."""

import re
import shlex

import pytest
from audit_rows import crashed, imported, picked, refused, row, unanswered

from aiterlab import paths, records, trees
from aiterlab.audit import compact, detector, shown, statements, study
from aiterlab.probes.layer import Layer
from aiterlab.trees import TreeError, releases

FA, ROCM, UNIFIED = "ROCM_AITER_FA", "ROCM_ATTN", "ROCM_AITER_UNIFIED_ATTN"
TRAP = {"module": "vllm.a", "file": "vllm/a.py", "name": "aiter", "line": 801, "builtin": True, "kept_off": None}


def history() -> list[dict]:
    """Three trees: one that chooses as documented, one that chooses another backend, one without an answer."""
    rows = []
    for tree, facts in (("t1", picked(FA)), ("t2", picked(ROCM, priorities=[ROCM, FA])), ("t3", unanswered("gone"))):
        for arch in ("gfx942", "gfx950"):
            rows += [row(facts, tree=tree, switch=switch, arch=arch) for switch in ("0", "1")]
        rows.append(row(refused("head size 72 is not for ROCM_AITER_FA"), FA, tree=tree, layer=Layer(head_size=72)))
        rows.append(row(picked(UNIFIED), tree=tree, switch="1", others={"VLLM_X": "1"}, layer=Layer(block_size=None)))
    return rows


# Trees


def test_a_range_stands_for_the_releases_between_its_ends(monkeypatch):
    monkeypatch.setattr(releases, "available", lambda: ["0.11.0", "0.11.2", "0.15.1", "0.16.0", "0.32.0"])
    assert study.names(["releases:..0.15.1", "regressed", "releases:0.16.0..", "release:0.15.1"]) == [
        "release:0.11.0",
        "release:0.11.2",
        "release:0.15.1",
        "regressed",
        "release:0.16.0",
        "release:0.32.0",
    ]
    assert len(study.names(["releases:all"])) == 5
    with pytest.raises(ValueError, match="the index has no release"):
        study.names(["releases:0.33.0.."])


@pytest.fixture
def audit(monkeypatch):
    """An audit of two trees, one of which cannot be had, that has not asked anything."""
    tree = trees.Tree("t1", folder=None, source=None, fingerprint="f" * 64, origin="made up")
    monkeypatch.setattr(study, "get_all", lambda names: {"t0": TreeError("t0: no such wheel"), "t1": tree, "t2": tree})
    monkeypatch.setattr(study.matrix, "default", lambda tree, architectures: ["a cell", "another"])
    return study.Audit(["t0", "t1", "t2"], workers=2)


def test_a_tree_that_cannot_be_had_is_judged_unknown_in_its_place(audit):
    assert (list(audit.trees), audit.lacking) == (["t1", "t2"], {"t0": "t0: no such wheel"})
    judged = statements.judge_trees(history()[:6], audit.lacking, list(audit.found))
    assert [one.tree for one in judged] == ["t0"] * len(statements.STATEMENTS) + ["t1"] * len(statements.STATEMENTS)
    assert {one.verdict for one in judged if one.tree == "t0"} == {"unknown"}
    shown_as = shown.sources(audit.found)["what it is"]
    assert list(shown_as) == ["not to be had: t0: no such wheel", "made up", "made up"]


def test_the_last_trees_are_looked_at_where_none_is_named(audit):
    assert audit.chosen("", []) == ("t2", "t1", "t2")
    assert audit.chosen("t1", ["t0", "t1"]) == ("t1", "t0", "t1")
    with pytest.raises(ValueError, match="'t9' is not among the trees: t0, t1, t2"):
        audit.chosen("t9", [])
    with pytest.raises(ValueError, match="name two trees"):
        audit.chosen("", ["t1"])
    del audit.trees["t2"]
    assert audit.chosen("", []) == ("t1", "t1", "t1")
    del audit.trees["t1"]
    with pytest.raises(ValueError, match="t0: no such wheel"):
        audit.chosen("", [])


def test_asking_keeps_how_long_it_took_and_what_a_new_process_answers_otherwise(audit, monkeypatch):
    rows = [dict(one, reused=False) for one in history()[:2]]
    differing = [{"tree": "t1", "arch": "gfx942", "fact": fact, "pooled": 1, "cold": 2} for fact in ("a", "b")]

    def compare_cold(cells, rows, *, share, seed, workers, progress):
        progress(3, 3, 1.0)
        return differing

    monkeypatch.setattr(study.pool, "ask", lambda cells, **options: rows)
    monkeypatch.setattr(study.pool, "compare_cold", compare_cold)
    audit.ask()
    assert (audit.pooled.cells, audit.pooled.workers) == (2, 2)
    assert audit.agreement() == "No cell was asked again in a new interpreter."
    audit.ask_again(0.5, seed=0)
    assert audit.agreement() == "Asked again in a new interpreter, 1 cell of 3 answered differently."
    differing.clear()
    assert audit.agreement() == "Asked again in a new interpreter, none of 3 answered differently."
    assert list(shown.pace(audit)["cells asked"]) == [2, 3]
    assert shown.finding(audit, "t1") == f"t1 breaks 1 statement: switch off. {audit.agreement()}"


# What is kept and shown


def test_what_is_kept_gives_every_answer_back():
    table = compact.outcomes(history())
    packed = compact.pack(table)
    records.check_json(packed)
    columns = list(table.columns)
    back = compact.unpack(packed)
    assert back.sort_values(columns, ignore_index=True).equals(table.sort_values(columns, ignore_index=True))
    assert {len(signs) for signs in packed["answers"].values()} == {len(packed["questions"])}
    assert list(back[(back["tree"] == "t3") & (back["settings"] == "")]["outcome"]) == [compact.NO_ANSWER] * 4 + [
        "refused"
    ]


def test_a_tree_that_was_asked_less_has_gaps():
    rows = [one for one in history() if one["tree"] != "t2" or one["switch"] == "1"]
    assert len(compact.unpack(compact.pack(compact.outcomes(rows)))) == len(rows)


def test_the_default_over_time_is_told_in_runs():
    told = shown.default_over_time(compact.outcomes(history()))
    assert told == ("gfx942 with VLLM_ROCM_USE_AITER=1: ROCM_AITER_FA in t1, ROCM_ATTN in t2, no answer in t3")


def test_what_began_and_ended_among_the_trees_is_told():
    chosen = zip("abcde", (ROCM, FA, ROCM, FA, ROCM), strict=True)
    rows = [row(picked(backend), tree=tree, switch="1") for tree, backend in chosen]
    assert shown.moved(statements.judge(rows)) == [
        "Newly broken in c documented default (until d); in e documented default.",
        "Mended in b documented default.",
    ]
    assert shown.moved(statements.judge(rows[:1])) == []


def test_the_drill_down_has_what_contradicts_first_and_vllms_own_reasons():
    rows = [one for one in history() if one["tree"] == "t2"]
    table = shown.drill_down(rows, statements.judge(rows))
    assert list(table["contradicts"]) == ["documented default", "–", "–", "–"]
    assert table["answer"][0] == "ROCM_ATTN, before ROCM_AITER_FA"
    assert table["where"][0] == "on gfx942 and gfx950; AITER present; switch 1; 2 cells"
    assert "refused: ValueError: head size 72 is not for …" in set(table["answer"])
    listed = refused(f"{FA} is not valid. Reason: ['head_size not supported', 'dtype not supported']")
    (line,) = shown.drill_down([row(listed, FA)], []).itertuples()
    assert line.answer == "refused: head_size not supported, dtype not supported"


def test_changes_are_those_of_selections_and_of_what_is_said_of_aiter():
    trapped = [TRAP | {"module": "vllm.b"}]
    rows = [row(picked(FA, available=False, unbound=trapped), FA, tree="a"), row(picked(ROCM), tree="a")]
    rows += [row(imported(FA, "backend module", available=True, unbound=[]), FA, tree="b"), row(picked(FA), tree="b")]
    table = shown.changes(rows, "a", "b")
    assert [tuple(line[:3]) for line in table.itertuples(index=False)] == [
        ("chosen, asked for auto", ROCM, FA),
        ("AITER is available", "no", "yes"),
        ("AITER is imported", "no", "yes"),
        ("builtins in place of names", "aiter", "none"),
    ]
    assert shown.changed(rows, "a", "b") == "1 of 2 questions put to a and b are answered by another selection"
    assert list(shown.changes(rows, "a", "c").columns) == ["what", "a", "c", "where"]


def test_a_long_command_is_wrapped_and_stays_one():
    judged = statements.judge(
        [row(picked(ROCM), switch="1", layer=Layer(dtype="bfloat16", block_size=None)), *history()]
    )
    commands = re.findall(r"```\n(.*?)```", shown.told(judged), re.S)
    assert all(len(line) < 100 for command in commands for line in command.splitlines())
    whole = shlex.split(max(commands, key=len).replace("\\\n", " "))
    assert (whole[:4], whole.count("--tree")) == (["python", "-m", "aiterlab", "audit"], 1)


def test_findings_are_told_with_one_command_each():
    judged = [one for one in statements.judge(history()) if one.tree == "t2"]
    text = shown.told(judged)
    assert text.count("```") == 2
    assert "  python -m aiterlab audit --tree t2 --arch gfx942" in text
    assert shown.told([one for one in judged if one.verdict == "holds"]) == "No statement is broken."
    silent = shown.told(statements.judge([row(unanswered("gone"), tree="t3")]))
    assert silent.startswith("No answer on **explicit choice, availability") and silent.endswith("cell: gone.")
    assert shown.headline(judged, "t2") == "1 of 11 statements are broken in t2"
    assert shown.headline(statements.judge(history()), "t1") == (
        "2 of 11 statements are broken in at least one of 3 trees, 1 in t1"
    )
    records.check_json([compact.found(judged), compact.verdicts(judged)])


# The detector beside the probes

SOURCE = """
from vllm.platforms import current_platform
from vllm._aiter_ops import rocm_aiter_ops

if rocm_aiter_ops.is_enabled():
    import aiter


def forward(q):
    return aiter.flash_attn_varlen_func(q)
"""


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv(paths.CACHE_VARIABLE, str(tmp_path / "cache"))
    file = tmp_path / "vllm" / "v1" / "attention" / "backends" / "rocm_aiter_fa.py"
    file.parent.mkdir(parents=True)
    file.write_text(SOURCE)
    (tmp_path / "vllm" / "__init__.py").touch()
    return tmp_path / "vllm"


def test_the_detector_reads_the_same_files_once(source, tmp_path, monkeypatch):
    tree = trees.Tree("one", folder=source.parent, source=source, fingerprint="f", origin="")
    (first,) = detector.scan([tree], workers=1)
    (kept,) = (tmp_path / "cache" / "scans").rglob("*.json")
    (source / "v1" / "attention" / "backends" / "rocm_aiter_fa.py").write_text("")
    assert detector.scan([tree], workers=1) == [first], "a tree is its fingerprint"
    kept.write_text(kept.read_text()[:40])
    (again,) = detector.scan([tree], workers=1)
    assert (first.files, len(first.found), again.found) == (again.files, 1, ()), "what is cut off is read anew"
    (source / "stub.pyi").write_text("")
    (other,) = detector.scan([tree], workers=1)
    assert other.files == again.files + 1
    kept.unlink()
    monkeypatch.setattr(detector.sys, "version", "another parser")
    assert detector.scan([tree], workers=1)[0].found == ()


def test_the_detector_reads_equal_trees_once_and_the_probes_stand_beside_it(source):
    tree = trees.Tree("one", folder=source.parent, source=source, fingerprint="f", origin="")
    other = trees.Tree("laid over", folder=source.parent, source=source, fingerprint="f", origin="")
    (scanned,) = detector.scan([tree, other], workers=1)
    assert scanned.trees == ("one", "laid over")
    counted = detector.counts([scanned])
    assert (list(counted["tree"]), list(counted["builtin-stand-in"])) == (["one and laid over"], [1])
    module = "vllm.v1.attention.backends.rocm_aiter_fa"
    unbound = TRAP | {"module": module, "file": "vllm/v1/attention/backends/rocm_aiter_fa.py"}
    chose = {"backend_class": f"{module}.Backend"}
    rows = [
        row(picked(FA, unbound=[unbound], **chose), FA, tree="one"),
        row(picked(FA, unbound=[], **chose), FA, tree="one", switch="1"),
        row(crashed("KeyError", "x"), FA, tree="one", switch="0"),
        row(picked(ROCM, unbound=[], backend_class="vllm.b.Backend"), tree="one"),
    ]
    (line,) = detector.beside([scanned], rows, [], "elsewhere").itertuples()
    assert line.finding.startswith("vllm/v1/attention/backends/rocm_aiter_fa.py:6: `aiter`")
    assert line._4 == "not bound in 1 of 2 cells that chose this backend"
    (line,) = detector.beside([scanned], rows[1:], [], "elsewhere").itertuples()
    assert line._4 == "bound in 1 cell that chose this backend"
    (line,) = detector.beside([scanned], [], [], "elsewhere").itertuples()
    assert line._4 == "do not speak to it"
