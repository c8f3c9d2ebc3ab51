"""The project's vocabulary: the field's standard terms in names, comments, docstrings, messages and documents.

The table lists words that are always wrong here, with what to write instead. Identifiers are read word by word, so
`peer_rows` and `PeerRows` both contain "peer". A phrase is found across a line break, also inside a comment.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("pipeline", "model", "tools", "tests", "docker")
DOCUMENTS = (
    "*.md",
    "docs/*.md",
    "Makefile",
    "compose.yaml",
    "docker/*.yaml",
    "docs/clusters/*",
    "docker/Dockerfile",
    ".env.example",
)
SETTINGS = ("pyproject.toml", "CITATION.cff", ".pre-commit-config.yaml", ".github/workflows/*.yml")

# A regular expression over lower-case words (a space is any gap between two words), and what to write instead.
WORDS = {
    r"pictures?": "image",
    r"feeds?": "loader, data loader",
    r"weather": "background load",
    r"rivals?": "baseline, candidate",
    r"peers?": "baseline, candidate, partner rank",
    r"gr[ea]y(?: |-)levels?": "pixel values 0-255",
    r"roads?": "end-to-end run, path",
    r"st(?:ands?|anding|ood)(?: |-)in": "substitute",
    r"mend(?:s|ed|ing)?": "repair, replace",
    r"dear(?:er|est)?": "expensive",
    r"(?:un)?lit": "with PCA lighting noise, normalised",
    r"nobody(?:'?s)?": "no one, none",
    r"in flight": "pending",
    r"arriving": "pending",
    r"(?:made|announced) ahead": "prefetched, read-ahead",
    r"doctors?": "diagnosis",
    r"(?:the )?answer is no": "a check failed",
    r"wants": "requires, needs, must",
    r"au bar": "AU threshold",
    r"rooms": "modules",
    r"first use costs": "warm-up",
    r"kernel forgets?": "drops the pages from the page cache",
}

# Where a word above is right: (file, the exact text around the word). Everything else needs another word.
ALLOWED: tuple[tuple[str, str], ...] = (
    ("*", "feed_input"),  # a method of DALI's pipelines
    ("*", "feed_ndarray"),  # a function of DALI's torch plugin
    ("tests/pipeline/diagnosis/test_report.py", "checked.feed(text)"),  # a method of html.parser
    ("CHANGELOG.md", "--au-bar"),  # old names, which users have in their scripts
    ("CHANGELOG.md", "bench_peers"),
    ("CHANGELOG.md", "bench-peers"),
    ("CHANGELOG.md", "FeedSettings"),
    ("CHANGELOG.md", "tools/road.py"),
)

GAP = r"[\s#]+"
PATTERN = re.compile("|".join(rf"(?<![a-z])(?:{word.replace(' ', GAP)})(?![a-z])" for word in WORDS))


def texts() -> list[Path]:
    """Every file whose words count; this one lists them and so does not."""
    found = [path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py")]
    found += [path for pattern in (*DOCUMENTS, *SETTINGS) for path in ROOT.glob(pattern)]
    return sorted(path for path in found if path != Path(__file__))


def words_of(text: str) -> str:
    """Text as lower-case words on the same lines: identifiers are taken apart at underscores and capitals."""
    text = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", text)
    return text.replace("_", " ").lower()


def hits(text: str, name: str = "") -> list[tuple[int, str]]:
    """(line, word) of each wrong word in a text, except where ALLOWED has it for the file `name`."""
    for file, right in ALLOWED:
        if file in ("*", name):
            text = text.replace(right, "")
    words = words_of(text)
    return [(words.count("\n", 0, match.start()) + 1, match.group()) for match in PATTERN.finditer(words)]


@cache
def instead_of(word: str) -> str:
    """What to write for a word that was found."""
    spaced = re.sub(GAP, " ", word)
    return next(better for pattern, better in WORDS.items() if re.fullmatch(pattern, spaced))


def test_no_text_has_a_word_of_the_list():
    """Names, comments, docstrings, messages and documents; each finding is file:line: word -> what to write."""
    found = [
        f"{path.relative_to(ROOT)}:{line}: {word!r} -> {instead_of(word)}"
        for path in texts()
        for line, word in hits(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))
    ]
    assert not found, f"{len(found)} words of the list:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "a Picture",
        "peer_rows",
        "GREY_LEVELS",
        "class FeedSettings:",
        "stands\n    #   in",
        "nobody's",
        "`lit`",
        "unlit",
    ],
)
def test_a_wrong_word_is_found(text: str):
    """The instrument itself: any case, identifiers, and phrases over line breaks."""
    ((line, word),) = hits(f"first line\n{text}\n")
    assert instead_of(word) and line == 2


@pytest.mark.parametrize("text", ["speed", "feedback", "pipe.feed_input(x)", "split", "amend", "broad", "standing on"])
def test_an_ordinary_word_is_left_alone(text: str):
    assert not hits(text)
