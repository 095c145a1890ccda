"""A model in one role. Roles share a backbone by LoRA adapters, or have a model of their own."""

from __future__ import annotations

import contextlib
import inspect
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rto.batch import Completions, Siblings
from rto.config import Lora
from rto.input_layer import sum_in_place
from rto.models.fused import fuse
from rto.models.kept import Kept
from rto.models.kernels import Offloaded
from rto.models.linear import is_linear, use_products
from rto.models.packing import Packed, keeps_apart, pack
from rto.models.siblings import Forked, fork, reads_forked
from rto.numerics import predicting, token_kl, token_logprobs

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

# Of logits, in a model's settings: Cohere, Granite, Gemma 2 and 3
_SCALINGS = ("logit_scale", "logits_scaling", "final_logit_softcapping")


class Backbone:
    """One transformer, with any number of LoRA adapters on it (none: a full model).

    ``compute`` is the precision of the forward pass: weights that are trained stay in float32 and run under
    autocast, because bfloat16 weights round the updates of RL learning rates away.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        source: str,
        lora: Lora | None,
        compute: torch.dtype,
        checkpointing: bool = False,
        packing: bool = False,
        offload: bool = False,
    ) -> None:
        self.network = network
        self.source = source  # what an adapter names as its base model
        self.lora = lora
        self.compute = compute
        self.checkpointing = checkpointing
        self.packing = packing
        self.offload = offload
        self.device = next(network.parameters()).device
        self._takes_positions = "position_ids" in inspect.signature(self.body.forward).parameters
        self._layers: list[Any] = []
        self._adapter_weights: list[nn.Parameter] = []
        self._targets: list[str] | None = None
        self._active: str | None = None
        self._forks: bool | None = None
        self._packs: bool | None = None
        if lora is not None:
            network.requires_grad_(False)
        else:
            sum_in_place(network.get_input_embeddings())
        if self.device.type == "cpu":
            fuse(network)
            use_products(network)
        if checkpointing:
            # transformers 5.23 renamed it
            name = "activation" if hasattr(network, "activation_checkpointing_enable") else "gradient"
            getattr(network, f"{name}_checkpointing_enable")({"use_reentrant": False, "context_fn": self._recompute})

    @property
    def body(self) -> nn.Module:
        return self.network.base_model

    @property
    def _attention(self) -> str:
        return self.network.config.get_text_config()._attn_implementation

    # --- adapters ---------------------------------------------------------------------------------------

    def add_adapter(self, name: str) -> None:
        """A fresh adapter, frozen, which starts as the identity.

        Raises:
            ValueError: the model is trained in full.
        """
        from peft import inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        from rto.models.lora import add_in_place

        trained = {id(p) for p in self._adapter_weights if p.requires_grad}
        settings = self.adapter_config()
        with warnings.catch_warnings():  # of merging, which here gives each its own weights
            warnings.filterwarnings("ignore", message=".*a tied layer is part of the adapter")
            inject_adapter_in_model(settings, self.network, adapter_name=name)
        del self.network.peft_config  # peft's mark: it would be saved, and warned of at the next adapter
        self._targets = sorted(settings.target_modules)  # "all-linear" has become the layers' names
        self._layers = [m for m in self.network.modules() if isinstance(m, BaseTunerLayer)]
        add_in_place(self._layers, autocast=self.compute != torch.float32)
        for parameter in self.adapter_parameters(name).values():
            parameter.data = parameter.data.float()
        self._adapter_weights = [p for key, p in self.network.named_parameters() if ".lora_" in key]
        for parameter in self._adapter_weights:
            parameter.requires_grad_(id(parameter) in trained)
        self._active = name  # injection switches the new one on
        self.activate(None)

    def adapter_config(self, **more: Any):
        from peft import LoraConfig

        if self.lora is None:
            raise ValueError("this model is trained in full: give [model] a lora.r to put adapters on it")
        return LoraConfig(
            r=self.lora.r,
            lora_alpha=self.lora.alpha,  # type: ignore[arg-type]
            target_modules=self._targets or self.lora.targets,
            base_model_name_or_path=self.source,
            **more,
        )

    def adapter_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's weights, by their names without the adapter's."""
        own = re.compile(rf"(\.lora_\w+)\.{re.escape(name)}(?=\.|$)")
        return {own.sub(r"\1", key): p for key, p in self.network.named_parameters() if own.search(key)}

    def activate(self, adapter: str | None) -> None:
        """Let this adapter act, or none. Which weights require gradients stays as it is: peft's switches change
        that too, and a loss that was computed before the switch would lose its gradient."""
        if adapter == self._active:
            return
        flags = [(p, p.requires_grad) for p in self._adapter_weights]
        for layer in self._layers:
            layer.enable_adapters(adapter is not None)
            if adapter is not None:
                layer.set_adapter([adapter])
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        self._active = adapter

    def merge_adapter(self, name: str) -> None:
        """Fold an adapter into the weights and remove every adapter."""
        self.activate(name)
        self._untie()
        for key, layer in [(key, m) for key, m in self.network.named_modules() if m in self._layers]:
            layer.merge(adapter_names=[name])
            self.network.set_submodule(key, layer.get_base_layer())
        self._layers, self._adapter_weights, self._active = [], [], None

    def _untie(self) -> None:
        """Give an adapted layer weights of its own where it shares them, as an output layer does with the embedding."""
        network = self.network
        owners = Counter(id(p) for module in network.modules() for p in module._parameters.values() if p is not None)
        for layer in self._layers:
            base = layer.get_base_layer()
            if owners[id(base.weight)] > 1:
                base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
                network.config.tie_word_embeddings = network.config.get_text_config().tie_word_embeddings = False

    def _recompute(self) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        """For gradient checkpointing: the backward pass runs a layer again with the adapter of its forward pass."""
        return contextlib.nullcontext(), self._acting(self._active)

    @contextlib.contextmanager
    def _acting(self, adapter: str | None) -> Iterator[None]:
        now = self._active
        self.activate(adapter)
        try:
            yield
        finally:
            self.activate(now)

    # --- passes -----------------------------------------------------------------------------------------

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.compute == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.compute)

    @contextlib.contextmanager
    def _passing(self) -> Iterator[None]:
        keeping: contextlib.AbstractContextManager = contextlib.nullcontext()
        if torch.is_grad_enabled() and (self.offload or self.device.type == "cpu"):
            keeping = (Offloaded if self.offload else Kept)(self.network)
        with self.autocast(), keeping:
            yield

    def states(
        self, ids: Int[Tensor, "B N"], mask: Bool[Tensor, "B S"] | None = None, cache: Cache | None = None
    ) -> Float[Tensor, "B N H"]:
        """Last hidden states of ``ids``, which are the last N of the S positions that ``mask`` tells of.

        Without a mask, padding may stand on the right only: no causal model lets it act on what is before it.
        ``cache`` holds the earlier positions and takes these in.
        """
        given: dict[str, Any] = {"past_key_values": cache, "use_cache": True} if cache is not None else {}
        if mask is not None:
            given["attention_mask"] = mask.long()
            if self._takes_positions:  # they count real tokens, so that padding on the left changes nothing
                given["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with self._passing():
            return self.body(input_ids=ids, **{"use_cache": False, **given}).last_hidden_state

    def forked(self, forked: Forked) -> Float[Tensor, "B N H"]:
        """Last hidden states of rows that fork into two answers."""
        attends: Tensor = forked.attends
        if self.device.type == "cpu" or self._attention == "eager":  # it is added to the scores: made once, not a layer
            smallest = torch.finfo(self.compute).min
            attends = torch.zeros_like(attends, dtype=self.compute).masked_fill(~attends, smallest)
        with self._passing():
            given = {"attention_mask": attends, "position_ids": forked.positions, "use_cache": False}
            return self.body(input_ids=forked.ids, **given).last_hidden_state

    @property
    def forks(self) -> bool:
        """Whether :meth:`forked` says what reading each answer behind its own prompt says: tried once."""
        if self._forks is None:
            settings = self.network.config.get_text_config()
            kinds = set(getattr(settings, "layer_types", None) or ["full_attention"])
            whole = kinds == {"full_attention"} and not getattr(settings, "sliding_window", None)
            known = self._attention in ("sdpa", "eager") and self._takes_positions
            self._forks = bool(whole and known and not self.packing) and reads_forked(Role(self))
        return self._forks

    def packed(self, packed: Packed) -> Float[Tensor, "N H"]:
        """Last hidden states of sequences in one row."""
        given: dict[str, Any] = {"position_ids": packed.positions, "use_cache": False}
        if self._attention.startswith("flash"):
            # It would find these by itself, but wait for the GPU in every layer.
            given |= {"cu_seq_lens_q": packed.ends, "cu_seq_lens_k": packed.ends}
            given |= {"max_length_q": packed.longest, "max_length_k": packed.longest}
        with self._passing():
            return self.body(input_ids=packed.ids, **given).last_hidden_state[0]

    @property
    def packs(self) -> bool:
        """Whether rows are to be packed, if so after :meth:`packed` was tried once.

        Raises:
            ValueError: this family lets packed sequences see each other, or does not count their positions anew.
        """
        if self.packing and self._packs is None:
            self._packs = self._takes_positions and keeps_apart(Role(self))
        if self.packing and not self._packs:
            family = f"{type(self.network).__name__}, {self._attention} attention"
            raise ValueError(
                f"model.packing = true: {self.source} ({family}) does not keep packed sequences apart: set it to false"
            )
        return self.packing

    def project(self, states: Float[Tensor, "N H"]) -> Float[Tensor, "N V"]:
        """States to logits, with the scalings that some families apply after the output layer."""
        with self.autocast():
            logits = self.network.get_output_embeddings()(states)
        settings = self.network.config.get_text_config()
        if scale := getattr(settings, "logit_scale", None):  # Cohere
            logits = logits * scale
        if scale := getattr(settings, "logits_scaling", None):  # Granite
            logits = logits / scale
        if cap := getattr(settings, "final_logit_softcapping", None):  # Gemma 2 and 3
            logits = cap * torch.tanh(logits / cap)
        return logits

    @property
    def output_weight(self) -> Tensor | None:
        """The output layer's weights, where logits are states times these and nothing else."""
        layer, settings = self.network.get_output_embeddings(), self.network.config.get_text_config()
        scaled = any(getattr(settings, name, None) for name in _SCALINGS)
        return layer.weight if is_linear(layer) and layer.bias is None and not scaled else None


class Role:
    """Policy, reference, guide, scorer or critic: a backbone, perhaps an adapter, perhaps a scalar head.

    A role with a head reads scalars; one without reads token log-probs.
    """

    def __init__(self, backbone: Backbone, adapter: str | None = None, head: nn.Linear | None = None) -> None:
        self.backbone = backbone
        self.adapter = adapter
        self.head = head

    def parameters(self) -> list[nn.Parameter]:
        """What training this role changes."""
        if self.adapter is None:
            return list(self.backbone.network.parameters())
        own = list(self.backbone.adapter_parameters(self.adapter).values())
        return own + (list(self.head.parameters()) if self.head is not None else [])

    def activate(self) -> Backbone:
        """The backbone as this role sees it, until another role's turn."""
        self.backbone.activate(self.adapter)
        if self.backbone.checkpointing:  # transformers checkpoints in training mode only
            self.backbone.network.train(torch.is_grad_enabled())
        return self.backbone

    def hidden(self, completions: Completions) -> Float[Tensor, "B S H"]:
        """Last hidden states; on padding, those of a neighbour.

        Rows are packed where the recipe asks for it. Otherwise siblings are read as forked rows where the model can do
        that, and everything else as padded rows. What comes out is the same.
        """
        if self.backbone.packs:
            return self.packed(completions)
        if isinstance(completions, Siblings) and self.backbone.forks:
            return self.fork(completions)
        return self.padded(completions)

    def padded(self, completions: Completions) -> Float[Tensor, "B S H"]:
        """:meth:`hidden` from rows whose padding has been moved to the right: they are as wide as the longest row, not
        as the longest prompt and the longest response together, and need no attention mask."""
        ids, mask = completions.sequence()
        moved = ids.gather(1, (~mask).long().argsort(dim=-1, stable=True))[:, : int(mask.sum(-1).max())]
        states = self.activate().states(moved)
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        return states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))

    def packed(self, completions: Completions) -> Float[Tensor, "B S H"]:
        """:meth:`hidden` from one row of all the tokens that are no padding."""
        packed = pack(completions)
        return self.activate().packed(packed)[packed.places]

    def fork(self, siblings: Siblings) -> Float[Tensor, "B S H"]:
        """:meth:`hidden` from rows in which both answers stand behind one prompt."""
        forked = fork(siblings)
        states = self.activate().forked(forked)
        places = forked.places[..., None].expand(-1, -1, states.shape[-1])
        return torch.cat([half.gather(1, p) for half, p in zip((states, states), places.chunk(2), strict=True)])

    def logprobs(
        self, completions: Completions, temperature: float = 1.0, entropy: bool = True
    ) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        """Log-prob of each response token and entropy of its distribution (nats, detached; for ``entropy`` False it
        may be zero)."""
        states = predicting(self.hidden(completions), completions.ids.shape[1])
        return self.logprobs_from(states, completions, temperature, entropy)

    def logprobs_from(
        self, states: Float[Tensor, "B T H"], c: Completions, temperature: float = 1.0, entropy: bool = True
    ) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        """:meth:`logprobs` from the states that predict the response tokens."""
        shared = self.backbone
        if shared.compute != torch.float32:
            states = states.to(shared.compute)
        weight = shared.output_weight
        return token_logprobs(
            states, c.ids, c.mask, self._project if weight is None else weight, temperature, entropy=entropy
        )

    def logprobs_and_kl(
        self, completions: Completions, reference: Role, reference_states: Float[Tensor, "B T H"]
    ) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        """Log-prob of each response token, and KL(reference || this role) of its distribution, from one pass.

        ``reference_states`` are the reference's that predict the response tokens, without gradient. They are given,
        not made here, so that the reference's pass comes first, while no activations of this role are held.
        """
        states = predicting(self.hidden(completions), completions.ids.shape[1])
        logprobs, _ = self.logprobs_from(states, completions, entropy=False)
        return logprobs, token_kl(states, reference_states, completions.mask, self._project, reference._project)

    def _project(self, states: Float[Tensor, "N H"]) -> Float[Tensor, "N V"]:
        """States to logits as this role sees them, whichever role's turn it is."""
        shared = self.backbone
        if not any(layer is shared.network.get_output_embeddings() for layer in shared._layers):
            return shared.project(states)  # all roles share the output layer, unless adapters target it
        with shared._acting(self.adapter):
            return shared.project(states)

    def values(self, completions: Completions) -> Float[Tensor, "B T"]:
        """The head *before* each response token: the value of the state in which the token is chosen."""
        return self._read(predicting(self.hidden(completions), completions.ids.shape[1]), completions)

    def token_scores(self, completions: Completions) -> Float[Tensor, "B T"]:
        """The head *at* each response token: the reward of the text up to and with it."""
        return self._read(self.hidden(completions)[:, -completions.ids.shape[1] :], completions)

    def scores(self, completions: Completions) -> Float[Tensor, " B"]:
        """The head at the last response token: the sentence reward."""
        last = completions.lengths - 1
        return self.token_scores(completions).gather(1, last.clamp(min=0)[:, None]).squeeze(1)

    def _read(self, states: Float[Tensor, "B T H"], completions: Completions) -> Float[Tensor, "B T"]:
        assert self.head is not None, "this role has no scalar head"
        return torch.where(completions.mask, read_head(self.head, states), 0.0)


def read_head(head: nn.Linear, states: Float[Tensor, "*rows H"]) -> Float[Tensor, "*rows"]:
    """The scalar of each state. Rewards and values are float32."""
    bias = None if head.bias is None else head.bias.float()
    with torch.autocast(states.device.type, enabled=False):
        return nn.functional.linear(states.float(), head.weight.float(), bias).squeeze(-1)
