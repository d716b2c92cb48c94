"""The prompts, ours and a user's own."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import yaml

from verippo.core.text.data import ANSWER_KEY, QUESTION_KEY
from verippo.launch import cli
from verippo.search import templates
from verippo.search.templates import STRATEGY, VARIABLES, Prompts

FOUR = ["backtracking", "correction", "exploring_new_paths", "verification"]
FOLDER = Path(templates.__file__).parent / "prompts"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_each_language_has_every_prompt_and_the_four_strategies(language):
    prompts = Prompts(language)
    assert prompts.strategies == FOUR
    assert {path.name for path in (FOLDER / language).iterdir()} == {
        path.name for path in (FOLDER / "en").iterdir()
    }
    for name in [*VARIABLES, *(f"{STRATEGY}{strategy}" for strategy in FOUR)]:
        if name == STRATEGY:
            continue
        keys = VARIABLES[STRATEGY if name.startswith(STRATEGY) else name].split()
        values = {key: {"A": "«A»"} if key == "options" else f"«{key}»" for key in keys}
        text = prompts.render(name, **values)
        shown = {key for key in keys if f"«{'A' if key == 'options' else key}»" in text}
        assert shown == set(keys) - ({"question"} if name == "verdict" else set())
        assert "{{" not in text
        assert (re.search("[\u4e00-\u9fff]", text) is not None) == (language == "zh")


def test_values_are_text_whatever_they_look_like():
    text = Prompts("en").render("chain", question="{{ 7 * 7 }} <b> & {% endfor %} “quoted”，")
    assert "{{ 7 * 7 }} <b> & {% endfor %} “quoted”，" in text


def test_a_folder_overrides_by_name_and_adds_strategies(tmp_path, llm_server, command, scripted):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "verdict.jinja").write_text(
        "Compare {{ conclusion }} with {{ answer }} for {{ question }}."
    )
    (tmp_path / "own" / "strategy-analogy.jinja").write_text(
        '{% extends "_continue.jinja" %}{% block strategy %}Think of a similar case.{% endblock %}'
    )
    prompts = Prompts("en", str(tmp_path / "own"))
    assert prompts.strategies == ["analogy", *FOUR]
    assert (
        prompts.render("verdict", question="q", conclusion="c", answer="a")
        == "Compare c with a for q."
    )
    assert "Think of a similar case." in prompts.render("strategy-analogy", question="q", chain="c")
    assert "Work out the following" in prompts.render("chain", question="q")
    assert prompts.digest != Prompts("en").digest

    def script(body):
        prompt = body["messages"][0]["content"]
        if prompt.startswith("Compare"):
            return "False"
        return scripted.chain("no")

    folder = command(
        "search",
        [scripted.problem(n) for n in range(6)],
        llm_server(script),
        prompts=tmp_path / "own",
        label_guided="false",
    )
    drawn = {
        step["strategy"]
        for row in scripted.load(folder, "given_up.json")
        for step in row["trajectory"]
    }
    assert drawn == {"initial", "analogy", *FOUR}


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("verdikt.jinja", "x", "verdikt.jinja: overrides nothing: name it chain, label, verdict"),
        ("chain.jinja", "{{ problem }}", "chain.jinja: 'problem' is undefined"),
        ("chain.jinja", "one\n{% if %}", "line 2: Expected an expression"),
        ("strategy-x.jinja", '{% extends "_none.jinja" %}', "strategy-x.jinja: .*_none.jinja"),
        ("chain.jinja", '{% extends "chain.jinja" %}', "chain.jinja: maximum recursion depth"),
        ("chain.txt", "x", "holds no [*].jinja"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_before_any_call(name, text, complaint, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=complaint):
        Prompts("en", str(tmp_path))


def test_chinese_problems_and_search_keep_the_records_keys_and_full_width_punctuation(
    llm_server, doctor, command, scripted
):
    question, answer = (
        "病人，男，４５岁：“发热”三天（最高 39℃）……最可能的诊断是什么？",
        "疟疾（间日疟）；",
    )
    exam = {
        "question": question,
        "options": {"A": "流感", "B": answer},
        "answer_idx": "B",
        "answer": answer,
    }

    class Examiner(doctor):
        def __call__(self, body):
            prompt = body["messages"][0]["content"]
            kind = scripted.kind_of(prompt, scripted.OPENINGS)
            assert prompt.startswith(scripted.OPENINGS[kind][1])
            if kind == "judge":
                return "pass"
            if kind == "rewrite":
                return json.dumps(
                    {QUESTION_KEY: between(prompt, "question"), ANSWER_KEY: answer},
                    ensure_ascii=False,
                )
            return super().__call__(body)

    between = scripted.between
    server = llm_server(Examiner({question: answer}, {question: 2}))
    made = command("problems", [exam], server, language="zh", min_length=10, split=1.0)
    problems = scripted.load(made, "problems_search.json")
    assert problems == [exam | {QUESTION_KEY: question, ANSWER_KEY: answer}]
    folder = command("search", problems, server, language="zh", output="searched")
    (record,) = scripted.load(folder, "search.json")
    assert list(record) == [
        *exam,
        QUESTION_KEY,
        ANSWER_KEY,
        "Question",
        "Complex_CoT",
        "Response",
        "trajectory",
    ]
    assert (record["Question"], record["Response"]) == (question, f"It is {answer}.")
    assert f"\n\n{answer}\n\n" in record["Complex_CoT"]
    assert question in (folder / "search.json").read_text(encoding="utf-8")  # not as escapes
    assert [step["verdict"] for step in record["trajectory"][:-2]] == [False, False, True]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_continuation_is_asked_for_in_one_clear_form(language):
    text = Prompts(language).render("strategy-correction", question="q", chain="c")
    assert text.count('{"CoT": [') == 1
    assert re.findall('{"action": "([^"]+)"', text) == [
        "Verification",
        "Inner Thinking",
        "Final Conclusion",
        "Verification",
    ]
    assert not re.search(r"\.[A-Z]", text)  # no sentence is glued to the one before


def test_every_fault_is_known_in_chinese():
    named = set()
    for module in ("parse", "asker"):
        tree = ast.parse((FOLDER.parent / f"{module}.py").read_text(encoding="utf-8"))
        texts = (n.value for n in ast.walk(tree) if isinstance(n, ast.Constant))
        named |= {
            text
            for text in texts
            if isinstance(text, str)
            and re.match(r"(it|its|unparsed:|\{what\}|step) \S", text)
            and not text.startswith("step {number} (")
        }
    chinese = yaml.safe_load((FOLDER.parent / "faults_zh.yaml").read_text(encoding="utf-8"))
    assert named - set(chinese) == set()
    for fault, translation in chinese.items():
        fields = set(re.findall(r"\{(\w+)\}", translation))
        assert fields - {"least_chinese"} <= set(re.findall(r"\{(\w+)\}", fault))


@pytest.mark.parametrize(
    ("language", "opening", "reason"),
    [
        ("en", "Your earlier answer to this was:", "it is not the one word True or False"),
        ("zh", "你此前对这个要求的回答是：", "它不是单独一个词 True 或 False"),
    ],
)
def test_an_unclear_verdict_is_quoted_back_in_the_prompts_language(
    language, opening, reason, llm_server, doctor, command, scripted
):
    row = scripted.problem(0)
    model = doctor({row[QUESTION_KEY]: row[ANSWER_KEY]}, {row[QUESTION_KEY]: 0})
    model.faults = {"verdict": ["Rather true, I should say"], "chain": ["no object"]}
    server = llm_server(model)
    command("search", [row], server, language=language)
    again = [
        text for body in server.bodies if "<reply>" in (text := body["messages"][0]["content"])
    ]
    assert len(again) == 2  # the verdicts on the conclusion and on the final response
    assert all("Rather true, I should say" in text.split(opening)[1] for text in again)
    assert all(reason in text for text in again)


def test_a_template_runs_in_a_sandbox(tmp_path):
    (tmp_path / "chain.jinja").write_text("{{ question.__class__.__mro__ }}")
    with pytest.raises(ValueError, match="chain.jinja: access to attribute '__class__' of 'str'"):
        Prompts("en", str(tmp_path))
    (tmp_path / "chain.jinja").write_text("{% if question %}{{ question.__class__ }}{% endif %}")
    prompts = Prompts("en", str(tmp_path))
    assert prompts.render("verdict", question="", conclusion="c", answer="a")
    with pytest.raises(ValueError, match="chain.jinja: .*__class__"):
        prompts.render("chain", question="q").strip()


def test_one_among_several_is_no_right_answer():
    assert "one among several possibilities" in Prompts("en").render(
        "verdict", question="", conclusion="c", answer="a"
    )
    assert "几种可能之一" in Prompts("zh").render(
        "verdict", question="", conclusion="c", answer="a"
    )


def test_the_commands_explain_themselves(capsys):
    for name in ("problems", "search"):
        with pytest.raises(SystemExit) as caught:
            cli.main([name, "--help"])
        assert caught.value.code == 0
    out = capsys.readouterr().out
    for option in (
        "--llm.base_url",
        "--difficulty.models",
        "--mix.general_ratio",
        "--label_guided",
        "--retry_failed",
        "--split",
    ):
        assert option in out
