"""What roles write is what plain transformers and PEFT read: the same numbers, and no pickle."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import transformers as hf
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn

from rto.batch import Completions
from rto.config import Lora, Pretrained
from rto.data.collate import collate_completions
from rto.models.checkpoint import ScorerNotes, is_adapter, merged, read_adapter, read_notes, save_notes, save_role
from rto.models.role import Role
from rto.models.runtime import Runtime
from rto.models.workshop import Workshop

PAD, END = 0, 2
WORDS = ["<pad>", "<unk>", "<end>", *(f"w{i}" for i in range(58))]
PROMPTS = [[5, 6, 7, 8], [9], [10, 11]]
ANSWERS = [[20, 21, END], [22, 23, 24, 25, END], [26, END]]


@pytest.fixture(scope="module")
def tokenizer() -> hf.PreTrainedTokenizerFast:
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="<end>", model_max_length=64
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    settings = hf.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, initializer_range=0.3, pad_token_id=PAD, bos_token_id=None, eos_token_id=END,
    )  # fmt: skip
    hf.LlamaForCausalLM(settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def workshop(base: Path, tokenizer, lora: Lora | None = None) -> Workshop:
    return Workshop(Pretrained(name=str(base), lora=lora), str(base), tokenizer, Runtime("cpu"), seed=0)


LORA = Lora(r=4, alpha=8)


def moved(role: Role, seed: int = 1) -> Role:
    """The role after some training: every weight is elsewhere."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in role.parameters():
            p += torch.randn(p.shape, generator=draw) * 0.1
    return role


def batch() -> Completions:
    return collate_completions(PROMPTS, ANSWERS, [True] * 3, PAD)


