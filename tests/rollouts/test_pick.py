"""One token from its logits: frequencies, edges, log-probs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rto.rollouts.pick import BLOCK, _first_above, pick

PROBS = [0.5, 0.0, 0.3, 0.15, 0.05]


def logits(temperature: float = 1.0) -> Tensor:
    return torch.tensor(PROBS).log() * temperature  # tempered, they have PROBS again


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, PROBS),
        (0.5, 1.0, PROBS),
        (1.0, 0.8, [0.5 / 0.8, 0, 0.3 / 0.8, 0, 0]),
        (1.0, 0.81, [0.5 / 0.95, 0, 0.3 / 0.95, 0.15 / 0.95, 0]),
        (1.0, 0.1, [1.0, 0, 0, 0, 0]),
    ],
)
def test_frequencies_are_the_probabilities(generator, temperature, top_p, expected):
    n = 20_000
    uniform = torch.rand(n, generator=generator)
    tokens, logprobs = pick(logits(temperature).expand(n, -1), uniform, temperature, top_p)
    probs = torch.tensor(expected)
    counts = torch.bincount(tokens, minlength=5).float()
    assert (counts[probs == 0] == 0).all()
    live = probs > 0
    chi_square = ((counts - n * probs)[live] ** 2 / (n * probs[live])).sum().item()
    assert chi_square < 20  # 3 degrees of freedom or fewer: p < 0.0002
    torch.testing.assert_close(logprobs, torch.tensor(PROBS).log()[tokens])  # before top_p


def test_the_edges_of_the_unit_interval():
    """0 takes the first possible token and the largest float below 1 the last, never an impossible one."""
    rows = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]] * 2)
    edges = torch.tensor([0.0, torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)).item()])
    assert pick(rows, edges, 1.0, 1.0)[0].tolist() == [1, 2]
    wide = torch.full((1, 50_000), -20.0)
    wide[0, 40_000:] = -torch.inf
    wide[0, 7] = 0.0
    assert pick(wide, edges[1:], 1.0, 1.0)[0].item() < 40_000


def test_greedy_takes_the_first_of_the_best():
    tokens, logprobs = pick(torch.tensor([[0.0, 2.0, 2.0]]), torch.tensor([0.99]), 0, 1.0)
    assert tokens.tolist() == [1]
    torch.testing.assert_close(logprobs, torch.tensor([0.0, 2.0, 2.0]).log_softmax(0)[1:2])


@pytest.mark.parametrize("words", [1, 5, BLOCK, BLOCK + 1, 3 * BLOCK - 1])
def test_the_running_sum_decides(generator, words):
    """The first word at which the running sum, here in double precision, exceeds the number; blocks change nothing."""
    rows = 2 * torch.randn(64, words, generator=generator)
    uniform = torch.rand(64, generator=generator)
    tokens, logprobs = pick(rows, uniform, 0.7, 1.0)
    exact = (rows.double() / 0.7).log_softmax(-1)
    places = torch.searchsorted(exact.exp().cumsum(-1), uniform.double()[:, None], right=True).squeeze(-1)
    assert tokens.tolist() == places.tolist()
    torch.testing.assert_close(logprobs.double(), exact.gather(-1, tokens[:, None]).squeeze(-1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("possible", [[0], [BLOCK - 1], [BLOCK], [700], [3, 2 * BLOCK, 700]])
def test_blocks_without_a_possible_word_are_passed_over(possible):
    """By all numbers, those of which rounding could reach the end of a block too."""
    rows = torch.full((1, 701), -torch.inf)
    rows[0, possible] = torch.linspace(0.0, 0.1, len(possible))
    uniform = torch.cat([torch.linspace(0, 1, 1001)[:-1], torch.nextafter(torch.ones(1), torch.zeros(1))])
    tokens, logprobs = pick(rows.expand(len(uniform), -1), uniform, 1.0, 1.0)
    assert set(tokens.tolist()) == set(possible) and logprobs.isfinite().all()


def test_no_number_crashes_nothing():
    """It is found where the log-probs are checked, with the row's name."""
    tokens, logprobs = pick(torch.full((2, 600), torch.nan), torch.tensor([0.0, 0.9]), 1.0, 1.0)
    assert ((tokens >= 0) & (tokens < 600)).all() and logprobs.isnan().all()


def test_rounding_never_reaches_a_word_without_probability():
    """A number so near to 1 that its product with the sum is the sum: the last word that has any is taken."""
    assert _first_above(torch.tensor([[0.25, 1.0, 1.0], [0.0, 0.5, 0.5]]), torch.tensor([1.0, 0.5])).tolist() == [1, 1]
