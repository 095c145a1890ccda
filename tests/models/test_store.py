from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rto.models.store import Checkpoint, Store

SRC = Path(__file__).resolve().parents[2] / "src"
FILES = ("manifest.json", "state.json", "tensors.safetensors")


def tensors(step: int, size: int = 8) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(step)
    return {"weight": torch.randn(size, generator=draw), "rng": draw.get_state()[:64]}


def same(found: Checkpoint | None, step: int, given: dict[str, torch.Tensor], state: dict) -> bool:
    assert found is not None and list(found.tensors) and found.tensors.keys() == given.keys()
    equal = all(
        torch.equal(found.tensors[name], t) and found.tensors[name].dtype == t.dtype for name, t in given.items()
    )
    return equal and found.step == step and found.state == state


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_comes_back(tmp_path):
    store = Store(tmp_path / "checkpoints" / "rl" / "rto")
    assert store.load() is None and not (tmp_path / "checkpoints").exists()
    given = {name: torch.arange(-3, 3).to(dtype) for name, dtype in [("a", torch.float32), ("z", torch.float64)]}
    types = (torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    given |= {str(dtype): torch.tensor([[1, 0, 3]]).to(dtype) for dtype in types}
    given |= {
        "none": torch.empty(0, 4),
        "scalar": torch.tensor(0.1),
        "nan": torch.tensor([float("nan")]).to(torch.int32),
    }
    state = {"kl": 0.1 + 0.2, "big": 2**127, "text": 'é"\ud83d', "best": None, "list": [1, True, {"x": []}]}
    store.save(12, given, state)
    assert same(store.load(), 12, given, state)
    assert names(store.folder) == ["step-00000012"] and tuple(names(store.folder / "step-00000012")) == FILES


def test_another_reader_of_the_format_agrees(tmp_path):
    given = {"bool": torch.tensor([True]), "double": torch.randn(3, dtype=torch.float64), "é": torch.randn(2, 2)}
    Store(tmp_path).save(1, given, {})
    found = load_file(tmp_path / "step-00000001" / "tensors.safetensors")
    assert all(torch.equal(found[name], t) for name, t in given.items()) and len(found) == 3


def test_no_tensors_at_all(tmp_path):
    Store(tmp_path).save(0, {}, {"seen": 3})
    found = Store(tmp_path).load()
    assert found == Checkpoint(0, {}, {"seen": 3})


def test_views_shared_memory_and_gradients(tmp_path):
    table = torch.arange(12.0).reshape(3, 4)
    given = {
        "tied": table,
        "tied too": table,
        "transposed": table.t(),
        "row": table[1],
        "expanded": torch.ones(1).expand(5),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    store = Store(tmp_path)
    store.save(1, given, {})
    found = store.load()
    assert same(found, 1, given, {}) and all(not t.requires_grad for t in found.tensors.values())
    found.tensors["tied"].zero_()  # its own memory, not the file's and not another's
    assert same(store.load(), 1, given, {}) and found.tensors["tied too"].sum() == 66


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"kl": {"mean": float("nan")}}, "state.kl.mean is nan"),
        ({"moments": [0.0, float("inf")]}, "state.moments.1 is inf"),
        ({"optimizer": {0: "x"}}, "state.optimizer has the key 0"),
        ({"betas": (0.9, 0.95)}, "state.betas is a tuple"),
        ({"rng": torch.zeros(1)}, "state.rng is a Tensor"),
    ],
)
def test_a_state_that_would_come_back_changed_is_refused(tmp_path, state, message):
    with pytest.raises(ValueError, match=message):
        Store(tmp_path / "new").save(1, {}, state)
    assert not (tmp_path / "new").exists()


def test_a_tensor_that_has_no_place_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tensor 'odd' .*sparse"):
        Store(tmp_path).save(1, {"odd": torch.eye(2).to_sparse()}, {})
    with pytest.raises(ValueError, match="keep = 0"):
        Store(tmp_path, keep=0)


