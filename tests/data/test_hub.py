"""Data sets of the hub and parts of them. A folder that ``datasets`` can load stands for one: nothing is fetched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rto import recipe
from rto.config import Files
from rto.data.sources import read_answers, read_pairs, read_prompts, read_scored
from rto.pipeline import resolve, steps_of

CARD = """---
configs:
- config_name: main
  data_files: main.jsonl
- config_name: other
  data_files: other.jsonl
---
"""


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> None:
    import datasets  # slow to import

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def rows(path: Path, *names: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    made = [{"prompt": name, "chosen": "a", "rejected": "b", "completion": "c", "label": True} for name in names]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))


@pytest.fixture
def folders(tmp_path) -> str:
    """As HH-RLHF is kept: a folder a part, and none of them a configuration."""
    rows(tmp_path / "set" / "harmless-base" / "train.jsonl", "one")
    rows(tmp_path / "set" / "helpful-base" / "train.jsonl", "two", "three")
    return str(tmp_path / "set")


@pytest.fixture
def configs(tmp_path) -> str:
    """As GSM8K is kept: configurations that its card names."""
    rows(tmp_path / "set" / "main.jsonl", "one")
    rows(tmp_path / "set" / "other.jsonl", "two")
    (tmp_path / "set" / "README.md").write_text(CARD)
    return str(tmp_path / "set")


def test_a_folder_of_a_data_set(folders):
    assert {row.prompt for row in read_pairs(Files(pairs=folders)).rows} == {"one", "two", "three"}
    part = {"data_dir": "helpful-base"}
    found = [
        read_pairs(Files(pairs=folders, **part)),
        read_prompts(Files(prompts=folders, **part)),
        read_answers(Files(sft=folders, **part)),
        read_scored(Files(scored=folders, **part)),
    ]
    assert [[(row.row, row.prompt) for row in loaded.rows] for loaded in found] == [[(1, "two"), (2, "three")]] * 4


def test_a_configuration_of_a_data_set(configs):
    assert [row.prompt for row in read_pairs(Files(pairs=configs, config="other")).rows] == ["two"]
    with pytest.raises(ValueError, match=r"data\.pairs: .* with split 'train' could be loaded .*data\.config"):
        read_pairs(Files(pairs=configs))  # which of the two?
    with pytest.raises(ValueError, match="with split 'train', config 'mian' could be loaded"):
        read_pairs(Files(pairs=configs, config="mian"))
    with pytest.raises(ValueError, match="with split 'train', data_dir 'nowhere' could be loaded"):
        read_pairs(Files(pairs=configs, data_dir="nowhere"))


@pytest.mark.parametrize("option", ["config", "data_dir"])
def test_a_part_of_a_file_is_refused(tmp_path, option):
    rows(tmp_path / "a.jsonl", "one")
    for key, read in (("pairs", read_pairs), ("prompts", read_prompts), ("sft", read_answers), ("scored", read_scored)):
        said = rf"data\.{option} = 'main' is a part of a hub data set, and data\.{key} = .*a\.jsonl' is a file: leave"
        with pytest.raises(ValueError, match=said):
            read(Files(**{key: str(tmp_path / "a.jsonl"), option: "main"}))


def test_another_part_is_another_run():
    made = [
        recipe.build({"model": {"name": "m"}, "data": {"pairs": "owner/set", **part}})
        for part in ({"config": "main"}, {"data_dir": "main"}, {})
    ]
    inputs = [steps_of(resolve(config), ["sft"])[0].inputs["data"] for config in made]
    assert [(data["config"], data["data_dir"]) for data in inputs] == [("main", None), (None, "main"), (None, None)]
