"""Models come from folders as they were written, and what does not fit is refused with a remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn

from rto.batch import Completions, Prompts
from rto.config import Lora, Packaged, Pretrained, Scratch
from rto.models.load import (
    dequantise,
    has_vocabulary,
    initialise_head,
    load_network,
    load_tokenizer,
    locate,
    opened_as,
    positions_of,
    same_vocabulary,
    scratch_network,
    without_dropout,
)
from rto.models.role import Role
from rto.models.runtime import Runtime
from rto.models.trunk import TrunkCritic
from rto.models.workshop import Workshop, check_positions, verify

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
IDS = torch.tensor([[3, 4, 5, 6, 7]])
ROPE = {"rope_theta": 1e4, "factor": 2.5}
YARN = {"rope_type": "yarn", "original_max_position_embeddings": 80}
LONG = YARN | {"rope_type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64}


def tokenizer(words: int = 50, last: str = "w49") -> hf.PreTrainedTokenizerFast:
    names = ["<pad>", "<unk>", "<end>", *(f"w{i}" for i in range(3, words))]
    names[-1] = last
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(names)}, unk_token="<unk>"))
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="<end>")


def save(folder: Path, labels: int | None = None) -> Path:
    """A Llama in a folder: a causal LM, or a classifier with ``labels`` labels."""
    more = {} if labels is None else {"num_labels": labels}
    settings = hf.LlamaConfig(vocab_size=50, bos_token_id=None, eos_token_id=2, pad_token_id=0, **SIZE, **more)
    torch.manual_seed(0)
    (hf.LlamaForCausalLM if labels is None else hf.LlamaForSequenceClassification)(settings).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def open_(folder: Path, kind="causal", seed: int = 0, **more) -> hf.PreTrainedModel:
    return load_network(str(folder), kind, torch.float32, seed, **more)


# --- networks -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_causal_model_is_what_was_saved(tmp_path):
    network = open_(save(tmp_path))
    plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(network(IDS).logits, plain(IDS).logits)
    assert not network.training and network.config._attn_implementation == "sdpa"
    assert open_(tmp_path, attention="eager").config._attn_implementation == "eager"


def test_the_precision_is_what_was_asked_for(tmp_path):
    network = load_network(str(save(tmp_path)), "causal", torch.bfloat16, 0)
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}


def test_a_fresh_head_depends_on_the_seed_only(tmp_path):
    save(tmp_path)
    heads = [open_(tmp_path, "classifier", seed).score.weight for seed in (0, 0, 1)]
    assert heads[0].shape == (1, 32)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    adapter = Workshop(Pretrained(name=str(tmp_path), lora=Lora(r=2)), str(tmp_path), tokenizer(), Runtime("cpu"), 0)
    assert torch.equal(adapter.new_scorer("scorer", None).head.weight, heads[0])


def test_the_head_is_small():
    head = nn.Linear(999, 1, bias=False)
    initialise_head(head, 0)
    assert head.weight.std().item() == pytest.approx(1 / 1000, rel=0.1)


@torch.no_grad()
def test_a_trained_head_is_kept(tmp_path):
    network = open_(save(tmp_path, labels=1), "classifier")
    assert torch.equal(network.score.weight, load_file(tmp_path / "model.safetensors")["score.weight"])


def test_a_classifier_with_several_labels_is_refused(tmp_path):
    with pytest.raises(ValueError, match="3 labels; a scorer has exactly one"):
        open_(save(tmp_path, labels=3), "classifier")


def test_a_family_without_a_classifier_is_refused_with_a_remedy(tmp_path):
    hf.GraniteForCausalLM(hf.GraniteConfig(vocab_size=50, **SIZE)).save_pretrained(tmp_path)
    assert open_(tmp_path).config.model_type == "granite"
    told = r"no sequence classifier of the family granite.*model\.lora\.r = 16.*reward\.model of another family"
    with pytest.raises(ValueError, match=told):
        open_(tmp_path, "classifier")
    adapters = Workshop(Pretrained(name=str(tmp_path), lora=Lora(r=2)), str(tmp_path), tokenizer(), Runtime("cpu"), 0)
    assert adapters.new_scorer("scorer", None).head.weight.shape == (1, 32), "the remedy is one"


def test_attention_that_a_family_does_not_have_is_refused_with_a_remedy(tmp_path):
    hf.Gemma2ForCausalLM(hf.Gemma2Config(vocab_size=50, head_dim=8, **SIZE)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"Gemma2ForCausalLM has no model\.attention = 'sdpa': set it to 'eager'"):
        open_(tmp_path)
    with pytest.raises(ValueError, match="Gemma2ForSequenceClassification has no"):
        open_(tmp_path, "classifier")
    assert open_(tmp_path, attention="eager").config._attn_implementation == "eager"


def test_heads_are_as_wide_as_the_states(tmp_path):
    """Those of the smallest OPT are narrower than its hidden size."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64}
    settings = hf.OPTConfig(vocab_size=50, word_embed_proj_dim=16, **sizes)
    hf.OPTForCausalLM(settings).save_pretrained(tmp_path)
    shop = Workshop(Pretrained(name=str(tmp_path), lora=Lora(r=2)), str(tmp_path), tokenizer(), Runtime("cpu"), 0)
    mask = torch.ones(1, 5, dtype=torch.bool)
    rows = Completions(Prompts(IDS[:, :2], mask[:, :2]), IDS[:, 2:], mask[:, 2:], mask[:, 0])
    for role in (shop.new_scorer("scorer", None), TrunkCritic(shop.reference(), 0, detached=False)):
        assert role.head.weight.shape == (1, 16) and not role.head.weight.requires_grad
        assert role.values(rows).shape == (1, 3)