def test_the_last_n_are_kept(tmp_path):
    store = Store(tmp_path / "sft", keep=2)
    for step in (1, 5, 10, 100_000_000):
        store.save(step, tensors(step), {"step": step})
    assert names(store.folder) == ["step-00000010", "step-100000000"]
    assert same(store.load(), 100_000_000, tensors(100_000_000), {"step": 100_000_000})
    (store.folder / "mine.txt").write_text("kept")
    store.clear()
    assert names(store.folder) == ["mine.txt"] and store.load() is None
    (store.folder / "mine.txt").unlink()
    store.clear()
    store.clear()
    assert names(tmp_path) == []


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = {
    "a flipped byte of the header": (lambda f: flip(f / FILES[2], 12), "SHA-256"),
    "a flipped byte of a tensor": (lambda f: flip(f / FILES[2], -1), "SHA-256"),
    "a flipped byte of the state": (lambda f: flip(f / FILES[1], -2), "SHA-256"),
    "a flipped byte of the manifest": (lambda f: flip(f / FILES[0], 0), "no manifest"),
    "cut tensors": (lambda f: cut(f / FILES[2]), "tensors.safetensors has"),
    "a cut manifest": (lambda f: cut(f / FILES[0]), "no manifest"),
    "an empty state": (lambda f: (f / FILES[1]).write_bytes(b""), "state.json has 0 bytes"),
    "a manifest of something else": (lambda f: (f / FILES[0]).write_text("[1]"), "no manifest"),
    "that of another step": (lambda f: shutil.copy(f.with_name("step-00000001") / FILES[0], f), "that of step 1"),
    "no manifest": (lambda f: (f / FILES[0]).unlink(), "manifest.json is missing"),
    "no state": (lambda f: (f / FILES[1]).unlink(), "state.json is missing"),
    "no tensors": (lambda f: (f / FILES[2]).unlink(), "tensors.safetensors is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_one_is_skipped_with_a_word(tmp_path, kind):
    harm, reason = DAMAGE[kind]
    said: list[str] = []
    store = Store(tmp_path, say=said.append)
    for step in (1, 2):
        store.save(step, tensors(step), {"step": step})
    harm(tmp_path / "step-00000002")
    assert same(store.load(), 1, tensors(1), {"step": 1})
    assert len(said) == 1 and "step-00000002 is damaged" in said[0] and reason in said[0]
    shutil.rmtree(tmp_path / "step-00000001")
    with pytest.raises(ValueError, match="every checkpoint is damaged .*step-00000002.*delete this folder") as error:
        store.load()
    assert str(tmp_path) in str(error.value)


def test_every_flipped_byte_of_a_small_checkpoint_is_seen_or_harmless(tmp_path):
    store = Store(tmp_path, say=lambda text: None)
    store.save(1, {"w": torch.ones(2)}, {"kl": 0.5})
    for name in FILES:
        path = tmp_path / "step-00000001" / name
        whole = path.read_bytes()
        for place in range(len(whole)):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
            try:
                found = store.load()
            except ValueError:
                continue
            assert name == "manifest.json" and same(found, 1, {"w": torch.ones(2)}, {"kl": 0.5})
        path.write_bytes(whole)


def test_going_on_from_an_older_one_never_loses_it(tmp_path):
    """The damaged newest one does not count among the kept, and is not taken again later."""
    said: list[str] = []
    store = Store(tmp_path, keep=2, say=said.append)
    for step in (8, 10, 12):
        store.save(step, tensors(step), {})
    flip(tmp_path / "step-00000012" / "tensors.safetensors", -1)
    assert store.load().step == 10
    store.save(11, tensors(11), {})
    assert names(tmp_path) == ["step-00000010", "step-00000011"] and "was given up" in said[-1]
    assert store.load().step == 11
    flip(tmp_path / "step-00000011" / "tensors.safetensors", -1)
    assert store.load().step == 10
    store.save(15, tensors(15), {})
    assert names(tmp_path) == ["step-00000010", "step-00000015"]


def test_a_disk_that_lies_costs_the_new_one_only(tmp_path, monkeypatch):
    """A byte is changed behind the writer's back while it flushes the file."""
    store = Store(tmp_path, keep=1)
    store.save(1, tensors(1), {})
    flush = os.fsync
    spoilt = tmp_path / ".tmp-step-00000002" / "tensors.safetensors"

    def spoil(number: int) -> None:
        flush(number)
        if spoilt.exists() and os.path.samestat(os.fstat(number), spoilt.stat()):
            flip(spoilt, -1)

    monkeypatch.setattr(os, "fsync", spoil)
    with pytest.raises(OSError, match="does not give back what was written: tensors.safetensors .*SHA-256"):
        store.save(2, tensors(2), {})
    assert names(tmp_path) == ["step-00000001"] and same(store.load(), 1, tensors(1), {})


def test_a_step_may_be_saved_again(tmp_path):
    store = Store(tmp_path, keep=1)
    for value in (1.0, 2.0):
        store.save(3, {"w": torch.tensor(value)}, {"value": value})
    assert same(store.load(), 3, {"w": torch.tensor(2.0)}, {"value": 2.0}) and names(tmp_path) == ["step-00000003"]


def test_leftovers_of_a_killed_write_go(tmp_path):
    store = Store(tmp_path)
    store.save(3, tensors(3), {})
    for leftover in (".tmp-step-00000004", ".old-step-00000003"):  # half-written; replaced, and not yet removed
        shutil.copytree(tmp_path / "step-00000003", tmp_path / leftover)
    assert store.load().step == 3 and names(tmp_path) == ["step-00000003"]
    (tmp_path / ".tmp-step-00000004").mkdir()
    store.save(4, tensors(4), {})
    assert names(tmp_path) == ["step-00000003", "step-00000004"]
    (tmp_path / "step-00000004").rename(tmp_path / ".old-step-00000004")  # killed between the two renames
    assert same(store.load(), 4, tensors(4), {})


def test_a_file_that_grows_too_large(tmp_path):
    """A real failing write in the middle of the tensors, by the limit on a file's size (EFBIG)."""
    store = Store(tmp_path)
    store.save(1, tensors(1), {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(OSError, match=r"checkpoint of step 2 needs 1,000,\d+ bytes in .* are free") as error:
            store.save(2, {"w": torch.ones(250_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG and "Step 1 is the last one there, untouched" in str(error.value)
    assert names(tmp_path) == ["step-00000001"] and same(store.load(), 1, tensors(1), {})
    store.save(2, {"w": torch.ones(250_000)}, {})
    assert store.load().step == 2


FULL = """
import errno, shutil, sys, torch
from pathlib import Path
from rto.models.store import Store
folder = Path(sys.argv[1])
store = Store(folder / "checkpoints")
big = {"w": torch.ones(60_000)}  # 240 kB on a disk of 1 MB: three fit, four do not
store.save(1, big, {})
store.save(2, big, {})
(folder / "other").write_bytes(bytes(400_000))
try:
    store.save(3, big, {})
except OSError as error:
    assert error.errno == errno.ENOSPC, error
    print(error)
else:
    sys.exit("the disk was not full")
assert sorted(path.name for path in store.folder.iterdir()) == ["step-00000001", "step-00000002"]
assert torch.equal(store.load().tensors["w"], big["w"]) and store.load().step == 2
(folder / "other").unlink()
store.save(3, big, {})
assert store.load().step == 3
"""
MOUNT = 'mount -t tmpfs -o size=1m tmpfs "$1" || exit 77; exec "$2" -c "$3" "$1"'


def test_a_full_disk(tmp_path):
    """A real one: 1 MB of tmpfs in a mount namespace of its own, where the machine lets us have one."""
    call = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", MOUNT, "sh", str(tmp_path), sys.executable]
    if shutil.which("unshare") is None or subprocess.run([*call[:4], "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    done = subprocess.run([*call, FULL], env=environment, capture_output=True, text=True, timeout=60)
    if done.returncode == 77:
        pytest.skip("no tmpfs in a namespace here")
    assert done.returncode == 0, done.stderr
    assert "No space left on device: the checkpoint of step 3 needs 240," in done.stdout
    assert "Step 2 is the last one there" in done.stdout and "Make room" in done.stdout


# One interpreter that forks the savers: importing torch 20 times would take a minute.
KILLS = """
import json, os, random, signal, sys, time, torch
from pathlib import Path
from rto.models.store import Store

def made(step):
    draw = torch.Generator().manual_seed(step)
    return {"w": torch.randn(50_000, generator=draw), "rng": draw.get_state()}, {"step": step, "kl": step / 7}

folder, chance = Path(sys.argv[1]), random.Random(0)
start, tried, inside, begun = 0, 0, 0, time.monotonic()
Store(folder).save(0, *made(0))
for tried in range(1, 21):
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        store = Store(folder, keep=1 + tried % 2)
        os.write(theirs, start.to_bytes(8, "little"))
        for step in range(start, 10**6):
            store.save(step, *made(step))  # the first one once more
            os.write(theirs, step.to_bytes(8, "little"))
    os.close(theirs)
    os.read(ours, 8)
    time.sleep(chance.uniform(0, 0.1))
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    promised = start
    while data := os.read(ours, 8):
        promised = int.from_bytes(data, "little")
    os.close(ours)
    inside += any(path.name.startswith(".") for path in folder.iterdir())
    said = []
    found = Store(folder, say=said.append).load()
    assert found is not None and found.step in (promised, promised + 1), (found, promised)
    tensors, state = made(found.step)
    assert found.state == state and all(torch.equal(found.tensors[name], t) for name, t in tensors.items())
    assert not said and all(path.name.startswith("step-") for path in folder.iterdir())
    start = found.step
seconds = round(time.monotonic() - begun, 1)
print(json.dumps({"tried": tried, "inside a write": inside, "newest": start, "seconds": seconds}))
"""


def test_twenty_kills_leave_a_whole_checkpoint_each(tmp_path):
    """Each time the newest that was promised, or the one after it, in every byte."""
    call = [sys.executable, "-c", KILLS, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert found["tried"] == 20 and found["inside a write"] >= 5 and found["newest"] > 5
