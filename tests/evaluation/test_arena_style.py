"""Style features: markdown counted by hand, fenced code left out, differences of two answers both ways."""

from __future__ import annotations

import hashlib
import sys
import types

import numpy as np
import pytest

from rto.evaluation.arena_style import (
    APPROXIMATE,
    approximate_tokens,
    features,
    markdown_counts,
    style_difference,
    style_metadata,
    token_counter,
)

ANSWER = """\
# Title
## Part
##No header
 # Nor this
###### Deep
####### Too deep

1. one
  2. two
3.no item
- dash
* star
+ plus
   - inside
-no item
Some **bold** and **more bold**, __also__ and ** * ** and **not
here**, a_snake__case__name.

```python
# comment, no header
- no item
**kwargs = __init__
```
"""


def test_counts_by_hand():
    found = markdown_counts(ANSWER)
    assert found["header_count"] == {"h1": 1, "h2": 1, "h3": 0, "h4": 0, "h5": 0, "h6": 1}
    assert found["list_count"] == {"ordered": 2, "unordered": 4}
    assert found["bold_count"] == {"**": 3, "__": 2}  # "** and **" is one, across lines none is


def test_code_with_a_backtick_inside_stays_and_an_open_fence_too():
    assert markdown_counts("```\n# a `b`\n```")["header_count"]["h1"] == 1
    assert markdown_counts("```\n# never closed\n")["header_count"]["h1"] == 1
    assert markdown_counts("```\n# closed\n```")["header_count"]["h1"] == 0
    assert markdown_counts("``````\n# after an empty fence\n")["header_count"]["h1"] == 1


def test_what_is_fenced_is_taken_away_wherever_it_stands():
    """As the released code does: it replaces the text of the block, not the block."""
    assert markdown_counts("- item\n```- item\n```")["list_count"]["unordered"] == 0


def test_metadata_has_the_keys_in_the_order_that_scorers_rely_on():
    found = style_metadata("# A\n\n**b**", len)
    assert list(found) == ["token_len", "header_count", "list_count", "bold_count"]
    assert found["token_len"] == 10
    assert features(found) == (10.0, 1.0, 0.0, 1.0)


@pytest.mark.parametrize(
    "change", [{"token_len": "7"}, {"token_len": -1}, {"bold_count": {"**": None}}, {"list_count": True}]
)
def test_a_wrong_count_is_named(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        features(style_metadata("a", len) | change)


def test_current_differences_by_hand():
    """Tokens 300 against 100: 1/2. Headers 43 in 300 against 0: density 1/7, over 8/7: 1/8. Bold as dense: 0."""
    model, baseline = np.array([[300.0, 43, 0, 301]]), np.array([[100.0, 0, 0, 101]])
    z = style_difference(model, baseline, "current")
    assert z[0] == pytest.approx([1 / 2, (43 / 301) / (43 / 301 + 1), 0, 0])


def test_classic_differences_by_hand():
    model, baseline = np.array([[300.0, 3, 0, 0]]), np.array([[100.0, 1, 0, 4]])
    z = style_difference(model, baseline, "classic")
    assert z[0] == pytest.approx([200 / 401, 2 / 5, 0, -4 / 5])


@pytest.mark.parametrize("scoring", ["current", "classic"])
def test_differences_mirror_and_are_finite(scoring):
    rows = np.array([[0.0, 0, 0, 0], [1e4, 1e4, 1e4, 1e4], [1, 0, 0, 0], [0, 0, 3, 0]])
    model, baseline = np.repeat(rows, 4, axis=0), np.tile(rows, (4, 1))
    z = style_difference(model, baseline, scoring)
    assert np.isfinite(z).all() and np.abs(z).max() <= 1
    assert np.array_equal(z, -style_difference(baseline, model, scoring))
    assert not z[0].any()
    with pytest.raises(ValueError, match="feature rows"):
        style_difference(model, baseline[:3], scoring)


def test_the_approximate_counter():
    assert approximate_tokens("") == 0
    assert approximate_tokens("The cat sat.") == 4
    assert approximate_tokens("12345 characters\n\nx") == 2 + 2 + 1 + 1
    text = "It is a truth universally acknowledged, that a single man in possession of a good fortune. " * 20
    assert approximate_tokens(text) == pytest.approx(len(text) / 4.5, rel=0.25)


def test_tiktoken_is_used_only_when_its_tables_are_here(tmp_path, monkeypatch):
    """The stand-in is the library, not what is tested: whether it is asked."""
    asked = []
    library = types.ModuleType("tiktoken")

    def get_encoding(name):
        asked.append(name)
        return types.SimpleNamespace(encode=lambda text, disallowed_special: text.split())

    library.get_encoding = get_encoding
    monkeypatch.setitem(sys.modules, "tiktoken", library)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert token_counter("current") == (APPROXIMATE, approximate_tokens)
    assert not asked
    for scoring, encoding in (("current", "o200k_base"), ("classic", "cl100k_base")):
        address = f"https://openaipublic.blob.core.windows.net/encodings/{encoding}.tiktoken"
        (tmp_path / hashlib.sha1(address.encode()).hexdigest()).touch()
        name, count = token_counter(scoring)
        assert (name, count("two words")) == (encoding, 2)
    monkeypatch.setitem(sys.modules, "tiktoken", None)  # not installed
    assert token_counter("current")[0] == APPROXIMATE
