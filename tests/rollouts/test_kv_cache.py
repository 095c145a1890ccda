"""The cache with room says what transformers' own says, step by step, through all that happens to its rows."""

from __future__ import annotations

import torch
from transformers import DynamicCache, LlamaConfig, MistralConfig

from rto.rollouts.kv_cache import RoomyLayer, keep_rows, roomy_cache

SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}


def test_it_holds_what_a_concatenating_cache_holds(generator):
    """A prompt, its rows repeated, steps, rows that leave and change places, steps: as far as the room goes and on."""
    config = LlamaConfig(**SIZES)
    found, plain = roomy_cache(config, 7, torch.float32), DynamicCache(config=config)

    def step(rows: int, width: int) -> None:
        for layer in range(2):
            new = torch.randn(2, rows, 1, width, 4, generator=generator)
            for mine, theirs in zip(found.update(*new, layer), plain.update(*new, layer), strict=True):
                assert torch.equal(mine, theirs)
        assert found.get_seq_length() == plain.get_seq_length()
        assert found.get_mask_sizes(1, 0) == plain.get_mask_sizes(1, 0)

    step(3, 4)
    for cache in (found, plain):
        cache.reorder_cache(torch.tensor([0, 0, 1, 2, 2]))
    step(5, 1)
    place = found.layers[0].keys.data_ptr()
    step(5, 1)
    for kept in ([0, 4, 2, 3], [3, 1]):
        keep_rows(found, torch.tensor(kept))
        plain.reorder_cache(torch.tensor(kept))
        for mine, theirs in zip(found.layers, plain.layers, strict=True):
            assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)
    step(2, 1)
    assert found.layers[0].keys.data_ptr() == place, "nothing was copied to another place"
    step(2, 1)  # beyond the room
    step(2, 1)


def test_rows_are_chosen_between_steps(generator):
    config = LlamaConfig(**SIZES)
    found, plain = roomy_cache(config, 9, torch.float32), DynamicCache(config=config)
    for width in (4, 1, 1):
        new = torch.randn(2, 3, 1, width, 4, generator=generator)
        said = [[cache.update(*new, layer) for layer in range(2)] for cache in (found, plain)]
        assert all(torch.equal(*pair) for one, two in zip(*said, strict=True) for pair in zip(one, two, strict=True))
        for cache in (found, plain):
            cache.reorder_cache(torch.tensor([2, 0, 2]))


def test_it_holds_the_precision_of_attention(generator):
    """As autocast has keys of trained weights: float32 by the rotary positions, values bfloat16."""
    found = roomy_cache(LlamaConfig(**SIZES), 9, torch.bfloat16)
    for width in (4, 1, 1):
        keys, values = torch.randn(2, 3, 1, width, 4, generator=generator)
        said = found.update(keys, values.bfloat16(), 0)
        assert [part.dtype for part in said] == [torch.bfloat16] * 2
        assert torch.equal(said[0][:, :, -width:], keys.bfloat16())


def test_layers_of_another_kind_stay():
    sliding = roomy_cache(MistralConfig(**SIZES, sliding_window=3), 9, torch.float32)
    kinds = [type(layer).__name__ for layer in sliding.layers]
    assert kinds == ["DynamicSlidingWindowLayer"] * 2
    assert all(type(layer) is RoomyLayer for layer in roomy_cache(LlamaConfig(**SIZES), 9, torch.float32).layers)
