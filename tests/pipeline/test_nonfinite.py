"""A NaN in what any role says: found in that step, named by role, row and token, and the step is never applied."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rto.cli import main
from rto.models.role import Role
from rto.models.workshop import Workshop
from rto.report.log import read_metrics

TOKEN = 1
# what is injected -> stage, who opened the role, its method, which of its calls; role and quantity as they are named
CASES = {
    "sft policy": ("sft", "sft", "logprobs", 3, "policy", "log-prob"),
    "dpo policy": ("prefer", "guide", "logprobs", 2, "policy", "log-prob"),
    "dpo reference": ("prefer", "reference", "logprobs", 3, "reference", "log-prob"),
    "scorer in training": ("reward", "reward", "token_scores", 2, "scorer", "score"),
    "rl policy": ("rl/rto", "policy", "logprobs", 3, "policy", "log-prob"),
    "rl reference": ("rl/rto", "reference", "logprobs", 3, "reference", "log-prob"),
    "rl guide": ("rl/rto", "prefer", "logprobs", 2, "guide", "log-prob"),
    "rl scorer": ("rl/rto", "reward", "token_scores", 2, "scorer", "score"),
    "rl critic reading": ("rl/rto", "critic", "values", 1, "critic", "value"),
    "rl critic training": ("rl/rto", "critic", "values", 3, "critic", "value"),
}


class Injected:
    """One method of one role says NaN for one token, from one call on, ``times`` times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stage: str, owner: str, method: str, call: int, times: int = 1):
        self.calls = self.struck = 0
        self.ids: list[int] = []  # the answer that was struck
        plain = getattr(Role, method)

        def wrong(role: Role, completions: Any, *rest: Any, **more: Any) -> Any:
            said = plain(role, completions, *rest, **more)
            if getattr(role, "owner", None) != owner or len(completions) < 2:
                return said
            self.calls += 1
            if not call <= self.calls < call + times:
                return said
            self.struck += 1
            row = next(i for i, length in enumerate(completions.lengths.tolist()) if i > 0 and length > TOKEN)
            self.ids = completions.ids[row][completions.mask[row]].tolist()
            self.token = len(self.ids) - 1 if method == "token_scores" else TOKEN  # a score is read at the last one
            whole = (said,) if isinstance(said, torch.Tensor) else said
            bad = whole[0].clone()
            bad[row, self.token] = math.nan
            return bad if isinstance(said, torch.Tensor) else (bad, *whole[1:])

        monkeypatch.setattr(Role, method, wrong)
        for maker in ("reference", "new_policy", "new_scorer", "open_policy", "open_scorer"):
            self._tag(monkeypatch, maker)

    @staticmethod
    def _tag(monkeypatch: pytest.MonkeyPatch, maker: str) -> None:
        make: Callable[..., Role] = getattr(Workshop, maker)

        def tagged(shop: Workshop, *given: Any, **more: Any) -> Role:
            role = make(shop, *given, **more)
            names = [g for g in given if isinstance(g, str)]
            role.owner = names[-1] if names else "reference"  # type: ignore[attr-defined]
            return role

        monkeypatch.setattr(Workshop, maker, tagged)


@pytest.fixture(scope="module")
def base(world_recipe, tmp_path_factory) -> Path:
    """A run whose models are trained, up to RL."""
    folder = tmp_path_factory.mktemp("base") / "run"
    assert (
        main(["run", world_recipe, "--output", str(folder), "--stages", '["sft", "prefer", "reward"]', "--quiet"]) == 0
    )
    return folder


def words(recipe: str, base: Path, folder: Path, stage: str, *more: str) -> list[str]:
    """The command that does this stage alone, on the models of ``base``."""
    given = ["--output", str(folder), "--baselines", "{}", "--quiet", *more]
    if stage == "sft":
        return ["sft", recipe, *given]
    given += ["--stages", f'["{stage.partition("/")[0]}"]']
    given += ["--model", f'{{ type = "pretrained", name = "{base / "sft"}" }}']
    if stage == "rl/rto":
        given += ["--prefer.checkpoint", str(base / "prefer"), "--reward.checkpoint", str(base / "reward")]
    return ["run", recipe, *given]


def incidents(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((folder / "incidents").glob("*.json"))]


