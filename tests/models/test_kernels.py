"""Keys of [model] that need a GPU: refused without one; what they do to a model, as far as a CPU can show it."""

from __future__ import annotations

import os
import sys
from types import ModuleType

import pytest
import torch
import transformers as hf

from rto import recipe
from rto.batch import Completions, Prompts
from rto.config import Lora, Scratch
from rto.data.worlds import world_tokenizer
from rto.models.kernels import Offloaded, _shares_keys, attending_to_cache, check_device, share_keys, use_liger
from rto.models.role import Backbone, Role
from rto.models.runtime import Runtime
from rto.models.workshop import Workshop
from rto.pipeline.job import Job

SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 32}
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def network(config: type = hf.LlamaConfig) -> hf.PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = config(**SIZE, bos_token_id=None, eos_token_id=2, pad_token_id=0, initializer_range=0.3)
        return hf.AutoModelForCausalLM.from_config(made).eval()


@pytest.fixture
def liger(monkeypatch) -> list[dict]:
    """A library with Liger's two names, which knows Llama and writes down what it is asked for."""
    asked: list[dict] = []
    package, transformers, patch = (
        ModuleType(name)
        for name in ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.monkey_patch")
    )
    transformers._apply_liger_kernel_to_instance = lambda **options: asked.append(options)
    patch.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}
    for module in (package, transformers, patch):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return asked


# --- refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention": "flash_attention_2"}, r"runs on GPUs, and this run is on cpu: set it to 'sdpa'"),
        ({"kernels": "liger"}, r"model\.kernels = 'liger': these kernels are for GPUs, and this run is on cpu"),
        ({"offload_activations": True}, r"model\.offload_activations = true .* this run is on cpu: set it to false"),
    ],
)
def test_what_needs_a_gpu_is_refused_without_one(changes, said):
    model = Scratch(type="scratch", **changes)
    with pytest.raises(ValueError, match=said):
        check_device(model, CPU, torch.float32)
    with pytest.raises(ValueError, match=said):
        Workshop(model, "", world_tokenizer(), Runtime("cpu"), 0)
    check_device(model, GPU, torch.bfloat16)


def test_flash_attention_is_refused_in_float32():
    model = Scratch(type="scratch", attention="flash_attention_2")
    with pytest.raises(ValueError, match=r"has no float32, in which this run computes: set model\.dtype to 'bfloat16'"):
        check_device(model, GPU, torch.float32)


def test_a_scorer_of_its_own_model_is_refused_before_anything_is_trained():
    changes = {"data": {"pairs": "mine.jsonl"}, "model": {"name": "mine"}, "device": "cpu"}
    asked = recipe.build({**changes, "reward": {"model": {"name": "other", "kernels": "liger"}}})
    with pytest.raises(ValueError, match="kernels"):
        Job(asked, quiet=True)


def test_steps_of_sampling_read_the_cache_without_flash_attention(monkeypatch):
    made = network()
    settings = made.config

    def switch(way: str | dict[str, str]) -> None:  # transformers' own wants flash-attn to be installed
        settings._attn_implementation = way if isinstance(way, str) else way[""]

    monkeypatch.setattr(made, "set_attn_implementation", switch)
    switch("flash_attention_2")
    with pytest.raises(KeyError), attending_to_cache(made):
        assert settings._attn_implementation == "sdpa"
        raise KeyError
    assert settings._attn_implementation == "flash_attention_2"
    switch("eager")
    with attending_to_cache(made):
        assert settings._attn_implementation == "eager"


def test_the_library_is_named_when_it_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ValueError, match=r"liger_kernel\S* is not installed: pip install rto-rlhf\[gpu\]"):
        use_liger(network())


def test_families_without_kernels_are_refused(liger):
    with pytest.raises(ValueError, match="no kernels for the family gpt_neox"):
        use_liger(network(hf.GPTNeoXConfig))
    assert liger == []


# --- done ---------------------------------------------------------------------------------------------


