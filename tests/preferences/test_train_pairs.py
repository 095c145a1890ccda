"""What pairwise losses read: lengths, KL and the cached reference; models that share a backbone keep apart."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rto.config import Lora, Supervised
from rto.models.memory import Budget
from rto.models.role import Role
from rto.models.workshop import Workshop
from rto.preferences import cpo, dpo, ipo, objectives, orpo, rdpo, simpo, tdpo1, tdpo2, train
from rto.preferences.cache import ReferenceCache, fingerprint
from rto.preferences.objectives import reads_reference
from rto.preferences.train import PairObjective, fit, gradients, objective_for
from rto.report.log import Progress, RunLog

WHOLE, ALONE = 1_000_000, 1  # micro_tokens: the batch in one pass, and a row a pass
SETTINGS = {
    "full": {},
    "lora": {"lora": Lora(r=4, alpha=8)},
    "lora, checkpointing": {"lora": Lora(r=4, alpha=8), "gradient_checkpointing": True},
    "output layer too": {"lora": Lora(r=4, alpha=8, targets=["q_proj", "lm_head"])},
}


def objective(world, nudged, loss: Any = tdpo2, settings: str = "full", **options: Any) -> PairObjective:
    """A fresh objective whose policy is not its reference: the same weights every time."""
    shop: Workshop = world.shop_of(**SETTINGS[settings])
    reference = shop.reference()
    return PairObjective(nudged(shop.new_policy("guide")), loss, options, world.pad, reference)


def grads(role: Role) -> list[Tensor]:
    found = [p.grad for p in role.parameters() if p.grad is not None]
    assert found
    return found


def calls(role: Role) -> list[int]:
    """Grows with each forward pass of a full model."""
    seen: list[int] = []
    role.backbone.body.register_forward_hook(lambda *_: seen.append(1))
    return seen


# --- the KL -------------------------------------------------------------------------------------------


def distributions(role: Role, prompt: list[int], answer: list[int]) -> Tensor:
    """[T, V], log-probs of the next token along one answer without padding, by the model's own forward pass."""
    logits = role.activate().network(input_ids=torch.tensor([prompt + answer])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # the output layer's adapter
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_kl_is_that_of_whole_distributions(world, nudged, settings):
    goal, rows = objective(world, nudged, settings=settings), world.rows.pairs[:5]
    read = goal._read(rows)
    (read["chosen_kl"].sum() + 2 * read["rejected_kl"].sum() + read["chosen"].sum()).backward()
    found = [read[name].detach() for name in ("chosen_kl", "rejected_kl", "chosen")] + grads(goal.role)

    by_hand = objective(world, nudged, settings=settings)
    sums: dict[str, list[Tensor]] = {"chosen_kl": [], "rejected_kl": [], "chosen": []}
    for row in rows:
        for side in ("chosen", "rejected"):
            answer = getattr(row, side)
            with torch.no_grad():
                q = distributions(by_hand.reference, row.prompt, answer)
            p = distributions(by_hand.role, row.prompt, answer)
            sums[f"{side}_kl"].append((q.exp() * (q - p)).sum())
            if side == "chosen":
                sums[side].append(p[range(len(answer)), answer].sum())
            weight = 2 if side == "rejected" else 1
            loss = weight * sums[f"{side}_kl"][-1] + (sums[side][-1] if side == "chosen" else 0)
            loss.backward()  # at once: in the next pass another role acts
    expected = [torch.stack(values).detach() for values in sums.values()] + grads(by_hand.role)
    assert found[0].min() > 1e-3
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_each_model_reads_the_text_once(world, nudged):
    goal = objective(world, nudged)
    assert goal.role.backbone.forks and goal.reference.backbone.forks  # tried now, with passes of its own
    policy, reference = calls(goal.role), calls(goal.reference)
    goal.loss(world.rows.pairs[:4], 4)
    assert (len(policy), len(reference)) == (1, 1)


def test_the_reference_gets_no_gradient(world, nudged):
    goal = objective(world, nudged, tdpo1)
    for p in goal.reference.parameters():
        p.requires_grad_(True)
    gradients(goal, world.rows.pairs[:4], Budget(WHOLE, print), world.runtime, goal.role.backbone.network.zero_grad)
    assert all(p.grad is None for p in goal.reference.parameters())
    assert sum(float(g.abs().sum()) for g in grads(goal.role)) > 0


# --- cutting and padding ------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", ["full", "lora, checkpointing"])
@pytest.mark.parametrize("loss", [tdpo1, tdpo2, rdpo, simpo, orpo])
def test_one_batch_of_eight_equals_eight_of_one(world, nudged, loss, settings):
    whole, alone = (objective(world, nudged, loss, settings) for _ in range(2))
    rows = world.rows.pairs[:8]
    value, sums = gradients(whole, rows, Budget(WHOLE, print), world.runtime, whole.role.backbone.network.zero_grad)
    value_alone, sums_alone = gradients(
        alone, rows, Budget(ALONE, print), world.runtime, alone.role.backbone.network.zero_grad
    )
    assert value_alone == pytest.approx(value, rel=1e-5)
    assert sums_alone == pytest.approx(sums, abs=1e-4)
    for a, b in zip(grads(whole.role), grads(alone.role), strict=True):
        assert_close(a, b, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("loss", [tdpo1, tdpo2, rdpo, simpo])
def test_padding_adds_nothing(world, nudged, loss):
    goal = objective(world, nudged, loss)
    ordered = sorted(world.rows.pairs, key=goal.size)
    short, long = ordered[0], ordered[-1]
    with torch.no_grad():
        both = goal.loss([short, long], 2)[0]
        assert_close(both, goal.loss([short], 2)[0] + goal.loss([long], 2)[0])
        goal.pad = 7  # what stands in the padding is never read
        assert torch.equal(goal.loss([short, long], 2)[0], both)


# --- what is read, and what is not --------------------------------------------------------------------


def test_lengths_count_the_end(world, nudged):
    rows = world.rows.pairs[:3]
    read = objective(world, nudged, simpo)._read(rows)
    assert read["chosen_length"].tolist() == [len(row.chosen) for row in rows]
    assert read["rejected_length"].tolist() == [len(row.rejected) for row in rows]


def test_a_reference_that_no_loss_reads_is_not_run(world, nudged):
    goal = objective(world, nudged, simpo)
    assert goal.reference is None and not reads_reference(simpo)
    assert reads_reference(dpo) and reads_reference(tdpo1)
    chosen = objective_for(goal.role, simpo, {}, world.pad)
    assert isinstance(chosen, PairObjective)


READ = {
    "chosen": torch.tensor([-4.0]),
    "rejected": torch.tensor([-9.0]),
    "chosen_reference": torch.tensor([-5.0]),
    "rejected_reference": torch.tensor([-7.0]),
    "chosen_length": torch.tensor([2.0]),
    "rejected_length": torch.tensor([3.0]),
    "chosen_kl": torch.tensor([0.5]),
    "rejected_kl": torch.tensor([1.5]),
    "margin": torch.tensor([0.0]),
}


@pytest.mark.parametrize(
    ("loss", "options", "chosen", "rejected"),
    [
        (dpo, {"beta": 0.5}, 0.5 * 1, 0.5 * -2),  # log-ratios 1 and -2
        (dpo, {}, 0.1 * 1, 0.1 * -2),  # the loss's own beta
        (ipo, {"tau": 0.5, "average": False}, 1, -2),
        (ipo, {"tau": 0.5}, 1 / 2, -2 / 3),  # log-ratios a token
        (tdpo2, {"beta": 0.5}, 0.5 * 1.5, 0.5 * -0.5),  # and the KL, whatever alpha
        (simpo, {"beta": 2.0}, 2 * -2, 2 * -3),  # log-probs a token
        (orpo, {}, -2, -3),
        (cpo, {"beta": 0.5}, 0.5 * -4, 0.5 * -9),  # it compares sums: the one length is for its NLL
    ],
)
def test_implicit_rewards_by_hand(world, loss, options, chosen, rejected):
    reference = world.shop.reference()
    goal = PairObjective(reference, loss, options, world.pad, reference)
    kept = {name: value for name, value in READ.items() if "kl" not in name or loss is tdpo2}
    sums = goal._sums(kept)
    expected = {"accuracy": 1.0, "margin": chosen - rejected, "chosen": chosen, "rejected": rejected}
    if loss is tdpo2:
        expected |= {"chosen_kl": 0.5, "rejected_kl": 1.5}
    assert sums == pytest.approx(expected, abs=1e-6)


# --- the reference reads first ------------------------------------------------------------------------


@pytest.mark.parametrize("settings", ["full", "lora"])
def test_the_reference_reads_the_batch_before_the_policy_does(world, nudged, settings, monkeypatch):
    """And equals one that reads beside it; a model of its own is let go between."""
    rows, seen = world.rows.pairs[:6], []
    goal, beside = objective(world, nudged, dpo, settings), objective(world, nudged, dpo, settings)
    assert goal.role.backbone.forks and goal.reference.backbone.forks  # tried now, with passes of its own
    for name, role in (("policy", goal.role), ("reference", goal.reference)):
        plain = role.logprobs
        monkeypatch.setattr(role, "logprobs", lambda *a, n=name, p=plain, **more: seen.append(n) or p(*a, **more))
    monkeypatch.setattr("rto.preferences.objectives.leave", lambda role, policy: seen.append("left"))
    loss, _ = gradients(goal, rows, Budget(ALONE, print), world.runtime, goal.role.backbone.network.zero_grad)
    assert seen == ["reference"] * 6 + ["left"] + ["policy"] * 6
    assert goal.ahead == {}

    whole, _ = beside.loss(rows, len(rows))
    whole.backward()
    assert loss == pytest.approx(whole.item(), abs=1e-6)
    for a, b in zip(grads(goal.role), grads(beside.role), strict=True):
        assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_a_row_that_is_tried_alone_is_read_in_the_same_order(world, nudged, monkeypatch):
    """At the end of a stage, and to find whose gradient is no number."""
    goal, seen = objective(world, nudged, dpo), []
    monkeypatch.setattr("rto.preferences.objectives.leave", lambda role, policy: seen.append("left"))
    for name, role in (("policy", goal.role), ("reference", goal.reference)):
        role.backbone.body.register_forward_hook(lambda *_, n=name: seen.append(n))
    assert goal.role.backbone.forks and goal.reference.backbone.forks
    seen.clear()
    train._backward_alone(goal, world.rows.pairs[0])
    assert seen == ["reference", "left", "policy"] and goal.ahead == {} and grads(goal.role)


def test_a_reference_that_has_moved_reads_anew(world, nudged):
    """What it said of one batch is not used for the next."""
    goal, rows = objective(world, nudged, dpo), world.rows.pairs[:3]
    losses = []
    for _ in range(2):
        losses.append(gradients(goal, rows, Budget(WHOLE, print), world.runtime, lambda: None)[0])
        with torch.no_grad():
            for weight in goal.reference.parameters():
                weight.mul_(1.5)
    goal.ahead.clear()
    assert losses[0] != losses[1] == pytest.approx(_moved_once(world, nudged, rows), abs=1e-6)


def _moved_once(world, nudged, rows) -> float:
    goal = objective(world, nudged, dpo)
    with torch.no_grad():
        for weight in goal.reference.parameters():
            weight.mul_(1.5)
        return goal.loss(rows, len(rows))[0].item()


@pytest.mark.parametrize("loss", [tdpo2, simpo])
def test_what_reads_whole_distributions_or_no_reference_reads_nothing_ahead(world, nudged, loss, monkeypatch):
    goal = objective(world, nudged, loss)
    seen = calls(goal.reference) if goal.reference is not None else []
    goal.prepare(world.rows.pairs[:3], Budget(WHOLE, print), world.runtime)
    assert goal.ahead == {} and seen == []


# --- the cache ----------------------------------------------------------------------------------------


def trained(world, nudged, folder, cache: ReferenceCache | None, rows=None) -> tuple[list[Any], list[int]]:
    """Loss and weights after two epochs of DPO, and the passes of its reference."""
    goal = objective(world, nudged, dpo)
    goal.cache = cache
    assert goal.role.backbone.forks and goal.reference.backbone.forks  # tried now, with passes of its own
    seen = calls(goal.reference)
    training = Supervised(lr=1e-3, batch=4, epochs=2)
    log, progress = RunLog(folder), Progress(enabled=False)
    rows = world.rows.pairs[:8] if rows is None else rows
    fit("s", goal, rows, training, seed=0, runtime=world.runtime, log=log, progress=progress)
    return [p.detach() for p in goal.role.parameters()], seen


def test_the_cache_changes_nothing_and_spares_the_second_epoch(world, nudged, tmp_path, monkeypatch):
    plain, passes = trained(world, nudged, tmp_path / "plain", None)
    assert len(passes) == 4  # two steps an epoch
    cache = ReferenceCache(tmp_path / "made" / "reference.safetensors", "one")
    asked: list[int] = []
    monkeypatch.setattr(objectives, "release_memory", lambda: asked.append(1))
    cached, passes = trained(world, nudged, tmp_path / "cached", cache)
    assert len(passes) == len(asked) == 2  # for nothing memory need not be made free
    for a, b in zip(cached, plain, strict=True):
        assert_close(a, b, atol=1e-6, rtol=1e-5)
    cache.save(world.runtime)
    assert [path.name for path in cache.path.parent.iterdir()] == ["reference.safetensors"]

    again = ReferenceCache(cache.path, "one")  # the next run
    assert again.known == cache.known and len(again.known) == 16
    _, passes = trained(world, nudged, tmp_path / "again", again)
    assert passes == []
    _, passes = trained(world, nudged, tmp_path / "other", ReferenceCache(cache.path, "two"))
    assert len(passes) == 2  # another reference


def test_the_cache_knows_the_border_between_prompt_and_answer(tmp_path):
    cache = ReferenceCache(tmp_path / "c", "one")
    values = iter([-1.0, -2.0, -3.0])
    for ids in (([1, 2], [3]), ([1], [2, 3]), ([1, 2], [3, 0])):
        cache.sums([ids], lambda: torch.tensor([next(values)]))
    assert cache.sums([([1], [2, 3]), ([1, 2], [3])], lambda: torch.full((2,), math.nan)).tolist() == [-2.0, -1.0]


@pytest.mark.parametrize(
    ("loss", "message"), [(tdpo2, "reads the reference's whole distribution"), (simpo, "simpo reads no reference")]
)
def test_losses_that_cannot_use_a_cache_refuse_it(world, tmp_path, loss, message):
    reference = world.shop.reference()
    with pytest.raises(ValueError, match=message):
        PairObjective(reference, loss, {}, world.pad, reference, ReferenceCache(tmp_path / "c", "one"))


def test_a_file_that_is_no_cache_is_told(tmp_path):
    path = tmp_path / "c.safetensors"
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match="is no cache of reference log-probs .*: delete it"):
        ReferenceCache(path, "one")


def test_a_fingerprint_is_of_the_weights_that_act(world, nudged):
    plain = fingerprint(world.shop.reference())
    assert fingerprint(world.shop.reference()) == plain
    shop = world.shop_of(lora=Lora(r=4, alpha=8))
    base = fingerprint(shop.reference())
    adapter = shop.new_policy("guide")
    assert fingerprint(shop.reference()) == base  # an adapter that does not act changes nothing
    fresh = fingerprint(adapter)
    nudged(adapter)
    assert fingerprint(shop.reference()) == base
    assert len({fresh, fingerprint(adapter), base}) == 3
    moved = nudged(world.shop.new_policy("guide"))
    assert fingerprint(moved) != plain
