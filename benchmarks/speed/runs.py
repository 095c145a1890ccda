"""Which sides take turns together: in one run of the driver, a peer and every rto side that it serves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.speed.machine import SETUPS

PEER_OF = {"ppo-adapters": "ppo"}  # work whose peer is another work's
APART = ("ppo", "dpo-natural")  # two peers of these do not fit into 24 GiB of memory: one setup after the other
# Most blocks of sampling are small, and it has no gradients; TRL's PPO knows no gradient checkpointing
ONE_SETUP = {"cpu": ("generate",), "cuda": ("generate", "ppo")}

# Turns that are not timed. One of RL is hundreds of passes.
WARMUP = {"dpo": 2, "sft": 2, "reward": 2, "ppo": 1, "generate": 2}


@dataclass(frozen=True)
class Entry:
    """One side of one piece of work."""

    work: str
    side: str  # "peer" or "rto"
    setup: str = "default"  # of the peer: see `machine.SETUPS`

    @property
    def told(self) -> str:
        """The setup, as a table names it."""
        return self.setup if self.side == "peer" else "its own"

    @property
    def kind(self) -> str:
        return kind_of(self.work)


def kind_of(work: str) -> str:
    return work.partition("-")[0]


def runs(
    work: Sequence[str], setups: Sequence[str] | None = None, only: str | None = None, device: str = "cpu"
) -> list[list[Entry]]:
    """Peers first, then the rto sides that are compared with them. ``setups``: of the peers, the same for all work."""
    found: list[list[Entry]] = []
    for peer in dict.fromkeys(PEER_OF.get(name, name) for name in work):
        kind = kind_of(peer)
        wanted = list(setups or (("default",) if kind in ONE_SETUP[device] else SETUPS))
        served = [Entry(name, "rto") for name in work if PEER_OF.get(name, name) == peer]
        if only == "rto":
            found.append(served)
            continue
        for together in [[one] for one in wanted] if peer in APART else [wanted]:
            peers = [Entry(peer, "peer", setup) for setup in together]
            found.append(peers if only == "peer" else peers + served)
    return found
