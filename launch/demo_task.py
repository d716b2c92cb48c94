"""The task of the demo and its stages: generated problems, a small random model, stage settings.

Not medicine: the problems are sums of clinical scores, where reasoning helps a model of half a
million parameters.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from ..core.bounds import Bounds, CountingInt, NonNegativeInt, SeedInt, check_bounds
from ..core.report.statistics import Interval, wilson_interval
from ..rl.config import PPOConfig
from ..search.calculations import generate, paraphrases, wrong_answers
from ..sft.config import SFTConfig, VerifierTrainingConfig
from ..sft.finetune import train as train_sft
from ..sft.train_verifier import train as train_verifier
from .cli import parse

Config = TypeVar("Config")
Record = dict[str, Any]

KINDS = ("bishop", "apgar", "child_pugh")
"""Scores whose findings earn 0 to 3 points each: learned in minutes, hard to add without
reasoning."""
VERIFIER_TEMPLATE = "Answer: {response}\nReference: {reference}\nRight?"
"""Shorter than the built-in template, whose instruction would take most of a tiny model's time."""
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NOTE = (
    "Held-out problems share no set of findings with training problems. Evaluation samples at "
    "temperature 0.7, as training does. Stage 1 is stopped early and learns answers with and "
    "without reasoning in equal parts; the share that reasons and the length show how PPO changed "
    "this."
)


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Runs the whole pipeline small: data, SFT, verifier, PPO, evaluation, report."""

    output: str = "demo"
    """Folder that receives everything the demo writes."""
    seed: SeedInt = 0
    """Seed of data, weights and every draw."""
    num_train: CountingInt = 8192
    """Number of training problems."""
    num_eval: Annotated[int, Bounds(low=2, rule="must be at least 2")] = 256
    """Number of held-out problems; none shares its findings with a training problem."""
    findings: Annotated[int, Bounds(low=3, high=8, rule="must lie in 3..8")] = 8
    """Findings in a problem, which set its difficulty: 3 to 8."""
    sft_steps: CountingInt = 400
    """Optimizer steps of stage 1, at most."""
    sft_loss: float = 0.047
    """Held-out loss (nats per token) at which stage 1 stops, early so that PPO can improve it."""
    verifier_steps: CountingInt = 250
    """Optimizer steps of the verifier's training."""
    ppo_steps: CountingInt = 32
    """Steps of PPO."""
    rollouts_per_step: CountingInt = 128
    """Responses per PPO step."""
    ablation_seeds: NonNegativeInt = 0
    """Train every variant of the ablation from this many seeds instead of running the demo."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.num_train < self.rollouts_per_step:
            raise ValueError(
                f"num_train={self.num_train}: must be at least rollouts_per_step="
                f"{self.rollouts_per_step}"
            )


@contextmanager
def timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    """Announces a stage and records its duration in `seconds`."""
    print(f"== {stage}", flush=True)
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 1)


def prepare(config: DemoConfig, folder: Path, seconds: dict[str, float]) -> None:
    """Runs the stages before PPO: data and model, stage 1, verifier.

    Args:
        config: The demo's configuration.
        folder: Folder that receives data/, base/, sft/ and verifier/; finished stages are kept.
        seconds: Receives the duration of each stage.

    Raises:
        ValueError: The folder holds a demo with another seed or size.
    """
    resolved = {"demo": asdict(config)}
    with timed("data", seconds):
        make_data_and_model(config, folder)
    with timed("sft", seconds):
        sft = read_config(
            SFTConfig,
            "demo_sft",
            folder,
            max_steps=config.sft_steps,
            stop_at_loss=config.sft_loss,
            seed=config.seed,
        )
        train_sft(sft, resolved=resolved)
    with timed("verifier", seconds):
        verifier = read_config(
            VerifierTrainingConfig,
            "demo_verifier",
            folder,
            max_steps=config.verifier_steps,
            seed=config.seed,
        )
        train_verifier(verifier, resolved=resolved)


def make_data_and_model(config: DemoConfig, folder: Path) -> None:
    """Writes data/*.json and the random model base/ unless they are there.

    Raises:
        ValueError: The folder holds those of another seed or size.
    """
    data = folder / "data"
    record = data / "made_with.json"
    names = ("seed", "num_train", "num_eval", "findings")
    made_with = json.dumps({name: getattr(config, name) for name in names})
    if (folder / "base" / "config.json").exists():
        if (found := record.read_text()) != made_with:
            raise ValueError(
                f"output {folder}: holds a demo with {found}, not {made_with}: "
                "choose another folder"
            )
        return
    data.mkdir(exist_ok=True)
    record.write_text(made_with)
    settings: dict[str, Any] = {"seed": config.seed, "kinds": KINDS, "difficulty": config.findings}
    train = generate(config.num_train, split="train", **settings)
    held_out = generate(config.num_eval, split="eval", **settings)
    files = {
        "problems": train,
        "held_out": held_out,
        "sft_train": half_without_reasoning(train),
        "sft_eval": half_without_reasoning(held_out),
        "verifier_train": verifier_rows(train[:2048], config.seed),
        "verifier_eval": verifier_rows(held_out[:2048], config.seed),
    }
    for name, rows in files.items():
        (data / f"{name}.json").write_text(json.dumps(rows))
    (data / "verifier_template.txt").write_text(VERIFIER_TEMPLATE)
    make_base(folder / "base", train, seed=config.seed)


def half_without_reasoning(records: list[Record]) -> list[Record]:
    """Removes the reasoning from every second answer: PPO is to learn which kind is better."""
    return [record | {"Complex_CoT": ""} if n % 2 else record for n, record in enumerate(records)]


def verifier_rows(records: list[Record], seed: int) -> list[Record]:
    """Two right and two wrong answers to each problem, in the same phrases.

    Half of them are the bare number, as the policy writes it.
    """
    rows = []
    for n, record in enumerate(records):
        reference = record["Ground-True Answer"]
        right = paraphrases(record)
        wrong = wrong_answers(record, 2, seed + n)
        bare_wrong = re.findall(r"\d+", wrong[0])[0]
        texts = [reference, bare_wrong, right[n % len(right)], wrong[1]]
        for text, label in zip(texts, (True, False, True, False), strict=True):
            rows.append({"response": text, "reference": reference, "label": label})
    return rows


def make_base(folder: Path, records: list[Record], *, seed: int) -> None:
    """Writes a Llama of 0.6 M random parameters and a byte-level BPE tokenizer.

    Nearly every word of the records becomes one token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [
        f"## Thinking\n\n{r['Complex_CoT']}\n\n## Final Response\n\n{r['Response']} {r['Question']}"
        for r in records[:2048]
    ]
    texts += [VERIFIER_TEMPLATE] * 64
    texts += [phrase for record in records[:256] for phrase in paraphrases(record)]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
    )
    llama = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        initializer_range=0.05,
    )
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(llama).save_pretrained(folder)
    fast.save_pretrained(folder)


def ppo_config(config: DemoConfig, folder: Path, **changes: Any) -> PPOConfig:
    """Configuration of PPO.

    Args:
        config: The demo's configuration.
        folder: Folder with the prepared stages.
        **changes: Fields in which a variant differs.
    """
    settings: dict[str, Any] = {
        "steps": config.ppo_steps,
        "prompts_per_step": config.rollouts_per_step,
        "seed": config.seed,
    }
    return read_config(PPOConfig, "demo_ppo", folder, **(settings | changes))


def read_config(config_class: type[Config], name: str, folder: Path, **changes: Any) -> Config:
    """Reads launch/configs/NAME.yaml for the demo's folder and changes some fields."""
    path = Path(__file__).parent / "configs" / f"{name}.yaml"
    quoted = json.dumps(str(folder))[1:-1]  # as in a double-quoted string of YAML
    text = path.read_text().replace("DEMO/", f"{quoted}/")
    config, _ = parse(config_class, ["--config", text], program=name)
    return replace(config, **changes)


def read_rows(path: Path) -> list[Record]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def stage_table(ppo_folder: Path) -> dict[str, Any]:
    """Contents of stages.json: held-out evaluations before and after PPO, with 95 % intervals."""
    evals = read_rows(ppo_folder / "eval.jsonl")
    rows = []
    for stage, row in (("after SFT", evals[0]), ("after PPO", evals[-1])):
        num = row["num"]
        score = row["score_mean"]
        half = 1.96 * row["score_std"] / num**0.5
        rates = {
            key: Interval(row[key], *wilson_interval(round(row[key] * num), num))._asdict()
            for key in ("exact_rate", "reasoned_rate")
        }
        measures = {
            "score_mean": Interval(score, score - half, score + half)._asdict(),
            "response_length_mean": row["response_length_mean"],
        }
        rows.append({"stage": stage, "num": num} | rates | measures)
    return {"rows": rows, "notes": [NOTE]}
