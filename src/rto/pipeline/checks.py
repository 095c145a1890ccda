"""Whether tokenizers, templates and models of a recipe go together; nothing is trained or written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from rto import config as recipe
from rto.config import Config
from rto.data.chat import Encoder
from rto.data.layouts import Prompt
from rto.data.rows import Rows
from rto.models.load import has_vocabulary, locate, opened_as, same_vocabulary, tokenizer_at
from rto.models.runtime import Runtime
from rto.pipeline.resolve import scorer_stage
from rto.policy.train import reads_values

Level = Literal["ok", "note", "problem"]
_SAMPLE = 50  # rows of a round trip
_TALK = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?"},
]


@dataclass(frozen=True)
class Check:
    """``text`` is a sentence; that of a problem says what to do."""

    name: str
    level: Level
    text: str


def checks(config: Config, rows: Rows, runtime: Runtime) -> list[Check]:
    """All of them, in the order in which they are told."""
    found = [*_round_trip(rows), *_template(config, rows.encoder), *_end(config, rows.encoder)]
    found += [*_roles(config, rows), *_licences(config), *_precision(config, runtime), *_trust(config), *_rates(config)]
    return found


def _round_trip(rows: Rows) -> Iterator[Check]:
    """Text -> ids -> text, on answers of the training data."""
    encoder = rows.encoder
    said: dict[str, Prompt] = {row.text: row.prompt for row in rows.prompts if row.prompt is not None}
    sample = [(row.prompt_text, row.answer, row.finished) for row in rows.answers[:_SAMPLE]]
    sample += [(row.prompt_text, row.chosen, row.chosen_finished) for row in rows.pairs[:_SAMPLE]]
    unknown, tokens = 0, 0
    for prompt_text, ids, finished in sample:
        prompt = said.get(prompt_text, prompt_text)
        body = ids[:-1] if finished else ids
        unknown += sum(token == encoder.tokenizer.unk_token_id for token in body)
        tokens += len(body)
        if finished and (ids[-1] != encoder.end or encoder.end in body):
            yield Check("end of answers", "problem", f"an answer does not end with the token {encoder.end} alone")
            return
        text = encoder.decode(body)
        lead = "" if isinstance(prompt, str) else encoder.lead
        again, _ = encoder.answer(prompt, text.removeprefix(lead))
        if encoder.decode(again[: len(again) - (again[-1] == encoder.end)]) != text:
            yield Check(
                "round trip",
                "problem",
                f"the answer {text[:60]!r} comes back from its tokens as {encoder.decode(again)[:60]!r}: the tokenizer "
                "loses text, choose a model with another one, or mend the data",
            )
            return
    if unknown:
        yield Check(
            "round trip", "note", f"{unknown} of {tokens:,} tokens of answers are unknown words to the tokenizer"
        )
    yield Check("round trip", "ok", f"{len(sample)} answers come back from their tokens as they were")


def _template(config: Config, encoder: Encoder) -> Iterator[Check]:
    """Training sees prompt + answer, each encoded alone; a chat program renders both at once."""
    if isinstance(config.data, recipe.World):
        yield Check("chat template", "ok", "none: the tiny world's prompts are plain words")
        return
    answer = {"role": "assistant", "content": "Four."}
    before = encoder.text(_TALK)
    whole = str(
        encoder.tokenizer.apply_chat_template(
            [*_TALK, answer], chat_template=encoder.tokenizer.chat_template, tokenize=False
        )
    )
    if not whole.startswith(before + encoder.lead):
        yield Check(
            "chat template",
            "problem",
            f"a finished conversation does not begin with the prompt that generation sees, which ends in "
            f"{before[-40:]!r}: what is trained would not be what is asked. Give a template whose conversation begins "
            "with its generation prompt: --data.chat_template FILE",
        )
        return
    if not whole[len(before + encoder.lead) :].startswith("Four."):
        text = f"it changes the text of an answer: {whole[len(before) :][:60]!r}. Give another --data.chat_template"
        yield Check("chat template", "problem", text)
        return
    lead = f"; it puts {encoder.lead!r} before an answer, in training and generation alike" if encoder.lead else ""
    yield Check("chat template", "ok", f"a conversation begins with its generation prompt{lead}")


def _end(config: Config, encoder: Encoder) -> Iterator[Check]:
    """Whether the model's own settings know the token that ends an answer."""
    token = f"{encoder.tokenizer.convert_ids_to_tokens(encoder.end)!r} (id {encoder.end})"
    if isinstance(config.model, recipe.Scratch):
        yield Check("end token", "ok", f"{token} ends an answer; the new model knows it")
        return
    folder, known = Path(locate(config.model)), set()
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            said = json.loads((folder / name).read_text()).get("eos_token_id")
            known = set(said) if isinstance(said, list) else {said}
            break
    if not folder.is_dir():
        yield Check("end token", "note", f"{token} ends an answer; {folder} is no folder here to compare it with")
    elif encoder.end in known:
        yield Check("end token", "ok", f"{token} ends an answer, and {name} knows it")
    else:
        yield Check(
            "end token",
            "note",
            f"{token} ends an answer here, but {name} has eos_token_id {sorted(map(str, known))}: rto stops at it; "
            "elsewhere the trained model may go on. Add the id to generation_config.json",
        )


