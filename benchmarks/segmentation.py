"""Segmentation and the even layout of 64 answers of up to 1,024 tokens: one vectorised call beside a plain loop.

    python benchmarks/segmentation.py

The loop reads the tensors token by token, as one writes it first. A second one works on Python lists (the copy to
them and back is timed, too) and is the best that a loop does. All three must give the same rewards.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from rto.batch import Signals
from rto.rewards import segment
from rto.segments import segment_ends

ROWS, TOKENS, CUTOFF = 64, 1024, 1.75
AT_LEAST = 100  # times as fast as the loop


def vectorised(entropy: Tensor, mask: Tensor, finished: Tensor, values: Tensor) -> Tensor:
    """r [B, T]: the value at the end of each segment, in equal parts on its tokens."""
    ends = segment_ends(entropy, mask, finished, CUTOFF)
    signals = Signals(mask, finished, values, values, segments=values, segment_ends=ends)
    return segment(signals, layout="even", clip=None)


def loop(entropy: Tensor, mask: Tensor, finished: Tensor, values: Tensor) -> Tensor:
    reward = torch.zeros_like(values)
    for row in range(len(mask)):
        body = int(mask[row].sum()) - int(finished[row])
        first = 0
        for j in range(body):
            if j == body - 1 or entropy[row, j + 1] > CUTOFF:
                for i in range(first, j + 1):
                    reward[row, i] = values[row, j] / (j + 1 - first)
                first = j + 1
    return reward


def loop_over_lists(entropy: Tensor, mask: Tensor, finished: Tensor, values: Tensor) -> Tensor:
    lengths = (mask.sum(-1) - finished.long()).tolist()
    rewards = []
    for after, value, body in zip(entropy.tolist(), values.tolist(), lengths, strict=True):
        reward, first = [0.0] * len(value), 0
        for j in range(body):
            if j == body - 1 or after[j + 1] > CUTOFF:
                length = j + 1 - first
                reward[first : j + 1] = [value[j] / length] * length
                first = j + 1
        rewards.append(reward)
    return torch.tensor(rewards)


def best(call: Callable[[], Tensor], repeats: int) -> float:
    """Seconds of the fastest of ``repeats`` calls."""
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(TOKENS // 2, TOKENS + 1, (ROWS, 1), generator=generator)
    mask = torch.arange(TOKENS) < lengths
    finished = lengths[:, 0] < TOKENS
    entropy = 3 * torch.rand(ROWS, TOKENS, generator=generator) ** 2
    values = torch.randn(ROWS, TOKENS, generator=generator)
    inputs = (entropy, mask, finished, values)

    expected = vectorised(*inputs)
    for other in (loop, loop_over_lists):
        torch.testing.assert_close(other(*inputs), expected)
    fast = best(lambda: vectorised(*inputs), 50)
    slow, lists = best(lambda: loop(*inputs), 3), best(lambda: loop_over_lists(*inputs), 10)

    count = int(segment_ends(entropy, mask, finished, CUTOFF).sum())
    print(
        f"{ROWS} x {TOKENS} cells, {int(mask.sum()):,} tokens, {count:,} segments, {torch.get_num_threads()} thread(s)"
    )
    print(f"vectorised       {1e3 * fast:9.2f} ms")
    print(f"loop             {1e3 * slow:9.2f} ms   {slow / fast:7.0f} times as long")
    print(f"loop over lists  {1e3 * lists:9.2f} ms   {lists / fast:7.0f} times as long")
    if slow < AT_LEAST * fast:
        raise SystemExit(f"the vectorised call is less than {AT_LEAST} times as fast as the loop")


if __name__ == "__main__":
    main()
