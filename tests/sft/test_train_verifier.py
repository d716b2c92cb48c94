"""Verifier training: what rows are made of, honest held-out numbers, and a model that learns to
compare."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from verippo.core.llm.client import LLMConfig
from verippo.core.training.engine import EngineConfig
from verippo.rl.verifier import ClassifierVerifier
from verippo.sft.config import VerifierTrainingConfig
from verippo.sft.conversations import AnswerColumns
from verippo.sft.train_verifier import calibration, train
from verippo.sft.verifier_examples import from_question, load_answers

QUESTION = {
    "question": "q",
    "options": {"A": "Aspirin", "B": "Heparin", "C": "Warfarin"},
    "answer_idx": "B",
}


def load(path: Path, rows: list[dict[str, Any]]) -> Any:
    path.write_text(json.dumps(rows))
    return load_answers(str(path), limit=None, seed=0, wrong_per_question=1)


def test_an_exam_question_gives_right_and_wrong_options_in_the_same_phrasings() -> None:
    answers = from_question(QUESTION, where="", rng=random.Random(0), num_wrong=2)
    assert [answer.label for answer in answers] == [False, True, False, True]
    assert {answer.reference for answer in answers} == {"Heparin"}
    for answer in answers:
        assert ("heparin" in answer.response.lower()) == answer.label


def test_every_kind_of_row_is_read_and_counted(tmp_path: Path) -> None:
    good = "## Thinking\n\nx\n\n## Final Response\n\nHeparin"
    rows = [
        {"response": "a", "reference": "b", "label": 0},
        QUESTION,
        {
            "Ground-True Answer": "Heparin",
            "trajectory": [
                {"conclusion": "Aspirin", "verdict": False},
                {"conclusion": "?", "verdict": "unparsed"},
            ],
        },
        {"response": good, "answer": "Heparin", "judge": True},
        {"response": "no format", "answer": "Heparin", "judge": True},
    ]
    answers, kinds = load(tmp_path / "rows.json", rows)
    assert kinds == {"labelled": 1, "exam question": 1, "search record": 1, "judged rollout": 2}
    assert [(answer.row, answer.label) for answer in answers] == [
        (0, False),
        (1, False),
        (1, True),
        (2, False),
        (3, True),
    ]
    assert answers[-1].response == "Heparin"


def test_other_columns_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(
        json.dumps([{"reply": "a", "answer": "b", "correct": False, "label": "category"}])
    )
    columns = AnswerColumns(response="reply", reference="answer", label="correct")
    options: dict[str, Any] = {"limit": None, "seed": 0, "wrong_per_question": 1}
    (answer,), _ = load_answers(str(tmp_path / "rows.json"), columns=columns, **options)
    assert (answer.response, answer.reference, answer.label) == ("a", "b", False)
    columns = AnswerColumns(response="reply", reference="gold", label="correct")
    with pytest.raises(ValueError, match="row 0: .*gold"):
        load_answers(str(tmp_path / "rows.json"), columns=columns, **options)


def test_prompt_and_completion_are_texts_or_turns(tmp_path: Path) -> None:
    question = {"role": "user", "content": "Which thinner?"}
    formatted = "## Thinking\n\nx\n\n## Final Response\n\nHeparin"
    both = {"label": True, "reference": "Heparin"}
    rows = [
        {"prompt": "Which thinner?", "completion": "Heparin", **both},
        {"prompt": [question], "completion": [{"role": "assistant", "content": "Heparin"}], **both},
        {"prompt": "Which thinner?", "completion": formatted, **both},
    ]
    answers, kinds = load(tmp_path / "rows.json", rows)
    assert kinds == {"labelled": 3}
    assert {(a.response, a.reference, a.label) for a in answers} == {("Heparin", "Heparin", True)}
    with pytest.raises(ValueError, match="row 0: .*reference"):
        load(tmp_path / "rows.json", [{"prompt": "q", "completion": "a", "label": True}])
    asked = []
    unlabelled = [{k: v for k, v in row.items() if k != "label"} for row in rows[:2]]
    (tmp_path / "rows.json").write_text(json.dumps(unlabelled))
    load_answers(
        str(tmp_path / "rows.json"),
        limit=None,
        seed=0,
        wrong_per_question=1,
        judge=lambda cases: asked.extend(cases) or [True, True],
    )
    assert {(c.question, c.response) for c in asked} == {("Which thinner?", "Heparin")}


def test_rows_without_a_label_are_judged_by_an_llm_once(
    llm_server: Any,
    make_model: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    next_commands: Callable[[Path], list[str]],
) -> None:
    rollout = {
        "prompt": "Which thinner?",
        "response": "## Thinking\n\nx\n\n## Final Response\n\nUFH",
        "answer": "Heparin",
    }
    rows = [
        rollout,
        {"response": "Aspirin", "reference": "Heparin"},
        {"response": "Gout", "reference": "Gout", "label": True},
        rollout | {"response": "no format"},
        {"response": "Heparin i.v.", "reference": "Heparin", "question": "q"},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    server = llm_server(
        lambda body: "False" if "Aspirin" in body["messages"][0]["content"] else "True"
    )
    config = VerifierTrainingConfig(
        model=str(make_model("llama", seed=71)),
        data=str(tmp_path / "rows.json"),
        output=str(tmp_path / "out"),
        max_steps=1,
        batch_size=4,
        max_seq_len=128,
        max_tokens_per_gpu=256,
        dtype="fp32",
        zero_stage=0,
        gradient_checkpointing=False,
        log_to="jsonl",
        llm=LLMConfig(base_url=server.url, model="m"),
    )
    train(config, resolved={})
    assert "1 labelled rows" in (said := capsys.readouterr().out)
    assert "4 unlabelled rows" in said
    assert "4 answers, 3 right" in said
    asked = [body["messages"][0]["content"] for body in server.bodies]
    assert len(asked) == 3
    assert sum("Which thinner?" in text and "UFH" in text for text in asked) == 1
    train(config, resolved={})
    assert len(server.bodies) == 3
    (command,) = next_commands(tmp_path / "out")
    assert f"ppo --policy runs/sft/model --verifier.model {tmp_path}/out/model" in command


def test_rows_on_which_no_verdict_is_to_be_had_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [{"response": text, "reference": "Heparin"} for text in ("Heparin", "x", "Aspirin")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    answers, kinds = load_answers(
        str(tmp_path / "rows.json"),
        limit=None,
        seed=0,
        wrong_per_question=1,
        judge=lambda cases: [True, None, False],
    )
    assert [(answer.row, answer.response, answer.label) for answer in answers] == [
        (0, "Heparin", True),
        (2, "Aspirin", False),
    ]
    assert kinds == {"unlabelled": 3, "unjudged (left out)": 1}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"response": "a", "reference": "b", "label": "yes"}, "row 0: label is 'yes'"),
        ({"response": "", "reference": "b", "label": 1}, "row 0: 'response' is empty"),
        ({**QUESTION, "answer_idx": "E"}, "row 0: answer_idx 'E' is not among"),
        (
            {**QUESTION, "options": {"B": "x", "C": "x"}},
            "row 0: its options are blank or all alike",
        ),
        ({**QUESTION, "answer_idx": ["B"]}, "row 0: answer_idx .* is not among"),
        (
            {**QUESTION, "options": {"B": "x", "C": None}},
            "row 0: its options are blank or all alike",
        ),
        ({"Ground-True Answer": "x", "trajectory": None}, "row 0: its trajectory is not a list"),
        ({"Ground-True Answer": "x", "trajectory": ["x"]}, "row 0: its trajectory is not a list"),
        ({"text": "x"}, "row 0: has text; needs response"),
        ({"response": "a", "reference": "b"}, "give llm.model to have rows without a label judged"),
    ],
)
def test_a_bad_row_is_refused_by_its_number(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load(tmp_path / "rows.json", [row])


def test_calibration_counts_by_hand() -> None:
    p = torch.tensor([0.05, 0.35, 0.45, 0.95, 0.92, 0.15], dtype=torch.float64)
    labels = torch.tensor([0, 1, 0, 1, 1, 0])
    report = calibration(p, labels, 0.4)  # says right: 0.45 (wrongly), 0.95, 0.92; misses 0.35
    values = {name: rate["value"] for name, rate in report.items() if isinstance(rate, dict)}
    assert values == {
        "accuracy": 4 / 6,
        "precision": 2 / 3,
        "recall": 2 / 3,
        "false_positive_rate": 1 / 3,
        "false_negative_rate": 1 / 3,
    }
    top = report["curve"][-1]
    assert (top["bin_low"], top["num"], top["share_right"]) == (0.9, 2, 1.0)
    assert top["mean_predicted"] == pytest.approx(0.935)
    assert [row["accuracy"] for row in report["thresholds"] if row["threshold"] in (0.3, 0.5)] == [
        5 / 6,
        5 / 6,
    ]
    # Wilson interval of 4 in 6, by hand: centre (4 + 1.9208) / (6 + 3.8415), half width 1.96 sqrt(4
    # * 2 / 6 + 0.9604) / 9.8415
    assert report["accuracy"]["low"] == pytest.approx(0.3000, abs=1e-4)
    assert report["accuracy"]["high"] == pytest.approx(0.9032, abs=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_it_learns_to_tell_right_from_wrong_and_ppo_reads_it(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    words = ["Aspirin", "Heparin", "Insulin"]
    rows = [
        {"response": a, "reference": "Heparin", "label": a == "Heparin"}
        for a in words
        for _ in range(8)
    ]
    data, template = tmp_path / "rows.json", tmp_path / "template.txt"
    data.write_text(json.dumps(rows))
    template.write_text("{response} ? {reference} :")
    train(
        VerifierTrainingConfig(
            model=str(make_model()),
            data=str(data),
            eval_data=str(data),
            template=str(template),
            output=str(tmp_path / "run"),
            max_steps=30,
            batch_size=12,
            learning_rate=1e-2,
            eval_every=10,
            dtype="fp32",
            gradient_checkpointing=False,
            max_seq_len=64,
            max_tokens_per_gpu=256,
            log_to="jsonl",
        ),
        resolved={},
    )
    report = json.loads((tmp_path / "run" / "model" / "calibration.json").read_text())
    assert report["accuracy"]["value"] == 1.0
    exported = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert exported["id2label"] == {"0": "wrong", "1": "right"}
    assert exported["label2id"] == {"wrong": 0, "right": 1}
    assert "nats per answer" in (tmp_path / "run" / "report.html").read_text()
    verifier = ClassifierVerifier.load(
        str(tmp_path / "run" / "model"),
        EngineConfig(zero_stage=0, dtype="fp32"),
        template=template.read_text(),
    )
    p = verifier.probabilities([("Heparin", "Heparin"), ("Aspirin", "Heparin")])
    assert p[0] > 0.9 > 0.1 > p[1]


@pytest.mark.filterwarnings("ignore")
def test_answers_of_one_question_are_held_out_together(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    from verippo.sft.finetune import train_and_eval_rows

    config = VerifierTrainingConfig(model="m", data="d", output="o", eval_fraction=0.25)
    rows = [(question, n) for question in range(12) for n in range(4)]
    train_rows, eval_rows = train_and_eval_rows(
        config, lambda _: rows, lambda _: 1, lambda row: row[0]
    )
    assert {row[0] for row in train_rows} | {row[0] for row in eval_rows} == set(range(12))
    assert not {row[0] for row in train_rows} & {row[0] for row in eval_rows}
    assert len(eval_rows) == 12
