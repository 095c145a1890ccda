"""The memory table of recipes/rto-qwen-7b-1gpu.toml on a machine that has neither the GPU nor the model.

    python benchmarks/plan_7b.py --stages prefer,rl --policy.micro_tokens 8192

The model is a config.json with Qwen2.5-7B's sizes; every prompt and answer is at its limit. Ghost tensors on the CPU
stand for those on the GPU: PyTorch without CUDA makes no ghosts there that autograd takes. In place of flash attention
is an operation that keeps what it keeps. The rest is the run's own code, packed rows included.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from rto import recipe
from rto.models import rehearsal, workshop
from rto.pipeline import job, machine, sizing
from rto.pipeline.plan import describe, make_plan

RECIPE = Path(__file__).parents[1] / "recipes" / "rto-qwen-7b-1gpu.toml"
GPU = 80 * 10**9  # bytes


class Flash(torch.autograd.Function):
    """Keeps its inputs, its output and a number a token and head, as flash attention does."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def kernel(q, k, v, causal=True, softmax_scale=None, **others):
    return Flash.apply(q, k, v)


def packed_kernel(
    q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, causal=True, softmax_scale=None
):
    return Flash.apply(q, k, v)


class Shop(rehearsal.GhostWorkshop):
    """transformers makes no model with flash attention where it cannot run: it is switched on afterwards."""

    def _network(self, name: str, kind: str, dtype: torch.dtype) -> Any:
        wanted = self.model
        self.model = wanted.model_copy(update={"attention": "sdpa"})
        made = super()._network(name, kind, dtype)
        self.model, made.config._attn_implementation = wanted, wanted.attention
        return made


def write_model(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(["<pad>", "<eos>", *letters])}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    sizes = {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
    sizes |= {"intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False, "rope_theta": 1e6}
    Qwen2Config(**sizes, bos_token_id=0, eos_token_id=1, dtype="bfloat16").save_pretrained(folder)


def write_pairs(file: Path, count: int = 400, tokens: int = 1400) -> None:
    """A letter is a token."""
    import json

    def said(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    with file.open("w") as out:
        for i in range(count):
            row = {"prompt": said("user", f"{i:0{tokens}d}"), "chosen": said("assistant", "a" * tokens)}
            out.write(json.dumps(row | {"rejected": said("assistant", "b" * tokens)}) + "\n")


def main(words: list[str]) -> None:
    from transformers import modeling_flash_attention_utils as flash

    flash._lazy_imports = lambda *_, **__: (kernel, packed_kernel, None, flash._pad_input, flash._unpad_input)
    workshop.check_device = job.check_device = lambda model, device: None
    from rto.pipeline import memory_plan

    memory_plan.GhostWorkshop = rehearsal.GhostWorkshop = Shop
    sizing.heap_of = lambda device: None  # no holes of glibc's heap,
    machine.resident = lambda: 0  # and nothing of the process: they are not on the GPU
    machine.memory = lambda device: GPU
    given = dict(zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True))
    stages = given.pop("stages", "prefer,reward,rl,evaluate").split(",")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_model(folder)
        write_pairs(folder / "pairs.jsonl")
        changes = {"model.name": made, "data.pairs": str(folder / "pairs.jsonl"), "data.split": "train"}
        changes |= {"device": "cpu", "output": str(folder / "run")} | given
        text = describe(make_plan(recipe.load(RECIPE, list(changes.items())), stages))
    print(text[text.index("\nmemory") :])


if __name__ == "__main__":
    main(sys.argv[1:])
