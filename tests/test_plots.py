# SPDX-License-Identifier: Apache-2.0
"""Figures of kernels: everything that was asked is in them, and nothing lies over anything else that must be read."""

from itertools import pairwise

import pandas as pd
import pytest
from matplotlib import pyplot as plt

from aiterlab import paths, plots

WORKLOADS = [
    ("decode_1x8k", "decode"),
    ("verify_q4_1x32k", "verify"),
    ("prefill_2x8k", "prefill"),
    ("gather_1x32k", "gather"),
]
MAKERS = [("suite", "paged"), ("suite", "gather+varlen"), ("flash_attn", "fa3"), ("vllm_triton", "unified")]
CEILINGS = {"copy": (4.2, "TB/s"), "read": (4.5, "TB/s"), "matmul_bfloat16": (700.0, "TFLOP/s")}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture
def rated():
    rows = []
    for index, (workload, operation) in enumerate(WORKLOADS):
        for place, (provider, name) in enumerate(MAKERS):
            median = 20.0 * (index + 1) * (place + 1)
            row = {"workload": workload, "operation": operation, "provider": provider, "implementation": name}
            row |= {"median_us": median, "p20_us": 0.9 * median, "p80_us": 1.1 * median}
            row |= {"unit": "TFLOP/s" if operation == "prefill" else "TB/s"}
            rows.append(row | {"rate": (600 if operation == "prefill" else 4) / (place + 1)})
    return pd.DataFrame(rows)


def names_of(ax):
    return [label.get_text() for label in ax.get_yticklabels()]


def texts(figure):
    return [text.get_text() for ax in figure.axes for text in ax.texts]


def test_latency_has_a_line_per_workload_and_a_sign_per_implementation(rated):
    figure = plots.latency(rated, "told")
    (ax,) = figure.axes
    assert sorted(names_of(ax)) == sorted(name for name, _ in WORKLOADS)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "suite paged",
        "suite gather+varlen",
        "flash_attn fa3",
        "vllm_triton unified",
    ]
    assert len(ax.collections) == len(rated) and ax.get_xscale() == "log"
    assert figure._suptitle.get_text() == "told"
    heights = [tick for tick in ax.get_yticks()]
    assert all(b - a >= 1 for a, b in pairwise(sorted(heights)))


def test_throughput_draws_each_ceiling_in_the_panel_of_its_unit(rated):
    figure = plots.throughput(rated, CEILINGS, "told")
    memory, products = figure.axes
    assert names_of(products) == ["prefill_2x8k"] and len(names_of(memory)) == 3
    assert "copy\n4.2" in texts(figure) and "matmul_bfloat16\n700" in texts(figure)
    figure.canvas.draw()
    labels = [text.get_window_extent() for text in memory.texts]
    assert len(labels) == 2 and not labels[0].overlaps(labels[1])
    assert memory.get_xlim()[1] > 4.5  # a ceiling above all points is seen
    interpreted = rated.assign(rate=rated["rate"] / 1e6)
    assert plots.throughput(interpreted, CEILINGS, "told").axes[0].get_xscale() == "log"


def test_two_step_writes_the_factor_beside_each_line():
    row = {"workload": "decode_1x8k", "provider": "suite", "fused": "paged", "fused_us": 10.0, "two_step_us": 25.0}
    table = pd.DataFrame([row | {"ratio": 2.5, "ratio_low": 2.25, "ratio_high": 2.75}])
    assert "2.50 ×  (2.25–2.75)" in texts(plots.two_step(table, "told"))


def test_error_shows_what_is_right_wrong_failed_and_refused():
    def row(outcome, share, dtype="float16"):
        place = {"provider": "suite", "implementation": "paged", "dtype": dtype}
        return place | {"outcome": outcome, "error_over_tolerance": share}

    rows = [row("ok", 0.3), row("ok", 0.0), row("wrong", 2.0), row("failed", None), row("refused", None, "bfloat16")]
    figure = plots.error(pd.DataFrame(rows), "told")
    (ax,) = figure.axes
    assert names_of(ax) == ["suite  paged"] and "2 right, 1 refused" in texts(figure)
    shares = [x for points in ax.collections for x, _ in points.get_offsets()]
    assert len(shares) == 4 and min(shares) >= ax.get_xlim()[0] and max(shares) <= ax.get_xlim()[1]
    assert sum(share > 1 for share in shares) == 2


@pytest.mark.parametrize("draw", [plots.latency, lambda rows, title: plots.throughput(rows, {}, title), plots.two_step])
def test_a_figure_of_nothing_is_its_title(draw):
    figure = draw(pd.DataFrame(), "nothing was timed")
    assert figure._suptitle.get_text() == "nothing was timed" and not figure.axes


def test_occupancy_marks_spills_and_gives_reasons():
    def row(name, reason=None, spills=0, waves=2.0):
        line = {"arch": "gfx942", "workload": "decode_64x8k", "provider": "suite", "launcher": name, "reason": reason}
        line |= {"waves_per_simd": waves, "limited_by": "VGPRs", "vgprs": 200, "vgpr_spills": spills, "sgpr_spills": 0}
        return line | {"scratch_bytes": 0, "lds_bytes": 0}

    rows = [row("paged"), row("unified", spills=3), row("varlen", reason="KeyError: 'gfx942'", waves=None)]
    said = texts(plots.occupancy(pd.DataFrame(rows).convert_dtypes(), "told"))
    assert {"200 VGPRs", "200 VGPRs, 3 spilled", "KeyError: 'gfx942'"} <= set(said)


def test_a_figure_is_saved_beside_the_record(tmp_path, monkeypatch, rated):
    monkeypatch.setenv(paths.RUN_DIR_VARIABLE, str(tmp_path))
    plots.save(plots.latency(rated, "told"), "04_x", "latency")
    assert (tmp_path / "04_x" / "latency.png").stat().st_size > 10_000


def test_a_figure_that_a_full_disk_refuses_leaves_the_old_one(tmp_path, monkeypatch, small_disk, rated):
    monkeypatch.setenv(paths.RUN_DIR_VARIABLE, str(tmp_path))
    plots.save(plots.latency(rated, "told"), "04_x", "latency")
    (written,) = (tmp_path / "04_x").iterdir()
    before = written.read_bytes()
    with small_disk(1000), pytest.raises(OSError, match="File too large"):
        plots.save(plots.latency(rated, "told anew"), "04_x", "latency")
    assert [*written.parent.iterdir()] == [written]
    assert written.read_bytes() == before
