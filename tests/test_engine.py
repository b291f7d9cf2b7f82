# SPDX-License-Identifier: Apache-2.0
"""aiterlab.spec_decode.engine, worker, processes: real vLLM engines in processes of their own, and their ends."""

import json
import os
import resource
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from aiterlab.spec_decode import engine, models, processes, repairs, worker
from aiterlab.spec_decode.engine import Engine, EngineError, EngineSpec, Request, alive

SMALL = {"max_model_len": 192, "max_num_seqs": 4, "max_num_batched_tokens": 192, "kv_cache_bytes": 1 << 25}
K = 3
PROMPTS = [
    Request("code", "code", text="def add(a, b):\n    return"),
    Request("sum", "arithmetic", text="12 + 30 = "),
    Request("ids", "code", token_ids=tuple(range(5, 45))),
]


MANY = [Request(str(n), "code", token_ids=tuple(range(5, 45))) for n in range(100)]


def vanilla(name="vanilla", **changes):
    return EngineSpec(name, str(models.bundled()["vanilla"].target), **SMALL | changes)


def eagle3(name="eagle3", **changes):
    pair = models.bundled()["eagle3"]
    return EngineSpec(name, str(pair.target), "eagle3", str(pair.draft), K, **SMALL | changes)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    with alive([vanilla(), eagle3()], tmp_path_factory.mktemp("logs")) as engines:
        yield engines


def one_line(error):
    assert "\n" not in str(error)
    return str(error)


@pytest.mark.slow
def test_an_engine_says_what_it_is(fleet):
    facts = fleet["eagle3"].facts
    assert facts.target_backends and facts.draft_backends
    assert fleet["vanilla"].facts.draft_backends == ()
    assert facts.max_model_len == SMALL["max_model_len"]
    assert facts.kv_cache_tokens >= SMALL["max_model_len"]
    assert facts.start_s >= facts.load_s + facts.warm_up_s > 0
    assert facts.vllm_version
    assert facts.dtype == ("bfloat16" if processes.has_gpu() else "float32")


@pytest.mark.slow
def test_vanilla_gives_one_token_per_decode_step(fleet):
    made = fleet["vanilla"].generate(PROMPTS[2:], max_tokens=8, ignore_eos=True)
    (output,) = made.outputs
    assert len(output.token_ids) == 8 and output.finish_reason == "length"
    assert made.decode_steps == len(made.steps_ms) == 7  # the first token comes with the prompt
    assert made.accepted_lengths == (1,) * 7
    assert made.steps_sequences == (1,) * 7
    assert made.counters.acceptance_length is None
    assert made.wall_s >= made.prefill_s + made.decode_s > 0
    assert made.decode_s == pytest.approx(sum(made.steps_ms) / 1000)
    assert made.components is None


@pytest.mark.slow
def test_steps_with_a_prompt_are_not_decode_steps(fleet):
    # Five requests for four places: the fifth prompt comes in while others decode.
    requests = [Request(str(n), "code", token_ids=tuple(range(5, 25 + n))) for n in range(5)]
    made = fleet["vanilla"].generate(requests, max_tokens=6, ignore_eos=True)
    assert made.decode_steps == 5 + 5
    assert set(made.steps_sequences) == {4, 1}


@pytest.mark.slow
def test_counters_and_emitted_tokens_agree(fleet):
    made = fleet["eagle3"].generate(PROMPTS, max_tokens=24, ignore_eos=True)
    counters, emitted = made.counters, sum(made.accepted_lengths)
    assert counters.draft_tokens == K * counters.drafts > 0
    assert len(counters.accepted_per_position) == K
    assert sum(counters.accepted_per_position) == counters.accepted_tokens
    assert made.tokens == 24 * len(PROMPTS) == emitted + len(PROMPTS)
    # What was verified and what requests got differ by what max_tokens cut off.
    verified = counters.drafts + counters.accepted_tokens + made.undrafted
    assert 0 <= verified - emitted <= K * len(PROMPTS)
    assert max(made.accepted_lengths) <= K + 1
    again = fleet["eagle3"].generate(PROMPTS, max_tokens=24, ignore_eos=True)
    assert again.counters == counters  # a difference over one call, not a total
    assert [output.token_ids for output in again.outputs] == [output.token_ids for output in made.outputs]