def right_padded() -> dict[str, torch.Tensor]:
    """Prompt and answer of each row, padded on the right, as plain transformers is used."""
    rows = [p + a for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


@torch.no_grad()
def same_logprobs(role: Role, model: nn.Module) -> None:
    ours, logits = role.logprobs(batch())[0], model(**right_padded()).logits.log_softmax(-1)
    for i, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        rows = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        torch.testing.assert_close(ours[i, : len(answer)], logits[i, rows, answer], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def same_scores(role: Role, model: nn.Module) -> None:
    scores = role.scores(batch())
    assert scores.abs().min() > 1e-3
    torch.testing.assert_close(scores, model(**right_padded()).logits.squeeze(-1), atol=1e-5, rtol=1e-5)


def only_safetensors(folder: Path) -> None:
    endings = {path.suffix for path in folder.iterdir()}
    assert ".safetensors" in endings and endings <= {".safetensors", ".json", ".jinja", ".md"}


def test_a_full_policy(base, tokenizer, tmp_path):
    role = moved(workshop(base, tokenizer).new_policy("policy"))
    save_role(role, tmp_path, tokenizer, PAD)
    only_safetensors(tmp_path)
    assert not is_adapter(tmp_path)
    same_logprobs(role, hf.AutoModelForCausalLM.from_pretrained(tmp_path))
    again = workshop(base, tokenizer).open_policy(str(tmp_path), "again")
    assert torch.equal(again.logprobs(batch())[0], role.logprobs(batch())[0])
    assert not any(p.requires_grad for p in again.parameters())


def test_a_full_scorer(base, tokenizer, tmp_path):
    role = moved(workshop(base, tokenizer).new_scorer("scorer", None))
    save_role(role, tmp_path, tokenizer, PAD)
    only_safetensors(tmp_path)
    plain = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert plain.config.num_labels == 1
    same_scores(role, plain)
    for trained in (False, True):
        again = workshop(base, tokenizer).open_scorer(str(tmp_path), "again", None, trained)
        torch.testing.assert_close(again.scores(batch()), role.scores(batch()), atol=1e-6, rtol=1e-6)
        assert all(p.requires_grad == trained for p in again.parameters())


def test_a_policy_adapter(base, tokenizer, tmp_path):
    role = moved(workshop(base, tokenizer, LORA).new_policy("policy"))
    save_role(role, tmp_path, tokenizer, PAD)
    only_safetensors(tmp_path)
    assert is_adapter(tmp_path)
    same_logprobs(role, AutoPeftModelForCausalLM.from_pretrained(tmp_path))
    same_logprobs(role, hf.AutoModelForCausalLM.from_pretrained(tmp_path))
    again = workshop(base, tokenizer, LORA).open_policy(str(tmp_path), "another-name")
    assert torch.equal(again.logprobs(batch())[0], role.logprobs(batch())[0])
    assert not any(p.requires_grad for p in again.parameters())


def test_a_scorer_adapter(base, tokenizer, tmp_path):
    role = moved(workshop(base, tokenizer, LORA).new_scorer("scorer", None))
    save_role(role, tmp_path, tokenizer, PAD)
    only_safetensors(tmp_path)
    same_scores(role, AutoPeftModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1))
    again = workshop(base, tokenizer, LORA).open_scorer(str(tmp_path), "critic", None, trained=True)
    assert torch.equal(again.scores(batch()), role.scores(batch()))


def test_the_saved_tokenizer_pads_as_the_config_says(base, tokenizer, tmp_path):
    """A tokenizer that pads with end-of-sequence would hide the token at which plain transformers scores."""
    tokenizer = hf.AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = "<end>"
    role = moved(workshop(base, tokenizer).new_scorer("scorer", None))
    save_role(role, tmp_path, tokenizer, WORDS.index("<unk>"))
    assert tokenizer.pad_token == "<end>", "ours is left alone"
    saved = hf.AutoTokenizer.from_pretrained(tmp_path)
    plain = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert saved.pad_token_id == plain.config.pad_token_id == WORDS.index("<unk>")
    rows = [p + a for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    padded = saved.pad({"input_ids": rows}, return_tensors="pt")
    with torch.no_grad():
        theirs = plain(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits.squeeze(-1)
        torch.testing.assert_close(theirs, role.scores(batch()), atol=1e-5, rtol=1e-5)


# --- adapters that do not fit -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy_folder(base, tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    save_role(workshop(base, tokenizer, LORA).new_policy("policy"), folder, tokenizer, PAD)
    return folder


@pytest.mark.parametrize("lora", [Lora(r=8, alpha=8), Lora(r=4, alpha=16)])
def test_another_rank_or_alpha_is_refused(base, tokenizer, policy_folder, lora):
    with pytest.raises(ValueError, match=r"r = 4, alpha = 8.* give both the same"):
        workshop(base, tokenizer, lora).open_policy(str(policy_folder), "policy")


def test_other_targets_are_refused(base, tokenizer, policy_folder):
    with pytest.raises(ValueError, match=r"missing here.*lora.targets"):
        workshop(base, tokenizer, Lora(r=4, alpha=8, targets=["q_proj"])).open_policy(str(policy_folder), "policy")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "LOHA"),
        ("use_rslora", True),
        ("rank_pattern", {"q_proj": 4}),
        ("alpha_pattern", {"q_proj": 16}),
        ("alora_invocation_tokens", [5]),
        *(("init_lora_weights", name) for name in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")),
    ],
)
def test_settings_of_another_model_are_refused(base, tokenizer, policy_folder, tmp_path, key, value):
    """They read as plain LoRA with the same r, alpha and shapes."""
    foreign_adapter(policy_folder, tmp_path, **{key: value})
    told = rf"adapter_config.json: {key} = {re.escape(repr(value))} .*merge_and_unload"
    with pytest.raises(ValueError, match=told):
        workshop(base, tokenizer, LORA).open_policy(str(tmp_path), "policy")


@pytest.mark.parametrize("way", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_leave_the_base_as_it_was_are_read(base, tokenizer, policy_folder, tmp_path, way):
    foreign_adapter(policy_folder, tmp_path, init_lora_weights=way)
    role = workshop(base, tokenizer, LORA).open_policy(str(tmp_path), "policy")
    same_logprobs(role, hf.AutoModelForCausalLM.from_pretrained(policy_folder))


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"lora_bias": True}, "lora_B.bias"),
    ],
)
def test_what_has_weights_of_its_own_is_refused_by_their_names(base, tokenizer, tmp_path, more, key):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | more
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, of layers without a bias
        made = get_peft_model(hf.AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
        made.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"does not fit: \S*{key}\S* is"):
        workshop(base, tokenizer, LORA).open_policy(str(tmp_path), "policy")


