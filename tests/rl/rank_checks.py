"""What the engine tests do on every rank. Called in the tests' own process for one rank; run by
torchrun for two:

    python -m torch.distributed.run --nproc_per_node 2 tests/rl/rank_checks.py FOLDER

reads FOLDER/job.pt (a Job's fields), writes FOLDER/rank-N.pt (what `run` returns). Nothing is compared here: the tests do
that.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch

from verippo.core.training import dist
from verippo.core.training import engine as core_engine
from verippo.core.training.engine import (
    EngineConfig,
    FrozenEngine,
    StepResult,
    TrainEngine,
    deepspeed_config,
)
from verippo.core.training.packing import pack
from verippo.core.training.pretrained import load_critic, load_policy
from verippo.rl import ppo
from verippo.rl.experience import Experience, MiniBatch, compute

TEMPERATURE = 0.7
RATE = 0.05
CLIPS = {"clip_low": 0.2, "clip_high": 0.3}
VALUE_CLIP = 0.2
MAX_GRAD_NORM = 0.2


class Update(NamedTuple):
    """One optimizer step over these sequences of the experience, in this order."""

    seqs: list[int]
    max_tokens: int
    poisoned: bool = False
    """an infinite advantage and an infinite return on the first sequence: only the rank that holds
    it sees it"""


UPDATES = [
    Update([0, 1, 2, 3, 4, 5], 1000),  # all in one micro-batch of each rank
    Update(
        [4, 2, 5, 0, 3, 1], 20
    ),  # another order; many small micro-batches, the last of a rank with less work empty
    Update([2], 20),  # one sequence: on two ranks, one has nothing at all
    Update([0, 3], 1000, poisoned=True),
    Update([5, 1, 3], 1000),  # after a skipped step, the next goes on as if that had not been
]
# (prompt tokens, response tokens): the third alone fills a micro-batch of 20
LENGTHS = [(5, 9), (3, 1), (7, 13), (4, 6), (2, 2), (6, 8)]
# conversations: (prompt tokens, tokens of the policy's turns and of the context between and after)
CONVERSATIONS = [(5, [4, 3, 6]), (3, [2, 5, 1, 2, 7]), (4, [9]), (6, [3, 4])]


@dataclass(frozen=True, kw_only=True)
class Job:
    folder: Path
    policy: str
    critic: str
    verifier: str
    experience: Experience
    pairs: list[tuple[str, str]]
    conversations: dict[str, Experience]
    """The same tokens with the same targets: "whole", and "split", each turn of the policy a
    sequence of its own after everything before it."""


def make_conversations(generator: torch.Generator) -> dict[str, Experience]:
    """Targets are random; those at context are NaN."""
    whole: list[SimpleNamespace] = []
    split: list[SimpleNamespace] = []
    for prompt, turns in CONVERSATIONS:
        ids = torch.randint(3, 320, (prompt + sum(turns),), generator=generator).tolist()
        mask = [number % 2 == 0 for number, length in enumerate(turns) for _ in range(length)]
        whole.append(
            SimpleNamespace(prompt_ids=ids[:prompt], response_ids=ids[prompt:], response_mask=mask)
        )
        ends = [prompt + sum(turns[: n + 1]) for n in range(len(turns))]
        split += [
            SimpleNamespace(prompt_ids=ids[: end - length], response_ids=ids[end - length : end])
            for end, length in list(zip(ends, turns, strict=True))[::2]
        ]
    num = pack(whole).num_response_tokens
    targets = torch.randn(5, num, generator=generator)
    targets[0] -= 6.0  # log-probs

    def experience(rows: list[SimpleNamespace]) -> Experience:
        batch = pack(rows)
        placed = torch.full((5, batch.num_tokens), torch.nan)
        placed[:, batch.response_mask] = targets
        logprobs, values, advantages, returns, ref_logprobs = placed
        return Experience(
            batch=batch,
            logprobs=logprobs,
            values=values,
            advantages=advantages,
            returns=returns,
            ref_logprobs=ref_logprobs,
            rewards=returns,
        )

    return {"whole": experience(whole), "split": experience(split)}


def make_job(*, folder: Path, policy: str, critic: str, verifier: str) -> dict[str, Any]:
    """The fields of a Job.

    Old log-probs and values lie near the models' own, so that some tokens are clipped.
    """
    generator = torch.Generator().manual_seed(7)

    def near(x: torch.Tensor, spread: float) -> torch.Tensor:
        return x + spread * torch.randn(x.shape, generator=generator)

    rows = [
        SimpleNamespace(
            **{
                f"{part}_ids": torch.randint(3, 320, (length,), generator=generator).tolist()
                for part, length in zip(("prompt", "response"), lengths, strict=True)
            }
        )
        for lengths in LENGTHS
    ]
    batch = pack(rows)
    with torch.no_grad():
        logprobs = load_policy(policy, dtype="fp32")(batch, temperature=TEMPERATURE)
        values = load_critic(critic, dtype="fp32")(batch)
    nothing = torch.zeros(batch.num_tokens)
    experience = Experience(
        batch=batch,
        logprobs=near(logprobs, 0.3),
        values=near(values, 0.3),
        advantages=near(nothing, 1.0),
        returns=near(values, 0.5),
        ref_logprobs=logprobs,
        rewards=nothing,
    )
    pairs = [
        ("Pneumonia", "pneumonia"),
        ("A fever and " * 20, "cough"),
        ("x", "The patient has a fever."),
    ]
    return {
        "folder": folder,
        "policy": policy,
        "critic": critic,
        "verifier": verifier,
        "experience": experience,
        "pairs": pairs,
        "conversations": make_conversations(generator),
    }


STAGES = (0, 2, 3)


def config(stage: int, **changes: Any) -> EngineConfig:
    return EngineConfig(
        **{
            "zero_stage": stage,
            "dtype": "fp32",
            "gradient_checkpointing": False,
            "max_grad_norm": 1e9,
        }
        | changes
    )


def sgd(module: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=RATE)


def engines(job: Job, settings: EngineConfig) -> tuple[TrainEngine, TrainEngine]:
    modules = (
        load_policy(job.policy, dtype=settings.dtype),
        load_critic(job.critic, dtype=settings.dtype),
    )
    policy, critic = (TrainEngine(module, settings, optimizer=sgd(module)) for module in modules)
    return policy, critic


def update(
    policy: TrainEngine, critic: TrainEngine, experience: Experience, what: Update
) -> tuple[StepResult, StepResult]:
    """One step as the loop of rl/train.py makes it."""
    if what.poisoned:
        first = experience.batch.seq_ids == what.seqs[0]
        bad = torch.where(first & experience.batch.response_mask, torch.inf, 0.0)
        experience = replace(
            experience, advantages=experience.advantages + bad, returns=experience.returns + bad
        )
    mini = MiniBatch(experience=experience, seqs=what.seqs)
    for micro in mini.microbatches(what.max_tokens):
        pg = ppo.policy_loss(
            policy(micro.batch, temperature=TEMPERATURE),
            micro.logprobs,
            micro.advantages,
            micro.mask,
            **CLIPS,
        )
        vf = ppo.value_loss(
            critic(micro.batch), micro.values, micro.returns, micro.mask, clip=VALUE_CLIP
        )
        policy.backward(pg.loss_sum, mini.num_response_tokens, last=micro.last)
        critic.backward(vf.loss_sum, mini.num_response_tokens, last=micro.last)
    return policy.step(RATE), critic.step(RATE)


def weights(policy: TrainEngine, critic: TrainEngine) -> dict[str, dict[str, torch.Tensor]]:
    return {"policy": policy.full_state(), "critic": critic.full_state()}


def updates(job: Job, stage: int, **changes: Any) -> Iterator[dict[str, Any]]:
    """The weights before and after each of UPDATES, one engine going through them all."""
    policy, critic = engines(job, config(stage, **changes))
    yield {"weights": weights(policy, critic)}
    for what in UPDATES:
        steps = update(policy, critic, job.experience, what)
        yield {"weights": weights(policy, critic), "steps": [tuple(s) for s in steps]}


def conversation_updates(job: Job, stage: int) -> dict[str, Any]:
    """Weights before, and after one step over all conversations in either form."""
    result = {}
    for form, experience in job.conversations.items():
        policy, critic = engines(job, config(stage))
        result["before"] = weights(policy, critic)
        what = Update(list(range(experience.batch.num_seqs)), 40)
        steps = update(policy, critic, experience, what)
        result[form] = weights(policy, critic)
        result[f"{form} steps"] = [tuple(step) for step in steps]
    return result


def forwards(job: Job, stage: int) -> dict[str, Any]:
    """What a frozen and a trained engine give for the whole batch, through `compute`."""
    settings = config(stage)
    frozen = FrozenEngine(load_policy(job.policy, dtype="fp32"), settings)
    critic = TrainEngine(load_critic(job.critic, dtype="fp32"), settings)
    ask = partial(frozen, temperature=TEMPERATURE, with_entropy=True)
    longest = max(job.experience.batch.lengths)
    logprobs, entropy = compute(ask, job.experience.batch, longest)
    (values,) = compute(critic, job.experience.batch, longest)
    return {
        "logprobs": logprobs,
        "entropy": entropy,
        "values": values,
        "parameters_held": sum(p.numel() for p in frozen.engine.parameters()),
        "named_tensors": {name: tensor.clone() for name, tensor in critic.named_tensors()},
    }


def resumed(job: Job, stage: int) -> dict[str, Any]:
    """The critic's weights when it is saved, a step later, and the same from a fresh engine that
    loads what was saved.
    With AdamW, so that there are states to save."""

    def step(engine: TrainEngine) -> dict[str, torch.Tensor]:
        mini = MiniBatch(experience=job.experience, seqs=UPDATES[0].seqs)
        for micro in mini.microbatches(UPDATES[0].max_tokens):
            loss = ppo.value_loss(engine(micro.batch), micro.values, micro.returns, micro.mask)
            engine.backward(loss.loss_sum, mini.num_response_tokens, last=micro.last)
        engine.step(1e-3)
        return engine.full_state()

    first, second = (
        TrainEngine(load_critic(job.critic, dtype="fp32"), config(stage)) for _ in range(2)
    )
    folder = job.folder / f"checkpoint-{dist.world_size()}-{stage}"
    saved = step(first)
    first.save(folder, "critic")
    unbroken = step(first)
    second.load(folder, "critic")
    return {
        "saved": saved,
        "loaded": second.full_state(),
        "unbroken": unbroken,
        "resumed": step(second),
    }


def refreshed(job: Job, stage: int) -> dict[str, Any]:
    """Weights of a frozen engine that took those of a trained one, and of one that loads them."""
    settings = config(stage)
    policy, critic = engines(job, settings)
    update(policy, critic, job.experience, UPDATES[0])
    first, second = (
        FrozenEngine(load_policy(job.policy, dtype="fp32"), settings) for _ in range(2)
    )
    first.copy_weights(policy.named_tensors())
    folder = job.folder / f"reference-{dist.world_size()}-{stage}"
    if dist.is_main():
        folder.mkdir()
    dist.barrier()
    first.save(folder, "reference")
    dist.barrier()
    second.load(folder, "reference")
    longest = max(job.experience.batch.lengths)
    return {
        "policy": policy.full_state(),
        "weights": [dict(_cloned(engine)) for engine in (first, second)],
        "logprobs": [
            compute(partial(engine, temperature=TEMPERATURE), job.experience.batch, longest)[0]
            for engine in (policy, first, second)
        ],
        "parameters_held": sum(p.numel() for p in first.engine.parameters()),
    }


def _cloned(engine: FrozenEngine) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in engine.named_tensors():
        yield name, tensor.clone()


def verdicts(job: Job, stage: int) -> list[float]:
    """P(right) of the pairs, all of them on rank 0: the other rank has none and must still take
    part."""
    from verippo.rl.verifier import ClassifierVerifier

    verifier = ClassifierVerifier.load(
        job.verifier, config(stage), max_tokens=96, max_tokens_per_gpu=128
    )
    return verifier.probabilities(job.pairs if dist.is_main() else [])


def sharded_throughout(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """As core.engine's, but ZeRO-3 shards small parameters too, which it would leave whole."""
    settings = deepspeed_config(*args, **kwargs)
    if settings["zero_optimization"]["stage"] == 3:
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return settings


@mock.patch.object(core_engine, "deepspeed_config", sharded_throughout)
def run(job: Job) -> dict[str, Any]:
    return {
        "updates": {stage: list(updates(job, stage)) for stage in STAGES},
        "clipped": {
            stage: list(islice(updates(job, stage, max_grad_norm=MAX_GRAD_NORM), 2))[1]
            for stage in STAGES
        },
        "conversations": {stage: conversation_updates(job, stage) for stage in (0, 3)},
        "forwards": forwards(job, 3),
        "resumed": {stage: resumed(job, stage) for stage in STAGES},
        "refreshed": {stage: refreshed(job, stage) for stage in STAGES},
        "verdicts": verdicts(job, 3),
    }


if __name__ == "__main__":
    target = Path(sys.argv[1])
    dist.init(timeout_seconds=60)
    results = run(Job(**torch.load(target / "job.pt", weights_only=False)))
    torch.save(results, target / f"rank-{dist.rank()}.pt")
