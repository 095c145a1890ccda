from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from rto.report import RunLog, plots
from rto.report.html import num, percent, seconds, write_report
from rto.report.tokens import token_view

HOSTILE = "</div><script>alert(\"x\")</script><img src='http://evil.example/a.png' onerror=alert(1)>{{ 7 * 7 }}"


class Page(HTMLParser):
    """The tags, attributes and text of a page, as a browser reads them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.text += " " if tag in ("td", "th") else ""
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "img", "path", "use", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in ("path", "use", "rect"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def page_of(folder) -> Page:
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert page.open == []  # every element is closed
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "img", "link", "iframe", "object"}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("href", "src", "xlink:href"):
            assert not re.match("(?i)[a-z]+:", attributes.get(name) or "")  # nothing outside the folder
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    return page


def write(folder, **files) -> None:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def evaluation(names: list[str], verdict: str | None = "not distinguishable") -> dict:
    pair = {"a": names[0], "b": names[1], "win_rate": 0.625, "win_low": 0.5, "win_high": 0.75, "difference": -0.25}
    pair |= {"difference_low": None, "difference_high": None, "wins": 5, "ties": 0, "losses": 3, "n": 8, "missing": 0}
    square = [[None, 0.625], [0.375, None]]
    policy = {"score": 1.5, "low": 1.25, "high": 1.75, "length": 12.0, "kl": None, "finished": 0.5}
    comparison = {
        "names": names,
        "policies": {name: policy for name in names},
        "matrix": square,
        "matrix_low": [[None, 0.5], [None, None]],
        "matrix_high": [[None, 0.75], [None, None]],
        "pairs": [{**pair, "p": 0.03, "p_holm": None, "verdict": verdict}],
    }
    samples = [{"prompt": HOSTILE, "answers": {name: {"text": HOSTILE, "score": None} for name in names}}]
    return {"oracle": HOSTILE, "comparison": comparison, "samples": samples, "accuracy": {"guide": 0.75}}


# --- the page -----------------------------------------------------------------------------------------


def test_an_empty_folder_makes_a_page_that_says_what_is_missing(tmp_path):
    text = page_of(tmp_path).text
    for name in ("config.json", "stages.json", "metrics.jsonl", "evaluation.json", "credit.json"):
        assert f"{name}" in text
    assert "rto evaluate writes credit.json" in text and "rto rl writes metrics.jsonl" in text


def test_hostile_text_is_escaped_everywhere(tmp_path):
    log = RunLog(tmp_path)
    log.metrics(f"rl/{HOSTILE}", 1, {"reward/total": 1.0, f"reward/{HOSTILE}": 1.0})
    log.sample(f"rl/{HOSTILE}", 1, {"prompt": HOSTILE, "answer": HOSTILE + "\ud83d", "score": math.nan})
    terms = {HOSTILE: [1.0, -1.0], "total": [0.0, None]}
    answer = {"policy": HOSTILE, "prompt": HOSTILE, "tokens": [HOSTILE, "\n"], "terms": terms, "truth": [1.0, 0.0]}
    write(
        tmp_path,
        config={"model": {"name": HOSTILE}, "policy": {"method": HOSTILE}, "data": {"pairs": HOSTILE}, "seed": 0},
        stages={HOSTILE: {"seconds": 1.0, "peak_memory_mb": None, "path": HOSTILE}},
        evaluation=evaluation([HOSTILE, "ppo"], HOSTILE),
        credit={"methods": {HOSTILE: {"auc": 0.5}}, "answers": [answer]},
    )
    page = page_of(tmp_path)
    # config, facts, stages, verdicts, policies, samples, credit … : the text is there, and none of it is markup
    assert page.text.count(HOSTILE) > 20


def test_numbers_of_the_evaluation_reach_the_page(tmp_path):
    write(tmp_path, evaluation=evaluation(["rto", "ppo"]), config={"policy": {"method": "rto"}, "seed": 0})
    text = " ".join(page_of(tmp_path).text.split())
    assert "rto and ppo: not distinguishable" in text
    assert "rto wins 62.5 % (50.0 to 75.0 %) of 8 prompts; score difference −0.250 (–); p = –" in text
    assert "rto 1.500 1.250 to 1.750 12.00 – 50.0 %" in text
    assert "guide 75.0 %" in text


def test_two_policies_are_compared_once_from_the_side_of_the_method(tmp_path):
    both = evaluation(["ppo", "rto"], "worse")
    (pair,) = both["comparison"]["pairs"]
    both["comparison"]["pairs"].append({**pair, "a": "rto", "b": "ppo", "verdict": "better"})
    write(tmp_path, evaluation=both, config={"policy": {"method": "rto"}})
    text = page_of(tmp_path).text
    assert "rto beat ppo" in text and "ppo lost to rto" not in text and "All pairs in numbers (1)" in text
    write(tmp_path, evaluation=both, config={"policy": {"method": "dpo"}})
    assert "ppo lost to rto" in page_of(tmp_path).text


def test_stage_times_and_curves(tmp_path):
    log = RunLog(tmp_path)
    for step in range(1, 60):
        log.metrics(
            "prefer", step, {"loss": 1 / step, "accuracy": 0.5} | ({"eval_accuracy": 0.6} if step == 30 else {})
        )
        log.metrics("rl/ppo", step, {"reward/total": step, "kl": math.nan, "length": 3.0})
        log.metrics("rl/rto", step, {"reward/total": step, "reward/implicit": 0.5, "oracle": 1.0})
    write(tmp_path, stages={"sft": {"seconds": 75.0, "path": "sft"}})
    page = page_of(tmp_path)
    text = " ".join(page.text.split())
    assert "sft 1 min 15 s – sft" in text
    assert "reward/implicit – 0.500" in text and "kl – –" in text
    assert sum(tag == "svg" for tag, _ in page.tags) == 2


def test_credit_without_a_true_reward(tmp_path):
    answer = {"policy": "rto", "prompt": "p", "tokens": ["a"], "terms": {"total": [0.5]}, "truth": None}
    write(tmp_path, credit={"methods": None, "answers": [answer]})
    text = page_of(tmp_path).text
    assert "is not known" in text and "true reward\n" not in text


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            {"credit": {"answers": [{"tokens": ["a"], "policy": "p", "prompt": "p", "terms": {"kl": []}}]}},
            "0 values for 1",
        ),
        ({"evaluation": {"comparison": {"names": []}}}, r"evaluation\.json: the key 'matrix' is missing"),
        ({"stages": []}, r"stages\.json: not a JSON object"),
    ],
)
def test_broken_files_are_named(tmp_path, files, words):
    write(tmp_path, **files)
    with pytest.raises(ValueError, match=words):
        write_report(tmp_path)


def test_no_folder_and_no_json_are_errors_for_users(tmp_path):
    with pytest.raises(ValueError, match="no such run folder"):
        write_report(tmp_path / "none")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *[(None, "–"), (math.nan, "–"), (0.0, "0.000"), (-0.12345, "−0.123"), (12.3456, "12.35"), (123.456, "123.5")],
        *[(12345.6, "12,346"), (0.00012345, "0.00012"), (5e-7, "5e−07"), (1234, "1,234"), ("as it came", "as it came")],
    ],
)
def test_num(value, text):
    assert num(value) == text


def test_percent_and_seconds():
    assert [percent(0.6249), percent(None)] == ["62.5 %", "–"]
    assert [seconds(s) for s in (None, 2.25, 75, 3725)] == ["–", "2.2 s", "1 min 15 s", "1 h 02 min"]


# --- tokens -------------------------------------------------------------------------------------------


def test_token_view_colours_by_sign_and_size_on_one_scale_a_term():
    markup = token_view(["a", " b", "\n", ""], {"implicit": [0.5, -0.25, 0.0, None], "kl": [-2.0, 0.0, 0.0, 0.0]})
    spans = re.findall(r'<span class="(t|t neg)"(.*?)>(.*?)</span>', markup)
    assert [text for _, _, text in spans] == ["a", " b", "⏎", "∅"] * 2
    assert [kind for kind, _, _ in spans] == ["t", "t neg", "t", "t", "t neg", "t", "t", "t"]
    assert "rgba(33,102,172,0.620)" in spans[0][1] and 'title="implicit +0.5"' in spans[0][1]
    assert "rgba(202,80,32,0.310)" in spans[1][1] and 'title="implicit -0.25"' in spans[1][1]
    assert "style" not in spans[2][1] and 'title="implicit unknown"' in spans[3][1]
    assert "rgba(202,80,32,0.620)" in spans[4][1]
    assert "&minus;0.5<" in markup and "+2</span>" in markup


def test_token_view_of_all_zero_and_of_nothing():
    assert "all 0" in token_view(["a"], {"kl": [0.0]})
    assert '<span class="t' not in token_view([], {"kl": []}).replace('<span class="term-name', "")
    with pytest.raises(ValueError, match="'kl' has 2 values for 1 tokens"):
        token_view(["a"], {"kl": [0.0, 1.0]})


# --- plots --------------------------------------------------------------------------------------------


def lines(figure, panel):
    return {line.get_label(): list(line.get_ydata()) for line in figure.axes[panel].get_lines()}


def test_curves_skip_missing_keys_and_leave_gaps_at_nulls():
    runs = {"ppo": [{"step": 1, "kl": 0.5}, {"step": 2, "kl": None}, {"step": 3, "kl": 1.5}], "rto": [{"step": 1}]}
    figure = plots.curves(runs, ["kl", "length"], ["KL", "length"])
    (values,) = lines(figure, 0).values()
    assert values[0] == 0.5 and math.isnan(values[1]) and values[2] == 1.5
    assert lines(figure, 1) == {} and figure.axes[1].texts[0].get_text() == "no data"
    ElementTree.fromstring(plots.svg(figure, "a", "label"))


def test_a_long_curve_is_shown_with_its_running_mean():
    rows = [{"step": step, "loss": float(step % 2)} for step in range(60)]
    raw, mean = plots.training(rows, {"loss": ["loss"]}).axes[0].get_lines()
    assert list(raw.get_ydata())[:4] == [0, 1, 0, 1]
    # sixty points: three on each side; in the middle of 7 alternating values 4 or 3 are 1
    assert mean.get_ydata()[10] == pytest.approx(4 / 7) and mean.get_ydata()[11] == pytest.approx(3 / 7)
    assert mean.get_ydata()[0] == pytest.approx(2 / 4)


def test_win_matrix_prints_rate_and_interval_in_the_cell_of_row_against_column():
    names = ["$rto$", "_ppo"]
    square = [[None, 0.9], [0.1, None]]
    figure = plots.win_matrix(names, square, [[None, 0.85], [None, None]], [[None, 0.95], [None, None]])
    cells = {(text.get_position()[0], int(text.get_position()[1])): [] for text in figure.axes[0].texts}
    for text in figure.axes[0].texts:
        cells[text.get_position()[0], int(text.get_position()[1])].append(text.get_text())
    assert cells == {(0.5, 0): ["–"], (1.5, 0): ["90.0 %", "85.0 to 95.0"], (0.5, 1): ["10.0 %"], (1.5, 1): ["–"]}


def test_svg_is_reproducible_bare_and_has_its_own_ids(tmp_path):
    def drawn(name):
        return plots.svg(plots.training([{"step": 1, "loss": 1.0}], {"a": ["loss"]}), name, 'x" onload="y')

    one, two = drawn("one"), drawn("two")
    assert one == drawn("one")
    assert one.startswith("<svg") and "<style" not in one and plots.INK not in one
    ids = [set(re.findall(r'\bid="([^"]+)"', text)) for text in (one, two)]
    assert ids[0] and not ids[0] & ids[1]
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', one)) <= ids[0]
    assert " onload" not in ElementTree.fromstring(one).attrib
    plots.save_png(plots.training([], {"a": ["loss"]}), tmp_path / "overview.png")
    assert (tmp_path / "overview.png").read_bytes().startswith(b"\x89PNG")