@pytest.mark.slow
def test_a_breakdown_names_the_parts_of_a_step(fleet):
    made = fleet["eagle3"].generate(PROMPTS[2:], max_tokens=12, ignore_eos=True, breakdown=True)
    assert {"draft_ms", "verify_ms", "sample_ms", "host_ms"} <= set(made.components)
    assert all(value > 0 for value in made.components.values())


@pytest.mark.slow
def test_logprobs_name_the_likeliest_tokens(fleet):
    (output,) = fleet["vanilla"].generate(PROMPTS[2:], max_tokens=4, logprobs=3, ignore_eos=True).outputs
    assert len(output.top_logprobs) == 4
    for chosen, likeliest in zip(output.token_ids, output.top_logprobs, strict=True):
        assert likeliest[0][0] == chosen  # greedy
        assert [p for _, p in likeliest] == sorted((p for _, p in likeliest), reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vanilla", "eagle3"])
def test_seeds_make_samples_and_repeat_them(fleet, name):
    # On vLLM 0.32.0's CPU engine this fails for a draft without `repairs`: it verifies with uninitialised memory.
    def sample(seed):
        options = {"max_tokens": 12, "temperature": 1.0, "samples": 2, "ignore_eos": True}
        outputs = fleet[name].generate(PROMPTS[:2], seed=seed, **options).outputs
        assert [(o.request_id, o.sample) for o in outputs] == [("code", 0), ("code", 1), ("sum", 0), ("sum", 1)]
        return [o.token_ids for o in outputs]

    first = sample(7)
    assert first == sample(7)
    assert len(set(first)) > 1
    assert first != sample(1007)


@pytest.mark.slow
def test_temperatures_reach_the_positions_they_are_for(fleet):
    assert fleet["eagle3"].call("aiterlab.spec_decode.repairs:expanded") == [3.0, 5.0, 5.0]
    assert set(fleet["eagle3"].facts.repairs) <= {repairs.EXPAND}


@pytest.mark.slow
def test_a_refused_request_leaves_the_engine_as_it_was(fleet):
    with pytest.raises(EngineError, match=r"request long: .*max_model_len") as refused:
        fleet["vanilla"].generate([*PROMPTS, Request("long", "code", token_ids=(5,) * 500)], max_tokens=4)
    one_line(refused.value)
    made = fleet["vanilla"].generate(PROMPTS[2:], max_tokens=4, ignore_eos=True)
    assert made.tokens == 4 and set(made.steps_sequences) == {1}  # nothing of the refused call is left


@pytest.mark.slow
def test_an_idle_engine_burns_no_time(fleet):
    child = psutil.Process(fleet["eagle3"].pid)
    burnt = []
    for _ in range(3):  # where others work, a tick that is theirs is now and then counted as its own
        before = sum(child.cpu_times()[:2])
        time.sleep(1)
        burnt.append(round(sum(child.cpu_times()[:2]) - before, 3))
    assert min(burnt) <= 0.02, burnt  # two ticks of the kernel's clock


@pytest.mark.slow
def test_a_function_can_be_called_with_the_living_engine(fleet):
    assert fleet["vanilla"].call("operator:truth") is True


@pytest.mark.slow
def test_an_engine_killed_while_it_generates(tmp_path):
    with Engine(vanilla("killed"), tmp_path) as doomed:
        doomed.wait_ready()
        pid, folder = doomed.pid, doomed._process.folder
        assert folder.is_dir()
        threading.Timer(0.2, os.kill, (pid, signal.SIGKILL)).start()
        with pytest.raises(EngineError, match="killed by SIGKILL") as ended:
            doomed.generate(MANY, max_tokens=150, ignore_eos=True)
        assert "killed: the engine ended during generate" in one_line(ended.value)
        assert ended.value.log_tail
        assert not processes.members(pid) and not folder.exists()
        with pytest.raises(EngineError, match="was closed"):
            doomed.generate(PROMPTS, max_tokens=1)


@pytest.mark.slow
def test_no_answer_in_time_ends_the_engine(tmp_path):
    with Engine(vanilla("slow"), tmp_path) as slow:
        slow.wait_ready()
        pid = slow.pid
        with pytest.raises(EngineError, match=r"no answer to generate within 0.2 s.*timeout_s") as late:
            slow.generate(MANY, max_tokens=150, ignore_eos=True, timeout_s=0.2)
        one_line(late.value)
        assert not processes.members(pid)


@pytest.mark.slow
def test_a_full_disk_is_one_line(tmp_path):
    with Engine(vanilla("full"), tmp_path) as full:
        pid = full.pid
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, 0))  # from now on, no file of this child may grow
        with pytest.raises(EngineError, match="make space there") as ended:
            full.wait_ready()
        one_line(ended.value)
        assert not processes.members(pid)


