"""https: who is trusted, and that both kinds of requests agree on it. localhost.pem is for tests only, and its own authority."""

import asyncio
import pathlib
import ssl

import pytest
from scripted_server import ScriptedServer

CERTIFICATE = pathlib.Path(__file__).with_name("localhost.pem")
SMALL = ("--contexts", "50", "--turns", "1")


class Secure(ScriptedServer):
    async def serve(self, listener):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(CERTIFICATE)
        async with await asyncio.start_server(self._connection, sock=listener, limit=1 << 26, ssl=context) as server:
            await server.serve_forever()


@pytest.fixture
def url(serve):
    return serve(Secure()).url.replace("http:", "https:")


@pytest.fixture(autouse=True)
def no_authority(monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)


def test_an_authority_of_the_environment_is_trusted_with_everything(url, bench, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    code, output, result = bench("--url", url, *SMALL)
    assert code == 0, output
    assert [record.get("error") for record in result["requests"]] == [None] * 3


def test_an_authority_of_the_option_is_trusted_with_everything_and_read_once(url, bench, monkeypatch):
    made, make = [], ssl.create_default_context
    monkeypatch.setattr(ssl, "create_default_context", lambda *a, **k: made.append(k) or make(*a, **k))
    code, output, result = bench("--url", url, *SMALL, "--concurrency", "3", "--cacert", CERTIFICATE)
    assert code == 0, output
    assert [record.get("error") for record in result["requests"]] == [None] * 3
    assert len(made) == 1  # reading takes tens of milliseconds, in which other requests would wait


def test_a_server_of_an_unknown_authority_is_not_asked(url, bench):
    code, output, _ = bench("--url", url, *SMALL)
    flat = " ".join(output.replace("│", " ").split())
    assert code == 2 and "is not trusted" in flat and "expected --cacert with its authority" in flat


def test_authorities_that_cannot_be_read_are_refused_by_name(bench, tmp_path):
    no_pem = tmp_path / "no.pem"
    no_pem.write_text("no certificate")
    for url, file, words in (
        ("https://127.0.0.1:9", "/nowhere.pem", "--cacert is '/nowhere.pem', which cannot be read (No such file"),
        ("https://127.0.0.1:9", no_pem, "expected certificates in a PEM file"),
        ("http://127.0.0.1:9", CERTIFICATE, "but --url is 'http://127.0.0.1:9', expected https://HOST"),
    ):
        code, output, _ = bench("--url", url, *SMALL, "--cacert", file)
        flat = " ".join(output.replace("│", " ").split())
        assert code == 2 and words in flat, flat
        assert "Traceback" not in output
