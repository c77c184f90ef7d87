"""Bodies that nobody should send, and what they try to reach: each is refused in a clear line, and nothing is read."""

import copy
import http.client
import json
import os
import random
import socket
import threading

import pytest

from qwen3vl_moe.errors import PromptError
from qwen3vl_moe.inputs.access import MediaAccess
from qwen3vl_moe.server.limits import Limits
from qwen3vl_moe.server.media import MediaLimits, with_bytes
from tests.inputs.web import PICTURE, serve
from tests.pictures import encoded, noise
from tests.server.conftest import HELLO, asking, data_url, served

CHAT = {"messages": asking("What is this?", data_url(PICTURE)), "max_tokens": 1, "temperature": 0}
ODD = [
    None,
    True,
    -1,
    0,
    1e308,
    10**30,
    "",
    "x",
    "\ud800",
    "\0",
    [],
    [None],
    {},
    {"type": "x"},
    [[[]]],
    "data:,",
    2**63,
]
FIELDS = [
    *(
        "messages",
        "model",
        "temperature",
        "top_p",
        "n",
        "seed",
        "stop",
        "max_tokens",
        "max_completion_tokens",
        "stream",
    ),
    *("stream_options", "logprobs", "top_logprobs", "response_format", "tools", "tool_choice", "logit_bias", "user"),
    *("presence_penalty", "parallel_tool_calls", "chat_template_kwargs", "stop_token_ids", "structured_outputs"),
    *("continue_final_message", "add_generation_prompt", "bad_words", "allowed_token_ids", "truncate_prompt_tokens"),
    *("store", "modalities", "function_call", "nonsense", "min_tokens", "ignore_eos", "repetition_penalty"),
]


def mutated(seed: int) -> tuple[str, bytes]:
    """A path and a body of which something is wrong."""
    chance = random.Random(seed)
    path = chance.choice(["/v1/chat/completions"] * 4 + ["/v1/completions"])
    body = copy.deepcopy(CHAT if "chat" in path else {"prompt": "Hello", "max_tokens": 1, "temperature": 0})
    kind = chance.randrange(5)
    if kind == 0:  # a broken text
        data = bytearray(json.dumps(body).encode())
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(data))
            data[at : at + chance.randint(0, 3)] = bytes(chance.choices(b'{}[]":,\\\x00\xff0', k=chance.randint(0, 3)))
        return path, bytes(data)
    if kind == 1:
        return path, chance.choice([b"", b"null", b"[]", b"1", b'"x"', b"{" * 500, b"NaN", b"\xff\xfe", b"[" * 9999])
    if kind == 2:  # somewhere deep
        node = body
        while isinstance(node, dict | list) and node:
            keys = list(node) if isinstance(node, dict) else range(len(node))
            key = chance.choice(list(keys))
            if not isinstance(node[key], dict | list) or chance.random() < 0.3:
                node[key] = chance.choice(ODD)
                break
            node = node[key]
    for _ in range(1 if kind == 2 else chance.randint(1, 3)):
        if kind != 2:
            body[chance.choice(FIELDS)] = chance.choice(ODD)
    return path, json.dumps(body).encode()