@pytest.mark.slow
def test_memory_that_is_not_there_is_one_line(tmp_path):
    with Engine(vanilla("huge", kv_cache_bytes=1 << 45), tmp_path) as huge:
        pid = huge.pid
        with pytest.raises(EngineError, match="lower kv_cache_bytes") as ended:
            huge.wait_ready()
        one_line(ended.value)
        assert not processes.members(pid)


@pytest.mark.slow
@pytest.mark.parametrize("exception", [KeyboardInterrupt, ValueError])
def test_an_interruption_ends_all_engines(tmp_path, exception):
    pids = []

    def interrupt(done, total, elapsed_s):
        pids.extend(one.pid for one in psutil.Process().children(recursive=True))
        raise exception

    before = {one.pid for one in psutil.Process().children(recursive=True)}
    with pytest.raises(exception), alive([vanilla("a"), vanilla("b")], tmp_path, progress=interrupt):
        pass
    started = set(pids) - before
    assert len(started) >= 2
    assert not [pid for pid in started if processes.members(pid)]


def test_a_wrong_path_starts_nothing(tmp_path):
    before = psutil.Process().children(recursive=True)
    wrong = EngineSpec("wrong", str(tmp_path / "nowhere"), **SMALL)
    refusal = pytest.raises(EngineError, match=r"wrong: .*nowhere: no such folder")
    with refusal as refused, alive([vanilla(), wrong], tmp_path):
        pass
    one_line(refused.value)
    assert psutil.Process().children(recursive=True) == before


def test_a_draft_of_another_target_starts_nothing(tmp_path):
    pair = models.bundled()["eagle3"]
    shutil.copytree(pair.draft, tmp_path / "draft")
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    (tmp_path / "draft" / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 1}))
    with pytest.raises(EngineError, match="does not fit its target: vocabulary") as refused:
        Engine(EngineSpec("misfit", str(pair.target), "eagle3", str(tmp_path / "draft"), K), tmp_path / "logs")
    one_line(refused.value)


def test_a_log_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match="choose a folder that can be written") as refused:
        Engine(vanilla("log", environment=(("A", "b"),)), tmp_path / "file" / "logs")
    one_line(refused.value)


CHILD = """
import socket, subprocess, sys, time
from aiterlab.spec_decode import processes
channel = socket.socket(fileno=int(sys.argv[1]))
processes.end_with(channel)
subprocess.Popen(["sleep", "60"])
channel.send(b"up")
time.sleep(60)
"""


def test_a_group_dies_with_its_parent(run_python):
    """A parent that is gone from one moment to the next ends nobody; its child has to notice."""
    text = run_python(
        """
        import os, socket, sys
        from pathlib import Path
        from aiterlab.spec_decode import processes

        ours, theirs = socket.socketpair()
        command = [sys.executable, "-c", sys.argv[1], str(theirs.fileno())]
        process = processes.launch(command, Path("log"), processes.base_environment(), [theirs.fileno()])
        theirs.close()
        assert ours.recv(2) == b"up"
        print(process.pid, process.folder, len(processes.members(process.pid)), flush=True)
        os._exit(0)
        """,
        CHILD,
    )
    pid, folder, members = text.split()
    assert int(members) == 2
    deadline = time.monotonic() + 5
    while (processes.members(int(pid)) or Path(folder).exists()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not processes.members(int(pid)) and not Path(folder).exists()


def test_other_people_s_switches_do_not_reach_an_engine(monkeypatch):
    monkeypatch.setenv("VLLM_ROCM_USE_AITER", "1")
    monkeypatch.setenv("AITERLAB_MACHINE", "x")
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/somewhere")
    environment = processes.engine_environment()
    assert "VLLM_ROCM_USE_AITER" not in environment and "AITERLAB_MACHINE" not in environment
    assert environment["VLLM_CACHE_ROOT"] == "/somewhere"
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


def spec(**changes):
    return EngineSpec(**{"name": "x", "target": "org/target"} | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "medusa", "draft_tokens": 1},
        {"draft_tokens": 1},
        {"method": "eagle", "draft": "org/draft"},
        {"method": "eagle", "draft": "org/draft", "draft_tokens": 2, "synthetic_acceptance": (0.5,)},
    ],
)
def test_a_specification_that_contradicts_itself(changes):
    with pytest.raises(ValueError, match="x: "):
        spec(**changes)


