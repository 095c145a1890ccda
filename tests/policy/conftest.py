"""A tiny world for the RL loop: rows, and roles around a model of 16 dimensions that stops now and then."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rto import rewards
from rto.config import Policy, Spec, Supervised
from rto.data.rows import make_rows, make_tokenizer
from rto.models.checkpoint import save_role
from rto.models.load import scratch_network
from rto.models.memory import Budget
from rto.models.role import Backbone, Role
from rto.models.runtime import Runtime
from rto.models.workshop import Workshop
from rto.policy.rollout import Draw, draw
from rto.policy.train import reads_values, train
from rto.preferences.objectives import SftObjective
from rto.preferences.train import fit
from rto.recipe import build
from rto.report.log import Progress, RunLog, read_metrics
from rto.rollouts.signals import Reader, Scorer
from rto.seeds import global_torch


class Roles:
    """Fresh roles, the same weights every time; policy and reference are one model. A role is opened when it is first
    asked for. ``changes`` replace roles, and set what reads a scorer: its notes, cutoff and normaliser."""

    def __init__(self, shop: Workshop, **changes: Any) -> None:
        self._shop = shop
        self.__dict__.update({"notes": None, "moving": None, "cutoff": None, "normaliser": None} | changes)

    def __getattr__(self, name: str) -> Role:
        shop = self.__dict__["_shop"]
        opened = {
            "policy": lambda: shop.new_policy("policy"),
            "reference": shop.reference,
            "critic": lambda: World.moved(shop.new_scorer("critic", None), "critic"),
            "guide": lambda: World.moved(shop.new_policy("guide"), "guide"),
            "scorer": lambda: World.moved(shop.new_scorer("scorer", None), "scorer"),
        }
        if name not in opened:
            raise AttributeError(name)
        self.__dict__[name] = opened[name]()
        return self.__dict__[name]


class World:
    """Rows of the tiny world, and a workshop around a small model."""

    def __init__(self, base: Path, log: Path) -> None:
        scratch = {"type": "scratch", "hidden": 16, "layers": 1, "heads": 2, "intermediate": 16}
        data = {"type": "world", "sft": 64, "pairs": 4, "prompts": 16, "test": 4, "max_response": 16}
        config = build({"model": scratch, "data": data, "evaluation": {"oracle": {"type": "world"}}})
        tokenizer = make_tokenizer(config, None)
        rows = make_rows(config, tokenizer)
        network = scratch_network(config.model, tokenizer, rows.encoder.end, seed=0)
        role, self.runtime = Role(Backbone(network, "scratch", None, torch.float32)), Runtime("cpu")
        lessons, pad = Supervised(lr=2e-2, batch=16, epochs=10), rows.encoder.pad
        told = {"seed": 0, "runtime": self.runtime, "log": RunLog(log), "progress": Progress(enabled=False)}
        fit("sft", SftObjective(role, pad), rows.answers, lessons, **told)
        save_role(role, base, tokenizer, pad)
        self.shop = Workshop(config.model, str(base), tokenizer, self.runtime, 0)
        self.prompts, self.answers, self.encoder = rows.prompts, rows.answers, rows.encoder

    def roles(self, **changes: Any) -> Roles:
        return Roles(self.shop, **changes)

    def reader(self, roles: Roles, config: Policy, terms) -> Reader:
        needs = rewards.needs(terms)
        found = {"moving": roles.moving, "temperature": config.temperature}
        if "guide" in needs:
            found["guide"] = roles.guide
        if needs & {"scores", "segments"}:
            found["scorer"] = Scorer(roles.scorer, roles.cutoff, roles.notes, roles.normaliser)
        return Reader(terms, roles.reference, self.encoder, config.reading_tokens, **found)

    def run(self, folder: Path, roles: Roles, config: Policy, terms, seed: int = 0, **more) -> list[dict[str, Any]]:
        """The logged metrics of one training."""
        told = {"runtime": self.runtime, "progress": Progress(enabled=False), **more}
        reader, critic = self.reader(roles, config, terms), roles.critic if reads_values(config) else None
        train("rl", roles.policy, critic, reader, self.prompts, config, seed=seed, log=RunLog(folder), **told)
        rows = read_metrics(folder, "rl")
        return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in rows]

    def draw(self, roles: Roles, config: Policy, terms, iteration: int = 0, greedy: bool = False) -> Draw:
        reader, critic = self.reader(roles, config, terms), roles.critic if reads_values(config) else None
        budget = Budget(config.reading_tokens, print)
        return draw(roles.policy, critic, reader, self.prompts, config, iteration, 0, self.runtime, greedy, budget)

    @staticmethod
    def settings(**changes) -> Policy:
        # eps = 1e-4: without it Adam blows the rounding of gradients that are zero in truth up to whole steps.
        base = {"lr": 1e-3, "critic": {"lr": 1e-3}, "rollouts": 8, "batch": 8, "eps": 1e-4, "max_steps": 2, "epochs": 9}
        return Policy.model_validate(base | changes)

    @staticmethod
    def moved(role: Role, name: str, by: float = 0.05) -> Role:
        """The role with noise on its weights, the same for the same name."""
        with torch.no_grad(), global_torch(0, name):
            for p in role.parameters():
                p.add_(by * torch.randn_like(p))
        return role

    @staticmethod
    def weights(role: Role) -> list[torch.Tensor]:
        return [p.detach().clone() for p in role.parameters()]


@pytest.fixture
def scores(tmp_path, monkeypatch) -> Callable[[str], list[Spec]]:
    """Makes a term of a reward function, given its body; it may read ``prompts``, ``answers`` and ``tokens``."""
    monkeypatch.syspath_prepend(tmp_path)
    count = itertools.count()

    def write(body: str) -> list[Spec]:
        name = f"loop_scores_{next(count)}"
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text(f"def score(prompts, answers, tokens):\n    {body}\n")
        importlib.invalidate_caches()
        return [{"type": "function", "function": f"{name}:score"}]

    return write


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("log"))
