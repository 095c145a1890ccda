"""Scored answers: ragged groups, KTO's mismatched pairs, and micro-batches that change nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rto.config import Lora, Supervised
from rto.data.chat import ScoredRow
from rto.data.collate import collate_completions
from rto.data.rows import scored_from_pairs
from rto.models.memory import Budget
from rto.models.role import Role
from rto.models.runtime import Runtime
from rto.numerics import masked_sum
from rto.preferences import dpo, kto, mppo
from rto.preferences.cache import ReferenceCache
from rto.preferences.groups import GroupObjective, ordered, pair_scores
from rto.preferences.train import evaluate, fit, gradients, objective_for, reads_groups
from rto.report.log import Progress, RunLog, read_metrics

WHOLE, ALONE = 1_000_000, 1  # micro_tokens: the batch in one pass, and a row a pass


@pytest.fixture(scope="module")
def groups(world) -> list[ScoredRow]:
    """Eight prompts with 1, 2, 3, 1, ... answers."""
    pairs, rows = world.rows.pairs, []
    for i, size in enumerate((1, 2, 3, 1, 2, 3, 1, 2)):
        answers = [pairs[(i + k) % 8].rejected if k else pairs[i].chosen for k in range(size)]
        scores = [1.0, 0.0, 0.3][:size] if i != 3 else [0.0]
        rows.append(ScoredRow(pairs[i].row, pairs[i].prompt_text, pairs[i].prompt, answers, [True] * size, scores))
    return rows


def objective(world, nudged, loss: Any = kto, lora: bool = False, **options: Any) -> GroupObjective:
    """A fresh objective whose policy is not its reference: the same weights every time."""
    shop = world.shop_of(lora=Lora(r=4, alpha=8)) if lora else world.shop
    reference = shop.reference()
    goal = objective_for(nudged(shop.new_policy("guide")), loss, options, world.pad, reference)
    assert isinstance(goal, GroupObjective)
    return goal


@torch.no_grad()
def logprob(role: Role, prompt: list[int], answer: list[int]) -> float:
    """Of one answer, alone."""
    batch = collate_completions([prompt], [answer], [True], 0)
    return masked_sum(role.logprobs(batch)[0], batch.mask).item()


def grads(goal: GroupObjective) -> list[Tensor]:
    found = [p.grad for p in goal.role.parameters() if p.grad is not None]
    assert found
    return found


# --- what is read -------------------------------------------------------------------------------------


def test_ragged_groups_are_read_answer_by_answer(world, nudged, groups):
    goal = objective(world, nudged)
    goal.baseline = 0.25
    with torch.no_grad():
        read = goal._read(groups[:4])
    assert read["there"].tolist() == [[True, False, False], [True, True, False], [True] * 3, [True, False, False]]
    assert read["scores"].tolist() == torch.tensor([[1, 0, 0], [1, 0, 0], [1, 0, 0.3], [0, 0, 0]]).tolist()
    assert read["baseline"].tolist() == [0.25] * 4
    for i, row in enumerate(groups[:4]):
        for n, answer in enumerate(row.answers):
            assert read["lengths"][i, n] == len(answer)
            assert read["logprobs"][i, n].item() == pytest.approx(logprob(goal.role, row.prompt, answer), abs=1e-4)
            assert read["reference"][i, n].item() == pytest.approx(
                logprob(goal.reference, row.prompt, answer), abs=1e-4
            )
        assert (read["logprobs"][i, len(row.answers) :] == 0).all()


def test_the_loss_by_hand(world, nudged, groups):
    """KTO, answer by answer, with the baseline of the batch."""
    goal, rows = objective(world, nudged, beta=0.5), groups[:3]
    value, sums = gradients(goal, rows, Budget(WHOLE, print), world.runtime, goal.role.backbone.network.zero_grad)

    def ratio(prompt: list[int], answer: list[int]) -> float:
        return logprob(goal.role, prompt, answer) - logprob(goal.reference, prompt, answer)

    following = ((rows[0], rows[1]), (rows[1], rows[2]), (rows[2], rows[0]))
    mismatched = [ratio(row.prompt, answer) for row, other in following for answer in other.answers]
    assert len(mismatched) == 6
    baseline = sum(mismatched) / 6
    assert sums["baseline"] / 3 == pytest.approx(baseline, abs=1e-4) and baseline != 0
    z, total = max(0.0, baseline), 0.0
    for row in rows:
        each = []
        for answer, score in zip(row.answers, row.scores, strict=True):
            sign = 1 if score > 0.5 else -1
            each.append(1 - torch.tensor(sign * 0.5 * (ratio(row.prompt, answer) - z)).sigmoid().item())
        total += sum(each) / len(each)
    assert value == pytest.approx(total / 3, abs=1e-4)


def test_the_baseline_has_no_gradient(world, nudged, groups):
    goal, other = objective(world, nudged), objective(world, nudged)
    gradients(goal, groups, Budget(WHOLE, print), world.runtime, goal.role.backbone.network.zero_grad)
    other.prepare(groups, Budget(WHOLE, print), world.runtime)
    assert isinstance(other.baseline, float) and goal.baseline == pytest.approx(other.baseline)
    other.loss(groups, len(groups))[0].backward()
    for a, b in zip(grads(goal), grads(other), strict=True):
        assert_close(a, b)


class Part(Runtime):
    """One of two processes, which writes down what it would add to the other's."""

    def __init__(self, rank: int) -> None:
        super().__init__("cpu")
        self.rank, self.world = rank, 2

    def sum(self, values: dict[str, float]) -> dict[str, float]:
        self.said = values
        return values