def test_a_thousand_malformed_bodies(server):
    """Those that happen to be in order are answered; the others get a status of 4xx, and a line that says why."""
    connection = http.client.HTTPConnection(*server.address, timeout=60)
    refused = 0
    for seed in range(1000):
        path, body = mutated(seed)
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        content = response.read()
        assert response.status in (200, 400, 404), (path, body, content)
        if response.status != 200:
            refused += 1
            error = json.loads(content)["error"]
            assert error.keys() == {"message", "type", "param", "code"}
            assert error["message"].isprintable(), body
            assert 5 < len(error["message"]) < 1100, body
    assert refused > 700
    assert server.chat(max_tokens=1).status_code == 200


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("audio", {"voice": "x"}, "'audio' is not supported"),
        ("functions", [], "give tools"),
        ("best_of", 2, "unknown"),
        ("store", True, "store=True is not supported"),
        ("modalities", ["text", "audio"], "is not supported"),
        ("reasoning_effort", "high", "the checkpoint decides"),
        ("tool_choice", "required", "needs tools"),
        ("top_logprobs", 3, "needs logprobs"),
        ("stream_options", {"include_usage": True}, "needs stream"),
        ("n", 2, "greedy answers are all the same"),
        ("logit_bias", {"99999": 1}, "outside of the vocabulary"),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x"}}, "is needed"),
        (
            "response_format",
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objekt"}}},
            "Invalid type: objekt",
        ),
        ("max_tokens", 0, "max_tokens=0"),
        ("chat_template_kwargs", {"enable_thinking": True}, "does not read"),
        ("model", "other", "not served here"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(server, field, value, message):
    reply = server.chat(**{field: value})
    assert reply.status_code in (400, 404)
    assert message in reply.json()["error"]["message"]


def test_large_bodies_are_refused_before_they_are_held(make_demo):
    with served(make_demo(), limits=Limits(body_bytes=100_000)) as small:
        body = json.dumps({"messages": [{"role": "user", "content": "x" * 3_000_000}]}).encode()
        pieces = (body[i : i + 65536] for i in range(0, len(body), 65536))
        for content in (body, pieces):  # with a length, and in chunks
            reply = small.http.post("/v1/chat/completions", content=content)
            assert reply.status_code == 413
            assert "100000 bytes" in reply.json()["error"]["message"]
            small.settles()


def content_of(*items):
    return {"messages": [{"role": "user", "content": list(items)}], "max_tokens": 1}


@pytest.mark.parametrize(
    "item",
    [
        {"type": "image_url", "image_url": {"url": "PATH"}},
        {"type": "image_url", "image_url": {"url": "file://PATH"}},
        {"type": "image_url", "image_url": "  file:PATH"},
        {"type": "image_url", "image_url": {"url": "FILE://localhostPATH"}},
        {"type": "image", "image": "PATH"},
        {"image": "PATH"},
        {"type": "image", "path": "PATH"},
        {"type": "input_image", "image_url": "PATH"},
        {"type": "text", "text": "x", "image": "PATH"},
        {"type": "image_url", "image_url": {"url": "data:,", "path": "PATH"}},
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1:PORT/x"}},
        {"type": "image_url", "image_url": {"url": "http://localhost:PORT/x"}},
        {"type": "image_url", "image_url": {"url": "ftp://127.0.0.1:PORT/x"}},
        {"type": "video_url", "video_url": {"url": "file://PATH"}},
        {"type": "video_url", "video_url": "PATH", "fps": 1},
        {"type": "video_url", "video_url": {"url": "http://127.0.0.1:PORT/x"}},
        {"type": "video_url", "video_url": {"url": ["PATH"]}},
        {"type": "video_url", "video_url": {"url": "data:,", "path": "PATH"}},
        {"type": "video", "video": "PATH"},
        {"type": "video", "video": ["PATH"]},
        {"type": "image_url"},
        {"type": "image_url", "image_url": {"url": ["PATH"]}},
        "PATH",
    ],
    ids=str,
)
def test_no_file_and_no_host_is_ever_reached(server, tmp_path, item):
    """The picture is one that could be read, and the host one that would answer: neither is touched."""
    path = tmp_path / "picture.png"
    path.write_bytes(PICTURE)
    os.utime(path, (1, 1))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        text = json.dumps(content_of(item)).replace("PATH", str(path)).replace("PORT", str(listener.getsockname()[1]))
        reply = server.http.post("/v1/chat/completions", content=text)
        assert reply.status_code == 400
        with pytest.raises(TimeoutError):
            listener.accept()
    assert path.stat().st_atime == 1


def test_remote_pictures_come_from_public_hosts_alone(make_demo):
    with serve(lambda client: (client.read_head(), client.reply("200 OK", PICTURE))) as port:
        off = MediaLimits(remote=True)
        reached = MediaLimits(remote=True, access=MediaAccess(private_hosts=True))
        other = MediaLimits(remote=True, access=MediaAccess(allow_hosts=("example.org",), private_hosts=True))
        asked = asking("What is this?", f"http://127.0.0.1:{port}/picture.png")
        for media, said in ((off, "private network"), (other, "allow_hosts")):
            with pytest.raises(PromptError, match=said):
                with_bytes(asked, media)
        with served(make_demo(), limits=Limits(media=reached)) as running:
            assert running.chat(asked, max_tokens=1).status_code == 200


def test_pictures_have_limits(make_demo):
    media = MediaLimits(images=2, image_bytes=20_000, image_pixels=100 * 100, max_pixels=50_000)
    small, wide = encoded(noise(40, 40)), encoded(noise(400, 40), "JPEG")
    heavy = encoded(noise(100, 90), "BMP")
    with served(make_demo(), limits=Limits(media=media)) as running:
        cases = [
            (asking("x", *[data_url(small)] * 3), "there are 3 images; this server takes 2"),
            (asking("x", data_url(heavy)), f"image 0 has {len(heavy)} bytes; this server takes 20000"),
            (asking("x", data_url(small), data_url(wide)), "image 1 has 400x40 pixels"),
            (asking("x", data_url(b"nothing")), "image 0"),
            (asking("x", "data:image/png;base64,####"), "not valid base64"),
        ]
        for messages, said in cases:
            reply = running.chat(messages)
            assert reply.status_code == 400
            assert said in reply.json()["error"]["message"]
        messages = asking("x", data_url(small))
        messages[0]["content"][0]["image_url"]["max_pixels"] = 60_000
        assert "this server's most is 50000" in running.chat(messages).text
        assert running.chat(asking("x", data_url(small), data_url(small)), max_tokens=1).status_code == 200


def test_keys(make_demo):
    with served(make_demo(), api_key="secret") as closed:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "secret"},
            {"Authorization": "Bearer"},
        ):
            for path in ("/v1/models", "/metrics", "/flush_cache", "/v1/chat/completions", "/nowhere"):
                reply = closed.http.request("POST" if "chat" in path else "GET", path, headers=headers)
                assert reply.status_code == 401
                assert reply.json()["error"]["code"] == "invalid_api_key"
        assert closed.http.get("/health").status_code == closed.http.get("/").status_code == 200
        assert closed.http.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200


