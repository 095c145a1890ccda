"""The rules of the house, read from the source: who may import whom, how long, how safe, how fast.

Files that do not exist yet break no rule.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"

# From the bottom up: a unit (a module or package directly in rto) imports lower floors only.
FLOORS = (
    {"products", "room"},
    {"late"},
    {"input_layer", "output_layer"},
    {"batch", "config", "finite", "numerics", "segments", "seeds"},
    {"report", "data", "rewards", "models", "advantages", "optim", "recipe", "theory"},
    {"rollouts", "preferences"},
    {"evaluation", "policy"},
    {"pipeline"},
    {"__init__"},
    {"cli", "commands"},
    {"__main__"},
)
# (importer, imported) -> why this import of a neighbour or of a higher floor is right.
EXCEPTIONS: dict[tuple[str, str], str] = {}

# Plain tensor code: it must load, and be readable, without the model libraries.
MATHS = ("batch.py", "numerics.py", "products.py", "late.py", "output_layer.py")
MATHS += ("rewards/**/*.py", "advantages/**/*.py", "preferences/**/*.py")
MATHS += tuple(f"policy/{name}.py" for name in ("ppo", "value", "kl", "kl_loss", "p3o", "rebel", "scaling", "ema"))
LOOPS = {
    f"preferences/{name}.py" for name in ("train", "objectives", "groups", "cache", "rounds")
}  # in a folder of maths, but not maths

PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve"}  # each can run code when a file is read
MAX_LINES = 400
MAX_SECONDS = 1.5


def sources() -> list[Path]:
    return sorted((SRC / "rto").rglob("*.py"))


def name_of(path: Path) -> str:
    """The path from the package folder: ``rewards/shaped.py``."""
    return path.relative_to(SRC / "rto").as_posix()


def imports(text: str, file: str) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of every import in ``text``, wherever it stands (also under TYPE_CHECKING).

    ``file`` is the path from the package folder; it resolves relative imports. ``from a import b`` gives ``a.b``.
    """
    package = ("rto", *Path(file).parts[:-1])
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *(node.module or "").split("."))).strip(".")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def unit(dotted: str) -> str:
    """The unit of an absolute name in rto: ``rto.data.chat`` is in ``data``, ``rto.__version__`` in ``__init__``."""
    second = (dotted.split(".") + [""])[1]
    known = any(second in floor for floor in FLOORS)
    there = second and ((SRC / "rto" / second).is_dir() or (SRC / "rto" / f"{second}.py").exists())
    return second if known or there else "__init__"


def floor_of(name: str) -> int:
    for number, floor in enumerate(FLOORS):
        if name in floor:
            return number
    raise AssertionError(f"src/rto/{name} has no floor: add it to FLOORS in {Path(__file__).name}")


def climbs(text: str, file: str) -> list[str]:
    """Imports in ``text`` that do not go down."""
    own = Path(file).parts[0].removesuffix(".py")
    found = []
    for line, dotted in imports(text, file):
        if dotted.split(".")[0] != "rto":
            continue
        other = unit(dotted)
        if other != own and floor_of(other) >= floor_of(own) and (own, other) not in EXCEPTIONS:
            found.append(f"{file}:{line}: {own} (floor {floor_of(own)}) imports {dotted} (floor {floor_of(other)})")
    return found


def imported(path: Path, libraries: set[str]) -> list[str]:
    found = imports(path.read_text(), name_of(path))
    return [f"{name_of(path)}:{line}: {dotted}" for line, dotted in found if dotted.split(".")[0] in libraries]


