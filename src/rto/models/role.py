"""A model in one role. Roles share a backbone by LoRA adapters, or have a model of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rto.batch import Completions
from rto.config import Lora
from rto.numerics import predicting, token_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Backbone:
    """One transformer, with any number of LoRA adapters on it (none: a full model).

    ``compute`` is the precision of the forward pass: weights that are trained stay in float32 and run under
    autocast, because bfloat16 weights round the updates of RL learning rates away.
    """

    def __init__(self, network: PreTrainedModel, source: str, lora: Lora | None, compute: torch.dtype) -> None:
        self.network = network
        self.source = source  # what an adapter names as its base model
        self.lora = lora
        self.compute = compute
        self.device = next(network.parameters()).device
        self._layers: list[Any] = []
        self._active: str | None = None
        if lora is not None:
            network.requires_grad_(False)

    @property
    def body(self) -> nn.Module:
        return self.network.base_model

    def add_adapter(self, name: str) -> None:
        """A fresh adapter, which starts as the identity."""
        from peft import inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        inject_adapter_in_model(self.adapter_config(), self.network, adapter_name=name)
        self._layers = [m for m in self.network.modules() if isinstance(m, BaseTunerLayer)]
        for _, parameter in self.adapter_parameters(name):
            parameter.data = parameter.data.float()
        self._active = "?"  # injection switches adapters: the next activation must run
        self.activate(None)

    def adapter_config(self, **more: Any):
        from peft import LoraConfig

        if self.lora is None:
            raise ValueError("this model is trained in full (no lora.r): it has no adapters")
        return LoraConfig(
            r=self.lora.r,
            lora_alpha=self.lora.alpha,  # type: ignore[arg-type]
            target_modules=self.lora.targets,
            base_model_name_or_path=self.source,
            **more,
        )

    def adapter_parameters(self, name: str) -> list[tuple[str, nn.Parameter]]:
        return [(key, p) for key, p in self.network.named_parameters() if f".{name}." in key and ".lora_" in key]

    def activate(self, adapter: str | None) -> None:
        """Let this adapter act, or none."""
        if adapter == self._active or not self._layers:
            return
        for layer in self._layers:
            layer.enable_adapters(adapter is not None)
            if adapter is not None:
                layer.set_adapter([adapter])
        self._active = adapter

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.compute == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.compute)

    def project(self, states: Float[Tensor, "N H"]) -> Float[Tensor, "N V"]:
        """States to logits, with the scalings that some families apply after the output layer."""
        head = self.network.get_output_embeddings()
        with self.autocast():
            logits = head(states.to(head.weight.dtype) if self.compute == torch.float32 else states)
        settings = self.network.config.get_text_config()
        if scale := getattr(settings, "logit_scale", None):  # Cohere
            logits = logits * scale
        if scale := getattr(settings, "logits_scaling", None):  # Granite
            logits = logits / scale
        if cap := getattr(settings, "final_logit_softcapping", None):  # Gemma 2 and 3
            logits = cap * torch.tanh(logits / cap)
        return logits


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
        own = [p for _, p in self.backbone.adapter_parameters(self.adapter)]
        return own + (list(self.head.parameters()) if self.head is not None else [])

    @contextlib.contextmanager
    def active(self) -> Iterator[Backbone]:
        """The backbone as this role sees it."""
        self.backbone.activate(self.adapter)
        network = self.backbone.network
        if network.is_gradient_checkpointing:  # transformers checkpoints in training mode only
            network.train(torch.is_grad_enabled())
        with self.backbone.autocast():
            yield self.backbone

    def hidden(self, completions: Completions) -> Float[Tensor, "B S H"]:
        ids, mask = completions.sequence()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with self.active() as backbone:
            out = backbone.body(input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=False)
        return out.last_hidden_state

    def logprobs(
        self, completions: Completions, temperature: float = 1.0
    ) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        """Log-prob of each response token and entropy of its distribution (nats, detached)."""
        states = predicting(self.hidden(completions), completions.ids.shape[1])
        return token_logprobs(states, completions.ids, completions.mask, self.backbone.project, temperature)

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
        with torch.autocast(states.device.type, enabled=False):  # rewards and values are float32
            out = self.head(states.to(self.head.weight.dtype)).squeeze(-1)
        return torch.where(completions.mask, out, 0.0)
