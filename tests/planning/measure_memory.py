"""Measures the peak memory of training runs on CPU and compares it with `verippo plan`.

    python tests/planning/measure_memory.py

Each case runs twice, with a model of tens of millions of parameters and with a tiny one; the
difference of the two peaks is what the plan must foresee. glibc's threshold is fixed so that it
returns freed tensors to the system, as a GPU's allocator reuses them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "OMP_NUM_THREADS": "1",
    "PYTHONSAFEPATH": "1",
}
LARGE = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
TINY = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
COMMON = {
    "dtype": "fp32",
    "max_tokens_per_gpu": 512,
    "save_every": 100,
    "log_to": "jsonl",
}
SFT = {"max_steps": 2, "batch_size": 8, "max_seq_len": 512}
PPO = {
    "verifier.kind": "exact",
    "steps": 2,
    "epochs": 1,
    "prompts_per_step": 8,
    "sampling.max_new_tokens": 112,
    "max_prompt_tokens": 150,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run to measure."""

    command: str
    family: str
    ranks: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        checkpointing = self.options.get("gradient_checkpointing", True)
        return (
            f"{self.command}, {self.family}, ZeRO {self.options['zero_stage']}, {self.ranks} rank"
            f"{'s' if self.ranks > 1 else ''}, {'with' if checkpointing else 'no'} checkpointing"
        )


CASES = (
    Case(command="sft", family="llama", ranks=1, options={"zero_stage": 0}),
    Case(command="sft", family="qwen2", ranks=2, options={"zero_stage": 2}),
    Case(
        command="sft",
        family="llama",
        ranks=2,
        options={"zero_stage": 3, "gradient_checkpointing": False},
    ),
    Case(command="ppo", family="llama", ranks=1, options={"zero_stage": 0}),
    Case(command="ppo", family="qwen2", ranks=2, options={"zero_stage": 3}),
)


def resident_bytes(kind: str) -> int:
    """Resident memory of this process: VmRSS, the present one, or VmHWM, the peak."""
    found = re.search(rf"^{kind}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def make_folder(folder: Path, family: str, sizes: dict[str, int]) -> Path:
    """Writes a random model with a tokenizer of bytes, and rows for both commands."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **sizes, **special, tie_word_embeddings=False)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([""], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder


def write_rows(folder: Path) -> None:
    """Writes rows of which two fill a micro-batch."""
    rows = [
        {"Question": "Which?", "Complex_CoT": "a" * 180, "Response": "b" * 12} for _ in range(64)
    ]
    (folder / "sft.json").write_text(json.dumps(rows))
    rows = [
        {"Open-ended Verifiable Question": f"Question {n:03}?" * 4, "Ground-True Answer": "1"}
        for n in range(64)
    ]
    (folder / "ppo.json").write_text(json.dumps(rows))


def arguments(case: Case, model: Path, data: Path) -> list[str]:
    """Options of the run."""
    own = SFT if case.command == "sft" else PPO
    options = COMMON | own | case.options
    options |= {"model" if case.command == "sft" else "policy": model, "data": data}
    return [part for name, value in options.items() for part in (f"--{name}", str(value).lower())]


def peak_of_run(case: Case, model: Path, folder: Path) -> float:
    """Peak bytes of a run's largest rank."""
    program = [sys.executable]
    if case.ranks > 1:
        program += ["-m", "torch.distributed.run", "--standalone"]
        program += ["--nproc_per_node", str(case.ranks)]
    own = [str(Path(__file__).resolve()), "rank", str(folder), case.command]
    output = ["--output", str(folder / "out")]
    run = [*program, *own, *arguments(case, model, folder.parent / f"{case.command}.json"), *output]
    done = subprocess.run(run, capture_output=True, text=True, env=os.environ | ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    return max(float(path.read_text()) for path in folder.glob("peak-*"))


def planned_bytes(case: Case, model: Path) -> float:
    """The plan's peak of a process."""
    from verippo.launch.cli import parse
    from verippo.launch.plan import make_plan
    from verippo.launch.plan_config import PPOPlanConfig, SFTPlanConfig

    kind = SFTPlanConfig if case.command == "sft" else PPOPlanConfig
    machine = ["--device", "cpu", "--gpus", str(case.ranks)]
    config, _ = parse(kind, arguments(case, model, model) + machine, program="plan")
    return make_plan(config).memory.gpu


def measure(case: Case) -> tuple[float, float]:
    """Measured and planned bytes of a case, beyond those with a tiny model."""
    with tempfile.TemporaryDirectory() as name:
        peaks, plans = [], []
        write_rows(Path(name))
        for sizes in (LARGE, TINY):
            folder = Path(name) / f"hidden-{sizes['hidden_size']}"
            model = make_folder(folder / "model", case.family, sizes)
            peaks.append(peak_of_run(case, model, folder))
            plans.append(planned_bytes(case, model))
        return peaks[0] - peaks[1], plans[0] - plans[1]


def run_rank(folder: Path, command: list[str]) -> None:
    """Runs a command in this process and writes its peak."""
    from verippo.launch import cli

    cli.main(command)
    (folder / f"peak-{os.environ.get('RANK', '0')}").write_text(str(resident_bytes("VmHWM")))


def main() -> None:
    """Prints a row for each case."""
    print("| run | measured MiB | planned MiB | planned / measured |\n|---|---|---|---|")
    for case in CASES:
        measured, planned = measure(case)
        cells = f"{measured / 2**20:.0f} | {planned / 2**20:.0f} | {planned / measured:.2f}"
        print(f"| {case.name} | {cells} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        run_rank(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