def test_pages_of_other_origins_are_refused(server):
    def post(origin):
        return server.http.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 1}, headers=origin)

    assert post({"Origin": "https://example.org"}).status_code == 403
    assert post({"Origin": "null"}).status_code == 403
    assert post({"Origin": "http://["}).status_code == 403
    assert post({"Origin": b"http://\xff"}).status_code == 403
    assert post({"Origin": server.url}).status_code == 200
    port = server.address[1]
    for host in (f"localhost:{port}", "[::1]", "model.localhost"):
        assert post({"Host": host, "Origin": f"http://{host}"}).status_code == 200


def test_a_page_whose_name_was_given_this_machines_address_is_refused(server, make_demo):
    """Its browser then calls it the same origin. Clients that are no browsers may use any name."""
    body, page = {"messages": HELLO, "max_tokens": 1}, {"Host": "evil.org:80", "Origin": "http://evil.org:80"}
    reply = server.http.post("/v1/chat/completions", json=body, headers=page)
    assert reply.status_code == 403
    assert "--origins" in reply.json()["error"]["message"]
    assert server.http.post("/v1/chat/completions", json=body, headers={"Host": "evil.org"}).status_code == 200
    named = {"Host": "127.0.0.1", "Origin": "https://Llm.example.org"}
    with served(make_demo(), api_key="k", limits=Limits(origins=("llm.example.org",))) as closed:
        for headers in (named, page):  # which has no key, if it is one of the bad ones
            headers |= {"Authorization": "Bearer k"}
            assert closed.http.post("/v1/chat/completions", json=body, headers=headers).status_code == 200
        other = named | {"Origin": "https://llm.example.org.evil.org"}
        assert closed.http.post("/v1/chat/completions", json=body, headers=other).status_code == 403


@pytest.mark.parametrize("half", ["\\ud800", "\\udfff"])
def test_half_a_surrogate_pair_is_told_as_it_was_written(server, half):
    for body in (
        f'{{"messages": [], "{half}": 1}}',
        f'{{"prompt": "x", "model": "{half}"}}',
        f'{{"messages": [{{"role": "user", "content": "x", "{half}": 1}}]}}',
        f'{{"messages": [{{"role": "user", "content": [{{"type": "text", "text": "x", "{half}": 1}}]}}]}}',
        f'{{"messages": [{{"role": "user", "content": "x"}}], "user": 1, "tools": [{{"{half}": "{half}"}}]}}',
    ):
        for path in ("/v1/chat/completions", "/v1/completions"):
            reply = server.http.post(path, content=body)
            assert reply.status_code in (400, 404), reply.text
            assert reply.json()["error"]["message"]


def test_paths_methods_and_encodings(server):
    for method, path, status in (
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/nowhere", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404),
        ("OPTIONS", "/v1/chat/completions", 405),
    ):
        reply = server.http.request(method, path)
        assert reply.status_code == status
        assert reply.json()["error"]["message"].isprintable()
        assert "root:" not in reply.text
    for path in ("/", "/health", "/metrics", "/v1/models"):
        head, get = server.http.head(path), server.http.get(path)
        assert head.status_code == 200
        assert head.content == b""
        assert head.headers["content-type"] == get.headers["content-type"]
    reply = server.http.post("/v1/completions", content=b"x", headers={"Content-Encoding": "gzip"})
    assert reply.status_code == 415


def test_bytes_that_are_no_http(server):
    for noise_bytes in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET\r\n\r\n", b"A" * 100_000 + b"\r\n\r\n"):
        with socket.create_connection(server.address, timeout=10) as connection:
            connection.sendall(noise_bytes)
            connection.shutdown(socket.SHUT_WR)
            connection.settimeout(10)
            answer = connection.recv(1 << 16)
            assert not answer or b" 400 " in answer.split(b"\r\n")[0]
    assert server.http.get("/health").status_code == 200


def test_many_threads_may_ask_at_once(server):
    statuses = []

    def ask(number: int) -> None:
        body = mutated(number)[1] if number % 2 else json.dumps(CHAT).encode()
        statuses.append(server.http.post("/v1/chat/completions", content=body).status_code)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(statuses) == 24
    assert statuses.count(200) >= 12
    assert set(statuses) <= {200, 400, 404}
