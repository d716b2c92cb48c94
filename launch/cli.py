"""The `verippo` command: a subcommand per stage, with every configuration field as an option."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

from ..core.training import stopping
from . import interruption
from .commands import COMMANDS, Command, import_name
from .help import command_help, usage
from .option_groups import options

# keeps child processes started in the repository from importing its kernels/ instead of the
# package of that name
os.environ.setdefault("PYTHONSAFEPATH", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost rank is reported in one line
warnings.filterwarnings("ignore", category=FutureWarning)

USER_ERRNOS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EROFS,
    errno.ENAMETOOLONG,
)
"""Operating-system errors that the user can remedy; others are bugs and show their traceback."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command.

    The exit status is 0 when it is done, 2 after a user's mistake (one line on stderr), and 1 after
    any other error. A training run ends with 0 after SIGTERM and SIGUSR1, with 130 after SIGINT.

    Args:
        argv: Arguments; None: those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        sys.exit(0 if arguments else 2)
    words = 2 if " ".join(arguments[:2]) in COMMANDS else 1  # `serve start` is one command
    name = " ".join(arguments[:words])
    if name not in COMMANDS:
        fail(f"unknown command {name!r}: choose one of {', '.join(COMMANDS)}")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # text that a terminal cannot show ends no run
    try:
        run(name, arguments[words:])
        print(end="", flush=True)
    except ValueError as error:
        if "VERIPPO_TRACEBACK" in os.environ:  # to debug functions of the user's own
            raise
        fail(f"{name}: {error}")
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for output that is flushed at exit
        sys.exit("verippo: standard output was closed; run the same command again to resume")
    except OSError as error:
        if error.errno not in USER_ERRNOS:
            raise
        fail(f"{name}: {error}")


def run(name: str, arguments: list[str]) -> None:
    """Runs a known command, or prints its help."""
    if "--help" in arguments or "-h" in arguments:
        print(command_help(name))
        sys.exit(0)
    command = COMMANDS[name]
    named = name_positional(command, arguments)
    config = None
    with stopping.handled() if name in interruption.TRAINING else contextlib.nullcontext():
        try:
            config, resolved = parse(import_name(command.config), named, program=f"verippo {name}")
            import_name(command.run)(config, resolved=resolved)
        except KeyboardInterrupt as error:
            sys.exit(interruption.end(error, name, arguments, config))


def name_positional(command: Command, arguments: list[str]) -> list[str]:
    """Turns leading positional arguments into options."""
    named: list[str] = []
    rest = list(arguments)
    for field in command.positional:
        if rest and not rest[0].startswith("-"):
            named += [f"--{field}", rest.pop(0)]
    return named + rest


def parse(config_class: type, arguments: list[str], *, program: str) -> tuple[Any, dict[str, Any]]:
    """Parses options and YAML file.

    Args:
        config_class: Dataclass of the configuration.
        arguments: The command's arguments.
        program: Name of the command, for messages.

    Returns:
        The configuration, and the same as plain values.

    Raises:
        ValueError: A key is unknown, a value has the wrong type, or the class refuses it.
    """
    import jsonargparse

    parser = jsonargparse.ArgumentParser(prog=program, exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(config_class, None, fail_untyped=False)
    try:
        namespace = parser.parse_args(complete_switches(config_class, arguments))
        plain = namespace.clone()
        plain.pop("config", None)
        refuse_nulls(config_class, plain)
        config = config_class(**vars(parser.instantiate(plain)))
    except jsonargparse.ArgumentError as error:
        raise ValueError(one_line(error)) from None
    return config, dataclasses.asdict(config)


def refuse_nulls(config_class: type, values: Any, prefix: str = "") -> None:
    """Raises ValueError for a null in a field whose type forbids it; jsonargparse accepts it."""
    for name, kind in get_type_hints(config_class).items():
        if values[name] is None and type(None) not in get_args(kind):
            raise ValueError(
                f"{prefix}{name} is null: give a value, or leave it out for the default"
            )
        if dataclasses.is_dataclass(kind):
            refuse_nulls(kind, values[name], f"{prefix}{name}.")  # type: ignore[arg-type]


def complete_switches(config_class: type, arguments: list[str]) -> list[str]:
    """Gives true to boolean options without a value, such as --retry_failed."""
    switches = {option.name for option in options(config_class) if option.type == "bool"}
    completed = []
    for name, following in zip(arguments, [*arguments, "--"][1:], strict=True):
        completed.append(name)
        if name in switches and following.startswith("--"):
            completed.append("true")
    return completed


def one_line(error: Exception | str) -> str:
    """A message on one line."""
    return " ".join(str(error).split())


def fail(message: str) -> None:
    """Prints a message to stderr and exits with status 2."""
    print(f"verippo: {one_line(message)}", file=sys.stderr, flush=True)
    sys.exit(2)


if __name__ == "__main__":
    if not getattr(sys.flags, "safe_path", False):  # `python -m` puts the working directory first
        del sys.path[0]
    main()
