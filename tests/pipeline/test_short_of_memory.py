"""Where memory is short for a pass of the evaluation, of a normaliser's fit or of sampling, half of the tokens do."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import rto.rollouts.generate as sampling
from rto import pipeline, recipe
from rto.config import Config
from rto.models.role import Role
from rto.pipeline import contest, generate
from rto.pipeline.answers import write_answers
from rto.pipeline.job import Job
from rto.pipeline.normalise import fit_normaliser
from rto.pipeline.resolve import resolve
from rto.report.log import Progress
from rto.rollouts.signals import Reader

FITS = 3  # rows at once


@pytest.fixture(scope="module")
def trained(world_recipe, tmp_path_factory) -> Callable[..., Config]:
    """A run of every role, 256 tokens a pass of the policy's and the scorers', 128 of the baseline's; 8 prompts of 6
    tokens are answered with at most 12."""
    folder = tmp_path_factory.mktemp("short") / "run"
    changes = {"sft.max_steps": "2", "prefer.max_steps": "1", "reward.max_steps": "1", "policy.max_steps": "1"}
    changes |= {"policy.micro_tokens": "64", "reward.micro_tokens": "64", "baselines.ppo.micro_tokens": "32"}
    changes |= {"scorers.pieces.cutoff": "1.0", "output": str(folder), "stages": '["sft", "prefer", "reward", "rl"]'}

    def call(**more: str) -> Config:
        given = changes | {key.replace("__", "."): value for key, value in more.items()}
        return resolve(recipe.load(world_recipe, [*given.items()]))

    pipeline.run(call(), quiet=True)
    return call


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """The lines that a quiet run hides."""
    lines: list[str] = []
    monkeypatch.setattr(Progress, "say", lambda _, text: lines.append(text))
    return lines


@pytest.fixture
def scarce(monkeypatch) -> Callable[[str], None]:
    """Room for three rows in one kind of passes."""

    def call(kind: str) -> None:
        place: Any = sampling if kind == "_decode" else Role
        method = getattr(place, kind)

        def read(role: Role, *given: Any, **more: Any) -> Any:
            rows = given[1] if kind == "_decode" else given[0]
            if len(rows) > FITS:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return method(role, *given, **more)

        monkeypatch.setattr(place, kind, read)

    return call


def halvings(said: list[str], what: str = "reading_tokens") -> int:
    """How often, each told once, from 256 on."""
    told = [line for line in said if line.startswith("out of memory")]
    assert told == [f"out of memory: {what} {256 >> i} -> {128 >> i}, and the step again" for i in range(len(told))]
    return len(told)


def check_close(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            check_close(a, b)
    else:
        assert other == (pytest.approx(one, abs=1e-4) if isinstance(one, float) else one)


def compared(config: Config) -> list[Any]:
    """Every policy's answers with scores and KL, and the credit of some."""
    contest.evaluate(Job(config, quiet=True))
    files = sorted((Path(config.output) / "evaluation").glob("answers-*.jsonl"))
    assert [path.stem for path in files] == ["answers-dpo", "answers-ppo", "answers-rto", "answers-sft"]
    rows = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    return [*rows, *json.loads((Path(config.output) / "credit.json").read_text())["answers"]]


@pytest.fixture(scope="module")
def judged(trained) -> Callable[[str], tuple[Config, list[Any]]]:
    """The comparison under an oracle where memory suffices, made once."""

    @cache
    def call(oracle: str) -> tuple[Config, list[Any]]:
        ready = f', name = "{trained().output}/reward"' if oracle == "model" else ""
        config = trained(evaluation__oracle=f'{{type = "{oracle}"{ready}}}')
        return config, compared(config)

    return call


@pytest.mark.parametrize(
    ("kind", "oracle"), [("_decode", "world"), ("logprobs", "world"), ("scores", "world"), ("scores", "model")]
)
def test_an_evaluation_goes_on_with_half_the_tokens(judged, scarce, said, monkeypatch, kind, oracle):
    """Sampling; the KL; what the terms read; the oracle's scores."""
    config, whole = judged(oracle)
    plain, first = Reader.read, set()
    assert not said

    def read(reader: Reader, *given: Any) -> Any:
        found = plain(reader, *given)
        first.add(reader.budget << len(said))
        return found

    monkeypatch.setattr(Reader, "read", read)
    scarce(kind)
    check_close(whole, compared(config))
    assert halvings(said) >= 2
    assert first == {256, 128}  # the baseline's passes are halved as often as the policy's


@pytest.mark.parametrize(
    ("kind", "answers"), [("logprobs", "pairs"), ("token_scores", "pairs"), ("_decode", "sampled")]
)
def test_a_normaliser_is_fitted_with_half_the_tokens(trained, scarce, said, kind, answers):
    config = trained(scorers__pieces__normaliser__answers=f'"{answers}"', scorers__pieces__normaliser__limit="8")

    def fitted() -> Any:
        fit_normaliser(Job(config, quiet=True), "reward/pieces", config.rewards()["reward/pieces"])
        return json.loads((Path(config.output) / "reward/pieces/normaliser.json").read_text())

    whole = fitted()
    assert halvings(said) == 0
    scarce(kind)
    check_close(whole, fitted())
    assert halvings(said) >= 2


def test_generate_samples_with_half_the_tokens(trained, scarce, said, tmp_path, caplog):
    config = trained()
    whole = generate(config, "sft")
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in whole))

    def written(name: str) -> list[dict[str, Any]]:
        write_answers(config, "jsonl", str(tmp_path / "q.jsonl"), tmp_path / name, "sft", batch_tokens=256)
        return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]

    asked = written("whole")
    scarce("_decode")
    assert generate(config, "sft") == whole
    assert halvings([record.getMessage() for record in caplog.records]) == 2
    assert written("scarce") == asked and halvings(said, "batch_tokens") == 2
