"""The stages of a recipe in order. A stage that is finished is skipped; what it was made from is checked."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from rto import config as recipe
from rto import rewards
from rto.advantages import ADVANTAGES
from rto.batch import Completions
from rto.config import Config, Evaluation, Policy, Spec
from rto.data.chat import PairRow, PromptRow, encode_prompts
from rto.data.rows import Rows, make_rows, make_tokenizer
from rto.data.sources import Loaded, TextPrompt, read_prompts, write_rejected
from rto.data.worlds import token_rewards
from rto.evaluation import policies as contest
from rto.models.checkpoint import ScorerNotes, merged, read_notes, save_notes, save_role
from rto.models.load import load_tokenizer, locate, same_vocabulary, scratch_network
from rto.models.role import Role
from rto.models.runtime import Runtime, peak_memory_mb
from rto.models.workshop import Workshop, verify
from rto.policy import LOSSES
from rto.policy import train as rl_loop
from rto.preferences import PREFERENCE_LOSSES, REWARD_LOSSES
from rto.preferences.train import PairObjective, SftObjective, evaluate, fit
from rto.recipe import complete, nearest
from rto.report.html import write_report
from rto.report.log import Progress, RunLog
from rto.seeds import derive


def resolve(config: Config) -> Config:
    """Check every loss, term and estimator of the recipe against its table and fill in its defaults.

    Raises:
        ValueError: naming the key, the nearest valid one and what is known.
    """
    changes: dict[str, Any] = {
        "prefer": {"loss": complete(config.prefer.loss, PREFERENCE_LOSSES, "prefer.loss")},
        "reward": {"loss": complete(config.reward.loss, REWARD_LOSSES, "reward.loss")},
        "policy": {
            "loss": complete(config.policy.loss, LOSSES, "policy.loss"),
            "advantage": complete(config.policy.advantage, ADVANTAGES, "policy.advantage"),
        },
    }
    for policy in config.policies().values():
        terms_of(policy)
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=values) for name, values in changes.items()}
    )


def terms_of(policy: Policy) -> list[Spec]:
    """The reward terms of a policy, complete: its method's, or its own list."""
    if policy.rewards is None and policy.method not in rewards.METHODS:
        known = ", ".join([*rewards.METHODS, "custom"])
        hint = nearest(policy.method, rewards.METHODS)
        raise ValueError(f"policy.method = {policy.method!r} is unknown{hint}; known: {known}")
    listed = rewards.METHODS[policy.method] if policy.rewards is None else policy.rewards
    functions = {name: term.function for name, term in rewards.TERMS.items()}
    return [complete(term, functions, f"policy.rewards[{i}]") for i, term in enumerate(listed)]


