"""A recipe: TOML and dotted overrides in, one frozen and validated :class:`Config` out.

Defaults are the published settings (RTO on Llama-3-8B with UltraFeedback, arXiv 2404.18922v4) unless a
comment says otherwise. Validators refuse; they never rewrite. The options of a loss, a reward term, an
advantage estimator or a policy loss belong to its function: here they are a :data:`Spec`, a table with a
``type``, and the stage that owns the function checks and completes it.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, field_validator, model_validator

from rto.config.base import Count, NonNegative, Positive, Section, Share, Spec, Whole
from rto.config.inputs import Data, Files, Lora, Model, Packaged, Pretrained, Scratch, World
from rto.config.oracles import FunctionOracle, HeldoutOracle, HttpOracle, ModelOracle, Oracle, WorldOracle

__all__ = [
    "STAGES", "Best", "Checkpoints", "Config", "Count", "Critic", "Data", "Evaluation", "Files", "FunctionOracle",
    "HeldoutOracle", "HttpOracle", "Kl", "Lora", "Model", "ModelOracle", "NonFinite", "NonNegative", "Normaliser",
    "Oracle", "Packaged", "Policy", "Positive", "Prefer", "Pretrained", "Reward", "Rounds", "Scratch", "Section",
    "Sft", "Share", "Spec", "Stage", "Supervised", "Trained", "Training", "Whole", "World", "WorldOracle",
]  # fmt: skip

Main = TypeVar("Main", bound=BaseModel)
Momentum = Annotated[float, Field(ge=0, lt=1)]
Stage = Literal["sft", "prefer", "reward", "rl", "evaluate", "report"]
STAGES: tuple[Stage, ...] = ("sft", "prefer", "reward", "rl", "evaluate", "report")


class Best(Section):
    """A stage's model is the one whose metric was best, and not that of the last step."""

    metric: str  # as in metrics.jsonl: one of eval_* in [prefer] and [reward]; in [policy] of an iteration's answers
    goal: Literal["max", "min"] = "max"


class Training(Section):
    """What every training stage shares. A batch is global: all processes and micro-batches together."""

    lr: float = Field(5e-7, gt=0)
    batch: int = Field(128, ge=1)
    epochs: float = Field(1.0, gt=0, le=1e6)
    max_steps: int | None = Field(None, ge=1)
    optimizer: Literal["adamw", "adam"] = "adamw"
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(0.03, ge=0, lt=1)  # share of the steps
    floor: float = Field(0.1, ge=0, le=1)  # share of lr at the end
    max_norm: float = Field(1.0, gt=0)
    micro_tokens: int = Field(16384, ge=1)  # padded tokens of one training pass; see reading_tokens

    @property
    def reading_tokens(self) -> int:
        """Padded tokens of one pass without gradients, sampling too: four times as many, it keeps no activations."""
        return 4 * self.micro_tokens


class Supervised(Training):
    log_every: int = Field(1, ge=1)  # steps between rows of metrics


class Sft(Supervised):
    lr: float = Field(1e-5, gt=0)
    batch: int = Field(32, ge=1)


class Rounds(Section):
    """Accelerated preference optimisation (APO): each round's reference is the policy of the round before, and each
    round's weights go ``extrapolation`` times its own step further."""

    count: int = Field(1, ge=1)
    extrapolation: float = Field(0.0, ge=0, lt=1)


class Trained(Supervised):
    """A model that is trained here, or comes finished."""

    checkpoint: str | None = None  # a finished one: it is used and nothing is trained
    eval_every: int | None = Field(None, ge=1)  # steps between losses on held-out rows; none: at the end only
    best: Best | None = None  # none: the last step's model

    @model_validator(mode="after")
    def _measured(self):
        if self.best is not None and not self.best.metric.startswith("eval_"):
            raise ValueError(f"best.metric = {self.best.metric!r} is not of held-out rows: name one of eval_*")
        if self.best is not None and self.eval_every is None:
            raise ValueError(f"best.metric = {self.best.metric!r} is measured every eval_every steps: set eval_every")
        return self


