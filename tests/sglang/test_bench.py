"""`verippo bench sampler` with a real server."""

from __future__ import annotations

import json

import pytest

from verippo.launch import cli

pytestmark = pytest.mark.sglang


def test_the_server_gets_the_weights_and_both_engines_draw(make_model, sglang_server, capsys):
    sizes = [
        "--prompts",
        "4",
        "--prompt_tokens",
        "5",
        "--max_new_tokens",
        "8",
        "--repeats",
        "1",
        "--dtype",
        "fp32",
    ]
    cli.main(
        [
            "bench",
            "sampler",
            "--model",
            str(make_model(seed=3)),
            "--sampler.urls",
            sglang_server.url,
            *sizes,
        ]
    )
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["figure"], row["engine"]) for row in rows] == [
        ("weights", "sglang"),
        ("sampler", "sglang"),
        ("sampler", "local"),
    ]
    assert all(row["tokens_per_second"] > 0 for row in rows[1:])
    cli.main(
        [
            "bench",
            "sampler",
            "--model",
            sglang_server.model_path,
            "--sampler.urls",
            sglang_server.url,
            *sizes,
        ]
    )  # as it was
