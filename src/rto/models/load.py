"""Models and tokenizers from the hub, from a folder, from a Python package, or from scratch."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from rto import config as recipe
from rto.seeds import derive, global_torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# What modules and settings call their dropouts, and the noise of routers. PhiMoE's router_jitter_noise is none of them:
# it says which experts are near enough, in evaluation too.
_RANDOM = [
    *("dropout", "attention_dropout", "attn_dropout", "attn_dropout_p", "attn_pdrop", "activation_dropout"),
    *("embedding_dropout", "hidden_dropout", "residual_dropout", "resid_pdrop", "layerdrop"),
    *("jitter_noise", "input_jitter_noise", "moe_jitter_eps"),
]
_STRETCHED = ("dynamic", "longrope")


def cache_folder() -> Path:
    """Where dequantised models are kept: $RTO_CACHE, or ~/.cache/rto."""
    return Path(os.environ.get("RTO_CACHE", "~/.cache/rto")).expanduser()


def locate(model: recipe.Pretrained | recipe.Packaged | recipe.Scratch) -> str:
    """The folder or hub name that ``from_pretrained`` reads; a packaged model is dequantised on first use."""
    if isinstance(model, recipe.Pretrained):
        return model.name
    if isinstance(model, recipe.Packaged):
        return str(dequantise(model.package, model.file))
    raise ValueError("a model of type 'scratch' has no files: train it with the sft stage first")


def dequantise(package: str, file: str) -> Path:
    """A GGUF file inside an installed package as an ordinary float32 folder, written once for what the file holds.

    Raises:
        ValueError: the package or the file in it is missing.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"model.package = {package!r} is not installed: run `make smollm`, or name a model.name")
    source = Path(next(iter(spec.submodule_search_locations))) / file
    if not source.exists():
        have = ", ".join(sorted(path.name for path in source.parent.glob("*.gguf"))) or "no GGUF file"
        raise ValueError(f"model.file = {file!r} is not in package {package!r}, which has {have}")
    with source.open("rb") as opened:
        digest = hashlib.sha1(usedforsecurity=False)  # it only tells files apart, and is quick
        while block := opened.read(2**22):
            digest.update(block)
    target = cache_folder() / "models" / f"{package}-{source.stem}-{digest.hexdigest()[:12]}"
    if not (target / "config.json").exists():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
        network = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
        for mark in ("quantization_config", "_pre_quantization_dtype"):  # it is no longer quantised
            if hasattr(network.config, mark):
                delattr(network.config, mark)
        network.__dict__ |= {"hf_quantizer": None, "is_quantized": False}
        network.save_pretrained(partial)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(partial)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.rename(target)
        except OSError:  # another process was faster
            if not (target / "config.json").exists():
                raise
            shutil.rmtree(partial)
    return target


def load_tokenizer(name: str, trust_remote_code: bool = False, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, revision=revision)


def revision_of(name: str, model: recipe.Pretrained | recipe.Packaged | recipe.Scratch) -> str | None:
    """The revision of a hub model that is opened with ``model``: pinned where it is that one."""
    return model.revision if isinstance(model, recipe.Pretrained) and name == model.name else None


def opened_as(
    name: str, model: recipe.Pretrained | recipe.Packaged | recipe.Scratch, trust: bool | None = None
) -> recipe.Pretrained:
    """The settings of a finished model of another family than ``model``: its precision and attention, its trust unless
    ``trust`` is given, and its revision where it is that one."""
    if trust is None:
        trust = isinstance(model, recipe.Pretrained) and model.trust_remote_code
    return recipe.Pretrained(
        name=name,
        revision=revision_of(name, model),
        trust_remote_code=trust,
        dtype=model.dtype,
        attention=model.attention,
    )