class Prefer(Trained):
    batch: int = Field(256, ge=1)
    loss: Spec = {"type": "dpo"}
    rounds: Rounds = Rounds()
    cache_reference: bool = False  # keep the reference's log-probs of every answer: pays from the second epoch on

    @model_validator(mode="after")
    def _one_best(self):
        if self.best is not None and self.rounds.count > 1:
            raise ValueError("best compares steps of one reference, and rounds.count moves it: leave one of them out")
        return self


class Normaliser(Section):
    """The location-aware normaliser of a segment scorer: what it is fitted on."""

    answers: Literal["pairs", "sampled"] = "pairs"  # the training pairs' answers, or answers of the reference
    limit: int = Field(60_000, ge=2)  # answers
    floor: float = Field(0.1, gt=0)  # the fitted std is never below this share of the std of all segments' values


class Reward(Trained):
    lr: float = Field(1e-6, gt=0)
    loss: Spec = {"type": "bradley_terry"}
    cutoff: float | None = Field(None, ge=0)  # entropy (nats) that starts a segment; 0: tokens; none: whole answers
    model: Model | None = None  # a scorer of another size with the same tokenizer; default: the SFT model
    normalize: bool = True  # of scores: (score - mean) / std over its evaluation pairs; of segments: by location
    normaliser: Normaliser = Normaliser()


class Kl(Section):
    """The KL penalty on every token, by default -coef * (log pi - log pi_ref), and how its coefficient moves."""

    coef: float = Field(0.01, ge=0)
    place: Literal["reward", "loss"] = "reward"
    estimator: Literal["k1", "k2", "k3"] = "k1"
    ema: float | None = Field(None, gt=0, lt=1)  # reference <- ema * reference + (1 - ema) * policy each iteration
    controller: Literal["fixed", "adaptive"] = "fixed"
    target: float | None = Field(None, gt=0)
    unit: Literal["sequence", "token"] = "sequence"  # of the measured KL and of ``target``, in nats
    horizon: int = Field(10_000, ge=1)  # samples

    @model_validator(mode="after")
    def _target(self):
        if (self.controller == "adaptive") != (self.target is not None):
            raise ValueError("controller = 'adaptive' needs a target, and a target needs controller = 'adaptive'")
        if self.controller == "adaptive" and self.coef == 0:
            raise ValueError("controller = 'adaptive' multiplies coef, and coef = 0 never moves: set coef above 0")
        return self


class Critic(Section):
    """The value model. Its schedule is the policy's, with a learning rate of its own."""

    trunk: Literal["own", "policy", "detached"] = "own"  # below its head; detached: the policy's, out of its reach
    lr: float = Field(9e-6, gt=0)
    init: Literal["scorer", "reference"] | None = None  # of a trunk of its own; none: scorer
    coef: float | None = Field(None, gt=0)  # of the value loss in the gradient of a policy's trunk; none: 0.1
    clip: float | None = Field(0.2, gt=0)
    warmup: int = Field(0, ge=0)  # first iterations that train the critic alone

    @model_validator(mode="after")
    def _of_this_trunk(self):
        remedy = "leave it out, or set it to 'none' where it is inherited"
        if self.init is not None and self.trunk != "own":
            raise ValueError(
                f"init = {self.init!r} is for trunk = 'own': on trunk = {self.trunk!r} the head is fresh; {remedy}"
            )
        if self.coef is not None and self.trunk != "policy":
            raise ValueError(
                f"coef = {self.coef:g} is for trunk = 'policy', where the value loss also trains the policy's trunk; "
                f"trunk is {self.trunk!r}: {remedy}"
            )
        return self

    @property
    def weight(self) -> float:
        """Of the value loss in the gradient."""
        if self.trunk != "policy":
            return 1.0
        return 0.1 if self.coef is None else self.coef


