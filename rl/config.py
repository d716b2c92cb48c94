"""Configuration of a PPO run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from ..core.bounds import (
    Bounds,
    CountingInt,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    UnitFloat,
    check_bounds,
)
from ..core.llm.client import LLMConfig
from ..core.sampling.sampler import SamplingParams
from ..core.sampling.sglang_sampler import SglangConfig
from ..core.text.data import ANSWER_KEY, QUESTION_KEY
from ..core.training.run_config import RunConfig
from .loss_config import CorrectionConfig, KLConfig

ClipFloat = Annotated[
    float,
    Bounds(
        low=0,
        high=1,
        low_excluded=True,
        rule="must be above 0 and at most 1",
    ),
]
UnderOneFloat = Annotated[
    float,
    Bounds(
        low=0,
        high=1,
        high_excluded=True,
        rule="must be 0 or more and under 1",
    ),
]
OverOneFloat = Annotated[
    float,
    Bounds(
        low=1,
        low_excluded=True,
        rule="must be above 1",
    ),
]


@dataclass(frozen=True, kw_only=True)
class VerifierConfig:
    """Verifier that scores the responses."""

    kind: Literal["classifier", "exact", "judge", "function"] = "classifier"
    """classifier: a two-class model; exact: equal answers; judge: an LLM; function: your own."""
    model: str | None = None
    """classifier: Hugging Face folder or hub id of the two-class model."""
    threshold: UnitFloat = 0.4
    """classifier: a response is right when P(right) is above this value (arXiv 2412.18925)."""
    function: str | None = None
    """function: module:name of a callable that maps a list of rollouts to a list of scores."""
    template: str | None = None
    """classifier: text file with {response} and {reference}, when it was trained on other text."""
    max_tokens: CountingInt = 2048
    """classifier: tokens of its input; a longer response is cut in the middle."""
    right: float = 1.0
    """Score of a right answer."""
    wrong: float = 0.1
    """Score of a wrong answer in the right format."""
    unparsable: float = 0.0
    """Score of an answer in a broken format."""

    def __post_init__(self) -> None:
        check_bounds(self, prefix="verifier.")


@dataclass(frozen=True, kw_only=True)
class SamplerConfig(SglangConfig):
    """Engine that samples the responses."""

    kind: Literal["local", "sglang", "factory"] = "local"
    """local: in the training process; sglang: on running servers; factory: your own engine."""
    max_batch: CountingInt = 64
    """local: responses decoded at once on each rank."""
    factory: str | None = None
    """factory: module:name of a callable (model_path, stop_token_ids) -> Sampler."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "factory" and not self.factory:
            raise ValueError("sampler.kind=factory needs sampler.factory=module:name")
        if self.kind == "sglang" and not self.urls:
            raise ValueError("sampler.kind=sglang needs sampler.urls=http://host:port,...")
        if self.sleep and self.kind != "sglang":
            raise ValueError("sampler.sleep needs sampler.kind=sglang")