class Run:
    """A run folder and everything that its stages share.

    Raises:
        ValueError: the recipe is wrong, or the folder holds the run of another one.
    """

    def __init__(self, config: Config, quiet: bool = False) -> None:
        self.config = resolve(config)
        self.folder = Path(config.output)
        self.runtime = Runtime(config.device, config.trackers, str(self.folder))
        if self.runtime.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_json(self.folder / "config.json", self.config.model_dump(mode="json"))
        self.runtime.start_trackers("rto", self.config.model_dump(mode="json"))
        self.log = RunLog(self.folder) if self.runtime.main else _Nothing()
        self.progress = Progress(enabled=self.runtime.main and not quiet)

    @cached_property
    def rows(self) -> Rows:
        rows = make_rows(self.config, self.tokenizer)
        if self.runtime.main and rows.rejected:
            write_rejected(self.folder / "rejected_rows.jsonl", rows.rejected)
        return rows

    @cached_property
    def tokenizer(self):
        model = self.config.model
        return make_tokenizer(self.config, None if isinstance(model, recipe.Scratch) else locate(model))

    @property
    def base(self) -> str:
        """The SFT model, which is the reference: the sft stage's, or the model itself."""
        return str(self.folder / "sft") if "sft" in self.config.stages else locate(self.config.model)

    @property
    def scorer_pad(self) -> int:
        """A padding id for scorers that is not the end of a response; see ``checkpoint.save_role``."""
        encoder = self.rows.encoder
        if encoder.pad != encoder.end:
            return encoder.pad
        special = [i for i in self.tokenizer.all_special_ids if i != encoder.end]
        return special[0] if special else encoder.pad

    def workshop(self) -> Workshop:
        return Workshop(self.config.model, self.base, self.tokenizer, self.runtime, self.config.seed)

    # --- bookkeeping ------------------------------------------------------------------------------------

    def finished(self) -> dict[str, Any]:
        path = self.folder / "stages.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def stage(self, name: str, inputs: dict[str, Any], work: Callable[[], str]) -> None:
        """Do ``work`` unless it is done. It returns the path of what it made, relative to the folder."""
        inputs = json.loads(json.dumps(inputs))
        done = self.finished().get(name)
        if done is not None:
            if changed := _differences(done["inputs"], inputs):
                raise ValueError(
                    f"{self.folder}: stage {name} was made with another recipe ({'; '.join(changed[:3])}). "
                    "Choose another --output, or delete that folder"
                )
            self.say(f"{name}: done before, in {self.folder / done['path']}")
            return
        begun = time.perf_counter()
        if self.runtime.main:
            self.log.drop_stage(name)
        path = work()
        self.runtime.wait()
        if self.runtime.main:
            record = {"path": path, "seconds": time.perf_counter() - begun, "peak_memory_mb": peak_memory_mb()}
            _write_json(self.folder / "stages.json", self.finished() | {name: record | {"inputs": inputs}})
        self.runtime.wait()

    def inputs(self, *sections: str, **more: Any) -> dict[str, Any]:
        """The parts of the recipe that a stage is made from."""
        dumped = self.config.model_dump(mode="json")
        chosen = {key: dumped[key] for key in ("seed", "model", "data", *sections)}
        if "sft" in sections and "sft" not in self.config.stages:
            chosen["sft"] = None
        return chosen | more

    def path(self, stage: str) -> str:
        """Where a finished stage's model is.

        Raises:
            ValueError: it is not finished.
        """
        checkpoint = {"prefer": self.config.prefer.checkpoint, "reward": self.config.reward.checkpoint}.get(stage)
        if checkpoint is not None:
            return checkpoint
        done = self.finished().get(stage)
        if done is None:
            raise ValueError(f"{self.folder}: stage {stage} is not finished: run `rto run` or `rto {stage}` first")
        return str(self.folder / done["path"])

    def say(self, text: str) -> None:
        self.progress.say(text)


# --- stages -------------------------------------------------------------------------------------------


def sft(run: Run) -> None:
    """Train the reference on demonstrations; with LoRA the adapter is merged, so that the reference is one model."""

    def work() -> str:
        config, rows = run.config, run.rows
        model = config.model
        if isinstance(model, recipe.Scratch):
            network = scratch_network(model, run.tokenizer, rows.encoder.end, config.seed)
            role = Workshop(model, "", run.tokenizer, run.runtime, config.seed).new_policy("sft", network)
        else:
            shop = Workshop(model, locate(model), run.tokenizer, run.runtime, config.seed)
            role = shop.new_policy("sft")
        verify(role, rows.encoder.end)
        objective = SftObjective(role, rows.encoder.pad)
        _fit(run, "sft", objective, rows.answers, config.sft)
        if role.adapter is not None:
            merged(role)
            role = Role(role.backbone)
        _save(run, role, "sft", rows.encoder.pad)
        return "sft"

    run.stage("sft", run.inputs("sft"), work)


