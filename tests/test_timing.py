# SPDX-License-Identifier: Apache-2.0
"""Timing: no number without a check, one sample of all in each round, and an interruption that loses nothing."""

import math
from types import SimpleNamespace

import pytest
import torch

from aiterlab.attention.workloads import Workload
from aiterlab.measure import timing
from aiterlab.measure.checks import Check
from aiterlab.measure.timing import Stopwatch, Timing

OK = Check("ok", "within the limit of every row")
WORKLOAD = Workload("w", "decode", ((3, 1),), heads=2, kv_heads=1, head_size=16, dtype="float32")


class Recorder:
    """Implementations that write down who was called, and on which inputs."""

    def __init__(self) -> None:
        self.called: list[str] = []
        self.inputs: list = []

    def implementation(self, name: str, stop_after: int | None = None, **fields):
        def prepare(inputs, out):
            self.inputs.append(inputs)
            which = len(self.inputs)

            def launch():
                self.called.append(f"{name}{which}")
                if stop_after is not None and len(self.called) > stop_after:
                    raise KeyboardInterrupt
                out.fill_(1)

            return launch

        return SimpleNamespace(provider="test", name=name, prepare=prepare, timed=True, note="", **fields)


def test_what_was_not_right_gets_no_time_but_the_reason():
    recorder = Recorder()
    reference = recorder.implementation("reference")
    reference.timed, reference.note = False, "float64"

    def broken(inputs, out):
        raise RuntimeError("cannot be captured\nand more")

    unable = SimpleNamespace(provider="test", name="unable", prepare=broken, timed=True, note="")
    wrong = Check("wrong", "a row misses")
    timings = Stopwatch("cpu").measure(
        WORKLOAD,
        [(recorder.implementation("a"), wrong), (reference, OK), (unable, OK), (recorder.implementation("b"), OK)],
    )
    assert [one.reason for one in timings] == [
        "not timed, its check says wrong: a row misses",
        "not timed: float64",
        "not timed, RuntimeError: cannot be captured",
        "",
    ]
    assert [len(one.samples_us) for one in timings] == [0, 0, 0, 3]
    assert timings[0].median_us is timings[0].p20_us is timings[0].row()["p80_us"] is None
    assert not any(name.startswith("a") for name in recorder.called)


def test_each_round_takes_one_sample_of_all_in_an_order_that_turns_and_over_other_inputs():
    recorder = Recorder()
    checked = [(recorder.implementation(name), OK) for name in "abc"]
    timings = Stopwatch("cpu", rounds=4, input_sets=2).measure(WORKLOAD, checked)
    # a prepares inputs 1 and 2, b 3 and 4, c 5 and 6
    assert recorder.called == ["a1", "b3", "c5", "b4", "c6", "a2", "c5", "a1", "b3", "a2", "b4", "c6"]
    assert all(len(one.samples_us) == 4 and min(one.samples_us) > 0 for one in timings)
    assert recorder.inputs[0] is recorder.inputs[2]
    assert not torch.equal(recorder.inputs[0].q, recorder.inputs[1].q)


def test_an_interruption_keeps_every_sample_that_was_taken():
    recorder, stopwatch = Recorder(), Stopwatch("cpu", rounds=10)
    stopwatch.measure(WORKLOAD, [(recorder.implementation("a"), OK)])
    recorder.called.clear()
    with pytest.raises(KeyboardInterrupt):
        stopwatch.measure(WORKLOAD, [(recorder.implementation(name, stop_after=5), OK) for name in "bc"])
    assert [(one.implementation, len(one.samples_us)) for one in stopwatch.timings] == [("a", 10), ("b", 3), ("c", 2)]
    with pytest.raises(KeyboardInterrupt):
        stopwatch.measure(WORKLOAD, [(recorder.implementation("d", stop_after=0), OK)])
    assert stopwatch.timings[-1].reason == "interrupted before its first sample"


def test_quantiles_come_from_all_samples():
    one = Timing("w", "p", "i", timing.METHODS["cpu"], tuple(float(n) for n in range(11)), None)
    assert (one.p20_us, one.median_us, one.p80_us) == (2, 5, 8)
    row = one.row()
    assert (row["samples"], row["samples_us"][-1], row["median_us"]) == (11, 10.0, 5.0)
    stopwatch = Stopwatch("cpu")
    stopwatch.timings.append(one)
    assert stopwatch.frame().loc[0, "p80_us"] == 8
    assert stopwatch.overhead_us is None


def test_plain_functions_are_sampled_the_same_way():
    calls = []
    samples = timing.sample({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, "cpu", 3)
    assert "".join(calls) == "abbaab"
    assert {name: len(kept) for name, kept in samples.items()} == {"a": 3, "b": 3}


def test_the_output_of_a_gather_is_keys_and_values():
    gather = Workload("g", "gather", ((3, 0), (18, 0)), heads=2, kv_heads=1, head_size=16, dtype="float16")
    k, v = timing._output(gather.make(0))
    assert k.shape == v.shape == (21, 1, 16) and k.dtype == torch.float16


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.gpu
@needs_gpu
def test_a_replay_takes_what_its_bytes_take_and_the_overhead_is_small():
    source, target = torch.rand(2, 2**28, device="cuda")
    samples = timing.sample({"copy": lambda: target.copy_(source), "nothing": lambda: None}, "cuda", 20)
    median = sorted(samples["copy"])[10]
    assert 2 * source.nbytes / median / 1e6 < 12  # TB/s: nothing is faster today
    assert sorted(samples["nothing"])[10] < 30 < median
    assert 0 < Stopwatch("cuda", rounds=20).overhead_us < 30


@pytest.mark.gpu
@needs_gpu
def test_a_graph_keeps_the_memory_that_it_works_on_and_must_write_its_output():
    class Writes:
        provider, name, timed, note = "test", "writes", True, ""

        def prepare(self, inputs, out):
            scratch = torch.full_like(out, 2.0)  # lives in the launch alone
            return lambda: out.copy_(scratch)

    class Forgets(Writes):
        name = "forgets"

        def prepare(self, inputs, out):
            return lambda: out[:0].fill_(0)

    good, bad = Stopwatch("cuda", rounds=5).measure(WORKLOAD, [(Writes(), OK), (Forgets(), OK)])
    assert len(good.samples_us) == 5 and math.isfinite(good.median_us)
    assert bad.reason == "not timed, RuntimeError: a replay of its graph leaves numbers unwritten"
