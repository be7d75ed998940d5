"""Promises of the failure contract: clear errors in OpenAI's shape, nobody else harmed."""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mor.cli import main
from mor.serve.config import Keys, ServeConfig
from tests.serve.conftest import slowly

NULLABLE = (
    "n", "stream", "echo", "temperature", "top_p", "top_k", "min_p", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "skip_special_tokens", "logprobs", "stop", "seed",
)  # fmt: skip
LONG = {"prompt": "the cat", "max_tokens": 40, "ignore_eos": True, "temperature": 0}


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"prompt": "x", "model": "gpt-4"}, 404, "'gpt-4' does not exist; this server has 'mor'"),
        ({"prompt": "x", "temperature": -1}, 400, "temperature is -1"),
        ({"prompt": "x", "max_tokens": 0}, 400, "max_tokens is 0"),
        ({"prompt": "x", "n": 0}, 400, "n is 0"),
        ({"prompt": "x", "max_tokens": "many"}, 400, "max_tokens: Input should be a valid integer"),
        ({"prompt": []}, 400, "prompt is empty"),
        ({"prompt": ""}, 200, ""),
        ({"prompt": [999999]}, 400, "999999"),
        ({"prompt": [1] * 80}, 400, "80"),
        ({}, 400, "prompt: Field required"),
        ({"prompt": "x", "max_recursions": 9}, 400, "max_recursions is 9, the model has 3"),
        ({"prompt": "x", "depth": 7}, 400, "target_depth is 7"),
        ({"prompt": "x", "depth": "deep"}, 400, "depth"),
        ({"prompt": "x", "unknown_field": 1, "max_tokens": 1}, 200, ""),
        (dict.fromkeys(NULLABLE) | {"prompt": "x", "max_tokens": 1}, 200, ""),
        ({"prompt": "x", "stop": ["y"] * 65}, 400, "stop takes 64 texts"),
        (
            {"prompt": "x", "min_tokens": 9, "response_format": {"type": "json_object"}},
            400,
            "min_tokens and ignore_eos go on where a grammar has ended",
        ),
        (b"{", 400, ""),
    ],
)
def test_a_body_that_does_not_fit_gets_a_clear_error(client, body: Any, status: int, said: str):
    answer = client.post("/v1/completions", body)
    assert answer.status == status, answer.text
    if status != 200:
        error = answer.json["error"]
        assert set(error) == {"message", "type", "param", "code"} and said in error["message"]
    if status != 200 and isinstance(body, dict):  # a stream says so before it begins
        assert client.post("/v1/completions", {**body, "stream": True}).status == status
    client.wait_idle()


