"""Fake sglang server: accepts its arguments, answers /model_info, and has a child process.

The environment variable FAKE selects its misbehaviour.
"""

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

options = dict(zip(sys.argv, sys.argv[1:], strict=False))
fault = os.environ.get("FAKE", "")
key = ""
if "--config" in options:
    with open(options["--config"]) as file:
        key = json.loads(file.read().partition(": ")[2])
print("environment", sorted(os.environ))
print("server_args=", {"api_key": key})
if fault == "exits":
    print("RuntimeError: out of memory")
    sys.exit(1)
if fault == "imports":
    import torchvision  # noqa: F401 the server runs without site-packages
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
if fault == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, lambda *_: (child.kill(), child.wait(), os._exit(0)))
if fault == "hangs":
    time.sleep(600)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        allowed = not key or self.headers["Authorization"] == f"Bearer {key}"
        known = self.path == ("/get_model_info" if fault == "old" else "/model_info")
        self.send_response((200 if known else 404) if allowed else 401)
        self.end_headers()
        self.wfile.write(json.dumps({"model_path": options["--model-path"]}).encode())


HTTPServer((options["--host"], int(options["--port"])), Handler).serve_forever()
