"""A run folder, and everything that its stages share."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rto import config as recipe
from rto.config import Config, Policy, Trained, Training
from rto.data.rows import Rows, make_rows, make_tokenizer
from rto.data.sources import write_rejected
from rto.models.checkpoint import fingerprint, save_role
from rto.models.incidents import Incidents
from rto.models.kernels import check_device
from rto.models.load import locate
from rto.models.role import Role
from rto.models.runtime import Runtime
from rto.models.saver import Saver, best_of, read_by_all
from rto.models.store import Checkpoint, Store, flush_all
from rto.models.workshop import Workshop
from rto.models.writer import Writer
from rto.pipeline.stop import Stop, Stopped
from rto.report.log import Progress
from rto.report.watch import WatchedLog

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODELS = "models"  # in what a checkpoint was made from: the fingerprints of frozen models


@dataclass(frozen=True)
class Step:
    """One stage: what it is made from, and the work, which returns the path of its result in the run folder.

    A finished step is skipped. When it was made from something else, it is refused, or, with ``redo``, done again.
    """

    name: str
    inputs: dict[str, Any]
    work: Callable[[Job], str]
    redo: bool = False


@dataclass
class Job:
    """One run: its resolved recipe, machine, log and progress."""

    config: Config
    quiet: bool = False
    allow_changed: tuple[str, ...] = ()  # keys that may differ from what a stage was made from
    runtime: Runtime = field(init=False)
    log: Any = field(init=False)
    progress: Progress = field(init=False)
    started: bool = field(init=False, default=False)  # before that nothing is written
    stop: Stop = field(init=False, default_factory=Stop)
    doing: Step | None = field(init=False, default=None)
    writer: Writer = field(init=False, default_factory=Writer)
    begun: dict[str, Checkpoint] = field(init=False, default_factory=dict)  # by stage, until the stage has begun

    def __post_init__(self) -> None:
        self.runtime = Runtime(self.config.device, self.config.trackers, self.config.output)
        models = [self.config.model, *(scorer.model for scorer in self.config.rewards().values())]
        for model in models:
            if model is not None:
                check_device(model, self.runtime.device, self.runtime.dtype(model.dtype))
        self.progress = Progress(enabled=self.runtime.main and not self.quiet)

    @property
    def folder(self) -> Path:
        return Path(self.config.output)

    def start(self, steps: list[Step]) -> None:
        """Check the folder against the steps, then write the resolved recipe into it.

        Raises:
            ValueError: a finished stage was made with another recipe; nothing is written then.
        """
        done = self.finished()
        for step in steps:
            changed = self.changes(done[step.name]["inputs"], step) if step.name in done else []
            if changed and not step.redo:
                raise ValueError(
                    f"{self.folder}: stage {step.name} was made with another recipe ({'; '.join(changed[:3])}). "
                    "Choose another --output, delete that folder, or keep what is there with --allow-changed KEY"
                )
            if step.name in done or (found := read_by_all(self.store(step.name), self.runtime)) is None:
                continue
            self.begun[step.name] = found  # read and verified once a run
            made_from = {key: value for key, value in found.state["made_from"].items() if key != MODELS}
            changed = self.changes(made_from, step)
            if changed:
                raise ValueError(
                    f"{self.folder}: stage {step.name} was begun with another recipe ({'; '.join(changed[:3])}). "
                    f"Choose another --output, go on all the same with --allow-changed KEY, or begin the stage again: "
                    f"delete {self.store(step.name).folder}"
                )
        resolved = self.config.model_dump(mode="json")
        if self.runtime.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "config.json", resolved)
        self.started = True
        self.runtime.start_trackers("rto", resolved)
        self.log = WatchedLog(self.folder, self.progress.say) if self.runtime.main else _Nothing()

    def do(self, step: Step) -> None:
        """Do a step unless it is done."""
        done = self.finished().get(step.name)
        if done is not None and not self.changes(done["inputs"], step):
            self.progress.say(f"{step.name}: done before, in {self.folder / done['path']}")
            if self.runtime.main:
                self._clear(step.name)  # a kill may have come before it
            return
        begun = time.perf_counter()
        if step.name in self.begun:
            at = self.begun[step.name].step
            self.log.cut(step.name, at)
            self.progress.say(f"{step.name}: goes on after step {at}")
        else:
            self.log.drop_stage(step.name)
        self.doing = step
        try:
            path = step.work(self)
        finally:
            self.writer.settle()  # whoever comes next may write there
        self.runtime.wait()
        if self.runtime.main:
            record = {
                "path": path,
                "seconds": time.perf_counter() - begun,
                "peak_memory_mb": self.runtime.peak_memory_mb(),
            }
            # A comparison that lacks this stage's model is no longer the whole one.
            kept = {name: other for name, other in self.finished().items() if not other.get("redo")}
            machine = {"device": str(self.runtime.device), **asdict(self.runtime.threads)}
            record |= {"machine": machine, "redo": step.redo, "inputs": step.inputs}
            write_json(self.folder / "stages.json", kept | {step.name: record})
            self._clear(step.name)
        self.runtime.wait()
        self.check_stop()

    def _clear(self, stage: str) -> None:
        """Remove the checkpoints of a finished stage."""
        store = self.store(stage)
        store.clear()
        best_of(store).clear()

    def tell(self, text: str) -> None:
        """A line that --quiet does not hide."""
        if self.progress.enabled:
            self.progress.say(text)
        elif self.runtime.main:
            print(text, file=sys.stderr, flush=True)

    def check_stop(self) -> None:
        """Raises Stopped when any process was asked to end; for work between two steps that is not saved in parts."""
        said = [name for name in self.runtime.gather_all(self.stop.wanted) if name is not None]
        if said:
            raise Stopped(said[0])

    def changes(self, made_from: dict[str, Any], step: Step) -> list[str]:
        """What differs from what a stage was made from, but for the keys that were allowed to."""
        found = differences(made_from, step.inputs)
        return [said for said in found if not any(said.startswith((f"{k} ", f"{k}.")) for k in self.allow_changed)]

    def store(self, stage: str) -> Store:
        """The checkpoints of a stage that is not finished."""
        folder = self.folder / "checkpoints" / stage.replace("/", "_")
        return Store(folder, self.config.checkpoints.keep, self.tell)

    def saver(self, training: Training, frozen: dict[str, str] | None = None) -> Saver:
        """Keeps the stage that is being done, whose settings are ``training``. ``frozen`` are the folders of the models
        that it reads, by role.

        Raises:
            ValueError: the stage was begun with other models in a role.
        """
        assert self.doing is not None
        stage, checkpoints = self.doing.name, self.config.checkpoints
        found = self.begun.pop(stage, None)
        models = {role: fingerprint(place) if Path(place).is_dir() else place for role, place in (frozen or {}).items()}
        others = [] if found is None else differences(found.state["made_from"].get(MODELS), models, MODELS)
        others = [said.split()[0] for said in others]
        if changed := [key for key in others if key not in self.allow_changed]:
            raise ValueError(
                f"{self.folder}: the weights behind {changed[0]} are not those that stage {stage} was begun with. Put "
                f"them back, begin the stage again (delete {self.store(stage).folder}), or go on with these: "
                f"--allow-changed {changed[0]}"
            )
        return Saver(
            stage,
            self.store(stage),
            checkpoints.rl_every if isinstance(training, Policy) else checkpoints.every,
            self.runtime,
            self.log,
            self.tell,
            Incidents(self.folder / "incidents", lambda ids: str(self.tokenizer.decode(ids))),
            self.doing.inputs | {MODELS: models},
            lambda: self.stop.wanted,
            Stopped,
            self.config.nonfinite,
            training.best if isinstance(training, (Policy, Trained)) else None,
            found,
            self.writer,
        )

    def finished(self) -> dict[str, Any]:
        """The finished stages by name, with path, seconds and memory."""
        path = self.folder / "stages.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def path(self, stage: str) -> str:
        """Where a finished stage's model is: given as a checkpoint, or in this folder.

        Raises:
            ValueError: it is not finished.
        """
        trained: dict[str, recipe.Trained] = {**self.config.preferences(), **self.config.rewards()}
        if stage in trained and (checkpoint := trained[stage].checkpoint) is not None:
            return checkpoint
        done = self.finished().get(stage)
        if done is None:
            verb = stage.partition("/")[0]
            raise ValueError(f"{self.folder}: stage {stage} is not finished: do `rto {verb}` or `rto run` first")
        return str(self.folder / done["path"])

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        model = self.config.model
        return make_tokenizer(self.config, None if isinstance(model, recipe.Scratch) else locate(model))

    @cached_property
    def rows(self) -> Rows:
        rows = make_rows(self.config, self.tokenizer)
        if self.runtime.main and rows.rejected and self.started:
            write_rejected(self.folder / "rejected_rows.jsonl", rows.rejected)
        if self.started:  # work begins, and the recipe's models and data are there
            self.progress.say(f"{self.runtime.device}: {self.runtime.threads}")
        return rows

    @property
    def base(self) -> str:
        """The SFT model, which is the reference: the sft stage's, or the model itself."""
        return self.path("sft") if "sft" in self.config.stages else locate(self.config.model)

    def workshop(self, seed: int | None = None) -> Workshop:
        seed = self.config.seed if seed is None else seed
        return Workshop(self.config.model, self.base, self.tokenizer, self.runtime, seed)

    def save(self, role: Role, stage: str) -> None:
        """Write a stage's model. Its padding id is not the end of a response: plain transformers reads a scorer at
        the last token that is no padding, and with LoRA takes the padding id from the base model, the sft stage's."""
        if self.runtime.main:
            encoder = self.rows.encoder
            others = (i for i in self.tokenizer.all_special_ids if i != encoder.end)
            pad = encoder.pad if encoder.pad != encoder.end else next(others, encoder.pad)
            save_role(role, self.folder / stage, self.tokenizer, pad)
            flush_all(self.folder / stage)  # on the disk before stages.json says so
        self.runtime.wait()


class _Nothing:
    """The log of every process but the main one."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def write_json(path: Path, value: Any) -> None:
    """All of it or nothing, also after a power cut."""
    partial = path.with_suffix(".partial")
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    try:
        with partial.open("wb") as file:
            file.write(text.encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}: {path} could not be written") from error
    os.replace(partial, path)


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """Dotted keys whose values differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{key}.{k}" if key else k)]
    return [] if old == new else [f"{key} was {old!r} and is {new!r}"]