def _roles(config: Config, rows: Rows) -> Iterator[Check]:
    """Every role must read the policy's tokens; a scorer that does not is asked by text."""
    ours = rows.encoder.tokenizer
    others: list[tuple[str, str, bool, Any]] = []  # role, name, may be bridged, the model that it is opened with
    for stage, guide in config.preferences().items():
        if guide.checkpoint is not None:
            others.append((f"guide {stage}", guide.checkpoint, False, config.model))
    for stage, scorer in config.rewards().items():
        if scorer.checkpoint is not None:
            others.append((f"scorer {stage}", scorer.checkpoint, True, scorer.model or config.model))
        elif scorer.model is not None and not isinstance(scorer.model, recipe.Scratch):
            others.append((f"scorer {stage}", locate(scorer.model), False, scorer.model))
    oracle = config.evaluation.oracle
    if isinstance(oracle, recipe.ModelOracle):
        others.append(("oracle", oracle.name, False, opened_as(oracle.name, config.model, oracle.trust_remote_code)))
    for role, name, bridged, model in others:
        try:
            theirs = tokenizer_at(name, model)
            if bridged and not has_vocabulary(ours, theirs):
                said = "has another tokenizer: answers go to it as text, and its rewards come back by characters"
                yield Check(f"tokenizer of {role}", "note", f"{name} {said}")
                continue
            same_vocabulary(ours, theirs, role, name)
            yield Check(f"tokenizer of {role}", "ok", f"{name} has the policy's")
        except (ValueError, OSError) as error:
            yield Check(f"tokenizer of {role}", "problem", str(error))
    if not others:
        yield Check("tokenizers", "ok", "all roles start from the policy's model and have its tokenizer")


def _licences(config: Config) -> Iterator[Check]:
    models: dict[str, Any] = {"model": config.model}
    models |= {f"scorer {stage}": scorer.model for stage, scorer in config.rewards().items() if scorer.model}
    for role, model in models.items():
        if isinstance(model, recipe.Scratch):
            continue
        name = locate(model)
        yield Check(f"licence of {role}", "note", f"{licence(Path(name)) or 'unknown'}: {name}")


def licence(folder: Path) -> str | None:
    """What the model card in a folder says (``license:`` in the front matter of README.md)."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    front = re.match(r"\A---\s*\n(.*?)\n---\s*\n", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    found = re.search(r"^license(?:_name)?:\s*[\"']?([^\"'\s#]+)", front.group(1), re.MULTILINE) if front else None
    return found.group(1) if found else None


def _precision(config: Config, runtime: Runtime) -> Iterator[Check]:
    dtype = runtime.dtype(config.model.dtype)
    name = str(dtype).removeprefix("torch.")
    text = f"{name} on {runtime.device.type}; what is trained stays float32"
    if dtype == torch.bfloat16 and runtime.device.type == "cpu" and not _cpu_has_bf16():
        text += ". This CPU has no bfloat16 units and is many times slower with it: set model.dtype = 'float32'"
    yield Check("precision", "note" if "slower" in text else "ok", text)


def _cpu_has_bf16() -> bool:
    try:
        said = Path("/proc/cpuinfo").read_text()
        return "bf16" in said  # avx512_bf16, amx_bf16, and bf16 on ARM
    except OSError:
        return True  # not known: no warning


def _trust(config: Config) -> Iterator[Check]:
    models: dict[str, Any] = {"model": config.model}
    models |= {f"scorer {stage}": scorer.model for stage, scorer in config.rewards().items() if scorer.model}
    models["oracle"] = config.evaluation.oracle
    for role, model in models.items():
        if _trusted(model):
            text = f"trust_remote_code is on for {model.name}: its repository's Python runs on this machine"
            yield Check(f"code of {role}", "note", text)


def _rates(config: Config) -> Iterator[Check]:
    """Default rates are the papers', of full training. An adapter starts at zero and moves by about a rate a step."""
    stages: dict[str, tuple[Any, Any]] = {}
    if "sft" in config.stages and not isinstance(config.model, recipe.Scratch):  # which is trained in full there
        stages["sft"] = (config.sft, config.model)
    if "prefer" in config.stages:
        stages |= {
            name: (prefer, config.model) for name, prefer in config.preferences().items() if not prefer.checkpoint
        }
    if "reward" in config.stages:
        trained = {name: scorer for name, scorer in config.rewards().items() if not scorer.checkpoint}
        stages |= {name: (scorer, scorer.model or config.model) for name, scorer in trained.items()}
    if "rl" in config.stages:
        for name, policy in config.policies().items():
            stages[name] = (policy, config.model)
            if reads_values(policy) and policy.critic.trunk == "own":
                start = None if policy.critic.init == "reference" else config.rewards()[scorer_stage(policy)].model
                stages[f"{name}'s critic"] = (policy.critic, start or config.model)
    small = [
        f"{name} {stage.lr:g}"
        for name, (stage, model) in stages.items()
        if model.lora is not None and stage.lr <= type(stage).model_fields["lr"].default
    ]
    if small:
        text = f"{', '.join(small)}: rates of full training; adapters hardly move with them, they want 1e-5 to 2e-4"
        yield Check("learning rates", "note", text)


def _trusted(model: Any) -> bool:
    return bool(getattr(model, "trust_remote_code", False))
