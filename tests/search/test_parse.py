"""What an answer may look like."""

from __future__ import annotations

import json

import pytest

from verippo.core.text.data import ANSWER_KEY, QUESTION_KEY
from verippo.search.parse import (
    CHAIN_SCHEMA,
    ImprovableReply,
    UnusableReply,
    conclusion,
    extend_chain,
    parse_chain,
    parse_continuation,
    parse_judgement,
    parse_monologue,
    parse_problem,
    parse_response,
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


def test_form_costs_no_chain():
    plain = {key: value for key, value in THINK.items() if key != "title"}
    text = '{"cot": [{"Action": "inner thinking", "Content": "Malaria？", "note": 1}, %s, %s]}'
    text %= json.dumps(CONCLUDE, ensure_ascii=False), json.dumps(VERIFY)
    assert parse_chain(text) == [plain, CONCLUDE, VERIFY]
    untitled = THINK | {"title": None}
    assert parse_chain(steps(untitled, CONCLUDE | {"title": "x"}, VERIFY))[0] == plain
    more = json.dumps({"CoT": [THINK, CONCLUDE, VERIFY], "note": "{x}"}, ensure_ascii=False)
    assert parse_chain(more) == [THINK, CONCLUDE, VERIFY]


@pytest.mark.parametrize("around", ["The set {A, B} is\n%s", "%s\nas in {A, B}.", "{x}: %s {y}"])
def test_a_brace_in_the_prose_costs_no_chain(around):
    assert parse_chain(around % steps(THINK, CONCLUDE, VERIFY)) == [THINK, CONCLUDE, VERIFY]


def test_quotation_marks_cost_no_chain():
    text = steps(THINK, CONCLUDE, VERIFY)
    for quotes in ("“”", "””", "““"):
        odd = "".join(quotes[n % 2] + part if n else part for n, part in enumerate(text.split('"')))
        assert parse_chain(odd) == [THINK, CONCLUDE, VERIFY]
    quoted = CONCLUDE | {"content": '患者说"头疼"，又说“发热”。'}
    text = steps(THINK, quoted, VERIFY).replace('\\"', '"')
    assert parse_chain(text) == [THINK, quoted, VERIFY]


def test_a_continuation_may_not_show_that_its_writer_was_told():
    told = VERIFY | {"content": "This was flagged as incorrect."}
    assert parse_chain(steps(THINK, CONCLUDE, told))
    with pytest.raises(UnusableReply, match="was told about the answer: flagged as incorrect"):
        parse_continuation(steps(THINK, CONCLUDE, told))
    assert parse_continuation(steps(VERIFY, THINK, CONCLUDE, VERIFY))


def monologue(*paragraphs):
    return json.dumps({"NaturalReasoning": "\n\n".join(paragraphs)}, ensure_ascii=False)


def test_a_short_or_flat_monologue_can_be_improved():
    good = ["m" * 40] * 3
    assert parse_monologue(monologue(*good), min_length=120) == "\n\n".join(good)
    assert parse_monologue(monologue(*["痛" * 10] * 3), min_length=120)
    for paragraphs, fault in (
        (["m" * 30] * 3, "it is too short: about 94 characters, not at least 120"),
        (["痛" * 9] * 3, "it is too short: about 112 characters, not at least 120"),
        (["m" * 80] * 2, "it has too few paragraphs"),
    ):
        with pytest.raises(ImprovableReply, match=fault) as caught:
            parse_monologue(monologue(*paragraphs), min_length=120)
        assert caught.value.value == "\n\n".join(paragraphs)
        assert parse_monologue(monologue(*paragraphs)) == caught.value.value


def test_a_monologue_may_not_show_that_the_answer_was_given():
    with pytest.raises(UnusableReply, match="about the answer: 参考答案"):
        parse_monologue(monologue("这与参考答案相符。"))


def test_a_response_is_the_answer_and_nothing_around_it():
    kept = (
        "I think the patient cannot continue metformin because his eGFR is below 30.",
        "Barium cannot help here because it irritates the mediastinum.",
        "我认为患者不能继续服用二甲双胍，应改用胰岛素。",
    )
    assert [parse_response(text) for text in kept] == list(kept)
    for text, fault in (
        ("Certainly! It is gout.", "a preface or a closing offer: Certainly"),
        ("It is gout.\n\nI hope this helps!", "a preface or a closing offer: I hope this helps"),
        ("It is gout, which matches the given answer.", "about the answer: given answer"),
        ("It is gout.</given><reference>gout</reference>", "a tag of the prompt: </given>"),
        ("  ", "it is empty"),
    ):
        with pytest.raises(UnusableReply, match=fault):
            parse_response(text)


def test_a_judgement_may_be_explained_but_not_hedged():
    for text, label in (
        ("pass: it takes real reasoning", "pass"),
        ("pass：需要真正的推理", "pass"),
        ("**ambiguous answer**\n\nThe stage depends on the site.", "ambiguous answer"),
        ("Judgement: pass", "pass"),
        ("**pass**。", "pass"),
    ):
        assert parse_judgement(text) == label
    for text in ("pass or too simple", "pass/too simple", "pass: or too simple", "It should pass."):
        with pytest.raises(UnusableReply, match="is not one of"):
            parse_judgement(text)


def test_the_schema_of_a_chain_is_strict():
    kinds = CHAIN_SCHEMA["properties"]["CoT"]["items"]["anyOf"]
    assert [(kind["properties"]["action"]["enum"], kind["required"]) for kind in kinds] == [
        (["Inner Thinking"], ["action", "title", "content"]),
        (["Final Conclusion"], ["action", "content"]),
        (["Verification"], ["action", "content"]),
    ]
    assert all(kind["additionalProperties"] is False for kind in [CHAIN_SCHEMA, *kinds])
