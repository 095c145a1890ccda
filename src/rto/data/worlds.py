"""The tiny world: a small English language whose true token rewards are known.

Six domains (food, rooms, shows, devices, services, places) give 48 topics. A prompt such as ``a review of the
hotel :`` asks for an opinion; an answer is a row of clauses such as ``the bed was very cozy``. Two tables
drive everything: :data:`DOMAINS` and :data:`FUNCTION_WORDS` name the words by kind, :data:`FOLLOWS` says which
kind may follow which and how often. Answers are random walks on these tables, with defects; the reward pays
by kind and charges every step that the tables do not know. Preferences are Bradley-Terry draws from the sum
of the token rewards, so this sum is an exact oracle.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rto.config import World
from rto.data.sources import TextAnswer, TextPair, TextPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Part = Literal["train", "test"]
PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"

# --- the words ----------------------------------------------------------------------------------------

# An adjective may stand in several domains with different kinds: "loud" is good for a speaker, bad for a room.
DOMAINS: dict[str, dict[str, tuple[str, ...]]] = {
    domain: {kind: tuple(words.split()) for kind, words in kinds.items()}
    for domain, kinds in {
        "food": {
            "topic": "soup pizza burger salad curry breakfast dinner dessert",
            "part": "sauce bread cheese portion filling crust",
            "good": "tasty fresh crispy juicy rich tender light",
            "bad": "bland stale greasy salty burnt",
            "neutral": "mild plain warm",
        },
        "room": {
            "topic": "hotel apartment cabin hostel cottage villa suite lodge",
            "part": "bed bathroom kitchen shower sofa balcony",
            "good": "clean cozy quiet spacious bright comfortable warm",
            "bad": "dirty noisy cramped damp loud",
            "neutral": "basic modern plain",
        },
        "show": {
            "topic": "film novel series play comedy musical thriller opera",
            "part": "plot ending cast dialogue music scenery",
            "good": "gripping funny clever moving original dark rich",
            "bad": "boring predictable confusing silly slow",
            "neutral": "long serious modern",
        },
        "device": {
            "topic": "laptop phone camera tablet printer speaker watch router",
            "part": "screen battery cable software menu case",
            "good": "fast reliable sharp light loud sturdy bright",
            "bad": "slow fragile heavy buggy hot",
            "neutral": "compact standard basic",
        },
        "service": {
            "topic": "bank clinic garage salon gym library bakery pharmacy",
            "part": "staff clerk advice booking manager welcome",
            "good": "friendly helpful polite patient fair quick reliable",
            "bad": "rude careless lazy late confusing",
            "neutral": "formal local busy",
        },
        "place": {
            "topic": "beach park museum garden zoo castle harbor market",
            "part": "path cafe tour entrance scenery view",
            "good": "lovely peaceful scenic sunny charming lively clean",
            "bad": "crowded muddy ugly dull noisy",
            "neutral": "large old busy",
        },
    }.items()
}
FUNCTION_WORDS: dict[str, tuple[str, ...]] = {
    "opener": ("overall", "honestly", "personally", "frankly"),
    "determiner": ("the", "this", "our"),
    "verb": ("was", "is", "seemed", "felt"),
    "intensifier": ("very", "really", "so", "quite", "truly", "extremely"),
    "tail": ("today", "again", "indeed"),
    "joiner": ("and", "but", ","),
    "stop": (".",),
    "end": (EOS,),
}
# What may follow what, with the weights of the grammar; "start" is the empty answer.
FOLLOWS: dict[str, dict[str, float]] = {
    "start": {"determiner": 0.8, "opener": 0.2},
    "opener": {"determiner": 1.0},
    "determiner": {"noun": 1.0},
    "noun": {"verb": 1.0},
    "verb": {"adjective": 0.55, "intensifier": 0.45},
    "intensifier": {"adjective": 1.0},
    "adjective": {"joiner": 0.46, "stop": 0.44, "tail": 0.1},
    "tail": {"joiner": 0.4, "stop": 0.6},
    "joiner": {"determiner": 0.9, "opener": 0.1},
    "stop": {"end": 1.0},
}
ADJECTIVES = {domain: {w: k for k in ("good", "bad", "neutral") for w in kinds[k]} for domain, kinds in DOMAINS.items()}
KINDS: dict[str, str] = {
    **{word: kind for kind, words in FUNCTION_WORDS.items() for word in words},
    **{word: "noun" for kinds in DOMAINS.values() for word in kinds["topic"] + kinds["part"]},
    **{word: "adjective" for words in ADJECTIVES.values() for word in words},
}

# --- prompts ------------------------------------------------------------------------------------------

PHRASINGS = (
    "a review of the {} :",
    "write about the {} :",
    "how was the {} ?",
    "tell me about the {} :",
    "your opinion of the {} :",
    "please rate the {} :",
    "what did you think of the {} ?",
    "describe the {} for a friend :",
)
_TOPICS = [(topic, domain) for domain, kinds in DOMAINS.items() for topic in kinds["topic"]]
_ASKED = {phrasing.format(topic): (topic, domain) for phrasing in PHRASINGS for topic, domain in _TOPICS}
# A quarter of the combinations is held out: every topic in two phrasings, every phrasing in twelve topics.
_HELD_OUT = {p.format(topic): (i + j) % 4 == 0 for i, p in enumerate(PHRASINGS) for j, (topic, _) in enumerate(_TOPICS)}


def world_prompts(n: int, rng: random.Random, part: Part = "train") -> list[str]:
    """``n`` prompts in random order; none repeats before all of its part have been used.

    There are 288 training and 96 test prompts. A test prompt is a (topic, phrasing) never seen in training.
    """
    deck = [prompt for prompt, held_out in _HELD_OUT.items() if held_out == (part == "test")]
    prompts: list[str] = []
    while len(prompts) < n:
        prompts += rng.sample(deck, len(deck))
    return prompts[:n]


def _asked(prompt: str) -> tuple[str, str]:
    """The topic of a prompt and its domain."""
    if prompt not in _ASKED:
        raise ValueError(f"the tiny world has no prompt {prompt!r}: take one of world_prompts(n, rng)")
    return _ASKED[prompt]


def _fitting(topic: str, domain: str) -> tuple[str, ...]:
    """The nouns that an answer about ``topic`` may speak of: itself and the parts of its domain."""
    return (topic, *DOMAINS[domain]["part"])


# --- answers ------------------------------------------------------------------------------------------

SHORTEST, LONGEST = 8, 30  # tokens of a grammar answer, end-of-sequence included
MOODS = (0.8, 0.6, 0.35)  # the chance that an adjective is good; each answer draws its mood
OFF_TOPIC, REPEATED, SLIP, NO_STOP = 0.05, 0.05, 0.04, 0.05  # chance of a defect: a word, then an answer each
HASTE = 0.06  # chance of a slip a word in the answers of preference pairs


def world_answer(prompt: str, rng: random.Random) -> list[str]:
    """One answer of 8 to 30 words, the last one ``<eos>``. Some have defects; a few ramble on."""
    topic, domain = _asked(prompt)
    while True:
        words = _draft(topic, domain, rng)
        if SHORTEST <= len(words) <= LONGEST:
            return words


def _draft(topic: str, domain: str, rng: random.Random) -> list[str]:
    good = rng.choice(MOODS)
    body: list[str] = []
    kind = _draw(FOLLOWS["start"], rng)
    while kind != "stop":
        word = _word(kind, topic, domain, good, rng)
        if word in body:  # a second thought: most repetitions are avoided
            word = _word(kind, topic, domain, good, rng)
        body.append(word)
        kind = _draw(FOLLOWS[kind], rng)
    if rng.random() < REPEATED:  # the last clause once more
        joiners = [t for t, word in enumerate(body) if KINDS[word] == "joiner"]
        body += ["and", *body[joiners[-1] + 1 if joiners else 0 :]]
    if rng.random() < SLIP:
        body[rng.randrange(len(body))] = rng.choice([word for word in KINDS if word not in (".", EOS)])
    return [*body, EOS] if rng.random() < NO_STOP else [*body, ".", EOS]


def hasty_answer(prompt: str, rng: random.Random) -> list[str]:
    """A grammar answer whose words are dropped, doubled or swapped for any other, each with chance ``HASTE``.

    Pairs are made of these, as real ones are made of a model's answers and not of an editor's: a scorer that has
    only read clean grammar cannot tell a policy that leaves it.
    """
    body, end = [], world_answer(prompt, rng)
    for word in end[:-1]:
        change = rng.choice(("drop", "double", "swap")) if rng.random() < HASTE else "keep"
        other = rng.choice([word for word in KINDS if word != EOS])
        body += {"drop": [], "double": [word, word], "swap": [other], "keep": [word]}[change]
    return [*body, EOS]


def _draw(weights: dict[str, float], rng: random.Random) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def _word(kind: str, topic: str, domain: str, good: float, rng: random.Random) -> str:
    if kind not in ("noun", "adjective"):
        return rng.choice(FUNCTION_WORDS[kind])
    if rng.random() < OFF_TOPIC:
        domain = rng.choice([other for other in DOMAINS if other != domain])
        topic = rng.choice(DOMAINS[domain]["topic"])
    if kind == "noun":
        return rng.choice(_fitting(topic, domain))
    return rng.choice(DOMAINS[domain][_draw({"good": good, "bad": 0.6 * (1 - good), "neutral": 0.4 * (1 - good)}, rng)])


# --- the true reward ----------------------------------------------------------------------------------

REWARD = {
    "good": 0.8,  # an adjective that praises this domain
    "intensified": 0.3,  # more, when an intensifier stands before it
    "bad": -0.8,
    "neutral": 0.0,
    "off_topic": -0.4,  # an adjective of other domains, a noun that is neither the topic nor a part of its domain
    "repeat": -0.5,  # a noun, adjective or intensifier, for each time that it was said before
    "bigram": -1.0,  # two kinds that may not follow each other
    "unknown": -0.5,  # a word that is none of the grammar's
    "long": -0.2,  # each token after the first 20
    "stop": 0.5,  # end-of-sequence after "."; elsewhere it is a forbidden bigram
    "short": -2.0,  # at the end of an answer of fewer than 6 tokens
    "unfinished": -3.0,  # at the last token of an answer that was cut
    "constant": -0.7,  # at end-of-sequence: brings the mean of grammar answers to 0
}
FREE_LENGTH, LEAST_LENGTH = 20, 6  # tokens, end-of-sequence included


def token_rewards(prompt: str, words: Sequence[str], finished: bool) -> list[float]:
    """The true reward of every token of an answer; the sum is :func:`world_reward`.

    ``words`` is the whole response, ``<eos>`` included as its last word when ``finished``. Reward t reads the
    prompt and ``words[: t + 1]`` alone; only the fee for a cut answer knows that its token was the last.
    Raises ValueError for a prompt of another world and for ``<eos>`` anywhere but at the end of a finished answer.
    """
    topic, domain = _asked(prompt)
    if list(words).count(EOS) != finished or (finished and words[-1] != EOS):
        raise ValueError(f"a finished answer has {EOS} once, at its end, a cut one has none: {finished=}, {words=}")
    rewards: list[float] = []
    said: Counter[str] = Counter()
    before = "start"
    for t, word in enumerate(words):
        kind = KINDS.get(word, "unknown")
        reward = REWARD["unknown"] if kind == "unknown" else 0.0
        if kind not in FOLLOWS.get(before, {}):
            reward += REWARD["bigram"]
        if kind == "noun" and word not in _fitting(topic, domain):
            reward += REWARD["off_topic"]
        if kind == "adjective":
            tone = ADJECTIVES[domain].get(word, "off_topic")
            reward += REWARD[tone]
            if tone == "good" and before == "intensifier":
                reward += REWARD["intensified"]
        if kind in ("noun", "adjective", "intensifier"):
            reward += REWARD["repeat"] * said[word]
            said[word] += 1
        if t >= FREE_LENGTH:
            reward += REWARD["long"]
        if kind == "end":
            reward += REWARD["constant"]
            reward += REWARD["stop"] if before == "stop" else 0.0
            reward += REWARD["short"] if t + 1 < LEAST_LENGTH else 0.0
        rewards.append(reward)
        before = kind
    if rewards and not finished:
        rewards[-1] += REWARD["unfinished"]
    return rewards


def world_reward(prompt: str, words: Sequence[str], finished: bool) -> float:
    """The true reward of an answer: the sum of its :func:`token_rewards`."""
    return math.fsum(token_rewards(prompt, words, finished))


# --- tokenizer and rows -------------------------------------------------------------------------------


def world_tokenizer() -> PreTrainedTokenizerFast:
    """One id a word, split at spaces, decoded with single spaces; no beginning-of-sequence, no chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    asked = [word for phrasing in PHRASINGS for word in phrasing.split() if word != "{}"]
    vocabulary = dict.fromkeys([PAD, EOS, UNK, *KINDS, *asked])
    model = models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=UNK)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNK, clean_up_tokenization_spaces=False
    )


