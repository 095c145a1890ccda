"""What a hostile model, data set, checkpoint or recipe must not be able to do. See docs/security.md."""

from __future__ import annotations

import contextlib
import io
import json
import re
import threading
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rto import recipe
from rto.cli import main
from rto.data.rows import make_tokenizer
from rto.models.load import is_classifier, load_network, load_tokenizer, refuse_pickles
from rto.report.html import write_report
from rto.report.log import RunLog
from rto.rollouts.http import HttpScorer

SECRETS = {name: f"secret-of-{name.lower()}-7531" for name in ("OPENAI_API_KEY", "RTO_SCORER_TOKEN", "HF_TOKEN")}
MODEL = {"type": "scratch", "hidden": 16, "layers": 1, "heads": 2, "intermediate": 16}
TINY = {
    "device": "cpu",
    "model": MODEL,
    "data": {"type": "world", "sft": 4, "pairs": 4, "prompts": 4, "test": 4, "max_response": 6},
    "evaluation": {"oracle": {"type": "world"}},
    "stages": ["sft", "rl", "report"],
    "sft": {"batch": 4, "max_steps": 1},
}


# --- the page -----------------------------------------------------------------------------------------

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "</style></title></textarea></pre></svg><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)" x=\'',
    "' autofocus onfocus='alert(1)",
    "<a href='javascript:alert(1)'>here</a>",
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "{{ 7 * 7 }}{% for x in y %}",
    "<!-- --><![CDATA[ ]]>&lt;script&gt;&#60;script&#62;",
    "\x1b[31mred\x1b[0m\x1b]8;;http://evil.example\x07link\x07",
    "abc\u202e\u2066gpj.exe\u2069\u202c",
    "\x00\x08\x7f",
    "\ud83d",
]
PRINTABLE = 9  # so many of them, the first, have no control characters


