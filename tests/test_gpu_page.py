"""docs/gpu.md and README.md: every claim about a GPU has evidence, and README.md makes none that is not measured."""

from __future__ import annotations

import re

from tests.test_docs import FENCE, README, ROOT

OF_THE_CPU = ("two cores train the full network at 17 img/s",)  # figures beside the word GPU that are none of a GPU


def gpu_claims() -> dict[str, str]:
    """The claims of docs/gpu.md, with the evidence of each."""
    table = (ROOT / "docs/gpu.md").read_text().partition("| claim | evidence |")[2].splitlines()[2:]
    return dict(line.strip("| ").split(" | ") for line in table if line.startswith("|"))


def test_every_claim_about_a_gpu_has_one_kind_of_evidence():
    """A measurement names the GPU and its date."""
    for claim, evidence in gpu_claims().items():
        kinds = [r"proven on the CPU by `test_\w+`", r"measured on .+ \(\d{4}-\d\d-\d\d\)", "not yet measured"]
        assert sum(bool(re.search(rf"(?<!not yet )(?:{kind})", evidence)) for kind in kinds) == 1, claim


def claims_beyond_evidence(text: str, claims: dict[str, str]) -> list[str]:
    """Sentences and table rows of a document that claim what is not yet measured: the words of such a claim, or a
    figure of a GPU although nothing has been measured on one. What says that it is untested is no claim."""
    unmeasured = [claim for claim, evidence in claims.items() if "not yet measured" in evidence]
    measured = any(re.search(r"(?<!not yet )measured on ", evidence) for evidence in claims.values())
    sentences = re.split(r"(?<=[.:;])\s|\n\n|\n(?=[|#-])", FENCE.sub("", text))
    figure = re.compile(r"\d(?:[\d,.]*)\s*(?:img/s|%|ms|seconds|minutes|hours|times)", re.IGNORECASE)
    gpu = re.compile(r"\bGPUs?\b|\bCUDA\b|\bNCCL\b|\b[AH]\d00\b")
    found = []
    for sentence in (" ".join(each.split()) for each in sentences):
        if any(text in sentence for text in OF_THE_CPU):
            continue
        denied = re.search(r"\b(?:not|nothing|without|no|only)\b", sentence, re.IGNORECASE)
        if any(claim in sentence for claim in unmeasured) or (
            gpu.search(sentence) and figure.search(sentence) and not measured and not denied
        ):
            found.append(sentence)
    return found


def test_the_readme_claims_nothing_that_is_not_yet_measured():
    assert claims_beyond_evidence(README.read_text(), gpu_claims()) == []
    claims = {"throughput of training": "not yet measured"}
    for line in (
        "An H100 trains 9,000 img/s.",
        "| loader on one GPU | 3 times as fast |",
        "See the throughput of training.",
    ):
        assert len(claims_beyond_evidence(line, claims)) == 1, line
    assert claims_beyond_evidence("An H100 trains 9,000 img/s.", {"speed": "measured on H100 (2026-12-01)"}) == []
