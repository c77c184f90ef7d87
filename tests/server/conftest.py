"""Servers on loopback, whose engines are in this process and can be looked into."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from demo_training.drawing import draw
from demo_training.evaluation import heldout_examples
from qwen3vl_moe import LLM
from qwen3vl_moe.inputs.processor import Processor
from qwen3vl_moe.server.run import Server, bind
from tests.pictures import encoded

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "qwen3vl_moe" / "demo"
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
HELLO = [{"role": "user", "content": "Hello"}]


class Served:
    """A running server.

    Attributes:
        url: of it.
        address: of it, for sockets.
        http: a client of it.
        llm: whose engine it drives.
        listening: the socket of the server that all tests share.
        said: its lines.
        status: that it ended with.
    """

    listening: socket.socket

    def __init__(self, server: Server, llm: LLM, said: list[str]):
        self.server, self.url, self.llm, self.said, self.status = server, server.address, llm, said, None
        parts = urlsplit(self.url)
        self.address = parts.hostname, parts.port
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def run(self) -> None:
        self.status = self.server.run()

    def metric(self, name: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"qwen3vl_moe_{name} "))

    @property
    def inside(self) -> int:
        """How many answers were let in and have not ended."""
        return int(self.metric("answers_inside"))

    def chat(self, messages: Any = HELLO, **fields: Any) -> httpx.Response:
        return self.http.post("/v1/chat/completions", json={"messages": messages, "temperature": 0, **fields})

    def events(self, messages: Any = HELLO, **fields: Any) -> list[Any]:
        """The values of all events of a stream; the last line of it has to be [DONE]."""
        response = self.chat(messages, stream=True, **fields)
        assert response.status_code == 200, response.text
        lines = response.text.removesuffix("\n\n").split("\n\n")
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]

    def settles(self) -> None:
        """Wait until nothing is asked for any more and every block is free: a request that was given up may have been
        on its way to the engine, with the order to free it behind."""
        deadline = time.monotonic() + 30
        while left := self._left():
            assert time.monotonic() < deadline, f"this stays: {left}"
            time.sleep(0.01)

    def _left(self) -> dict[str, int]:
        scheduler, cache = self.llm.engine.scheduler, self.llm.engine.cache
        found = {
            "inside": self.inside,
            "ahead": int(self.metric("requests_ahead")),
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "blocks": cache.num_blocks - cache.num_free,
            "references": sum(map(bool, cache._references)),
        }
        return {name: count for name, count in found.items() if count}


@contextmanager
def served(llm: LLM, name: str = "demo", bound: socket.socket | None = None, **options: Any) -> Iterator[Served]:
    said: list[str] = []
    server = Server(llm, bound or bind("127.0.0.1", 0), name, say=said.append, **options)
    made = Served(server, llm, said)
    thread = threading.Thread(target=made.run)
    thread.start()
    try:
        while not said:
            time.sleep(0.01)
        yield made
    finally:
        server.stop()
        made.http.close()
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def demo() -> LLM:
    """Steps are launched ahead, as on a GPU."""
    options = {"max_num_seqs": 64, "num_blocks": 4096, "async_scheduling": True}
    return LLM("demo", dtype="float32", progress=False, **options)


@pytest.fixture(scope="session")
def server(demo: LLM) -> Iterator[Served]:
    """One server for all tests that need no other."""
    bound = bind("127.0.0.1", 0)
    listening = bound.dup()
    with served(demo, bound=bound) as running, listening:
        running.listening = listening
        yield running


@pytest.fixture(autouse=True)
def nothing_stays(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test all blocks are free."""
    yield
    if "server" in request.fixturenames:
        request.getfixturevalue("server").settles()


@pytest.fixture(scope="session")
def make_demo(demo: LLM) -> Callable[..., LLM]:
    """``make_demo(template=..., **engine_options)``: the demo's weights in another engine."""

    def make(template: str | None = None, **options: Any) -> LLM:
        processor = demo.processor
        if template is not None:
            processor = Processor(processor.tokenizer, template, processor.image_settings, processor.config, 8192)
        options = {"num_blocks": 1024, "max_num_seqs": 16, "async_scheduling": True, **options}
        return LLM.from_parts(demo.engine.model, processor, demo.engine.defaults, **options)

    return make


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def asking(text: str, *urls: str) -> list[dict[str, Any]]:
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


@pytest.fixture(scope="session")
def question() -> tuple[bytes, str, str]:
    """A drawn picture (PNG), a question about it, and the right answer, which the demo gives."""
    example = next(each for each in heldout_examples(9) if each.questions[0].kind == "number")
    return encoded(draw(example.scenes[0])), example.questions[0].text, example.questions[0].answer


def start(*options: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "scripts/serve.py"), *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT | environment)


@pytest.fixture
def program():
    """A server of the demo, and its address."""
    process = start("--port", "0", "--max-num-seqs", "8", "--max-model-len", "1024")
    try:
        for line in process.stderr:
            if line.startswith("serving "):
                break
        else:
            pytest.fail("it never served")
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.communicate()


def children_of(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(line) for line in found.split()]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
