"""The rehearsal of sampling holds what sampling holds: the cache at its longest and the copies of weights."""

from __future__ import annotations

import pytest

from rto.config import Lora, Policy, Scratch
from rto.data.chat import Encoder
from rto.data.worlds import world_tokenizer
from rto.models import prepacked
from rto.models.rehearsal import GhostWorkshop, Tally
from rto.models.runtime import Runtime
from rto.pipeline.passes import sample

MODEL = Scratch(type="scratch", hidden=32, layers=2, heads=2, intermediate=48, lora=None)
ROWS, PROMPT, LIMIT = 6, 5, 40


@pytest.mark.parametrize("lora", [None, Lora(r=4)])
@pytest.mark.parametrize("smallest", [1, 10**9], ids=["packed", "not packed"])
def test_the_cache_and_the_copies_are_counted(lora, smallest, monkeypatch):
    monkeypatch.setattr(prepacked, "NUMBERS", smallest)
    tokenizer = world_tokenizer()
    tally = Tally(len(tokenizer))
    model = MODEL.model_copy(update={"lora": lora})
    policy = GhostWorkshop(model, "", tokenizer, Runtime("cpu"), 0).begin(tally).open("policy", "policy", trained=True)
    before = tally.total
    with tally:
        sample(tally, policy, [[5] * PROMPT, [6] * PROMPT] * (ROWS // 2), Encoder(tokenizer, 10, LIMIT), Policy())
    assert tally.total == before, "all of it goes"
    # Keys and values of every layer; no state is kept for the last token of an answer.
    assert tally.at_peak["pass", "KV cache"] == 4 * 2 * 2 * ROWS * 32 * (PROMPT + LIMIT - 1)
    block = 4 * 32 * 32 + 3 * 32 * 48
    output = len(tokenizer) * 32
    copies = {(None, 1): 2 * block + output, (4, 1): 2 * block + output, (None, 10**9): 0, (4, 10**9): 2 * block}
    assert tally.at_peak.get(("pass", "weights"), 0) == 4 * copies[lora and lora.r, smallest]
