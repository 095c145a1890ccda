"""Opens the roles that a stage needs: adapters on one shared backbone, or separate full models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from rto import config as recipe
from rto.batch import Completions, Prompts
from rto.models import checkpoint
from rto.models.kernels import check_device, use_liger
from rto.models.load import (
    fresh_head,
    is_classifier,
    load_network,
    locate,
    positions_of,
    revision_of,
    same_vocabulary,
    stretches,
    tokenizer_at,
)
from rto.models.role import Backbone, Role
from rto.models.runtime import Runtime
from rto.seeds import global_torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Workshop:
    """Roles around one base model: ``base`` is the folder or name of the SFT model, which is the reference."""

    def __init__(
        self,
        model: recipe.Pretrained | recipe.Packaged | recipe.Scratch,
        base: str,
        tokenizer: PreTrainedTokenizerBase,
        runtime: Runtime,
        seed: int,
    ) -> None:
        check_device(model, runtime.device, runtime.dtype(model.dtype))
        self.model = model
        self.base = base
        self.tokenizer = tokenizer
        self.runtime = runtime
        self.seed = seed
        self._shared: Backbone | None = None
        self._others: dict[str, Workshop] = {}

    def reference(self) -> Role:
        """The frozen base: the shared backbone without adapters, or a model of its own."""
        if self.model.lora:
            return Role(self._backbone())
        return self._freeze(Role(self._open(self.base, "causal", trained=False)))

    def new_policy(self, name: str, network: PreTrainedModel | None = None) -> Role:
        """A causal LM to be trained, which starts as the base (or as ``network``, an untrained one).

        A new adapter is frozen, like every adapter, until an optimiser takes its weights.
        """
        if self.model.lora and network is None:
            return self._adapter(name, head=False)
        return Role(self._wrap(network, self.base) if network else self._open(self.base, "causal", trained=True))

    def new_scorer(self, name: str, model: recipe.Pretrained | recipe.Packaged | recipe.Scratch | None) -> Role:
        """A trainable scalar reader that starts as the base, or as another ``model`` with the same vocabulary."""
        if model is not None:
            return self._other(model).new_scorer(name, None)
        if self.model.lora:
            return self._adapter(name, head=True)
        return self._classifier(self.base, trained=True)

    def open_policy(self, folder: str, name: str) -> Role:
        """A finished policy or guide, frozen."""
        if checkpoint.is_adapter(folder):
            role = self._adapter(name, head=False)
            checkpoint.read_adapter(role, Path(folder))
            return role
        return self._freeze(Role(self._open(folder, "causal", trained=False)))

    def open_scorer(
        self, folder: str, name: str, model: recipe.Pretrained | recipe.Packaged | recipe.Scratch | None, trained: bool
    ) -> Role:
        """A finished scorer: frozen, or as the start of a critic."""
        if model is not None:
            return self._other(model).open_scorer(folder, name, None, trained)
        if checkpoint.is_adapter(folder):
            role = self._adapter(name, head=True)
            checkpoint.read_adapter(role, Path(folder))
            return role
        if not is_classifier(folder, self._trust, revision_of(folder, self.model)):
            raise ValueError(f"{folder} is no one-label sequence classifier: train a scorer on it with `rto reward`")
        role = self._classifier(folder, trained)
        return role if trained else self._freeze(role)

    def _adapter(self, name: str, head: bool) -> Role:
        backbone = self._backbone()
        with global_torch(self.seed, "adapter", name):
            backbone.add_adapter(name)
        if not head:
            return Role(backbone, name)
        return Role(backbone, name, fresh_head(backbone.network, self.seed))

    def _backbone(self) -> Backbone:
        if self._shared is None:
            self._shared = self._open(self.base, "causal", trained=False, lora=self.model.lora)
        return self._shared

    def _classifier(self, folder: str, trained: bool) -> Role:
        backbone = self._open(folder, "classifier", trained)
        return Role(backbone, head=backbone.network.score)  # type: ignore[arg-type]

    def _other(self, model: recipe.Pretrained | recipe.Packaged | recipe.Scratch) -> Workshop:
        """The workshop around a scorer's own base model, the same for every role with these settings."""
        key = model.model_dump_json()  # the same base with other settings is another model
        if key not in self._others:
            name = locate(model)
            same_vocabulary(self.tokenizer, tokenizer_at(name, model), "scorer", name)
            self._others[key] = Workshop(model, name, self.tokenizer, self.runtime, self.seed)
        return self._others[key]

    @property
    def _trust(self) -> bool:
        return isinstance(self.model, recipe.Pretrained) and self.model.trust_remote_code

    def _open(
        self, name: str, kind: Literal["causal", "classifier"], trained: bool, lora: recipe.Lora | None = None
    ) -> Backbone:
        compute = self.runtime.dtype(self.model.dtype)
        revision = revision_of(name, self.model)
        network = load_network(
            name, kind, torch.float32 if trained else compute, self.seed, self.model.attention, revision, self._trust
        )
        return self._wrap(network, name, lora)

    def _wrap(self, network: PreTrainedModel, name: str, lora: recipe.Lora | None = None) -> Backbone:
        if self.model.kernels == "liger":
            use_liger(network)
        network = network.to(self.runtime.device)  # type: ignore[arg-type]
        model = self.model
        keys = model.gradient_checkpointing, model.packing, model.offload_activations
        return Backbone(network, name, lora, self.runtime.dtype(model.dtype), *keys)

    @staticmethod
    def _freeze(role: Role) -> Role:
        role.backbone.network.requires_grad_(False)
        return role


