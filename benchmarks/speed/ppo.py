"""An RL iteration: answers, scores, and two passes of policy and critic over them.

rto does RTO, which reads a guide too: one model pass more than PPO. With adapters on one backbone, where the critic is
a head on the policy's trunk, it is still compared with full models, which are all that the peer has for its critic. No
answer ends early: both sides train on as many tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from benchmarks.speed import ours, theirs
from benchmarks.speed.case import Case, Row
from benchmarks.speed.turns import Turns
from benchmarks.speed.work import Model

EPOCHS = 2
NEVER = -1  # an end of sequence that no token is


def rto(case: Case, turns: Turns) -> None:
    from rto import rewards
    from rto.config import Policy
    from rto.data.chat import Encoder, PromptRow
    from rto.models.trunk import TrunkCritic
    from rto.policy import rollout, train
    from rto.report.log import RunLog
    from rto.rollouts.signals import Reader, Scorer

    shop, runtime = ours.workshop(case)
    size = len(case.batch(0))
    config = Policy.model_validate(
        ours.training(
            case,
            method="rto",
            rollouts=size,
            batch=size,
            updates=EPOCHS,
            epochs=case.turns,
            critic={"lr": case.lr, "trunk": "policy" if case.lora else "own"},
            reduction="token",
            samples_every=10**6,
        )
    )
    prompts = [PromptRow(i, "", row["prompt"]) for i, row in enumerate(case.batch(0), 1)]
    encoder = Encoder(shop.tokenizer, max(len(row.ids) for row in prompts), case.limit)
    encoder.end = NEVER
    policy = shop.new_policy("policy")
    if case.lora:
        guide, scorer = shop.new_policy("guide"), shop.new_scorer("scorer", None)
        critic: Any = TrunkCritic(policy, case.seed, detached=False)
    else:
        guide = shop.open_policy(case.model, "guide")
        scorer = shop.open_scorer(case.classifier, "scorer", None, trained=False)
        critic = shop.open_scorer(case.classifier, "critic", None, trained=True)
    terms = rewards.METHODS["rto"]
    reader = Reader(terms, shop.reference(), encoder, config.reading_tokens, guide=guide, scorer=Scorer(scorer))
    made: list[tuple[int, int]] = []
    with counted_steps() as steps:

        class Watch:
            """Told of every iteration, as a progress bar is."""

            def start(self, *_: Any) -> None:
                told = {"optimizer": config.optimizer, "method": "rto", "critic's trunk": config.critic.trunk}
                turns.ready({**ours.settings(case), **told})
                turns.begin()

            def update(self, *_: Any) -> None:
                turns.stop()
                _end(case, turns, made.pop(), steps())
                if turns.number < case.turns:
                    turns.begin()

            say = staticmethod(ours.refuse)

        sampled = _timed(turns, "sampling", rollout.generate, lambda out: made.append(_size(out.completions)))
        updated = _timed(turns, "updates", train.update)
        with (
            mock.patch.object(rollout, "generate", sampled),
            mock.patch.object(train, "update", updated),
            tempfile.TemporaryDirectory() as folder,
        ):
            train.train(
                "rl",
                policy,
                critic,
                reader,
                prompts,
                config,
                seed=case.seed,
                runtime=runtime,
                log=RunLog(folder),
                progress=Watch(),
            )


def peer(case: Case, turns: Turns) -> None:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    batch = case.batch(0)
    arguments = theirs.arguments(
        case,
        PPOConfig,
        max_steps=-1,
        total_episodes=case.turns * len(batch),
        num_ppo_epochs=EPOCHS,
        response_length=case.limit,
        temperature=1.0,
        num_sample_generations=0,
        # Of its logits 64 rows at once, the default, are 10 GB with Qwen's vocabulary
        **({"local_rollout_forward_batch_size": case.micro_rows} if case.device == "cuda" else {}),
    )
    # Never the last batch of an epoch: there accelerate would make a step of every pass of a batch.
    prompts = Dataset.from_list([{"input_ids": row["prompt"]} for row in batch] * (case.turns + 1))
    made: list[tuple[int, int]] = []
    with counted_steps() as steps:

        class InTurns(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                turns.begin()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                turns.stop()
                _end(case, turns, made.pop(), steps())
                if turns.number < case.turns:
                    turns.begin()

        trainer = PPOTrainer(
            args=arguments,
            processing_class=theirs.tokenizer(case),
            model=theirs.load(case),
            ref_model=theirs.load(case, trained=False),
            reward_model=theirs.load(case, classifier=True, trained=False),
            value_model=theirs.load(case, classifier=True),
            train_dataset=prompts,
            eval_dataset=prompts,
            callbacks=[InTurns()],
        )
        for name in ("batch_generation", "forward", "get_reward"):  # it leaves arguments.bf16 alone
            setattr(ppo_trainer, name, theirs.in_precision(case, getattr(ppo_trainer, name)))
        width = max(len(row["prompt"]) for row in batch)
        ppo_trainer.batch_generation = _timed(
            turns, "sampling", ppo_trainer.batch_generation, lambda out: made.append(tuple(out[0][:, width:].shape))
        )
        _time_updates(turns, ppo_trainer, trainer)
        told = {"method": "ppo", "models": "full", "gradient checkpointing": False}  # nor does it obey that argument
        turns.ready({**theirs.settings(case, arguments), **told})
        trainer.train()


def least(case: Case, batch: list[Row], model: Model) -> float:
    """Of PPO; RTO reads a guide too. Full models: sampling, reference, scorer and critic, then policy and critic are
    trained. Adapters: the critic is a head on the policy's trunk, and weights have no gradients."""
    t, rows = case.limit, [len(row["prompt"]) for row in batch]
    sampled = sum(model.forward(asked + t - 1, t) for asked in rows)
    writes, reads = (sum(model.forward(asked + t, predicted) for asked in rows) for predicted in (t, 0))
    if case.lora:
        adapting = sum(model.adapting(asked + t, case.lora) for asked in rows)
        return sampled + writes + reads + EPOCHS * (2 * writes + adapting)
    return sampled + writes + 2 * reads + EPOCHS * 3 * (writes + reads)


