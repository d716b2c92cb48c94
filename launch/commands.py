"""The commands of `verippo`, with examples of their use."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple


class Command(NamedTuple):
    """A command, whose modules are imported only when it is used."""

    summary: str
    config: str
    """module:class of its configuration; help and refusals need no other module."""
    run: str
    """module:function called with the configuration and, as `resolved`, its plain values."""
    examples: str
    """Shell commands, run from the repository's folder."""
    positional: tuple[str, ...] = ()
    """Fields that may be given by position, before the options."""
    extends: str = ""
    """A command all of whose options this one takes too; help and documents list the others."""


def import_name(spec: str) -> Any:
    """Imports an object given as module:name."""
    module, _, name = spec.partition(":")
    return getattr(importlib.import_module(module), name)


COMMANDS = {
    "problems": Command(
        "turns exam questions into verifiable problems",
        "verippo.search.config:ProblemsConfig",
        "verippo.search.problems:problems",
        """
verippo problems --data exam.json --decontaminate test.json --llm.model gpt-4o \\
    --output runs/problems
verippo problems --config launch/configs/problems.yaml --data exam.json --output runs/problems
""",
    ),
    "search": Command(
        "searches a chain of thought and a response for each problem",
        "verippo.search.config:SearchConfig",
        "verippo.search.reasoning:search",
        """
verippo search --data runs/problems/problems_search.json --llm.model gpt-4o --output runs/search
verippo search --config launch/configs/search.yaml --llm.base_url http://127.0.0.1:30000/v1 \\
    --llm.model default --data runs/problems/problems_search.json --output runs/search
""",
    ),
    "sft": Command(
        "stage 1: fine-tunes a model on answers with reasoning",
        "verippo.sft.config:SFTConfig",
        "verippo.sft.finetune:train",
        """
verippo sft --model Qwen/Qwen3-0.6B-Base --data runs/search/search.json --output runs/sft
deepspeed --no_local_rank --module verippo.launch.cli sft --config launch/configs/sft_8b.yaml \\
    --data runs/search/search.json --output runs/sft-8b
""",
    ),
    "verifier": Command(
        "trains the two-class verifier that scores PPO's responses",
        "verippo.sft.config:VerifierTrainingConfig",
        "verippo.sft.train_verifier:train",
        """
verippo verifier --model Qwen/Qwen3-0.6B-Base --data rows.json --output runs/verifier
deepspeed --no_local_rank --module verippo.launch.cli verifier \\
    --config launch/configs/verifier_3b.yaml --data rows.json --output runs/verifier-3b
""",
    ),
    "ppo": Command(
        "stage 2: PPO with a frozen verifier",
        "verippo.rl.config:PPOConfig",
        "verippo.rl.train:train",
        """
verippo ppo --config launch/configs/ppo_tiny_cpu.yaml --policy DIR --data problems.json \\
    --output runs/tiny
verippo ppo --policy DIR --verifier.kind judge --llm.model gpt-4o --data problems.json \\
    --steps 100 --output runs/ppo-judge
deepspeed --no_local_rank --module verippo.launch.cli ppo --config launch/configs/ppo_8b.yaml \\
    --policy runs/sft-8b/model --verifier.model runs/verifier-3b/model \\
    --data runs/problems/problems_rl.json --output runs/ppo-8b
""",
    ),
    "critic": Command(
        "pre-trains PPO's critic on kept rollouts",
        "verippo.rl.critic_config:CriticConfig",
        "verippo.rl.critic_training:train",
        """
verippo critic --model runs/sft/model --data runs/ppo/rollouts --eval_fraction 0.1 \\
    --output runs/critic
deepspeed --no_local_rank --module verippo.launch.cli critic --model runs/sft-8b/model \\
    --data runs/ppo-8b/rollouts --eval_fraction 0.1 --output runs/critic-8b
""",
    ),
    "eval": Command(
        "measures a model's accuracy on multiple-choice questions",
        "verippo.eval.config:EvalConfig",
        "verippo.eval.evaluate:evaluate",
        """
verippo eval --engine local --model runs/ppo/model --data test.json --output runs/eval
verippo eval --engine serve --server.python sglang-env/bin/python --model runs/ppo/model \\
    --data test.json --output runs/eval
""",
    ),
    "eval compare": Command(
        "compares two evaluations of the same items",
        "verippo.eval.config:CompareConfig",
        "verippo.eval.compare:compare",
        "verippo eval compare runs/eval-sft runs/eval-ppo",
        positional=("first", "second"),
    ),
    "serve start": Command(
        "starts sglang servers and waits until they answer",
        "verippo.launch.serve:ServeConfig",
        "verippo.launch.serve:start",
        """
verippo serve start --model runs/sft/model --python sglang-env/bin/python
verippo serve start --model runs/sft/model --num 2 --tp 2 --gpus 4,5,6,7
""",
    ),
    "serve status": Command(
        "lists the started servers",
        "verippo.launch.serve:StatusConfig",
        "verippo.launch.serve:status",
        "verippo serve status",
    ),
    "serve stop": Command(
        "stops the started servers and their child processes",
        "verippo.launch.serve:StopConfig",
        "verippo.launch.serve:stop",
        """
verippo serve stop
verippo serve stop --port 30000
""",
    ),
    "plan ppo": Command(
        "memory and time of a PPO run on a machine, from configurations alone",
        "verippo.launch.plan_config:PPOPlanConfig",
        "verippo.launch.plan:plan",
        """
verippo plan ppo --config launch/configs/ppo_8b.yaml --gpus 8 --gpu_memory 80
verippo plan ppo --config launch/configs/ppo_8b.yaml --policy DIR --offload optimizer --gpus 4
""",
        extends="ppo",
    ),
    "plan sft": Command(
        "the same for stage 1; plain `plan --config FILE` finds the stage",
        "verippo.launch.plan_config:SFTPlanConfig",
        "verippo.launch.plan:plan",
        "verippo plan sft --config launch/configs/sft_8b.yaml --gpus 8 --gpu_memory 80",
        extends="sft",
    ),
    "plan verifier": Command(
        "the same for the verifier's training",
        "verippo.launch.plan_config:VerifierPlanConfig",
        "verippo.launch.plan:plan",
        "verippo plan verifier --config launch/configs/verifier_3b.yaml --gpus 4 --gpu_memory 40",
        extends="verifier",
    ),
    "doctor ppo": Command(
        "checks machine, servers, models, data and batches of a PPO run before it starts",
        "verippo.launch.doctor.config:PPODoctorConfig",
        "verippo.launch.doctor.command:doctor",
        """
verippo doctor ppo --config launch/configs/ppo_8b.yaml --ranks 8
verippo doctor ppo --config launch/configs/ppo_tiny_cpu.yaml --policy DIR --dry_run
""",
        extends="ppo",
    ),
    "doctor sft": Command(
        "the same for stage 1",
        "verippo.launch.doctor.config:SFTDoctorConfig",
        "verippo.launch.doctor.command:doctor",
        "verippo doctor sft --config launch/configs/sft_8b.yaml --ranks 8 --dry_run",
        extends="sft",
    ),
    "doctor verifier": Command(
        "the same for the verifier's training",
        "verippo.launch.doctor.config:VerifierDoctorConfig",
        "verippo.launch.doctor.command:doctor",
        "verippo doctor verifier --config launch/configs/verifier_3b.yaml --dry_run",
        extends="verifier",
    ),
    "bench": Command(
        "measures the sampling speed of this process and of servers",
        "verippo.launch.bench:BenchConfig",
        "verippo.launch.bench:bench",
        """
verippo bench --model DIR --dtype fp32
verippo bench --model DIR --sampler.urls http://127.0.0.1:30000
""",
    ),
    "demo": Command(
        "runs all stages small, on CPU: SFT, verifier, PPO, evaluation, report",
        "verippo.launch.demo_task:DemoConfig",
        "verippo.launch.demo:demo",
        """
verippo demo
verippo demo --seed 1 --output demo-1
""",
    ),
}
