"""The work of the evaluation stage: all policies of a run against each other, and where their rewards put credit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from rto import config as recipe
from rto.batch import Completions, Signals
from rto.data.chat import PromptRow
from rto.data.worlds import token_rewards
from rto.evaluation import policies as contest
from rto.evaluation.runs import used_in_training
from rto.evaluation.winrate import without_nan
from rto.models.checkpoint import read_notes
from rto.models.load import opened_as, same_vocabulary, tokenizer_at
from rto.models.memory import Budget
from rto.models.role import Role
from rto.models.workshop import Workshop
from rto.pipeline.job import Job, write_json
from rto.pipeline.readers import make_reader, open_policy
from rto.pipeline.resolve import guide_names, term_functions, terms_of
from rto.recipe import complete
from rto.report.log import read_metrics
from rto.rollouts.functions import call_function, load_function
from rto.rollouts.http import HttpScorer
from rto.rollouts.score import token_logprobs
from rto.rollouts.signals import Reader, missing

SHOWN = 4  # answers of each policy whose credit the report shows
Failure = Callable[[], str | None]  # why an oracle's latest scores are missing, where it knows


def evaluate(job: Job) -> str:
    """Write evaluation.json, credit.json and every policy's answers."""
    config, rows, shop = job.config, job.rows, job.workshop()
    settings = config.evaluation
    budget = Budget(config.policy.reading_tokens, job.progress.say, job.runtime.gather_all, "reading")
    prompts = rows.test_prompts[: settings.prompts]
    asked = [row for row in prompts for _ in range(settings.samples)]
    truth = token_rewards if isinstance(config.data, recipe.World) else None
    reference = shop.reference()
    judge, description, failure = _judge(job, shop, truth, budget)

    places = contestants(job)
    answers: dict[str, contest.Answers] = {}
    scores, kls = {}, {}
    views: list[dict[str, Any]] = []
    table: dict[str, Any] = {}
    opened: dict[str, Any] = {"reference": reference}
    job.progress.start("evaluate", len(places))
    for number, (name, stage) in enumerate(places.items(), 1):
        role = reference if stage == "sft" else open_policy(job, shop, stage, f"policy{number}")
        answers[name] = contest.answer(role, prompts, settings, rows.encoder, config.seed, budget, job.runtime)
        scores[name] = _scores(job, judge, failure, name, asked, answers[name].completions, budget)
        kls[name] = budget.within(partial(contest.kl_to_reference, role, reference, answers[name]))
        credit = _credit(job, shop, opened, name, role, prompts, answers, truth, budget)
        views += credit[0]
        table |= credit[1]
        job.progress.update(number, {"score": fmean(score for score in scores[name] if not math.isnan(score))})
        job.check_stop()

    views.sort(key=lambda view: view["policy"] != config.policy.method)  # the run's own method first
    found = contest.compare_policies(answers, scores, kls, prompts, settings, config.seed)
    if job.runtime.main:
        _write_answers(job, asked, answers, scores, kls)
        flagged = used_in_training(config.model_dump(mode="json"), settings.oracle.model_dump(mode="json"))
        said = {"oracle": description, "oracle_used_in_training": flagged, "accuracy": _accuracies(job)}
        write_json(job.folder / "evaluation.json", found | said)
        write_json(job.folder / "credit.json", {"methods": table if truth is not None else None, "answers": views})
    return "evaluation"


def contestants(job: Job) -> dict[str, str]:
    """Every finished policy by name, with its stage: sft, the guides, then RL's."""
    config, done = job.config, job.finished()
    places = {"sft": "sft"}
    for name, stage in guide_names(config).items():
        if stage in done or config.preferences()[stage].checkpoint is not None:
            places[name] = stage
    return places | {name: f"rl/{name}" for name in config.policies() if f"rl/{name}" in done}