def prefer(run: Run) -> None:
    """Train the guide on pairs."""
    if run.config.prefer.checkpoint is not None:
        run.say(f"prefer: the guide is {run.config.prefer.checkpoint}")
        return

    def work() -> str:
        config, rows, shop = run.config, run.rows, run.workshop()
        role, reference = shop.new_policy("guide"), shop.reference()
        verify(reference, rows.encoder.end)
        options = {key: value for key, value in config.prefer.loss.items() if key != "type"}
        loss = PREFERENCE_LOSSES[config.prefer.loss["type"]]
        objective = PairObjective(role, loss, options, rows.encoder.pad, reference)
        _fit(run, "prefer", objective, rows.pairs, config.prefer, rows.test_pairs)
        _save(run, role, "prefer", rows.encoder.pad)
        return "prefer"

    run.stage("prefer", run.inputs("sft", "prefer"), work)


def reward(run: Run) -> None:
    """Train the scorer on pairs; its mean and std over the held-out answers are stored with it."""
    if run.config.reward.checkpoint is not None:
        run.say(f"reward: the scorer is {run.config.reward.checkpoint}")
        return
    run.stage("reward", run.inputs("sft", "reward"), lambda: _scorer(run, "reward", run.rows.pairs, run.config.seed))


def oracle(run: Run) -> None:
    """Train the held-out oracle: a scorer of its own on pairs that no other stage sees."""
    seed = derive(run.config.seed, "oracle") % 2**31
    pairs = run.rows.oracle_pairs
    if not pairs:
        raise ValueError("evaluation.oracle.type = 'heldout' needs pairs of its own: set data.oracle above 0, say 0.2")
    run.stage("oracle", run.inputs("sft", "reward"), lambda: _scorer(run, "oracle", pairs, seed))


