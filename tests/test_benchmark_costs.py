"""benchmarks/overhead, growth and profiling: what they measure on tiny models, and the arithmetic by hand."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks is no part of the package

from benchmarks import growth, overhead, profiling  # noqa: E402
from benchmarks.growth_plot import draw  # noqa: E402
from benchmarks.speed.machine import environment  # noqa: E402

from rto.models.role import Backbone  # noqa: E402
from rto.report.plots import save_png  # noqa: E402


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """The scripts set how many torch takes, for good."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# --- overhead ---------------------------------------------------------------------------------------------


def test_a_model_call_within_another_is_the_outer_ones():
    clock = overhead.Clock()
    inner = clock.around("output layer", lambda: time.sleep(0.02))
    with clock.running("backward"):
        inner()
    assert set(clock.spent) == {"backward"} and clock.spent["backward"] >= 0.02
    inner()
    assert clock.spent["output layer"] >= 0.02 and not clock.inside


def test_what_is_no_model_call_is_overhead():
    took = [(2.0, Counter(body=1.0, backward=0.5)), (1.0, Counter(body=0.9)), (4.0, Counter(optimiser=2.0))]
    line, share = overhead.table("full", took)
    assert share == pytest.approx(0.25)  # the median of 0.25, 0.1 and 0.5
    assert line == "| full | 2.000 | 0.900 | 0.000 | 0.000 | 0.000 | 25.0% |"


def test_lines_are_seen_where_time_goes():
    lines = overhead.Lines(overhead.Clock(), str(Path(__file__).parent))
    with lines:
        time.sleep(0.05)  # not looked at
        assert not lines.seen
        lines.on = True
        time.sleep(0.2)
        lines.on = False
    assert lines.seen.most_common(1)[0][0].endswith("test_lines_are_seen_where_time_goes")
    assert not lines._thread.is_alive()


def test_overhead_of_iterations(capsys):
    plain = Backbone.states, torch.Tensor.backward
    assert overhead.main(["--quick", "--repeats", "1", "--warmup", "1", "--threads", "1"]) == 0
    said = capsys.readouterr().out
    for name in ("full models", "LoRA, r 16"):
        cells = next(line for line in said.splitlines() if line.startswith(f"| {name}")).split("|")[2:-1]
        seconds, *parts = map(float, cells[:-1])
        share = float(cells[-1].strip().rstrip("%")) / 100
        assert all(part >= 0 for part in parts)  # the optimiser of a tiny model may take less than is printed
        assert seconds > 0 and parts[0] > 0
        assert share == pytest.approx(1 - sum(parts) / seconds, abs=0.02)
    assert "policy/" in said
    assert (Backbone.states, torch.Tensor.backward) == plain


# --- growth -----------------------------------------------------------------------------------------------


def test_every_point_is_taken_once():
    points = growth.points(quick=False)
    assert len(points) == len(set(points)) == 2 * (5 + 4 + 2)  # the axes meet in their first points
    assert growth.Point("dpo", 64, 8, 32_000) in points and growth.Point("scoring", pairs=128) in points


@pytest.mark.parametrize("work", growth.WORK)
def test_a_point(work):
    point = replace(growth.QUICK_POINT, work=work)
    found = growth.measure(point)
    assert found["tokens"] == 2 * 2 * (8 + 8)
    # Two rows of prompt and both answers, or four of prompt and answer.
    assert found["micro_batch"] == {"dpo": 2 * (8 + 8 + 8), "scoring": 4 * (8 + 8)}[work]
    assert found["seconds"] > 0 and found["peak_mb"] > 0
    layer = 4 * 32 * 32 + 3 * 32 * 96 + 2 * 32
    assert found["parameters"] == 500 * 32 + 2 * layer + 32


