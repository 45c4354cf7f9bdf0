"""A server that speaks OpenAI's completions and can score a prompt: vLLM, SGLang."""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_probe_callbacks.serving.diagnosis import Scored
from lora_probe_callbacks.serving.errors import CannotCompareError
from lora_probe_callbacks.serving.live import LiveModel
from lora_probe_callbacks.serving.measure import LogProbs
from lora_probe_callbacks.serving.targets import as_log_probs

__all__ = ["Endpoint"]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server with prompt log-probs.

    vLLM returns them for ``prompt_logprobs``, with the ids of the tokens; SGLang and others for ``echo``.

    Args:
        url: Of the server, with or without ``/v1``.
        model: The name under which it serves the adapter; default: the one adapter that it lists.
        base_model: The name of its base; default: what it lists as the parent of the adapter. If it serves nothing but
            ``model``, that is taken for a merged model, and compared with the live base.
        timeout: Seconds, for each answer.
    """

    url: str
    model: str | None = None
    base_model: str | None = None
    timeout: float = 60.0

    def scored(self, live: LiveModel) -> Scored:
        """Score every sequence under the adapter and under the base."""
        if not self.url.startswith(("http://", "https://")):
            raise CannotCompareError(f"got the endpoint {self.url!r}, expected http://host:port")
        model, base = self._models()
        served = self._log_probs(model, live.rows)
        target = f"{model} at {self.url}"
        if base is None:
            return Scored(target, served, live.off, merged=True)
        return Scored(target, served, self._log_probs(base, live.rows))

    # --- names ------------------------------------------------------------------------------

    def _models(self) -> tuple[str, str | None]:
        if self.model is not None and self.base_model is not None:
            return self.model, self.base_model
        listed = self._ask("models", None).get("data")
        cards = [card for card in listed if isinstance(card, Mapping)] if isinstance(listed, list) else []
        parents = {str(card.get("id")): card.get("parent") for card in cards}
        adapters = [name for name, parent in parents.items() if parent]
        model = self.model
        if model is None:
            if len(adapters) != 1:
                raise CannotCompareError(
                    f"got no name of the adapter, and {self.url} serves {', '.join(parents) or 'nothing'}: say model="
                )
            model = adapters[0]
        if self.base_model is not None:
            return model, self.base_model
        if parents.get(model) in parents:
            return model, parents[model]
        plain = [name for name, parent in parents.items() if not parent and name != model]
        return model, plain[0] if len(plain) == 1 else None

    # --- scores -----------------------------------------------------------------------------

    def _log_probs(self, model: str, rows: Sequence[Sequence[int]]) -> LogProbs:
        found = [self._of_row(model, row) for row in rows]
        return as_log_probs(found, [list(row) for row in rows], f"{model} at {self.url}")

    def _of_row(self, model: str, row: Sequence[int]) -> Any:
        question = {"model": model, "prompt": list(row), "max_tokens": 1, "temperature": 0.0}
        choice = self._choice({**question, "prompt_logprobs": 0})
        if isinstance(choice.get("prompt_logprobs"), list):
            return self._by_id(choice["prompt_logprobs"], row)
        choice = self._choice({**question, "echo": True, "logprobs": 1})
        listed = choice.get("logprobs")
        by_position = listed.get("token_logprobs") if isinstance(listed, Mapping) else None
        if not isinstance(by_position, list) or len(by_position) < len(row):
            raise CannotCompareError(
                f"got no log-probs of the prompt from {self.url}, expected an engine that has them: vLLM, or SGLang "
                "with echo and logprobs"
            )
        return [_number(value, self.url) for value in by_position[1 : len(row)]]

    def _by_id(self, listed: list[Any], row: Sequence[int]) -> Any:
        """vLLM: of each position, token id to log-prob."""
        if len(listed) != len(row):
            raise CannotCompareError(
                f"got log-probs of {len(listed)} tokens from {self.url} for {len(row)}: other tokens"
            )
        found = np.empty(len(row) - 1)
        for position, (entry, token) in enumerate(zip(listed[1:], row[1:], strict=True)):
            if not isinstance(entry, Mapping) or str(token) not in entry:
                scored = ", ".join(entry) if isinstance(entry, Mapping) else "none"
                raise CannotCompareError(
                    f"got a log-prob of token {scored} at position {position + 1} from {self.url}, expected one of "
                    f"{token}: other tokens were scored"
                )
            found[position] = _number(entry[str(token)], self.url)
        return found

    def _choice(self, question: Mapping[str, Any]) -> Mapping[str, Any]:
        choices = self._ask("completions", question).get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
            raise CannotCompareError(f"got an answer without choices from {self.url}, expected OpenAI's completions")
        return choices[0]

    # --- the wire ---------------------------------------------------------------------------

    def _ask(self, what: str, question: Mapping[str, Any] | None) -> Mapping[str, Any]:
        url = f"{self.url.rstrip('/').removesuffix('/v1')}/v1/{what}"
        data = None if question is None else json.dumps(question).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                content = json.load(answer)
        except urllib.error.HTTPError as error:
            said = " ".join(error.read(2000).decode(errors="replace").split())[:200]
            raise CannotCompareError(f"{url} answers {error.code}: {said}") from None
        except TimeoutError:
            raise CannotCompareError(f"{url} does not answer within {self.timeout:g} s") from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise CannotCompareError(f"{url} does not answer within {self.timeout:g} s") from None
            raise CannotCompareError(f"{url} cannot be reached: {error.reason}") from None
        except (OSError, ValueError) as error:
            raise CannotCompareError(f"{url} gives no answer in JSON: {type(error).__name__}") from None
        if not isinstance(content, Mapping):
            raise CannotCompareError(f"{url} answers with a {type(content).__name__}, expected an object")
        return content


def _number(value: object, url: str) -> float:
    value = value.get("logprob") if isinstance(value, Mapping) else value
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise CannotCompareError(f"got the log-prob {value!r} from {url}, expected a finite number")
    return float(value)
