"""Whose tokenizer a role is read with: another one is refused, and trust and revision are those of its own table."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from rto import recipe
from rto.config import Config, Packaged, Pretrained
from rto.data.rows import make_tokenizer
from rto.data.worlds import world_tokenizer
from rto.models.load import tokenizer_at
from rto.models.memory import Budget
from rto.models.workshop import Workshop
from rto.pipeline import contest, generate
from rto.pipeline.answers import write_answers
from rto.pipeline.checks import checks
from rto.pipeline.job import Job
from rto.pipeline.memory_plan import Rehearsal
from rto.pipeline.pairs import score_pairs
from rto.pipeline.readers import make_reader, open_policy, open_role
from rto.pipeline.resolve import resolve, terms_of
from rto.pipeline.training import _critic
from rto.rollouts.foreign import ForeignScorer


@pytest.fixture
def configured(files_recipe, tiny_model, pairs_file, tmp_path, monkeypatch) -> Callable[..., Config]:
    """A recipe whose reference is the tiny model itself: nothing need be trained."""
    (tmp_path / "oracle_of_ours.py").write_text("def length(prompts, answers):\n    return [len(a) for a in answers]\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def call(**changes: str) -> Config:
        given = {"model.name": tiny_model, "data.pairs": pairs_file, "stages": '["prefer", "reward", "rl"]'}
        given |= {"evaluation.oracle": '{type = "function", function = "oracle_of_ours:length"}'}
        given |= {"output": str(tmp_path / "run")} | {key.replace("__", "."): value for key, value in changes.items()}
        return resolve(recipe.load(files_recipe, [*given.items()]))

    return call


@pytest.fixture
def foreign(tiny_model, tmp_path) -> str:
    """The tiny model's weights beside the words of the tiny world."""
    folder = tmp_path / "foreign"
    shutil.copytree(tiny_model, folder)
    world_tokenizer().save_pretrained(folder)
    return str(folder)


def read_rewards(config: Config, _: Path) -> Any:
    job = Job(config, quiet=True)
    return make_reader(job, job.workshop(), config.policy, terms_of(config.policy))


def read_further(config: Config, _: Path) -> Any:
    policy = config.policy.model_copy(update={"guide": "second"})
    job = Job(config, quiet=True)
    return make_reader(job, job.workshop(), policy, terms_of(policy))


def compare(config: Config, _: Path) -> Any:
    return contest.evaluate(Job(config, quiet=True))


def score(config: Config, _: Path) -> Any:
    job = Job(config, quiet=True)
    return score_pairs(job, job.rows.test_pairs, {}, "guide")


def answer(config: Config, _: Path) -> Any:
    return generate(config, "dpo", prompts=["a?"])


def answer_a_file(config: Config, folder: Path) -> Any:
    (folder / "q.jsonl").write_text(json.dumps({"prompt": "a?"}) + "\n")
    return write_answers(config, "jsonl", str(folder / "q.jsonl"), folder / "out", "dpo", quiet=True)


@pytest.mark.parametrize("use", [read_rewards, compare, score, answer, answer_a_file])
def test_a_guide_with_another_tokenizer_is_refused_wherever_it_is_opened(
    configured, foreign, tiny_model, tmp_path, use
):
    """Its log-ratios would be of other words."""
    with pytest.raises(ValueError, match=r"the guide prefer .*foreign has another vocabulary than the policy"):
        use(configured(prefer__checkpoint=foreign, policy__method="rto-v1"), tmp_path)


def test_a_further_guide_too(configured, foreign, tiny_model, tmp_path):
    config = configured(prefer__checkpoint=tiny_model, guides__second__checkpoint=foreign, policy__method="rto-v1")
    assert read_rewards(config, tmp_path).guide is not None
    with pytest.raises(ValueError, match=r"the guide prefer/second .*foreign has another vocabulary"):
        read_further(config, tmp_path)


def test_a_checkpoint_without_a_tokenizer_is_named(configured, tiny_model, tmp_path):
    """As PEFT leaves an adapter."""
    folder = tmp_path / "bare"
    LlamaForCausalLM.from_pretrained(tiny_model).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"bare: its tokenizer, which must be beside it, cannot be read"):
        read_rewards(configured(prefer__checkpoint=str(folder), policy__method="rto-v1"), tmp_path)


# --- precision ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scorers_without_a_table_of_their_own_have_the_models_precision_and_attention(
    configured, tiny_model, tmp_path, monkeypatch, dtype
):
    """An oracle, and a scorer with another tokenizer."""
    ready, foreign, opened, plain = tmp_path / "ready", tmp_path / "foreign", [], Workshop.open_scorer
    shutil.copytree(tiny_model, ready)
    settings = LlamaForCausalLM.from_pretrained(tiny_model).config
    settings.num_labels = 1
    LlamaForSequenceClassification(settings).save_pretrained(ready)
    shutil.copytree(ready, foreign)
    world_tokenizer().save_pretrained(foreign)

    def open_scorer(*given: Any, **more: Any) -> Any:
        opened.append(plain(*given, **more))
        return opened[-1]

    monkeypatch.setattr(Workshop, "open_scorer", open_scorer)
    oracle = f'{{type = "model", name = "{ready}"}}'
    given = {"model__dtype": dtype, "model__attention": "eager"}
    job = Job(configured(reward__checkpoint=str(foreign), evaluation__oracle=oracle, **given), quiet=True)
    assert isinstance(open_checkpoint(job), ForeignScorer)
    open_oracle(job)
    assert [role.backbone.compute for role in opened] == [getattr(torch, dtype)] * 2
    assert [role.backbone.network.config._attn_implementation for role in opened] == ["eager"] * 2


# --- trust and revision -------------------------------------------------------------------------------