def test_a_point_in_a_process_of_its_own(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    found = growth.derived(growth.in_a_process(replace(growth.QUICK_POINT, work="scoring"), threads=1))
    assert found["threads"] == 1 and found["pairs"] == 2
    assert found["rest_mb"] + found["weights_mb"] == pytest.approx(found["peak_mb"])
    with pytest.raises(RuntimeError, match="ended with code 1"):
        growth.in_a_process(replace(growth.QUICK_POINT, hidden=-1), threads=1)


def made_up() -> list[dict[str, Any]]:
    """300 MB and 0.1 MB a token of a micro-batch beside weights; the vocabulary adds half an output layer."""
    found = []
    for point in growth.points(quick=False):
        batch = max(384, point.prompt + 2 * point.answer)
        more = 4 * point.hidden * (point.vocabulary - 32_000) / growth.MB
        parameters = 4_000_000 + point.hidden * point.vocabulary
        weights = growth.COPIES[point.work] * 4 * parameters / growth.MB
        row = {"seconds": 2.0, "tokens": 2 * point.pairs * (point.prompt + point.answer), "micro_batch": batch}
        row |= {"peak_mb": 300 + 0.1 * batch + weights + 0.5 * more, "parameters": parameters}
        found.append(growth.derived(vars(point) | row))
    return found


def test_how_memory_grows_is_said_in_numbers():
    lines = growth.said(made_up())
    assert "DPO step, tokens of a micro-batch: without weights, gradients and moments 300 MB + 102.4 MB" in lines[0]
    assert "no point is more than 0 MB off" in lines[0]
    assert "DPO step, batch: +0 MB from 8 to 128 pairs" in lines[1]
    layer = 4 * 256 * 96_000 / 2**20
    assert f"add {5 * layer:.0f} MB" in lines[2] and f"(5 x {layer:.0f} MB)" in lines[2]
    assert lines[2].endswith("0.50 output layers.")


def test_growth_as_table_and_picture(tmp_path):
    found = made_up()
    text = growth.table(found)
    assert len(text.splitlines()) == 2 + len(found)
    assert "| DPO step | 64 | 8 | 32,000 | 2 | 1,024 | 384 |" in text
    save_png(draw(found), tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_growth_writes_its_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(growth, "in_a_process", lambda point, threads: vars(point) | growth.measure(point))
    growth.main(["--quick", "--out", str(tmp_path), "--threads", "1"])
    saved = json.loads((tmp_path / "growth.json").read_text())
    assert len(saved["points"]) == len(growth.points(quick=True)) == 2 * 4
    assert (tmp_path / "growth.md").read_text() == capsys.readouterr().out
    assert (tmp_path / "growth.png").exists()


# --- profiling --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "scope", "group"),
    [
        (["aten::mm", "aten::linear"], profiling.NORM, "matrix products"),
        (["aten::mm", "_Selected"], profiling.HEAD, "matrix products"),
        (["mkldnn::_linear_pointwise"], "", "matrix products"),
        (["aten::copy_", "aten::scaled_dot_product_attention"], "", "attention"),
        (["aten::_foreach_mul_"], "", "optimiser and clipping"),
        (["aten::add_", "torch::autograd::AccumulateGrad"], "", "summing gradients"),
        (["aten::exp_", "_SelectedBackward"], "", "log-probs and drawing"),
        (["aten::mul"], profiling.NORM, "normalisation"),
        (["aten::mul"], "", "elementwise, rotary, embedding"),
        (["aten::copy_"], "", "copies and allocation"),
    ],
)
def test_the_group_of_an_operation(names, scope, group):
    assert profiling.group_of(names, scope) == group and group in profiling.GROUPS


def test_a_gradient_belongs_to_the_mark_of_its_operation():
    from torch.profiler import profile, record_function

    x = torch.randn(400, 400, requires_grad=True)
    with profile() as seen:
        with record_function(profiling.NORM):
            y = x.pow(2)
        y.exp().sum().backward()
    _, ops = profiling.shares(seen.events(), 1.0)
    groups = {group for (name, group) in ops if name == "aten::pow"}  # of x, and 2 x^1 of its gradient
    assert groups == {"normalisation"}
    assert ("aten::exp", "elementwise, rotary, embedding") in ops


def test_a_profile_of_all_work(capsys):
    profiling.main(["--quick", "--threads", "1", "--ops", "3"])
    said = capsys.readouterr().out
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in said.splitlines() if line.startswith("|")}
    shares = [[float(cell.strip().rstrip("%")) for cell in rows[group]] for group in profiling.GROUPS]
    assert [sum(column) for column in zip(*shares, strict=True)] == pytest.approx([100] * len(profiling.WORK), abs=1)
    products, attention, norm, head = shares[:4]
    assert min(products) > 0 and min(attention) > 0 and min(norm) > 0 and min(head) > 0
    optimiser = shares[profiling.GROUPS.index("optimiser and clipping")]
    reads = [name in ("scoring", "sampling") for name in profiling.WORK]
    assert [share == 0 for share in optimiser] == reads  # training has one, reading none
    with pytest.raises(SystemExit):
        profiling.main(["dpo2"])


def test_the_processes_get_the_threads_that_are_asked_for():
    assert environment(3, "default")["OMP_NUM_THREADS"] == "3"