@pytest.mark.parametrize(("labels", "kind"), [(None, "causal"), (None, "classifier"), (1, "classifier")])
def test_missing_weights_are_refused(tmp_path, labels, kind):
    path = save(tmp_path, labels) / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="no weights for model.layers.1.mlp.up_proj.weight"):
        open_(tmp_path, kind)


def test_dropout_is_off():
    settings = hf.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    assert settings.resid_pdrop == 0.1, "the case tests something"
    network = without_dropout(hf.GPT2LMHeadModel(settings)).train()
    assert torch.equal(network(IDS).logits, network(IDS).logits)


def test_attention_dropout_is_off():
    network = without_dropout(hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=50, attention_dropout=0.5, **SIZE))).train()
    assert torch.equal(network(IDS).logits, network(IDS).logits)


MOE = {"num_experts_per_tok": 2, "num_local_experts": 4}
NOISY = {
    "starcoder2": (hf.Starcoder2Config, SIZE | {"residual_dropout": 0.5, "embedding_dropout": 0.5}),
    "bloom": (hf.BloomConfig, {"hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.5}),
    "falcon": (hf.FalconConfig, SIZE | {"hidden_dropout": 0.5, "attention_dropout": 0.5, "parallel_attn": False}),
    "mixtral": (hf.MixtralConfig, SIZE | MOE | {"num_key_value_heads": 4, "router_jitter_noise": 0.5}),
    "phimoe": (hf.PhimoeConfig, SIZE | MOE | {"num_key_value_heads": 4, "input_jitter_noise": 0.5}),
}


@torch.no_grad()
@pytest.mark.parametrize("family", NOISY)
def test_dropouts_and_noise_of_other_names_are_off(family):
    kind, settings = NOISY[family]
    torch.manual_seed(0)
    noisy = hf.AutoModelForCausalLM.from_config(kind(vocab_size=50, **settings)).train()
    assert not torch.equal(noisy(IDS).logits, noisy(IDS).logits), "the case tests something"
    network = without_dropout(noisy).train()
    assert torch.equal(network(IDS).logits, network(IDS).logits)


@torch.no_grad()
def test_a_scratch_model_depends_on_the_seed(tmp_path):
    model, words = Scratch(type="scratch", hidden=16, layers=1, heads=2, intermediate=32, positions=32), tokenizer()
    first, same, other = (scratch_network(model, words, 2, seed) for seed in (0, 0, 1))
    assert torch.equal(first(IDS).logits, same(IDS).logits)
    assert not torch.equal(first(IDS).logits, other(IDS).logits)
    assert (first.config.vocab_size, first.config.eos_token_id, first.config.pad_token_id) == (50, 2, 0)
    state = torch.random.get_rng_state()
    scratch_network(model, words, 2, 0)
    assert torch.equal(state, torch.random.get_rng_state()), "the global generator is put back"


# --- positions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "positions"),
    [
        (hf.GPT2Config(), 1024),
        (hf.LlamaConfig(max_position_embeddings=100), 100),
        (hf.LlamaConfig(max_position_embeddings=100, rope_parameters=ROPE | {"rope_type": "linear"}), 250),
        (hf.Qwen2Config(max_position_embeddings=100, rope_parameters=ROPE | YARN), 200),
        (hf.Qwen2Config(max_position_embeddings=200, rope_parameters=ROPE | YARN), 200),  # told already
        (hf.Gemma3TextConfig(max_position_embeddings=100), 100),
        (hf.Gemma3TextConfig(max_position_embeddings=100, rope_parameters={"full_attention": ROPE | YARN}), 200),
        (hf.LlamaConfig(max_position_embeddings=100, rope_parameters=ROPE | {"rope_type": "dynamic"}), 100),
        (hf.LlamaConfig(max_position_embeddings=200, rope_parameters=ROPE | LONG), 80),
        (hf.Gemma3TextConfig(max_position_embeddings=100, rope_parameters={"full_attention": ROPE | LONG}), 80),
        (hf.BloomConfig(), None),
    ],
)
def test_how_much_a_model_reads(settings, positions):
    assert positions_of(settings) == positions


def test_more_than_a_model_reads_is_refused(tmp_path):
    base = str(save(tmp_path))
    backbone = Workshop(Pretrained(name=base), base, tokenizer(), Runtime("cpu"), 0).reference().backbone
    check_positions(backbone, 2048)
    with pytest.raises(ValueError, match=r"2049 tokens.*data.max_prompt and data.max_response.*2048 positions: lower"):
        check_positions(backbone, 2049)


# --- vocabularies -------------------------------------------------------------------------------------


def test_the_same_vocabulary_passes():
    same_vocabulary(tokenizer(), tokenizer(), "scorer", "other")


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (tokenizer(48), r"48 tokens against 50"),
        (tokenizer(50, last="word"), r"50 tokens against 50; first difference: '(w49|word)' as id 49"),
    ],
)
def test_another_vocabulary_is_refused(other, told):
    with pytest.raises(ValueError, match=rf"scorer big/model.*{told}.*choose a scorer of the policy's model family"):
        same_vocabulary(tokenizer(), other, "scorer", "big/model")


