# SPDX-License-Identifier: Apache-2.0
"""The device card, the table of published peaks, and the ceilings measured beside every run."""

import json
import math

import pytest
import torch

from aiterlab.measure import hardware


@pytest.mark.parametrize(
    "name, product",
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("AMD Instinct MI300X", "MI300X"),
        ("AMD Instinct MI325X", "MI325X"),
        ("AMD Instinct MI355X", "MI355X"),
    ],
)
def test_the_products_of_the_table_are_found_by_torchs_name(name, product):
    assert hardware.peak(name).product == product


@pytest.mark.parametrize("name", ["NVIDIA H200 NVL", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB", "AMD EPYC 9654", ""])
def test_an_unknown_device_has_no_peak_rather_than_a_guess(name):
    assert hardware.peak(name) is None


def test_the_published_numbers_are_the_dense_ones():
    # compute units x FLOPs per clock and unit x GHz, for AMD; half of the sparse figure, for NVIDIA
    expected = {"MI300X": 304 * 2.048 * 2.1, "MI325X": 304 * 2.048 * 2.1, "MI355X": 256 * 4.096 * 2.4, "H200": 1979 / 2}
    peaks = {one.product: one for one in hardware.PEAKS}
    for product, tflop_s in expected.items():
        assert peaks[product].bf16_tflop_s == pytest.approx(tflop_s, rel=1e-3)
    for one in hardware.PEAKS:
        assert one.fp16_tflop_s == one.bf16_tflop_s and one.fp8_tflop_s == pytest.approx(2 * one.bf16_tflop_s, rel=1e-3)
        assert one.source


def test_a_cpu_is_a_device_with_a_card_and_no_published_peak():
    card = hardware.card("cpu")
    assert card["device_kind"] == "cpu" and card["compute_units"] >= 1 and card["memory_bytes"] > 2**30
    assert card["torch_version"] == torch.__version__
    assert card["peak_bf16_tflop_s"] is card["peak_memory_tb_s"] is card["driver_version"] is None
    json.dumps(card)


def test_ceilings_count_what_is_read_and_what_is_written():
    measured = hardware.ceilings("cpu", rounds=2)
    assert list(measured) == ["copy", "read", "matmul_float32"]
    assert measured["copy"].work == 2 * measured["read"].work == 2 * 2**26
    for one in measured.values():
        assert len(one.samples_us) == 2 and math.isfinite(one.rate) and one.rate > 0
    one = hardware.Ceiling("copy", "TB/s", 4e6, (1.0, 2.0, 3.0))
    assert one.rate == 2.0  # 4 MB in 2 microseconds
    json.dumps(one.row())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_reaches_most_of_its_bandwidth_and_no_more_than_its_peak():
    card, measured = hardware.card("cuda"), hardware.ceilings("cuda", rounds=10)
    assert card["device_kind"] == "gpu" and card["l2_bytes"] and card["driver_version"]
    assert set(measured) == {"copy", "read", "matmul_bfloat16", "matmul_float16"}
    if card["peak_memory_tb_s"]:
        assert 0.6 < measured["copy"].rate / card["peak_memory_tb_s"] < 1
        assert 0.4 < measured["matmul_bfloat16"].rate / card["peak_bf16_tflop_s"] < 1
