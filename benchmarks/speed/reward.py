"""A step of a Bradley-Terry reward model that is read at the last token."""

from __future__ import annotations

from benchmarks.speed import ours, theirs
from benchmarks.speed.case import Case, Row
from benchmarks.speed.turns import Turns
from benchmarks.speed.work import Model


def rto(case: Case, turns: Turns) -> None:
    from rto.preferences.bradley_terry import bradley_terry
    from rto.preferences.objectives import PairObjective

    shop, runtime = ours.workshop(case)
    scorer = shop.open_scorer(case.classifier, "scorer", None, trained=True)
    objective = PairObjective(scorer, bradley_terry, {}, case.pad)
    ours.supervised(case, objective, [ours.pairs(batch) for batch in case.batches], runtime, turns)


def peer(case: Case, turns: Turns) -> None:
    from trl import RewardConfig, RewardTrainer

    trainer = RewardTrainer(
        theirs.load(case, classifier=True),
        args=theirs.arguments(case, RewardConfig, max_length=None),
        train_dataset=theirs.rows(
            case, lambda row: {f"{side}_ids": row["prompt"] + row[side] for side in ("chosen", "rejected")}
        ),
        processing_class=theirs.tokenizer(case),
    )
    theirs.supervised(case, trainer, turns, {"loss": "loss", "margin": "margin"})


def least(case: Case, batch: list[Row], model: Model) -> float:
    """Each prompt once, forward and backward; no logits."""
    return 3 * sum(
        model.forward(len(row["prompt"]), 0)
        + sum(model.forward(len(row[side]), 0, after=len(row["prompt"])) for side in ("chosen", "rejected"))
        for row in batch
    )
