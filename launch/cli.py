"""The `verippo` command: a subcommand per stage, with every configuration field as an option."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

from ..core.files import is_main_process, removing_traces
from ..core.messages import mask_credentials, printable
from ..core.training import stopping
from . import interruption
from .commands import COMMANDS, Command, import_name
from .help import command_help, usage
from .offline import check_servers, go_offline_if_asked
from .option_check import check_names, check_texts, read_config_files
from .option_groups import options
from .plan_stage import name_stage

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
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.EPERM,
)
"""Operating-system errors that the user can remedy; others are bugs and show their traceback."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command.

    The exit status is 0 when it is done, 2 after a user's mistake (one line on stderr), and 1 after
    any other error. A training run ends with 0 after SIGTERM and SIGUSR1, with 130 after SIGINT.

    Args:
        argv: Arguments; None: those of the process.
    """
    sys.excepthook = show_crash
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        with contextlib.suppress(BrokenPipeError):  # `| head`
            print(usage(), flush=True)
        sys.exit(0 if arguments else 2)
    if arguments[0] == "plan":
        arguments = ["plan", *_planned(arguments[1:])]
    words = 2 if " ".join(arguments[:2]) in COMMANDS else 1  # `serve start` is one command
    name = " ".join(arguments[:words])
    if name not in COMMANDS and arguments[1:2] in (["-h"], ["--help"]) and usage(name):
        print(usage(name))  # of commands of two words, such as `serve`
        sys.exit(0)
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


def _planned(arguments: list[str]) -> list[str]:
    """The arguments of `plan` with the stage that they are for."""
    try:
        return name_stage(arguments)
    except ValueError as error:
        fail(f"plan: {error}")


def run(name: str, arguments: list[str]) -> None:
    """Runs a known command, or prints its help."""
    if "--help" in arguments or "-h" in arguments:
        print(command_help(name))
        sys.exit(0)
    command = COMMANDS[name]
    named = name_positional(command, arguments)
    files = read_config_files(named)
    go_offline_if_asked(named, files)
    config_class = import_name(command.config)
    check_names(name, config_class, named, files)
    config = None
    with contextlib.ExitStack() as stack:
        if name in interruption.TRAINING:
            stack.enter_context(stopping.handled())
        try:
            config, resolved = parse(config_class, named, program=f"verippo {name}")
            check_servers(config)
            if "output" in resolved and is_main_process():
                stack.enter_context(removing_traces(Path(config.output).expanduser()))
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
        The configuration, and the same as plain values without the credentials in its URLs.

    Raises:
        ValueError: A key is unknown, a value has the wrong type, or the class refuses it.
    """
    import jsonargparse

    parser = jsonargparse.ArgumentParser(prog=program, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(config_class, None, fail_untyped=False)
    try:
        with masked_output():
            namespace = parser.parse_args(complete_switches(config_class, arguments))
        plain = namespace.clone()
        plain.pop("config", None)
        refuse_nulls(config_class, plain)
        config = config_class(**vars(parser.instantiate(plain)))
    except jsonargparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    resolved = dataclasses.asdict(config)
    check_texts(resolved)
    return config, mask_credentials(resolved)


@contextlib.contextmanager
def masked_output() -> Iterator[None]:
    """Removes credentials from what the body prints, which is what --print_config shows."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        print(mask_credentials(printed.getvalue()), end="")


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


def fail(message: str) -> NoReturn:
    """Prints a message to stderr, on one line, and exits with status 2."""
    print(f"verippo: {printable(message)}", file=sys.stderr, flush=True)
    sys.exit(2)


def show_crash(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Prints a traceback without the credentials in its URLs."""
    text = "".join(traceback.format_exception(kind, error, trace))
    print(mask_credentials(text), end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    if not getattr(sys.flags, "safe_path", False):  # `python -m` puts the working directory first
        del sys.path[0]
    main()
