"""``rto generate`` of a run whose prompts are plain strings, and of one process among several."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rto.cli import main


@pytest.fixture(scope="module")
def plain_run(files_recipe, tiny_model, tmp_path_factory) -> list[str]:
    """A reference that was trained on strings, and the words that have it answer greedily."""
    folder = tmp_path_factory.mktemp("plain")
    letters = [chr(ord("a") + i) for i in range(20)]
    pairs = [{"prompt": f"{letter} and {letter}", "chosen": letter, "rejected": f"no {letter}"} for letter in letters]
    write(folder / "pairs.jsonl", pairs)
    call = ["sft", files_recipe, "--output", str(folder / "run"), "--quiet", "--model.name", tiny_model]
    assert main([*call, "--data.pairs", str(folder / "pairs.jsonl"), "--sft.max_steps", "1"]) == 0
    return ["generate", str(folder / "run"), "--policy", "sft", "--temperature", "0"]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_run_on_plain_strings_is_asked_in_plain_text(plain_run, tmp_path, capsys):
    capsys.readouterr()
    assert main([*plain_run, "--prompt", "a and b"]) == 0
    typed = capsys.readouterr().out
    assert json.loads(typed)["prompt"] == "a and b"
    assert main([*plain_run, "--prompts", write(tmp_path / "asked.jsonl", [{"prompt": "a and b"}])]) == 0
    assert capsys.readouterr().out == typed


@pytest.mark.parametrize("rank", ["0", "1"])
def test_of_several_processes_one_writes(plain_run, tmp_path, monkeypatch, capsys, rank):
    monkeypatch.setenv("RANK", rank)
    capsys.readouterr()
    call = [*plain_run, "--prompt", "a"]
    assert main(call) == main([*call, "--out", str(tmp_path / "out.jsonl")]) == 0
    said = capsys.readouterr()
    speaks = rank == "0"
    assert (bool(said.out), bool(said.err), (tmp_path / "out.jsonl").exists()) == (speaks, speaks, speaks)