def test_a_finished_model_of_another_family_is_opened_as_the_recipe_says():
    model = Pretrained(
        name="org/scorer", revision="abc", trust_remote_code=True, dtype="bfloat16", attention="eager", packing=True
    )
    same = {"trust_remote_code": True, "dtype": "bfloat16", "attention": "eager"}
    assert opened_as("org/scorer", model) == Pretrained(name="org/scorer", revision="abc", **same)
    assert opened_as("org/other", model) == Pretrained(name="org/other", **same)
    assert opened_as("org/other", model, trust=False) == Pretrained(
        name="org/other", **same | {"trust_remote_code": False}
    )
    packaged = Packaged(type="package", dtype="float32")
    assert opened_as("org/other", packaged) == Pretrained(name="org/other", dtype="float32")


def with_special(name: str, **more: str) -> hf.PreTrainedTokenizerFast:
    made = tokenizer()
    made.add_tokens([hf.AddedToken(name, special=True)], special_tokens=True)
    for key, value in more.items():
        setattr(made, key, value)
    return made


def test_reserved_tokens_may_have_other_names():
    """As id 128004 of Llama 3 is the padding of Llama 3.2."""
    theirs = with_special("<padding>", pad_token="<padding>")
    assert has_vocabulary(with_special("<reserved>"), theirs)
    for ours in (
        with_special("<reserved>", pad_token="<reserved>"),
        with_special("<reserved>", chat_template="{{ messages[0]['content'] }}<reserved>"),
        tokenizer(51, last="<reserved>"),  # an ordinary word
        tokenizer(),
    ):
        assert not has_vocabulary(ours, theirs)
    assert not has_vocabulary(with_special("<reserved>"), tokenizer(51, last="<padding>"))


def test_a_scorer_of_another_size_has_one_model_for_all_its_roles_with_the_same_settings(tmp_path):
    base, big = save(tmp_path / "base"), save(tmp_path / "big")
    shop = Workshop(Pretrained(name=str(base)), str(base), tokenizer(), Runtime("cpu"), 0)
    other = Pretrained(name=str(big), lora=Lora(r=2))
    roles = [shop.new_scorer(name, other) for name in ("scorer", "critic")]
    assert roles[0].backbone is roles[1].backbone and roles[0].backbone.source == str(big)
    wider = shop.new_scorer("wider", Pretrained(name=str(big), lora=Lora(r=4)))
    full = shop.new_scorer("full", Pretrained(name=str(big), dtype="bfloat16"))
    assert (wider.backbone.lora.r, roles[0].backbone.lora.r, full.backbone.lora) == (4, 2, None)
    assert (full.backbone.compute, roles[0].backbone.compute) == (torch.bfloat16, torch.float32)
    changed = tokenizer(50, last="word")
    changed.save_pretrained(big)
    with pytest.raises(ValueError, match="another vocabulary"):
        Workshop(shop.model, str(base), tokenizer(), shop.runtime, 0).new_scorer("scorer", other)


