"""Writes the tables of docs/cluster.md: the plan of every shipped training configuration.

python -m verippo.launch.plan_page [--check]
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from .cli import parse
from .commands import COMMANDS, import_name
from .option_check import read_config_files
from .plan import Plan, make_plan
from .plan_memory import GIB
from .plan_stage import stage_of

PAGE = Path(__file__).parents[1] / "docs" / "cluster.md"
CONFIGS = Path(__file__).parent / "configs"
SERVERS_SLEEP = "--gpus 32 --server_tp 8"
SERVERS_APART = (
    "--gpus 32 --server_gpus 16 --server_tp 8 --server_mem_fraction 0.85 --offload none "
    "--sampler.sleep false --sampler.sync distributed"
)
CARD_24 = "--gpus 1 --gpu_memory 24 --tflops 165 --memory_bandwidth 1008"
SMALL = "--policy Qwen/Qwen2.5-0.5B-Instruct --verifier.model Qwen/Qwen2.5-0.5B-Instruct"
MACHINES: tuple[tuple[str, str], ...] = (
    ("sft_05b", CARD_24),
    ("verifier_05b", CARD_24),
    ("ppo_05b", f"{CARD_24} {SMALL}"),
    ("sft_7b", "--gpus 8"),
    ("sft_7b_base", "--gpus 8"),
    ("verifier_qwen_3b", "--gpus 8"),
    ("ppo_7b", "--gpus 8"),
    ("sft_8b", "--gpus 8"),
    ("verifier_3b", "--gpus 8"),
    ("ppo_8b", "--gpus 8"),
    ("ppo_8b", "--gpus 4 --offload optimizer"),
    ("sft_70b", "--gpus 32"),
    ("sft_70b", "--gpus 16 --offload optimizer"),
    ("ppo_70b", SERVERS_SLEEP),
    ("ppo_70b", SERVERS_APART),
    ("sft_72b", "--gpus 32"),
    ("ppo_72b", SERVERS_SLEEP),
    ("ppo_72b", SERVERS_APART),
)
"""Configurations and the options of `verippo plan` that describe the machine of each."""
HEAD = """\
| configuration | machine | GiB a GPU: always + phase | GiB a host | fits | s a step | least |
|---|---|---|---|---|---|---|
"""
MARKS = re.compile(r"(<!-- plan -->\n).*?(<!-- /plan -->)", re.DOTALL)


def plan_of(name: str, options: str) -> Plan:
    """The plan of a shipped configuration.

    Args:
        name: its file, without .yaml.
        options: further options of `verippo plan`, as in a shell.
    """
    file = ["--config", str(CONFIGS / f"{name}.yaml")]
    stage = stage_of(read_config_files(file)[0])
    kind = import_name(COMMANDS[f"plan {stage}"].config)
    config, _ = parse(kind, [*file, *options.split()], program="verippo plan")
    return make_plan(config)


def row(name: str, options: str) -> str:
    """A configuration's row of the table."""
    plan = plan_of(name, options)
    memory = plan.memory
    passing = memory.gpu - memory.resident
    peak = f"{memory.resident / GIB:.1f} + {passing / GIB:.1f} = {memory.gpu / GIB:.1f}"
    host = f"{memory.host / GIB:.0f}" if memory.host else ""
    seconds = f"{sum(phase.seconds for phase in plan.phases):.1f}"
    fits = "yes" if memory.fits else "no"
    cells = [name, f"`{options}`", f"{peak} ({memory.peak_phase})", host, fits, seconds]
    return f"| {' | '.join([*cells, str(plan.smallest)])} |"


def page(text: str) -> str:
    """The page with its table written anew."""
    rows = "".join(f"{row(*machine)}\n" for machine in MACHINES)
    return MARKS.sub(lambda found: f"{found[1]}{HEAD}{rows}{found[2]}", text)


def main(arguments: list[str]) -> int:
    """Writes the page; with --check, says whether it is up to date."""
    text = PAGE.read_text(encoding="utf-8")
    written = page(text)
    if "--check" in arguments:
        if written != text:
            print(f"{PAGE} is out of date: run python -m verippo.launch.plan_page")
            return 1
        return 0
    PAGE.write_text(written, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
