"""The options of a configuration, and the heading under which the help lists each."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

import docstring_parser

GROUPS = {
    "model": "model policy critic critic_head critic_freeze reference baseline llm dtype",
    "data": """
        data eval_data eval_fraction limit columns question_key answer_key system_prompt
        max_prompt_tokens max_seq_len overlong tokenize_workers wrong_per_question language
        prompts min_length unique difficulty decontaminate mix split skip_bad first second
        num_train num_eval task findings""",
    "optimisation": """
        steps episodes epochs minibatches target_kl critic_epochs critic_warmup_steps
        critic_warmup_settled max_steps
        batch_size learning_rate policy_learning_rate critic_learning_rate warmup_ratio schedule
        weight_decay max_grad_norm stop_at_loss advantage advantage_function gamma lam lam_alpha
        lam_critic whiten clip_low clip_high dual_clip ratio_mask_low ratio_mask_high
        policy_loss loss_mean policy_loss_function entropy_coef value_clip kl
        reference_refresh_steps missing_eos_penalty overlong_buffer zero_stage
        offload gradient_checkpointing max_tokens_per_gpu sft_steps sft_loss verifier_steps
        ppo_steps""",
    "sampling": """
        prompts_per_step samples_per_prompt refill_groups staleness rollouts_per_step
        bench/prompts prompt_tokens repeats sampling engine base_url endpoint prompt runs
        permutations temperature top_p max_new_tokens max_batch eval_temperature max_depth
        max_attempts label_guided min_monologue_length max_asks sampler server correction
        rollout_function max_logprob_gap""",
    "verifier": """
        verifier ppo/llm verifier/llm threshold template judge judge_temperature""",
    "machine": """
        gpus_per_node gpu_memory host_memory gpu_reserve host_reserve host_overhead model_configs
        server_gpus server_tp server_mem_fraction tflops mfu memory_bandwidth memory_efficiency
        launch_microseconds node_bandwidth network_bandwidth pcie_bandwidth host_bandwidth
        disk_bandwidth mean_prompt_tokens mean_response_tokens mean_row_tokens""",
    "run": """
        output offline seed scoring resume trust_checkpoint retry_failed eval_every
        stop_below_baseline save_every save_total_limit log_to log_samples_every keep_rollouts
        max_skipped_steps timeout_seconds heartbeat_seconds ablation_seeds ablation_jobs host port
        num gpus tp dp mem_fraction device python api_key_env api_key_file arguments environment
        state start_timeout_seconds stop_timeout_seconds foreground json dry_run ranks
        connect_seconds""",
}
"""Options under each heading, in the order of the help; nested ones go by the part before the dot.
COMMAND/OPTION places one command's option elsewhere than that of the other commands."""
HEADINGS = {name: heading for heading, names in GROUPS.items() for name in names.split()}


class Option(NamedTuple):
    """An option as the help and the documentation show it."""

    name: str
    type: str
    default: str
    meaning: str


def grouped_options(command: str, config_class: type) -> dict[str, list[Option]]:
    """Options of a command by heading, in the order of GROUPS.

    Args:
        command: Name of the command.
        config_class: Dataclass of its configuration.

    Raises:
        ValueError: GROUPS lacks an option.
    """
    order = list(HEADINGS)
    ranked = []
    for option in options(config_class):
        name = option.name.removeprefix("--").partition(".")[0]
        own = f"{command}/{name}"
        ranked.append((order.index(own if own in HEADINGS else name), option))
    groups: dict[str, list[Option]] = {}
    for rank, option in sorted(ranked, key=lambda pair: pair[0]):
        groups.setdefault(HEADINGS[order[rank]], []).append(option)
    return groups


def options(config_class: type, prefix: str = "") -> Iterator[Option]:
    """Every option of a configuration, nested ones with dotted names."""
    meanings = field_docstrings(config_class)
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        hint = hints[field.name]
        name = prefix + field.name
        if dataclasses.is_dataclass(hint):
            yield from options(typing.cast(type, hint), f"{name}.")
        else:
            meaning = meanings.get(field.name, "")
            yield Option(f"--{name}", type_text(hint), default_text(field), meaning)


def field_docstrings(config_class: type) -> dict[str, str]:
    """The text under each field, of the class and its bases."""
    return {
        field.arg_name: " ".join((field.description or "").split())
        for base in reversed(config_class.__mro__[:-1])
        for field in docstring_parser.parse_from_object(base).params
    }


def type_text(hint: Any) -> str:
    """A type as a reader writes its values."""
    parts = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return ", ".join(map(str, parts))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(type_text, parts))
    if hint is types.NoneType:
        return "null"
    return str(hint).replace("verippo.core.llm.config.", "") if parts else hint.__name__


def default_text(field: dataclasses.Field[Any]) -> str:
    """The default, or "required"."""
    if field.default is not dataclasses.MISSING:
        default = "null" if field.default is None else field.default
        return str(default).lower() if isinstance(default, bool) else str(default)
    if field.default_factory is not dataclasses.MISSING:
        return str(field.default_factory())
    return "required"
