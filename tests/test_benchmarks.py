"""benchmarks/speed on a tiny model: rto's side of every piece of work, the arithmetic and the table. No peers here."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks is no part of the package

from benchmarks.speed import table, theirs  # noqa: E402
from benchmarks.speed.__main__ import main  # noqa: E402
from benchmarks.speed.adapters import start_alike  # noqa: E402
from benchmarks.speed.case import Case, tokens  # noqa: E402
from benchmarks.speed.cases import NAMES, Base, make_base, make_case  # noqa: E402
from benchmarks.speed.drive import Measured, differences  # noqa: E402
from benchmarks.speed.machine import SETUPS, environment  # noqa: E402
from benchmarks.speed.runs import Entry, runs  # noqa: E402
from benchmarks.speed.turns import Turns  # noqa: E402
from benchmarks.speed.work import Model  # noqa: E402
from benchmarks.speed.worker import serve  # noqa: E402

from rto.policy import rollout, train  # noqa: E402
from rto.rollouts import generate  # noqa: E402

TURNS = 2


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Base:
    return make_base(tmp_path_factory.mktemp("base"), quick=True)


@pytest.fixture(scope="module")
def served(base, tmp_path_factory) -> Callable[[str], tuple[Case, list[dict[str, Any]]]]:
    """A piece of work, and what rto's side says: its settings, and two turns. Operations are counted in the second."""

    @cache
    def serve_once(name: str) -> tuple[Case, list[dict[str, Any]]]:
        case, said = case_of(name, base, tmp_path_factory.mktemp(name)), io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            for module, function in ((rollout, "generate"), (train, "update"), (generate, "uniforms")):
                patch.setattr(module, function, getattr(module, function))  # the side puts a watch on them
            with contextlib.suppress(SystemExit):  # no orders are left
                serve("rto", case, Turns(io.StringIO("go\ncount\n"), said))
        return case, [json.loads(line) for line in said.getvalue().splitlines()]

    return serve_once


def case_of(name: str, base: Base, folder: Path, quick: bool = True) -> Case:
    return make_case(name, base, folder, turns=TURNS, quick=quick, micro_tokens=64)


@pytest.mark.parametrize("name", NAMES)
def test_rto_takes_its_turns(name, base, served):
    case, (settings, *turns) = served(name)
    assert settings["settings"]["threads"] >= 1
    assert len(turns) == TURNS
    for result in turns:
        assert sum(result["phases"].values()) == pytest.approx(result["seconds"])
        assert result["memory_mb"] > 0 and all(map(math.isfinite, result["checks"].values()))
    count = importlib.import_module(f"benchmarks.speed.{case.workload}").least
    least = count(case, case.batch(1), Model.read(base.model))
    assert turns[0]["flops"] == 0
    assert least < turns[1]["flops"] < 2 * least  # the floor is one, and not far from what is done
    assert turns[1]["phase_flops"].keys() == turns[1]["phases"].keys()
    assert sum(turns[1]["phase_flops"].values()) == turns[1]["flops"]


def test_every_turn_of_dpo_starts_where_the_last_one_ended(served):
    _, (_, first, second) = served("dpo")
    assert first["tokens"] == 4 * (6 + 6 + 6 + 6)  # pairs x (prompt and answer, twice)
    assert first["checks"] == {"loss": pytest.approx(math.log(2)), "margin": pytest.approx(0.0, abs=1e-5)}
    assert second["checks"]["loss"] < first["checks"]["loss"]  # the same batch


def test_rl_answers_have_one_length_and_every_weight_moves_once_an_epoch(served):
    _, (_, *turns) = served("ppo")
    wanted = {"answers": 16, "tokens an answer": 6, "updates of each weight": 2}
    assert [turn["checks"] for turn in turns] == [wanted] * TURNS


def test_answers_get_the_lengths_that_are_asked_for(served):
    case, (_, *turns) = served("generate-varied")
    assert len(set(case.lengths)) > 1
    assert [turn["tokens"] for turn in turns] == [sum(case.lengths)] * TURNS