def _end(case: Case, turns: Turns, made: tuple[int, int], steps: float) -> None:
    """``made`` are the answers and how long each is."""
    asked, (answers, length) = sum(len(row["prompt"]) for row in case.batch(0)), made
    checks = {"answers": answers, "tokens an answer": length, "updates of each weight": steps}
    turns.end(asked + answers * length, "scoring", checks)


def _size(completions: Any) -> tuple[int, int]:
    lengths = set(completions.lengths.tolist())
    assert len(lengths) == 1, f"answers ended early: {sorted(lengths)}"
    return len(completions), lengths.pop()


def _timed(turns: Turns, name: str, work: Callable, seen: Callable[[Any], None] | None = None) -> Callable:
    """``work`` as a phase; ``seen`` gets what it returns."""

    def timed(*args: Any, **kwargs: Any) -> Any:
        with turns.phase(name):
            out = work(*args, **kwargs)
        if seen is not None:
            seen(out)
        return out

    return timed


def _time_updates(turns: Turns, module: Any, trainer: Any) -> None:
    """The peer's updates are no function of their own: forward passes of policy and value model together, backward
    passes and optimiser steps are."""
    plain = module.forward

    def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
        if model is not trainer.model:
            return plain(model, *args, **kwargs)
        with turns.phase("updates"):
            return plain(model, *args, **kwargs)

    module.forward = forward
    trainer.accelerator.backward = _timed(turns, "updates", trainer.accelerator.backward)
    trainer.optimizer.step = _timed(turns, "updates", trainer.optimizer.step)


@contextmanager
def counted_steps() -> Iterator[Callable[[], float]]:
    """What it yields says how often each optimiser has stepped since it was last asked."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    found: dict[int, int] = {}

    def count(optimizer: Any, *_: Any) -> None:
        found[id(optimizer)] = found.get(id(optimizer), 0) + 1

    def since() -> float:
        mean = sum(found.values()) / max(1, len(found))
        found.clear()
        return mean

    hook = register_optimizer_step_post_hook(count)
    try:
        yield since
    finally:
        hook.remove()
