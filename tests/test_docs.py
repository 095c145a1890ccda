"""The documentation says what the code does: metric keys, table rows, examples and links."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rto import config, recipe
from rto.advantages import ADVANTAGES
from rto.cli import overrides
from rto.data.layouts import answer_of, pair, prompt_of
from rto.pipeline import run
from rto.policy import LOSSES
from rto.preferences import PREFERENCE_LOSSES, REWARD_LOSSES
from rto.report.log import read_metrics
from rto.rewards import METHODS, TERMS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, *(path for path in [ROOT / "README.md"] if path.exists())]
GLOSSARIES = (
    ("rl.md", "## Glossary of metrics"),
    ("preferences.md", "## Metrics"),
    ("preferences.md", "## Scored answers"),
)
# One small run whose stages log every metric that there is, but for what needs a scorer with another tokenizer.
TINY = {
    "stages": ["sft", "prefer", "reward", "rl"],
    "model": {"type": "scratch", "hidden": 16, "layers": 1, "heads": 2, "intermediate": 16},
    "data": {"type": "world", "sft": 4, "pairs": 4, "prompts": 4, "test": 4, "max_response": 6},
    "sft": {"batch": 4, "max_steps": 1},
    "prefer": {"batch": 4, "max_steps": 1},
    "reward": {"batch": 4, "max_steps": 1},
    "guides": {"kto": {"loss": {"type": "kto"}}, "tdpo": {"loss": {"type": "tdpo2"}}},
    "scorers": {"segment": {"cutoff": 1.0}},
    "policy": {"rollouts": 4, "batch": 4, "max_steps": 1, "critic": {"init": "reference"}},
    "baselines": {
        "segments": {"method": "segment-ppo", "scorer": "segment"},
        "groups": {"advantage": {"type": "rloo"}, "group": 2, "ptx": 0.1, "kl": {"place": "loss"}},
        "pairs": {"method": "ppo", "loss": {"type": "p3o"}, "group": 2},
    },
    "evaluation": {"oracle": {"type": "world"}},
}
# Logged for a scorer with another tokenizer (tests/rollouts/test_foreign.py), and where a step was not finite.
RARE = {"scorer_misaligned", "skipped"}


def text_of(*names: str) -> str:
    return "\n".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in names)


def blocks(language: str) -> list[str]:
    """The fenced examples of one language on all pages."""
    found = [re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S) for page in PAGES]
    return [block for page in found for block in page]


def table_keys(page: str) -> set[str]:
    """The code spans of the first cell of every table row."""
    rows = re.findall(r"^\| (`.*?) \|", text_of(page), re.M)
    return {key for cell in rows for key in re.findall(r"`([^`]+)`", cell)}


def general(key: str) -> str:
    """``reward/implicit`` as the glossary has it: ``reward/<term>``."""
    family, slash, name = key.rpartition("/")
    return f"{family}/<term>" if slash and (name in TERMS or name == "kl") else key


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Stage -> keys of the smallest run there is."""
    folder = run(recipe.build(TINY | {"output": str(tmp_path_factory.mktemp("run"))}), quiet=True)
    found: dict[str, set[str]] = {}
    for row in read_metrics(folder):
        found.setdefault(row["stage"], set()).update(map(general, row.keys() - {"stage", "step", "nonfinite"}))
    return found


def test_every_metric_is_in_a_glossary(logged):
    supervised = {"sft", "prefer", "prefer/kto", "prefer/tdpo", "reward", "reward/segment"}
    rl = {"rl/rto", "rl/segments", "rl/groups", "rl/pairs"}
    assert set(logged) == supervised | rl
    assert not set().union(*(logged[stage] for stage in rl)) - table_keys("rl.md")
    assert not set().union(*(logged[stage] for stage in supervised)) - table_keys("preferences.md")


