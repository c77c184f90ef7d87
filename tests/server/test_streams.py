"""Many at a time, some of whom go away, read slowly, or come when there is no room."""

import asyncio
import json
import socket
import threading
import time

import httpx
import pytest

from qwen3vl_moe import SamplingParams
from qwen3vl_moe.errors import RankError
from qwen3vl_moe.inputs.access import MediaAccess
from qwen3vl_moe.server.limits import Limits
from qwen3vl_moe.server.media import MediaLimits
from tests.inputs.web import PICTURE, serve
from tests.server.conftest import HELLO, Served, asking, data_url, served

LONG = {"messages": HELLO, "max_tokens": 2000, "ignore_eos": True, "temperature": 0}


def raw_request(body: dict, path: str = "/v1/chat/completions") -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def connect(running: Served, body: dict) -> socket.socket:
    """A connection on which a request was sent."""
    connection = socket.create_connection(running.address)
    connection.sendall(raw_request(body))
    return connection


def until(condition, what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def test_64_streams_at_once_get_what_each_gets_alone(server, question):
    picture, text, _ = question
    asked = [asking(f"{text} {number}", data_url(picture)) for number in range(16)]
    options = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
    alone = [
        server.chat(messages, **options).json()["choices"][0]["message"]["content"] for messages in (asked[0], asked[7])
    ]

    async def stream(client: httpx.AsyncClient, number: int) -> str:
        body = {"messages": asked[number % 16], "stream": True, **options}
        found = ""
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    [choice] = json.loads(line[6:])["choices"]
                    found += choice["delta"].get("content", "")
            assert line == ""
        return found

    async def all_of_them() -> list[str]:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
            return await asyncio.gather(*(stream(client, number) for number in range(64)))

    found = asyncio.run(all_of_them())
    assert [found[0], found[7]] == alone
    assert found[:16] * 4 == found
    server.settles()
    assert server.metric("answers_running") == server.metric("answers_waiting") == 0


def test_a_request_joins_the_batch_that_runs(server):
    with connect(server, LONG | {"stream": True}):
        until(lambda: server.llm.engine.scheduler.running, "it never began")
        assert server.chat(max_tokens=3).status_code == 200
        assert server.llm.engine.scheduler.running  # the long one is still at it
    server.settles()


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("when", ["running", "at once", "in the middle of the body"])
def test_who_goes_away_leaves_nothing_behind(server, stream, when):
    if when == "in the middle of the body":
        connections = [socket.create_connection(server.address) for _ in range(4)]
        for connection in connections:
            connection.sendall(raw_request(LONG)[:-10])
        until(lambda: server.inside == 4, "it was never let in")
    else:
        connections = [connect(server, LONG | {"stream": stream, "n": 1}) for _ in range(4)]
    if when == "running":
        until(lambda: len(server.llm.engine.scheduler.running) == 4, "they never ran")
    for connection in connections:
        connection.close()
    server.settles()


def test_who_reads_nothing_holds_nobody_up(server):
    def answered() -> float:
        return server.metric('requests_total{endpoint="chat",status="200"}')

    server.chat(max_tokens=1)
    before = answered()
    server.listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # and so have its connections
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.connect(server.address)
    slow.sendall(raw_request(LONG | {"stream": True, "max_tokens": 120, "logprobs": True, "top_logprobs": 20}))
    until(lambda: server.llm.engine.scheduler.running, "it never began")
    server.listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    assert server.chat(max_tokens=5).status_code == 200
    # It takes nobody's place while it is written out.
    until(lambda: not server.inside, "its answer is never finished")
    assert answered() == before + 1  # and so it is
    found = b""
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    while not found.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
        found += slow.recv(1 << 16)
    slow.close()
    assert found.count(b'"token":') >= 120


def test_a_full_server_says_so_and_takes_more_later(make_demo):
    llm = make_demo(max_num_seqs=2)
    with served(llm, limits=Limits(waiting=1)) as small:
        connections = [connect(small, LONG) for _ in range(3)]
        until(lambda: small.inside == 3, "they were not let in")
        refused = small.chat()
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        connections.pop().close()
        until(lambda: small.inside == 2, "its place was never given up")
        assert small.chat(max_tokens=2, n=2, temperature=1).status_code == 429  # one place, two answers
        assert small.chat(max_tokens=2, n=4, temperature=1).status_code == 400  # never
        for connection in connections:
            connection.close()
        small.settles()
        assert small.chat(max_tokens=2, n=2, temperature=1).status_code == 200
        small.settles()


def test_pictures_that_wait_are_not_decoded_all_at_once(make_demo, question):
    picture, text, _ = question
    with served(make_demo(max_num_seqs=2)) as small:
        body = {"messages": asking(text, data_url(picture)), "max_tokens": 20, "ignore_eos": True}
        connections = [connect(small, body) for _ in range(10)]
        until(lambda: small.inside == 10, "they were not let in")
        ahead = []
        while small.inside:
            ahead.append(small.metric("requests_ahead"))
            time.sleep(0.01)
        for connection in connections:
            connection.close()
        small.settles()
    assert max(ahead) == 2  # two run, and the next two are ready


def test_who_goes_away_while_a_picture_is_had_keeps_the_place_of_the_work(make_demo):
    """Else whoever comes and goes could have a server hold more pictures at a time than it may."""
    arrived, go_on = threading.Semaphore(0), threading.Event()

    def answer(client) -> None:
        client.read_head()
        arrived.release()
        assert go_on.wait(30)
        client.reply("200 OK", PICTURE)

    media = MediaLimits(remote=True, access=MediaAccess(private_hosts=True))
    with serve(answer) as port, served(make_demo(max_num_seqs=2), limits=Limits(media=media)) as small:
        asked = {"messages": asking("What is this?", f"http://127.0.0.1:{port}/picture.png")}
        for _ in range(2):
            connection = connect(small, asked)
            assert arrived.acquire(timeout=30)
            connection.close()
        until(lambda: not small.inside, "they were never given up")
        with connect(small, asked):
            time.sleep(0.1)
            assert small.metric("requests_ahead") == 2
        go_on.set()
        small.settles()
        assert small.chat(max_tokens=1).status_code == 200


def test_the_end_waits_for_answers(make_demo):
    found = {}

    def ask(small: Served) -> None:
        found["reply"] = small.chat(max_tokens=100, ignore_eos=True)

    with served(make_demo()) as small:
        asking_thread = threading.Thread(target=ask, args=(small,))
        asking_thread.start()
        until(lambda: small.llm.engine.scheduler.running, "it never began")
        small.server.stop()
        asking_thread.join(60)
    assert found["reply"].json()["usage"]["completion_tokens"] == 100


@pytest.mark.parametrize(
    "error", [RuntimeError("the device is gone"), RankError("rank 1: the device is gone")], ids=repr
)
def test_a_failed_engine_ends_the_server_and_tells_everybody(make_demo, monkeypatch, capfd, error):
    """With a traceback of what nobody foresaw, and none of an error that says all."""
    unforeseen, llm = isinstance(error, RuntimeError), make_demo()
    with served(llm) as small:
        step = llm.engine.step

        def fail() -> None:
            step()
            if llm.engine.scheduler.running[0].num_output_tokens == 3:
                raise error

        monkeypatch.setattr(llm.engine, "step", fail)
        events = small.chat(stream=True, max_tokens=10).text.strip().split("\n\n")
        told = json.loads(events[-1].removeprefix("data: "))["error"]
        assert (told["type"], told["message"]) == ("server_error", "the engine has failed")
        until(lambda: any("the device is gone" in line for line in small.said), "nobody was told")
    assert small.status == 1
    assert ("Traceback" in capfd.readouterr().err) == unforeseen


def test_the_cache_can_be_forgotten(server):
    messages = [{"role": "user", "content": "Hello there, " * 20}]

    def cached() -> int:
        return server.chat(messages, max_tokens=1).json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    cached()
    assert cached() > 0
    assert server.http.post("/flush_cache").status_code == 200
    assert cached() == 0
    assert cached() > 0


def test_metrics_count_what_was_done(server):
    value = server.metric
    before = value("generation_tokens_total"), value("time_to_first_token_seconds_count")
    server.events(max_tokens=7, ignore_eos=True)
    server.settles()
    assert value("generation_tokens_total") == before[0] + 7
    assert value("time_to_first_token_seconds_count") == before[1] + 1
    assert value("answers_inside") == value("kv_cache_usage_ratio") == 0


def test_steps_of_the_engine_are_those_of_the_library(server, make_demo):
    """The thread drives the engine as a call does: the same tokens come out."""
    params = SamplingParams(temperature=2.0, seed=5, max_tokens=24)
    [output] = make_demo().chat(HELLO, params)
    reply = server.chat(temperature=2.0, seed=5, max_tokens=24).json()
    assert reply["choices"][0]["message"]["content"] == output.outputs[0].text