@pytest.mark.parametrize("case", list(CASES))
def test_a_nan_in_any_role_is_found_named_and_left_out(world_recipe, base, tmp_path, monkeypatch, case):
    stage, owner, method, call, role, quantity = CASES[case]
    times = 2 if role == "scorer" else 1  # a score that is NaN is read again, to find the token
    injected = Injected(monkeypatch, stage, owner, method, call, times)
    assert main(words(world_recipe, base, tmp_path / "run", stage)) == 0
    assert injected.struck == times
    (found,) = incidents(tmp_path / "run")
    assert (found["stage"], found["role"], found["quantity"], found["value"]) == (stage, role, quantity, "nan")
    row = found["batch"][found["row"]]
    name, _, _ = found["part"].partition(".")
    assert row[name]["ids"] == injected.ids and row["row"] == found["data_row"]
    assert found["token"] == injected.token
    assert row[name]["text"].split()[: injected.token] == found["text_before"].split()
    skipped = [r["step"] for r in read_metrics(tmp_path / "run", stage) if r.get("skipped")]
    assert skipped == [found["step"]]
    steps = [r["step"] for r in read_metrics(tmp_path / "run", stage)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 1
    for path in (tmp_path / "run" / stage).glob("*.safetensors"):
        assert all(weight.isfinite().all() for weight in load_file(path).values())


@pytest.mark.parametrize("stage", ["prefer", "rl/rto"])
def test_one_too_many_stops_the_stage_and_says_where(world_recipe, base, tmp_path, monkeypatch, capsys, stage):
    owner = "guide" if stage == "prefer" else "policy"
    Injected(monkeypatch, stage, owner, "logprobs", 2, times=100)
    assert main(words(world_recipe, base, tmp_path / "run", stage, "--nonfinite.skip", "0")) == 1
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1 and f"{stage}, step " in error and "the log-prob of the policy is nan (data row" in error
    )
    assert (
        "token 1, " in error and "the token '" in error and "incidents/0001-" in error and "nonfinite.skip = 0" in error
    )
    assert len(incidents(tmp_path / "run")) == 1


@pytest.mark.parametrize("stage", ["prefer", "rl/rto"])
def test_back_to_the_last_checkpoint_with_a_smaller_step(world_recipe, base, tmp_path, monkeypatch, stage):
    """The run with the incident is the run without it up to the checkpoint, and goes on at half the rate."""
    changes = ["--nonfinite.skip", "0", "--nonfinite.then", "rollback", "--checkpoints.every", "1"]
    changes += ["--checkpoints.rl_every", "1", "--prefer.batch", "4", "--policy.epochs", "2"]
    changes += ["--prefer.warmup", "0", "--prefer.schedule", "constant"]
    changes += ["--policy.warmup", "0", "--policy.schedule", "constant"]
    assert main(words(world_recipe, base, tmp_path / "plain", stage, *changes)) == 0
    owner = "guide" if stage == "prefer" else "policy"
    Injected(monkeypatch, stage, owner, "logprobs", 5)
    assert main(words(world_recipe, base, tmp_path / "run", stage, *changes)) == 0
    (found,) = incidents(tmp_path / "run")
    plain, rows = (read_metrics(tmp_path / name, stage) for name in ("plain", "run"))
    key = "lr" if stage == "prefer" else "policy/lr"
    assert [row["step"] for row in rows] == [row["step"] for row in plain]  # nothing twice, nothing lost
    before = found["step"] - 2  # the newest checkpoint that a good step came after
    for row, other in zip(rows[:before], plain[:before], strict=True):
        assert {**row, "tokens_per_second": 0} == {**other, "tokens_per_second": 0}
    assert [row[key] for row in rows] == [r[key] / (2 if r["step"] > before else 1) for r in plain]


def test_too_many_rollbacks_stop(world_recipe, base, tmp_path, monkeypatch, capsys):
    Injected(monkeypatch, "prefer", "guide", "logprobs", 2, times=100)
    changes = ["--nonfinite.skip", "0", "--nonfinite.then", "rollback", "--nonfinite.rollbacks", "2"]
    assert main(words(world_recipe, base, tmp_path / "run", "prefer", *changes)) == 1
    assert "nonfinite.rollbacks = 2" in capsys.readouterr().err
    assert len(incidents(tmp_path / "run")) == 3


def test_a_gradient_is_traced_to_its_row(world_recipe, base, tmp_path, monkeypatch):
    """Finite outputs with a gradient that is not, for one prompt."""
    plain, struck = Role.logprobs, []

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
            return values.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * math.nan

    def wrong(role: Role, completions: Any, *rest: Any, **more: Any) -> Any:
        values, entropy = plain(role, completions, *rest, **more)
        if not values.requires_grad:
            return values, entropy
        ids = [row[mask].tolist() for row, mask in zip(completions.ids, completions.mask, strict=True)]
        struck.extend(ids[-1:] if not struck else [])
        hit = torch.tensor([answer == struck[0] for answer in ids])
        values = values.clone()
        values[hit] = Broken.apply(values[hit])
        return values, entropy

    monkeypatch.setattr(Role, "logprobs", wrong)
    assert main(words(world_recipe, base, tmp_path / "run", "sft", "--sft.max_steps", "2")) == 0
    found = incidents(tmp_path / "run")[0]
    assert found["quantity"] == "gradient norm" and found["batch"][found["row"]]["answer"]["ids"] == struck[0]


@pytest.mark.parametrize("stage", ["sft", "rl/rto"])
def test_a_model_that_its_last_step_spoilt_is_not_saved(world_recipe, base, tmp_path, capsys, stage):
    """A huge step with a finite gradient: the loss still has a value, and no gradient any more."""
    name = "sft" if stage == "sft" else "policy"
    changes = [f"--{name}.lr", "1e30", f"--{name}.max_steps", "1", f"--{name}.batch", "8"]
    assert main(words(world_recipe, base, tmp_path / "run", stage, *changes)) == 1
    assert "the gradient after the last step of the policy is nan or inf" in capsys.readouterr().err
    assert not list((tmp_path / "run").rglob("model.safetensors"))