def test_no_glossary_has_a_metric_that_nobody_logs(logged):
    """Read from the sections that are glossaries."""
    everything = set().union(*logged.values(), RARE)
    for page, head in GLOSSARIES:
        section = text_of(page).split(head)[1].split("\n## ")[0]
        rows = re.findall(r"^\| `([^`]+)` \|", section, re.M)
        assert rows
        assert not set(rows) - everything - {"sft"}  # sft: a stage, in the table of stages


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("rewards.md", [*TERMS, *METHODS]),
        ("preferences.md", [*PREFERENCE_LOSSES, *REWARD_LOSSES, "sft"]),
        ("rl.md", [*ADVANTAGES, *LOSSES]),
    ],
)
def test_every_row_of_the_tables_is_named(page, names):
    assert not set(names) - table_keys(page)


def options(function: Callable[..., object]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]


@pytest.mark.parametrize(
    ("page", "table"),
    [
        ("rewards.md", {name: term.function for name, term in TERMS.items()}),
        ("preferences.md", PREFERENCE_LOSSES | REWARD_LOSSES),
    ],
)
def test_every_option_of_a_row_is_in_a_table(page, table):
    assert not {f"{name}.{key}" for name, function in table.items() for key in options(function)} - table_keys(page)


def test_every_option_of_an_estimator_or_policy_loss_is_in_its_row():
    table = {name: estimator.function for name, estimator in ADVANTAGES.items()} | LOSSES
    for name, function in table.items():
        row = re.search(rf"^\| `{re.escape(name)}`.*$", text_of("rl.md"), re.M)
        assert row and not {f"`{key}`" for key in options(function)} - set(re.findall(r"`[^`]+`", row[0])), name


def test_every_key_of_a_recipe_is_in_the_docs():
    """As a word of some code span or example."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in DOCS)
    code = re.findall(r"^```.*?^```", text, re.M | re.S) + re.findall(r"`[^`\n]+`", text)
    words = set(re.findall(r"\w+", "\n".join(code)))
    sections = [kind for kind in vars(config).values() if inspect.isclass(kind) and issubclass(kind, config.Section)]
    assert len(sections) > 20
    assert not {key for section in sections for key in section.model_fields} - words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            heads = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in slugs, f"{page.name} links to {target}"


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_the_index_names_every_page_and_no_page_has_an_em_dash(page):
    assert page.name == "index.md" or f"]({page.name})" in text_of("index.md")
    assert "\u2014" not in page.read_text(encoding="utf-8")


def test_files_named_in_the_docs_exist():
    """Paths such as ``policy/ppo.py``, from ``src/rto`` or from the root. What the first design had is not there."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in DOCS).split("## From the first design")[0]
    for name in set(re.findall(r"`([\w./]+/\w+\.(?:py|toml))`", text)):
        assert (ROOT / name).exists() or (ROOT / "src/rto" / name).exists(), name


def test_recipes_in_the_docs_are_valid():
    found = blocks("toml")
    assert found
    model = {"name": "gpt2"}
    for block in found:
        table = {"model": model, "data": {"pairs": "prefs.jsonl"}} | tomllib.loads(block)
        recipe.build(table, block)


COMMANDS = re.findall(
    r"\brto (?:run|sft|prefer|reward|rl|evaluate|report|plan) recipes/[^`\n]*",
    "\n".join(page.read_text(encoding="utf-8") for page in [*PAGES, *sorted((ROOT / "recipes").glob("*.toml"))]),
)


def test_the_readme_has_a_command_for_a_model_of_ones_own():
    assert any("own.toml" in command and "--model.name" in command for command in COMMANDS)


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_commands_in_the_docs_are_accepted(command):
    """Recipe and overrides go together."""
    words, changes = overrides(shlex.split(command, comments=True)[1:])
    assert recipe.load(ROOT / words[1], changes)


def test_example_rows_are_read():
    found = [json.loads(block) for block in blocks("json")]
    assert len(found) >= 5
    for record in found:
        if "chosen" in record:
            assert pair(record)[1:3] == ("Blue.", "No.")
        elif "messages" in record:
            assert answer_of(record)[1] == "Blue."
        else:
            assert prompt_of(record) == "Name a colour."


def test_python_examples_compile_and_name_what_is_there():
    import importlib

    found = blocks("python")
    assert found
    for block in found:
        compile(block, "docs", "exec")
        for module, names in re.findall(r"^from (rto[\w.]*) import (.+)$", block, re.M):
            assert all(hasattr(importlib.import_module(module), name.strip()) for name in names.split(","))