def test_a_specification_survives_json():
    one = spec(environment=(("A", "b"),), hooks=("m:f",), cudagraph_batch_sizes=(1, 8))
    assert EngineSpec.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_engines_need_names_of_their_own(tmp_path):
    with pytest.raises(ValueError, match="several called x"), alive([spec(), spec()], tmp_path):
        pass


def test_a_request_is_text_or_token_ids():
    with pytest.raises(ValueError, match="either text or token_ids"):
        Request("r", "code")
    with pytest.raises(ValueError, match="either text or token_ids"):
        Request("r", "code", text="a", token_ids=(1,))


def test_requests_need_ids_of_their_own():
    nobody = Engine.__new__(Engine)  # refused before anybody is asked
    with pytest.raises(ValueError, match="several called code"):
        nobody.generate([PROMPTS[0], PROMPTS[0]], max_tokens=1)


def test_a_child_finds_this_code_from_any_folder(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "somewhere")
    searched = processes.base_environment()["PYTHONPATH"].split(os.pathsep)
    assert searched == [str(Path(engine.__file__).parents[2]), str(Path("somewhere").absolute())]


def test_a_specification_becomes_vllm_s_arguments(monkeypatch):
    monkeypatch.setattr(processes, "has_gpu", lambda: True)
    arguments = engine.llm_arguments(
        spec(
            method="eagle3",
            draft="org/draft",
            draft_tokens=3,
            backend=engine.SUITE_PAGED,
            cudagraph_batch_sizes=(1, 8),
            synthetic_acceptance=(0.7, 0.5, 0.25),
        )
    )
    assert arguments["attention_backend"] == "CUSTOM"
    assert arguments["enforce_eager"] is False
    assert arguments["compilation_config"] == {"cudagraph_capture_sizes": [1, 4, 8, 32]}
    assert arguments["speculative_config"] == {
        "method": "eagle3",
        "model": "org/draft",
        "num_speculative_tokens": 3,
        "rejection_sample_method": "synthetic",
        "synthetic_acceptance_rates": [0.7, 0.5, 0.25],
    }
    assert arguments["dtype"] == "auto"
    monkeypatch.setattr(processes, "has_gpu", lambda: False)
    assert engine.llm_arguments(spec())["enforce_eager"] is True
    assert engine.llm_arguments(spec())["dtype"] == "float32"
    assert engine.llm_arguments(spec(dtype="bfloat16"))["dtype"] == "bfloat16"
    ngram = engine.llm_arguments(spec(method="ngram", draft_tokens=2))["speculative_config"]
    assert ngram == {"method": "ngram", "num_speculative_tokens": 2, **engine.PROMPT_LOOKUP}
    assert "speculative_config" not in engine.llm_arguments(spec())


@pytest.mark.parametrize(
    ("scheduled", "drafted", "outputs", "decode"),
    [
        ({"a": 1}, {}, {"a": 3}, True),
        ({"a": 4, "b": 1}, {"a": [1, 2, 3]}, {"a": 3, "b": 1}, True),
        ({"a": 4}, {}, {"a": 0}, False),  # a prompt
        ({"a": 1}, {}, {"a": 0}, False),  # a prompt of one token
        ({"a": 1, "b": 9}, {}, {"a": 2, "b": 0}, False),  # a prompt beside a decoding sequence
        ({"a": 9}, {}, {"a": 3}, False),  # preempted, and computed again
        ({}, {}, {}, False),
    ],
)
def test_what_the_scheduler_decided_says_what_a_step_is(scheduled, drafted, outputs, decode):
    scheduler = SimpleNamespace(requests={k: SimpleNamespace(num_output_tokens=v) for k, v in outputs.items()})
    output = SimpleNamespace(num_scheduled_tokens=scheduled, scheduled_spec_decode_tokens=drafted)
    step = worker._Step(scheduler, output)
    assert step.decode is decode
    assert step.sequences == len(scheduled)
    assert step.undrafted == len(scheduled) - len(drafted)


def test_errors_become_one_line_with_a_mend():
    assert worker.one_line(OSError(28, "No space left on device")) == "OSError: [Errno 28] No space left on device"
    assert worker.one_line(ValueError("\n  first\nsecond")) == "first"
    assert "make space" in engine.mend_for("OSError: [Errno 28] No space left on device")
    assert "kv_cache_bytes" in engine.mend_for("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB")
    assert engine.mend_for("something else") == ""