def test_the_baseline_of_two_processes_adds_up(world, nudged, groups):
    goal = objective(world, nudged)
    goal.prepare(groups, Budget(WHOLE, print), world.runtime)
    whole, parts = goal.baseline, [Part(0), Part(1)]
    for part in parts:
        goal.prepare(groups, Budget(WHOLE, print), part)
    assert whole is not None
    assert sum(part.said["total"] for part in parts) / 15 == pytest.approx(whole, abs=1e-5)  # 15 answers


# --- cutting and padding ------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(("loss", "options"), [(kto, {}), (mppo, {}), (mppo, {"variant": "mcs"})])
def test_one_batch_of_eight_equals_eight_of_one(world, nudged, groups, loss, options, lora):
    whole, alone = (objective(world, nudged, loss, lora, **options) for _ in range(2))
    value, sums = gradients(whole, groups, Budget(WHOLE, print), world.runtime, whole.role.backbone.network.zero_grad)
    value_alone, sums_alone = gradients(
        alone, groups, Budget(ALONE, print), world.runtime, alone.role.backbone.network.zero_grad
    )
    assert value_alone == pytest.approx(value, abs=1e-5)
    assert sums_alone == pytest.approx(sums, abs=1e-4)
    for a, b in zip(grads(whole), grads(alone), strict=True):
        assert_close(a, b, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("loss", [kto, mppo])
def test_padding_adds_nothing(world, nudged, groups, loss):
    goal = objective(world, nudged, loss)
    goal.baseline = 0.1
    with torch.no_grad():
        both = goal.loss(groups[:3], 3)[0]
        assert_close(both, sum(goal.loss([row], 3)[0] for row in groups[:3]))
        goal.pad = 7  # what stands in the padding is never read
        assert torch.equal(goal.loss(groups[:3], 3)[0], both)


def test_sizes_count_every_answer_with_its_prompt(world, nudged, groups):
    goal, row = objective(world, nudged), groups[2]
    assert goal.size(row) == 3 * (len(row.prompt) + max(map(len, row.answers)))
    assert goal.weight(row) == 1


# --- batches of one row -------------------------------------------------------------------------------


def train(world, goal: GroupObjective, rows: list[ScoredRow], folder, **settings: Any) -> list[dict[str, Any]]:
    training = Supervised.model_validate({"lr": 1e-3, "batch": 4, **settings})
    log, progress = RunLog(folder), Progress(enabled=False)
    fit("s", goal, rows, training, seed=0, runtime=world.runtime, log=log, progress=progress, held_out=rows[:3])
    return read_metrics(folder)


def test_a_first_batch_of_one_row_is_refused(world, nudged, groups, tmp_path):
    with pytest.raises(ValueError, match="prefer.batch to 2 or more"):
        train(world, objective(world, nudged), groups, tmp_path, batch=1)
    assert train(world, objective(world, nudged, mppo), groups, tmp_path, batch=1)  # it reads no baseline


def test_the_rest_of_one_row_keeps_the_baseline_before(world, nudged, groups, tmp_path):
    logged = train(world, objective(world, nudged), groups[:5], tmp_path)
    assert len(logged) == 2
    assert logged[1]["baseline"] == logged[0]["baseline"]
    assert {"accuracy", "margin", "reward", "eval_loss", "eval_baseline"} <= set(logged[1])


def test_a_baseline_for_each_evaluation(world, nudged, groups):
    goal = objective(world, nudged)
    budget = Budget(WHOLE, print)
    goal.prepare(groups, budget, world.runtime)
    trained = goal.baseline
    found = evaluate(goal, groups[:3], Supervised(), world.runtime)
    assert goal.baseline == trained  # a rest of one row would train on it
    goal.prepare(groups[:3], budget, world.runtime)
    assert found["baseline"] == pytest.approx(goal.baseline, abs=1e-5) and goal.baseline != trained


def test_training_learns_its_rows(world, groups, nudged, tmp_path):
    rows = scored_from_pairs(world.rows.pairs[:8])
    goal = objective(world, lambda role: role)
    logged = train(world, goal, rows, tmp_path, batch=8, lr=3e-2, epochs=20)
    assert logged[0]["loss"] == pytest.approx(0.5) and logged[0]["accuracy"] == 0.5  # the policy is the reference
    assert logged[-1]["loss"] < 0.3
    assert logged[-1]["accuracy"] == 1.0 and logged[-1]["margin"] > 0


# --- metrics ------------------------------------------------------------------------------------------


def test_ordered_pairs_by_hand():
    """Three answers with a tie, a desirable one alone, an undesirable one alone, and two of equal score."""
    reward = torch.tensor([[5.0, 2.0, 3.0], [1.5, 0.0, 0.0], [1.5, 0.0, 0.0], [1.0, 2.0, 0.0]])
    scores = torch.tensor([[2.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    there = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 0, 0], [1, 1, 0]]).bool()
    gaps, counted = ordered(reward, scores, there, 0.5)
    assert gaps[counted].tolist() == [3.0, 2.0, 1.5, -1.5]
    assert counted.sum((1, 2)).tolist() == [2, 1, 1, 0]


def test_metrics_by_hand(world, nudged, groups):
    goal = objective(world, nudged, beta=0.5)
    read = {
        "logprobs": torch.tensor([[-1.0, -4.0, -2.0], [-3.0, 0.0, 0.0]]),
        "reference": torch.tensor([[-2.0, -2.0, -3.0], [-5.0, 0.0, 0.0]]),  # ratios 1, -2, 1 and 2
        "scores": torch.tensor([[3.0, 2.0, 1.0], [0.0, 0.0, 0.0]]),
        "there": torch.tensor([[True, True, True], [True, False, False]]),
        "baseline": torch.tensor([0.25, 0.25]),
    }
    # Row one, by score: 1 > -2 right, 1 = 1 a coin toss, -2 > 1 wrong. Row two: undesirable, and its reward is above 0.
    expected = {
        "accuracy": (1 + 0.5 + 0) / 3 + 0,
        "margin": 0.5 * ((3 + 0 - 3) / 3 - 2),
        "reward": 0.5 * (0 + 2),
        "baseline": 0.5,
    }
    assert goal._sums(read) == pytest.approx(expected)


# --- which objective, and the cache -------------------------------------------------------------------


def test_the_loss_decides_what_a_row_is():
    assert reads_groups(kto) and reads_groups(mppo) and not reads_groups(dpo)


@pytest.mark.parametrize(
    ("loss", "options", "scores"),
    [
        (kto, {}, (1.0, 0.0)),
        (kto, {"desirable_above": 5.0}, (5.5, 4.5)),
        (kto, {"desirable_above": -1.0}, (-0.5, -1.5)),
        (mppo, {}, (10.0, 0.0)),
        (mppo, {"variant": "point_mse", "full_score": 0.5}, (0.5, 0.0)),
    ],
)
def test_scores_of_pairs_by_hand(loss, options, scores):
    assert pair_scores(loss, options) == scores


def test_a_loss_without_a_reference_gets_none(world, nudged):
    assert objective(world, nudged, mppo).reference is None


def test_the_cache_spares_the_reference(world, nudged, groups, tmp_path):
    """All but the mismatched pairs, which are others in each epoch."""
    plain, goal = objective(world, nudged), objective(world, nudged)
    goal.cache = ReferenceCache(tmp_path / "c.safetensors", "one")
    expected = gradients(plain, groups, Budget(WHOLE, print), world.runtime, plain.role.backbone.network.zero_grad)
    seen: list[int] = []
    goal.reference.backbone.body.register_forward_hook(lambda *_: seen.append(1))
    for passes in (2, 3):  # mismatched and own pairs, then mismatched ones
        value, sums = gradients(goal, groups, Budget(WHOLE, print), world.runtime, goal.role.backbone.network.zero_grad)
        assert (value, sums) == (pytest.approx(expected[0]), pytest.approx(expected[1], abs=1e-5))
        assert len(seen) == passes
    short = [replace(groups[0], prompt=groups[1].prompt)]
    with torch.no_grad():
        goal._read(short)
    assert len(seen) == 4  # another prompt is another key


def test_answers_are_known_by_their_ids(world, nudged, groups):
    goal = objective(world, nudged)
    assert goal.ids(groups) == goal.answers(groups).ids
