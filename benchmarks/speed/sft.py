"""An SFT step: demonstrations, the mean of -log pi over the answers' tokens."""

from __future__ import annotations

from benchmarks.speed import ours, theirs
from benchmarks.speed.case import Case, Row
from benchmarks.speed.turns import Turns
from benchmarks.speed.work import Model


def rto(case: Case, turns: Turns) -> None:
    from rto.data.chat import AnswerRow
    from rto.preferences.objectives import SftObjective

    shop, runtime = ours.workshop(case)
    batches = [
        [AnswerRow(i, "", row["prompt"], row["answer"], True) for i, row in enumerate(batch, 1)]
        for batch in case.batches
    ]
    ours.supervised(case, SftObjective(shop.new_policy("sft"), case.pad), batches, runtime, turns)


def peer(case: Case, turns: Turns) -> None:
    from trl import SFTConfig, SFTTrainer

    def labelled(row):
        ids = row["prompt"] + row["answer"]
        return {"input_ids": ids, "labels": [-100] * len(row["prompt"]) + row["answer"]}

    trainer = SFTTrainer(
        theirs.load(case),
        args=theirs.arguments(case, SFTConfig, max_length=None),
        train_dataset=theirs.rows(case, labelled),
        processing_class=theirs.tokenizer(case),
        peft_config=theirs.lora(case),
    )
    theirs.supervised(case, trainer, turns, {"loss": "loss"})


def least(case: Case, batch: list[Row], model: Model) -> float:
    """Forward and backward, logits where an answer is predicted."""
    return 3 * sum(model.forward(len(row["prompt"]) + len(row["answer"]), len(row["answer"])) for row in batch)
