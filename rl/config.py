"""What a PPO run can be told. One YAML file, every field also a command-line option."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ..core.llm.client import LLMConfig
from ..core.sampling.sampler import SamplingParams
from ..core.sampling.sglang_sampler import SglangConfig
from ..core.text.data import ANSWER_KEY, QUESTION_KEY
from ..core.training.engine import Dtype, EngineConfig, Offload
from ..core.training.metrics import parse_loggers
from ..core.training.schedule import ScheduleKind


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """How far from the reference the policy may go."""

    coef: float = 0.03
    """beta: reward lost per nat of KL to the reference"""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """of the per-token KL (http://joschu.net/blog/kl-approx.html)"""

    def __post_init__(self) -> None:
        if self.coef < 0:
            raise ValueError(f"kl.coef={self.coef}: must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class VerifierConfig:
    """Who judges the responses, and what they earn."""

    kind: Literal["classifier", "exact", "judge", "function"] = "classifier"
    """a frozen two-class model, equality with the reference answer, the LLM of llm.model, or a function of your own"""
    model: str | None = None
    """classifier: its Hugging Face folder or hub id"""
    threshold: float = 0.4
    """classifier: right when P(right) is above it (arXiv 2412.18925)"""
    function: str | None = None
    """function: module:name of a callable, list of rollouts -> list of scores"""
    template: str | None = None
    """classifier: a text file with {response} and {reference}, for a verifier trained on another wording"""
    max_tokens: int = 2048
    """classifier: tokens of its input; a longer response is cut in the middle"""
    right: float = 1.0
    """score of a right answer"""
    wrong: float = 0.1
    """score of a wrong answer in the right format"""
    unparsable: float = 0.0
    """score of an answer in a broken format"""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"verifier.threshold={self.threshold}: must lie in 0..1")
        if self.max_tokens < 1:
            raise ValueError(f"verifier.max_tokens={self.max_tokens}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class SamplerConfig(SglangConfig):
    """What draws the responses."""

    kind: Literal["local", "sglang", "factory"] = "local"
    """in this process, sglang servers that run already, or an engine of your own"""
    max_batch: int = 64
    """local: rows decoded at once on each rank"""
    factory: str | None = None
    """factory: module:name of a callable that takes (model_path, stop_token_ids) and returns a Sampler"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "factory" and not self.factory:
            raise ValueError("sampler.kind=factory needs sampler.factory=module:name")
        if self.kind == "sglang" and not self.urls:
            raise ValueError("sampler.kind=sglang needs sampler.urls=http://host:port,...")
        if self.sleep and self.kind != "sglang":
            raise ValueError("sampler.sleep needs sampler.kind=sglang")
        if self.max_batch < 1:
            raise ValueError(f"sampler.max_batch={self.max_batch}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """PPO of a policy against a frozen verifier."""

    policy: str
    """Hugging Face folder or hub id of the model to train"""
    critic: str | None = None
    """of the decoder that becomes the critic; default: the policy's"""
    reference: str | None = None
    """of the frozen model that KL is measured to; default: the policy as it starts"""
    data: str
    """training problems: comma-separated JSON, JSONL or Parquet files, datasets folders or hub ids"""
    output: str
    """folder for everything that the run writes"""

    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    llm: LLMConfig = field(default_factory=LLMConfig)
    """verifier.kind=judge: who judges; its limits hold for all ranks together"""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    kl: KLConfig = field(default_factory=KLConfig)

    steps: int | None = None
    """rollout-and-update steps in all; give this or episodes"""
    episodes: int | None = None
    """responses in all, rounded up to whole steps"""
    prompts_per_step: int = 128
    """problems a step, over all ranks"""
    samples_per_prompt: int = 1
    """responses for each problem"""
    epochs: int = 3
    """passes over a step's rollouts (PPO epochs)"""
    minibatches: int = 1
    """optimizer steps an epoch"""
    advantage: Literal["gae", "rloo", "grpo", "reinforce++"] = "gae"
    """gae trains a critic; the others compare the samples of a prompt and need none"""
    gamma: float = 1.0
    """discount of later rewards"""
    lam: float = 0.95
    """GAE's lambda (arXiv 1506.02438)"""
    whiten: bool = True
    """advantages to mean 0 and variance 1 over the step's response tokens"""
    clip_low: float = 0.2
    """the policy's ratio is clipped below at 1 - clip_low (arXiv 1707.06347)"""
    clip_high: float = 0.2
    """and above at 1 + clip_high"""
    value_clip: float | None = 0.2
    """how far a value may move from the old one (units of reward); null: unclipped"""
    missing_eos_penalty: float = 0.0
    """taken from the score of a truncated response"""
    policy_learning_rate: float = 5e-7
    """peak, of the policy's AdamW"""
    critic_learning_rate: float = 5e-6
    """peak, of the critic's AdamW: its head starts from zero and must move faster"""
    warmup_ratio: float = 0.05
    """share of all optimizer steps over which the rates climb"""
    schedule: ScheduleKind = "linear"
    """of both rates after the warm-up"""

    question_key: str = QUESTION_KEY
    """where a row has its question"""
    answer_key: str = ANSWER_KEY
    """where a row has its reference answer"""
    system_prompt: str | None = None
    """a system turn before every question"""
    max_prompt_tokens: int = 1024
    """longer prompts are dropped and counted, never cut"""
    rollout_function: str | None = None
    """module:name of a function in place of verippo.rl.rollout.rollout"""
    limit: int | None = None
    """use only the first rows of each source"""
    seed: int = 0
    """of every random draw"""

    eval_data: str | None = None
    """held-out problems"""
    eval_fraction: float = 0.0
    """or: this share of the data is held out, by seed"""
    eval_every: int = 20
    """steps between evaluations; there is one before the first step and one after the last"""
    eval_temperature: float = 0.0
    """of evaluation samples; 0 takes the likeliest token"""
    save_every: int = 20
    """steps between checkpoints; there is one after the last step"""
    save_total_limit: int = 2
    """checkpoints kept, besides the best"""
    log_samples_every: int = 10
    """steps between sampled texts in samples.jsonl"""
    log_to: str = "jsonl,tensorboard"
    """any of jsonl, tensorboard, wandb; jsonl is always written"""
    resume: str = "auto"
    """auto: go on from the newest checkpoint in output; never; or a checkpoint folder"""

    zero_stage: Literal[0, 1, 2, 3] = 3
    """what DeepSpeed shards over ranks: 1 optimizer states, 2 gradients too, 3 parameters too"""
    offload: Offload = "none"
    """what lives in host memory: none, optimizer, all"""
    dtype: Dtype = "bf16"
    """of weights and activations"""
    gradient_checkpointing: bool = True
    """recompute activations in the backward pass"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this global norm, policy and critic each"""
    weight_decay: float = 0.0
    """decoupled, never on norms and biases"""
    max_tokens_per_gpu: int = 8192
    """tokens of a micro-batch"""
    max_skipped_steps: int = 3
    """optimizer steps in a row with a gradient that is not finite before the run stops"""
    max_logprob_gap: float = 1.0
    """nats: the run stops when the mean gap between the sampler's and the trainer's log-probs is above it"""
    timeout_seconds: float = 1800.0
    """a collective that waits longer ends the run"""

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.episodes is None):
            raise ValueError(
                f"give steps or episodes, one of the two; got steps={self.steps}, episodes={self.episodes}"
            )
        for name in (
            "prompts_per_step",
            "samples_per_prompt",
            "epochs",
            "minibatches",
            "max_prompt_tokens",
            "eval_every",
            "save_every",
            "save_total_limit",
            "log_samples_every",
            "max_skipped_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in (
            "steps",
            "episodes",
            "limit",
            "clip_low",
            "clip_high",
            "value_clip",
            "max_logprob_gap",
            "timeout_seconds",
        ):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0")
        for name in (
            "policy_learning_rate",
            "critic_learning_rate",
            "weight_decay",
            "eval_temperature",
            "seed",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be 0 or more")
        if self.seed >= 2**63:
            raise ValueError(f"seed={self.seed}: must be under 2**63")
        for name in ("gamma", "lam", "clip_low", "warmup_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: must lie in 0..1")
        if self.rollouts_per_step % self.minibatches:
            raise ValueError(
                f"{self.rollouts_per_step} rollouts a step (prompts_per_step x samples_per_prompt) do not divide into "
                f"minibatches={self.minibatches}: choose a divisor"
            )
        if self.advantage in ("rloo", "grpo") and self.samples_per_prompt < 2:
            raise ValueError(
                f"advantage={self.advantage} compares the samples of a prompt: samples_per_prompt must be over 1"
            )
        if self.sampling.temperature == 0:
            raise ValueError(
                "sampling.temperature=0: training needs samples from the policy; give a temperature above 0"
            )
        longest = self.max_prompt_tokens + self.sampling.max_new_tokens
        if longest > self.max_tokens_per_gpu:
            raise ValueError(
                f"max_prompt_tokens + sampling.max_new_tokens = {longest}, over max_tokens_per_gpu={self.max_tokens_per_gpu}: "
                "raise it or lower the others"
            )
        if self.verifier.kind == "classifier" and not self.verifier.model:
            raise ValueError("verifier.kind=classifier needs verifier.model")
        if self.verifier.kind == "judge" and not self.llm.model:
            raise ValueError(
                "verifier.kind=judge needs llm.model, and llm.base_url where it is not OpenAI's"
            )
        if self.verifier.kind == "function" and not self.verifier.function:
            raise ValueError("verifier.kind=function needs verifier.function=module:name")
        if self.eval_data and self.eval_fraction:
            raise ValueError("give eval_data or eval_fraction, not both")
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"eval_fraction={self.eval_fraction}: must lie in 0..1")
        parse_loggers(self.log_to)
        self.engine  # noqa: B018 its own checks

    @property
    def rollouts_per_step(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def total_steps(self) -> int:
        return (
            self.steps
            if self.steps is not None
            else math.ceil((self.episodes or 0) / self.rollouts_per_step)
        )

    @property
    def optimizer_steps(self) -> int:
        return self.total_steps * self.epochs * self.minibatches

    @property
    def engine(self) -> EngineConfig:
        return EngineConfig(
            zero_stage=self.zero_stage,
            offload=self.offload,
            dtype=self.dtype,
            gradient_checkpointing=self.gradient_checkpointing,
            max_grad_norm=self.max_grad_norm,
            weight_decay=self.weight_decay,
        )
