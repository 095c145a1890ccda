"""`rto plan`: the rehearsal counts what real tensors take, and the verdict names what to change."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rto import late, recipe, room
from rto.cli import main
from rto.config import Lora, Prefer, Scratch
from rto.data.chat import PairRow
from rto.data.rows import make_rows
from rto.data.worlds import world_tokenizer
from rto.models import mapped
from rto.models.load import scratch_network
from rto.models.memory import Budget
from rto.models.rehearsal import GhostWorkshop, Tally, heap_of
from rto.models.role import Backbone, Role
from rto.models.runtime import Runtime
from rto.optim import Optimizer
from rto.pipeline import machine
from rto.pipeline.checks import checks, licence
from rto.pipeline.job import Job
from rto.pipeline.memory_plan import Rehearsal
from rto.pipeline.passes import heaviest
from rto.pipeline.plan import make_plan
from rto.preferences.dpo import dpo
from rto.preferences.objectives import PairObjective
from rto.preferences.train import gradients

MODEL = Scratch(type="scratch", hidden=32, layers=2, heads=2, intermediate=48, lora=None)


def rto(*words: str) -> tuple[int, str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        return main(list(words)), out.getvalue()


def pairs(count: int, prompt: int, answer: int) -> list[PairRow]:
    ids = [5 + i % 20 for i in range(answer)]
    return [PairRow(i, "", ids[:1] * prompt, ids, True, ids, True, 0.0) for i in range(count)]


class Real(TorchDispatchMode):
    """The same count on tensors that have numbers: floats of more than one number that operations make."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0
        self.before = {t.untyped_storage().data_ptr() for t in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for part in tree_leaves(out):
            if isinstance(part, torch.Tensor):
                self.note(part)
        return out

    def note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if not tensor.is_floating_point() or storage._cdata in self.alive or storage.data_ptr() in self.before:
            return
        self.alive[storage._cdata] = storage.nbytes()
        self.peak = max(self.peak, sum(self.alive.values()))
        weakref.finalize(storage, self.alive.pop, storage._cdata, None).atexit = False


@pytest.mark.parametrize("lora", [None, Lora(r=4)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_rehearsed_step_holds_what_a_real_one_holds(lora, checkpointing, monkeypatch):
    """Two DPO steps, activations, gradients and moments: byte for byte, but for tensors of indices and masks."""
    monkeypatch.setattr(room.Room, "take", room.Room._ghost)  # one chunk is more than the whole step
    monkeypatch.setattr(late, "FEWEST", 0)  # a rehearsal waits for nothing
    tokenizer, runtime = world_tokenizer(), Runtime("cpu")
    training, rows = Prefer(batch=4, micro_tokens=10_000), pairs(4, 3, 9)
    model = MODEL.model_copy(update={"lora": lora, "gradient_checkpointing": checkpointing})

    def two_steps(role: Role, reference: Role) -> None:
        objective = PairObjective(role, dpo, {"beta": 0.1}, 0, reference)
        optimizer = Optimizer(role.parameters(), training, 1e-3, 2)
        for _ in range(2):
            gradients(objective, rows, Budget(10_000, print), runtime, optimizer.forget)
            optimizer.step()

    tally = Tally(len(tokenizer))
    shop = GhostWorkshop(model, "", tokenizer, runtime, 0).begin(tally)
    policy, reference = shop.open("policy", "policy", trained=True), shop.reference()
    weights = tally.total
    with tally:
        two_steps(policy, reference)
    predicted = tally.peak - weights

    network = scratch_network(model, tokenizer, 1, 0)
    backbone = Backbone(network, "", lora, torch.float32, checkpointing)
    other = backbone if lora else Backbone(scratch_network(model, tokenizer, 1, 0), "", None, torch.float32)
    if lora:
        backbone.add_adapter("policy")
    else:
        other.network.requires_grad_(False)
    known = [*backbone.network.parameters(), *other.network.parameters()]
    assert weights == sum(p.numel() * 4 for p in {id(p): p for p in known}.values()) + buffers(shop, backbone, lora)
    real = Real([*known, *backbone.network.buffers(), *other.network.buffers()])
    gc.collect()
    with real:
        two_steps(Role(backbone, "policy" if lora else None), Role(other))
    assert predicted == pytest.approx(real.peak, rel=0.03)


def buffers(shop: GhostWorkshop, backbone: Backbone, lora: Lora | None) -> int:
    """Of the rotary embedding, once a network."""
    once = sum(b.numel() * b.element_size() for b in backbone.network.buffers())
    return once if lora else 2 * once


def test_the_heaviest_step_is_that_of_fit():
    rows = pairs(9, 2, 4) + pairs(1, 2, 20)  # sizes 12 and 44
    training = Prefer(batch=2, micro_tokens=24)
    chosen, steps = heaviest("prefer", rows, training, lambda r: 2 * (len(r.prompt) + len(r.chosen)), 0, Runtime("cpu"))
    assert steps == 5
    assert chosen[0] is rows[-1]  # the long one alone, though it has more than micro_tokens
    assert len(chosen) == 2  # and the other one of its step


@pytest.mark.skipif(heap_of(torch.device("cpu")) is None, reason="needs glibc")
def test_the_heap_is_asked_and_not_written_to():
    heap = heap_of(torch.device("cpu"))
    assert heap is not None
    before, held = heap.size(), machine.resident()
    blocks = [heap.take(2**22) for _ in range(64)]  # 256 MB
    assert machine.resident() - held < 2**25
    for block in blocks:
        heap.give(block)
    assert heap.size() >= before


def test_every_stage_is_rehearsed(world_recipe):
    config = recipe.load(world_recipe)
    job = Job(config, quiet=True)
    found = {
        name: work() for name, work in Rehearsal(config, job.rows, job.runtime, None).stages(config.stages).items()
    }
    assert list(found) == ["sft", "prefer", "reward", "rl/ppo", "rl/rto", "evaluate"]
    weights = found["sft"].parts["policy", "weights"]
    assert found["prefer"].parts["reference", "weights"] == weights
    assert found["sft"].saved == weights
    moments = 2 * found["sft"].parts["policy", "weights"]
    assert found["sft"].parts["policy", "optimiser"] == pytest.approx(moments, rel=0.01)  # and a count of steps each
    assert {role for role, _ in found["rl/rto"].parts} >= {"reference", "prefer", "reward", "policy", "critic"}
    assert "prefer" not in {role for role, _ in found["rl/ppo"].parts}  # PPO reads no guide
    assert all(stage.alive == sum(stage.parts.values()) for stage in found.values())


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="asks Linux")
def test_frozen_models_leave_between_their_turns(world_recipe, monkeypatch):
    """As large ones do in a run. Where a policy is trained they are not there."""
    # Many layers keep more than a pass without gradients holds, which reads more rows
    config = recipe.load(world_recipe, [("model.hidden", "128"), ("model.layers", "4")])
    job = Job(config, quiet=True)
    found = {}
    for large in (2**40, 0):
        monkeypatch.setattr(mapped, "LARGE", large)
        stages = Rehearsal(config, job.rows, job.runtime, None).stages(config.stages)
        found[large] = {name: stages[name]() for name in ("prefer", "rl/rto")}
    for name, frozen in (("prefer", {"reference"}), ("rl/rto", {"reference", "prefer", "reward"})):
        stay, leave = found[2**40][name], found[0][name]
        there, left = ({role: each.parts.get((role, "weights"), 0) for role in frozen} for each in (stay, leave))
        assert all(left[role] < there[role] / 100 for role in frozen)  # rotary tables are made in memory
        assert leave.alive == stay.alive - sum(there.values()) + sum(left.values())


def test_scorers_on_models_of_their_own_are_rehearsed_each(files_recipe, tiny_model, pairs_file):
    """16 x 16 projections: r * (16 + 16) numbers each of q and v, and 16 of the head, in float32."""
    given = {"model.name": tiny_model, "data.pairs": pairs_file, "reward.model.name": tiny_model}
    given |= {"reward.model.lora.r": "2", "reward.model.lora.targets": '["q_proj", "v_proj"]'}
    config = recipe.load(files_recipe, [*given.items(), ("scorers.wide.model.lora.r", "4")])
    job = Job(config, quiet=True)
    stages = Rehearsal(config, job.rows, job.runtime, None).stages(["reward"])
    found = {name: work().parts["scorer", "adapters"] for name, work in stages.items()}
    assert found == {"reward": 4 * (2 * 2 * 32 + 16), "reward/wide": 4 * (2 * 4 * 32 + 16)}


def test_a_plan_for_programs(world_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, text = rto("plan", world_recipe, "--json", "--policy.kl.coef", "0.02")
    plan = json.loads(text)
    assert code == 0
    assert plan["ready"]
    assert plan["config"]["policy"]["kl"]["coef"] == 0.02
    assert [stage["stage"] for stage in plan["memory"]["stages"]][:3] == ["sft", "prefer", "reward"]
    assert plan["memory"]["base"] < plan["memory"]["stages"][0]["peak"] < plan["memory"]["available"]
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_named(world_recipe, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = recipe.load(world_recipe)
    most = max(make_plan(config, ["sft"]).sizing.stages, key=lambda s: s.bytes)
    monkeypatch.setattr(machine, "memory", lambda device: machine.resident() + most.bytes // 2)
    code, text = rto("sft", world_recipe, "--dry-run")
    assert code == 3
    assert "sft does not fit" in text
    assert "micro_tokens" in text.partition("verdict")[2]
    monkeypatch.setattr(machine, "memory", lambda device: 1)
    code, text = rto("sft", world_recipe, "--dry-run")
    assert code == 3
    assert "model.lora.r" in text
    assert "gradient_checkpointing" in text


def test_checks_of_a_model_in_a_folder(files_recipe, tiny_model, pairs_file):
    config = recipe.load(files_recipe, [("model.name", tiny_model), ("data.pairs", pairs_file)])
    job = Job(config, quiet=True)
    found = {check.name: check for check in checks(config, job.rows, job.runtime)}
    assert found["round trip"].level == "ok"
    assert found["chat template"].level == "ok"
    assert found["end token"].level == "ok"
    assert found["licence of model"].text == f"unknown: {tiny_model}"


def test_rates_of_full_training_are_told_where_adapters_are_trained(world_recipe):
    def told(*given: tuple[str, str]) -> list[str]:
        job = Job(recipe.load(world_recipe, given), quiet=True)
        return [check.text for check in checks(job.config, job.rows, job.runtime) if check.name == "learning rates"]

    # A scratch model is trained in full by sft, whatever the rate
    rates = [("sft.lr", "1e-5"), ("prefer.lr", "5e-7"), ("reward.lr", "1e-4"), ("policy.lr", "2e-5")]
    rates += [("policy.critic.lr", "9e-6")]
    assert told(*rates) == []  # trained in full
    (text,) = told(*rates, ("model.lora.r", "2"))
    assert text.startswith("prefer 5e-07, ppo's critic 9e-06, rto's critic 9e-06: rates of full training")
    mended = [("model.lora.r", "2"), ("prefer.lr", "5e-5")]
    assert told(*rates, *mended, ("policy.critic.lr", "1e-4")) == []
    assert told(*rates, *mended, ("policy.critic.trunk", "policy")) == []  # that is a head, not an adapter


def test_a_template_that_shows_training_another_prompt_is_a_problem(files_recipe, tiny_model, pairs_file, tmp_path):
    odd = tmp_path / "odd.jinja"
    odd.write_text("{% if add_generation_prompt %}Q: {% endif %}{% for m in messages %}{{ m['content'] }}|{% endfor %}")
    given = [("model.name", tiny_model), ("data.pairs", pairs_file), ("data.chat_template", str(odd))]
    config = recipe.load(files_recipe, given)
    job = Job(config, quiet=True)
    found = {check.name: check for check in checks(config, job.rows, job.runtime)}
    assert found["chat template"].level == "problem"
    assert "--data.chat_template" in found["chat template"].text


def test_trust_is_told_of_the_role_that_has_it(files_recipe, tiny_model, pairs_file):
    changes = [("model.name", tiny_model), ("data.pairs", pairs_file), ("model.trust_remote_code", "true")]
    config = recipe.load(files_recipe, changes)
    job = Job(config, quiet=True)
    found = {check.name: check.level for check in checks(config, job.rows, job.runtime)}
    assert found["code of model"] == "note" and "code of oracle" not in found


def test_a_guide_with_another_tokenizer_is_a_problem(files_recipe, tiny_model, pairs_file, tmp_path):
    world_tokenizer().save_pretrained(tmp_path / "other")
    given = {"model.name": tiny_model, "data.pairs": pairs_file, "prefer.checkpoint": str(tmp_path / "other")}
    config = recipe.load(files_recipe, [*given.items(), ("reward.checkpoint", str(tmp_path / "other"))])
    rows = make_rows(config, Job(config, quiet=True).tokenizer)
    found = {check.name: check for check in checks(config, rows, Runtime("cpu"))}
    assert found["tokenizer of guide prefer"].level == "problem"
    assert "another vocabulary" in found["tokenizer of guide prefer"].text
    assert found["tokenizer of scorer reward"].level == "note"  # it is asked by text


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# A model\n", "apache-2.0"),
        ('---\nlicense: "mit"\n---\n', "mit"),
        ("# A model\nlicense: mit\n", None),
    ],
)
def test_a_licence_is_that_of_the_model_card(tmp_path: Path, card, expected):
    assert licence(tmp_path) is None
    (tmp_path / "README.md").write_text(card)
    assert licence(tmp_path) == expected
