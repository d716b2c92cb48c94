"""The tasks of the demo and its stages: generated problems, a small random model, stage settings.

Not medicine: the problems are sums of clinical scores, where reasoning helps a model of half a
million parameters.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from ..core.bounds import Bounds, CountingInt, NonNegativeInt, SeedInt, check_bounds
from ..rl.config import PPOConfig
from ..rl.lora_config import PPOLoraConfig
from ..search.calculations import generate, paraphrases, wrong_answers
from ..sft.config import SFTConfig, VerifierTrainingConfig
from ..sft.finetune import train as train_sft
from ..sft.train_verifier import train as train_verifier
from .cli import parse
from .demo_calculator import CALL_WORDS, with_calls
from .demo_methods import METHOD_WORDS, with_methods

Config = TypeVar("Config")
Record = dict[str, Any]

KINDS = ("bishop", "apgar", "child_pugh")
"""Scores whose findings earn 0 to 3 points each: learned in minutes, hard to add without
reasoning."""
VERIFIER_TEMPLATE = "Answer: {response}\nReference: {reference}\nRight?"
"""Shorter than the built-in template, whose instruction would take most of a tiny model's time."""
LORA: dict[str, Any] = {
    "lora": PPOLoraConfig(rank=8, alpha=16.0),
    "policy_learning_rate": 1.5e-3,
    "critic_learning_rate": 5e-3,
}
"""Fields of PPO with adapters, whose learning rates are higher."""
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Sizes(NamedTuple):
    """Sizes of the stages that differ between the tasks."""

    findings: int
    sft_steps: int
    sft_loss: float
    ppo_steps: int
    rollouts_per_step: int


class Task(NamedTuple):
    """A task of the demo."""

    sizes: Sizes
    answers: Callable[[list[Record], int], list[Record]]
    """(records, seed) -> the records with the answers that stage 1 learns."""
    wrong_anywhere: bool
    """Whether the verifier also learns wrong numbers that are far from the right one."""
    words: str
    """Words of its answers beside those of the problems, for the tokenizer."""
    configs: str
    """Beginning of the names of its files in launch/configs."""
    note: str
    """What the report says about it."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Runs the whole pipeline small: data, SFT, verifier, PPO, evaluation, report."""

    output: str = "demo"
    """Folder that receives everything the demo writes."""
    task: Literal["short", "long", "calculator"] = "short"
    """short: whether to reason; long: which method, at least 200 tokens before the score;
    calculator: whether to call a tool."""
    seed: SeedInt = 0
    """Seed of data, weights and every draw."""
    num_train: CountingInt = 8192
    """Number of training problems."""
    num_eval: Annotated[int, Bounds(low=2, rule="must be at least 2")] = 256
    """Number of held-out problems; none shares its findings with a training problem."""
    findings: Annotated[int, Bounds(low=3, high=8, rule="must lie in 3..8")] | None = None
    """Findings in a problem, 3 to 8, which set its difficulty; null: as the task has them."""
    sft_steps: CountingInt | None = None
    """Optimizer steps of stage 1, at most; null: those of the task."""
    sft_loss: float | None = None
    """Held-out loss (nats per token) that ends stage 1; null: the task's, which is early."""
    verifier_steps: CountingInt = 250
    """Optimizer steps of the verifier's training."""
    ppo_steps: CountingInt | None = None
    """Steps of PPO; null: those of the task."""
    rollouts_per_step: CountingInt | None = None
    """Responses per PPO step; null: those of the task."""
    lora: bool = False
    """Train adapters of policy and critic in PPO, in ppo-lora/ (see ppo --lora.rank)."""
    ablation_seeds: NonNegativeInt = 0
    """Train every variant of the ablation from this many seeds instead of running the demo."""
    ablation_jobs: CountingInt = 1
    """Runs of the ablation at once, each in a process of its own."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.num_train < self.sizes.rollouts_per_step:
            raise ValueError(
                f"num_train={self.num_train}: must be at least rollouts_per_step="
                f"{self.sizes.rollouts_per_step}"
            )
        if self.ablation_seeds and self.task == "calculator":
            raise ValueError("ablation_seeds: task=calculator has no variants: choose another task")

    @property
    def sizes(self) -> Sizes:
        """The task's sizes, or the given ones."""
        given = {name: getattr(self, name) for name in Sizes._fields}
        chosen = {name: value for name, value in given.items() if value is not None}
        return TASKS[self.task].sizes._replace(**chosen)


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
            f"{TASKS[config.task].configs}_sft",
            folder,
            max_steps=config.sizes.sft_steps,
            stop_at_loss=config.sizes.sft_loss,
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
    names = ("seed", "num_train", "num_eval")
    made_with = json.dumps(
        {name: getattr(config, name) for name in names}
        | {"findings": config.sizes.findings, "task": config.task}
    )
    if (folder / "base" / "config.json").exists():
        if (found := record.read_text()) != made_with:
            raise ValueError(
                f"output {folder}: holds a demo with {found}, not {made_with}: "
                "choose another folder"
            )
        return
    data.mkdir(exist_ok=True)
    record.write_text(made_with)
    settings: dict[str, Any] = {
        "seed": config.seed,
        "kinds": KINDS,
        "difficulty": config.sizes.findings,
    }
    answers = TASKS[config.task].answers
    anywhere = TASKS[config.task].wrong_anywhere
    train = generate(config.num_train, split="train", **settings)
    held_out = generate(config.num_eval, split="eval", **settings)
    files = {
        "problems": train,
        "held_out": held_out,
        "sft_train": answers(train, config.seed),
        "sft_eval": answers(held_out, config.seed),
        "verifier_train": verifier_rows(train[:2048], config.seed, anywhere=anywhere),
        "verifier_eval": verifier_rows(held_out[:2048], config.seed, anywhere=anywhere),
    }
    for name, rows in files.items():
        (data / f"{name}.json").write_text(json.dumps(rows))
    (data / "verifier_template.txt").write_text(VERIFIER_TEMPLATE)
    make_base(folder / "base", train, TASKS[config.task].words, seed=config.seed)


