# SPDX-License-Identifier: Apache-2.0
"""Several ranks give the tokens of one, leave nothing behind, and say in one line what they cannot do."""

import os
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from aiterlab.records import check_json
from aiterlab.spec_decode import models, parallel
from aiterlab.spec_decode.engine import EngineError, EngineSpec, Request, alive
from aiterlab.spec_decode.metrics import Counters

PROMPTS = ["def main():\n    return", "import os\n\nfor name in", "The quick brown fox", "12+34="]


@pytest.fixture(scope="module")
def spec():
    """A small eagle engine on the bundled pair, in 32 bits: another order of summation then turns no token around."""
    pair = models.bundled()["eagle"]
    small = {"max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 128, "kv_cache_bytes": 1 << 25}
    return EngineSpec("eagle K=2", str(pair.target), "eagle", str(pair.draft), 2, dtype="float32", **small)


REQUESTS = [Request(f"p{number}", "code", text=text) for number, text in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def one_rank(spec, tmp_path_factory):
    vanilla = replace(spec, name="vanilla", method="vanilla", draft=None, draft_tokens=0)
    with alive([vanilla], tmp_path_factory.mktemp("logs")) as engines:
        yield engines["vanilla"].generate(REQUESTS, max_tokens=16, ignore_eos=True, logprobs=5)


def shared_memory() -> set[Path]:
    """Segments and semaphores that there are; of others too, so that these tests want to be alone."""
    return {path for kind in ("psm_*", "sem.*", "vllm_dist_*") for path in Path("/dev/shm").glob(kind)}


def children() -> set[int]:
    """Processes of this one, but for the one that holds vLLM's imports."""
    mine = psutil.Process().children(recursive=True)
    return {p.pid for p in mine if p.status() != psutil.STATUS_ZOMBIE and "preload" not in " ".join(p.cmdline())}


@pytest.mark.slow
@pytest.mark.parametrize(("tensor", "data"), [(2, 1), (1, 2), (2, 2)], ids=["tensor parallel", "data parallel", "both"])
def test_two_ranks_give_the_tokens_of_one(spec, one_rank, tmp_path, tensor, data):
    before, shared = children(), shared_memory()
    ranks = parallel.run(spec, REQUESTS, max_tokens=16, log_dir=tmp_path, tensor=tensor, data=data)
    table = parallel.compare(one_rank, ranks, dtype="float32")
    assert len(table) == data
    assert list(table["identical"]) == [len(PROMPTS)] * data, list(table["verdict"])
    assert set(table["tokens"]) == {16 * len(PROMPTS)}
    assert all(mine.counters.drafts > 0 for mine in ranks), "the draft was not used"
    assert {address for mine in ranks for address in mine.addresses} == {"127.0.0.1"}
    assert children() <= before
    assert shared_memory() <= shared


@pytest.mark.slow
def test_ranks_that_cannot_start_end_in_one_line(spec, tmp_path):
    before, shared = children(), shared_memory()
    with pytest.raises(EngineError) as error:
        parallel.run(replace(spec, max_model_len=1 << 20), REQUESTS, max_tokens=4, log_dir=tmp_path, data=2)
    assert "\n" not in str(error.value)
    assert children() <= before
    assert shared_memory() <= shared


@pytest.mark.parametrize(("tensor", "data"), [(0, 1), (1, 0)])
def test_no_ranks_are_refused(tmp_path, tensor, data):
    spec = EngineSpec("vanilla", str(tmp_path))
    with pytest.raises(EngineError, match="1 or more of each"):
        parallel.run(spec, [], max_tokens=1, log_dir=tmp_path, tensor=tensor, data=data)


def test_too_few_gpus_are_told_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel.processes, "has_gpu", lambda: True)
    monkeypatch.setattr(parallel.torch.cuda, "device_count", lambda: 2)
    with pytest.raises(EngineError, match="here are 2"):
        parallel.run(EngineSpec("vanilla", str(tmp_path)), [], max_tokens=1, log_dir=tmp_path, tensor=2, data=2)


def test_hooks_that_would_reach_no_rank_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel.processes, "has_gpu", lambda: True)
    spec = EngineSpec("vanilla", str(tmp_path), hooks=("os:getpid",))
    with pytest.raises(EngineError, match="do not reach"):
        parallel.run(spec, [], max_tokens=1, log_dir=tmp_path)


def test_a_rank_with_other_tokens_is_told(one_rank_of_hand):
    right, wrong = one_rank_of_hand
    table = parallel.compare(right, [wrong], dtype="float32")
    assert not table["ok"].any()
    assert list(table["different"]) == [1]
    assert list(table["data_parallel"]) == [2]


def test_what_one_rank_alone_has_is_missing_in_the_others(one_rank_of_hand):
    right, other = one_rank_of_hand
    near = replace(right.outputs[0], top_logprobs=(((5, -0.01),), ((6, -0.01),), ((7, -0.7), (99, -0.7001))))
    table = parallel.compare(replace(right, outputs=(near,)), [other, replace(other, outputs=(near,))])
    rows = table.to_dict("records")
    assert [row["near_ties"] for row in rows] == [1, 0] and rows[0]["widest_near_tie_gap"] == pytest.approx(1e-4)
    assert rows[1]["widest_near_tie_gap"] is None
    check_json(rows)


@pytest.fixture
def one_rank_of_hand():
    """An engine's answer written by hand, and a rank that differs in its last token by far more than a near-tie."""
    from aiterlab.spec_decode.engine import Generation, Output

    likely = tuple(((token, -0.01), (99, -9.0)) for token in (5, 6, 7))
    output = Output("p0", 0, (5, 6, 7), None, "length", likely, (1, 1))
    right = Generation("vanilla", (output,), Counters(), 1.0, 0.5, 0.5, 2, (1.0, 1.0), (1, 1), 0, None)
    other = replace(output, token_ids=(5, 6, 99), top_logprobs=None)
    return right, parallel.Ranks("eagle, rank 1", 1, 2, 1, (other,), Counters(), 1.0, 1.0, ())


def test_the_listening_addresses_of_this_process_are_found():
    import socket

    with socket.create_server(("127.0.0.1", 0)):
        assert "127.0.0.1" in parallel.addresses()
    assert os.getpid()