def unsafe(text: str) -> list[tuple[int, str]]:
    """Line and name of everything that runs code from a file or from the hub."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            words = {word.arg for word in node.keywords if ast.unparse(word.value) == "True"}
            found += [(node.lineno, f"{word}=True") for word in sorted(words & {"trust_remote_code", "allow_pickle"})]
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
            found.append((node.lineno, "torch.load"))
    for line, dotted in imports(text, "any.py"):
        if dotted.split(".")[0] in PICKLES or dotted == "torch.load":
            found.append((line, dotted))
    return sorted(found)


# --- the rules ----------------------------------------------------------------------------------------


def test_nothing_imports_upwards():
    found = [line for path in sources() for line in climbs(path.read_text(), name_of(path))]
    assert not found, "\n".join(found)


def test_every_exception_is_needed():
    used = {
        (Path(name_of(path)).parts[0].removesuffix(".py"), unit(dotted))
        for path in sources()
        for _, dotted in imports(path.read_text(), name_of(path))
        if dotted.split(".")[0] == "rto"
    }
    assert not set(EXCEPTIONS) - used, "exceptions that nothing uses"


def test_maths_imports_no_model_library():
    paths = {path for pattern in MATHS for path in (SRC / "rto").glob(pattern) if name_of(path) not in LOOPS}
    found = [line for path in sorted(paths) for line in imported(path, {"transformers", "accelerate", "peft"})]
    assert not found, "\n".join(found)


def test_one_module_imports_accelerate():
    paths = [path for path in sources() if name_of(path) != "models/runtime.py"]
    found = [line for path in paths for line in imported(path, {"accelerate"})]
    assert not found, "\n".join(found)


def test_no_file_is_too_long():
    paths = [*sources(), *sorted((ROOT / "tests").rglob("*.py"))]
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in paths}
    assert not {file: lines for file, lines in lengths.items() if lines > MAX_LINES}


def test_nothing_runs_foreign_code():
    found = [f"{name_of(path)}:{line}: {what}" for path in sources() for line, what in unsafe(path.read_text())]
    assert not found, "\n".join(found)


def test_help_is_quick():
    if not ((SRC / "rto" / "cli.py").exists() or (SRC / "rto" / "cli").exists()):
        pytest.skip("no command line yet")
    call = [sys.executable, "-c", "import sys; from rto.cli import main; sys.exit(main())", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        shown = subprocess.run(call, env=environment, capture_output=True, text=True, check=False)
        seconds.append(time.perf_counter() - start)
        assert shown.returncode == 0, shown.stderr
        assert "usage" in shown.stdout.lower()
    assert min(seconds) < MAX_SECONDS


# --- the rules catch what they are for ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "file"),
    [
        ("from rto.policy import ppo", "rewards/shaped.py"),
        ("from rto.data.chat import encode", "models/load.py"),  # a neighbour
        ("from rto import pipeline", "policy/train.py"),
        ("from rto import __version__", "pipeline.py"),
        ("import rto", "numerics.py"),
        ("import rto.cli as cli", "pipeline.py"),
        ("from ..preferences.dpo import dpo", "rewards/implicit.py"),
        ("from .. import evaluation", "data/__init__.py"),
        ("from . import evaluation", "batch.py"),
        ("def late():\n    from rto.policy import kl", "rollouts/score.py"),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from rto.policy import kl", "rollouts/score.py"),
    ],
)
def test_an_import_upwards_is_caught(text, file):
    assert len(climbs(text, file)) == 1


@pytest.mark.parametrize(
    ("text", "file"),
    [
        ("from rto.batch import Signals", "rewards/shaped.py"),
        ("from rto import batch", "rewards/shaped.py"),
        ("from rto.rewards.terminal import terminal", "rewards/shaped.py"),
        ("from . import terminal", "rewards/__init__.py"),
        ("from .terminal import terminal", "rewards/shaped.py"),
        ("from ..numerics import masked_mean", "rewards/shaped.py"),
        ("from rto import __version__", "cli.py"),
        ("from rto.cli import main", "__main__.py"),
        ("from rtoolkit import policy", "batch.py"),
    ],
)
def test_an_import_downwards_is_fine(text, file):
    assert climbs(text, file) == []


def test_a_unit_needs_a_floor():
    with pytest.raises(AssertionError, match="src/rto/attic has no floor"):
        climbs("import rto.batch", "attic/old.py")


@pytest.mark.parametrize(
    "text",
    [
        "load(name, trust_remote_code=True)",
        "numpy.load(file, allow_pickle=True)",
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load(file)",
        "from torch import load",
    ],
)
def test_unsafe_calls_are_caught(text):
    assert len(unsafe(text)) == 1


def test_safe_calls_pass():
    assert unsafe("load(name, trust_remote_code=model.trust_remote_code)\nsafetensors.torch.load(data)") == []


# --- shapes are checked under pytest ------------------------------------------------------------------


def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def test_a_well_shaped_container_passes():
    from rto.batch import Completions, Prompts

    prompt = Prompts(zeros(2, 3), zeros(2, 3, dtype=torch.bool))
    rows = Completions(prompt, zeros(2, 4), zeros(2, 4, dtype=torch.bool), zeros(2, dtype=torch.bool))
    assert rows.sequence()[0].shape == (2, 7)
    assert rows.lengths.tolist() == [0, 0]
    assert len(rows.rows(slice(0, 1))) == 1


@pytest.mark.parametrize(
    ("ids", "mask"),
    [
        (zeros(2, 3), zeros(2, 4, dtype=torch.bool)),  # P differs
        (zeros(2, 3), zeros(1, 3, dtype=torch.bool)),  # B differs
        (zeros(2, 3), zeros(2, 3)),  # a mask is bool
        (zeros(2, 3, dtype=torch.float32), zeros(2, 3, dtype=torch.bool)),  # ids are whole numbers
        (zeros(3), zeros(3, dtype=torch.bool)),  # no row dimension
        ([[0]], [[True]]),  # not tensors
    ],
)
def test_an_ill_shaped_container_raises(ids, mask):
    from rto.batch import Prompts

    with pytest.raises(TypeCheckError):
        Prompts(ids, mask)


@pytest.mark.parametrize(("shape", "dtype"), [((2, 5), torch.float32), ((3, 4), torch.float32), ((2, 4), torch.int64)])
def test_an_ill_shaped_signal_raises(shape, dtype):
    from rto.batch import Signals

    whole = Signals(
        mask=zeros(2, 4, dtype=torch.bool),
        finished=zeros(2, dtype=torch.bool),
        logprobs=zeros(2, 4, dtype=torch.float32),
        reference=zeros(2, 4, dtype=torch.float32),
    )
    assert whole.guide is None
    with pytest.raises(TypeCheckError):
        replace(whole, guide=zeros(*shape, dtype=dtype))