@dataclass(frozen=True)
class WorldRows:
    """The rows of every stage, counted from 1. Answers have no ``<eos>``; test rows use held-out prompts only."""

    answers: list[TextAnswer]
    pairs: list[TextPair]
    prompts: list[TextPrompt]
    test_pairs: list[TextPair]
    test_prompts: list[TextPrompt]


def world_rows(config: World, seed: int) -> WorldRows:
    """The rows that ``config`` counts. Each list has its own random stream, so its size changes no other list."""

    def stream(name: str) -> random.Random:
        return random.Random(f"{seed} {name}")

    return WorldRows(
        answers=_answers(config.sft, stream("answers")),
        pairs=_pairs(config.pairs, stream("pairs"), "train"),
        prompts=_prompts(config.prompts, stream("prompts"), "train"),
        test_pairs=_pairs(config.test, stream("test pairs"), "test"),
        test_prompts=_prompts(config.test, stream("test prompts"), "test"),
    )


def _answers(n: int, rng: random.Random) -> list[TextAnswer]:
    asked = enumerate(world_prompts(n, rng), 1)
    return [TextAnswer(row, prompt, _text(world_answer(prompt, rng))) for row, prompt in asked]


def _prompts(n: int, rng: random.Random, part: Part) -> list[TextPrompt]:
    return [TextPrompt(row, prompt) for row, prompt in enumerate(world_prompts(n, rng, part), 1)]


def _pairs(n: int, rng: random.Random, part: Part) -> list[TextPair]:
    pairs = []
    for row, prompt in enumerate(world_prompts(n, rng, part), 1):
        chosen = rejected = hasty_answer(prompt, rng)
        while rejected == chosen:
            rejected = hasty_answer(prompt, rng)
        if rng.random() >= preference(prompt, chosen, rejected):
            chosen, rejected = rejected, chosen
        pairs.append(TextPair(row, prompt, _text(chosen), _text(rejected), 0.0))
    return pairs


def preference(prompt: str, first: Sequence[str], second: Sequence[str]) -> float:
    """Bradley-Terry: the probability that the first of two finished answers wins, sigmoid(R1 - R2)."""
    return 1.0 / (1.0 + math.exp(world_reward(prompt, second, True) - world_reward(prompt, first, True)))


def _text(words: Sequence[str]) -> str:
    return " ".join(words[:-1])