def foreign_adapter(source: Path, folder: Path, **settings) -> None:
    """An adapter's folder with other settings."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_a_policy_adapter_is_no_scorer(base, tokenizer, policy_folder):
    with pytest.raises(ValueError, match="holds a policy's adapter.*rto reward"):
        workshop(base, tokenizer, LORA).open_scorer(str(policy_folder), "scorer", None, trained=False)


def test_an_adapter_needs_lora(base, tokenizer, policy_folder):
    with pytest.raises(ValueError, match="lora.r"):
        workshop(base, tokenizer).open_policy(str(policy_folder), "policy")


def test_a_scorer_adapter_is_no_policy(base, tokenizer, tmp_path):
    shop = workshop(base, tokenizer, LORA)
    save_role(shop.new_scorer("scorer", None), tmp_path, tokenizer, PAD)
    with pytest.raises(ValueError, match="score.weight"):
        read_adapter(shop.new_policy("policy"), tmp_path)


# --- merging ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_merging_leaves_a_plain_model(base, tokenizer, tmp_path):
    shop = workshop(base, tokenizer, LORA)
    role, other = moved(shop.new_policy("sft")), moved(shop.new_policy("other"), seed=2)
    before = role.logprobs(batch())[0]
    other.logprobs(batch())  # merging takes the role's adapter, not the active one
    whole = merged(role)
    torch.testing.assert_close(whole.logprobs(batch())[0], before, atol=1e-5, rtol=1e-5)
    assert not any("lora" in key for key, _ in whole.backbone.network.named_parameters())
    save_role(whole, tmp_path, tokenizer, PAD)
    assert not is_adapter(tmp_path)
    text = (tmp_path / "config.json").read_text().lower()
    assert "peft" not in text and "lora" not in text
    plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(plain) is hf.LlamaForCausalLM
    same_logprobs(whole, plain)


@torch.no_grad()
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_merging_into_a_table_that_embeds_and_predicts_changes_one_of_the_two(base, tokenizer, tmp_path, target):
    hf.LlamaForCausalLM(hf.AutoConfig.from_pretrained(base, tie_word_embeddings=True)).save_pretrained(
        tmp_path / "tied"
    )
    shop = workshop(tmp_path / "tied", tokenizer, Lora(r=4, alpha=8, targets=["q_proj", target]))
    role = moved(shop.new_policy("sft"))
    inner = role.backbone.network
    assert inner.get_output_embeddings().weight is inner.get_input_embeddings().weight
    before = role.logprobs(batch())[0]
    whole = merged(role)
    torch.testing.assert_close(whole.logprobs(batch())[0], before, atol=1e-5, rtol=1e-5)
    save_role(whole, tmp_path / "merged", tokenizer, PAD)
    same_logprobs(whole, hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_merged_backbone_takes_new_adapters(base, tokenizer):
    shop = workshop(base, tokenizer, LORA)
    whole = merged(moved(shop.new_policy("sft")))
    whole.backbone.add_adapter("policy")
    assert torch.equal(Role(whole.backbone, "policy").logprobs(batch())[0], whole.logprobs(batch())[0])


# --- notes --------------------------------------------------------------------------------------------


def test_notes_come_back(tmp_path):
    notes = ScorerNotes(mean=-0.25, std=1.5, accuracy=0.75, pairs=100)
    save_notes(tmp_path, notes)
    assert read_notes(tmp_path) == notes
    assert json.loads((tmp_path / "scorer.json").read_text())["std"] == 1.5


def test_missing_notes_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"scorer.json is missing.*rto reward.*reward.normalize = false"):
        read_notes(tmp_path)