CODE = """
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel
from transformers import PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = "rto-own-words"
class OwnModel(LlamaModel):
    config_class = OwnConfig
AutoModel.register(OwnConfig, OwnModel)
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
class OwnForSequenceClassification(LlamaForSequenceClassification):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def own_code(tiny_model, tmp_path) -> Callable[[str], str]:
    """A model of the tiny one's size and words whose classes, the tokenizer's too, come with it."""

    def call(kind: str) -> str:
        folder = tmp_path / "own_code"
        shutil.copytree(tiny_model, folder)
        settings = LlamaForCausalLM.from_pretrained(tiny_model).config
        settings.num_labels = 1
        made = {"CausalLM": LlamaForCausalLM, "SequenceClassification": LlamaForSequenceClassification}
        made[kind](settings).save_pretrained(folder)
        classes = {"AutoConfig": "own.OwnConfig", f"AutoModelFor{kind}": f"own.OwnFor{kind}"}
        own = {"model_type": "rto-own-words", "architectures": [f"OwnFor{kind}"], "auto_map": classes}
        words = {"auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}, "tokenizer_class": "OwnTokenizer"}
        for name, changes in (("config.json", own), ("tokenizer_config.json", words)):
            (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))
        (folder / "own.py").write_text(CODE)
        return str(folder)

    return call


def open_scorer(job: Job) -> Any:
    return job.workshop().new_scorer("scorer", job.config.reward.model)


def open_checkpoint(job: Job) -> Any:
    return open_role(job, job.workshop(), "reward")


def open_critic(job: Job) -> Any:
    shop = job.workshop()
    return _critic(job, shop, job.config.policy, shop.new_policy("policy"))


def open_guide(job: Job) -> Any:
    return open_policy(job, job.workshop(), "prefer", "guide")


def open_oracle(job: Job) -> Any:
    return contest._judge(job, job.workshop(), None, Budget(4096, print))


@pytest.mark.parametrize(
    ("use", "key", "trust", "told"),
    [
        (open_scorer, "reward__model__name", "reward__model__trust_remote_code", "scorer reward"),
        (open_checkpoint, "reward__checkpoint", "model__trust_remote_code", "scorer reward"),
        (open_critic, "reward__checkpoint", "model__trust_remote_code", "scorer reward"),
        (open_guide, "prefer__checkpoint", "model__trust_remote_code", "guide prefer"),
        (open_oracle, "evaluation__oracle__name", "evaluation__oracle__trust_remote_code", "oracle"),
    ],
)
def test_trust_holds_for_the_tokenizer_too(configured, own_code, use, key, trust, told):
    """What `rto plan` says is what the run does. Trust in the policy's model is none in another model."""
    given = {key: own_code("CausalLM" if use is open_guide else "SequenceClassification")}
    if use is open_oracle:
        given = {"evaluation__oracle": '{type = "model", name = ""}', **given}
    if not trust.startswith("model"):
        given["model__trust_remote_code"] = "true"
    for trusted in (False, True):
        config = configured(**given, **({trust: "true"} if trusted else {}))
        job = Job(config, quiet=True)
        found = {check.name: check for check in checks(config, job.rows, job.runtime)}
        assert found[f"tokenizer of {told}"].level == ("ok" if trusted else "problem")
        if trusted:
            assert use(job) is not None
        else:
            with pytest.raises(ValueError, match="trust_remote_code"):
                use(job)


def test_a_trusted_checkpoint_is_rehearsed(configured, own_code):
    folder = own_code("SequenceClassification")
    config = configured(reward__checkpoint=folder, model__trust_remote_code="true")
    job = Job(config, quiet=True)
    rehearsal = Rehearsal(config, job.rows, job.runtime, None)
    shop, tally = rehearsal._shop()
    role = rehearsal._scorer(shop, "reward", trained=False, called="reward")
    assert type(role.backbone.network).__name__ == "OwnForSequenceClassification"
    assert tally.live["reward", "weights"] > 0


@pytest.fixture
def hub(tiny_model, tmp_path, monkeypatch) -> str:
    """A model of the hub's cache: "main" has the words of the tiny world, "v1" those of the tiny model."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "models--us--tiny"
    for name, sha in (("main", "a" * 40), ("v1", "b" * 40)):
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / name).write_text(sha)
        shutil.copytree(tiny_model, folder / "snapshots" / sha)
    world_tokenizer().save_pretrained(folder / "snapshots" / ("a" * 40))
    return "us/tiny"


def test_a_revision_holds_for_the_tokenizer_too(configured, hub, tiny_model, tmp_path):
    ours, world = tokenizer_at(tiny_model, Pretrained(name=tiny_model)).get_vocab(), world_tokenizer().get_vocab()
    assert ours != world
    pinned = Pretrained(name=hub, revision="v1")
    assert make_tokenizer(configured(model__name=hub), hub).get_vocab() == world
    assert make_tokenizer(configured(model__name=hub, model__revision="v1"), hub).get_vocab() == ours
    assert tokenizer_at(hub, pinned).get_vocab() == ours
    other = tmp_path / "hub" / "models--us--other"
    shutil.copytree(tmp_path / "hub" / "models--us--tiny", other)
    (other / "refs" / "v1").unlink()
    assert tokenizer_at("us/other", pinned).get_vocab() == world  # the revision is the model's, not a checkpoint's
    assert tokenizer_at(tiny_model, Packaged(type="package")).get_vocab() == ours
    config = configured(reward__model__name=hub, reward__model__revision="v1")
    job = Job(config, quiet=True)
    assert job.workshop().new_scorer("scorer", config.reward.model).backbone.source == hub
    found = {check.name: check.level for check in checks(config, job.rows, job.runtime)}
    assert found["tokenizer of scorer reward"] == "ok"
