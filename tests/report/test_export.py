"""Tables as text, Markdown and LaTeX."""

from __future__ import annotations

import pytest

from rto.report.compared import score_against_kl, win_rates
from rto.report.export import escaped, render

HEADS, ROWS = ["policy", "score"], [["sft", "1.0"], ["my_rto", "-10.5"]]
NAN = float("nan")


def test_text_by_hand():
    assert render("text", HEADS, ROWS, "Scores") == "Scores:\npolicy  score\nsft       1.0\nmy_rto  -10.5"


def test_markdown_by_hand():
    lines = ["**Scores**", "", "| policy | score |", "| --- | ---: |", "| sft | 1.0 |", "| my_rto | -10.5 |"]
    assert render("markdown", HEADS, ROWS, "Scores") == "\n".join(lines)
    assert render("markdown", ["a"], [["x|y\nz"]]).splitlines()[-1] == r"| x\|y z |"


def test_latex_by_hand():
    lines = [r"\begin{table}", r"\centering", r"\caption{Scores}", r"\begin{tabular}{lr}", r"\toprule"]
    lines += [r"policy & score \\", r"\midrule", r"sft & 1.0 \\", r"my\_rto & -10.5 \\", r"\bottomrule"]
    assert render("latex", HEADS, ROWS, "Scores") == "\n".join([*lines, r"\end{tabular}", r"\end{table}"])


def test_every_special_character_of_latex_is_escaped():
    said = r"\textbackslash{}\&\%\$\#\_\{\}\textasciitilde{}\textasciicircum{}\textless{}\textgreater{}\textbar{}"
    assert escaped(r"\&%$#_{}~^<>|") == said
    assert escaped("a\nb") == "a b"


@pytest.mark.parametrize("form", ["text", "markdown", "latex"])
def test_a_row_of_another_width_is_refused(form):
    with pytest.raises(ValueError, match="1 cells and the table 2 columns"):
        render(form, HEADS, [["sft"]])
    assert render(form, HEADS, [])


def test_figures_take_missing_intervals_and_any_name():
    points = {"sft": ((0.0, NAN, NAN), (1.0, 0.5, 1.5)), "_a $b$": ((2.0, 2.5, 3.0), (2.0, 1.0, 3.0))}
    figure = score_against_kl(points)
    figure.canvas.draw()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["sft", r"a \$b\$"]
    bars = {
        "rto": {"win rate": (0.7, 0.6, 0.8), "length-controlled": (0.6, NAN, NAN)},
        "dpo": {"win rate": (0.5, 0.4, 0.6)},
    }
    figure = win_rates(bars, "wins against sft")
    figure.canvas.draw()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["win rate", "length-controlled"]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["rto", "dpo"]
