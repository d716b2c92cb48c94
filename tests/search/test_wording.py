"""Phrases that do not belong in a training text."""

from __future__ import annotations

import json

import pytest

from verippo.search.wording import (
    assistant_phrase,
    leaked_phrase,
    picture_phrase,
    text_length,
)

LEAKS = """
Since the correct answer is to continue the drug, I look for reasons.
All of this fits, which matches the given answer.
My conclusion was flagged as incorrect.
The reference answer points to sepsis.
I was told that this is wrong.
I've been told it is not gout.
As the answer provided is malaria, I think of mosquitoes.
The answer key says heparin.
The first idea was judged to be wrong.
Given that the previous conclusion is not right, I start again.
The answer is supposed to be scurvy.
The last conclusion was rejected, so I look elsewhere.
This agrees with the provided conclusion.
The ground truth is a pulmonary embolism.
They told me that the earlier answer is off.
The answer I was given is aspirin.
This is consistent with the stated answer.
既然正确答案是继续用药，那就要找理由。
这与给定答案一致。
我的结论被判为错误。
参考答案指向疟疾。
标准答案是阿司匹林。
我被告知结论不对。
题目给出的答案是肝素。
有人告诉我这不对。
上一个结论被认定为错误，需要重新考虑。
这与提供的答案相符。
答案已经给出，是肝素。
被标记为不正确。
"""
THOUGHTS = """
So the answer has to be malaria.
Wait, that can't be right, my first idea was wrong.
The patient was told to stop smoking.
She has been told that she has diabetes.
We're given a 45-year-old man with chest pain.
The test was judged to be negative, perhaps a false negative.
The answer to this lies in the liver.
Hmm, something is not right here.
所以答案应该是疟疾。
没有人告诉过我。
这些检查告诉我们病情很重。
我之前的想法是错的。
患者被告知需要手术。
"""
ASSISTANT = """
Here's a clear answer: it is gout.
As a large language model, I can say that it is gout.
Certainly! The most likely diagnosis is gout.
It is gout. I hope this helps!
It is gout. Let me know if you have any other questions.
It is gout. I'm happy to explain more.
Below is the answer to your question: gout.
当然可以！这是痛风。
您好，这是痛风。
以下是我的回答：痛风。
作为一个大语言模型，我认为是痛风。
这是痛风。希望这些信息对您有所帮助！
这是痛风。如有其他问题，请随时提问。
"""
ANSWERS = """
The patient cannot continue metformin, because his eGFR is below 30.
Sure signs of pregnancy are fetal heart tones.
Here the answer depends on the eGFR.
Sorry is not what the doctor should say.
The patient should return if questions about the dose come up.
我认为患者不能继续服用二甲双胍。
好转的标志是体温下降。
请随时监测血压。
"""
WITH_PICTURE = """
An x-ray of the chest is shown. Which of the following is the most likely diagnosis?
The findings shown in the image are typical of which disease?
A photograph of the rash is shown below. What is it?
Head MRI is performed (shown). What is the diagnosis?
The lesion has the look of Figure A. What is it?
Which of the boxes in the diagram below fits best?
She has the rash on her arm (see image). What is it?
患者胸部X线片如图所示，最可能的诊断是什么？
下图是某患者的CT，诊断是什么？
图中箭头所指的结构是什么？
见图，该病变是什么？
"""
WITHOUT_PICTURE = """
A chest x-ray shows an infiltrate. What is the diagnosis?
Laboratory values are ordered, as shown below: sodium 119. What is the diagnosis?
Her laboratory results are shown: sodium 110. What is the diagnosis?
What does this clinical picture suggest?
The drug was shown to be effective. Which one is it?
On gait examination, the patient exhibits foot drop. Which nerve is hurt?
心电图示ST段抬高，脑电图中可见尖波，诊断是什么？
患者试图站立时晕倒，影像提示占位。
"""


def lines(text):
    return text.strip().splitlines()


@pytest.mark.parametrize(
    ("find", "hits", "others"),
    [
        (leaked_phrase, LEAKS, THOUGHTS),
        (assistant_phrase, ASSISTANT, ANSWERS),
        (picture_phrase, WITH_PICTURE, WITHOUT_PICTURE),
    ],
)
def test_phrases_are_found_and_their_neighbours_are_not(find, hits, others):
    assert [line for line in lines(hits) if not find(line)] == []
    assert [line for line in lines(others) if find(line)] == []


def test_published_texts_are_nearly_free_of_the_phrases(shared):
    rows = json.loads((shared / "data" / "medical_demo_198.json").read_text())
    assert len(rows) == 198
    assert sum(bool(leaked_phrase(row["Complex_CoT"])) for row in rows) <= 1
    assert not any(leaked_phrase(row["Response"]) for row in rows)
    assert not any(assistant_phrase(row["Response"]) for row in rows)


def test_a_closing_offer_counts_in_the_last_lines_only():
    assert assistant_phrase("Feel free to move the joint.\n\nIt is gout.\n\nIt heals.") is None
    assert assistant_phrase("It is gout.\n\nIt heals.\n\nFeel free to ask more.") == "Feel free to"


def test_a_chinese_character_counts_as_four():
    assert text_length("gout 痛风。") == 5 + 8 + 1
