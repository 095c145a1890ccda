"""The tiny world: hand-worked rewards, a proper token reward, answers that must lose, exact preferences."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from rto.config import World
from rto.data.worlds import (
    DOMAINS,
    FOLLOWS,
    FUNCTION_WORDS,
    KINDS,
    preference,
    token_rewards,
    world_answer,
    world_prompts,
    world_reward,
    world_rows,
    world_tokenizer,
)

HOTEL = "a review of the hotel :"
BEST = (
    "the hotel was very clean , the bed is so cozy and the sofa felt really quiet "
    "and our shower seemed quite warm . <eos>"
)  # 25 tokens


def rewards(text: str, finished: bool = True, prompt: str = HOTEL) -> list[float]:
    return token_rewards(prompt, text.split(), finished)


def total(text: str, finished: bool = True) -> float:
    return world_reward(HOTEL, text.split(), finished)


@pytest.fixture(scope="module")
def answers() -> list[tuple[str, list[str]]]:
    rng = random.Random(0)
    return [(prompt, world_answer(prompt, rng)) for prompt in world_prompts(2000, rng)]


# The end after "." is worth 0.5 - 0.7 = -0.2; elsewhere -1 - 0.7 = -1.7; short answers pay 2 more.
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the bed was clean . <eos>", [0, 0, 0, 0.8, 0, -0.2]),
        ("the bed was very clean . <eos>", [0, 0, 0, 0, 0.8 + 0.3, 0, -0.2]),
        ("the bed was very dirty . <eos>", [0, 0, 0, 0, -0.8, 0, -0.2]),
        ("overall the bed was basic today . <eos>", [0, 0, 0, 0, 0, 0, 0, -0.2]),
        ("the soup was very tasty . <eos>", [0, -0.4, 0, 0, -0.4, 0, -0.2]),  # another domain
        ("the villa was very loud . <eos>", [0, -0.4, 0, 0, -0.8, 0, -0.2]),  # another topic; loud is bad for a room
        (
            "the bed was very clean and the bed was very clean and the bed <eos>",
            [0, 0, 0, 0, 1.1, 0, 0, -0.5, 0, -0.5, 1.1 - 0.5, 0, 0, -1.0, -1.7],
        ),
        ("the bed was clean clean cozy <eos>", [0, 0, 0, 0.8, -1 + 0.8 - 0.5, -1 + 0.8, -1.7]),
        ("<unk> bed was review . <eos>", [-1.5, -1, 0, -1.5, -1, -0.2]),
        ("<eos>", [-1.7 - 2]),
        (". <eos>", [-1, -0.2 - 2]),
        ("clean . <eos>", [-1 + 0.8, 0, -0.2 - 2]),
    ],
)
def test_rewards_by_hand(text: str, expected: list[float]):
    assert rewards(text) == pytest.approx(expected)


def test_cut_answers_pay_at_their_last_token():
    assert rewards("the bed was clean", finished=False) == pytest.approx([0, 0, 0, 0.8 - 3])
    assert token_rewards(HOTEL, [], False) == []


def test_tokens_after_the_twentieth_cost():
    free, paid = rewards(BEST)[:20], rewards(BEST)[20:]
    assert sum(free) == pytest.approx(3 * 1.1)
    assert paid == pytest.approx([-0.2, -0.2, 1.1 - 0.2, -0.2, -0.2 - 0.2])
    assert total(BEST) == pytest.approx(4 * 1.1 - 0.2 - 5 * 0.2)


def test_the_prompt_decides_what_is_good():
    text = "the screen was loud . <eos>"
    assert rewards(text, prompt="a review of the speaker :")[3] == pytest.approx(0.8)
    assert rewards(text, prompt=HOTEL)[3] == pytest.approx(-0.8)
    assert rewards(text, prompt="how was the soup ?")[3] == pytest.approx(-0.4)


def test_a_reward_reads_its_prefix_only(answers):
    rng = random.Random(1)
    for prompt, words in answers[:300]:
        full = token_rewards(prompt, words, True)
        cut = rng.randrange(len(words))
        suffix = rng.choices([word for word in KINDS if word != "<eos>"], k=rng.randrange(1, 9))
        assert token_rewards(prompt, [*words[:cut], *suffix], False)[:cut] == full[:cut]
        assert token_rewards(prompt, [*words[:cut], "<eos>"], True)[:cut] == full[:cut]


@pytest.mark.parametrize(
    ("words", "finished"),
    [(["the"], True), ([], True), (["the", "<eos>"], False), (["<eos>", "the"], True), (["<eos>", "<eos>"], True)],
)
def test_a_misplaced_end_is_refused(words: list[str], finished: bool):
    with pytest.raises(ValueError, match="<eos>"):
        token_rewards(HOTEL, words, finished)


def test_a_foreign_prompt_is_refused():
    with pytest.raises(ValueError, match="world_prompts"):
        token_rewards("a review of the moon :", ["<eos>"], True)
    with pytest.raises(ValueError, match="world_prompts"):
        world_answer("", random.Random(0))


def test_totals_are_centred_and_of_order_one(answers):
    totals = [world_reward(prompt, words, True) for prompt, words in answers]
    assert abs(statistics.mean(totals)) < 0.15
    assert 1.0 < statistics.pstdev(totals) < 1.5
    assert max(totals) <= total(BEST) + 1e-9


def test_answers_have_the_stated_length_and_defects_are_rare(answers):
    assert {8, 30} <= {len(words) for _, words in answers} <= set(range(8, 31))
    unstopped = sum(words[-2] != "." for _, words in answers)
    assert 0.02 < unstopped / len(answers) < 0.08
    legal = sum(
        all(KINDS[b] in FOLLOWS[KINDS[a]] for a, b in zip(words, words[1:], strict=False)) for _, words in answers
    )
    assert 0.85 < legal / len(answers) < 0.97


ROOM = DOMAINS["room"]


def test_trivial_answers_lose_by_one_at_least():
    texts = [
        "<eos>",
        ". <eos>",
        *(f"{word} <eos>" for word in KINDS if word != "<eos>"),
        *(f"{word} . <eos>" for word in KINDS if word not in (".", "<eos>")),
        "very clean . <eos>",
        "the was very clean <eos>",
        " ".join(["clean"] * 10) + " . <eos>",
        " ".join(ROOM["good"]) + " . <eos>",
        " , ".join(ROOM["good"]) + " . <eos>",
        " and ".join(["the bed was very clean"] * 4) + " . <eos>",
    ]
    for text in texts:
        assert total(text) < -1.2, text


def test_listing_inside_a_clause_loses():
    assert total("the bed was " + " and ".join(ROOM["good"]) + " . <eos>") < -0.5
    assert total("the was clean and the was cozy and the was quiet . <eos>") < -0.5


def test_never_ending_loses():
    clauses = [f"the {noun} was very {good}" for noun, good in zip(("hotel", *ROOM["part"]), ROOM["good"], strict=True)]
    endless = " and ".join(clauses).split()
    for length in range(1, 33):
        assert world_reward(HOTEL, endless[:length], False) < -0.5
    assert world_reward(HOTEL, endless[:32], False) < -4


def test_prompts_are_split_by_topic_and_phrasing():
    train, test = (set(world_prompts(1000, random.Random(0), part)) for part in ("train", "test"))
    assert (len(train), len(test)) == (288, 96)
    assert not train & test
    topics = {topic for kinds in DOMAINS.values() for topic in kinds["topic"]}
    for prompts in (train, test):
        assert {word for prompt in prompts for word in prompt.split()} >= topics
    assert len(set(world_prompts(96, random.Random(1), "test"))) == 96
    assert world_prompts(0, random.Random(0)) == []


def test_every_word_has_one_kind_and_a_token():
    by_kind = {kind: set(words) for kind, words in FUNCTION_WORDS.items()}
    by_kind["noun"] = {word for kinds in DOMAINS.values() for word in kinds["topic"] + kinds["part"]}
    by_kind["adjective"] = {w for kinds in DOMAINS.values() for w in kinds["good"] + kinds["bad"] + kinds["neutral"]}
    assert sum(map(len, by_kind.values())) == len(KINDS)
    for kinds in DOMAINS.values():
        tones = kinds["good"] + kinds["bad"] + kinds["neutral"]
        assert len(set(tones)) == len(tones)
    tokenizer = world_tokenizer()
    assert set(KINDS) <= set(tokenizer.get_vocab())
    assert 150 <= len(tokenizer) <= 300


def test_tokenizer_round_trip(answers, tmp_path):
    tokenizer = world_tokenizer()
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token) == ("<pad>", "<eos>", "<unk>")
    assert tokenizer.bos_token is None and tokenizer.chat_template is None
    prompts = world_prompts(288, random.Random(0)) + world_prompts(96, random.Random(0), "test")
    for text in prompts + [" ".join(words) for _, words in answers[:200]]:
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text.split())
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.convert_ids_to_tokens(ids) == text.split()
    assert tokenizer("zebra")["input_ids"] == [tokenizer.unk_token_id]
    assert max(len(prompt.split()) for prompt in prompts) <= World(type="world").max_prompt

    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "the bed was very clean , and <unk> . <eos>"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.decode(again(text)["input_ids"]) == text


def test_rows():
    config = World(type="world", sft=30, pairs=100, prompts=20, test=50)
    rows = world_rows(config, 3)
    assert rows == world_rows(config, 3)
    assert rows.pairs != world_rows(config, 4).pairs
    lists = (rows.answers, rows.pairs, rows.prompts, rows.test_pairs, rows.test_prompts)
    assert [len(part) for part in lists] == [30, 100, 20, 50, 50]
    assert all([item.row for item in part] == list(range(1, len(part) + 1)) for part in lists)
    seen = {item.prompt for part in lists[:3] for item in part}
    assert not seen & {item.prompt for part in lists[3:] for item in part}
    for pair in rows.pairs + rows.test_pairs:
        assert pair.chosen != pair.rejected and pair.margin == 0.0
        assert "<eos>" not in pair.chosen + pair.rejected
    larger = world_rows(config.model_copy(update={"pairs": 110}), 3)
    assert larger.test_pairs == rows.test_pairs and larger.answers == rows.answers


def test_preference_is_the_sigmoid_of_the_difference():
    better, worse = [f"the bed was very {word} . <eos>".split() for word in ("clean", "basic")]
    assert preference(HOTEL, better, worse) == pytest.approx(1 / (1 + math.exp(-1.1)))
    assert preference(HOTEL, better, worse) + preference(HOTEL, worse, better) == pytest.approx(1)


def test_draws_follow_bradley_terry():
    """Binned by |R1 - R2|, the better answer is chosen as often as sigmoid says, within 4 standard errors."""
    pairs = world_rows(World(type="world", sft=1, pairs=2000, prompts=1, test=2), 0).pairs
    bins: dict[int, list[tuple[float, bool]]] = {}
    for pair in pairs:
        gap = world_reward(pair.prompt, [*pair.chosen.split(), "<eos>"], True) - world_reward(
            pair.prompt, [*pair.rejected.split(), "<eos>"], True
        )
        if abs(gap) > 1e-9:
            bins.setdefault(min(int(abs(gap)), 4), []).append((1 / (1 + math.exp(-abs(gap))), gap > 0))
    assert len(bins) == 5
    for draws in bins.values():
        expected = sum(p for p, _ in draws)
        deviation = math.sqrt(sum(p * (1 - p) for p, _ in draws))
        assert abs(sum(won for _, won in draws) - expected) < 4 * deviation + 1e-9
