"""Data: sources (files and hub to text), chat (text to ids), collate (ids to tensors)."""

from rto.data.chat import (
    PLAIN_TEMPLATE,
    AnswerRow,
    Encoded,
    Encoder,
    PairRow,
    PromptRow,
    encode_answers,
    encode_pairs,
    encode_prompts,
    load_template,
)
from rto.data.collate import collate_completions, collate_pairs, collate_prompts, micro_batches, trim
from rto.data.layouts import Prompt
from rto.data.sources import (
    Loaded,
    RejectedRow,
    TextAnswer,
    TextPair,
    TextPrompt,
    read_answers,
    read_pairs,
    read_prompts,
    split_rows,
    write_rejected,
)

__all__ = [
    "PLAIN_TEMPLATE",
    "AnswerRow",
    "Encoded",
    "Encoder",
    "Loaded",
    "PairRow",
    "Prompt",
    "PromptRow",
    "RejectedRow",
    "TextAnswer",
    "TextPair",
    "TextPrompt",
    "collate_completions",
    "collate_pairs",
    "collate_prompts",
    "encode_answers",
    "encode_pairs",
    "encode_prompts",
    "load_template",
    "micro_batches",
    "read_answers",
    "read_pairs",
    "read_prompts",
    "split_rows",
    "trim",
    "write_rejected",
]
