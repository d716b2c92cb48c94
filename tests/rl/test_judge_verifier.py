from __future__ import annotations

import json
import math
import shutil
import textwrap

import pytest

from verippo.core.llm.client import LLMConfig
from verippo.core.text.chat import render_response
from verippo.core.text.data import ANSWER_KEY, QUESTION_KEY, Problem
from verippo.core.text.verifier_text import Tiers
from verippo.launch import cli
from verippo.rl.judge_verifier import share_of_limits
from verippo.rl.rollout import Rollout
from verippo.rl.verifier import JudgeVerifier

TIERS = Tiers(right=3.0, wrong=2.0, unparsable=1.0)


def answered(text, answer="Pneumonia", index=0):
    problem = Problem(question="Fever and cough?", answer=answer, index=index)
    return Rollout(
        problem=problem, prompt_ids=[5], response_ids=[6], sampler_logprobs=[-1.0], text=text
    )


def final(text, **problem):
    return answered(render_response("Because.", text), **problem)


def judge(server):
    return JudgeVerifier(LLMConfig(base_url=server.url, model="m"), tiers=TIERS)


def first(body):
    return body["messages"][0]["content"]


def test_verdicts_become_tiers_and_blank_responses_are_not_judged(llm_server):
    server = llm_server(lambda body: "**True**" if "lung infection" in first(body) else "False.")
    infection = "A lung infection"
    rollouts = [
        final(infection),
        answered("no format"),
        final("Asthma"),
        final(""),
        final(infection, answer="x"),
    ]
    assert judge(server).score(rollouts) == [3.0, 1.0, 2.0, 2.0, 3.0]
    assert len(server.bodies) == 3
    assert JudgeVerifier(LLMConfig(base_url=server.url, model="m")).score(rollouts[:3]) == [
        1.0,
        0.0,
        0.1,
    ]


def test_judge_reads_the_final_response_without_the_thinking(llm_server):
    server = llm_server(lambda body: "True")
    judge(server).score([final("Asthma")])
    assert all(
        part in first(server.bodies[0]) for part in ("Fever and cough?", "Pneumonia", "Asthma")
    )
    assert "Because." not in first(server.bodies[0])


def test_missing_verdict_raises_and_names_the_problem(llm_server):
    server = llm_server(lambda body: "untrue" if "Asthma" in first(body) else "True")
    with pytest.raises(
        RuntimeError,
        match="no verdict of m on a response to problem 7 in 3 asks: 'untrue' is not the one word",
    ):
        judge(server).score([final("Pneumonia"), final("Asthma", index=7)])


def test_single_unjudged_response_has_no_score_and_is_counted(llm_server):
    server = llm_server(lambda body: "untrue" if "Asthma" in first(body) else "True")
    verifier = judge(server)
    scores = verifier.score([final("Pneumonia"), final("Asthma"), *[final("Pneumonia")] * 8])
    assert math.isnan(scores.pop(1))
    assert scores == [3.0] * 9
    assert verifier.num_unjudged == 1


def test_limits_are_divided_among_ranks():
    given = LLMConfig(
        concurrency=9, requests_per_minute=100, tokens_per_minute=3, budget_usd=1.0, price_in=1.0
    )
    shared = share_of_limits(given, 4)
    assert (
        shared.concurrency,
        shared.requests_per_minute,
        shared.tokens_per_minute,
        shared.budget_usd,
    ) == (2, 25, 1, 0.25)
    assert share_of_limits(LLMConfig(), 2) == LLMConfig(concurrency=8)
    assert share_of_limits(given, 1) == given


