"""A small server of OpenAI's completions that can score a prompt, as vLLM and SGLang do.

    python completions_server.py BASE NAME=ADAPTER [NAME=ADAPTER ...] [--echo] [--sleep S] [--tokens-off]

It loads what is on disk with PEFT, and prints its port. ``--echo`` speaks the older protocol, without ids of tokens.
"""

from __future__ import annotations

import argparse
import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base")
    parser.add_argument("adapters", nargs="*")
    parser.add_argument("--echo", action="store_true")
    parser.add_argument("--sleep", type=float, default=0.0)
    parser.add_argument("--tokens-off", action="store_true")
    arguments = parser.parse_args()
    models: dict[str, Any] = {"base": AutoModelForCausalLM.from_pretrained(arguments.base).eval()}
    for adapter in arguments.adapters:
        name, _, path = adapter.partition("=")
        base = AutoModelForCausalLM.from_pretrained(arguments.base)
        models[name] = PeftModel.from_pretrained(base, path).eval() if path else base.eval()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({"data": [{"id": n, "parent": None if n == "base" else "base"} for n in models]})

        def do_POST(self) -> None:
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            time.sleep(arguments.sleep)
            if question["model"] not in models:
                self.answer({"error": {"message": f"The model `{question['model']}` does not exist."}}, 404)
                return
            ids = torch.tensor([question["prompt"]])
            with torch.no_grad():
                log_probs = models[question["model"]](ids).logits[0, :-1].log_softmax(-1)
            values = log_probs.gather(-1, ids[0, 1:, None])[:, 0].tolist()
            choice: dict[str, Any] = {"index": 0, "text": ""}
            if arguments.echo and question.get("echo"):
                choice["logprobs"] = {"token_logprobs": [None, *values, -1.0]}
            elif not arguments.echo and question.get("prompt_logprobs") is not None:
                named = [t + arguments.tokens_off for t in question["prompt"]]
                scored = [{str(t): {"logprob": v, "rank": 1}} for t, v in zip(named[1:], values, strict=True)]
                choice["prompt_logprobs"] = [None, *scored]
            self.answer({"choices": [choice]})

        def answer(self, content: dict[str, Any], code: int = 200) -> None:
            data = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
