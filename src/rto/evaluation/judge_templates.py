"""What a judge is asked, and how its verdict is read: templates as data, built-in ones and users' own."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rto.evaluation.endpoint import digest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Verdict = Literal["A", "B", "tie"]
Labels = dict[str, tuple[str, ...]]

FIELDS = ("prompt", "answer_a", "answer_b")


@dataclass(frozen=True)
class Template:
    """``user`` holds ``{prompt}``, ``{answer_a}`` and ``{answer_b}``; an empty ``system`` sends no such message.

    ``labels``: for A, B and, where ties are allowed, tie, the texts that mean it. With ``whole_line`` a label counts
    only when nothing else stands on its line.
    """

    name: str
    system: str
    user: str
    labels: Labels
    whole_line: bool

    @property
    def hash(self) -> str:
        labels = {verdict: list(texts) for verdict, texts in self.labels.items()}
        return digest([self.system, self.user, labels, self.whole_line])

    def messages(self, prompt: str, answer_a: str, answer_b: str) -> list[dict[str, str]]:
        """The question to the judge. A is the answer shown first."""
        values = {"prompt": prompt, "answer_a": answer_a, "answer_b": answer_b}
        # In one pass: an answer may hold braces, or the name of a field.
        text = re.sub(r"\{(prompt|answer_a|answer_b)\}", lambda found: values[found[1]], self.user)
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": text}]

    def verdict(self, reply: str) -> Verdict | None:
        """What the reply says; None unless its labels are all of one verdict. Nothing is guessed.

        Thoughts that a judge shows before its reply (``<think>...</think>``) are no verdict. Marks of emphasis and
        quotes are left out and white space counts as one space; case does not count.
        """
        reply = re.sub(r"^\s*<think>.*?(</think>|\Z)", "", reply, count=1, flags=re.DOTALL)
        lines = [_plain(line) for line in reply.splitlines()]
        lines = [line.rstrip(" .") for line in lines] if self.whole_line else [" ".join(lines)]
        found = {
            verdict
            for verdict, texts in self.labels.items()
            for text in texts
            for line in lines
            if (line == _plain(text).rstrip(" .") if self.whole_line else _stands(_plain(text), line))
        }
        return found.pop() if len(found) == 1 else None  # type: ignore[return-value]


def load_template(name: str) -> Template:
    """A built-in template by its name, or a TOML file with ``system`` (may be left out), ``user``, ``labels``
    (``A``, ``B`` and perhaps ``tie``: a text or several) and ``whole_line`` (default true).

    Raises:
        ValueError: there is neither; the file lacks something or has a key that nothing reads.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"template {name!r}: neither a file nor one of {', '.join(TEMPLATES)}")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not TOML: {error}") from error
    if unknown := sorted(table.keys() - {"system", "user", "labels", "whole_line"}):
        raise ValueError(f"{path}: unknown key {unknown[0]!r}; known: system, user, labels, whole_line")
    system, user, whole_line = table.get("system", ""), table.get("user"), table.get("whole_line", True)
    if not isinstance(system, str) or not isinstance(user, str) or not isinstance(whole_line, bool):
        raise ValueError(f"{path}: user (and system) must be text, whole_line true or false")
    if absent := [field for field in FIELDS if f"{{{field}}}" not in user]:
        raise ValueError(f"{path}: user lacks {{{absent[0]}}}")
    return Template(path.stem, system, user, _labels(table.get("labels"), path), whole_line)


def _labels(table: Any, path: Path) -> Labels:
    if not isinstance(table, Mapping) or not {"A", "B"} <= table.keys() <= {"A", "B", "tie"}:
        raise ValueError(f"{path}: labels must have A and B, and may have tie")
    labels: Labels = {}
    for verdict, texts in table.items():
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and _plain(t) for t in texts):
            raise ValueError(f"{path}: labels.{verdict} must be a text or a list of texts")
        labels[verdict] = tuple(texts)
    every = [_plain(text) for texts in labels.values() for text in texts]
    if len(set(every)) < len(every):
        raise ValueError(f"{path}: two labels are the same but for case, quotes and spaces")
    return labels


def _plain(text: str) -> str:
    return " ".join(re.sub("[*_`\"'\u201c\u201d\u2018\u2019]", "", text).split()).casefold()


def _stands(label: str, text: str) -> bool:
    """Whether the label is there as a word of its own."""
    return re.search(rf"(?<!\w){re.escape(label)}(?!\w)", text) is not None


# The question of the RTO paper's appendix on evaluation by GPT-4 (arXiv 2404.18922, after Rafailov et al. 2023), in
# our words, and with a tie to choose.
_HELPFUL = """\
Below are two responses to one query to a chatbot. Decide which of them is more helpful to the person who asks.

Query:
{prompt}

Response A:
{answer_a}

Response B:
{answer_b}

First compare the two responses in one sentence and say which one you find more helpful, and why. Then write the \
verdict on a line of its own: A, B, or tie when they are equally helpful. Keep to this form:

Comparison: <one sentence>
More helpful: <A, B or tie>"""

_QUALITY_SYSTEM = """\
You are an impartial judge of two answers to a user's request. Look at correctness first, then at whether the answer \
does what was asked, completely and to the point. Neither the order of the answers nor their length may count by \
itself. Explain your judgment in a few sentences. End with the verdict, exactly one of [[A]] (the first answer is \
better), [[B]] (the second is better) and [[C]] (neither is better)."""

_QUALITY = """\
=== request ===
{prompt}

=== answer A ===
{answer_a}

=== answer B ===
{answer_b}

=== end of the answers ==="""

TEMPLATES = {
    "helpful": Template(
        "helpful",
        "",
        _HELPFUL,
        {
            "A": ("More helpful: A", "More helpful: Response A"),
            "B": ("More helpful: B", "More helpful: Response B"),
            "tie": ("More helpful: tie",),
        },
        whole_line=True,
    ),
    "quality": Template(
        "quality", _QUALITY_SYSTEM, _QUALITY, {"A": ("[[A]]",), "B": ("[[B]]",), "tie": ("[[C]]",)}, whole_line=False
    ),
}