def _scorer(run: Run, stage: str, pairs: Sequence[PairRow], seed: int) -> str:
    config, rows = run.config, run.rows
    shop = Workshop(config.model, run.base, run.tokenizer, run.runtime, seed)
    role = shop.new_scorer(stage, config.reward.model)
    options = {key: value for key, value in config.reward.loss.items() if key != "type"}
    objective = PairObjective(role, REWARD_LOSSES[config.reward.loss["type"]], options, rows.encoder.pad)
    _fit(run, stage, objective, pairs, config.reward, rows.test_pairs, seed)
    measured = evaluate(objective, rows.test_pairs, config.reward, run.runtime)
    values = objective.scores(rows.test_pairs, config.reward.micro_tokens).double()
    _save(run, role, stage, run.scorer_pad)
    if run.runtime.main:
        notes = ScorerNotes(values.mean().item(), max(values.std().item(), 1e-8), measured["accuracy"], len(values) // 2)
        save_notes(run.folder / stage, notes)
    return stage


def rl(run: Run) -> None:
    """Train every policy of the recipe: the baselines, then the run's own method."""
    for name, policy in run.config.policies().items():
        terms = terms_of(policy)
        stage = f"rl/{name}"
        sections = ["sft"] + ["prefer"] * ("guide" in rewards.needs(terms)) + ["reward"]
        inputs = run.inputs(*sections, policy=policy.model_dump(mode="json"), terms=terms)
        run.stage(stage, inputs, lambda stage=stage, policy=policy, terms=terms: _rl(run, stage, policy, terms))


def _rl(run: Run, stage: str, policy: Policy, terms: list[Spec]) -> str:
    config, rows, shop = run.config, run.rows, run.workshop()
    needed = rewards.needs(terms)
    size = config.reward.model
    critic = _critic(run, shop, policy, size)
    roles = rl_loop.Roles(shop.new_policy("policy"), shop.reference(), critic)
    if "guide" in needed:
        roles.guide = shop.open_policy(run.path("prefer"), "guide")
    if "scores" in needed:
        roles.scorer, roles.notes = _open_scorer(run, shop)
    known = _truth(config)
    rl_loop.train(
        stage,
        roles,
        rows.prompts,
        policy,
        terms,
        encoder=rows.encoder,
        seed=config.seed,
        runtime=run.runtime,
        log=run.log,
        progress=run.progress,
        oracle=contest.judge_by_truth(known, rows.encoder) if known else None,
    )
    _save(run, roles.policy, stage, rows.encoder.pad)
    return stage


def _critic(run: Run, shop: Workshop, policy: Policy, size: Any) -> Role:
    if policy.critic.init == "scorer":
        return shop.open_scorer(run.path("reward"), "critic", size, trained=True)
    return shop.new_scorer("critic", None)


def _open_scorer(run: Run, shop: Workshop) -> tuple[Role, ScorerNotes | None]:
    folder = run.path("reward")
    if run.config.reward.checkpoint is not None:
        same_vocabulary(run.tokenizer, load_tokenizer(folder), "scorer", folder)
    notes = read_notes(folder) if run.config.reward.normalize else None
    return shop.open_scorer(folder, "scorer", run.config.reward.model, trained=False), notes


def _truth(config: Config) -> contest.Truth | None:
    """The world's token rewards; real data have none."""
    return token_rewards if isinstance(config.data, recipe.World) else None


def evaluation(run: Run) -> None:
    """All policies of the run against each other under the oracle; and which tokens their rewards credit."""
    if run.config.evaluation.oracle.type == "heldout":
        oracle(run)
    stages = {name: value for name, value in run.finished().items() if name.startswith("rl/")}
    inputs = run.inputs("sft", "prefer", "reward", "policy", "baselines", "evaluation", trained=sorted(stages))
    run.stage("evaluate", inputs, lambda: _evaluate(run))


def _evaluate(run: Run) -> str:
    config, rows, shop = run.config, run.rows, run.workshop()
    settings, budget = config.evaluation, config.policy.micro_tokens
    prompts = rows.test_prompts[: settings.prompts]
    asked = [row for row in prompts for _ in range(settings.samples)]
    truth, reference = _truth(config), shop.reference()
    judge, description = _judge(run, shop, truth)

    places = {"sft": None, config.prefer.loss["type"]: run.path("prefer")} if _has_guide(run) else {"sft": None}
    places |= {name: run.path(f"rl/{name}") for name in config.policies() if f"rl/{name}" in run.finished()}
    answers, scores, kls, views = {}, {}, {}, []
    run.progress.start("evaluate", len(places))
    for number, (name, place) in enumerate(places.items(), 1):
        role = reference if place is None else shop.open_policy(place, f"evaluated-{number}")
        answers[name] = contest.answer(role, prompts, settings, rows.encoder, config.seed, budget, run.runtime)
        scores[name] = judge(asked, answers[name].completions)
        kls[name] = contest.kl_to_reference(role, reference, answers[name], budget)
        if name in config.policies():
            views += _credit_views(run, shop, name, role, reference, asked, answers[name].completions, truth)
        run.progress.update(number, {"score": sum(scores[name]) / len(scores[name])})

    found = contest.compare_policies(answers, scores, kls, prompts, settings, config.seed)
    found |= {"oracle": description, "accuracy": _accuracies(run)}
    table = None
    if truth is not None:
        methods = {name: terms_of(policy) for name, policy in config.policies().items()}
        guide, scorer, notes = _readers(run, shop, [t for terms in methods.values() for t in terms])
        sample = answers["sft"].completions
        signals = contest.signals_of(sample, reference, reference, guide, scorer, notes, budget)
        table = contest.credit_table(methods, asked, sample, signals, rows.encoder, truth, config.seed)
    if run.runtime.main:
        folder = run.folder / "evaluation"
        folder.mkdir(exist_ok=True)
        for name, made in answers.items():
            lines = [
                {"prompt": row.text, "answer": text, "finished": done, "score": score}
                for row, text, done, score in zip(
                    asked, made.texts, made.completions.finished.tolist(), scores[name], strict=True
                )
            ]
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            (folder / f"answers-{name}.jsonl").write_text(text, encoding="utf-8")
        _write_json(run.folder / "evaluation.json", found)
        _write_json(run.folder / "credit.json", {"methods": table, "answers": views})
    return "evaluation"


def _judge(run: Run, shop: Workshop, truth: contest.Truth | None) -> tuple[contest.Oracle, str]:
    settings = run.config.evaluation.oracle
    budget = run.config.policy.micro_tokens
    if settings.type == "world":
        assert truth is not None
        return contest.judge_by_truth(truth, run.rows.encoder), "the tiny world's own reward, exact"
    if settings.type == "heldout":
        role = shop.open_scorer(run.path("oracle"), "oracle", run.config.reward.model, trained=False)
        notes = read_notes(run.path("oracle"))
        said = f"a scorer trained on {len(run.rows.oracle_pairs)} pairs that no other stage saw; right on "
        said += f"{notes.accuracy:.1%} of {notes.pairs} held-out pairs"
        raw = contest.judge_by(role, budget)
        return lambda prompts, c: [(score - notes.mean) / notes.std for score in raw(prompts, c)], said
    same_vocabulary(run.tokenizer, load_tokenizer(settings.name), "oracle", settings.name)
    own = Workshop(recipe.Pretrained(name=settings.name), settings.name, run.tokenizer, run.runtime, run.config.seed)
    return contest.judge_by(own.open_scorer(settings.name, "oracle", None, trained=False), budget), settings.name


def _has_guide(run: Run) -> bool:
    return run.config.prefer.checkpoint is not None or "prefer" in run.finished()


def _readers(run: Run, shop: Workshop, terms: list[Spec]) -> tuple[Role | None, Role | None, ScorerNotes | None]:
    """Guide, scorer and its normaliser, where these terms read them."""
    needed = rewards.needs(terms)
    guide = shop.open_policy(run.path("prefer"), "guide") if "guide" in needed else None
    scorer, notes = _open_scorer(run, shop) if "scores" in needed else (None, None)
    return guide, scorer, notes


def _credit_views(
    run: Run,
    shop: Workshop,
    name: str,
    role: Role,
    reference: Role,
    asked: Sequence[PromptRow],
    completions: Completions,
    truth: contest.Truth | None,
    count: int = 4,
) -> list[dict[str, Any]]:
    policy = run.config.policies()[name]
    terms, budget = terms_of(policy), run.config.policy.micro_tokens
    step = run.config.evaluation.samples
    few = completions.rows(slice(0, count * step, step))
    guide, scorer, notes = _readers(run, shop, terms)
    signals = contest.signals_of(few, role, reference, guide, scorer, notes, budget)
    return contest.credit_views(name, asked[::step], few, signals, terms, policy.kl.coef, run.rows.encoder, truth, count)


def _accuracies(run: Run) -> dict[str, float | None]:
    """Held-out accuracy of guide and scorer, from the last row of their metrics."""
    from rto.report.log import read_metrics

    found = {}
    for name, stage in (("guide", "prefer"), ("scorer", "reward"), ("oracle", "oracle")):
        rows = [row for row in read_metrics(run.folder, stage) if "eval_accuracy" in row]
        found[name] = rows[-1]["eval_accuracy"] if rows else None
    return found


def report(run: Run) -> Path:
    """Write report.html; always afresh."""
    path = run.folder / "report.html"
    if run.runtime.main:
        path = write_report(run.folder)
    run.runtime.wait()
    return path


STAGES: dict[str, Callable[[Run], Any]] = {
    "sft": sft,
    "prefer": prefer,
    "reward": reward,
    "rl": rl,
    "evaluate": evaluation,
    "report": report,
}


def run(config: Config, stages: Sequence[str] | None = None, quiet: bool = False) -> Path:
    """Run the stages of a recipe (or only ``stages``). Returns the run folder."""
    job = Run(config, quiet)
    with job.progress:
        for name in stages or config.stages:
            STAGES[name](job)
    job.runtime.close()
    return job.folder


def summary(folder: Path) -> str:
    """The win-rate matrix and the report's path, for a terminal."""
    lines = []
    path = folder / "evaluation.json"
    if path.exists():
        found = json.loads(path.read_text())
        comparison = found["comparison"]
        names = comparison["names"]
        width = max(map(len, names)) + 2
        lines += [f"oracle: {found['oracle']}", "win rate of the row against the column, with the 95 % interval:"]
        lines += [" " * width + "".join(f"{name:>20}" for name in names)]
        for i, name in enumerate(names):
            cells = [
                "–" if i == j else f"{100 * comparison['matrix'][i][j]:.1f} "
                f"[{100 * comparison['matrix_low'][i][j]:.1f}, {100 * comparison['matrix_high'][i][j]:.1f}]"
                for j in range(len(names))
            ]
            lines.append(f"{name:<{width}}" + "".join(f"{cell:>20}" for cell in cells))
        lines.append(" " * width + "".join(f"{head:>20}" for head in ("oracle score", "KL (nats)", "tokens")))
        for name, row in comparison["policies"].items():
            score = f"{row['score']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
            lines.append(f"{name:<{width}}{score:>20}{row['kl']:>20.2f}{row['length']:>20.1f}")
    if (folder / "report.html").exists():
        lines.append(f"report: {folder / 'report.html'}")
    return "\n".join(lines)


def generate(
    config: Config,
    policy: str | None = None,
    *,
    prompts: Sequence[str] | None = None,
    file: str | None = None,
    limit: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Answers of one policy of a run: to ``prompts``, to the prompts of a file, or to the held-out ones.

    Raises:
        ValueError: the run has no such policy, or the file is refused.
    """
    job = Run(config, quiet=True)
    name = policy or config.policy.method
    guide = config.prefer.loss["type"]
    shop = job.workshop()
    if name == "sft":
        role = shop.reference()
    else:
        role = shop.open_policy(job.path("prefer" if name == guide else f"rl/{name}"), "generated")
    encoder = job.rows.encoder
    chat = isinstance(config.data, recipe.Files)
    if prompts:
        texts = [[{"role": "user", "content": text}] if chat else text for text in prompts]
        asked = encode_prompts(encoder, Loaded("--prompt", [TextPrompt(i, text) for i, text in enumerate(texts, 1)])).rows
    elif file:
        source = recipe.Files(prompts=file, on_bad_row="skip")
        asked = encode_prompts(encoder, read_prompts(source)).rows
    else:
        asked = job.rows.test_prompts
    settings = Evaluation(temperature=temperature, top_p=top_p)
    asked = asked[:limit]
    made = contest.answer(role, asked, settings, encoder, seed, config.policy.micro_tokens, job.runtime)
    done = made.completions.finished.tolist()
    return [
        {"prompt": row.text, "answer": text, "finished": ended, "policy": name}
        for row, text, ended in zip(asked, made.texts, done, strict=True)
    ]


# --- helpers ------------------------------------------------------------------------------------------


def _fit(run: Run, stage: str, objective: Any, rows: Sequence[Any], training: Any, held_out=(), seed=None) -> None:
    fit(
        stage,
        objective,
        rows,
        training,
        seed=run.config.seed if seed is None else seed,
        runtime=run.runtime,
        log=run.log,
        progress=run.progress,
        held_out=held_out,
    )


def _save(run: Run, role: Role, stage: str, pad: int) -> None:
    if run.runtime.main:
        save_role(role, run.folder / stage, run.tokenizer, pad)
    run.runtime.wait()


def _write_json(path: Path, value: Any) -> None:
    """All of it or nothing."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _differences(old: Any, new: Any, key: str = "") -> list[str]:
    """Dotted keys whose values differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{key}.{k}" if key else k)]
    return [] if old == new else [f"{key} was {old!r} and is {new!r}"]


class _Nothing:
    """The log of every process but the main one."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None