def test_each_of_two_ranks_judges_its_own_rollouts(llm_server, two_ranks, tmp_path):
    server = llm_server(
        lambda body: "True" if any(f"It is {n}." in first(body) for n in (0, 2, 4)) else "False"
    )
    (tmp_path / "ranks.py").write_text(
        textwrap.dedent(f"""
        from types import SimpleNamespace
        from verippo.core.training import dist
        from verippo.core.text.data import Problem
        from verippo.core.llm.client import LLMConfig
        from verippo.rl import config, setup
        from verippo.rl.run import score
        from verippo.rl.rollout import Rollout

        dist.init(timeout_seconds=60)
        asked = config.PPOConfig(
            policy="p", data="d", output={str(tmp_path)!r}, steps=1,
            verifier=config.VerifierConfig(kind="judge"),
            llm=LLMConfig(base_url={server.url!r}, model="m"),
        )
        text = "## Thinking\\n\\nx\\n\\n## Final Response\\n\\nIt is "
        rollouts = [
            Rollout(problem=Problem(question="Which?", answer="one", index=n), prompt_ids=[5],
                    response_ids=[6], sampler_logprobs=[-1.0], text=f"{{text}}{{n}}.")
            for n in range(6)
        ]
        run = SimpleNamespace(verifier=setup._verifier(asked))
        scores = score(run, rollouts).tolist()
        assert scores == [1.0, 0.1] * 3, scores
        assert score(run, rollouts).tolist() == scores
        """)
    )
    done = two_ranks(str(tmp_path / "ranks.py"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(server.bodies) == 6
    assert max(server.calls.values()) == 1
    journals = [(tmp_path / f"judge-journal-{rank}.jsonl").read_text() for rank in range(2)]
    assert [text.count("True") + text.count("False") for text in journals] == [3, 3]
    assert ["True" in text for text in journals] == [True, False]  # rank 0 has the even ones


@pytest.fixture
def ppo_with_a_judge(llm_server, make_model, tmp_path, monkeypatch):
    """Runs one PPO step with a scripted judge; the response to problem n is "It is n."."""
    (tmp_path / "answering.py").write_text(
        textwrap.dedent("""
        from dataclasses import replace
        from verippo.core.text.chat import render_response
        from verippo.rl.rollout import rollout

        def draw(sampler, prompts, sampling, *, tokenizer):
            drawn = rollout(sampler, prompts, sampling, tokenizer=tokenizer)
            return [
                replace(r, text=render_response("x", f"It is {r.problem.index}.")) for r in drawn
            ]
        """)
    )
    monkeypatch.syspath_prepend(tmp_path)

    def run(server, *, num, output, options=()):
        rows = [{QUESTION_KEY: f"Which {n}?", ANSWER_KEY: f"number {n}"} for n in range(num)]
        (tmp_path / "problems.json").write_text(json.dumps(rows))
        cli.main(
            [
                *argv,
                "--llm.base_url",
                server.url,
                "--prompts_per_step",
                str(num),
                *options,
                "--output",
                str(tmp_path / output),
            ]
        )
        return [json.loads(line) for line in (tmp_path / output / "metrics.jsonl").open()]

    argv = [
        "ppo",
        "--policy",
        str(make_model("llama", seed=61)),
        "--rollout_function",
        "answering:draw",
        "--data",
        str(tmp_path / "problems.json"),
        "--verifier.kind",
        "judge",
        "--llm.model",
        "m",
        "--steps",
        "1",
        "--epochs",
        "1",
        "--sampling.max_new_tokens",
        "3",
        "--max_prompt_tokens",
        "60",
        "--dtype",
        "fp32",
        "--zero_stage",
        "0",
        "--gradient_checkpointing",
        "false",
        "--log_to",
        "jsonl",
    ]
    return run


def test_ppo_with_a_judge_reuses_journaled_verdicts(
    llm_server, ppo_with_a_judge, tmp_path, next_commands
):
    server = llm_server(lambda body: "True" if "It is 4." in first(body) else "False")
    rows = ppo_with_a_judge(server, num=6, output="first")
    (command,) = next_commands(tmp_path / "first")
    assert f"eval --engine local --model {tmp_path}/first/model" in command
    (tmp_path / "second").mkdir()
    shutil.copy(tmp_path / "first" / "judge-journal-0.jsonl", tmp_path / "second")
    rows += ppo_with_a_judge(server, num=6, output="second")
    assert [row["score_mean"] for row in rows] == pytest.approx([(1.0 + 5 * 0.1) / 6] * 2)
    assert len(server.bodies) == 6


@pytest.mark.parametrize("minibatches", [1, 10])
def test_ppo_leaves_responses_without_a_verdict_out(
    llm_server, ppo_with_a_judge, tmp_path, minibatches
):
    replies = {"It is 4.": "True", "It is 7.": "perhaps"}
    server = llm_server(
        lambda body: next(
            (reply for text, reply in replies.items() if text in first(body)), "False"
        )
    )
    options = ["--minibatches", str(minibatches), "--verifier.wrong", "0.25"]
    (row,) = ppo_with_a_judge(server, num=10, output="run", options=options)
    assert row["verifier_unjudged"] == 1
    assert row["score_mean"] == pytest.approx((1.0 + 8 * 0.25) / 9)
    assert row["score_right_rate"] == pytest.approx(1 / 9)
    assert row["tokens_generated"] == 9 * 3
    assert row["skipped_steps"] == 0
    assert math.isfinite(row["policy_loss"])
