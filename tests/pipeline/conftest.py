"""Two tiny recipes: the tiny world from scratch, and preference pairs in a file for a model in a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

WORLD = """
device = "cpu"
[data]
type = "world"
sft = 48
pairs = 32
prompts = 16
test = 8
max_response = 12
[model]
type = "scratch"
hidden = 16
layers = 1
heads = 2
intermediate = 16
[sft]
lr = 1e-2
batch = 16
[prefer]
lr = 1e-3
batch = 16
[reward]
lr = 1e-3
batch = 16
[evaluation]
bootstrap = 100
[evaluation.oracle]
type = "world"
"""

RL = """
[policy]
lr = 1e-3
rollouts = 8
batch = 4
[baselines.ppo]
method = "ppo"
"""

FILES = """
device = "cpu"
[data]
max_prompt = 32
max_response = 8
test = 0.2
oracle = 0.3
[sft]
lr = 1e-2
batch = 8
[prefer]
lr = 1e-2
batch = 8
[reward]
lr = 1e-2
batch = 8
[policy]
lr = 1e-2
rollouts = 8
batch = 8
[baselines.ppo]
method = "ppo"
[evaluation]
bootstrap = 100
"""


@pytest.fixture(scope="session")
def world() -> str:
    """The tiny world as the text of a recipe that does not say what RL does."""
    return WORLD


@pytest.fixture(scope="session")
def world_recipe(world, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("recipe") / "world.toml"
    path.write_text(world + RL)
    return str(path)


@pytest.fixture(scope="session")
def files_recipe(tmp_path_factory) -> str:
    """Without ``model.name`` and ``data.pairs``."""
    path = tmp_path_factory.mktemp("recipe") / "files.toml"
    path.write_text(FILES)
    return str(path)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """A folder with a Llama of 16 dimensions and a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    settings = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory) -> str:
    """40 pairs in TRL's layout: the chosen answer repeats the question's letter."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = []
    for i in range(40):
        good, bad = chr(ord("a") + i % 20), chr(ord("A") + i % 20)
        ask = [{"role": "user", "content": f"{i} {good}?"}]
        answers = {"chosen": f"{good}{good}", "rejected": f"{bad}{bad}{bad}"}
        rows.append({"prompt": ask, **{k: [{"role": "assistant", "content": v}] for k, v in answers.items()}})
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