class Policy(Training):
    """RL. ``batch`` rollouts make one optimiser step, ``rollouts`` one buffer, ``updates`` passes over it."""

    method: str = "rto"  # a published list of reward terms, or "custom" with a list of your own in ``rewards``
    rewards: list[Spec] | None = None
    guide: str | None = None  # which of [guides] the terms read; default: that of [prefer]
    scorer: str | None = None  # which of [scorers] the terms read; default: that of [reward]
    rollouts: int = Field(1024, ge=1)
    group: int = Field(1, ge=1)  # answers a prompt
    updates: int = Field(1, ge=1)
    advantage: Spec = {"type": "gae"}
    whiten: bool | None = None  # none: the estimator's own convention
    advantage_clip: float | None = Field(None, gt=0)  # after whitening
    reward_scaling: Literal["std", "standardize"] | None = None  # by running moments of the answers' rewards
    reward_clip: float | None = Field(None, gt=0)  # of a token's reward without KL, after scaling
    max_missing: float = Field(0.5, ge=0, le=1)  # more answers without a reward than this share stop the run
    ptx: float = Field(0.0, ge=0)  # weight of the SFT loss on demonstrations, beside the policy loss
    loss: Spec = {"type": "ppo"}
    reduction: Literal["sequence", "token"] = "sequence"
    temperature: float = Field(1.0, gt=0)
    optimizer: Literal["adamw", "adam"] = "adam"
    kl: Kl = Kl()
    critic: Critic = Critic()
    samples_every: int = Field(5, ge=1)
    best: Best | None = None  # none: the last iteration's policy

    @model_validator(mode="after")
    def _batches(self):
        if self.rollouts % self.batch:
            raise ValueError(f"rollouts = {self.rollouts} is not a multiple of batch = {self.batch}")
        if self.batch % self.group:
            raise ValueError(f"batch = {self.batch} is not a multiple of group = {self.group}")
        if self.best is not None and self.best.metric.startswith(("eval_", "policy/", "value/")):
            raise ValueError(f"best.metric = {self.best.metric!r} is not of answers, as reward/total is")
        if self.kl.controller == "adaptive" and self.rollouts >= 5 * self.kl.horizon:
            raise ValueError(
                f"kl.horizon = {self.kl.horizon:,} answers is a fifth of rollouts = {self.rollouts:,} or less, so that "
                "one iteration could take kl.coef to zero and below: raise it, 10,000 is usual"
            )
        if (self.method == "custom") != (self.rewards is not None):
            raise ValueError("a list of rewards goes with method = 'custom', and only with it")
        return self


class Evaluation(Section):
    prompts: int = Field(400, ge=2)
    samples: int = Field(1, ge=1)  # answers a prompt
    temperature: float = Field(1.0, ge=0)  # 0: greedy
    top_p: float = Field(1.0, gt=0, le=1)
    bootstrap: int = Field(10_000, ge=100)
    oracle: Oracle = HeldoutOracle()


class Checkpoints(Section):
    """How often a stage that is being trained is saved, so that it can go on where it was cut."""

    every: int = Field(50, ge=1)  # steps of sft, prefer and reward
    rl_every: int = Field(5, ge=1)  # iterations
    keep: int = Field(2, ge=1)  # the newest so many are kept


class NonFinite(Section):
    """What happens to a step with a loss, gradient, log-prob, value or reward that is not finite. It is never applied,
    and what is known of it goes to ``incidents/``."""

    skip: int = Field(3, ge=0)  # so many of such steps in a row are left out; at the next one:
    then: Literal["stop", "rollback"] = "stop"  # rollback: back to the last checkpoint, with a smaller learning rate
    factor: float = Field(0.5, gt=0, lt=1)  # of the learning rate, at each rollback
    rollbacks: int = Field(3, ge=1)  # of one stage; after them: stop


