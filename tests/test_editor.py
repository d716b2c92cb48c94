"""An editor follows names through the real files, with no settings: what the language server says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ["core", "rl", "sft", "search", "eval", "kernels", "launch"]
SCRIPTS = Path(sys.executable).parent
FILE = ROOT / "rl" / "train.py"
# a name as rl/train.py uses it, and the file that defines it
DEFINITIONS = {
    "pack(rollouts)": "core/training/packing.py",
    "token_rewards(": "rl/ppo.py",
    "set_up(config)": "rl/setup.py",
    "prepare_output(": "core/training/checkpoint.py",
}


class LanguageServer:
    """A client of basedpyright's language server over standard input and output."""

    def __init__(self):
        command = [str(SCRIPTS / "basedpyright-langserver"), "--stdio"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=ROOT)
        self.last_id = 0
        folder = {"uri": ROOT.as_uri(), "name": "verippo"}
        options = {"processId": None, "rootUri": ROOT.as_uri(), "workspaceFolders": [folder]}
        self.request("initialize", {**options, "capabilities": {}})
        self.notify("initialized", {})

    def notify(self, method, params):
        self._send({"method": method, "params": params})

    def request(self, method, params):
        self.last_id += 1
        self._send({"id": self.last_id, "method": method, "params": params})
        while True:
            message = self._receive()
            if message.get("id") == self.last_id and "method" not in message:
                return message["result"]
            if "id" in message:  # the server asks: for settings, for progress
                items = message["params"].get("items", []) if message.get("params") else []
                self._send({"id": message["id"], "result": [None] * len(items) or None})

    def _send(self, message):
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        self.process.stdin.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        self.process.stdin.flush()

    def _receive(self):
        length = 0
        while (line := self.process.stdout.readline().strip()) or not length:
            assert line, "the language server ended"
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        return json.loads(self.process.stdout.read(length))

    def close(self):
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def server():
    server = LanguageServer()
    text = FILE.read_text()
    document = {"uri": FILE.as_uri(), "languageId": "python", "version": 1, "text": text}
    server.notify("textDocument/didOpen", {"textDocument": document})
    yield server
    server.close()


@pytest.mark.parametrize(("use", "file"), DEFINITIONS.items())
def test_go_to_definition_finds_the_real_file(server, use, file):
    lines = FILE.read_text().split("\n")
    number, line = next((n, line) for n, line in enumerate(lines) if use in line)
    position = {"line": number, "character": line.index(use) + 1}
    document = {"uri": FILE.as_uri()}
    found = server.request(
        "textDocument/definition", {"textDocument": document, "position": position}
    )
    assert [place["uri"] for place in found] == [(ROOT / file).as_uri()]


def test_every_import_of_ours_resolves():
    command = [str(SCRIPTS / "basedpyright"), "--outputjson", *PACKAGES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    rules = ("reportMissingImports", "reportMissingModuleSource")
    unresolved = [
        f"{Path(found['file']).relative_to(ROOT)}: {found['message']}"
        for found in json.loads(done.stdout)["generalDiagnostics"]
        if found.get("rule") in rules
    ]
    # optional packages of users with a GPU or an account
    optional = ("flash_attn", "wandb", "sglang")
    assert not [text for text in unresolved if not any(name in text for name in optional)]