def check_positions(backbone: Backbone, longest: int) -> None:
    """Raises ValueError when a prompt and its answer, ``longest`` tokens together, are more than the model reads."""
    settings = backbone.network.config
    positions = positions_of(settings)
    if positions is not None and longest > positions:
        name = backbone.source or "the new model"
        why = " before they stretch, for every row of a batch at once" if stretches(settings) else ""
        raise ValueError(
            f"a prompt and its answer can be {longest} tokens together (data.max_prompt and data.max_response bound "
            f"them), but {name} has {positions} positions{why}: lower one of the two, or choose a model with more"
        )


@torch.no_grad()
def verify(role: Role, end: int) -> float:
    """Compare our token log-probs with the model's own logits; the largest difference (nats).

    Ours come from a batch, once as in training and once as in sampling: padded on the left and token by token with
    a cache whose rows are repeated, leave and change places. With gradient checkpointing they are made in training mode
    too. The model's own come from each row alone. So this also finds families to which padding is not nothing, those
    that keep no ordinary cache, and those that draw random numbers in training.

    Raises:
        ValueError: they differ, or the model does not know ``end``: nothing may be trained on this model.
    """
    from transformers import DynamicCache

    backbone = role.activate()
    vocabulary = backbone.network.get_output_embeddings().weight.shape[0]
    if end >= vocabulary:
        raise ValueError(f"{backbone.source} has {vocabulary} words, but the tokenizer ends a response with id {end}")
    ids = (vocabulary // 2 + torch.arange(12, device=backbone.device)).reshape(2, 6) % vocabulary  # ordinary words
    ids[:, -1] = end
    mask = torch.ones(2, 6, dtype=torch.bool, device=backbone.device)
    mask[1, :2] = False
    answers = torch.ones(2, 3, dtype=torch.bool, device=backbone.device)
    rows = Completions(Prompts(ids[:, :3], mask[:, :3]), ids[:, 3:], answers, answers[:, 0])
    found = {"hidden states": role.logprobs(rows)[0]}
    if backbone.checkpointing:
        with torch.enable_grad():
            found["passes in training mode"] = role.logprobs(rows)[0].detach()
        role.activate()

    cache: Any = DynamicCache(config=backbone.network.config)
    states = [backbone.states(ids[:, :3], mask[:, :3], cache)[:, -1]]
    twice = torch.tensor([1, 0, 1, 0], device=backbone.device)  # each prompt has two answers
    cache.reorder_cache(twice)
    states.append(backbone.states(ids[twice, 3:4], mask[twice, :4], cache)[[1, 0], -1])
    cache.reorder_cache(twice.new_tensor([3, 0]))  # rows 0 and 1 again: two of the four leave
    states.append(backbone.states(ids[:, 4:5], mask[:, :5], cache)[:, -1])
    by_step = torch.stack([backbone.project(s).float().log_softmax(-1) for s in states], 1)
    found["sampling steps"] = by_step.gather(-1, ids[:, 3:, None]).squeeze(-1)

    theirs = []
    for row, start in ((0, 0), (1, 2)):
        with backbone.autocast():
            logits = backbone.network(input_ids=ids[row : row + 1, start:]).logits[0, -4:-1]
        theirs.append(logits.float().log_softmax(-1).gather(-1, ids[row, 3:, None]).squeeze(-1))
    gaps = {what: (ours - torch.stack(theirs)).abs().max().item() for what, ours in found.items()}
    for what, gap in gaps.items():
        if not gap < (1e-2 if backbone.compute == torch.float32 else 0.2):
            remedy = "rto does not know how this family works: choose another"
            if what == "passes in training mode":
                remedy = "Gradient checkpointing needs it, and this family is random in it: "
                remedy += "set model.gradient_checkpointing = false"
            raise ValueError(
                f"{backbone.source} ({type(backbone.network).__name__}): log-probs from {what} differ from the model's "
                f"own by {gap:.3g} nats. {remedy}"
            )
    return max(gaps.values())
