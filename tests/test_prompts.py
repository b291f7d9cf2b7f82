# SPDX-License-Identifier: Apache-2.0
"""Prompts: the same for the same arguments, and only from files that nobody changed."""

import hashlib
import json

import pytest

from aiterlab import paths
from aiterlab.spec_decode import prompts


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A folder like models/ with twelve held-out prompts of one task."""
    folder = tmp_path / "models"
    (folder / "heldout").mkdir(parents=True)
    lines = [
        {"id": f"code-{i}", "task": "code", "text": f"def f{i}(x):\n    ", "reference": "return x", "source": "own"}
        for i in range(12)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    (folder / "heldout" / "code.jsonl").write_bytes(text)
    files = {"heldout/code.jsonl": {"sha256": hashlib.sha256(text).hexdigest(), "bytes": len(text)}}
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    monkeypatch.setattr(paths, "models_dir", lambda: folder)
    return folder


def test_held_out_prompts_come_as_requests(models):
    requests = prompts.load("code")
    assert [one.id for one in requests] == [f"code-{i}" for i in range(12)]
    assert requests[3].text == "def f3(x):\n    " and requests[3].task == "code" and requests[3].token_ids is None
    assert prompts.held_out("code")[0].reference == "return x"
    assert prompts.held_out("code")[0].licence is None


def test_a_choice_is_the_same_again_and_another_for_another_seed(models):
    ids = [one.id for one in prompts.load("code", 5)]
    assert ids == [one.id for one in prompts.load("code", 5)] and len(set(ids)) == 5
    assert ids == sorted(ids, key=lambda name: int(name.removeprefix("code-")))
    assert ids != [one.id for one in prompts.load("code", 5, seed=1)]
    assert ids != [f"code-{i}" for i in range(5)]


def test_a_changed_file_is_refused_in_one_line(models):
    with open(models / "heldout" / "code.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(prompts.PromptError, match=r"code\.jsonl: was changed \(SHA-256 .{12}…, the manifest") as raised:
        prompts.load("code")
    assert "\n" not in str(raised.value)


def test_what_is_missing_is_named(models):
    with pytest.raises(prompts.PromptError, match="poems: no such task; there are code, prose, arithmetic"):
        prompts.load("poems")
    with pytest.raises(prompts.PromptError, match=r"names no SHA-256 for heldout/prose\.jsonl"):
        prompts.load("prose")
    with pytest.raises(prompts.PromptError, match="13 prompts asked for, but code has 1 to 12"):
        prompts.load("code", 13)
    with pytest.raises(prompts.PromptError, match="0 prompts asked for"):
        prompts.load("code", 0)
    (models / "manifest.json").write_text("{")
    with pytest.raises(prompts.PromptError, match=r"manifest\.json: is not JSON"):
        prompts.load("code")
    (models / "manifest.json").unlink()
    with pytest.raises(prompts.PromptError, match=r"manifest\.json: No such file"):
        prompts.load("code")


def test_a_file_of_ones_own_is_plain_text_or_json_lines(tmp_path):
    plain = tmp_path / "mine.txt"
    plain.write_text("First.\n\n  Second, indented.\n")
    assert [(one.id, one.task, one.text) for one in prompts.load("mine", path=plain)] == [
        ("mine-1", "mine", "First."),
        ("mine-3", "mine", "  Second, indented."),
    ]
    lines = tmp_path / "mine.jsonl"
    lines.write_text('{"text": "a"}\n{"text": "b\\nc", "id": "x", "task": "prose"}\n')
    assert [(one.id, one.task, one.text) for one in prompts.load("mine", path=lines)] == [
        ("mine-1", "mine", "a"),
        ("x", "prose", "b\nc"),
    ]


BROKEN = {
    "no JSON": ("a.jsonl", b'{"text": "a"}\n{"text"\n', r"a\.jsonl, line 2: is not JSON"),
    "no text": ("a.jsonl", b'{"prompt": "a"}', r'a\.jsonl, line 1: needs an object with "text"'),
    "no object": ("a.jsonl", b'"text"', r"line 1: needs an object"),
    "the same id twice": ("a.jsonl", b'{"text": "a", "id": 1}\n{"text": "b", "id": 1}', "two prompts have the id 1"),
    "empty": ("a.txt", b"\n \n", r"a\.txt: holds no prompt"),
    "not UTF-8": ("a.txt", b"ab\xff", r"is not UTF-8 text \(byte 2\)"),
    "not there": ("a.txt", None, r"a\.txt: No such file"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_file_is_told_in_one_line(tmp_path, how):
    name, data, message = BROKEN[how]
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(prompts.PromptError, match=message) as raised:
        prompts.load("mine", path=tmp_path / name)
    assert "\n" not in str(raised.value)


def test_long_prompts_keep_their_first_tokens(models, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (tmp_path / "model").mkdir()
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "mine.txt").write_text("a b a b\nb\n")
    options = {"path": tmp_path / "mine.txt", "tokenizer": tmp_path / "model"}
    requests = prompts.load("mine", max_prompt_tokens=3, **options)
    assert [one.token_ids for one in requests] == [(0, 1, 0), (1,)]
    assert requests[0].text is None
    with pytest.raises(prompts.PromptError, match="a prompt has at least one token"):
        prompts.load("mine", max_prompt_tokens=0, **options)
    with pytest.raises(prompts.PromptError, match=r"target: has no tokenizer\.json"):
        prompts.load("code", max_prompt_tokens=3)
