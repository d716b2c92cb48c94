"""A sampling server that answers like sglang, for tiny models: HOST PORT MODEL.

It draws with the seed of each request, one sequence at a time, so that the same request always gives
the same tokens and log-probs.
"""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


class Server(ThreadingHTTPServer):
    """Holds the model and the version of its weights."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, port: int, model: str) -> None:
        super().__init__((host, port), Handler)
        self.lock = threading.Lock()
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.version = "default"

    def load(self, folder: str, version: str) -> None:
        weights = {}
        for file in Path(folder).glob("*.safetensors"):
            weights |= load_file(file)
        self.model.load_state_dict(weights)
        self.version = version

    def logprobs(self, ids: list[int], temperature: float) -> torch.Tensor:
        return torch.log_softmax(self.model(torch.tensor([ids])).logits[0] / temperature, dim=-1)

    def generate(self, body):
        sampling = body["sampling_params"]
        ids = body["input_ids"]
        temperature = sampling["temperature"] or 1.0
        if sampling["max_new_tokens"] == 0:
            scores = self.logprobs(ids, temperature)[:-1].gather(1, torch.tensor(ids[1:])[:, None])
            entries = [[None, ids[0], None]]
            entries += [[s, n, None] for s, n in zip(scores[:, 0].tolist(), ids[1:], strict=True)]
            return self.answer([], {"input_token_logprobs": entries})
        generator = torch.Generator().manual_seed(sampling["sampling_seed"])
        drawn = []
        while len(drawn) < sampling["max_new_tokens"]:
            last = self.logprobs(ids + [n for _, n, _ in drawn], temperature)[-1]
            if sampling["temperature"]:
                token = int(torch.multinomial(last.exp(), 1, generator=generator))
            else:
                token = int(last.argmax())
            drawn.append([float(last[token]), token, None])
            if token in sampling["stop_token_ids"]:
                break
        return self.answer([n for _, n, _ in drawn], {"output_token_logprobs": drawn})

    def answer(self, ids, meta):
        spans = [{"version": self.version, "start": 0, "end": len(ids)}]
        stop = {"type": "length"}
        common = {"finish_reason": stop, "weight_version": self.version, "weight_versions": spans}
        return {"output_ids": ids, "meta_info": common | meta}

    @torch.no_grad()
    def reply(self, path, body):
        if path == "/server_info":
            return {"tp_size": 1, "dp_size": 1, "context_length": None}
        if path == "/model_info":
            return {"weight_version": self.version}
        if path == "/generate":
            return self.generate(body)
        if path == "/update_weights_from_disk":
            self.load(body["model_path"], body["weight_version"])
        if path == "/update_weight_version":
            self.version = body["new_version"]
        return {"success": True, "message": "Success"}

    def handle_error(self, request, client_address) -> None:
        pass  # connections of runs that ended


class Handler(BaseHTTPRequestHandler):
    """Answers one request after the other."""

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.server.lock:
            answer = self.server.reply(self.path, json.loads(content) if content else None)
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST

    def log_message(self, *_) -> None:
        pass


if __name__ == "__main__":
    torch.set_num_threads(1)
    server = Server(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    print("ready", flush=True)
    server.serve_forever()
