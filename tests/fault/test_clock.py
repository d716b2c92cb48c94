"""A step of the system's clock."""

from __future__ import annotations

import psutil
import pytest

from verippo.core.sampling.server import servers, start, stop
from verippo.core.sampling.server_command import ServerConfig


@pytest.mark.parametrize("seconds", [3.0, -3600.0])
def test_stop_finds_the_server_after_the_clock_was_set(seconds, fake_sglang, tmp_path, monkeypatch):
    """psutil computes start times from the time of day of the boot, which moves with the clock."""
    config = ServerConfig(state=str(tmp_path), port=0, **fake_sglang)
    server = start(config)
    try:
        real = psutil._pslinux.boot_time()
        monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: real + seconds)
        monkeypatch.setattr(psutil._pslinux, "BOOT_TIME", None, raising=False)
        before = psutil.Process(server.pid).create_time()
        print(f"psutil now says that it started at {before}")
        assert servers(config.state) == [(server, "ready")]
        assert stop(server, timeout_seconds=10)
        assert not psutil.pid_exists(server.pid)
    finally:
        monkeypatch.undo()
        stop(server, timeout_seconds=0)
