"""What is asked of a server besides completions: who it is, what it serves, how it counts, what its caches did."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from prometheus_client.parser import text_string_to_metric_families

from .settings import BadSetting

CONTROL_TIMEOUT_S = 60.0  # of one /tokenize of a whole context


class ServerFault(Exception):
    """The server cannot be used: one sentence that names it."""


class Server:
    """`url` is what lies before /v1/... (a trailing /v1 is cut off). Blocking; one thread at a time.

    Proxies of the environment are not used: they would be measured. `tls` is what completions use, too.
    """

    def __init__(self, url: str, api_key: str = "", cacert: Path | None = None) -> None:
        try:
            parts = urlsplit(url)
            sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # an address or a port that is none
            sound = False
        if not sound:
            raise ServerFault(f"--url is {url!r}, expected http://HOST:PORT or https://HOST")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.tls = _authorities(cacert) if parts.scheme == "https" else None
        if cacert and self.tls is None:
            raise BadSetting(f"--cacert is {str(cacert)!r}, but --url is {url!r}, expected https://HOST")
        self._http = httpx.Client(headers=self.headers, timeout=CONTROL_TIMEOUT_S, trust_env=False, verify=self.tls or True)

    def close(self) -> None:
        self._http.close()

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        try:
            return self._http.request(method, self.url + path, json=body)
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            if "CERTIFICATE_VERIFY_FAILED" in reason:
                raise ServerFault(f"{self.url} is not trusted ({reason}), expected --cacert with its authority") from None
            raise ServerFault(f"no server answers at {self.url} ({reason}), expected one that speaks OpenAI's API") from None

    def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """None where the server has no such path, or answers something else."""
        response = self._request(method, path, body)
        if response.status_code != 200:
            return None
        try:
            return response.json()
        except ValueError:
            return None

    def ready(self) -> bool:
        """Whether /health answers 200 within two seconds."""
        try:
            return self._http.get(self.url + "/health", timeout=2.0).status_code == 200
        except httpx.HTTPError:
            return False

    def version(self) -> Any:
        """The answer to /version; None where there is none."""
        return self._json("GET", "/version")

    def models(self) -> list[dict[str, Any]]:
        """The entries of /v1/models; ServerFault when it answers anything else."""
        response = self._request("GET", "/v1/models")
        where = f"{self.url}/v1/models"
        if response.status_code in (401, 403):
            raise ServerFault(f"{where}: status {response.status_code}, expected a valid key in OPENAI_API_KEY")
        if response.status_code != 200:
            raise ServerFault(f"{where}: status {response.status_code}, expected the list of models; is --url right?")
        try:
            entries = response.json()["data"]
            return [entry for entry in entries if isinstance(entry["id"], str)]
        except (ValueError, KeyError, TypeError):
            raise ServerFault(f"{where}: {response.text[:80]!r}, expected the list of models") from None

    def model(self, name: str | None) -> dict[str, Any]:
        """The entry of /v1/models for `name`, or the only one."""
        entries = self.models()
        served = ", ".join(repr(entry["id"]) for entry in entries) or "nothing"
        found = [entry for entry in entries if name is None or entry["id"] == name]
        if name is not None and not found:
            raise ServerFault(f"--model is {name!r}, but {self.url} serves {served}")
        if len(found) != 1:
            raise ServerFault(f"{self.url} serves {served}, expected --model to name one of them")
        return found[0]

    def tokenize(self, model: str, prompt: str | list[dict[str, str]], special: bool = True) -> list[int] | None:
        """Ids of a text, with `special` as a prompt of its own, or of chat messages with the template around them."""
        if isinstance(prompt, str):
            body: dict[str, Any] = {"model": model, "prompt": prompt, "add_special_tokens": special}
        else:
            body = {"model": model, "messages": prompt, "add_generation_prompt": True}
        answer = self._json("POST", "/tokenize", body)
        tokens = answer.get("tokens") if isinstance(answer, dict) else None
        return tokens if isinstance(tokens, list) and tokens else None

    def detokenize(self, model: str, tokens: list[int]) -> str:
        answer = self._json("POST", "/detokenize", {"model": model, "tokens": tokens})
        if not isinstance(answer, dict) or not isinstance(answer.get("prompt"), str):
            raise ServerFault(f"{self.url}/detokenize: no answer with a prompt")
        return answer["prompt"]

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics, summed over its labels; empty where there is none."""
        response = self._request("GET", "/metrics")
        sums: dict[str, float] = {}
        if response.status_code != 200:
            return sums
        try:
            for family in text_string_to_metric_families(response.text):
                for sample in family.samples:
                    sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
        except ValueError:
            return {}
        return sums

    def reset_prefix_cache(self) -> bool:
        """Empties the server's own prefix cache; False where it has no such path (vLLM: development mode only)."""
        return self._request("POST", "/reset_prefix_cache").status_code == 200


def _authorities(cacert: Path | None) -> ssl.SSLContext:
    """Trusts those of the file, else the system's; OpenSSL lets SSL_CERT_FILE and SSL_CERT_DIR say which those are."""
    try:
        return ssl.create_default_context(cafile=cacert)
    except ssl.SSLError:
        raise BadSetting(f"--cacert is {str(cacert)!r}, expected certificates in a PEM file") from None
    except OSError as error:
        raise BadSetting(f"--cacert is {str(cacert)!r}, which cannot be read ({error.strerror})") from None
