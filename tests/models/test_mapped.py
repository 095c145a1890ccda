from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rto.models import mapped
from rto.models.load import load_network
from rto.models.mapped import let_go

SIZES = {"vocab_size": 600, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="asks Linux")


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Frozen, from a file of about 600 kB."""
    monkeypatch.setattr(mapped, "LARGE", 2**18)
    LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4)).save_pretrained(tmp_path)
    return load_network(str(tmp_path), "causal", torch.float32, 0).requires_grad_(False)


def resident(network: Any) -> int:
    """Pages of the mapping of the weights, in kB."""
    place = network.base_model.layers[0].mlp.up_proj.weight.data_ptr()
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if head := mapped._HEAD.match(line):
            here = int(head[1], 16) <= place < int(head[2], 16)
        elif here and line.startswith("Rss:"):
            return int(line.split()[1])
    raise AssertionError("no such mapping")


def test_pages_go_and_come_back(network: Any) -> None:
    ids = torch.arange(50)[None]
    before = network(ids).logits
    held = resident(network)
    size = sum(p.nbytes for p in network.parameters())
    assert held * 1024 > size / 2  # the words in use, and the layers
    assert let_go(network) >= size
    assert resident(network) < held / 2
    assert torch.equal(network(ids).logits, before)


def test_changed_weights_stay(network: Any) -> None:
    """A change that torch's own count of versions would not know of."""
    weight = network.base_model.layers[0].mlp.up_proj.weight
    weight.data.mul_(2)
    expected = weight.clone()
    assert let_go(network) == 0
    assert torch.equal(weight, expected)


def test_trained_and_small_ones_are_left_alone(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    network.lm_head.requires_grad_(True)
    assert let_go(network) == 0
    network.requires_grad_(False)
    monkeypatch.setattr(mapped, "LARGE", 2**26)
    assert let_go(network) == 0


def test_weights_that_lie_in_no_file(network: Any) -> None:
    made = LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4)).requires_grad_(False)
    expected = [p.clone() for p in made.parameters()]
    assert let_go(made) == 0
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), expected, strict=True))