def test_the_log_has_prompts_only_where_asked(start, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", logger="mor")
    for log_prompts in (False, True):
        with start(log_prompts=log_prompts) as client:
            caplog.clear()
            client.post("/v1/completions", {"prompt": "the old red house", "max_tokens": 3})
        assert ("the old red house" in caplog.text) == log_prompts


def test_other_paths_and_methods_have_the_same_shape(client):
    assert client.get("/v1/nothing").json["error"]["message"]
    assert client.get("/v1/completions").status == 405


def test_a_full_queue_refuses_and_says_when_to_come_back(start):
    with start(max_num_seqs=1, max_queue=1) as client:
        client.service.engine._engine.step = slowly(client.service.engine._engine.step)
        threads = [
            threading.Thread(target=client.post, args=("/v1/completions", LONG)) for _ in "ab"
        ]
        for thread in threads:
            thread.start()
        wait_for(lambda: client.service.engine.num_open == 2)
        answer = client.post("/v1/completions", LONG)
        assert answer.status == 429 and answer.headers["retry-after"] == "1"
        assert answer.json["error"]["code"] == "queue_full"
        for thread in threads:
            thread.join()
        client.wait_idle()
        assert client.post("/v1/completions", LONG).status == 200


def test_a_request_takes_as_much_room_as_it_asks_answers(start):
    """Before the engine's thread has heard of them, and for every one of n."""
    with start(max_num_seqs=2, max_queue=2) as client:
        client.service.engine._engine.step = slowly(client.service.engine._engine.step, 0.3)
        statuses: list[int] = []

        def ask(n: int, stream: bool) -> None:
            body = {**LONG, "max_tokens": 4, "n": n, "stream": stream, "temperature": 1}
            statuses.append(client.post("/v1/completions", body).status)

        threads = [threading.Thread(target=ask, args=(3, s)) for s in (False, True, False, True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(statuses) == [200, 429, 429, 429]
        client.wait_idle()
        assert client.service.num_held == 0


def test_a_long_body_keeps_nobody_waiting(client):
    """What grows with the square of a body would freeze every other request."""
    start_s = time.monotonic()
    body = {"messages": [{"role": "user", "content": "<|endoftext|>" * 40_000}]}
    assert client.post("/v1/chat/completions", body).status == 400
    tools = [{"type": "function", "function": {"name": f"f{n}"}} for n in range(10_000)]
    assert client.post("/v1/chat/completions", {**body, "tools": tools}).status == 400
    assert time.monotonic() - start_s < 20


def test_a_handler_that_fails_answers_in_the_same_shape(
    client, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    def broken(text: str) -> list[int]:
        raise RuntimeError("a bug")

    monkeypatch.setattr(client.service.tokenizer, "encode", broken)
    caplog.set_level("INFO", logger="mor")
    answer = client.post("/v1/completions", {"prompt": "x"})
    assert answer.status == 500 and answer.headers["x-request-id"]
    assert answer.json["error"]["message"] == "the server failed on this request"
    wait_for(lambda: '"status": 500' in caplog.text)
    assert client.service.num_held == 0


def test_an_engine_that_ended_is_told(start):
    with start() as client:
        engine = client.service.engine._engine

        def broken(*args: Any) -> Any:
            raise RuntimeError("a bug")

        assert client.get("/health").status == client.get("/ready").status == 200
        engine.step = engine.reset = broken
        assert client.post("/v1/completions", LONG).status == 500
        assert client.get("/health").status == client.get("/ready").status == 503
        assert client.post("/v1/completions", LONG).status == 500


def test_depth_follows_the_queue_where_asked(start):
    with start(max_num_seqs=1, max_queue=4, load_aware_depth=1.2) as client:
        engine = client.service.engine._engine
        idle = client.post("/v1/completions", LONG).json["usage"]
        assert idle["load_aware_depth"] is None
        client.wait_idle()
        whole, engine.step = engine.step, slowly(engine.step)
        ask = ("/v1/completions", LONG)
        threads = [threading.Thread(target=client.post, args=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        wait_for(lambda: client.service.engine.num_open == 3)
        engine.step = whole
        usage = client.post(
            "/v1/completions", {**LONG, "prompt": "a dog " * 4, "max_tokens": 30}
        ).json["usage"]
        assert 1.2 <= usage["load_aware_depth"] < 2
        named = client.post("/v1/completions", {**LONG, "depth": "max"}).json["usage"]
        assert named["mean_depth"] == 3 and named["load_aware_depth"] is None
        for thread in threads:
            thread.join()
        client.wait_idle()
        policies = {key[0] for key in engine.scheduler.prefix.entries if type(key[0]) is not int}
        assert len(policies) <= 2  # as trained, and every recursion


def wait_for(what: Any) -> None:
    end_s = time.monotonic() + 10
    while not what():
        assert time.monotonic() < end_s
        time.sleep(0.005)


def test_a_deadline_ends_a_request(start):
    with start(request_timeout_s=0.2) as client:
        client.service.engine._engine.step = slowly(client.service.engine._engine.step)
        answer = client.post("/v1/completions", LONG)
        assert answer.status == 504 and answer.json["error"]["code"] == "timeout"
        streamed = client.post("/v1/completions", {**LONG, "stream": True}).text
        assert '"code": "timeout"' in streamed and "[DONE]" not in streamed
        client.wait_idle()
        assert client.metric('mor_requests_total{outcome="timeout"}') == 2


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_ends_its_request(start, stream: bool):
    with start() as client:
        engine = client.service.engine._engine
        engine.step = slowly(engine.step)
        connection = http.client.HTTPConnection("127.0.0.1", client.port)
        body = json.dumps({**LONG, "max_tokens": 50, "stream": stream})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        wait_for(lambda: any(r.output_ids for some in engine.requests.values() for r in some))
        connection.close()
        wait_for(lambda: not engine.requests)
        client.wait_idle()
        wait_for(lambda: client.metric('mor_requests_total{outcome="cancelled"}') == 1)


def test_an_engine_fault_ends_its_requests_and_serving_goes_on(start):
    with start() as client:
        engine = client.service.engine._engine
        whole = engine.step

        def broken() -> Any:
            engine.step = whole
            raise RuntimeError("a kernel failed")

        engine.step = broken
        answer = client.post("/v1/completions", LONG)
        assert answer.status == 500 and answer.json["error"]["code"] == "engine_fault"
        assert "a kernel failed" in answer.json["error"]["message"]
        assert client.post("/v1/completions", LONG).status == 200
        client.wait_idle()


def test_a_reader_that_stalls_is_let_go(start):
    with start(stall_timeout_s=0.3) as client:
        engine = client.service.engine._engine
        connection = http.client.HTTPConnection("127.0.0.1", client.port)
        # Each event is made large, so that the sockets' buffers fill without a reader.
        client.service.tokenizer.decode = lambda ids: "x" * 2**20
        body = {**LONG, "logprobs": 1, "stream": True}
        connection.request(
            "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        wait_for(lambda: engine.requests)
        wait_for(lambda: not engine.requests)
        connection.close()
        client.wait_idle()


def test_bodies_are_limited(start):
    with start(max_body_bytes=2000) as client:
        answer = client.post("/v1/completions", {"prompt": "x" * 3000})
        assert answer.status == 413 and "larger than 2000 bytes" in answer.json["error"]["message"]
        connection = http.client.HTTPConnection("127.0.0.1", client.port)
        chunks = (b"x" * 1000 for _ in range(9))  # without a length
        connection.request("POST", "/v1/completions", chunks, {"Content-Type": "application/json"})
        assert connection.getresponse().status == 413
        connection.close()
        assert client.post("/v1/completions", LONG).status == 200


def test_keys_are_wanted_where_they_are_given(start, tmp_path: Path):
    file = tmp_path / "keys"
    file.write_text("first-key\n\nsecond-key\n")
    with start(api_key_file=file) as client:
        for key in ("", "Bearer wrong", "first-key"):
            answer = client.post("/v1/completions", LONG, Authorization=key)
            assert answer.status == 401 and answer.json["error"]["code"] == "invalid_api_key"
        assert client.get("/metrics").status == 401
        assert client.get("/health").status == 200
        for key in ("first-key", "second-key"):
            said = {"Authorization": f"Bearer {key}"}
            assert client.post("/v1/completions", LONG, **said).status == 200


def test_keys_are_kept_as_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MOR_API_KEY", "from-environment")
    keys = Keys(ServeConfig())
    assert keys.are_wanted and keys.allow("Bearer from-environment")
    assert not keys.allow("Bearer other") and not keys.allow("")
    assert "from-environment" not in repr(vars(keys))
    for blank in (" \n", ""):
        monkeypatch.setenv("MOR_API_KEY", blank)
        with pytest.raises(ValueError, match="MOR_API_KEY is blank"):
            Keys(ServeConfig())  # and no key that no header at all would match
    monkeypatch.delenv("MOR_API_KEY")
    assert Keys(ServeConfig()).allow("")
    with pytest.raises(ValueError, match="does not exist; give a file of keys"):
        Keys(ServeConfig(api_key_file=tmp_path / "none"))
    digest = hashlib.sha256(b"hashed-key").hexdigest()
    (tmp_path / "hashed").write_text(f"# who\nsha256:{digest}\nplain-key\n")
    keys = Keys(ServeConfig(api_key_file=tmp_path / "hashed"))
    assert not keys.allow("Bearer # who")
    assert keys.allow("Bearer hashed-key") and keys.allow("Bearer plain-key")
    assert not keys.allow(f"Bearer sha256:{digest}") and not keys.allow(f"Bearer {digest}")
    (tmp_path / "broken").write_text("sha256:12\n")
    with pytest.raises(ValueError, match="holds no SHA-256 in hex"):
        Keys(ServeConfig(api_key_file=tmp_path / "broken"))
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ValueError, match="holds no key"):
        Keys(ServeConfig(api_key_file=tmp_path / "empty"))


def test_other_origins_may_ask_only_when_named(client, start):
    origin = {"Origin": "https://other.example"}
    assert "access-control-allow-origin" not in client.get("/health", **origin).headers
    with start(cors_origins=("https://other.example",)) as open_client:
        headers = open_client.get("/health", **origin).headers
        assert headers["access-control-allow-origin"] == "https://other.example"


def test_answers_carry_an_id(client):
    assert client.get("/health", **{"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    odd = client.get("/health", **{"X-Request-Id": "a b"}).headers["x-request-id"]
    assert odd != "a b" and len(odd) == 32


def test_cancel_storms_leak_nothing(start):
    with start(max_num_seqs=4, max_queue=64) as client:
        for round_ in range(3):
            open_ones = []
            for number in range(12):
                connection = http.client.HTTPConnection("127.0.0.1", client.port)
                body = json.dumps({**LONG, "stream": bool(number % 2)})
                connection.request(
                    "POST", "/v1/completions", body, {"Content-Type": "application/json"}
                )
                open_ones.append(connection)
            time.sleep(0.02 * round_)
            for connection in open_ones:
                connection.close()
        client.wait_idle()
        assert client.post("/v1/completions", LONG).status == 200


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--port", "70000"], "port is 70000"),
        (["--max-num-seqs", "0"], "max_num_seqs is 0"),
        (["--served-model-name", ""], "served_model_name is empty"),
        (["--request-timeout-s", "0"], "request_timeout_s is 0"),
        (["--dtype", "float64"], "did you mean|unknown"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, capsys, flags: list[str], said: str):
    import re

    assert main(["serve", str(tmp_path), *flags]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, capsys):
    assert main(["serve", str(tmp_path / "none")]) == 2
    assert "is not a model folder" in capsys.readouterr().err


def test_a_port_that_is_taken_is_told_before_the_model_loads(tiny_run: Path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(tiny_run / "model"), "--port", str(port)]) == 2
    told = capsys.readouterr().err
    assert f"127.0.0.1 port {port} cannot be had" in told and "CPU kernels" not in told
    assert main(["serve", str(tiny_run / "model"), "--host", "nowhere.invalid"]) == 2
    assert "nowhere.invalid port 8000 cannot be had" in capsys.readouterr().err


def started(folder: Path, port: int = 0) -> tuple[subprocess.Popen[str], int]:
    """Start a server in a process of its own; returns it and its port when it is ready."""
    command = [sys.executable, "-m", "mor", "serve", str(folder), "--port", str(port)]
    server = subprocess.Popen([*command, "--dtype", "float32"], stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    while not (found := re.search(r"http://127.0.0.1:(\d+)", server.stderr.readline())):
        assert server.poll() is None
    port = int(found.group(1))
    wait_for(lambda: ask(port, "GET", "/ready") == 200)
    return server, port


def ask(port: int, method: str, path: str, body: Any = None) -> int | str:
    """Return a status, or the text of a completion; 0 where nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        return json.loads(text)["choices"][0]["text"] if body is not None else response.status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


@pytest.mark.slow
def test_sigterm_lets_running_requests_end(tiny_run: Path):
    server, port = started(tiny_run / "model")
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        body = json.dumps({**LONG, "stream": True})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        server.send_signal(signal.SIGTERM)
        assert response.read().decode().endswith("data: [DONE]\n\n")
        connection.close()
        assert server.wait(30) in (0, -signal.SIGTERM)
    finally:
        server.kill()
        server.communicate()


@pytest.mark.slow
def test_sigkill_leaves_nobody_waiting_and_the_next_server_answers_alike(tiny_run: Path):
    server, port = started(tiny_run / "model")
    try:
        wanted = ask(port, "POST", "/v1/completions", LONG)
        answers: list[int | str] = []
        many = {**LONG, "prompt": ["the cat"] * 64}
        threads = [
            threading.Thread(
                target=lambda: answers.append(ask(port, "POST", "/v1/completions", many))
            )
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        time.sleep(0.05)
        server.kill()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive(), "a client hangs"
        assert set(answers) <= {0, wanted}
        server.communicate()
        server, _ = started(tiny_run / "model", port)
        assert ask(port, "POST", "/v1/completions", LONG) == wanted
    finally:
        server.kill()
        server.communicate()


@pytest.mark.slow
def test_five_hundred_open_requests(start):
    with start(max_num_seqs=32, max_queue=500) as client:
        wanted = client.post("/v1/completions", LONG).text.split('"choices"')[1].split('"usage"')[0]
        found: list[str] = []

        def one(number: int) -> None:
            body = {**LONG, "stream": number % 2 == 1}
            answer = client.post("/v1/completions", body)
            if number % 2:
                text = "".join(c["text"] for e in answer.events for c in e["choices"])
                found.append(text if answer.status == 200 else str(answer.status))
            else:
                found.append(answer.text.split('"choices"')[1].split('"usage"')[0])

        threads = [threading.Thread(target=one, args=(number,)) for number in range(500)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        client.wait_idle()
        whole = json.loads('{"choices"' + wanted.rstrip(",") + "}")["choices"][0]["text"]
        assert len(found) == 500 and set(found) == {wanted, whole}
        assert client.metric("mor_requests_running") == client.metric("mor_requests_waiting") == 0