def test_liger_is_asked_for_layers_and_not_for_losses(liger):
    made = network()
    use_liger(made)
    assert liger == [{"model": made, "cross_entropy": False, "fused_linear_cross_entropy": False}]


def rows() -> Completions:
    ids, real = torch.arange(3, 15).view(2, 6), torch.ones(2, 3, dtype=torch.bool)
    return Completions(Prompts(ids[:, :3], real), ids[:, 3:], real, real[:, 0])


@pytest.mark.gpu
def test_liger_on_a_gpu():
    pytest.importorskip("liger_kernel")
    made = network().to(GPU)
    role = Role(Backbone(made, "x", None, torch.float32))
    plain = role.logprobs(rows().to(GPU))[0]
    use_liger(made)
    torch.testing.assert_close(role.logprobs(rows().to(GPU))[0], plain, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("device", [CPU, pytest.param(GPU, marks=pytest.mark.gpu)], ids=str)
@pytest.mark.parametrize("lora", [None, Lora(r=2)], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_offloading_changes_no_gradient(device, lora, checkpointing):
    found = []
    for offload in (False, True):
        backbone = Backbone(network().to(device), "x", lora, torch.float32, checkpointing, offload=offload)
        if lora:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                backbone.add_adapter("a")
        role = Role(backbone, "a" if lora else None)
        for parameter in role.parameters():
            parameter.requires_grad_(True)
        role.logprobs(rows().to(device))[0].sum().backward()
        found.append([p.grad for p in role.parameters() if p.grad is not None])
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-6)


def test_activations_are_moved_and_weights_are_not():
    """A linear layer keeps its input for the weights' gradient, and its weights for the input's."""
    layer = torch.nn.Linear(4, 4)
    x = torch.randn(3, 4, requires_grad=True)
    with Offloaded(layer):
        y = layer(x)
    activations, weights = y.grad_fn._saved_mat1, y.grad_fn._saved_mat2
    assert activations.data_ptr() != x.data_ptr() and torch.equal(activations, x)
    assert weights.data_ptr() == layer.weight.data_ptr()


# --- keys that several heads share --------------------------------------------------------------------


def test_shared_keys_are_kept_once_and_change_nothing(monkeypatch):
    """Four heads on two keys, two rows of which one is padded: log-probs and gradients, and what is kept for them."""
    if not _shares_keys():
        pytest.skip("this PyTorch repeats keys on CPUs")
    ids = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 0, 0]])
    found: dict[str, list[torch.Tensor]] = {}
    shapes: dict[str, set[tuple[int, ...]]] = {"0": set(), "1": set()}
    for forced, seen in shapes.items():
        monkeypatch.setenv("TRANSFORMERS_SDPA_FORCE_GQA", forced)
        size = SIZE | {"num_attention_heads": 4, "num_key_value_heads": 2}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = hf.LlamaForCausalLM(hf.LlamaConfig(**size, initializer_range=0.3)).eval()

        def kept(tensor: torch.Tensor, seen: set[tuple[int, ...]] = seen) -> torch.Tensor:
            seen.add(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
            out = model(input_ids=ids, attention_mask=(ids > 0).long()).logits.log_softmax(-1)[ids > 0]
        out[:, 3].sum().backward()
        found[forced] = [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert (2, 2, 5, 4) in shapes["1"] and (2, 2, 5, 4) not in shapes["0"]  # rows, keys, tokens, width


def test_shared_keys_leave_a_choice_of_the_user(monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_SDPA_FORCE_GQA", "0")
    share_keys()
    assert os.environ["TRANSFORMERS_SDPA_FORCE_GQA"] == "0"
    monkeypatch.delenv("TRANSFORMERS_SDPA_FORCE_GQA")
    monkeypatch.setattr("rto.models.kernels._shares_keys", lambda: False)  # an older PyTorch
    share_keys()
    assert "TRANSFORMERS_SDPA_FORCE_GQA" not in os.environ
