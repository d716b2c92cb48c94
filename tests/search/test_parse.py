"""What an answer may look like."""

from __future__ import annotations

import json

import pytest

from verippo.core.text.data import ANSWER_KEY, QUESTION_KEY
from verippo.search.parse import (
    CHAIN_SCHEMA,
    UnusableReply,
    conclusion,
    extend_chain,
    parse_chain,
    parse_judgement,
    parse_monologue,
    parse_problem,
    parse_text,
    parse_truth,
)

THINK = {"action": "Inner Thinking", "title": "Fever", "content": "Malaria？"}
CONCLUDE = {"action": "Final Conclusion", "content": "疟疾。"}
VERIFY = {"action": "Verification", "content": "It fits."}


def steps(*chain):
    return json.dumps({"CoT": chain}, ensure_ascii=False)


def test_a_chain_keeps_its_steps_and_its_full_width_punctuation():
    chain = parse_chain(steps(THINK, THINK, CONCLUDE, VERIFY))
    assert chain == [THINK, THINK, CONCLUDE, VERIFY]
    assert conclusion(chain) == "疟疾。"
    assert parse_chain(steps(THINK | {"content": "  Malaria？\n"}, CONCLUDE, VERIFY)) == [
        THINK,
        CONCLUDE,
        VERIFY,
    ]


def test_a_continuation_that_opens_with_a_verification_replaces_the_one_it_doubts():
    before, new = [THINK, CONCLUDE, VERIFY], [THINK | {"title": "Again"}, CONCLUDE, VERIFY]
    doubt = VERIFY | {"content": "Does it?"}
    assert extend_chain(before, [doubt, *new]) == [THINK, CONCLUDE, doubt, *new]
    assert extend_chain(before, new) == [THINK, CONCLUDE, VERIFY, *new]


def test_line_breaks_may_stand_unescaped_in_a_string():
    assert parse_monologue('{"NaturalReasoning": "Hmm.\nWait."}') == "Hmm.\nWait."


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "it is empty"),
        (" \n", "it is empty"),
        ("[]", "no JSON object"),
        ('["a"]', "no JSON object"),
        ('{"NaturalReasoning": "a"', "breaks off"),
        ('{"NaturalReasoning": "a', "breaks off"),
        ("{'a': 1}", "not valid"),
        ('```json\n{"NaturalReasoning": "a\n```', "breaks off"),
        ('{"NaturalReasoning": "a", "NaturalReasoning": "b"}', "a key twice"),
        ('{"NaturalReasoning": "a"} {"NaturalReasoning": "b"}', "more than one"),
        ('{"a": {}} {', "more than one"),
        ('{"NaturalReasoning": ["a"]}', "is not text"),
        ('{"NaturalReasoning": null}', "is not text"),
        ('{"NaturalReasoning": %s}' % ("9" * 5000), "is not text"),
        ("{" + '"a":{' * 100_000, "nested too deeply"),
        ('{"NaturalReasoning": "### Thinking"}', "holds the heading"),
        ("抱歉，我无法提供医疗建议。", "refuses"),
        ("I’m sorry, but I cannot assist with that request.", "refuses"),
        ("{}", "has the keys none"),
    ],
)
def test_what_is_not_one_whole_object_with_the_keys_is_a_fault(text, fault):
    with pytest.raises(UnusableReply, match=fault):
        parse_monologue(text)


def test_a_problem_has_exactly_its_two_keys():
    good = {QUESTION_KEY: "Why？", ANSWER_KEY: "So."}
    assert parse_problem(json.dumps(good)) == ("Why？", "So.")
    for bad in (
        {QUESTION_KEY: "Why?"},
        good | {"Explanation": "x"},
        {"Question": "Why?", ANSWER_KEY: "So."},
    ):
        with pytest.raises(UnusableReply, match="not exactly"):
            parse_problem(json.dumps(bad))


def test_a_judgement_is_one_of_four_and_the_whole_answer():
    good = ("pass", "PASS.", " **Too simple** ", "ambiguous_answer", '"not reformulatable"')
    assert list(map(parse_judgement, good)) == [
        "pass",
        "pass",
        "too simple",
        "ambiguous answer",
        "not reformulatable",
    ]
    for text in (
        "does not pass",
        "not pass",
        "pass or fail",
        "passed",
        "pass, too simple",
        "simple",
        "unreformulatable",
        "",
    ):
        with pytest.raises(UnusableReply):
            parse_judgement(text)


def test_a_verdict_is_one_whole_word():
    assert (parse_truth("True"), parse_truth("false."), parse_truth(" **TRUE** ")) == (
        True,
        False,
        True,
    )
    for text in (
        "untrue",
        "True or False",
        "not true",
        "It is true",
        "1",
        "",
        "yes, True",
        "true false",
    ):
        with pytest.raises(UnusableReply, match="unparsed"):
            parse_truth(text)


def test_a_response_may_be_sorry_but_may_not_refuse():
    kept = (
        "I'm sorry to hear of your pain. It cannot be gout.",
        "I am sure. It is gout; you cannot help it.",
        "Sorry?",
        "We cannot continue metformin at this eGFR.",
        "作为一种抗凝药，肝素不能继续使用。",
        "我们不能继续用药。",
    )
    assert [parse_text(text) for text in kept] == list(kept)
    for text in (
        "I'm sorry, I can't help with that.",
        "I cannot provide medical advice.",
        "As an AI, I am unable to answer.",
        "对不起，我不能回答这个问题。",
        "作为一个语言模型，我无法提供诊断。",
    ):
        with pytest.raises(UnusableReply, match="refuses"):
            parse_text(text)


def test_the_schema_of_a_chain_is_strict():
    kinds = CHAIN_SCHEMA["properties"]["CoT"]["items"]["anyOf"]
    assert [(kind["properties"]["action"]["enum"], kind["required"]) for kind in kinds] == [
        (["Inner Thinking"], ["action", "title", "content"]),
        (["Final Conclusion"], ["action", "content"]),
        (["Verification"], ["action", "content"]),
    ]
    assert all(kind["additionalProperties"] is False for kind in [CHAIN_SCHEMA, *kinds])