def _credit(
    job: Job,
    shop: Workshop,
    opened: dict[str, Any],
    name: str,
    role: Role,
    prompts: Sequence[PromptRow],
    answers: dict[str, contest.Answers],
    truth: contest.Truth | None,
    budget: Budget,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Where a policy's rewards put credit: on some of its own answers, and, against the truth, on the reference's
    first answer to each prompt. A guide's credit is its log-ratio to the reference."""
    config, encoder, step = job.config, job.rows.encoder, job.config.evaluation.samples
    policy = config.policies().get(name)
    if policy is None:
        if truth is None or role is opened["reference"]:
            return [], {}
        terms = [complete({"type": "implicit", "scale": 1.0, "clip": None}, term_functions(), name)]
        reader = Reader(terms, opened["reference"], encoder, config.policy.reading_tokens, guide=role)
        policy, few = config.policy, None
    else:
        terms = terms_of(policy)
        reader = make_reader(job, shop, policy, terms, opened)
        few = answers[name].completions.rows(slice(0, SHOWN * step, step))
    views, table = [], {}
    if few is not None:
        few, signals, asked = _signals(job, reader, few, role, prompts[:SHOWN], budget, policy)
        kl = (policy.kl.coef if policy.kl.place == "reward" else 0.0, policy.kl.estimator)
        views = contest.credit_views(name, asked, few, signals, terms, kl, encoder, truth)
    if truth is not None:
        sample = answers["sft"].completions.rows(slice(0, None, step))
        sample, signals, asked = _signals(job, reader, sample, reader.reference, prompts, budget, policy)
        table[name] = contest.credit_of(terms, asked, sample, signals, encoder, truth, config.seed)
    return views, table


def _signals(
    job: Job,
    reader: Reader,
    completions: Completions,
    role: Role,
    prompts: Sequence[PromptRow],
    budget: Budget,
    policy: recipe.Policy,
) -> tuple[Completions, Signals, list[PromptRow]]:
    """What the terms of ``policy`` read of these answers, without those whose reward is missing."""

    def work(tokens: int) -> dict[str, Tensor]:
        # A baseline may have micro_tokens of its own: its passes are halved as often as those of [policy].
        reader.budget = max(1, policy.reading_tokens * tokens // job.config.policy.reading_tokens)
        return reader.read(completions, token_logprobs(role, completions, reader.budget), role, prompts)

    parts = budget.within(work)
    keep = (~missing(parts)).nonzero().squeeze(-1)
    signals = Signals(**{name: part[keep] for name, part in parts.items()})
    return completions.rows(keep), signals, [prompts[i] for i in keep.tolist()]


def _scores(
    job: Job,
    judge: contest.Oracle,
    failure: Failure,
    name: str,
    asked: Sequence[PromptRow],
    completions: Completions,
    budget: Budget,
) -> list[float]:
    """The oracle's score of each answer, NaN where it gave none. Every process asks for its share.

    Raises:
        ValueError: there is no score at all.
    """
    runtime = job.runtime

    def work(_: int) -> tuple[list[float], str | None]:
        try:
            return judge(runtime.share(list(asked)), completions.rows(slice(runtime.rank, None, runtime.world))), None
        except ValueError as error:  # told by all processes: the others would wait for this one
            return [], str(error)

    own, refused = budget.within(work)
    if errors := [said for said in runtime.gather_all(refused) if said is not None]:
        raise ValueError(errors[0])
    found = runtime.gather_rows({"scores": torch.tensor(own, dtype=torch.float64)})["scores"].tolist()
    missing = sum(map(math.isnan, found))
    if missing:
        reason = next((said for said in runtime.gather_all(failure()) if said), "it gave null, None or NaN")
        told = f"the oracle gave no score for {missing} of {len(found)} answers of {name}: {reason}"
        if missing == len(found):
            raise ValueError(f"{told}. See to [evaluation.oracle], then run rto evaluate again")
        job.tell(told)
    return found


def _judge(
    job: Job, shop: Workshop, truth: contest.Truth | None, budget: Budget
) -> tuple[contest.Oracle, str, Failure]:
    """The oracle, what the report says of it, and what it last failed with."""
    settings = job.config.evaluation.oracle
    if isinstance(settings, recipe.WorldOracle):
        assert truth is not None
        return contest.judge_by_truth(truth, job.rows.encoder), "the tiny world's own reward, exact", _no_failure
    if isinstance(settings, recipe.HeldoutOracle):
        folder = job.path("oracle")
        notes = read_notes(folder)
        raw = contest.judge_by(shop.open_scorer(folder, "oracle", job.config.reward.model, trained=False), budget)
        said = (
            f"a scorer trained on {len(job.rows.oracle_pairs)} pairs that no other stage saw; it is right on "
            f"{notes.accuracy:.1%} of {notes.pairs} held-out pairs; scores in standard deviations"
        )
        return lambda prompts, c: [(score - notes.mean) / notes.std for score in raw(prompts, c)], said, _no_failure
    if isinstance(settings, recipe.FunctionOracle):
        function = load_function(settings.function)
        ask = partial(call_function, function, settings.function)
        return contest.judge_by_words(ask, job.rows.encoder), f"the function {settings.function}", _no_failure
    if isinstance(settings, recipe.HttpOracle):
        server = HttpScorer(settings.url, settings.timeout, settings.retries, settings.batch)

        def post(prompts: list[str], texts: list[str], tokens: list[list[str]]) -> Tensor:
            server.last_failure = None  # of these answers alone
            return server.score(prompts, texts, tokens)

        oracle = contest.judge_by_words(post, job.rows.encoder)
        return oracle, f"the server {server.name}", lambda: server.last_failure
    model = opened_as(settings.name, job.config.model, settings.trust_remote_code)
    same_vocabulary(job.tokenizer, tokenizer_at(settings.name, model), "oracle", settings.name)
    own = Workshop(model, settings.name, job.tokenizer, job.runtime, job.config.seed)
    scorer = own.open_scorer(settings.name, "oracle", None, trained=False)
    return contest.judge_by(scorer, budget), settings.name, _no_failure


def _no_failure() -> None:
    """A model or function that fails ends the evaluation at once."""


def _accuracies(job: Job) -> dict[str, float | None]:
    """Accuracy of guide, scorer and oracle on the held-out pairs; None for one that was not trained here."""
    config, done = job.config, job.finished()
    stages = {"guide": "prefer", "scorer": "reward", "oracle": "oracle"}
    stages |= {f"guide {name}": f"prefer/{name}" for name in config.guides}
    stages |= {f"scorer {name}": f"reward/{name}" for name in config.scorers}
    sections: dict[str, recipe.Trained] = {**config.preferences(), **config.rewards()}
    finished = {stage for stage, section in sections.items() if section.checkpoint is not None}
    found: dict[str, float | None] = {}
    for name, stage in stages.items():
        if stage not in done or stage in finished:
            found[name] = None
        elif stage in config.preferences():
            found[name] = _guide_accuracy(job, stage)
        else:
            found[name] = read_notes(job.path(stage)).accuracy
    return found


def _guide_accuracy(job: Job, stage: str) -> float | None:
    """Of the step whose weights the guide has: the last one, or the first of the best."""
    best = job.config.preferences()[stage].best
    rows = [row for row in read_metrics(job.folder, stage) if "eval_accuracy" in row]
    if best is None or not rows:
        return rows[-1]["eval_accuracy"] if rows else None
    finite = [row for row in rows if row[best.metric] is not None]  # nothing else is ever the best
    choose = max if best.goal == "max" else min
    return choose(finite, key=lambda row: row[best.metric])["eval_accuracy"]


def _write_answers(
    job: Job,
    asked: Sequence[PromptRow],
    answers: dict[str, contest.Answers],
    scores: dict[str, Any],
    kls: dict[str, list[float]],
) -> None:
    folder = job.folder / "evaluation"
    folder.mkdir(exist_ok=True)
    for name, made in answers.items():
        lines = []
        for i, row in enumerate(asked):
            shown: dict[str, Any] = {"prompt": row.text, "answer": made.texts[i]}
            if isinstance(row.prompt, list):
                shown["conversation"] = row.prompt  # without the marks of a chat template
            shown |= {"finished": made.completions.finished[i].item(), "score": scores[name][i], "kl": kls[name][i]}
            shown = without_nan(shown)  # an oracle may have given no score
            # Text does not always encode back to the sampled tokens; the ids let anyone repeat the numbers exactly.
            ids = made.completions.ids[i][made.completions.mask[i]].tolist()
            lines.append(json.dumps(shown | {"prompt_ids": row.ids, "answer_ids": ids}, ensure_ascii=False))
        (folder / f"answers-{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
