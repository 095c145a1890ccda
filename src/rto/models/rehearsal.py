"""A rehearsal: the code of a run on tensors that have a shape and no numbers, to see how much memory it will hold.

Ghost tensors (PyTorch's fake tensors) go through models, losses, autograd and optimisers as real ones do, on the device
that they pretend to be on. Whatever stays alive is therefore what would stay alive: nothing is estimated by formula.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rto import config as recipe
from rto.models.load import check_family, locate, revision_of, scratch_network, without_dropout
from rto.models.mapped import GHOSTS
from rto.models.role import Backbone, Role
from rto.models.runtime import MAPPED, ask_heap
from rto.models.workshop import Workshop
from rto.room import Room

Label = tuple[str, str]  # role, and what its bytes are: "weights", "gradients", ...


class Glibc:
    """The C library's heap, asked for the same blocks at the same moments, which are never written to and so take no
    memory. Large blocks stay in it (:mod:`rto.models.runtime`), and it grows by the holes that nothing fits into."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None)
        self._take, self._give = libc.posix_memalign, libc.free
        self._take.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]
        self._give.argtypes = [ctypes.c_void_p]
        self._mapped: dict[int, int] = {}  # blocks of the system's own, by place
        self._apart = 0  # the last place of a block that is in no heap, below zero
        self._most = 0  # bytes of heap and large blocks at once

    def take(self, size: int, apart: bool = False) -> int | None:
        """A block aligned as PyTorch aligns its tensors; None where there is no room. ``apart``: not in the heap."""
        if apart:
            self._apart -= 1
            self._mapped[self._apart] = size
            return self._apart
        place = ctypes.c_void_p()
        if self._take(ctypes.byref(place), 64, max(1, size)) != 0:
            return None
        if size >= MAPPED and place.value is not None:
            self._mapped[place.value] = size
        return place.value

    def give(self, place: int | None) -> None:
        if place in self._mapped:
            self.size()  # the heap only grows, so the most there is at once stands before a large block goes
            del self._mapped[place]
        if place is not None and place >= 0:
            self._give(place)

    def size(self) -> int:
        """The most bytes that the heap, which only grows, and the large blocks have had from the system at once."""
        heap = ask_heap()
        assert heap is not None
        self._most = max(self._most, heap.size + sum(self._mapped.values()))
        return self._most


def heap_of(device: torch.device) -> Glibc | None:
    """The heap that tensors on this device come from, where we know how it grows."""
    return Glibc() if device.type == "cpu" and ask_heap() is not None else None


