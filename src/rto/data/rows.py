"""All rows of a run, encoded: which stage sees which."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from rto import config as recipe
from rto.data.chat import (
    AnswerRow,
    Encoded,
    Encoder,
    PairRow,
    PromptRow,
    ScoredRow,
    encode_answers,
    encode_pairs,
    encode_prompts,
    encode_scored,
    load_template,
)
from rto.data.layouts import Prompt, plain
from rto.data.sources import Loaded, RejectedRow, read_answers, read_pairs, read_prompts, read_scored, split_rows
from rto.data.worlds import world_rows, world_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Row = TypeVar("Row")


@dataclass(frozen=True)
class Rows:
    """``pairs``, ``answers`` and ``scored`` (empty unless ``data.scored`` is set) train, ``prompts`` are for RL;
    ``test_*`` only the evaluation sees, ``oracle_pairs`` only the held-out oracle."""

    encoder: Encoder
    answers: list[AnswerRow]
    pairs: list[PairRow]
    prompts: list[PromptRow]
    test_pairs: list[PairRow]
    test_prompts: list[PromptRow]
    oracle_pairs: list[PairRow] = field(default_factory=list)
    scored: list[ScoredRow] = field(default_factory=list)
    rejected: list[RejectedRow] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)  # rows and truncations, for people


def make_tokenizer(config: recipe.Config, name: str | None) -> PreTrainedTokenizerBase:
    """The policy's tokenizer, with its chat template: the world's own, or that of the model ``name`` (None: scratch).

    Raises:
        ValueError: there is no such model, its files are damaged, or it does not go with the data.
    """
    if name is None:
        if isinstance(config.data, recipe.World):
            return world_tokenizer()
        raise ValueError("model.type = 'scratch' knows the tiny world's words only: name a model with model.name")
    from transformers import AutoTokenizer

    model = config.model
    trust, revision = (
        (model.trust_remote_code, model.revision) if isinstance(model, recipe.Pretrained) else (False, None)
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust, revision=revision)
    except Exception as error:  # a damaged file of it ends in whatever its readers raise, here or in tokenizers
        if isinstance(error, OSError) and not os.path.isdir(name):
            raise ValueError(f"model.name = {name!r}: no such folder, and no hub model that can be reached") from error
        told = plain(f"{type(error).__name__}: {error}")
        raise ValueError(f"model.name = {name!r}: its tokenizer cannot be read ({told}): fetch it again") from error
    if isinstance(config.data, recipe.Files):
        load_template(tokenizer, config.data)
    elif tokenizer.get_vocab() != world_tokenizer().get_vocab():
        raise ValueError(f"model.name = {name!r} does not know the tiny world's words: use model.type = 'scratch'")
    return tokenizer


def make_rows(config: recipe.Config, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """Read, split and encode. Raises ValueError as the sources and the encoder do."""
    data = config.data
    if isinstance(data, recipe.World):
        return _world(data, Encoder(tokenizer, data.max_prompt, data.max_response), config.seed)
    return _files(data, Encoder(tokenizer, data.max_prompt, data.max_response, data.on_over_long), config.seed)


def _world(data: recipe.World, encoder: Encoder, seed: int) -> Rows:
    rows = world_rows(data, seed)
    answers = encode_answers(encoder, Loaded("tiny world: sft", rows.answers))
    pairs = encode_pairs(encoder, Loaded("tiny world: pairs", rows.pairs))
    prompts = encode_prompts(encoder, Loaded("tiny world: prompts", rows.prompts))
    test_pairs = encode_pairs(encoder, Loaded("tiny world: test pairs", rows.test_pairs))
    test_prompts = encode_prompts(encoder, Loaded("tiny world: test prompts", rows.test_prompts))
    return Rows(
        encoder,
        answers.rows,
        pairs.rows,
        prompts.rows,
        test_pairs.rows,
        _distinct(test_prompts.rows),
        rejected=[*answers.rejected, *pairs.rejected, *prompts.rejected, *test_pairs.rejected, *test_prompts.rejected],
        notes=_notes(pairs, test_pairs),
    )


def _files(data: recipe.Files, encoder: Encoder, seed: int) -> Rows:
    """Pairs are split by rendered prompt; answers and prompts come from the training pairs unless files are named."""
    read = read_pairs(data)
    pairs = encode_pairs(encoder, read)
    by_row = {pair.row: pair.prompt for pair in read.rows}
    try:
        parts = split_rows([pair.prompt_text for pair in pairs.rows], data.test, data.oracle, seed)
    except ValueError as error:
        raise ValueError(f"data.pairs = {pairs.file!r}: {error}") from None
    chosen = {part: [pairs.rows[i] for i in index] for part, index in parts.items()}
    rejected = list(pairs.rejected)

    held_out = {pair.prompt_text for part in ("test", "oracle") for pair in chosen[part]}
    answers = [_answer(pair) for pair in chosen["train"]]
    if data.sft is not None:
        own = encode_answers(encoder, read_answers(data))
        answers = _some("sft", data.sft, [row for row in own.rows if row.prompt_text not in held_out])
        rejected += own.rejected
    prompts = _prompts(chosen["train"], by_row)
    if data.prompts is not None:
        asked = encode_prompts(encoder, read_prompts(data))
        prompts = _some("prompts", data.prompts, [row for row in asked.rows if row.text not in held_out])
        rejected += asked.rejected
    scored: list[ScoredRow] = []
    if data.scored is not None:
        given = encode_scored(encoder, read_scored(data))
        scored = _some("scored", data.scored, [row for row in given.rows if row.prompt_text not in held_out])
        rejected += given.rejected
    return Rows(
        encoder,
        answers,
        chosen["train"],
        prompts,
        chosen["test"],
        _prompts(chosen["test"], by_row),
        chosen["oracle"],
        scored,
        rejected,
        _notes(pairs),
    )


def _notes(*pairs: Encoded[PairRow]) -> dict[str, int]:
    return {
        "pairs": sum(len(part.rows) for part in pairs),
        "cut prompts": sum(part.cut_prompts for part in pairs),
        "cut answers": sum(part.cut_answers for part in pairs),
    }


def scored_from_pairs(pairs: list[PairRow], chosen: float = 1.0, rejected: float = 0.0) -> list[ScoredRow]:
    """Each pair as two answers with the scores ``chosen`` and ``rejected``.

    The margin is left out: it may be 0 (unknown) or small, and a loss that parts the desirable answers from the
    others by a fixed score would then take chosen answers for rejected ones.
    """
    return [
        ScoredRow(
            pair.row,
            pair.prompt_text,
            pair.prompt,
            [pair.chosen, pair.rejected],
            [pair.chosen_finished, pair.rejected_finished],
            [chosen, rejected],
        )
        for pair in pairs
    ]


def _some(key: str, file: str, rows: list[Row]) -> list[Row]:
    if not rows:
        raise ValueError(f"data.{key} = {file!r}: all of its prompts are held out for the evaluation: give it others")
    return rows


def _answer(pair: PairRow) -> AnswerRow:
    return AnswerRow(pair.row, pair.prompt_text, pair.prompt, pair.chosen, pair.chosen_finished)


def _prompts(pairs: list[PairRow], said: dict[int, Prompt]) -> list[PromptRow]:
    return _distinct([PromptRow(pair.row, pair.prompt_text, pair.prompt, said[pair.row]) for pair in pairs])


def _distinct(prompts: list[PromptRow]) -> list[PromptRow]:
    """Each prompt once: a prompt asked twice would count as two independent ones in the intervals."""
    return list({prompt.text: prompt for prompt in reversed(prompts)}.values())[::-1]
