"""The `verippo` command: one subcommand a stage, every configuration field an option."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args, get_type_hints

os.environ.setdefault(
    "PYTHONSAFEPATH", "1"
)  # for launched children: our kernels/ must not shadow the package of that name
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
warnings.filterwarnings("ignore", category=FutureWarning)


class Command(NamedTuple):
    summary: str
    config: str
    """module:class of its fields; imported first and alone, so that help and refusals come at once"""
    run: str
    """module:function that takes the configuration, and its plain values as `resolved`"""
    positional: tuple[str, ...] = ()
    """fields that may be given by place, before the options: `verippo eval compare A B`"""


COMMANDS = {
    "problems": Command(
        "exam questions -> verifiable problems",
        "verippo.search.config:ProblemsConfig",
        "verippo.search.problems:problems",
    ),
    "search": Command(
        "verifiable problems -> complex chain of thought and response, to train stage 1 on",
        "verippo.search.config:SearchConfig",
        "verippo.search.reasoning:search",
    ),
    "sft": Command(
        "stage 1: packed fine-tuning on answers that think first",
        "verippo.sft.config:SFTConfig",
        "verippo.sft.finetune:train",
    ),
    "verifier": Command(
        "trains the two-class verifier that rewards PPO",
        "verippo.sft.config:VerifierTrainingConfig",
        "verippo.sft.train_verifier:train",
    ),
    "ppo": Command(
        "stage 2: PPO with a frozen verifier",
        "verippo.rl.config:PPOConfig",
        "verippo.rl.train:train",
    ),
    "eval": Command(
        "multiple-choice accuracy of a model, with a report",
        "verippo.eval.config:EvalConfig",
        "verippo.eval.evaluate:evaluate",
    ),
    "eval compare": Command(
        "two evaluations of the same items, item by item: eval compare A B",
        "verippo.eval.config:CompareConfig",
        "verippo.eval.compare:compare",
        positional=("first", "second"),
    ),
    "serve start": Command(
        "starts sglang servers and waits until they answer",
        "verippo.launch.serve:ServeConfig",
        "verippo.launch.serve:start",
    ),
    "serve status": Command(
        "lists the servers that were started",
        "verippo.launch.serve:ServedConfig",
        "verippo.launch.serve:status",
    ),
    "serve stop": Command(
        "stops them, children and all",
        "verippo.launch.serve:ServedConfig",
        "verippo.launch.serve:stop",
    ),
    "bench": Command(
        "how fast responses are drawn, in this process and from servers",
        "verippo.launch.bench:BenchConfig",
        "verippo.launch.bench:bench",
    ),
    "demo": Command(
        "all of it, small, on CPU: SFT, verifier, PPO, evaluation, report",
        "verippo.launch.demo:DemoConfig",
        "verippo.launch.demo:demo",
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Exit status: 0 done, 2 the caller's mistake (one line on stderr), 1 anything else."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        sys.exit(0 if arguments else 2)
    words = 2 if " ".join(arguments[:2]) in COMMANDS else 1  # `serve start` is one command
    name, rest = " ".join(arguments[:words]), arguments[words:]
    if name not in COMMANDS:
        _fail(f"unknown command {name!r}: choose one of {', '.join(COMMANDS)}")
    if isinstance(sys.stdout, io.TextIOWrapper):  # what a terminal cannot show must not end a run
        sys.stdout.reconfigure(errors="replace")
    try:
        command = COMMANDS[name]
        config, resolved = parse(
            _named(command.config), _by_name(command, rest), program=f"verippo {name}"
        )
        _named(command.run)(config, resolved=resolved)
        print(end="", flush=True)
    except ValueError as error:
        if "VERIPPO_TRACEBACK" in os.environ:  # for those whose own functions run inside
            raise
        _fail(f"{name}: {error}")
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is flushed at exit
        sys.exit("verippo: standard output was closed; the same command goes on from here")
    except OSError as error:
        if error.errno not in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EFBIG,
            errno.EACCES,
            errno.EROFS,
            errno.ENAMETOOLONG,
        ):
            raise
        _fail(f"{name}: {error}")
    except KeyboardInterrupt:
        print("verippo: interrupted", file=sys.stderr)
        sys.exit(1)


def _by_name(command: Command, arguments: list[str]) -> list[str]:
    """Arguments given by place become options, in the order of `positional`."""
    named: list[str] = []
    for field in command.positional:
        if arguments and not arguments[0].startswith("-"):
            named += [f"--{field}", arguments.pop(0)]
    return named + arguments


def _named(spec: str) -> Any:
    module, _, name = spec.partition(":")
    return getattr(importlib.import_module(module), name)


def parse(config_class: type, arguments: list[str], *, program: str) -> tuple[Any, dict[str, Any]]:
    """The configuration that a YAML file and the options describe, and the same as plain values.

    Raises ValueError for an unknown key, a value of the wrong type, and whatever the class itself refuses.
    """
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=program, exit_on_error=False, description=config_class.__doc__
    )
    parser.add_argument("--config", action="config", help="a YAML file with any of these fields")
    parser.add_class_arguments(config_class, None, fail_untyped=False)
    try:
        namespace = parser.parse_args(_spelled_out(config_class, arguments))
        plain = namespace.clone()
        plain.pop("config", None)
        _refuse_nulls(config_class, plain)
        config = config_class(**vars(parser.instantiate(plain)))
    except jsonargparse.ArgumentError as error:
        raise ValueError(_one_line(error)) from None
    return config, dataclasses.asdict(config)


def _refuse_nulls(config_class: type, values: Any, prefix: str = "") -> None:
    """jsonargparse takes null for any type."""
    for name, kind in get_type_hints(config_class).items():
        if values[name] is None and type(None) not in get_args(kind):
            raise ValueError(
                f"{prefix}{name} is null: give a value, or leave it out for the default"
            )
        if dataclasses.is_dataclass(kind):
            _refuse_nulls(kind, values[name], f"{prefix}{name}.")  # type: ignore[arg-type]


def _spelled_out(config_class: type, arguments: list[str]) -> list[str]:
    """A yes-or-no option without a value means true: --retry_failed."""
    switches = {
        f"--{field.name}"
        for field in dataclasses.fields(config_class)
        if isinstance(field.default, bool)
    }
    pairs = zip(arguments, [*arguments, "--"][1:], strict=True)
    return [
        part
        for name, after in pairs
        for part in ([name, "true"] if name in switches and after[:2] == "--" else [name])
    ]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return (
        "usage: verippo COMMAND [--config FILE.yaml] [--FIELD VALUE ...]\n\ncommands:\n"
        + "\n".join(lines)
        + (
            "\n\n`verippo COMMAND --help` lists the fields; `--print_config` prints them as YAML."
            "\nVERIPPO_TRACEBACK=1 shows where an error comes from."
        )
    )


def _fail(message: str) -> None:
    print(f"verippo: {_one_line(ValueError(message))}", file=sys.stderr, flush=True)
    sys.exit(2)


if __name__ == "__main__":
    if not getattr(sys.flags, "safe_path", False):  # `python -m` puts the working directory first
        del sys.path[0]
    main()
