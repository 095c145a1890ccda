"""Rewards from outside that may be missing: dropped, counted, and how many stop the run."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from rto import rewards
from rto.advantages import gae
from rto.numerics import whiten
from rto.policy.rollout import prompts_of
from rto.policy.train import _advantages

TERMINAL = {"type": "terminal", "scale": 1.0, "clip": 10.0}
IMPLICIT = {"type": "implicit", "scale": 0.05, "clip": 0.05}
REINFORCE, NO_KL = {"type": "reinforce"}, {"coef": 0.0}


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_answers_without_a_reward_vanish(world, scores):
    """Rows, signals, values and prompts are those of the whole draw, less the missing ones."""
    config = world.settings()
    whole = world.draw(world.roles(), config, scores("return [1.0 * i for i in range(8)]"))
    terms = scores("return [None if i in (0, 5) else 1.0 * i for i in range(8)]")
    drawn = world.draw(world.roles(), config, terms)
    kept = torch.tensor([1, 2, 3, 4, 6, 7])
    assert drawn.missing == 2 and len(drawn.signals) == len(drawn.asked) == 6
    assert [row.row for row in drawn.asked] == [whole.asked[i].row for i in kept.tolist()]
    assert drawn.group.tolist() == kept.tolist()
    for name in ("mask", "finished", "logprobs", "reference", "function"):
        assert torch.equal(getattr(drawn.signals, name), getattr(whole.signals, name)[kept])
    assert torch.equal(drawn.values, whole.values[kept])
    assert torch.equal(drawn.completions.ids, whole.completions.ids[kept])
    prompt = drawn.completions.prompt
    real = [ids[mask].tolist() for ids, mask in zip(prompt.ids, prompt.mask, strict=True)]
    assert real == [row.ids for row in drawn.asked]

    total, parts = rewards.total(terms, drawn.signals, 0.0)
    advantages, returns = _advantages(config, total, parts["kl"], drawn)
    plain, by_hand = gae(total, drawn.values, drawn.signals.mask)
    assert_close(advantages, whiten(plain, drawn.signals.mask))  # over what is left
    assert torch.equal(returns, by_hand)


def test_metrics_and_the_log_know_what_is_missing(world, tmp_path, scores):
    terms, lengths = scores("return [None, 2.0, 4.0, None, 6.0, 8.0, 10.0, 12.0]"), []

    def truth(asked, completions) -> list[float]:
        lengths.append(completions.lengths.float().mean().item())
        return [float(row.row) for row in asked]

    config = world.settings(max_steps=2, kl=NO_KL)
    rows = world.run(tmp_path / "run", world.roles(), config, terms, oracle=truth)
    for iteration, row in enumerate(rows):
        assert row["missing"] == 0.25
        assert row["reward/total"] == row["reward/function"] == pytest.approx(7.0)
        assert row["length"] == pytest.approx(lengths[iteration])
        asked = [prompt.row for prompt in prompts_of(world.prompts, 8, iteration, 0)]
        assert row["oracle"] == pytest.approx(sum(asked[i] for i in (1, 2, 4, 5, 6, 7)) / 6)


@pytest.mark.parametrize(
    ("body", "allowed", "said"),
    [
        ("return [None] * 3 + [1.0] * 5", 0.25, r"3 of 8 answers have no reward, more than policy.max_missing = 0.25"),
        ("return [None] * 8", 1.0, "8 of 8 answers have no reward, not one is left"),
        ("return [float('nan')] + [1.0] * 7", 1.0, "loop_scores_0:score, row 0: nan is no finite float32"),
        ("return [1.0, [float('inf')] * len(tokens[1])] + [1.0] * 6", 1.0, "row 1, token 0: inf is no finite"),
        ("return [1.0] * 7", 1.0, "loop_scores_0:score gave 7 rewards for 8 answers"),
        ("return [[1.0] * (len(tokens[0]) + 1)] + [1.0] * 7", 1.0, "row 0: .* token rewards for an answer of"),
        ("return 1 / 0", 1.0, "8 of 8 answers have no reward, not one is left"),
    ],
)
def test_a_reward_function_that_fails_stops_the_run(world, tmp_path, scores, body, allowed, said):
    roles = world.roles()
    before = world.weights(roles.policy) + world.weights(roles.critic)
    with pytest.raises(ValueError, match=said):
        world.run(tmp_path / "run", roles, world.settings(max_missing=allowed), scores(body))
    assert equal(before, world.weights(roles.policy) + world.weights(roles.critic))


def test_an_answer_for_which_the_function_raises_is_dropped_and_counted(world, tmp_path, scores, caplog):
    """It raises for the third answer of every batch of eight; alone, for that prompt and answer."""
    third = prompts_of(world.prompts, 8, 0, 0)[2].text
    body = f"return [1 / (p != {third!r}) for p in prompts]"
    rows = world.run(tmp_path / "run", world.roles(), world.settings(max_steps=1), scores(body))
    assert rows[0]["missing"] == 1 / 8 and rows[0]["function_failures"] == 1
    assert "failed: ZeroDivisionError: division by zero (for the answer" in caplog.text


def test_as_many_as_allowed_may_be_missing(world, scores):
    """3 of 10 are not more than 0.3, which float32 thinks."""
    config = world.settings(rollouts=10, batch=10, max_missing=0.3)
    assert world.draw(world.roles(), config, scores("return [None] * 3 + [1.0] * 7")).missing == 3
