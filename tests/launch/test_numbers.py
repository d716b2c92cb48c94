"""No number option of any command takes NaN, infinity, or true from YAML."""

import pytest
import yaml

from verippo.launch import cli
from verippo.launch.commands import COMMANDS, import_name
from verippo.launch.option_groups import options

NEEDED = {
    "data": "x.json",
    "output": "out",
    "policy": "m",
    "model": "m",
    "base_url": "http://h/v1",
    "first": "a",
    "second": "b",
}


def numbers():
    for name, command in COMMANDS.items():
        config_class = import_name(command.config)
        for option in options(config_class):
            if {"int", "float"} & set(option.type.split()):
                yield pytest.param(config_class, option.name, id=f"{name} {option.name}")


@pytest.mark.parametrize(("config_class", "option"), numbers())
def test_number_option_takes_no_nan_infinity_or_bool(config_class, option, tmp_path):
    names = {known.name for known in options(config_class)}
    for value in (float("nan"), float("inf"), float("-inf"), True):
        settings = {name: text for name, text in NEEDED.items() if f"--{name}" in names}
        *parents, last = option.removeprefix("--").split(".")
        inner = settings
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
        file = tmp_path / "c.yaml"
        file.write_text(yaml.safe_dump(settings))
        with pytest.raises(ValueError, match=last):
            cli.parse(config_class, ["--config", str(file)], program="verippo")
