"""A DPO step: pairs, AdamW, gradients clipped at 1, beta 0.1."""

from __future__ import annotations

from benchmarks.speed import ours, theirs
from benchmarks.speed.adapters import start_alike
from benchmarks.speed.case import Case, Row
from benchmarks.speed.turns import Turns
from benchmarks.speed.work import Model


def rto(case: Case, turns: Turns) -> None:
    from rto.preferences.dpo import dpo
    from rto.preferences.objectives import PairObjective

    shop, runtime = ours.workshop(case)
    policy, reference = shop.new_policy("policy"), shop.reference()
    start_alike(policy.backbone.network, case.seed)
    objective = PairObjective(policy, dpo, {"beta": 0.1}, case.pad, reference)
    ours.supervised(case, objective, [ours.pairs(batch) for batch in case.batches], runtime, turns)


def peer(case: Case, turns: Turns) -> None:
    from trl import DPOConfig, DPOTrainer

    class Tokenised(DPOTrainer):
        """The rows are token ids already."""

        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

    arguments = theirs.arguments(case, DPOConfig, beta=0.1, max_length=None)
    rows = theirs.rows(
        case, lambda row: {"prompt_ids": row["prompt"], "chosen_ids": row["chosen"], "rejected_ids": row["rejected"]}
    )
    trainer = Tokenised(
        theirs.load(case),
        args=arguments,
        train_dataset=rows,
        processing_class=theirs.tokenizer(case),
        peft_config=theirs.lora(case),
    )
    start_alike(trainer.model, case.seed)
    theirs.supervised(case, trainer, turns, {"loss": "loss", "margin": "rewards/margins"})


def least(case: Case, batch: list[Row], model: Model) -> float:
    """Each prompt once, logits where an answer is predicted; the reference, and the policy forward and backward."""
    passes = 3 if case.lora else 4  # adapters: no gradients of the weights
    total = 0.0
    for row in batch:
        asked, answers = len(row["prompt"]), [len(row[side]) for side in ("chosen", "rejected")]
        total += passes * (model.forward(asked, 0) + sum(model.forward(n, n, after=asked) for n in answers))
        total += model.adapting(asked + sum(answers), case.lora)
    return total
