"""What is known of Claude's versions, by the names that they have at Anthropic, on Bedrock and elsewhere."""

from __future__ import annotations

import pytest

from providers.claude import BUDGET_MIN, adaptive, budget_of, claude_version, effort_of, fixed_sampling, prefills
from providers.codec import BadRequest

VERSIONS = {
    "claude-sonnet-4-6": (4, 6),
    "claude-haiku-4-5-20251001": (4, 5),
    "claude-opus-4-20250514": (4, 0),
    "claude-3-5-haiku-20241022": (3, 5),
    "anthropic/claude-opus-4.6": (4, 6),
    "claude-sonnet-5": (5, 0),
    "claude-fable-5-1": (5, 1),
    "claude-mythos-preview": (99, 0),
    "us.anthropic.claude-3-7-sonnet-20250219-v1:0": (3, 7),
    "global.anthropic.claude-opus-4-6-v1": (4, 6),
    "anthropic.claude-opus-5": (5, 0),
    "anthropic.claude-sonnet-4-20250514-v1:0": (4, 0),
    "arn:aws:bedrock:us-east-1:1:inference-profile/us.anthropic.claude-haiku-4-5-v1:0": (4, 5),
    "anthropic.claude-new": (99, 0),
    "kimi-k2": (0, 0),
    "openai.gpt-oss-120b-1:0": (0, 0),
    "us.meta.llama3-3-70b-instruct-v1:0": (0, 0),
    "arn:aws:bedrock:us-east-1:1:application-inference-profile/abc": (0, 0),
}


@pytest.mark.parametrize("model", VERSIONS)
def test_versions_are_read_from_names(model: str) -> None:
    assert claude_version(model) == VERSIONS[model]


@pytest.mark.parametrize(
    ("version", "thinks_by_effort", "samples_by_default_only", "goes_on"),
    [
        ((0, 0), False, False, True),
        ((4, 5), False, False, True),
        ((4, 6), True, False, False),
        ((4, 7), True, True, False),
        ((99, 0), True, True, False),
    ],
)
def test_a_version_tells_what_a_model_takes(
    version: tuple[int, int], thinks_by_effort: bool, samples_by_default_only: bool, goes_on: bool
) -> None:
    assert (adaptive(version, {}), fixed_sampling(version)) == (thinks_by_effort, samples_by_default_only)
    assert prefills(version) is goes_on
    assert adaptive(version, {"thinking": "adaptive"})
    assert not adaptive(version, {"thinking": "budget"})


def test_an_effort_that_nobody_knows_is_refused() -> None:
    assert (effort_of("minimal"), effort_of("xhigh")) == ("low", "xhigh")
    for asked in ("", "none", "huge"):
        with pytest.raises(BadRequest) as refused:
            effort_of(asked)
        assert refused.value.param == "reasoning_effort"


def test_a_budget_is_a_part_of_the_limit_and_leaves_room_for_an_answer() -> None:
    assert (budget_of("medium", 10_000), budget_of("low", 2_000)) == (5_000, BUDGET_MIN)
    assert (budget_of("max", BUDGET_MIN + 1), budget_of("max", BUDGET_MIN)) == (BUDGET_MIN, None)
