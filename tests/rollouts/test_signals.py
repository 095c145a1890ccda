"""What the reader says of answers, against the models' own logits and states, read row by row."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from rto import rewards
from rto.data.chat import PromptRow
from rto.data.collate import collate_completions
from rto.data.rows import make_rows, make_tokenizer
from rto.finite import NotFinite
from rto.models.checkpoint import ScorerNotes
from rto.models.load import scratch_network
from rto.models.role import Backbone, Role
from rto.models.segment import SegmentScorer
from rto.recipe import build
from rto.rewards.normaliser import Normaliser
from rto.rollouts.signals import Reader, Scorer, check_finite, missing
from rto.seeds import global_torch

SEGMENT, TERMINAL, IMPLICIT = {"type": "segment"}, {"type": "terminal"}, {"type": "implicit"}
NOTES = ScorerNotes(mean=0.7, std=2.5, accuracy=1.0, pairs=4)
LINES = Normaliser(w_mu=0.4, b_mu=0.3, w_sigma=0.5, b_sigma=0.9, floor=0.6)
LENGTHS, WIDTH = [7, 1, 8, 2, 5], 8  # the second is its end of sequence alone; the third was cut at the limit
FINISHED = [True, True, False, True, True]


class Counted(Role):
    """Counts its passes."""

    passes = 0

    def hidden(self, completions):
        self.passes += 1
        return super().hidden(completions)


@pytest.fixture(scope="module")
def world():
    scratch = {"type": "scratch", "hidden": 16, "layers": 1, "heads": 2, "intermediate": 16}
    data = {"type": "world", "sft": 4, "pairs": 2, "prompts": 5, "test": 2, "max_response": WIDTH}
    config = build({"model": scratch, "data": data, "evaluation": {"oracle": {"type": "world"}}})
    tokenizer = make_tokenizer(config, None)
    encoder = make_rows(config, tokenizer).encoder
    networks = {}
    for seed, name in enumerate(("reference", "guide", "scorer", "policy", "moving")):
        networks[name] = scratch_network(config.model, tokenizer, encoder.end, seed=seed).eval().requires_grad_(False)
        with global_torch(0, name):
            for p in networks[name].parameters():
                p.mul_(1 + 2 * torch.rand_like(p))  # sharp and flat distributions
    with global_torch(0, "head"):
        head = nn.Linear(16, 1, bias=False).requires_grad_(False)
    draw, words = torch.Generator().manual_seed(0), len(tokenizer)
    prompts = [torch.randint(4, words, (n,), generator=draw).tolist() for n in (3, 6, 1, 4, 2)]
    answers = []
    for length, finished in zip(LENGTHS, FINISHED, strict=True):
        body = [i for i in torch.randint(4, words, (length + 9,), generator=draw).tolist() if i != encoder.end]
        answers.append(body[: length - finished] + [encoder.end] * finished)
    completions = collate_completions(prompts, answers, FINISHED, encoder.pad, width=WIDTH)
    rows = [PromptRow(10 + i, f"prompt {i}", ids) for i, ids in enumerate(prompts)]
    entropy = by_row(networks["reference"], prompts, answers, lambda logp, _: -(logp.exp() * logp).sum(-1))
    return SimpleNamespace(
        networks=networks, head=head, encoder=encoder, completions=completions, rows=rows, prompts=prompts,
        answers=answers, entropy=entropy, cutoff=entropy[completions.mask].median().item() + 1e-3,
    )  # fmt: skip


def by_row(network, prompts, answers, read, temperature: float = 1.0) -> torch.Tensor:
    """``read`` of the log-softmax that predicts each response token, [B, T], one row at a time without padding."""
    out = torch.zeros(len(prompts), WIDTH)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        logits = network(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        out[i, : len(answer)] = read((logits / temperature).log_softmax(-1), torch.tensor(answer))
    return out


def chosen(logp: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    return logp.gather(-1, answer[:, None]).squeeze(-1)


def heads(world) -> torch.Tensor:
    """The scorer at each response token, one row at a time."""
    out = torch.zeros(len(world.prompts), WIDTH)
    for i, (prompt, answer) in enumerate(zip(world.prompts, world.answers, strict=True)):
        states = world.networks["scorer"].model(input_ids=torch.tensor([prompt + answer])).last_hidden_state
        out[i, : len(answer)] = world.head(states)[0, len(prompt) :, 0]
    return out


def ends_of(world, cutoff: float) -> list[list[int]]:
    """The places that end a segment, by the words of the paper: before an unsure token, and at the end of the body."""
    found = []
    for row, (length, finished) in enumerate(zip(LENGTHS, FINISHED, strict=True)):
        body = length - finished
        unsure = [t for t in range(body - 1) if cutoff == 0 or world.entropy[row, t + 1] > cutoff]
        found.append(unsure + [body - 1] * (body > 0))
    return found


def places(ends: torch.Tensor) -> list[list[int]]:
    return [row.nonzero().squeeze(-1).tolist() for row in ends]


def roles_of(world) -> dict[str, Counted]:
    made = {name: Backbone(network, "tiny", None, torch.float32) for name, network in world.networks.items()}
    return {name: Counted(made[name], None, world.head if name == "scorer" else None) for name in made}


def read(world, terms, roles=None, temperature: float = 1.0, budget: int = 10_000, moving=None, **scorer):
    roles = roles or roles_of(world)
    reader = Reader(
        terms, roles["reference"], world.encoder, budget, temperature=temperature, guide=roles["guide"],
        scorer=Scorer(roles["scorer"], **scorer), moving=moving,
    )  # fmt: skip
    logprobs = torch.zeros(len(LENGTHS), WIDTH)
    return reader.read(world.completions, logprobs, roles["policy"], world.rows)


def test_weights_that_the_policy_shares_stay_in_memory(world, monkeypatch):
    left: list[Any] = []
    monkeypatch.setattr("rto.models.mapped.let_go", left.append)
    apart = roles_of(world)
    read(world, [TERMINAL, IMPLICIT], apart)
    assert left == [world.networks[name] for name in ("reference", "guide", "scorer")]
    left.clear()
    shared = {name: Role(apart["policy"].backbone, None, role.head) for name, role in apart.items()}
    read(world, [TERMINAL, IMPLICIT], {**shared, "scorer": apart["scorer"]})
    assert left == [world.networks["scorer"]]


# --- segments -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_segments_end_by_the_references_untempered_entropy(world, temperature):
    found = read(world, [SEGMENT], temperature=temperature, cutoff=world.cutoff)
    expected = ends_of(world, world.cutoff)
    assert places(found["segment_ends"]) == expected
    assert expected[1] == [] and expected[2][-1] == 7  # nothing but an end of sequence: no segment; cut: to the end
    assert 1 < len(expected[0]) < 6  # the cutoff cuts, and not everywhere
    network = world.networks["reference"]
    tempered = by_row(network, world.prompts, world.answers, chosen, temperature)
    assert_close(found["reference"], tempered, atol=1e-5, rtol=0)  # the log-probs are the policy's temperature's


def test_segment_values_stand_at_the_ends(world):
    found = read(world, [SEGMENT], cutoff=world.cutoff)
    assert_close(found["segments"], torch.where(found["segment_ends"], heads(world), 0.0), atol=1e-5, rtol=0)
    assert (found["segments"][1] == 0).all() and "scores" not in found


def test_segments_are_normalised_by_their_location(world):
    found = read(world, [SEGMENT], cutoff=world.cutoff, normaliser=LINES, notes=NOTES)
    values, expected, floored = heads(world), torch.zeros(len(LENGTHS), WIDTH), 0
    for row, ends in enumerate(ends_of(world, world.cutoff)):
        for k, end in enumerate(ends, 1):
            log = math.log(k / len(ends))
            std = 0.5 * log + 0.9
            floored += std < 0.6
            expected[row, end] = (values[row, end] - 0.4 * log - 0.3) / max(std, 0.6)
    assert floored > 0
    assert_close(found["segments"], expected, atol=1e-5, rtol=1e-4)


def test_cutoff_0_reads_every_token_of_the_body(world):
    found = read(world, [SEGMENT], cutoff=0.0)
    assert places(found["segment_ends"]) == ends_of(world, 0.0)
    assert [len(row) for row in ends_of(world, 0.0)] == [6, 0, 8, 1, 4]
    assert_close(found["segments"], torch.where(found["segment_ends"], heads(world), 0.0), atol=1e-5, rtol=0)


def test_a_scorer_of_whole_answers_is_read_at_the_last_token_and_normalised_by_its_notes(world):
    found = read(world, [SEGMENT], cutoff=None, notes=NOTES)
    assert places(found["segment_ends"]) == [[length - 1] for length in LENGTHS]  # the end of sequence too
    raw, values = heads(world), torch.zeros(len(LENGTHS), WIDTH)
    for row, length in enumerate(LENGTHS):
        values[row, length - 1] = (raw[row, length - 1] - 0.7) / 2.5
    assert_close(found["segments"], values, atol=1e-5, rtol=0)
    both = read(world, [SEGMENT, TERMINAL], cutoff=None, notes=NOTES)
    assert torch.equal(both["scores"], both["segments"].sum(-1))


@pytest.mark.parametrize("cutoff", [0.0, "middle"])
def test_the_sentence_score_of_a_segment_scorer_is_the_mean_at_its_ends(world, cutoff):
    cutoff = world.cutoff if cutoff == "middle" else cutoff
    found = read(world, [SEGMENT, TERMINAL], cutoff=cutoff, notes=NOTES, normaliser=LINES)
    raw, ends = heads(world), ends_of(world, cutoff)
    ends[1] = [0]  # an answer without a segment is read at its end of sequence
    mean = torch.stack([raw[row, at].mean() for row, at in enumerate(ends)])
    assert_close(found["scores"], (mean - 0.7) / 2.5, atol=1e-5, rtol=0)
    roles = roles_of(world)
    trained = SegmentScorer(roles["scorer"], roles["reference"] if cutoff else None, cutoff).scores(world.completions)
    assert_close(found["scores"], (trained - 0.7) / 2.5, atol=1e-5, rtol=0)  # what its training reads
    assert_close(found["segments"], read(world, [SEGMENT], cutoff=cutoff, normaliser=LINES)["segments"])


def test_answers_in_micro_batches_are_read_alike(world):
    terms = [SEGMENT, TERMINAL, IMPLICIT]
    whole, alone = (read(world, terms, budget=budget, cutoff=world.cutoff) for budget in (10_000, 1))
    assert set(whole) == set(alone)
    for name, part in whole.items():
        assert_close(alone[name], part, atol=1e-5, rtol=0)


# --- the other roles ----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_guide_reference_and_moving_reference_are_read_at_the_policys_temperature(world, temperature):
    roles = roles_of(world)
    found = read(world, [IMPLICIT], roles, temperature, moving=roles["moving"])
    for name in ("guide", "reference", "moving"):
        expected = by_row(world.networks[name], world.prompts, world.answers, chosen, temperature)
        assert_close(found[name], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("terms", "options", "passes"),
    [
        ([{"type": "length"}], {}, {"reference": 1}),
        ([IMPLICIT], {}, {"reference": 1, "guide": 1}),
        ([IMPLICIT | {"scale": 0.0}, TERMINAL | {"scale": 0.0}, {"type": "length"}], {}, {"reference": 1}),
        ([{"type": "shaped"}, IMPLICIT], {"temperature": 2.0}, {"reference": 1, "guide": 1}),
        ([TERMINAL], {}, {"reference": 1, "scorer": 1}),
        ([TERMINAL], {"cutoff": 0.5}, {"reference": 1, "scorer": 1}),  # one pass gives log-probs and entropy
        ([SEGMENT, TERMINAL], {"cutoff": 0.5}, {"reference": 1, "scorer": 1}),
        ([SEGMENT], {"cutoff": 0.5, "temperature": 2.0}, {"reference": 2, "scorer": 1}),  # another for the cuts
        ([SEGMENT, TERMINAL], {"cutoff": 0.0, "temperature": 2.0}, {"reference": 1, "scorer": 1}),  # cuts everywhere
        ([IMPLICIT], {"cutoff": 0.5, "temperature": 2.0}, {"reference": 1, "guide": 1}),  # nobody reads the scorer
        ([SEGMENT], {"cutoff": None, "temperature": 2.0}, {"reference": 1, "scorer": 1}),
        ([IMPLICIT, TERMINAL], {}, {"reference": 1, "guide": 1, "scorer": 1}),
    ],
)
def test_only_the_roles_that_are_needed_run(world, terms, options, passes):
    roles = roles_of(world)
    found = read(world, terms, roles, **options)
    assert {name: role.passes for name, role in roles.items() if role.passes} == passes
    assert set(found) == {"mask", "finished", "logprobs", "reference"} | (rewards.needs(terms) & set(found))
    assert rewards.needs(terms) <= set(found)


def test_a_policy_that_is_the_reference_needs_no_pass_of_it(world):
    roles = roles_of(world)
    roles["policy"] = roles["reference"]
    found = read(world, [{"type": "length"}], roles)
    assert roles["reference"].passes == 0 and torch.equal(found["reference"], found["logprobs"])
    read(world, [{"type": "length"}], roles, temperature=2.0)
    assert roles["reference"].passes == 1


# --- rewards from outside -----------------------------------------------------------------------------


def test_a_functions_rewards_are_as_wide_as_the_answers_and_none_is_missing(world, tmp_path, monkeypatch):
    (tmp_path / "reader_rewards.py").write_text(
        "def half(prompts, answers, tokens):\n"
        "    assert prompts == [f'prompt {i}' for i in range(5)]\n"
        "    return [[0.5] * len(tokens[0]), None, 8.0, 2, None]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = read(world, [{"type": "function", "function": "reader_rewards:half"}])
    expected = torch.zeros(len(LENGTHS), WIDTH)
    expected[0, :7], expected[2, 7], expected[3, 1] = 0.5, 8.0, 2.0
    expected[1, :1] = expected[4, :5] = math.nan
    assert_close(found["function"], expected, equal_nan=True)
    assert missing(found).tolist() == [False, True, False, False, True]


def test_what_is_missing_excuses_its_own_row_alone(world):
    parts = read(world, [TERMINAL])
    parts["http"] = torch.zeros(5, WIDTH)
    parts["http"][3, :2] = math.nan
    check_finite(parts)
    parts["scores"][3] = math.nan  # nobody will read it
    check_finite(parts)
    parts["reference"][2, 4] = math.inf
    with pytest.raises(
        NotFinite, match=r"^the log-prob of the reference is inf \(row 2, answer, token 4, 1 of 5 rows\)$"
    ):
        check_finite(parts)
