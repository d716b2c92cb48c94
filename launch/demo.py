"""The whole pipeline, small, on CPU: data, SFT, verifier, PPO and evaluation on made-up bedside scores, in minutes.

A demonstration that every stage does its job, on problems where thinking pays for a model of half a million parameters.
Not medicine: the problems are generated, and the model knows nothing else.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from ..core.report.run_report import write_report
from ..core.report.statistics import wilson_interval
from ..core.sampling.sampler import SamplingParams
from ..core.training.checkpoint import prepare_output
from ..rl.config import KLConfig, PPOConfig, VerifierConfig
from ..rl.train import train as train_ppo
from ..search.calculations import generate, paraphrases, wrong_answers
from ..sft.config import SFTConfig, VerifierTrainingConfig
from ..sft.finetune import train as train_sft
from ..sft.train_verifier import train as train_verifier

Record = dict[str, Any]
KINDS = ("bishop", "apgar", "child_pugh")
"""Scores whose findings earn 0 to 3 points each: few enough to learn in minutes, and hard to add up without reasoning."""
VERIFIER_TEMPLATE = "Answer: {response}\nReference: {reference}\nRight?"
"""Shorter than the usual one: most of a tiny verifier's time would go into reading the instruction."""
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Runs the whole pipeline small: data, SFT, verifier, PPO, evaluation, report."""

    output: str = "demo"
    """Folder that receives everything the demo writes."""
    seed: int = 0
    """Seed of data, weights and every draw."""
    num_train: int = 8192
    """Number of training problems."""
    num_eval: int = 256
    """Number of held-out problems; none shares its findings with a training problem."""
    findings: int = 8
    """Findings in a problem, which set its difficulty: 3 to 8."""
    sft_steps: int = 400
    """Optimizer steps of stage 1, at most."""
    sft_loss: float = 0.047
    """Held-out loss (nats per token) at which stage 1 stops, early so that PPO can improve it."""
    verifier_steps: int = 250
    """Optimizer steps of the verifier's training."""
    ppo_steps: int = 32
    """Steps of PPO."""
    rollouts_per_step: int = 128
    """Responses per PPO step."""
    ablation_seeds: int = 0
    """Train every variant of the ablation from this many seeds instead of running the demo."""

    def __post_init__(self) -> None:
        for name in (
            "num_train",
            "num_eval",
            "sft_steps",
            "verifier_steps",
            "ppo_steps",
            "rollouts_per_step",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.num_eval < 2 or self.num_train < self.rollouts_per_step:
            raise ValueError(
                f"num_eval={self.num_eval}, num_train={self.num_train}, rollouts_per_step={self.rollouts_per_step}: evaluation "
                "needs 2 problems, training as many as rollouts_per_step"
            )
        if not 3 <= self.findings <= 8:
            raise ValueError(f"findings={self.findings}: must lie in 3..8")


def demo(config: DemoConfig, *, resolved: dict[str, Any]) -> Path:
    """Runs every stage, or goes on where it was stopped, and returns the folder with report.html."""
    folder = prepare_output(config.output, resume="auto")
    if config.ablation_seeds:
        from .ablation import ablate

        return ablate(config, folder)
    clock = StageClock()
    paths = prepare(config, folder, clock)
    with clock("ppo"):
        train_ppo(ppo_config(config, paths, folder / "ppo"), resolved=resolved)
    stages = stage_table(folder / "ppo")
    stages["seconds"] = clock.seconds
    (folder / "ppo" / "stages.json").write_text(json.dumps(stages, indent=1))
    report = write_report(
        folder / "ppo", title="verippo demo: SFT, verifier, PPO", output=folder / "report.html"
    )
    for row in stages["rows"]:
        exact, score = row["exact_rate"], row["score_mean"]
        print(
            f"{row['stage']:<10} exact answers {exact['value']:.3f} (95 % {exact['low']:.3f} to {exact['high']:.3f}), "
            f"score {score['value']:.3f}, reasoned {row['reasoned_rate']['value']:.2f}, "
            f"length {row['response_length_mean']:.1f} tokens"
        )
    print(f"report: {report}")
    return report


@dataclass(frozen=True, kw_only=True)
class Paths:
    """What PPO starts from."""

    policy: Path
    verifier: Path
    template: Path
    problems: Path
    held_out: Path


def prepare(config: DemoConfig, folder: Path, clock: StageClock) -> Paths:
    """Everything before PPO: data, tokenizer and random model, stage 1, verifier."""
    with clock("data"):
        base = make_data_and_model(config, folder)
    with clock("sft"):
        train_sft(sft_config(config, folder, base), resolved={"demo": asdict(config)})
    with clock("verifier"):
        train_verifier(verifier_config(config, folder, base), resolved={"demo": asdict(config)})
    return Paths(
        policy=folder / "sft" / "model",
        verifier=folder / "verifier" / "model",
        template=folder / "data" / "verifier_template.txt",
        problems=folder / "data" / "problems.json",
        held_out=folder / "data" / "held_out.json",
    )


def make_data_and_model(config: DemoConfig, folder: Path) -> Path:
    """Writes data/*.json and a random Llama with a tokenizer of these words to base/, and returns base/.

    Raises ValueError when the folder holds those of another seed or size."""
    data, base = folder / "data", folder / "base"
    made_with = json.dumps(
        {name: getattr(config, name) for name in ("seed", "num_train", "num_eval", "findings")}
    )
    if (base / "config.json").exists():
        record = data / "made_with.json"
        if (found := record.read_text() if record.exists() else "other data") != made_with:
            raise ValueError(
                f"output {folder}: holds a demo with {found}, not {made_with}: choose another folder"
            )
        return base
    data.mkdir(exist_ok=True)
    (data / "made_with.json").write_text(made_with)
    sizes: dict[Literal["train", "eval"], int] = {
        "train": config.num_train,
        "eval": config.num_eval,
    }
    records = {
        split: generate(num, seed=config.seed, split=split, kinds=KINDS, difficulty=config.findings)
        for split, num in sizes.items()
    }
    _write(data / "problems.json", records["train"])
    _write(data / "held_out.json", records["eval"])
    for split, rows in records.items():
        _write(data / f"sft_{split}.json", half_without_reasoning(rows))
        _write(data / f"verifier_{split}.json", verifier_rows(rows[:2048], config.seed))
    (data / "verifier_template.txt").write_text(VERIFIER_TEMPLATE)
    make_base(base, records["train"], seed=config.seed)
    return base


def half_without_reasoning(records: list[Record]) -> list[Record]:
    """Every second answer loses its reasoning: the mix that PPO is to decide about."""
    return [
        record if n % 2 == 0 else {**record, "Complex_CoT": ""} for n, record in enumerate(records)
    ]


def verifier_rows(records: list[Record], seed: int) -> list[Record]:
    """Right and wrong answers to each problem, phrased alike: half are the bare number, as the policy writes it."""
    rows = []
    for n, record in enumerate(records):
        reference, right, wrong = (
            record["Ground-True Answer"],
            paraphrases(record),
            wrong_answers(record, 2, seed + n),
        )
        bare_wrong = re.findall(r"\d+", wrong[0])[0]
        for text, label in (
            (reference, True),
            (bare_wrong, False),
            (right[n % len(right)], True),
            (wrong[1], False),
        ):
            rows.append({"response": text, "reference": reference, "label": label})
    return rows


def make_base(folder: Path, records: list[Record], *, seed: int) -> None:
    """A Llama of 0.6 M random parameters and a byte-level BPE tokenizer in which nearly every word is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [
        f"## Thinking\n\n{r['Complex_CoT']}\n\n## Final Response\n\n{r['Response']} {r['Question']}"
        for r in records[:2048]
    ]
    tokenizer.train_from_iterator(
        [*texts, *[VERIFIER_TEMPLATE] * 64, *sum(map(paraphrases, records[:256]), [])], trainer
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
    )
    torch.manual_seed(seed)
    llama = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=len(fast),
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            initializer_range=0.05,
        )
    )
    llama.save_pretrained(folder)
    fast.save_pretrained(folder)


def sft_config(config: DemoConfig, folder: Path, base: Path) -> SFTConfig:
    """Configuration of stage 1."""
    return SFTConfig(
        model=str(base),
        data=str(folder / "data" / "sft_train.json"),
        eval_data=str(folder / "data" / "sft_eval.json"),
        output=str(folder / "sft"),
        max_steps=config.sft_steps,
        batch_size=64,
        learning_rate=2e-3,
        schedule="constant",
        warmup_ratio=0.1,
        weight_decay=0.01,
        eval_every=10,
        stop_at_loss=config.sft_loss,
        save_every=100,
        seed=config.seed,
        **_small(),
    )


def verifier_config(config: DemoConfig, folder: Path, base: Path) -> VerifierTrainingConfig:
    """Configuration of the verifier's training."""
    return VerifierTrainingConfig(
        model=str(base),
        data=str(folder / "data" / "verifier_train.json"),
        eval_data=str(folder / "data" / "verifier_eval.json"),
        template=str(folder / "data" / "verifier_template.txt"),
        output=str(folder / "verifier"),
        max_steps=config.verifier_steps,
        batch_size=64,
        learning_rate=5e-4,
        warmup_ratio=0.1,
        weight_decay=0.01,
        eval_every=50,
        save_every=1000,
        seed=config.seed,
        **_small(),
    )


def ppo_config(
    config: DemoConfig,
    paths: Paths,
    output: Path,
    **changes: Any,
) -> PPOConfig:
    """What the PPO stage is told; `changes` for its variants."""
    return replace(
        PPOConfig(
            policy=str(paths.policy),
            data=str(paths.problems),
            eval_data=str(paths.held_out),
            output=str(output),
            verifier=VerifierConfig(
                kind="classifier",
                model=str(paths.verifier),
                template=str(paths.template),
                max_tokens=256,
            ),
            sampling=SamplingParams(temperature=0.7, max_new_tokens=112),
            kl=KLConfig(coef=0.03),
            steps=config.ppo_steps,
            prompts_per_step=config.rollouts_per_step,
            epochs=2,
            minibatches=1,
            lam=1.0,
            policy_learning_rate=1.5e-4,
            critic_learning_rate=1e-3,
            warmup_ratio=0.05,
            schedule="constant",
            max_prompt_tokens=80,
            eval_temperature=0.7,
            eval_every=8,
            save_every=8,
            seed=config.seed,
            zero_stage=3,
            dtype="fp32",
            gradient_checkpointing=False,
            max_tokens_per_gpu=16384,
        ),
        **changes,
    )


def _small() -> dict[str, Any]:
    return {
        "zero_stage": 0,
        "dtype": "fp32",
        "gradient_checkpointing": False,
        "max_seq_len": 256,
        "max_tokens_per_gpu": 16384,
    }


def stage_table(ppo_folder: Path) -> dict[str, Any]:
    """The held-out evaluations before and after PPO, with 95 % intervals."""
    lines = [json.loads(line) for line in (ppo_folder / "eval.jsonl").read_text().splitlines()]
    rows = []
    for stage, line in (("after SFT", lines[0]), ("after PPO", lines[-1])):
        num, half = line["num"], 1.96 * line["score_std"] / line["num"] ** 0.5
        score = line["score_mean"]
        rows.append(
            {
                "stage": stage,
                "num": num,
                "exact_rate": _with_interval(line["exact_rate"], num),
                "score_mean": {"value": score, "low": score - half, "high": score + half},
                "reasoned_rate": _with_interval(line["reasoned_rate"], num),
                "response_length_mean": line["response_length_mean"],
            }
        )
    note = (
        "Held-out problems share no set of findings with training problems. Evaluation samples at temperature 0.7, as training "
        "does. "
        "Stage 1 is stopped early and learns answers with and without reasoning in equal parts; the share that reasons "
        "and the length show where PPO took it."
    )
    return {"rows": rows, "notes": [note]}


def _with_interval(rate: float, num: int) -> dict[str, float]:
    low, high = wilson_interval(round(rate * num), num)
    return {"value": rate, "low": low, "high": high}


class StageClock:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        print(f"== {stage}", flush=True)
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 1)


def _write(path: Path, rows: list[Record]) -> None:
    path.write_text(json.dumps(rows))