# --- places -------------------------------------------------------------------------------------------


def test_places():
    assert locate(Pretrained(name="some/model")) == "some/model"
    with pytest.raises(ValueError, match="sft stage first"):
        locate(Scratch(type="scratch"))
    with pytest.raises(ValueError, match="'no_such_package' is not installed.*make smollm"):
        locate(Packaged(type="package", package="no_such_package"))
    with pytest.raises(ValueError, match=r"model.file = 'x.gguf' is not in package 'rto', which has no GGUF file"):
        dequantise("rto", "x.gguf")


def package(folder: Path, name: str, file: str = "x.gguf") -> Path:
    """A Python package, and where its model file belongs."""
    path = folder / name / file
    path.parent.mkdir(parents=True)
    (folder / name / "__init__.py").write_text("")
    return path


def test_another_package_or_another_file_of_the_same_name_is_another_model(tmp_path, monkeypatch):
    monkeypatch.setenv("RTO_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    (first, second), models = (package(tmp_path, name) for name in ("one", "two")), tmp_path / "models"
    # The SHA-1 of "abc" and of nothing, from FIPS 180.
    for known in ("one-x-a9993e364706", "one-x-da39a3ee5e6b", "two-x-a9993e364706"):
        (models / known).mkdir(parents=True)
        (models / known / "config.json").write_text("{}")
    first.write_text("abc")
    second.write_text("abc")
    assert [dequantise(name, "x.gguf") for name in ("one", "two")] == [
        models / "one-x-a9993e364706",
        models / "two-x-a9993e364706",
    ]
    first.write_text("")  # an upgrade
    assert dequantise("one", "x.gguf") == models / "one-x-da39a3ee5e6b"


def test_a_gguf_file_in_a_folder_of_its_package_is_read(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    monkeypatch.setenv("RTO_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    writer = gguf.GGUFWriter(package(tmp_path, "three", "sub/x.gguf"), "llama")
    for key, value in (
        ("block_count", 1), ("context_length", 32), ("embedding_length", 8), ("feed_forward_length", 16),
        ("head_count", 2), ("head_count_kv", 2), ("layer_norm_rms_eps", 1e-5), ("vocab_size", 4),
        ("tokenizer_model", "gpt2"), ("token_list", ["<end>", "a", "b", "ab"]), ("token_merges", ["a b"]),
        ("token_types", [3, 1, 1, 1]), ("eos_token_id", 0), ("bos_token_id", 0),
    ):  # fmt: skip
        getattr(writer, f"add_{key}")(value)
    shapes = {"attn_norm": [8], "ffn_norm": [8], "ffn_gate": [16, 8], "ffn_up": [16, 8], "ffn_down": [8, 16]}
    shapes |= {f"attn_{part}": [8, 8] for part in ("q", "k", "v", "output")}
    shapes = {f"blk.0.{name}": shape for name, shape in shapes.items()}
    for name, shape in (shapes | {"token_embd": [4, 8], "output": [4, 8], "output_norm": [8]}).items():
        writer.add_tensor(f"{name}.weight", torch.full(shape, 0.5).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    folder = dequantise("three", "sub/x.gguf")
    assert load_tokenizer(str(folder))("ab")["input_ids"] == [3]
    assert all((p == 0.5).all() for p in open_(folder).parameters())


# --- the packaged model -------------------------------------------------------------------------------


@pytest.mark.smollm
@torch.no_grad()
def test_the_packaged_model_is_an_ordinary_one():
    """Dequantised on the first run, about 30 s; afterwards read from the cache."""
    folder = Path(locate(Packaged(type="package")))
    settings = json.loads((folder / "config.json").read_text())
    assert not [key for key in settings if "quant" in key]
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".jinja", ".safetensors"}
    words, network = load_tokenizer(str(folder)), open_(folder)
    assert words.eos_token == "<|im_end|>" and network.config.eos_token_id == words.eos_token_id
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    ids = words.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = network.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in words.decode(out[0, ids["input_ids"].shape[1] :])
    shop = Workshop(Packaged(type="package", lora=Lora(r=2)), str(folder), words, Runtime("cpu"), 0)
    assert verify(Role(shop.reference().backbone), words.eos_token_id) < 1e-3
