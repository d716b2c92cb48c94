"""The documents say what the code does: modules, metrics, examples and example rows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from verippo.core.text.data import load_problems, load_rows
from verippo.eval.questions import load_questions
from verippo.search.problems import exam_question
from verippo.sft.conversations import AnswerColumns, read_conversation
from verippo.sft.verifier_examples import load_answers

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PACKAGES = ("kernels", "core", "rl", "sft", "search", "eval", "launch")
SOURCES_OF_METRICS = [
    "rl/step_metrics.py",
    "rl/run.py",
    "rl/refill.py",
    "rl/weight_push.py",
    "sft/train.py",
    "sft/finetune.py",
]
NO_METRICS = {"prompt", "response", "answer", "verdict", "score", "split", "policy", "critic"}
NO_METRICS |= {"held_out"}  # a part of the checkpoint, like the two before


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_architecture_has_a_line_about_every_module_and_no_other():
    found, folder = set(), ""
    for line in read("docs/architecture.md").splitlines():
        if line.startswith("### "):
            folder = line.removeprefix("### ")
        elif match := re.match(r"- `(\w+\.py)`: \S", line):
            found.add(f"{folder}/{match[1]}")
    modules = {str(p.relative_to(ROOT)) for top in PACKAGES for p in (ROOT / top).rglob("*.py")}
    assert found == modules


def test_every_metric_is_explained():
    text = read("docs/metrics.md")
    keys = {
        key
        for name in SOURCES_OF_METRICS
        for key in re.findall(r'^\s+"([a-z_0-9]+)":', read(name), re.MULTILINE)
    }
    assert len(keys) > 30
    assert not {key for key in keys - NO_METRICS if f"`{key}`" not in text}


def test_the_example_of_the_api_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", read("docs/api.md"), re.DOTALL)
    exec(compile(code, "docs/api.md", "exec"), {})
    gradient = eval(capsys.readouterr().out.strip(), {"tensor": torch.tensor})
    assert gradient[[0, 1, 4]].tolist() == [0.0, 0.0, 0.0]
    assert (gradient[[2, 3]] < 0).all()  # the right answer becomes more likely
    assert (gradient[[5, 6]] > 0).all()


def test_every_import_of_the_api_page_exists():
    names = re.findall(r"`verippo\.([\w.]+)\.(\w+)", read("docs/api.md"))
    assert len(names) > 12
    for module, name in names:
        assert hasattr(__import__(f"verippo.{module}", fromlist=[name]), name), (module, name)


@pytest.fixture(scope="module")
def example_rows():
    """command -> its example rows"""
    rows, command = {}, ""
    for heading, row in re.findall(
        r"^### (\w+)$|```json\n(.*?)```", read("docs/data.md"), re.DOTALL | re.MULTILINE
    ):
        command = heading or command
        if row:
            rows.setdefault(command, []).append(json.loads(row))
    return rows


def test_the_example_rows_load(example_rows, tmp_path):
    def write(rows):
        path = tmp_path / "rows.json"
        path.write_text(json.dumps(rows))
        return str(path)

    assert set(example_rows) == {"problems", "search", "sft", "verifier", "eval"}
    assert exam_question(example_rows["problems"][0], where="row 0").answer == "Vitamin C"
    assert load_problems(write(example_rows["search"]))[0].answer == "Vitamin C"
    for row in load_rows(write(example_rows["sft"])):
        assert read_conversation(row, where="row 0").turns[-1]["role"] == "assistant"
    options = {"limit": None, "seed": 0, "wrong_per_question": 1}
    named = [row for row in example_rows["verifier"] if "reply" in row]
    plain = [row for row in example_rows["verifier"] if "reply" not in row]
    columns = AnswerColumns(response="reply", reference="gold", label="correct")
    answers = load_answers(write(plain), **options)[0]
    answers += load_answers(write(named), **options, columns=columns)[0]
    assert len(answers) == 4
    assert {(a.response, a.reference, a.label) for a in answers} == {
        ("It is vitamin C.", "Vitamin C", True)
    }
    (question,), _ = load_questions(write(example_rows["eval"][0]))
    assert question.options[question.gold] == "Vitamin C"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", *map(str, DOCS.glob("*.md"))])
def test_links_between_documents_lead_somewhere(name):
    path = ROOT / name
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target