def half_without_reasoning(records: list[Record], seed: int = 0) -> list[Record]:
    """Removes the reasoning from every second answer: PPO is to learn which kind is better."""
    return [record | {"Complex_CoT": ""} if n % 2 else record for n, record in enumerate(records)]


def verifier_rows(records: list[Record], seed: int, *, anywhere: bool = False) -> list[Record]:
    """Two right and two wrong answers to each problem, in the same phrases.

    Half of them are the bare number, as the policy writes it; with `anywhere`, a wrong one is that
    of any other record, and else close to the right one.
    """
    rows = []
    rng = random.Random(f"wrong/{seed}")
    totals = sorted({record["Ground-True Answer"] for record in records})
    for n, record in enumerate(records):
        reference = record["Ground-True Answer"]
        right = paraphrases(record)
        wrong = wrong_answers(record, 2, seed + n)
        bare_wrong = re.findall(r"\d+", wrong[0])[0]
        if anywhere:
            bare_wrong = rng.choice([total for total in totals if total != reference])
        texts = [reference, bare_wrong, right[n % len(right)], wrong[1]]
        for text, label in zip(texts, (True, False, True, False), strict=True):
            rows.append({"response": text, "reference": reference, "label": label})
    return rows


def make_base(
    folder: Path,
    records: list[Record],
    words: str,
    *,
    seed: int,
) -> None:
    """Writes a Llama of 0.6 M random parameters and a byte-level BPE tokenizer.

    Nearly every word of the records, and of `words`, becomes one token.
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
    texts += [VERIFIER_TEMPLATE] * 64 + [words] * 256
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
        "steps": config.sizes.ppo_steps,
        "prompts_per_step": config.sizes.rollouts_per_step,
        "seed": config.seed,
    }
    if config.lora:
        settings |= LORA | {"output": str(folder / "ppo-lora")}
    name = f"{TASKS[config.task].configs}_ppo"
    return read_config(PPOConfig, name, folder, **(settings | changes))


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


TASKS = {
    "short": Task(
        sizes=Sizes(
            findings=8,
            sft_steps=400,
            sft_loss=0.047,
            ppo_steps=32,
            rollouts_per_step=128,
        ),
        answers=half_without_reasoning,
        wrong_anywhere=False,
        words="",
        configs="demo",
        note="Held-out problems share no set of findings with training problems. Evaluation "
        "samples at temperature 0.7, as training does. Stage 1 is stopped early and learns answers "
        "with and without reasoning in equal parts; the share that reasons and the length show "
        "how PPO changed this.",
    ),
    "long": Task(
        sizes=Sizes(
            findings=5,
            sft_steps=250,
            sft_loss=0.0,
            ppo_steps=12,
            rollouts_per_step=64,
        ),
        answers=with_methods,
        wrong_anywhere=True,
        words=METHOD_WORDS,
        configs="demo_long",
        note="Held-out problems share no set of findings with training problems. Evaluation "
        "samples at temperature 0.7, as training does. Stage 1 learns three methods in equal "
        "parts, of which one is right, and two of the three clinical scores. The first word "
        "chooses the method; the verdict comes at least 200 tokens later.",
    ),
    "calculator": Task(
        sizes=Sizes(
            findings=5,
            sft_steps=300,
            sft_loss=0.0,
            ppo_steps=16,
            rollouts_per_step=128,
        ),
        answers=with_calls,
        wrong_anywhere=False,
        words=CALL_WORDS,
        configs="demo_calculator",
        note="Held-out problems share no set of findings with training problems. Evaluation "
        "samples at temperature 0.7, as training does. Stage 1 learns to call a calculator in half "
        "of the answers. A response has one call at most: its turns less one are the share of "
        "responses that call.",
    ),
}