class Page(HTMLParser):
    """Tags with attributes, and text, as a browser reads them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def shape_of(page: Page) -> list[tuple[str, tuple[str, ...]]]:
    return [(tag, tuple(attributes)) for tag, attributes in page.tags]


def report_of(folder: Path, text: str, name: str = "word") -> Page:
    """The page of a run in which every prompt, answer, token and score is this text, and every policy and term has
    this name, which matplotlib draws: no control characters there."""
    folder.mkdir()
    log = RunLog(folder)
    log.metrics(f"rl/{name}", 1, {"reward/total": 1.0, f"reward/{name}": 1.0, "kl": 0.5, "length": 3.0})
    log.metrics("prefer/" + name.replace("/", "_"), 1, {"loss": 1.0})
    log.sample(f"rl/{name}", 1, {"prompt": text, "answer": text, "score": text})
    pair = {"a": name, "b": "ppo", "win_rate": 0.5, "win_low": 0.4, "win_high": 0.6, "difference": 0.0, "p": 1.0}
    pair |= {"difference_low": 0.0, "difference_high": 0.0, "wins": 1, "ties": 0, "losses": 1, "n": 2, "missing": 0}
    square = [[None, 0.5], [0.5, None]]
    comparison = {
        "names": [name, "ppo"],
        "policies": {one: {"score": 1.0, "low": 0.0, "high": 2.0, "length": 3.0} for one in (name, "ppo")},
        "matrix": square,
        "matrix_low": square,
        "matrix_high": square,
        "pairs": [pair | {"p_holm": 1.0, "verdict": text}],
    }
    answer = {"policy": text, "prompt": text, "tokens": [text], "terms": {text: [1.0]}, "segment_ends": [True]}
    files = {
        "config": {
            "model": {"name": text},
            "policy": {"method": name},
            "data": {"pairs": text},
            "baselines": {text: {}},
        },
        "stages": {text: {"seconds": 1.0, "peak_memory_mb": 1.0, "path": text}},
        "evaluation": {
            "oracle": text,
            "comparison": comparison,
            "samples": [{"prompt": text, "answers": {text: {"text": text, "score": 1.0}}}],
            "accuracy": {text: 0.5},
        },
        "credit": {"methods": {text: {"auc": 0.5}}, "answers": [answer]},
    }
    for file, content in files.items():
        (folder / f"{file}.json").write_text(json.dumps(content))
    return Page(write_report(folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def harmless(tmp_path_factory) -> Page:
    return report_of(tmp_path_factory.mktemp("page") / "run", "word")


def test_no_text_changes_the_markup_of_the_page(tmp_path, harmless):
    """All hostile texts in one, and the tags and attributes are those of the page of a harmless word."""
    page = report_of(tmp_path / "run", " ".join(HOSTILE), " ".join(HOSTILE[:PRINTABLE]))
    drawn = {
        "path",
        "use",
        "g",
        "defs",
        "rect",
        "clippath",
        "svg",
        "style",
    }  # how a name is drawn depends on its letters

    def kept(tags):
        return [tag for tag in shape_of(tags) if tag[0] not in drawn]

    assert kept(page) == kept(harmless)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "img", "iframe", "object", "embed", "base", "form", "link"}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "srcdoc"]
        links = [attributes.get(name) or "" for name in ("href", "xlink:href", "src", "action")]
        assert not [link for link in links if re.match(r"\s*[a-z]+:", link, re.I)]


def test_hostile_text_is_shown_as_it_is(tmp_path):
    text = "</script><script>alert(1)</script><a href='javascript:alert(1)'>"
    assert report_of(tmp_path / "run", text).text.count(text) > 15


def test_tokens_show_control_characters_and_stay_apart(tmp_path):
    report_of(tmp_path / "run", "\x1b[31m\u202e")
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    token = next(re.finditer(r'<span class="t"[^>]*>([^<]*)</span>', page))[1]
    assert token.startswith("\u241b[31m")
    for name in ("t", "text", "tokens"):  # direction marks end with their element
        assert re.search(rf"^\.{name} \{{[^}}]*unicode-bidi: isolate", page, re.M)


# --- models -------------------------------------------------------------------------------------------

SMALL = LlamaConfig(
    vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=1
)


@pytest.mark.parametrize(
    ("kind", "made"), [("causal", LlamaForCausalLM), ("classifier", LlamaForSequenceClassification)]
)
def test_pickled_weights_are_refused_with_a_remedy(tmp_path, kind, made):
    """Policy, reference and guide open a causal LM, scorer and critic a classifier."""
    network = made(SMALL)
    network.config.architectures = [made.__name__]
    network.config.save_pretrained(tmp_path)
    torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors") as refusal:
        load_network(str(tmp_path), kind, torch.float32, 0)
    assert str(tmp_path) in str(refusal.value) and "pickle" in str(refusal.value)
    assert "save_pretrained" in str(refusal.value)


def test_a_pickled_adapter_is_refused_too(tmp_path):
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"adapter_model\.bin, a pickle"):
        refuse_pickles(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    refuse_pickles(tmp_path)  # the other file is not read
    refuse_pickles("owner/name-on-the-hub")


CODE = """
from pathlib import Path
Path({canary!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "rto-own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """A model whose classes come with it, and the file that appears when its code runs."""
    folder, canary = tmp_path / "own_model", tmp_path / "canary"
    LlamaForCausalLM(SMALL).save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    names["AutoModelForSequenceClassification"] = "own.OwnModel"
    settings |= {"model_type": "rto-own", "auto_map": names}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["own.OwnModel", None]}}))
    (folder / "own.py").write_text(CODE.format(canary=str(canary)))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # somebody who says yes to everything
    return str(folder), canary


def test_code_that_comes_with_a_model_does_not_run(own_code):
    folder, canary = own_code
    for opened in (
        lambda: load_network(folder, "causal", torch.float32, 0),
        lambda: load_network(folder, "classifier", torch.float32, 0),
        lambda: is_classifier(folder),
        lambda: load_tokenizer(folder),
        lambda: make_tokenizer(
            recipe.build(TINY | {"model": {"name": folder}, "data": {"pairs": "x.jsonl"}, "evaluation": {}}), folder
        ),
    ):
        with pytest.raises(ValueError, match="trust_remote_code"):
            opened()
        assert not canary.exists()


def test_trust_is_off_and_a_key_of_each_model():
    config = recipe.build(
        TINY | {"model": {"name": "a"}, "reward": {"model": {"name": "b", "trust_remote_code": True}}}
    )
    assert (config.model.trust_remote_code, config.reward.model.trust_remote_code) == (False, True)


def test_code_runs_where_the_key_says_so(own_code):
    folder, canary = own_code
    load_network(folder, "causal", torch.float32, 0, trust=True)
    assert canary.exists()


# --- secrets ------------------------------------------------------------------------------------------


def test_secrets_of_the_environment_stay_there(tmp_path, monkeypatch):
    """A run whose reward server fails tells of it without the token, and writes none of them."""
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    monkeypatch.chdir(tmp_path)
    lines = ['output = "run"', 'device = "cpu"', 'stages = ["sft", "rl", "report"]', "[model]"]
    lines += [f"{key} = {json.dumps(value)}" for key, value in MODEL.items()]
    lines += ["[data]", 'type = "world"', *(f"{key} = 4" for key in ("sft", "pairs", "prompts", "test"))]
    lines += [
        "max_response = 6",
        "[sft]",
        "batch = 4",
        "max_steps = 1",
        "[policy]",
        'method = "custom"',
        "rollouts = 4",
    ]
    lines += ["batch = 4", "max_steps = 1", 'critic.init = "reference"', "[[policy.rewards]]", 'type = "http"']
    lines += ['url = "http://127.0.0.1:9/?key=of-the-query"', "retries = 0", "[evaluation.oracle]", 'type = "world"']
    (tmp_path / "recipe.toml").write_text("\n".join(lines))
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        assert main(["run", "recipe.toml"]) != 0
        assert main(["report", "recipe.toml"]) == 0
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    assert {"config.json", "metrics.jsonl", "report.html"} <= {path.name for path in written}
    everything = said.getvalue() + "".join(path.read_text(errors="replace") for path in written)
    assert not [name for name, secret in SECRETS.items() if secret in everything]
    assert "no reward" in said.getvalue() and "of-the-query" not in said.getvalue()


class Parrot(BaseHTTPRequestHandler):
    """Refuses, and repeats what it was sent."""

    def do_POST(self) -> None:
        self.send_response(400)
        self.end_headers()
        self.wfile.write(f"no: {self.headers['Authorization']}".encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_refusal_that_repeats_the_token_is_quoted_without_it(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RTO_SCORER_TOKEN", SECRETS["RTO_SCORER_TOKEN"])
    with HTTPServer(("127.0.0.1", 0), Parrot) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        with pytest.raises(ValueError, match="status 400: no: Bearer \\*\\*\\*"):
            HttpScorer(f"http://127.0.0.1:{server.server_port}/", retries=0).score(["p"], ["a"], [["a"]])
        thread.join()


# --- names that become folders ------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["guides", "scorers", "baselines"])
@pytest.mark.parametrize(
    "name", ["../out", "..", ".", "", "a/b", "/tmp/x", "a\\b", ".hidden", "a b", "\u00e9", "a\n", "-x", "a.b"]
)
def test_a_name_that_becomes_a_folder_cannot_leave_the_run(table, name):
    with pytest.raises(ValueError, match=rf"{table}.*letters, digits"):
        recipe.build(TINY | {table: {name: {}}})


@pytest.mark.parametrize("name", ["simpo", "Guide_2", "2nd-try", "_"])
def test_an_ordinary_name_is_a_name(name):
    config = recipe.build(TINY | {"guides": {name: {}}, "scorers": {name: {}}, "baselines": {name: {"method": "ppo"}}})
    assert [*config.guides, *config.scorers, *config.baselines] == [name] * 3
