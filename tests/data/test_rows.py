"""The rows of a run: no prompt on both sides of the split, and every row that is left out is told."""

from __future__ import annotations

import json
from collections import Counter

from rto.config import Files
from rto.data import split_rows
from rto.data.rows import make_rows, make_tokenizer
from rto.data.worlds import world_tokenizer
from rto.recipe import build

TRIMS = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] | trim }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def test_prompts_that_are_rendered_alike_stay_together(tmp_path):
    """The template drops the line end, so that both rows of a question are of one prompt."""
    tokenizer = world_tokenizer()
    tokenizer.chat_template = TRIMS
    tokenizer.add_tokens([f"q{i}" for i in range(20)])
    pairs = [
        {"prompt": [{"role": "user", "content": f"q{i}{end}"}], "chosen": "the bed", "rejected": "the room"}
        for i in range(20)
        for end in ("", "\n")
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    config = build({"model": {"name": "any"}, "data": {"pairs": str(path), "test": 0.2, "oracle": 0.2}})
    assert isinstance(config.data, Files)
    rows = make_rows(config, tokenizer)
    parts = [Counter(pair.prompt_text for pair in part) for part in (rows.pairs, rows.test_pairs, rows.oracle_pairs)]
    assert [sum(part.values()) for part in parts] == [24, 8, 8]
    assert all(set(part.values()) == {2} for part in parts) and len(parts[0] | parts[1] | parts[2]) == 20
    assert not {prompt.text for prompt in rows.prompts} & {*parts[1], *parts[2]}


def test_the_split_is_that_of_the_prompts_as_they_were_read(tmp_path):
    """Where no two are rendered alike."""
    prompts = ["the bed", "the room", "the bed", "a review", "the hotel", "the room", "a bed", "a hotel"]
    path = tmp_path / "pairs.jsonl"
    lines = [json.dumps({"prompt": prompt, "chosen": "clean", "rejected": "basic"}) + "\n" for prompt in prompts]
    path.write_text("".join(lines))
    for seed in range(5):
        data = {"pairs": str(path), "test": 0.25, "oracle": 0.25}
        rows = make_rows(build({"seed": seed, "model": {"name": "any"}, "data": data}), world_tokenizer())
        found = {"train": rows.pairs, "test": rows.test_pairs, "oracle": rows.oracle_pairs}
        parts = split_rows(prompts, 0.25, 0.25, seed)
        assert {part: [pair.row - 1 for pair in pairs] for part, pairs in found.items()} == parts


def test_the_tiny_world_tells_what_it_leaves_out():
    """Answers of four tokens: a pair here and there differs later only. Of five tokens and more: all are cut."""
    data = {"type": "world", "sft": 1, "pairs": 1500, "prompts": 1, "test": 400, "max_prompt": 4, "max_response": 4}
    oracle = {"oracle": {"type": "world"}}
    config = build({"seed": 1, "model": {"type": "scratch"}, "data": data, "evaluation": oracle})
    rows = make_rows(config, make_tokenizer(config, None))
    assert (len(rows.pairs), len(rows.test_pairs)) == (1499, 399)
    assert [(bad.file, bad.reason) for bad in rows.rejected] == [
        ("tiny world: pairs", "same_answers"),
        ("tiny world: test pairs", "same_answers"),
    ]
    assert rows.rejected[0].row not in {pair.row for pair in rows.pairs}
    assert rows.notes == {"pairs": 1898, "cut prompts": 1898, "cut answers": 2 * 1898}