def test_a_case_comes_back_from_its_file(base, tmp_path):
    case = case_of("generate-varied", base, tmp_path)
    case.write(tmp_path / "case.json")
    assert Case.read(tmp_path / "case.json") == case
    natural = case_of("dpo-natural", base, tmp_path)
    assert len({tokens(row) for batch in natural.batches for row in batch}) > 1


def test_unknown_work_and_natural_pairs_without_a_file_are_refused(base, tmp_path):
    with pytest.raises(ValueError, match="no work named 'dpo2'"):
        case_of("dpo2", base, tmp_path)
    with pytest.raises(ValueError, match="--pairs"):
        case_of("dpo-natural", base, tmp_path, quick=False)


def test_a_gpu_gets_more_work_and_the_peer_its_own_rows(base, tmp_path):
    case = make_case("dpo", base, tmp_path, turns=TURNS, device="cuda", dtype="bfloat16", keys={"packing": True})
    assert len(case.batch(0)) == 32 and {len(ids) for row in case.batch(0) for ids in row.values()} == {256}
    assert (case.micro_tokens, case.micro_rows, case.keys) == (2**14, 8, {"packing": True})
    case.write(tmp_path / "case.json")
    assert Case.read(tmp_path / "case.json") == case
    wanted = {"bf16": True, "use_cpu": False, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
    found = theirs.arguments(case, dict)
    assert found.items() >= {**wanted, "gradient_checkpointing": True}.items()  # as TRL has it
    assert theirs.arguments(replace(case, setup="tuned"), dict)["gradient_checkpointing"] is False
    kinds = {
        (lora, trained): theirs.load(replace(case, lora=lora), trained=trained).dtype
        for lora in (None, 2)
        for trained in (True, False)
    }
    assert kinds.pop((None, True)) == torch.float32 and set(kinds.values()) == {torch.bfloat16}
    on_cpu = replace(case, device="cpu")
    made = theirs.in_precision(on_cpu, torch.nn.functional.linear)(torch.ones(1, 2), torch.ones(3, 2))
    assert made.dtype == torch.bfloat16
    for setup in SETUPS:
        on_cpu = theirs.arguments(replace(case, device="cpu", dtype="float32", setup=setup), dict)
        assert on_cpu.items() >= {"bf16": False, "use_cpu": True, "gradient_checkpointing": False}.items()


def test_malloc_is_set_for_tuned_peers_on_a_cpu_alone(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
    assert environment(2, "tuned")["GLIBC_TUNABLES"].startswith("glibc.malloc.mmap_threshold=")
    assert all("GLIBC_TUNABLES" not in environment(2, *other) for other in ((), ("default",), ("tuned", "cuda")))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert environment(2, "tuned", "cuda")["CUDA_VISIBLE_DEVICES"] == "3"


def test_losses_may_differ_more_in_bfloat16():
    peer, ours = a_side(PEER, [6.0], loss=0.69), a_side(OURS, [3.0], loss=0.75)
    assert differences(peer, ours)
    peer.settings["dtype"] = "bfloat16"
    assert differences(peer, ours) == []
    assert differences(peer, a_side(OURS, [3.0], loss=0.8))


def test_operations_of_a_forward_pass():
    model = Model(body=100, head=10, attention=3, edges=20)
    # 2 tokens after 4: they attend to 5 and 6 tokens, 4 x 3 operations each; logits at one.
    assert model.forward(2, 1, after=4) == 2 * 100 * 2 + 2 * 10 * 1 + 4 * 3 * (5 + 6)
    assert model.adapting(2, 8) == 3 * 2 * 8 * 20 * 2
    assert model.adapting(2, None) == 0


def test_a_phase_inside_of_another_is_no_part_of_it():
    turns = Turns(io.StringIO("go\ncount\n"), said := io.StringIO())
    for _ in range(2):
        turns.begin()
        with turns.phase("outer"):
            torch.ones(2, 3) @ torch.ones(3, 4)
            with turns.phase("inner"):
                torch.ones(2, 3) @ torch.ones(3, 5)
                time.sleep(0.05)
        turns.stop()
        turns.end(1, "rest", {})
    timed, counted = map(json.loads, said.getvalue().splitlines())
    assert timed["phases"]["inner"] >= 0.05 > timed["phases"]["outer"]
    assert counted["phase_flops"] == {"inner": 2 * 2 * 3 * 5, "outer": 2 * 2 * 3 * 4, "rest": 0}


def a_side(entry: Entry, seconds: list[float], loss: float = 0.5) -> Measured:
    turns = [
        {"seconds": s, "phases": {"forward": s / 2, "rest": s / 2}, "tokens": 60, "memory_mb": 100 * s} for s in seconds
    ]
    checks, done = [{"loss": loss}] * len(turns), {"forward": 42 * 10**8, "rest": 0}
    return Measured(entry, {"threads": 2}, turns, checks, flops=6 * 10**9, phase_flops=done)


PEER, TUNED, OURS = Entry("dpo", "peer"), Entry("dpo", "peer", "tuned"), Entry("dpo", "rto")


def test_one_rto_side_serves_both_setups_and_one_peer_both_kinds_of_rl():
    assert runs(["dpo"]) == [[PEER, TUNED, OURS]]
    assert runs(["dpo"], ["tuned"]) == [[TUNED, OURS]]
    assert runs(["dpo"], only="rto") == [[OURS]]
    assert runs(["dpo"], only="peer") == [[PEER, TUNED]]
    assert runs(["generate"]) == [[Entry("generate", "peer"), Entry("generate", "rto")]]
    full, adapters = Entry("ppo", "rto"), Entry("ppo-adapters", "rto")
    assert runs(["ppo", "dpo", "ppo-adapters"], ["default"]) == [[Entry("ppo", "peer"), full, adapters], [PEER, OURS]]
    assert runs(["ppo-adapters"]) == [[Entry("ppo", "peer", setup), adapters] for setup in ("default", "tuned")]
    natural = [[Entry("dpo-natural", "peer", setup), Entry("dpo-natural", "rto")] for setup in ("default", "tuned")]
    assert runs(["dpo-natural"]) == natural
    assert runs(["ppo", "ppo-adapters"], only="rto") == [[full, adapters]]
    assert runs(["ppo", "dpo"], device="cuda") == [[Entry("ppo", "peer"), full], [PEER, TUNED, OURS]]


def test_the_table_by_hand():
    peer, tuned, ours = a_side(PEER, [6.0, 8.0, 7.0]), a_side(TUNED, [3.0, 3.0, 3.0]), a_side(OURS, [3.0, 2.0, 2.0])
    assert table.ratios(peer, ours) == [2.0, 4.0, 3.5]
    above, middle, below = table.lines([peer, tuned, ours], 6e9, {"dpo": 3e9})
    assert "| 7 s (6 to 8) | forward 3.5 (20%), rest 3.5 | 9 | 700 MB | 0.006 (0.003) | 14% | 0.5 s |  |  |" in above
    assert middle.startswith("| dpo | peer | tuned | 3 s (3 to 3) |")
    assert "| default: 3.5 x (2 to 4); tuned: 1.5 x (1 to 1.5) | default: 0.29; tuned: 0.67 |" in below
    assert {line.count("|") for line in (*table.head().splitlines(), above, below)} == {len(table.HEAD) + 1}


def test_what_the_sides_agree_on_is_told():
    peer, ours = a_side(PEER, [6.0, 7.0]), a_side(OURS, [3.0, 3.0], loss=0.5002)
    said = "- dpo peer (default) and dpo rto: loss 0.5 and 0.5002 in turn 1, loss 0.5 and 0.5002 in turn 2"
    assert table.agreement([peer, ours]) == [said]
    assert table.agreement([ours]) == []


def test_a_side_that_failed_has_no_ratio_and_the_others_keep_theirs():
    peer, ours, failed = a_side(PEER, [6.0]), a_side(OURS, [3.0]), a_side(TUNED, [])
    failed.failed = "it ended"
    lines = table.lines([peer, failed, ours], 6e9, {"dpo": 3e9})
    assert lines[1].startswith("| dpo | peer | tuned | failed |") and "| default: 2 x (2 to 2) |" in lines[2]
    assert {line.count("|") for line in lines} == {len(table.HEAD) + 1}
    assert table.disagreement([peer, failed, ours]) == ["- dpo peer (tuned): it ended"]


def test_adapters_start_alike_whatever_their_name(base):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    networks = [AutoModelForCausalLM.from_pretrained(base.model) for _ in range(2)]
    for network, name in zip(networks, ("default", "policy"), strict=True):
        get_peft_model(network, LoraConfig(r=2, target_modules="all-linear"), adapter_name=name)
        start_alike(network, seed=3)
    first, second = ([p for key, p in network.named_parameters() if ".lora_A." in key] for network in networks)
    assert len(first) == 2 * 7  # layers x linear layers
    assert all(torch.equal(a, b) and a.abs().max() <= a.shape[1] ** -0.5 for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])


def test_no_ratio_where_the_work_differs():
    peer, ours = a_side(PEER, [6.0]), a_side(OURS, [3.0], loss=0.502)
    assert differences(peer, ours) == ["turn 1: loss is 0.5 and 0.502"]
    assert "default: not the same work" in table.lines([peer, ours], 6e9, {"dpo": 3e9})[1]
    assert table.disagreement([peer, ours]) == [
        "- dpo peer (default) and dpo rto: NOT THE SAME WORK: turn 1: loss is 0.5 and 0.502"
    ]
    assert differences(peer, a_side(OURS, [3.0], loss=0.5009)) == []
    assert differences(peer, a_side(OURS, [3.0], loss=math.nan))


QUICK = ["--quick", "--only", "rto", "--repeats", "1", "--warmup", "1", "--threads", "1"]


def test_the_driver_in_a_process(capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    assert main(["sft", *QUICK, "--out", str(tmp_path / "turns.jsonl")]) == 0
    said = capfd.readouterr().out
    assert "| sft | rto | its own |" in said and "- sft rto: " in said
    told = [json.loads(line) for line in (tmp_path / "turns.jsonl").read_text().splitlines()]
    turns = [line for line in told if "turn" in line]
    assert [(line["work"], line["side"], line["turn"], line["timed"]) for line in turns] == [
        ("sft", "rto", 1, False),
        ("sft", "rto", 2, True),
        ("sft", "rto", 3, False),  # operations are counted
    ]
    assert all(line["seconds"] > 0 for line in turns) and [line for line in told if "gemm_peak" in line]


def test_a_side_that_fails_is_told_of_and_the_rest_goes_on(capfd, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "benchmarks"))  # the process does not find rto
    monkeypatch.setattr("benchmarks.speed.drive.ROOT", ROOT / "docs")  # nor the worker
    assert main(["sft", "reward", *QUICK]) == 1
    said = capfd.readouterr().out
    assert "| sft | rto | its own | failed |" in said and "| reward | rto | its own | failed |" in said
    assert "- sft rto: the rto side ended with code 1; its last words:" in said


def test_peers_that_are_not_there_are_said_so(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["sft", "--quick", "--peers", str(tmp_path)])
    assert "run `make bench`" in capsys.readouterr().err


def test_another_model_in_another_precision(base, capfd, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    options = ["--model", base.model, "--dtype", "bfloat16", "--packing", "--micro-tokens", "512"]
    assert main(["sft", *QUICK[1:], *options]) == 0  # not --quick: 8 rows of 64 + 64 tokens
    said = capfd.readouterr().out
    assert "GEMM peak, bfloat16" in said and "dtype bfloat16, attention sdpa, micro_tokens 512, packing True" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_so(capsys):
    with pytest.raises(SystemExit):
        main(["sft", *QUICK, "--device", "cuda"])
    assert "no usable GPU" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("options", [[], ["--packing"], ["--dtype", "float32"]])
def test_all_work_on_a_gpu(capfd, monkeypatch, options):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    assert main([*QUICK, "--device", "cuda", *options]) == 0
    assert "failed" not in capfd.readouterr().out
