"""The funnel from exam questions to verifiable problems, against a scripted model."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from verippo.core.llm.client import LLMConfig
from verippo.core.text.data import ANSWER_KEY, QUESTION_KEY, load_problems
from verippo.search.config import ProblemsConfig
from verippo.search.problems import ASKS_FOR_FALSE, STANDS_FOR_SEVERAL, as_problem, exam_question

TOPICS = ["tuberculosis", "malaria", "scurvy", "cholera", "gout", "mumps", "rabies", "measles"]
SHARED = (
    "He has been coughing blood for eleven long weeks and sleeps badly at night."  # 75 characters
)


def exam(
    number, *, text=None, options=("Aspirin", "Heparin", "Insulin", "Digoxin"), letter="B", **extra
):
    """A question of at least 100 characters that names its number."""
    question = (
        text
        or f"Case {number}: a patient comes with {TOPICS[number % 8]} and has had a fever since the last full moon."
    )
    question += " Which of the following drugs is the best choice for this patient?"
    return {
        "question": question,
        "options": dict(zip("ABCD", options, strict=True)),
        "answer_idx": letter,
    } | extra


class Examiner:
    """Judges by `judgements` (number of the question -> label, else pass), rewrites as asked;
    `small` answers rightly."""

    def __init__(self, judgements=None, rewrites=None):
        self.judgements, self.rewrites = judgements or {}, rewrites or {}
        self.log = Counter()
        self.prompts = []

    def __call__(self, body):
        prompt = body["messages"][0]["content"]
        self.prompts.append(prompt)
        number = int(re.search(r"Case (\d+)", prompt)[1])
        if prompt.startswith(("A medical examination", "一道医学考试题")):
            self.log["choice", body["model"]] += 1
            right = re.search(r"^([A-D])\. Heparin$", prompt, re.MULTILINE)[1]
            knows = body["model"] == "knows" or (body["model"] == "knows even" and number % 2 == 0)
            return right if knows else "ABCD"["ABCD".index(right) - 1]
        if prompt.startswith(("An examination question", "有一道考试题")):
            self.log["judge", body["model"]] += 1
            return self.judgements.get(number, "pass")
        self.log["rewrite", body["model"]] += 1
        return self.rewrites.get(number) or json.dumps(
            {QUESTION_KEY: f"Open case {number}?", ANSWER_KEY: "Heparin"}
        )


def funnel(folder):
    """step -> (in, dropped, failed, unreached, out), as report.md says."""
    text = (folder / "report.md").read_text().split("## Funnel")[1].split("##")[0]
    rows = [
        [cell.strip() for cell in line.strip("| \n").split("|")]
        for line in text.strip().splitlines()[2:]
    ]
    return {row[0]: tuple(map(int, row[1:])) for row in rows}


def models(*servers):
    return json.dumps([{"model": name, "base_url": server.url} for name, server in servers])


def test_the_funnel_worked_by_hand(llm_server, command, scripted, tmp_path):
    rows = [
        exam(0, id="zero"),
        exam(
            0, options=("Heparin", "Aspirin", "Insulin", "Digoxin"), letter="A"
        ),  # a duplicate: same options
        {**exam(1), "question": "Case 1: <b>short</b> | ?"},
        exam(
            2,
            text="Case 2: all of the following drugs were given to this patient, except for one that was not. NOT",
        ),
        exam(3, options=("Aspirin", "All of the above", "Insulin", "Digoxin")),
        exam(4, text=f"Case 4: {SHARED.upper()}  "),
        exam(6),  # both small models know it
        exam(7),
        exam(9),
        exam(11),
        exam(13),
        exam(15),
        exam(17),
        exam(19),
        exam(21),
    ]
    examiner = Examiner(
        {7: "too simple", 9: "Ambiguous answer.", 11: "not reformulatable", 13: "does not pass"},
        {
            15: "no JSON",
            17: json.dumps({QUESTION_KEY: f"Open case 17? {SHARED}", ANSWER_KEY: "Heparin"}),
        },
    )
    server = llm_server(examiner)
    evaluation = [tmp_path / "eval1.json", tmp_path / "eval2.json"]
    evaluation[0].write_text(
        json.dumps({"MedQA": [{"question": f"A man. {SHARED} Why?", "options": {"A": "x"}}]})
    )
    evaluation[1].write_text(json.dumps([{QUESTION_KEY: "Nothing in common."}]))
    folder = command(
        "problems",
        rows,
        server,
        decontaminate=f"{evaluation[0]},{evaluation[1]}",
        split=0.34,
        **{"difficulty.models": models(("knows", server), ("knows even", server))},
    )
    assert funnel(folder) == {
        "duplicates": (15, 1, 0, 0, 14),
        "length": (14, 1, 0, 0, 13),
        "one right option": (13, 2, 0, 0, 11),
        "absent picture": (11, 0, 0, 0, 11),
        "contaminated question": (11, 1, 0, 0, 10),
        "difficulty": (10, 2, 0, 0, 8),
        "judgement": (8, 3, 1, 0, 4),
        "rewriting": (4, 0, 1, 0, 3),
        "contaminated problem": (3, 1, 0, 0, 2),
    }
    records = scripted.load(folder, "problems.json")
    assert records == [
        exam(19) | {QUESTION_KEY: "Open case 19?", ANSWER_KEY: "Heparin"},
        exam(21) | {QUESTION_KEY: "Open case 21?", ANSWER_KEY: "Heparin"},
    ]
    halves = [scripted.load(folder, f"problems_{half}.json") for half in ("search", "rl")]
    assert [len(half) for half in halves] == [1, 1]
    assert sorted(map(json.dumps, halves[0] + halves[1])) == sorted(map(json.dumps, records))
    report = (folder / "report.md").read_text()
    for line in (
        "| judgement: dropped | too simple | 1 | Case 7: a patient",
        "| judgement: dropped | ambiguous answer | 1 |",
        "| judgement: failed | judge: it is not one of",
        "| rewriting: failed | rewrite: it holds no JSON object (3 asks) | 1 |",
        "| length: dropped | shorter than 100 characters | 1 | Case 1: <b>short</b> \\| ? |",
    ):
        assert line in report
    page = (folder / "report.html").read_text()
    assert "<h2>Funnel</h2>" in page
    assert "Case 1: &lt;b&gt;short&lt;/b&gt; | ?" in page
    assert [problem.answer for problem in load_problems(str(folder / "problems.json"))] == [
        "Heparin",
        "Heparin",
    ]
    # 10 questions reach the first small model, which knows all; then 10 the second
    assert examiner.log == {
        ("choice", "knows"): 10,
        ("choice", "knows even"): 10,
        ("judge", "scripted"): 7 + 3,
        ("rewrite", "scripted"): 3 + 3,
    }
    before = len(server.bodies)
    command(
        "problems",
        rows,
        server,
        decontaminate=f"{evaluation[0]},{evaluation[1]}",
        split=0.34,
        **{"difficulty.models": models(("knows", server), ("knows even", server))},
    )
    assert len(server.bodies) == before
    assert scripted.load(folder, "problems.json") == records


def test_a_small_model_that_fails_spares_the_others_the_question(llm_server, command):
    examiner = Examiner()
    server = llm_server(examiner)
    command(
        "problems",
        [exam(n) for n in range(8)],
        server,
        **{"difficulty.models": models(("fails", server), ("knows", server))},
        judge="false",
    )
    assert examiner.log == {("choice", "fails"): 8, ("rewrite", "scripted"): 8}


WAYS_TO_NAME_A_LETTER = [
    "{}",
    "**{}**",
    "({})",
    "{} Heparin",
    "{} - Heparin",
    "Option {}",
    "The correct option is {}.",
    "The correct answer is option {}",
    "The best choice is {}.",
    "I would choose {}.",
    "Letter: {}",
    "### {}",
    r"$\boxed{{{}}}$",
    '{{"answer": "{}"}}',
    "Answer:\n\n{}",
    "应选{}。",
    "选{}",
    "{}项",
    "<think>It is not insulin.</think>\n\n{}",
]


def test_the_difficulty_filter_reads_every_plain_way_to_name_a_letter(llm_server, command):
    class Talker(Examiner):
        def __call__(self, body):
            reply = super().__call__(body)
            if not body["messages"][0]["content"].startswith("A medical examination"):
                return reply
            number = int(re.search(r"Case (\d+)", body["messages"][0]["content"])[1])
            return WAYS_TO_NAME_A_LETTER[number].format(reply)

    server = llm_server(Talker())
    folder = command(
        "problems",
        [exam(n) for n in range(len(WAYS_TO_NAME_A_LETTER))],
        server,
        **{"difficulty.models": models(("knows", server))},
    )
    assert funnel(folder)["difficulty"] == (19, 19, 0, 0, 0)


def test_options_stand_in_another_order_for_each_question_and_model_and_in_the_same_when_run_again(
    llm_server, command
):
    seen = []
    for output in ("one", "two"):
        examiner = Examiner()
        server = llm_server(examiner)
        command(
            "problems",
            [exam(n) for n in range(40)],
            server,
            output=output,
            **{
                "difficulty.models": models(("knows", server), ("knows even", server)),
                "llm.concurrency": 1,
            },
        )
        choices = [
            prompt for prompt in examiner.prompts if prompt.startswith("A medical examination")
        ]
        seen.append(
            {
                (n, prompt.split("Reply")[0].split("patient?")[1].strip())
                for n, prompt in enumerate(sorted(choices))
            }
        )
        places = Counter(
            re.search(r"^([A-D])\. Heparin$", prompt, re.MULTILINE)[1] for prompt in choices
        )
        assert set(places) == set("ABCD")
        assert all(8 <= places[letter] <= 32 for letter in "ABCD")  # 80 asked
        for prompt in choices:
            assert sorted(re.findall(r"^[A-D]\. (\w+)$", prompt, re.MULTILINE)) == [
                "Aspirin",
                "Digoxin",
                "Heparin",
                "Insulin",
            ]
    assert seen[0] == seen[1]


def test_the_rl_half_takes_in_the_papers_share_of_unconverted_and_general_questions(
    llm_server, command, scripted, tmp_path
):
    rows = [exam(n) for n in range(40)]
    server = llm_server(Examiner())
    choice, general = tmp_path / "choice.json", tmp_path / "general.json"
    # half of this pool became problems; one is contaminated
    choice.write_text(
        json.dumps([exam(n) for n in range(20, 59)] + [exam(99, text=f"Case 99: {SHARED}")])
    )
    general.write_text(
        json.dumps(
            [
                {QUESTION_KEY: f"What is {n} times two?", ANSWER_KEY: str(2 * n), "question": None}
                for n in (0, 1, 2, 2, 1)
            ]
        )
    )
    evaluation = tmp_path / "eval.json"
    evaluation.write_text(json.dumps([{"question": SHARED}]))
    options = {"mix.choice": choice, "mix.general": general, "decontaminate": evaluation}
    folder = command("problems", rows, server, **options)
    search, rl = (scripted.load(folder, f"problems_{half}.json") for half in ("search", "rl"))
    assert len(search) == 20
    assert len(rl) == 20 + 4 + 3  # 0.2 of 20; 0.25 of 20 would be 5, but there are 3
    mixed = rl[20:24]
    assert {json.dumps(row["question"]) for row in mixed} <= {
        json.dumps(exam(n)["question"]) for n in range(40, 59)
    }
    for row in mixed:
        assert (
            row[QUESTION_KEY]
            == row["question"] + "\nA. Aspirin\nB. Heparin\nC. Insulin\nD. Digoxin"
        )
        assert row[ANSWER_KEY] == "B. Heparin"
    assert {row[ANSWER_KEY] for row in rl[24:]} == {"0", "2", "4"}
    report = (folder / "report.md").read_text()
    assert "| RL, choice (wanted 4, 19 of 40 could be drawn) | 4 |" in report
    assert "| RL, general (wanted 5, 3 of 5 could be drawn) | 3 |" in report
    other = command("problems", rows, server, seed=1, output="seed1", **options)
    assert scripted.load(other, "problems.json") == scripted.load(folder, "problems.json")
    assert scripted.load(other, "problems_search.json") != search


def test_published_exam_questions_go_through(shared, llm_server, command, scripted):
    def script(body):
        prompt = body["messages"][0]["content"]
        question = prompt.split("<question>\n")[1].split("\n</question>")[0]
        return (
            "pass"
            if prompt.startswith("An exam")
            else json.dumps({QUESTION_KEY: f"{question} Why?", ANSWER_KEY: "x"})
        )

    rows, server = (
        json.loads((shared / "data" / "medical_demo_198.json").read_text()),
        llm_server(script),
    )
    folder = command("problems", rows, server, **{"llm.concurrency": 32})
    table = funnel(folder)
    assert table["length"] == (198, 0, 0, 0, 198)
    assert table["one right option"] == (
        198,
        19,
        0,
        0,
        179,
    )  # 18 ask for the exception, one answer is "All of the above"
    assert table["absent picture"] == (179, 4, 0, 0, 175)
    assert table["contaminated problem"][4] == len(scripted.load(folder, "problems.json")) == 175
    # none of them is an evaluation item, but all of them are themselves
    again = command(
        "problems", rows, server, output="again", decontaminate=folder.parent / "rows.json"
    )
    assert funnel(again)["contaminated question"][4] == 0


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"options": ["a", "b"]}, "'options' is not an object"),
        ({"options": {"A": "a"}}, "'options' is not an object"),
        ({"answer_idx": "E"}, "answer_idx 'E' is not among the options A, B, C, D"),
        ({"question": " "}, "'question' is empty"),
    ],
)
def test_a_malformed_question_is_refused_before_any_call(change, complaint):
    with pytest.raises(ValueError, match=f"row 3: {complaint}"):
        exam_question(exam(0) | change, where="row 3")


def test_questions_that_ask_for_what_is_false_are_told_from_those_that_only_sound_so():
    for text in (
        "All are causes of shock, except",
        "Which is NOT a sign?",
        "Which drug is not indicated here?",
        "Which statement is false?",
        "Which one is least likely to help?",
        "下列哪项不正确？",
        "以下各项，除外哪项？",
    ):
        assert ASKS_FOR_FALSE.search(text), text
    for text in (
        "What is the false positive rate?",
        "He does not smoke. What is the diagnosis?",
        "下列哪项正确？",
        "Which drug, except for aspirin, helps?",
    ):
        assert not ASKS_FOR_FALSE.search(text), text
    for text in (
        "All of the above",
        "None of these",
        "A and B",
        "A, C & D",
        "Both of the above",
        "以上都对",
    ):
        assert STANDS_FOR_SEVERAL.search(text), text
    for text in ("All transretinoic acid", "Vitamin A and D", "A band", "Both kidneys"):
        assert not STANDS_FOR_SEVERAL.search(text), text


def test_questions_about_a_picture_leave_before_any_call(llm_server, command, scripted):
    shown = exam(1, text="Case 1: a patient comes with a rash. A photograph of the rash is shown.")
    chinese = exam(2, text="Case 2: 患者男性，６５岁，咳嗽三周，胸部X线片如图所示。")
    server = llm_server(Examiner())
    folder = command("problems", [exam(0), shown, chinese], server)
    assert funnel(folder)["absent picture"] == (3, 2, 0, 0, 1)
    assert "| absent picture: dropped | refers to a picture" in (folder / "report.md").read_text()
    assert len(scripted.load(folder, "problems.json")) == 1
    assert len(server.bodies) == 2
    judge = next(b["messages"][0]["content"] for b in server.bodies)
    assert "figure or table that its text does not contain" in judge


def test_a_chinese_question_is_measured_by_its_own_script(llm_server, command):
    text = "患者男性，发热三天伴寒战，血涂片见环状体，最可能的诊断是什么？Case 3"  # 28 characters and marks
    row = exam(3) | {"question": text}
    short = row | {"question": "发热的常见原因？Case 4"}
    folder = command("problems", [row, short], llm_server(Examiner()), language="zh")
    assert funnel(folder)["length"] == (2, 1, 0, 0, 1)


@pytest.mark.parametrize("field", ["decontaminate", "mix.choice", "mix.general"])
def test_a_missing_file_is_named_with_its_field(field, llm_server, command, capsys):
    with pytest.raises(SystemExit):
        command("problems", [exam(0)], llm_server(Examiner()), **{field: "none.json"})
    assert f"{field}: data none.json: no such file" in capsys.readouterr().err


def test_a_question_in_the_published_format_is_mixed_in_as_it_is():
    row = {QUESTION_KEY: "Q?", ANSWER_KEY: "A", "id": 1}
    assert as_problem(row, where="here") == row


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="split=1.5: must lie in 0..1"):
        ProblemsConfig(data="d", output="o", split=1.5, llm=LLMConfig(model="m"))
    with pytest.raises(ValueError, match="llm.model is not set"):
        ProblemsConfig(data="d", output="o")
