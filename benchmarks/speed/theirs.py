"""What the TRL sides share: arguments, rows, and a trainer's own loop that takes its steps in turns."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from benchmarks.speed.case import Case, Row, tokens
from benchmarks.speed.turns import Turns


def arguments(case: Case, kind: Callable[..., Any], **more: Any) -> Any:
    """TRL's defaults but for what both sides are given. bfloat16 and gradient checkpointing, which TRL switches on,
    would make it slower on a CPU (bfloat16 by an order of magnitude). On a GPU the setup says whether it checkpoints.
    """
    accumulate, left = divmod(len(case.batch(0)), case.micro_rows)
    assert not left, f"{case.name}: {case.micro_rows} rows a pass do not make {len(case.batch(0))}"
    return kind(
        **{
            "output_dir": case.folder,
            "max_steps": case.turns,
            "per_device_train_batch_size": case.micro_rows,
            "gradient_accumulation_steps": accumulate,
            "learning_rate": case.lr,
            "lr_scheduler_type": "constant",
            "bf16": case.dtype == "bfloat16",
            "gradient_checkpointing": case.device == "cuda" and case.setup == "default",
            "use_cpu": case.device == "cpu",
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "train_sampling_strategy": "sequential",
            "disable_tqdm": True,
            "seed": case.seed,
            **more,
        }
    )


def rows(case: Case, shape: Callable[[Row], dict[str, list[int]]]) -> Any:
    """The rows of all turns, in order."""
    from datasets import Dataset

    return Dataset.from_list([shape(row) for turn in range(case.turns) for row in case.batch(turn)])


def load(case: Case, classifier: bool = False, trained: bool = True) -> Any:
    """What is trained is float32, as in rto: bfloat16 weights round small updates away. Below adapters nothing is."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    dtype = torch.float32 if trained and case.lora is None else getattr(torch, case.dtype)
    folder = case.classifier if classifier else case.model
    return kind.from_pretrained(folder, dtype=dtype, attn_implementation=case.attention)


def tokenizer(case: Case) -> Any:
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(case.model)
    if found.pad_token is None:
        found.pad_token = found.eos_token
    return found


def lora(case: Case) -> Any:
    """As rto's adapters: all linear layers, alpha 32."""
    if case.lora is None:
        return None
    from peft import LoraConfig

    return LoraConfig(r=case.lora, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def in_precision(case: Case, work: Callable) -> Callable:
    """``work`` in bfloat16 where the case is: for a trainer that does not do it by itself."""
    import torch

    @wraps(work)
    def lowered(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(case.device, torch.bfloat16, enabled=case.dtype == "bfloat16"):
            return work(*args, **kwargs)

    return lowered


def settings(case: Case, arguments: Any) -> dict[str, Any]:
    """What is told beside the times."""
    return {
        "dtype": case.dtype,
        "attention": case.attention,
        "rows a pass": arguments.per_device_train_batch_size,
        "passes a step": arguments.gradient_accumulation_steps,
        "gradient checkpointing": arguments.gradient_checkpointing,
        "optimizer": arguments.optim,
    }


def supervised(case: Case, trainer: Any, turns: Turns, logged: dict[str, str]) -> None:
    """The trainer's own loop, held before each step. ``logged`` are the checks by the names in its log."""
    from transformers import TrainerCallback

    class InTurns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.stop()

        def on_log(self, *_: Any, **given: Any) -> None:
            logs = given["logs"]
            if "train_runtime" not in logs:
                turns.end(
                    sum(map(tokens, case.batch(turns.number))),
                    "optimiser",
                    {name: logs[key] for name, key in logged.items()},
                )

    compute, backward = trainer.compute_loss, trainer.accelerator.backward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with turns.phase("forward"):
            return compute(*args, **kwargs)

    def back(*args: Any, **kwargs: Any) -> Any:
        with turns.phase("backward"):
            return backward(*args, **kwargs)

    trainer.compute_loss, trainer.accelerator.backward = forward, back
    trainer.add_callback(InTurns())
    turns.ready(settings(case, trainer.args) | ({"lora r": case.lora} if case.lora else {}))
    trainer.train()