class Tally(TorchDispatchMode):
    """Counts the bytes of all ghost tensors that are alive, by label, and keeps the count at their largest.

    ``label`` is given to what comes into being. A tensor whose last dimension is ``vocabulary`` is logits. What is
    read from a ghost is 1, or true but for ``any``: losses and norms are finite, and nothing is not.
    """

    def __init__(self, vocabulary: int, heap: Glibc | None = None) -> None:
        super().__init__()
        self.vocabulary, self.heap = vocabulary, heap
        self.device: str | None = None  # count what is on it, and not what waits elsewhere; None: all
        self.label: Label = ("pass", "activations")
        self.live: Counter[Label] = Counter()
        self.total = self.peak = 0
        self.mapped = self.mapped_at_peak = 0  # bytes from files
        self.at_peak: dict[Label, int] = {}
        self._away: set[int] = set()  # from files, and not in memory now
        self._known: dict[int, tuple[int, Label, int | None, bool]] = {}  # size, label, place, mapped

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            if args[0].dtype == torch.bool:
                return not getattr(args[0], "of_any", False)
            return 1.0 if args[0].dtype.is_floating_point else 1
        if func.overloadpacket is torch.ops.aten.index:  # a mask with numbers says how many rows it chooses
            args = (args[0], [where for index in args[1] for where in _places(index)], *args[2:])
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.any and isinstance(out, FakeTensor):
            out.of_any = True  # type: ignore[attr-defined]
        for part in tree_leaves(out):
            if isinstance(part, FakeTensor) and self.device in (None, part.device.type):
                logits = part.dim() > 1 and part.shape[-1] == self.vocabulary
                self.count(part, (self.label[0], "logits") if logits else self.label)
        return out

    def count(self, tensor: Tensor, label: Label, mapped: bool = False) -> None:
        """Take a tensor into the count unless its memory is there already. ``mapped``: from a file, not from the
        heap."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        place = self.heap.take(size, Room.making) if self.heap is not None and not mapped else None
        self._known[key] = (size, label, place, mapped)
        self._add(size, label, mapped)
        weakref.finalize(storage, self._gone, key).atexit = False

    def leave(self, weights: Iterable[Tensor]) -> None:
        """Weights from a file are not in memory until they :meth:`come`."""
        for key in (weight.untyped_storage()._cdata for weight in weights):
            if key not in self._away:
                size, label, _, _ = self._known[key]
                self._add(-size, label, mapped=True)
                self._away.add(key)

    def come(self, weights: Iterable[Tensor]) -> None:
        """They are read."""
        for key in (weight.untyped_storage()._cdata for weight in weights):
            if key in self._away:
                size, label, _, _ = self._known[key]
                self._away.remove(key)
                self._add(size, label, mapped=True)

    def _add(self, size: int, label: Label, mapped: bool) -> None:
        self.total += size
        self.mapped += size if mapped else 0
        self.live[label] += size
        if self.total > self.peak:
            self.peak, self.mapped_at_peak, self.at_peak = self.total, self.mapped, dict(self.live)

    def relabel(self, tensor: Tensor, label: Label) -> None:
        key = tensor.untyped_storage()._cdata
        if key in self._known:
            size, before, place, mapped = self._known[key]
            self._known[key] = (size, label, place, mapped)
            self.live[before] -= size
            self.live[label] += size

    def _gone(self, key: int) -> None:
        size, label, place, mapped = self._known.pop(key)
        if key in self._away:
            self._away.remove(key)
        else:
            self._add(-size, label, mapped)
        if self.heap is not None:
            self.heap.give(place)


def _places(index: Tensor | None) -> tuple[Tensor | None, ...]:
    """A mask as the numbers of its true cells, one tensor a dimension."""
    masked = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
    return index.nonzero(as_tuple=True) if masked and index is not None else (index,)


class GhostWorkshop(Workshop):
    """Opens the roles of a stage as ghosts: no file of weights is read. A folder of a finished role may be missing; it
    is what the recipe would put there."""

    tally: Tally
    fresh = False  # the next network is made in memory and not read from a file

    def begin(self, tally: Tally) -> GhostWorkshop:
        self.tally, self.mode, self.role = tally, FakeTensorMode(allow_non_fake_inputs=True), "policy"
        tally.device = self.runtime.device.type
        return self

    def vocabulary(self) -> int:
        """Words of the model's output layer."""
        with torch.device("meta"):
            return int(self._network(self.base, "causal", torch.float32).get_output_embeddings().weight.shape[0])

    def _other(self, model: recipe.Pretrained | recipe.Packaged | recipe.Scratch) -> GhostWorkshop:
        key = model.model_dump_json()
        if key not in self._others:
            other = GhostWorkshop(model, locate(model), self.tokenizer, self.runtime, self.seed)
            self._others[key] = other.begin(self.tally)
        found = self._others[key]
        assert isinstance(found, GhostWorkshop)
        return found

    def open(self, role: str, kind: Literal["policy", "scorer"], trained: bool, folder: str | None = None) -> Role:
        """A causal LM or a scorer, under the name of its role. ``folder``: a finished full model."""
        self.role = role
        full = self.model.lora is None or folder is not None
        if kind == "scorer":
            if not full:
                return self._adapter(role, head=True)
            opened = self._classifier(folder or self.base, trained)
        elif not full:
            return self._adapter(role, head=False)
        else:
            opened = Role(self._open(folder or self.base, "causal", trained))
        return opened if trained else self._freeze(opened)

    def reference(self) -> Role:
        self.role = "reference"
        return super().reference()

    def _adapter(self, name: str, head: bool) -> Role:
        role = super()._adapter(name, head)
        for module in (role.backbone.network, *([role.head] if role.head is not None else [])):
            self._ghost(module, "adapters", mapped=False)
        return role

    def _backbone(self) -> Backbone:
        if self._shared is None:
            self.role, role = "backbone", self.role
            super()._backbone()
            self.role = role
        assert self._shared is not None
        return self._shared

    def _open(
        self, name: str, kind: Literal["causal", "classifier"], trained: bool, lora: recipe.Lora | None = None
    ) -> Backbone:
        dtype = torch.float32 if trained else self.runtime.dtype(self.model.dtype)
        with torch.device("meta"):
            network = self._network(name, kind, dtype)
        stored = getattr(network.config, "dtype", None) or torch.float32
        mapped = not self.fresh and stored == dtype and self.runtime.device.type == "cpu"
        self._ghost(network, "weights", mapped)
        weights, tally = list(network.parameters()), self.tally
        backbone = self._wrap(network, name, lora)
        if mapped and not trained:
            GHOSTS[backbone.network] = lambda: tally.leave(weights)
            backbone.body.register_forward_pre_hook(lambda *_: tally.come(weights))
        return backbone

    def _network(self, name: str, kind: Literal["causal", "classifier"], dtype: torch.dtype) -> Any:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

        if not name:
            assert isinstance(self.model, recipe.Scratch)
            scratch = scratch_network(self.model, self.tokenizer, self.tokenizer.eos_token_id or 0, self.seed)
            if kind == "causal":
                return scratch.to(dtype)  # type: ignore[arg-type]
            settings = scratch.config
        else:
            settings = AutoConfig.from_pretrained(
                name, trust_remote_code=self._trust, revision=revision_of(name, self.model)
            )
            check_family(name, settings, kind, self.model.attention, self._trust)
        factory: Any = AutoModelForCausalLM
        if kind == "classifier":
            factory, settings.num_labels = AutoModelForSequenceClassification, 1
        options = {"dtype": dtype, "attn_implementation": self.model.attention, "trust_remote_code": self._trust}
        return without_dropout(factory.from_config(settings, **options))

    def _wrap(self, network: Any, name: str, lora: recipe.Lora | None = None) -> Backbone:
        compute = self.runtime.dtype(self.model.dtype)  # kernels and offloading work on numbers only
        return Backbone(network, name, lora, compute, self.model.gradient_checkpointing, self.model.packing)

    def _ghost(self, module: nn.Module, kind: str, mapped: bool) -> None:
        """Every tensor of the module that is not one yet becomes a ghost on the run's device; tied ones stay tied."""
        made: dict[int, Tensor] = {}
        for part in module.modules():
            for table in (part._parameters, part._buffers):
                for key, tensor in table.items():
                    if tensor is None or isinstance(tensor, FakeTensor):
                        continue
                    if id(tensor) not in made:
                        made[id(tensor)] = self._like(tensor, (self.role, kind), mapped)
                    table[key] = made[id(tensor)]  # type: ignore[assignment]

    def _like(self, tensor: Tensor, label: Label, mapped: bool) -> Tensor:
        with self.mode:
            ghost = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.runtime.device)
        self.tally.count(ghost, label, mapped)
        if not isinstance(tensor, nn.Parameter):
            return ghost
        return nn.Parameter(ghost, requires_grad=tensor.requires_grad)


def watch_gradients(tally: Tally, parameters: Iterable[nn.Parameter], role: str) -> None:
    """Gradients are counted as such as soon as they are whole. Autograd is not told of those of the vocabulary's
    layers (:func:`rto.output_layer.own_gradient`): they are counted with the next."""
    parameters = list(parameters)
    vocabulary = [p for p in parameters if p.dim() == 2 and p.shape[0] == tally.vocabulary]

    def whole(parameter: nn.Parameter) -> None:
        for p in (parameter, *vocabulary):
            if p.grad is not None:
                tally.relabel(p.grad, (role, "gradients"))

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(whole)


def base_of(model: recipe.Pretrained | recipe.Packaged | recipe.Scratch) -> str:
    """The name that :class:`GhostWorkshop` takes as its base; empty for a model from scratch."""
    return "" if isinstance(model, recipe.Scratch) else locate(model)
