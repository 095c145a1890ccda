"""Answers of one policy of a run to the questions of a benchmark, in the benchmark's file; resumable."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rto import config as recipe
from rto.batch import Completions
from rto.config import Config, Evaluation
from rto.data.chat import Encoded, Encoder, PromptRow, encode_prompts
from rto.data.layouts import Prompt
from rto.data.sources import Loaded, TextPrompt
from rto.evaluation.arena_style import APPROXIMATE, token_counter
from rto.evaluation.formats import FORMATS, Answer, Counter, Format, Question, Record, read_questions
from rto.evaluation.mtbench import OTHER_TEMPERATURE, TEMPERATURES
from rto.models.checkpoint import fingerprint
from rto.models.memory import Budget
from rto.models.role import Role
from rto.pipeline.job import Job, differences, write_json
from rto.pipeline.readers import open_policy
from rto.pipeline.resolve import guide_names, resolve
from rto.recipe import explain, nearest
from rto.rollouts.generate import SeedName, generate

Asked = tuple[int, Question]  # the question's number in its file, from 1


@dataclass(frozen=True)
class Written:
    """What a call has done: ``made`` answers now, ``kept`` from before; of those made now, ``cut`` reached the token
    limit and ``empty`` say nothing; ``cut_prompts`` lost their beginning. ``notes`` are for people."""

    made: int
    kept: int
    cut: int
    empty: int
    cut_prompts: int
    notes: list[str]


def policy_stage(job: Job, policy: str | None) -> tuple[str, str]:
    """Name and stage of a policy: "sft", a guide, or one that RL trains (None: the run's method).

    Raises:
        ValueError: the recipe has no such policy.
    """
    config = job.config
    name = policy or config.policy.method
    known = {"sft": "sft"} | guide_names(config) | {name: f"rl/{name}" for name in config.policies()}
    if name not in known:
        hint = nearest(name, known)
        raise ValueError(f"{config.output}: no policy {name!r}{hint}; the recipe has {', '.join(known)}")
    return name, known[name]


def sampling(temperature: float | None, top_p: float | None) -> Evaluation:
    """Checked settings; None: 1. Raises ValueError."""
    try:
        return Evaluation(
            temperature=1.0 if temperature is None else temperature, top_p=1.0 if top_p is None else top_p
        )
    except ValidationError as error:
        raise ValueError("; ".join(explain(error, Evaluation))) from None


def write_answers(
    config: Config,
    format: str,
    questions: str,
    out: str | Path,
    policy: str | None = None,
    *,
    model: str | None = None,
    limit: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    batch_tokens: int | None = None,
    quiet: bool = False,
    clock: Callable[[], float] = time.time,
) -> Written:
    """Answer the ``questions`` of a file, in ``out`` and in a format of :data:`~rto.evaluation.formats.FORMATS`.

    What ``out`` holds already is kept and not asked again; what it was made with stands beside it, and other settings
    are refused. An answer depends on the seed and its question, not on ``batch_tokens`` (which bounds rows x tokens of
    one pass) nor on where an earlier call stopped. ``model`` is the name in the rows; default: the policy's.
    MT-Bench's temperatures go by category, and its second turn sees the first answer.

    Raises:
        ValueError: the run has no such policy, the questions are refused, or ``out`` holds something else.
    """
    if format == "mtbench" and temperature is not None:
        raise ValueError("temperature: MT-Bench's own goes by category: leave --temperature out")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: at least 1 question (given: {limit})")
    settings = sampling(temperature, top_p)
    asked = list(enumerate(read_questions(questions, format), 1))
    job = Job(resolve(config.model_copy(update={"trackers": []})), quiet)  # they may not be installed here
    name, stage = policy_stage(job, policy)
    if format == "mtbench" and not isinstance(config.data, recipe.Files):
        raise ValueError("format mtbench has two turns and needs a chat: the tiny world has none")
    place = job.base if stage == "sft" else job.path(stage)
    encoder, layout = job.rows.encoder, FORMATS[format]
    counter, notes = _counter(layout)
    made_with = {
        "format": format,
        "model": model or name,
        "policy": name,
        "questions": hashlib.sha256(Path(questions).expanduser().read_bytes()).hexdigest()[:16],
        "weights": fingerprint(place) if Path(place).is_dir() else place,
        "temperature": "by category" if format == "mtbench" else settings.temperature,
        "top_p": settings.top_p,
        "seed": seed or 0,
        "max_prompt": encoder.max_prompt,
        "max_response": encoder.max_response,
        "token_len": counter[0] if counter else None,
    }
    file = AnswerFile(Path(out), layout)
    kept = file.open(made_with, job.runtime.main)
    job.runtime.wait()
    todo = [(number, question) for number, question in asked[:limit] if question.key not in kept]
    total = len(asked[:limit])
    told = {"made": len(todo), "kept": total - len(todo), "cut": 0, "empty": 0, "cut_prompts": 0}
    if todo:
        shop = job.workshop()
        role = shop.reference() if stage == "sft" else open_policy(job, shop, stage, "generated")
        budget = pass_budget(job, batch_tokens, job.progress.say)
        writer = Writer(job, role, format, questions, settings, seed or 0, budget)
        with job.progress:
            job.progress.start("generate", total, total - len(todo))
            done = total - len(todo)
            for batch in writer.batches(todo):
                answers = writer.answers(batch, model or name, clock)
                if job.runtime.main:
                    file.append([layout.row(answer, counter[1] if counter else None) for answer in answers])
                done += len(batch)
                told["cut"] += sum(not all(answer.finished) for answer in answers)
                told["empty"] += sum(not all(answer.texts) for answer in answers)
                job.progress.update(done, {})
        told["cut_prompts"] = writer.cut_prompts
    if job.runtime.main:
        file.finish([question.key for _, question in asked])
    job.runtime.wait()
    return Written(**told, notes=notes)


def _counter(layout: Format) -> tuple[tuple[str, Counter] | None, list[str]]:
    """Name and function that count tokens for the metadata, where the format has one and the tables are here."""
    if layout.counted is None:
        return None, []
    name, count = token_counter(layout.counted)
    if name == APPROXIMATE:
        said = "token_len needs tiktoken and its tables in TIKTOKEN_CACHE_DIR: the style metadata is left out"
        return None, [said]
    return (name, count), []


def pass_budget(job: Job, batch_tokens: int | None, say: Callable[[str], None]) -> Budget:
    """Of sampling: ``batch_tokens``, or as many as the run read with."""
    tokens, what = (batch_tokens, "batch") if batch_tokens else (job.config.policy.reading_tokens, "reading")
    return Budget(tokens, say, job.runtime.gather_all, what)


def encode_all(encoder: Encoder, asked: Loaded[TextPrompt]) -> Encoded[PromptRow]:
    """Raises ValueError for a prompt that the encoder rejects: none is left out without a word."""
    coded = encode_prompts(encoder, asked)
    if coded.rejected:
        bad = coded.rejected[0]
        raise ValueError(f"{asked.file}, prompt {bad.row}: {bad.reason} ({bad.detail}); none may be left out")
    return coded


class Writer:
    """One policy that answers questions in batches."""

    def __init__(
        self, job: Job, role: Role, format: str, source: str, settings: Evaluation, seed: int, budget: Budget
    ) -> None:
        self.role, self.format, self.source = role, format, source
        self.settings, self.seed, self.budget = settings, seed, budget
        self.encoder: Encoder = job.rows.encoder
        self.runtime = job.runtime
        self.chat = isinstance(job.config.data, recipe.Files) and format != "jsonl"
        self.cut_prompts = 0

    def batches(self, asked: Sequence[Asked]) -> Iterator[list[Asked]]:
        """In the order of the file, as many at a time as the budget allows with one temperature."""
        batch: list[Asked] = []
        width = 0
        for one in asked:
            mine = len(self.encoder.prompt(self._first(one[1]))) + self.encoder.max_response
            full = max(width, mine) * (len(batch) + 1) > self.budget.tokens
            if batch and (full or self.temperature(one[1]) != self.temperature(batch[0][1])):
                yield batch
                batch, width = [], 0
            batch.append(one)
            width = max(width, mine)
        if batch:
            yield batch

    def temperature(self, question: Question) -> float:
        if self.format != "mtbench":
            return self.settings.temperature
        return TEMPERATURES.get(question.record["category"], OTHER_TEMPERATURE)

    def answers(self, batch: list[Asked], model: str, clock: Callable[[], float]) -> list[Answer]:
        """Every process writes its share; all get all answers."""
        mine = self.runtime.share(batch)
        said: list[list[str]] = [[] for _ in mine]
        ended: list[list[bool]] = [[] for _ in mine]
        cut = 0
        chats = [self._first(question) for _, question in mine]
        for turn in range(len(batch[0][1].turns)):
            if turn:
                chats = [
                    [
                        *chat,
                        {"role": "assistant", "content": texts[-1]},
                        {"role": "user", "content": question.turns[turn]},
                    ]
                    for chat, texts, (_, question) in zip(chats, said, mine, strict=True)
                ]
            rows, lost = self._encode(chats, mine)
            cut += lost
            names = [self._seed(asked, turn) for asked in mine]
            found = self._sampled([row.ids for row in rows], names, self.temperature(batch[0][1]))
            for i, (ids, mask) in enumerate(zip(found.ids, found.mask, strict=True)):
                text = self.encoder.decode(ids[mask].tolist())
                said[i].append(text if self.format == "jsonl" else text.strip())
                ended[i].append(bool(found.finished[i]))
        parts = self.runtime.gather_all((said, ended, cut))
        whole: list[Any] = [None] * len(batch)
        for rank, (texts, marks, lost) in enumerate(parts):
            whole[rank :: self.runtime.world] = list(zip(texts, marks, strict=True))
            self.cut_prompts += lost
        now = clock()
        return [
            Answer(question, number, texts, marks, model, now)
            for (number, question), (texts, marks) in zip(batch, whole, strict=True)
        ]

    def _sampled(self, prompts: list[list[int]], names: list[SeedName], temperature: float) -> Completions:
        def work(tokens: int) -> Completions:
            return generate(
                self.role,
                prompts,
                names,
                seed=self.seed,
                limit=self.encoder.max_response,
                end=self.encoder.end,
                pad=self.encoder.pad,
                temperature=temperature,
                top_p=self.settings.top_p,
                budget=tokens,
            ).completions

        return self.budget.within(work)

    def _first(self, question: Question) -> Any:
        prompt = question.turns[0]
        return [{"role": "user", "content": prompt}] if self.chat else prompt

    def _encode(self, chats: Sequence[Prompt], asked: Sequence[Asked]) -> tuple[list[PromptRow], int]:
        """No question may be left out: a benchmark's score over fewer questions is another score."""
        if not chats:
            return [], 0
        texts = [TextPrompt(number, chat) for chat, (number, _) in zip(chats, asked, strict=True)]
        coded = encode_all(self.encoder, Loaded(self.source, texts))
        return coded.rows, coded.cut_prompts

    def _seed(self, asked: Asked, turn: int) -> SeedName:
        number, question = asked
        # Plain prompts are drawn as `rto generate` without a format and the evaluation draw them.
        return ("evaluation", number, 0) if self.format == "jsonl" else ("benchmark", question.key, turn)


class AnswerFile:
    """Rows that are appended as they are made. A JSON array collects them as lines first, in ``FILE.rows.jsonl``.

    ``FILE.settings.json`` says what they were made with.
    """

    def __init__(self, path: Path, layout: Format) -> None:
        self.path, self.layout = path, layout
        self.lines = path.with_name(path.name + ".rows.jsonl") if layout.array else path
        self.settings = path.with_name(path.name + ".settings.json")
        self._rows: dict[str | int, Record] = {}

    def open(self, made_with: Record, main: bool = True) -> set[str | int]:
        """The questions that are answered already. Half a line, from a call that was killed, is removed.

        Raises:
            ValueError: the file was made with other settings, or by somebody else.
        """
        there = [path for path in {self.path, self.lines} if path.exists() and path.stat().st_size]
        if there and not self.settings.exists():
            raise ValueError(f"{there[0]} was not written by `rto generate --format`: choose another --out")
        if there:
            old = json.loads(self.settings.read_text(encoding="utf-8"))
            if changed := differences(old, made_with):
                raise ValueError(
                    f"{self.path} holds answers made otherwise ({'; '.join(changed)}): choose another --out"
                )
        elif main:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.settings, made_with)
        rows = json.loads(self.path.read_text(encoding="utf-8")) if self.layout.array and self.path in there else []
        rows += self._whole_lines(main) if self.lines in there else []
        for row in rows:
            try:
                self._rows[self.layout.key_of(row)] = row
            except ValueError as error:
                raise ValueError(f"{self.path}: {error}: choose another --out") from None
        return set(self._rows)

    def append(self, rows: Sequence[Record]) -> None:
        with self.lines.open("ab") as file:
            for row in rows:
                file.write(_line(row))
                self._rows[self.layout.key_of(row)] = row
            file.flush()
            os.fsync(file.fileno())

    def finish(self, order: Sequence[str | int]) -> None:
        """Write the array, in the order of the questions."""
        if not self.layout.array:
            return
        place = {key: i for i, key in enumerate(order)}
        rows = sorted(self._rows.values(), key=lambda row: place.get(self.layout.key_of(row), len(place)))
        write_json(self.path, rows)
        self.lines.unlink(missing_ok=True)

    def _whole_lines(self, main: bool) -> list[Record]:
        data = self.lines.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if main and len(whole) < len(data):
            os.truncate(self.lines, len(whole))
        try:
            return [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise ValueError(f"{self.lines}: a line is damaged ({error}): delete it, or choose another --out") from None


def _line(row: Record) -> bytes:
    # A lone surrogate has no UTF-8 form: its backslash escape is what JSON writes for it.
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