class Config(Section):
    """A whole run."""

    output: str = "runs/rto"
    seed: int = Field(0, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []
    stages: list[Stage] = Field(list(STAGES), min_length=1)
    checkpoints: Checkpoints = Checkpoints()
    nonfinite: NonFinite = NonFinite()
    model: Model
    data: Data
    sft: Sft = Sft()
    prefer: Prefer = Prefer()
    reward: Reward = Reward()
    policy: Policy = Policy()
    guides: dict[str, dict[str, Any]] = {}  # name -> keys of [prefer] that differ: further guides, compared too
    scorers: dict[str, dict[str, Any]] = {}  # name -> keys of [reward] that differ: further scorers
    baselines: dict[str, dict[str, Any]] = {}  # name -> keys of [policy] that differ: trained for comparison
    evaluation: Evaluation = Evaluation()

    @field_validator("guides", "scorers", "baselines")
    @classmethod
    def _names(cls, named: dict[str, Any]) -> dict[str, Any]:
        """Names become folders of the run and adapters of a model."""
        for name in named:
            if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}", name):
                raise ValueError(
                    f"{name!r} is no name: up to 64 letters, digits, - and _ make one, and - is not the first"
                )
        return named

    @field_validator("stages")
    @classmethod
    def _once(cls, stages: list[Stage]) -> list[Stage]:
        if len(set(stages)) < len(stages):
            raise ValueError(f"a stage is named twice in {stages}")
        return stages

    @field_validator("output")
    @classmethod
    def _a_path(cls, output: str) -> str:
        if not output or "\0" in output:
            raise ValueError(f"{output!r} is no folder")
        return output

    @model_validator(mode="after")
    def _together(self):
        if (self.evaluation.oracle.type == "world") > (self.data.type == "world"):
            raise ValueError("evaluation.oracle.type = 'world' goes with data.type = 'world' only")
        if self.evaluation.oracle.type == "heldout" and self.data.type == "world":
            raise ValueError("data.type = 'world' has no pairs for an oracle: set evaluation.oracle.type = 'world'")
        if self.data.type == "files" and self.data.pairs is None and set(self.stages) & {"prefer", "reward"}:
            raise ValueError("data.pairs is missing: name a file or a data set, for example --data.pairs prefs.jsonl")
        return self

    def preferences(self) -> dict[str, Prefer]:
        """Every guide by its stage: "prefer", then "prefer/NAME" of [guides]. Raises as :meth:`policies`."""
        further = {f"prefer/{name}": _changed(self.prefer, changed) for name, changed in self.guides.items()}
        return {"prefer": self.prefer, **further}

    def rewards(self) -> dict[str, Reward]:
        """Every scorer by its stage: "reward", then "reward/NAME" of [scorers]. Raises as :meth:`policies`."""
        further = {f"reward/{name}": _changed(self.reward, changed) for name, changed in self.scorers.items()}
        return {"reward": self.reward, **further}

    def policies(self) -> dict[str, Policy]:
        """Every policy that RL trains, by name: the baselines first, then the run's own method.

        Raises:
            ValueError: (also pydantic's) a baseline's keys do not fit [policy].
        """
        base = self.policy.model_dump()
        named = {}
        for name, changed in self.baselines.items():
            published = changed.get("method", "custom") != "custom"  # then its terms are the method's, not base's list
            named[name] = Policy.model_validate(_merge(base | {"rewards": None} if published else base, changed))
        if self.policy.method in named:
            raise ValueError(f"baselines.{self.policy.method} has the name of policy.method: give it another name")
        return {**named, self.policy.method: self.policy}


def _changed(section: Main, changed: dict[str, Any]) -> Main:
    return type(section).model_validate(_merge(section.model_dump(), changed))


def _merge(base: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changed.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict) and "type" not in value
        merged[key] = _merge(merged[key], value) if both else value
    return merged
