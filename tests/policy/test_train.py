"""The RL loop on a model of 16 dimensions: exact identities, invariances, metrics by hand, loud failures."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from rto import rewards
from rto.advantages import gae
from rto.batch import Completions, Prompts, Signals
from rto.finite import NotFinite
from rto.models.checkpoint import ScorerNotes
from rto.models.memory import Budget
from rto.optim import Optimizer
from rto.policy.metrics import reward_metrics
from rto.policy.rollout import Draw, prompts_of
from rto.policy.train import _advantages
from rto.policy.update import Buffer, Learner, update
from rto.report.log import read_metrics, read_samples

TERMINAL: dict[str, Any] = {"type": "terminal", "scale": 1.0, "clip": 10.0}
IMPLICIT: dict[str, Any] = {"type": "implicit", "scale": 0.05, "clip": 0.05}
PPO, RTO = [TERMINAL], [IMPLICIT, TERMINAL]


# --- identities ---------------------------------------------------------------------------------------


def test_rto_without_its_dense_term_is_ppo_to_the_bit(world, tmp_path):
    config = world.settings(rollouts=8, batch=4, updates=2)
    off = [IMPLICIT | {"scale": 0.0}, TERMINAL]
    plain, dense = world.roles(guide=None), world.roles(guide=None)  # no guide, so no pass of it
    first, second = world.run(tmp_path / "ppo", plain, config, PPO), world.run(tmp_path / "rto", dense, config, off)
    assert first == second
    assert len(first) == 2
    for name in ("policy", "critic"):
        assert_close(world.weights(getattr(plain, name)), world.weights(getattr(dense, name)), rtol=0, atol=0)

    full = world.roles()
    third = world.run(tmp_path / "full", full, config, RTO)
    assert third[0]["length"] == first[0]["length"]  # the same draws
    assert any((a != b).any() for a, b in zip(world.weights(full.policy), world.weights(plain.policy), strict=True))


def test_the_first_minibatch_has_ratio_one(world, tmp_path):
    for row in world.run(tmp_path, world.roles(), world.settings(updates=1, max_steps=3), RTO):
        assert row["policy/clip_share"] == 0.0
        assert row["policy/moved"] == 0.0
        assert 0 <= row["policy/sampler_gap"] < 1e-5
        assert row["policy/loss"] == pytest.approx(0.0, abs=2.0)


def test_later_minibatches_see_a_policy_that_moved(world, tmp_path):
    row = world.run(tmp_path, world.roles(), world.settings(updates=2, max_steps=1, lr=1e-2), RTO)[0]
    assert row["policy/moved"] != 0.0
    assert row["policy/sampler_gap"] < 1e-5  # of the first minibatch only


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_sampling_and_scoring_use_one_temperature(world, tmp_path, temperature):
    row = world.run(tmp_path, world.roles(), world.settings(temperature=temperature, max_steps=1), RTO)[0]
    assert row["policy/sampler_gap"] < 1e-5
    assert row["kl"] == pytest.approx(0.0, abs=1e-4)  # policy and reference are still one model


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_micro_batches_change_nothing(world, reduction):
    config = world.settings(rollouts=8, batch=4, updates=2, reduction=reduction)
    found = []
    drawn = world.draw(world.roles(), config, RTO)
    signals, completions = drawn.signals, drawn.completions
    total, parts = rewards.total(RTO, signals, 0.1)
    advantages, returns = _advantages(config, total, parts["kl"], drawn)
    buffer = Buffer(
        completions,
        signals.logprobs,
        signals.reference,
        drawn.values,
        advantages,
        returns,
        total.sum(-1),
        drawn.group,
        torch.arange(len(drawn.asked)),
    )
    assert len(set(completions.lengths.tolist())) > 1
    for micro_tokens in (1_000_000, 1):
        roles = world.roles()
        cut = config.model_copy(update={"micro_tokens": micro_tokens})
        learner = Learner(
            roles.policy,
            Optimizer(roles.policy.parameters(), cut, cut.lr, 4),
            Budget(micro_tokens, print),
            roles.critic,
            Optimizer(roles.critic.parameters(), cut, cut.critic.lr, 4),
        )
        metrics = update(learner, buffer, cut, 0.1, 0, 0, world.runtime)
        found.append((metrics, world.weights(roles.policy) + world.weights(roles.critic)))
    (whole, after_whole), (alone, after_alone) = found
    assert alone == pytest.approx(whole, abs=1e-5)
    for a, b in zip(after_whole, after_alone, strict=True):
        assert_close(a, b, atol=1e-5, rtol=0)
    start = world.weights(world.roles().policy)
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(start, after_whole, strict=False))


def test_rollouts_do_not_depend_on_micro_batches(world):
    one, other = (world.draw(world.roles(), world.settings(micro_tokens=micro), RTO) for micro in (1_000_000, 1))
    assert torch.equal(one.completions.ids, other.completions.ids)
    assert_close(one.signals.guide, other.signals.guide, atol=1e-5, rtol=0)
    assert_close(one.signals.scores, other.signals.scores, atol=1e-5, rtol=0)
    assert_close(one.values, other.values, atol=1e-5, rtol=0)


# --- metrics by hand ----------------------------------------------------------------------------------


def test_reward_metrics_by_hand():
    mask = torch.tensor([[True, True, True], [True, True, False]])
    signals = Signals(
        mask=mask,
        finished=torch.tensor([True, False]),
        logprobs=torch.tensor([[-1.0, -1.0, -1.0], [-1.0, -1.0, 0.0]]),
        reference=torch.tensor([[-1.5, -1.0, -2.0], [-1.0, -3.0, 0.0]]),
        guide=torch.tensor([[-0.5, -3.0, -2.0], [-1.5, -2.0, 0.0]]),
        scores=torch.tensor([3.0, -1.0]),
    )
    # guide - reference = 1, -2, 0 and -0.5, 1; halved and held within 0.4: 0.4, -0.4, 0 and -0.25, 0.4
    # scores held within 2: 2 and -1;  KL: 0.5 + 0 + 1 = 1.5 and 0 + 2 = 2, times -0.1
    terms = [{"type": "implicit", "scale": 0.5, "clip": 0.4}, {"type": "terminal", "scale": 1.0, "clip": 2.0}]
    total, parts = rewards.total(terms, signals, 0.1)
    found = reward_metrics(terms, signals, total, parts)
    mass = 1.45 + 3 + 0.35
    assert found == pytest.approx(
        {
            "reward/total": ((0.0 + 2 - 0.15) + (0.15 - 1 - 0.2)) / 2,
            "reward/implicit": (0.0 + 0.15) / 2,
            "reward/terminal": (2 - 1) / 2,
            "reward/kl": (-0.15 - 0.2) / 2,
            "reward_share/implicit": 1.45 / mass,
            "reward_share/terminal": 3 / mass,
            "reward_share/kl": 0.35 / mass,
            "reward_clip_share/implicit": 3 / 4,  # of the tokens with a log-ratio
            "reward_clip_share/terminal": 1 / 2,
            "reward_length_correlation/implicit": -1.0,  # two answers: the longer has less
            "reward_length_correlation/terminal": 1.0,
            "reward_length_correlation/kl": 1.0,
            "kl": (1.5 + 2) / 2,
            "kl_per_token": 3.5 / 5,
            "length": 2.5,
            "finished": 0.5,
        },
        abs=1e-6,
    )


def test_two_terms_of_one_type_have_a_clip_share_each():
    ones = torch.ones(2, 3)
    mask = ones.bool()
    signals = Signals(mask, mask[:, 0], 0 * ones, 0 * ones, guide=ones)
    terms = [{"type": "implicit", "scale": 1.0, "clip": 0.5}, {"type": "implicit", "scale": 1.0, "clip": 2.0}]
    total, parts = rewards.total(terms, signals, 0.0)
    found = reward_metrics(terms, signals, total, parts)
    assert found["reward_clip_share/implicit"] == 1.0
    assert found["reward_clip_share/implicit_1"] == 0.0
    assert found["reward_length_correlation/implicit"] == 0.0  # lengths do not vary


def test_the_metrics_of_a_training_are_its_terms(world, tmp_path):
    row = world.run(tmp_path, world.roles(), world.settings(max_steps=1), RTO, oracle=lambda p, c: [2.0] * len(p))[0]
    for term in ("implicit", "terminal", "kl"):
        assert {f"reward/{term}", f"reward_share/{term}", f"reward_length_correlation/{term}"} <= set(row)
    assert row["reward/total"] == pytest.approx(sum(row[f"reward/{t}"] for t in ("implicit", "terminal", "kl")))
    assert sum(row[f"reward_share/{term}"] for term in ("implicit", "terminal", "kl")) == pytest.approx(1.0)
    assert row["oracle"] == 2.0
    assert all(math.isfinite(value) for value in row.values() if not isinstance(value, str))
    samples = read_samples(tmp_path)
    assert len(samples) == 2
    assert samples[0]["prompt"] == prompts_of(world.prompts, 8, 0, 0)[0].text


# --- the KL coefficient -------------------------------------------------------------------------------


@pytest.mark.parametrize(("unit", "key"), [("sequence", "kl"), ("token", "kl_per_token")])
@pytest.mark.parametrize("target", [0.01, 1e6])
def test_the_adaptive_coefficient_moves(world, tmp_path, unit, key, target):
    kl = {"coef": 0.1, "controller": "adaptive", "target": target, "unit": unit, "horizon": 100}
    roles = world.roles(reference=world.moved(world.shop.reference(), "reference", 0.2))
    first, second = world.run(tmp_path, roles, world.settings(kl=kl), RTO)
    assert first["kl"] > 0.01 * 10
    error = 0.2 if target == 0.01 else -0.2
    assert first["kl_coef"] == 0.1
    assert second["kl_coef"] == pytest.approx(0.1 * (1 + error * 8 / 100))
    assert min(max(first[key] / target - 1, -0.2), 0.2) == pytest.approx(error)


def test_the_unit_of_the_target_counts(world, tmp_path):
    def coefficients(unit: str, target: float) -> tuple[dict[str, Any], dict[str, Any]]:
        roles = world.roles(reference=world.moved(world.shop.reference(), "reference", 0.2))
        kl = {"coef": 0.1, "controller": "adaptive", "target": target, "unit": unit, "horizon": 100}
        first, second = world.run(tmp_path / f"{unit}-{target}", roles, world.settings(kl=kl), RTO)
        return first, second

    first, _ = coefficients("sequence", 1.0)
    assert 0 < first["kl_per_token"] < first["kl"]
    between = math.sqrt(first["kl_per_token"] * first["kl"])
    assert coefficients("sequence", between)[1]["kl_coef"] > 0.1
    assert coefficients("token", between)[1]["kl_coef"] < 0.1


def test_a_fixed_coefficient_stays(world, tmp_path):
    rows = world.run(tmp_path, world.roles(), world.settings(max_steps=3), PPO)
    assert [row["kl_coef"] for row in rows] == [0.01] * 3


# --- what is not finite -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "quantity"),
    [
        ("policy", "log-prob"),
        ("reference", "log-prob"),
        ("guide", "log-prob"),
        ("scorer", "score"),
        ("critic", "value"),
    ],
)
def test_a_role_that_is_not_finite_is_named_before_anything_moves(world, tmp_path, role, quantity):
    roles = world.roles()
    with torch.no_grad():
        getattr(roles, role).parameters()[0].fill_(math.nan)
    before = world.weights(roles.policy) + world.weights(roles.critic)
    row = prompts_of(world.prompts, 8, 0, 0)[0].row
    said = (
        rf"^the {quantity} of the {role} is nan \(data row {row}, answer, token 0, .* rows: the weights are suspect\)$"
    )
    with pytest.raises(FloatingPointError, match=said):
        world.run(tmp_path, roles, world.settings(), RTO)
    assert_close(world.weights(roles.policy) + world.weights(roles.critic), before, rtol=0, atol=0, equal_nan=True)
    assert read_metrics(tmp_path) == []


def test_the_row_that_is_not_finite_is_named(world):
    config = world.settings()
    roles = world.roles()
    ids = world.draw(roles, config, RTO).completions.ids
    asked = {token for row in prompts_of(world.prompts, 8, 0, 0) for token in row.ids}
    fresh = [
        (i, token) for i in range(1, 8) for token in ids[i].tolist() if token not in ids[:i] and token not in asked
    ]
    odd, word = fresh[0]
    assert roles.scorer is not None
    with torch.no_grad():
        roles.scorer.parameters()[0][word] = math.inf  # the embedding of one word
    with pytest.raises(NotFinite, match="^the score of the scorer is") as caught:
        world.draw(roles, config, RTO)
    found = caught.value.culprit
    assert (found.row, found.part) == (odd, "answer")
    assert found.token is not None and found.token <= ids[odd].tolist().index(word)  # attention: 0 times inf before it


# --- prompts, advantages, normaliser ------------------------------------------------------------------


def test_every_prompt_once_an_epoch(world):
    prompts = world.prompts[:10]
    stream = [row.row for iteration in range(5) for row in prompts_of(prompts, 6, iteration, seed=3)]
    epochs = [stream[i : i + 10] for i in range(0, 30, 10)]
    assert all(sorted(epoch) == sorted(row.row for row in prompts) for epoch in epochs)
    assert epochs[0] != epochs[1]
    again = [row.row for row in prompts_of(prompts, 30, 0, seed=3)]
    assert again == stream  # one stream, however it is cut
    assert [row.row for row in prompts_of(prompts, 30, 0, seed=4)] != stream


@pytest.mark.parametrize(("epochs", "iterations"), [(0.1, 1), (1, 2), (1.25, 3), (2, 4)])
def test_epochs_count_prompts(world, tmp_path, epochs, iterations):
    config = world.settings(epochs=epochs, max_steps=None)  # 16 prompts in eights
    assert len(world.run(tmp_path, world.roles(guide=None), config, PPO)) == iterations


def test_advantages_are_whitened_over_the_buffer(world):
    mask = torch.tensor([[True, True, True], [True, False, False]])
    reward, values = torch.tensor([[0.0, 1.0, 2.0], [4.0, 9.0, 9.0]]), torch.tensor([[1.0, 0.5, 0.0], [1.0, 9.0, 9.0]])
    signals = Signals(mask, mask[:, 0], 0 * reward, 0 * reward)
    group, ids = torch.arange(2), torch.zeros(2, 3, dtype=torch.long)
    completions = Completions(Prompts(ids, mask), ids, mask, mask[:, 0])
    drawn = Draw([], completions, signals, values, group, 0 * reward, 0)
    raw, returns = gae(reward, values, mask, gamma=1.0, lam=0.5)
    config = world.settings(advantage={"type": "gae", "gamma": 1.0, "lam": 0.5})
    white, same = _advantages(config, reward, 0 * reward, drawn)
    assert torch.equal(same, returns)
    inside = raw[mask]
    assert_close(white[mask], (inside - inside.mean()) / inside.std(correction=0))
    assert white[mask].mean().item() == pytest.approx(0.0, abs=1e-6)
    assert (white[~mask] == 0).all()
    plain, _ = _advantages(config.model_copy(update={"whiten": False}), reward, 0 * reward, drawn)
    assert torch.equal(plain, raw)


def test_scores_are_normalised_by_the_notes(world):
    config = world.settings()
    raw = world.draw(world.roles(), config, RTO).signals.scores
    noted = world.draw(world.roles(notes=ScorerNotes(mean=2.0, std=0.5, accuracy=1.0, pairs=4)), config, RTO).signals
    assert raw is not None
    assert raw.std() > 0
    assert_close(noted.scores, (raw - 2.0) / 0.5)


def test_no_scorer_no_scores(world):
    signals = world.draw(world.roles(scorer=None), world.settings(), [IMPLICIT]).signals
    assert signals.scores is None
    assert signals.guide is not None