@dataclass(frozen=True, kw_only=True)
class PPOConfig(RunConfig):
    """Configuration of a PPO run. Each field is also a command-line option."""

    policy: str
    """Model to train: a Hugging Face folder or hub id."""
    critic: str | None = None
    """Model whose decoder becomes the critic, such as the model/ of `verippo critic`; `verifier`
    for that of the verifier; default: the policy's."""
    critic_head: Literal["auto", "fresh", "kept"] = "auto"
    """Value head of the critic: fresh (zero), kept (that of its folder), or auto (kept if the
    folder has one); always fresh with critic=verifier, whose head tells two classes apart."""
    critic_freeze: Literal["none", "attention"] = "none"
    """attention: train only MLPs, norms and head of the critic; attention and embeddings stay."""
    reference: str | None = None
    """Frozen model that the KL penalty refers to; default: the policy as it starts."""
    reference_refresh_steps: CountingInt | None = None
    """Steps after which the reference takes the policy's weights, again and again; null: never."""
    baseline: str | None = None
    """Model that is evaluated once, and with which every evaluation is compared."""

    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    llm: LLMConfig = field(default_factory=LLMConfig)
    """LLM judge of verifier.kind=judge; its limits apply to all ranks together."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    kl: KLConfig = field(default_factory=KLConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)

    steps: PositiveInt | None = None
    """Number of rollout-and-update steps; give this or `episodes`."""
    episodes: PositiveInt | None = None
    """Number of responses in all, rounded up to whole steps."""
    prompts_per_step: CountingInt = 128
    """Problems per step, over all ranks."""
    samples_per_prompt: CountingInt = 1
    """Responses sampled for each problem."""
    refill_groups: NonNegativeInt = 0
    """Rounds of further prompts that replace groups with equal scores (arXiv 2503.14476)."""
    epochs: CountingInt = 3
    """PPO epochs: passes over the rollouts of a step."""
    minibatches: CountingInt = 1
    """Mini-batches, and so optimizer steps, per PPO epoch."""
    target_kl: PositiveFloat | None = None
    """No further epoch of a step once the policy has moved by 1.5 times this (nats per token)."""
    critic_epochs: CountingInt | None = None
    """Passes over the rollouts of a step that train the critic; null: as `epochs`."""
    critic_warmup_steps: NonNegativeInt = 0
    """Steps at the start of the run that train the critic alone (arXiv 2503.01491)."""
    staleness: Literal[0, 1] = 0
    """1: sample during the step before, with weights one step old (arXiv 2505.24298).
    It needs `correction.level`. With sampler.kind=local a process of its own samples."""
    critic_warmup_settled: CountingInt | None = None
    """End that warm-up early, once `explained_variance` has not risen by 0.01 for this many steps;
    give more than the learning rate takes to rise. null: never."""
    advantage: Literal["gae", "rloo", "grpo", "reinforce++"] = "gae"
    """Advantage estimator: gae trains a critic, the others compare responses to one prompt."""
    advantage_function: str | None = None
    """module:name of an advantage estimator of your own, in place of `advantage`."""
    gamma: UnitFloat = 1.0
    """Discount factor of rewards per token."""
    lam: UnitFloat = 1.0
    """Lambda of generalised advantage estimation (arXiv 1506.02438).
    Under 1, the score reaches the start of a long answer only through the critic."""
    lam_alpha: PositiveFloat | None = None
    """Length-adaptive lambda, 1 - 1/(lam_alpha R) for R response tokens; replaces `lam`."""
    lam_critic: UnitFloat | None = None
    """Lambda of the critic's targets (arXiv 2503.01491); null: that of the advantages."""
    whiten: bool = True
    """Normalise advantages to mean 0 and variance 1 over the step's response tokens."""
    clip_low: ClipFloat = 0.2
    """Lower bound of the policy ratio is 1 - clip_low (arXiv 1707.06347)."""
    clip_high: PositiveFloat = 0.2
    """Upper bound of the policy ratio is 1 + clip_high."""
    dual_clip: OverOneFloat | None = None
    """Bound of a token's loss where A < 0, as a multiple of -A (arXiv 1912.09729); null: none."""
    ratio_mask_low: UnderOneFloat = 0.0
    """Tokens whose policy ratio is below this carry no gradient (arXiv 2607.07508); 0: none."""
    ratio_mask_high: OverOneFloat | None = None
    """Tokens whose policy ratio is above this carry no gradient; null: none."""
    policy_loss: Literal["ppo", "gspo", "cispo"] = "ppo"
    """Clipped PPO loss, GSPO (arXiv 2507.18071) or CISPO (arXiv 2506.13585)."""
    loss_mean: Literal["token", "sequence", "fixed"] | None = None
    """Mean over tokens, over sequences of their means, or over max_new_tokens per sequence."""
    policy_loss_function: str | None = None
    """module:name of a policy loss of your own, in place of the clipped PPO loss."""
    entropy_coef: NonNegativeFloat = 0.0
    """c of the entropy bonus: the loss of a token less c times its entropy (arXiv 1707.06347)."""
    value_clip: PositiveFloat | None = 0.2
    """Distance that a value may move from the old one (units of reward); null: unclipped."""
    missing_eos_penalty: float = 0.0
    """Penalty subtracted from the score of a truncated response."""
    overlong_buffer: CountingInt | None = None
    """Last tokens before max_new_tokens over which a penalty rises to 1 (arXiv 2503.14476)."""
    policy_learning_rate: NonNegativeFloat = 5e-7
    """Learning rate of the policy's AdamW at the end of warm-up."""
    critic_learning_rate: NonNegativeFloat = 5e-6
    """Learning rate of the critic's AdamW at the end of warm-up; its head starts at zero."""

    question_key: str = QUESTION_KEY
    """Key of the question in a data row."""
    answer_key: str = ANSWER_KEY
    """Key of the reference answer in a data row."""
    system_prompt: str | None = None
    """System turn placed before every question."""
    max_prompt_tokens: CountingInt = 1024
    """Maximum number of tokens in a prompt; longer prompts are dropped and counted, never cut."""
    rollout_function: str | None = None
    """module:name of a function in place of verippo.rl.rollout.rollout."""
    eval_temperature: NonNegativeFloat = 0.0
    """Sampling temperature of evaluations; 0 takes the most likely token."""
    stop_below_baseline: bool = False
    """End at an evaluation that is significantly below the start or the baseline; exit status 1."""
    log_samples_every: CountingInt = 10
    """Steps between sampled texts written to samples.jsonl."""
    keep_rollouts: bool = False
    """Keep the training rollouts in rollouts/step-NUMBER.jsonl.gz, as `critic` reads them."""
    max_logprob_gap: PositiveFloat = 1.0
    """Mean gap between sampler's and trainer's log-probs (nats) above which the run stops."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_batch()
        self._check_losses()
        self._check_critic()
        self._check_verifier()
        self._check_held_out()

    def _check_batch(self) -> None:
        if (self.steps is None) == (self.episodes is None):
            raise ValueError(
                f"give either steps or episodes; got steps={self.steps}, episodes={self.episodes}"
            )
        if self.rollouts_per_step % self.minibatches:
            raise ValueError(
                f"{self.rollouts_per_step} rollouts a step (prompts_per_step x samples_per_prompt) "
                f"do not divide into minibatches={self.minibatches}: choose a divisor"
            )
        grouped = self.advantage in ("rloo", "grpo") and not self.advantage_function
        if grouped and self.samples_per_prompt < 2:
            raise ValueError(
                f"advantage={self.advantage} compares the samples of a prompt: "
                "samples_per_prompt must be over 1"
            )
        if self.refill_groups and not self.compares_samples:
            raise ValueError(
                f"refill_groups={self.refill_groups} replaces groups of equal scores: it needs "
                "advantage rloo, grpo or reinforce++, and samples_per_prompt over 1"
            )
        if self.sampling.temperature == 0:
            raise ValueError(
                "sampling.temperature=0: training needs samples from the policy; "
                "give a temperature above 0"
            )
        if self.staleness and self.correction.level == "none":
            raise ValueError(
                "staleness=1 trains on responses of older weights, which has to be corrected: "
                "set correction.level=token (or sequence, geometric)"
            )
        if self.staleness and self.sampler.sleep:
            raise ValueError(
                "sampler.sleep releases the servers' memory during training, when they sample "
                "with staleness=1: leave one of the two out"
            )
        if self.staleness and self.refill_groups:
            raise ValueError(
                "refill_groups samples within a step, and staleness=1 the next step's responses "
                "at the same time: leave one of the two out"
            )
        longest = self.max_prompt_tokens + self.sampling.max_new_tokens
        if longest > self.max_tokens_per_gpu:
            raise ValueError(
                f"max_prompt_tokens + sampling.max_new_tokens = {longest}, over "
                f"max_tokens_per_gpu={self.max_tokens_per_gpu}: raise it or lower the others"
            )

    def _check_held_out(self) -> None:
        if self.eval_data or self.eval_fraction:
            return
        for name in ("baseline", "stop_below_baseline"):
            if value := getattr(self, name):
                raise ValueError(
                    f"{name}={value} needs held-out problems: give eval_data or eval_fraction"
                )

    def _check_losses(self) -> None:
        if self.policy_loss == "gspo" and self.loss_mean not in (None, "sequence"):
            raise ValueError(
                f"policy_loss=gspo is a mean over sequences: leave loss_mean={self.loss_mean} out"
            )
        if self.kl.place == "loss" and self.mean_over != "token":
            raise ValueError("kl.place=loss needs loss_mean=token")
        if self.entropy_coef and self.mean_over != "token":
            raise ValueError(f"entropy_coef={self.entropy_coef} needs loss_mean=token")
        if self.overlong_buffer and self.overlong_buffer > self.sampling.max_new_tokens:
            raise ValueError(
                f"overlong_buffer={self.overlong_buffer} is over "
                f"sampling.max_new_tokens={self.sampling.max_new_tokens}: lower it"
            )

    def _check_critic(self) -> None:
        if self.critic_warmup_steps >= self.total_steps:
            raise ValueError(
                f"critic_warmup_steps={self.critic_warmup_steps} leaves no step of "
                f"{self.total_steps} to train the policy: lower it"
            )
        if self.critic_warmup_settled and not self.critic_warmup_steps:
            raise ValueError(
                f"critic_warmup_settled={self.critic_warmup_settled} ends the warm-up early: give "
                "critic_warmup_steps, its longest duration"
            )
        if self.critic_freeze != "none" and self.advantage != "gae":
            raise ValueError(
                f"critic_freeze={self.critic_freeze}: advantage={self.advantage} trains no critic: "
                "leave it out"
            )
        kind = self.verifier.kind
        if self.critic == "verifier" and kind != "classifier":
            raise ValueError(
                f"critic=verifier needs verifier.kind=classifier, got {kind}: give the critic's "
                "folder (./verifier if that is its name)"
            )
        if self.critic == "verifier" and self.critic_head == "kept":
            raise ValueError(
                "critic_head=kept: the head of critic=verifier has two classes and gives no "
                "values: leave critic_head out"
            )

    def _check_verifier(self) -> None:
        kind = self.verifier.kind
        if kind == "classifier" and not self.verifier.model:
            raise ValueError("verifier.kind=classifier needs verifier.model")
        if kind == "judge" and not self.llm.model:
            raise ValueError(
                "verifier.kind=judge needs llm.model, and llm.base_url unless it is OpenAI's"
            )
        if kind == "function" and not self.verifier.function:
            raise ValueError("verifier.kind=function needs verifier.function=module:name")

    @property
    def fixed(self) -> tuple[str, ...]:
        return (
            *super().fixed,
            "policy",
            "critic",
            "critic_head",
            "critic_freeze",
            "reference",
            "reference_refresh_steps",
            "advantage",
            "staleness",
            "question_key",
            "answer_key",
            "system_prompt",
            "max_prompt_tokens",
        )

    @property
    def critic_path(self) -> str:
        """Model whose decoder becomes the critic."""
        if self.critic == "verifier":
            assert self.verifier.model
            return self.verifier.model
        return self.critic or self.policy

    @property
    def rollouts_per_step(self) -> int:
        """Responses of a step, over all ranks."""
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def compares_samples(self) -> bool:
        """Whether advantages compare the responses to a problem."""
        compares = self.advantage != "gae" and not self.advantage_function
        return compares and self.samples_per_prompt > 1

    @property
    def total_steps(self) -> int:
        """Rollout-and-update steps of the whole run."""
        if self.steps is not None:
            return self.steps
        return math.ceil((self.episodes or 0) / self.rollouts_per_step)

    @property
    def policy_steps(self) -> int:
        """Optimizer steps of the policy in the whole run."""
        return (self.total_steps - self.critic_warmup_steps) * self.epochs * self.minibatches

    @property
    def critic_steps(self) -> int:
        """Optimizer steps of the critic in the whole run."""
        return self.total_steps * (self.critic_epochs or self.epochs) * self.minibatches

    @property
    def mean_over(self) -> Literal["token", "sequence", "fixed"]:
        """What the policy loss is a mean over."""
        return self.loss_mean or ("sequence" if self.policy_loss == "gspo" else "token")
