"""Checks of the machine: processors, memory, GPUs, and versions of packages."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
import subprocess
from importlib import metadata

import psutil
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from ...core.training.run_config import RunConfig
from .findings import Caution, Report

GIB = 2**30
SHOWN = ("torch", "transformers", "deepspeed", "flash-attn")
COMMAND_SECONDS = 20


def check_machine(report: Report, config: RunConfig) -> None:
    """Checks processors, memory, GPUs and packages of this host."""
    report.group = "machine"
    report.check("Python", _python)
    report.check("CPU", _processors)
    report.check("GPU", _gpus)
    for requirement in wrong_requirements(metadata.requires("verippo") or []):
        report.add("FAILED", "packages", requirement)
    report.check("packages", _packages)
    report.check("attention kernel", _attention)
    if config.offload != "none":
        report.check("compiler", _compiler)


def _python() -> str:
    wanted = metadata.metadata("verippo")["Requires-Python"]
    version = platform.python_version()
    if not SpecifierSet(wanted or "").contains(version, prereleases=True):
        raise ValueError(f"{version}, but verippo needs {wanted}: make another environment")
    return version


def _processors() -> str:
    memory = psutil.virtual_memory()
    return (
        f"{os.cpu_count()} cores, {memory.total / GIB:.1f} GiB of memory, "
        f"{memory.available / GIB:.1f} GiB of it available"
    )


def _gpus() -> str:
    driver = _driver()
    if not torch.cuda.is_available():
        if driver:
            raise ValueError(
                f"driver {driver} is there, but torch {torch.__version__} cannot use it: install "
                "a torch build for a CUDA version that the driver supports"
            )
        raise Caution("none: the run will be on CPU")
    devices = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    names = ", ".join(f"{gpu.name} {gpu.total_memory / GIB:.0f} GiB" for gpu in devices)
    return f"{names}; driver {driver or 'unknown'}, CUDA {torch.version.cuda} of torch"


def _driver() -> str:
    """Version of NVIDIA's driver; empty if there is none."""
    program = shutil.which("nvidia-smi")
    if not program:
        return ""
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"nvidia-smi gives no answer within {COMMAND_SECONDS} s: restart the host"
        ) from None
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 else ""


def wrong_requirements(requirements: list[str]) -> list[str]:
    """What is missing of a distribution's requirements, or has another version.

    Args:
        requirements: as in its metadata, such as `torch>=2.10`; those of extras are passed over.
    """
    wrong = []
    for requirement in map(Requirement, requirements):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        command = f"pip install '{requirement.name}{requirement.specifier}'"
        found = _version(requirement.name)
        if found is None:
            wrong.append(f"{requirement.name} is not installed: {command}")
        elif not requirement.specifier.contains(found, prereleases=True):
            wrong.append(
                f"{requirement.name} {found} is not {requirement.specifier}, as verippo needs: "
                f"{command}"
            )
    return wrong


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Versions of the packages that a run's results depend on."""
    found = {name: _version(name) or "not installed" for name in (*SHOWN, "verippo")}
    return {"python": platform.python_version(), **found}


def _packages() -> str:
    found = [f"{name} {version}" for name in SHOWN if (version := _version(name))]
    return ", ".join(found)


def _attention() -> str:
    if not torch.cuda.is_available():
        return "torch's own, on CPU"
    if importlib.util.find_spec("flash_attn") is None:
        return "torch's own; flash-attn is not installed"
    try:
        importlib.import_module("flash_attn")
    except Exception as error:  # such as an undefined symbol of another torch
        raise ValueError(
            f"flash-attn {_version('flash-attn')} cannot be imported beside torch "
            f"{torch.__version__} ({error}): install a build for that torch, or uninstall it to "
            "use torch's own kernel"
        ) from None
    return f"flash-attn {_version('flash-attn')}"


def _compiler() -> str:
    missing = [name for name in ("c++", "ninja") if not shutil.which(name)]
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} not found: DeepSpeed's Adam for offload compiles when it is "
            "first used: install them, or give offload=none"
        )
    return "c++ and ninja, for offload"