def tokenizer_at(name: str, model: recipe.Pretrained | recipe.Packaged | recipe.Scratch) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub model that is opened with ``model``: the trust in that one holds, and its
    revision where it is that one.

    Raises:
        ValueError: there is none, or it may not be read.
    """
    trust = isinstance(model, recipe.Pretrained) and model.trust_remote_code
    try:
        return load_tokenizer(name, trust, revision_of(name, model))
    except (OSError, ValueError) as error:
        told = " ".join(str(error).split())
        raise ValueError(f"{name}: its tokenizer, which must be beside it, cannot be read ({told})") from error


def load_network(
    name: str,
    kind: Literal["causal", "classifier"],
    dtype: torch.dtype,
    seed: int,
    attention: str = "sdpa",
    revision: str | None = None,
    trust: bool = False,
) -> PreTrainedModel:
    """A causal LM or a one-label classifier, without dropout.

    A classifier that is made from a causal LM gets a fresh scalar head (:func:`initialise_head`).

    Raises:
        ValueError: a classifier with several labels, a family without a ``score`` layer or this ``attention``, or
            weights that are missing.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    refuse_pickles(name)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust}
    settings = AutoConfig.from_pretrained(name, **options)
    fresh = False
    if kind == "classifier":
        fresh = not _classifies(settings)
        if not fresh and settings.num_labels != 1:
            raise ValueError(f"{name} is a classifier with {settings.num_labels} labels; a scorer has exactly one")
        settings.num_labels = 1
    check_family(name, settings, kind, attention, trust)
    factory = AutoModelForCausalLM if kind == "causal" else AutoModelForSequenceClassification
    options |= {"config": settings, "dtype": dtype, "attn_implementation": attention}
    with _without_load_report():
        loaded: Any = factory.from_pretrained(name, use_safetensors=True, output_loading_info=True, **options)
    network, found = loaded
    if lacking := sorted(set(found["missing_keys"]) - ({"score.weight"} if fresh else set())):
        raise ValueError(
            f"{name} has no weights for {', '.join(lacking[:3])}: it is not a whole {type(network).__name__}"
        )
    if kind == "classifier" and not isinstance(getattr(network, "score", None), nn.Linear):
        raise ValueError(f"{name}: {type(network).__name__} has no linear layer named score, so it cannot be a scorer")
    if fresh:
        initialise_head(network.score, seed)
    return without_dropout(network)


def check_family(
    name: str, settings: PreTrainedConfig, kind: Literal["causal", "classifier"], attention: str, trust: bool
) -> None:
    """Raises ValueError where transformers has no class of this kind for a family, or none with this attention."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    families: dict[str, tuple[str, Any]] = {
        "causal": ("AutoModelForCausalLM", MODEL_FOR_CAUSAL_LM_MAPPING),
        "classifier": ("AutoModelForSequenceClassification", MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
    }
    factory, classes = families[kind]
    if trust and factory in (getattr(settings, "auto_map", None) or {}):  # the model brings its own
        return
    known = classes.get(type(settings), None)
    if known is None and kind == "classifier":
        raise ValueError(
            f"{name}: transformers has no sequence classifier of the family {settings.model_type}, which a scorer or "
            "critic trained in full is: train adapters, whose head is rto's own (model.lora.r = 16), or name a "
            "reward.model of another family"
        )
    if attention == "sdpa" and not getattr(known, "_supports_sdpa", True):
        raise ValueError(f"{name}: {known.__name__} has no model.attention = 'sdpa': set it to 'eager'")


def refuse_pickles(name: str | Path) -> None:
    """Raises ValueError for a folder whose weights are pickles only: reading one can run any code."""
    folder = Path(name)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    if found := sorted(path.name for end in ("bin", "pt", "pth", "ckpt") for path in folder.glob(f"*.{end}")):
        raise ValueError(
            f"{folder} has its weights in {found[0]}, a pickle, which can run code when it is read; only safetensors "
            "are. If you trust it, load it with transformers once, call save_pretrained, and name that folder"
        )


def is_classifier(name: str, trust: bool = False, revision: str | None = None) -> bool:
    """Whether a folder or hub model is a sequence classifier already, and not a causal LM to make one of."""
    from transformers import AutoConfig

    # Without a word on trust, transformers asks on the terminal.
    return _classifies(AutoConfig.from_pretrained(name, trust_remote_code=trust, revision=revision))


def _classifies(settings: Any) -> bool:
    return any("SequenceClassification" in a for a in settings.architectures or [])


@contextlib.contextmanager
def _without_load_report() -> Iterator[None]:
    """transformers warns of every head that is new; :func:`load_network` looks for missing weights itself."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def fresh_head(network: PreTrainedModel, seed: int) -> nn.Linear:
    """A scalar head on the states that the output layer reads, frozen. OPT's may be narrower than ``hidden_size``."""
    width = network.get_output_embeddings().weight.shape[1]
    head = nn.Linear(width, 1, bias=False)
    initialise_head(head, seed)
    return head.to(network.device).requires_grad_(False)


