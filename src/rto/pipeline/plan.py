"""What a recipe would do: the resolved recipe, the data, the steps of every stage and the memory of their models."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from rto import config as recipe
from rto import rewards
from rto.config import Config, Training
from rto.data.rows import Rows
from rto.models.load import locate
from rto.models.runtime import Runtime
from rto.pipeline.job import Job
from rto.pipeline.resolve import resolve, segment_scorers, terms_of
from rto.preferences import PREFERENCE_LOSSES
from rto.preferences.train import reads_groups


def describe(config: Config, stages: Sequence[str] | None = None) -> str:
    """Everything that ``--dry-run`` prints of a recipe, or of only ``stages``. The data are read and
    encoded; nothing is written, no weights are loaded.

    Raises:
        ValueError: as a run would, for a recipe or data that it refuses.
    """
    config = resolve(config)
    job = Job(config, quiet=True)
    rows = job.rows
    parts = [json.dumps(config.model_dump(mode="json"), indent=1, ensure_ascii=False)]
    parts += ["", "data", *_data(rows), "", "stages", *_stages(config, rows, stages or config.stages)]
    parts += ["", "weights", *_weights(config, job.runtime)]
    return "\n".join(parts)


def _data(rows: Rows) -> list[str]:
    counts = {
        "demonstrations": len(rows.answers),
        "training pairs": len(rows.pairs),
        "RL prompts": len(rows.prompts),
        "held-out pairs": len(rows.test_pairs),
        "held-out prompts": len(rows.test_prompts),
        "oracle pairs": len(rows.oracle_pairs),
    }
    lines = [f"  {name}: {count:,}" for name, count in counts.items()]
    lines += [f"  {name}: {count:,}" for name, count in rows.notes.items() if name.startswith("cut")]
    for reason, count in Counter(bad.reason for bad in rows.rejected).most_common():
        numbers = [bad.row for bad in rows.rejected if bad.reason == reason]
        shown = ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")
        lines.append(f"  rejected, {reason}: {count:,} (rows {shown})")
    return lines


def _stages(config: Config, rows: Rows, stages: Sequence[str]) -> list[str]:
    def supervised(name: str, training: Training, count: int, checkpoint: str | None = None) -> str:
        wanted = round(training.epochs * count)
        steps = math.ceil(min(wanted, (training.max_steps or math.inf) * training.batch) / training.batch)
        planned = f"{max(1, steps):,} steps of {training.batch} rows, lr {training.lr:g}"
        return f"  {name}: " + (f"uses {checkpoint}" if checkpoint else planned)

    lines = []
    if "sft" in stages:
        lines.append(supervised("sft", config.sft, len(rows.answers)))
    if "prefer" in stages:
        for stage, guide in config.preferences().items():
            read = rows.scored or rows.pairs if reads_groups(PREFERENCE_LOSSES[guide.loss["type"]]) else rows.pairs
            lines.append(supervised(stage, guide, len(read), guide.checkpoint))
    if "reward" in stages:
        fitted = segment_scorers(config)
        for stage, scorer in config.rewards().items():
            lines.append(supervised(stage, scorer, len(rows.pairs), scorer.checkpoint))
            if stage in fitted:
                where = "the pairs" if scorer.normaliser.answers == "pairs" else "sampled answers"
                lines.append(f"  {stage}/normaliser: fitted on at most {scorer.normaliser.limit:,} answers of {where}")
    if "rl" in stages:
        for name, policy in config.policies().items():
            terms = terms_of(policy)
            iterations = max(1, math.ceil(policy.epochs * len(rows.prompts) * policy.group / policy.rollouts))
            iterations = min(iterations, policy.max_steps or iterations)
            listed = " + ".join(
                term["type"] + "(" + ", ".join(f"{k} {v:g}" for k, v in term.items() if isinstance(v, float)) + ")"
                for term in rewards.live(terms)
            )
            lines.append(
                f"  rl/{name}: {iterations:,} iterations of {policy.rollouts:,} rollouts, {policy.updates} x "
                f"{policy.rollouts // policy.batch} updates each, lr {policy.lr:g}; "
                f"reward {listed}, KL {policy.kl.coef:g} ({policy.kl.estimator}) in the {policy.kl.place}"
            )
    if "evaluate" in stages:
        if isinstance(config.evaluation.oracle, recipe.HeldoutOracle):
            lines.append(supervised("oracle", config.reward, len(rows.oracle_pairs)))
        prompts = min(config.evaluation.prompts, len(rows.test_prompts))
        lines.append(f"  evaluate: {config.evaluation.samples} answers of every policy to each of {prompts:,} prompts")
    return lines


def _weights(config: Config, runtime: Runtime) -> list[str]:
    """Bytes of weights, gradients and Adam's moments by role in RL, the stage that holds most; activations and
    logits come on top and are bounded by micro_tokens."""
    total, trained_all = _parameters(config)
    needed = {need for policy in config.policies().values() for need in rewards.needs(terms_of(policy))}
    scored = bool(needed & {"scores", "segments"})
    frozen = ["reference"] + ["guide"] * ("guide" in needed) + ["scorer"] * scored
    size = torch.finfo(runtime.dtype(config.model.dtype)).bits // 8
    lora = config.model.lora
    if lora is not None:
        # An adapter of rank r on an n x m weight has r (n + m) numbers.
        adapter = lora.r * trained_all
        whole = total * size + adapter * 4 * (len(frozen) - 1) + adapter * 16 * 2
        lines = [f"  one backbone of {total / 1e6:,.1f} M weights, {adapter / 1e6:,.2f} M a LoRA adapter"]
    else:
        whole = total * size * len(frozen) + total * 16 * 2
        lines = [f"  {total / 1e6:,.1f} M weights a model; {len(frozen)} frozen, policy and critic trained in full"]
    size_gib = f"{whole / 2**30:,.2f} GiB"
    lines.append(f"  RL holds about {size_gib} of weights, gradients and optimiser state, and activations")
    return lines


def _parameters(config: Config) -> tuple[int, int]:
    """Weights of the model, and the sum of (in + out) over its linear layers; counted without memory."""
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    model = config.model
    settings: Any
    if isinstance(model, recipe.Scratch):
        settings = LlamaConfig(
            vocab_size=256,
            hidden_size=model.hidden,
            num_hidden_layers=model.layers,
            num_attention_heads=model.heads,
            intermediate_size=model.intermediate,
            tie_word_embeddings=True,
        )
    else:
        trust = isinstance(model, recipe.Pretrained) and model.trust_remote_code
        settings = AutoConfig.from_pretrained(locate(model), trust_remote_code=trust)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(settings)
    head = network.get_output_embeddings()
    linear = [m for m in network.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    return sum(p.numel() for p in network.parameters()), sum(m.in_features + m.out_features for m in linear)
