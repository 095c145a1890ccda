"""`rto plan` against the memory that a run really takes: five configurations, short runs, one at a time.

    python benchmarks/plan.py                    # all, on one thread; the SmolLM2 ones need `make smollm`
    python benchmarks/plan.py tiny wide          # only these

Prints a Markdown table: predicted and measured peak of the process after each stage, in MB. The measured one is
``peak_memory_mb`` of stages.json, which never falls, so the predicted one is the largest so far too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from rto.config import World
from rto.data.worlds import world_rows

ROOT = Path(__file__).resolve().parents[1]
SHORT = "--sft.max_steps 3 --prefer.max_steps 3 --reward.max_steps 3 --policy.max_steps 2 --evaluation.samples 1"
WIDE = """--model.hidden 512 --model.intermediate 1536 --model.layers 6 --model.heads 8 --sft.max_steps 2
    --prefer.max_steps 2 --reward.max_steps 2 --policy.max_steps 1 --evaluation.samples 1 --sft.micro_tokens 2048
    --prefer.micro_tokens 4096 --reward.micro_tokens 4096 --policy.micro_tokens 4096 --policy.rollouts 32"""
CHAT = "--data.max_prompt 64 --data.max_response 64 --data.test 0.02"
DPO = f"{CHAT} --stages ['prefer'] --data.oracle 0 --prefer.batch 4 --prefer.max_steps 2 --prefer.micro_tokens 1024"
RTO = """--sft.max_steps 1 --prefer.max_steps 1 --reward.max_steps 1 --policy.max_steps 1 --evaluation.prompts 4
    --policy.rollouts 8 --stages ['sft','prefer','reward','rl']"""
CASES = {
    "tiny": ("recipes/tiny.toml", SHORT),
    "wide": ("recipes/tiny.toml", WIDE),
    "smollm2-lora-dpo": ("recipes/smollm2-hh.toml", DPO),
    "smollm2-full-dpo": ("recipes/smollm2-hh.toml", f"{DPO} --model.lora none"),
    "smollm2-lora-rto": ("recipes/smollm2-hh.toml", RTO),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), help=", ".join(CASES))
    known = parser.parse_args()
    print(
        "| configuration | stage | predicted, MB | measured, MB | ratio |", "| --- | --- | --- | --- | --- |", sep="\n"
    )
    worst = 0.0
    for name in known.cases:
        with tempfile.TemporaryDirectory() as folder:
            for stage, predicted, measured in compare(name, Path(folder)):
                worst = max(worst, abs(predicted / measured - 1))
                line = f"| {name} | {stage} | {predicted:,.0f} | {measured:,.0f} | {predicted / measured:.2f} |"
                print(line, flush=True)
    print(f"\nlargest error: {worst:.1%}")


def compare(name: str, folder: Path) -> list[tuple[str, float, float]]:
    """Stage, predicted and measured peak."""
    recipe, words = CASES[name]
    call = [str(ROOT / recipe), *words.split(), "--device", "cpu", "--output", str(folder / "run")]
    if "smollm2" in recipe:
        call += ["--data.pairs", str(chat_pairs(folder / "pairs.jsonl"))]
    plan = json.loads(rto("plan", *call, "--json"))
    rto("run", *call, "--quiet")
    stages = json.loads((folder / "run" / "stages.json").read_text())
    rows, most = [], 0.0
    for stage in plan["memory"]["stages"]:
        most = max(most, stage["peak"] / 2**20)
        rows.append((stage["stage"], most, stages[stage["stage"]]["peak_memory_mb"]))
    return rows


def rto(*words: str) -> str:
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "rto.cli", *words], capture_output=True, text=True, env=one_thread)
    if done.returncode:
        raise SystemExit(f"rto {' '.join(words)}: exit code {done.returncode}\n{done.stderr}")
    return done.stdout


def chat_pairs(path: Path, count: int = 200) -> Path:
    """Pairs of the tiny world, strung together until they are as long as chats."""
    rng = random.Random(0)
    world = world_rows(World(type="world", pairs=8 * count), seed=0).pairs
    with path.open("w") as file:
        for i in range(count):
            some = rng.sample(world, 8)
            row = {
                "prompt": f"{i}. " + " ".join(pair.prompt for pair in some),
                "chosen": " ".join(pair.chosen for pair in some[: 4 + i % 5]),
                "rejected": " ".join(pair.rejected for pair in some[: 4 + i % 4]),
            }
            file.write(json.dumps(row) + "\n")
    return path


if __name__ == "__main__":
    main()
