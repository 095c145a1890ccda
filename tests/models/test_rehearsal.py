"""What a rehearsal counts."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch._subclasses.fake_tensor import FakeTensorMode

from rto.config import Lora, Pretrained, Scratch
from rto.data.worlds import world_tokenizer
from rto.models.rehearsal import GhostWorkshop, Tally
from rto.models.runtime import Runtime


@pytest.mark.parametrize(("device", "counted"), [(None, 12), ("cpu", 12), ("cuda", 0)])
def test_only_what_is_on_the_device_is_counted(device, counted):
    """A checkpoint that a GPU's weights are written from lies in main memory."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        ghost = torch.empty(3)
    tally = Tally(vocabulary=100)
    tally.device = device
    with tally:
        kept = ghost + 1
    assert tally.total == tally.peak == counted
    del kept
    assert tally.total == 0


def test_weights_from_a_file_leave_and_come():
    """12 bytes of weights and 40 of something else: the peak is that of all that is there at once."""
    tally = Tally(vocabulary=100)
    with FakeTensorMode():
        weight, other = torch.empty(3), torch.empty(10)
    tally.count(weight, ("reference", "weights"), mapped=True)
    for _ in range(2):  # twice is once
        tally.leave([weight])
    assert (tally.total, tally.mapped, tally.live["reference", "weights"]) == (0, 0, 0)
    tally.count(other, ("policy", "gradients"))
    assert (tally.peak, tally.mapped_at_peak, tally.at_peak["reference", "weights"]) == (40, 0, 0)
    for _ in range(2):
        tally.come([weight])
    assert (tally.total, tally.peak, tally.mapped_at_peak) == (52, 52, 12)
    tally.leave([weight])
    del weight
    assert tally.total == 40 and tally.mapped == 0
    del other
    assert tally.total == 0


def test_a_scorers_model_is_another_with_other_settings():
    shop = GhostWorkshop(Scratch(type="scratch"), "", world_tokenizer(), Runtime("cpu"), 0).begin(Tally(vocabulary=100))
    narrow, wide = (Pretrained(name="some/model", lora=Lora(r=rank)) for rank in (2, 4))
    assert shop._other(narrow) is shop._other(narrow.model_copy())
    assert (shop._other(wide).model, shop._other(narrow).model) == (wide, narrow)


def test_a_family_without_a_classifier_is_refused_as_it_will_be(tmp_path):
    hf.GraniteConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1).save_pretrained(tmp_path)
    model = Pretrained(name=str(tmp_path))
    shop = GhostWorkshop(model, str(tmp_path), world_tokenizer(), Runtime("cpu"), 0).begin(Tally(vocabulary=50))
    with pytest.raises(ValueError, match=r"no sequence classifier of the family granite.*model\.lora\.r"):
        shop.open("reward", "scorer", trained=True)