def initialise_head(head: nn.Linear, seed: int) -> None:
    """N(0, 1/(hidden + 1)), as in OpenRLHF."""
    generator = torch.Generator().manual_seed(derive(seed, "head"))
    weight = torch.randn(head.weight.shape, generator=generator) / (head.in_features + 1)
    with torch.no_grad():
        head.weight.copy_(weight)


def scratch_network(model: recipe.Scratch, tokenizer: PreTrainedTokenizerBase, end: int, seed: int) -> PreTrainedModel:
    """A small Llama with random weights for this tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=model.hidden,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        intermediate_size=model.intermediate,
        max_position_embeddings=model.positions,
        tie_word_embeddings=True,
        initializer_range=model.hidden**-0.5,  # the usual 0.02 is made for wide models: narrow ones start too slowly
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation=model.attention,  # type: ignore[call-arg]
    )
    with global_torch(seed, "scratch"):
        return without_dropout(LlamaForCausalLM(settings))


def without_dropout(network: PreTrainedModel) -> PreTrainedModel:
    """Switch every dropout and noise off: log-prob ratios and preference margins must compare models, not masks."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for part in (network.config.get_text_config(), *network.modules()):  # some layers read the settings
        for name in _RANDOM:
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)
    return network.eval()


def positions_of(settings: PreTrainedConfig) -> int | None:
    """How many tokens a model reads at once, its rotary positions' scaling included; None: as many as one likes.

    Where a longer row would change the others in its batch (:func:`stretches`), it is the length up to which none does.
    """
    settings = settings.get_text_config()
    known = getattr(settings, "max_position_embeddings", None)
    if not known:
        return None
    found = [known]
    for rope in _ropes(settings):
        original = rope.get("original_max_position_embeddings") or known
        if rope.get("rope_type") in _STRETCHED:
            return original if rope["rope_type"] == "longrope" else known
        found.append(int((rope.get("factor") or 1) * original))
    return max(found)


def stretches(settings: PreTrainedConfig) -> bool:
    """Whether one long row changes the rotary positions of all rows that are read with it; keys in a cache keep the
    earlier ones."""
    return any(rope.get("rope_type") in _STRETCHED for rope in _ropes(settings.get_text_config()))


def _ropes(settings: Any) -> list[dict[str, Any]]:
    scaling = getattr(settings, "rope_parameters", None) or {}
    return [rope for rope in (scaling, *scaling.values()) if isinstance(rope, dict)]  # perhaps one a type of layer


def has_vocabulary(ours: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers know the same tokens under the same ids.

    A special token that ours gives no part in a text (Llama 3 reserves hundreds) may have another name in the other.
    """
    mine, theirs = ours.get_vocab(), other.get_vocab()
    differing = {id for _, id in mine.items() ^ theirs.items()}
    return not differing or differing <= _unused(ours) & _special(other)


def _special(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}


def _unused(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Special tokens that neither begin, end nor pad a text, and that no template writes."""
    known, template = tokenizer.added_tokens_decoder, str(tokenizer.chat_template)
    return {id for id in _special(tokenizer) - set(tokenizer.all_special_ids) if known[id].content not in template}


def same_vocabulary(ours: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, role: str, name: str) -> None:
    """Refuse a model whose tokenizer differs from the policy's.

    Raises:
        ValueError: naming the first difference and the remedy.
    """
    if has_vocabulary(ours, other):
        return
    mine, theirs = ours.get_vocab(), other.get_vocab()
    word = next(iter(sorted(mine.items() ^ theirs.items(), key=lambda item: item[1])))
    raise ValueError(
        f"the {role} {name} has another vocabulary than the policy ({len(theirs)} tokens against {len(mine)}; "
        f"first difference: {word[0]!r} as id {word[1]}): choose a {role} of the policy's model family"
    )
