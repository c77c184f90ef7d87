"""The two processes of a server: what goes between them, and what becomes of one when the other ends."""

import asyncio
import os
import signal
import socket
import struct
import threading

import httpx
import numpy as np
import pytest
import torch

from qwen3vl_moe.server import streams
from qwen3vl_moe.server.engine_thread import EngineThread
from qwen3vl_moe.server.run import _started, bind
from qwen3vl_moe.server.streams import Link
from qwen3vl_moe.server.wire import Ask, Stop, Wire
from tests.server.conftest import HELLO, alive, children_of, served
from tests.server.test_streams import LONG, connect, until


def test_arrays_go_across_as_they_are():
    left, right = map(Wire, socket.socketpair())
    pixels, positions = np.random.default_rng(0).integers(0, 255, (1000, 700, 3), np.uint8), torch.arange(12)[None]
    sender = threading.Thread(target=lambda: [left.send(Ask(7, [pixels, positions], None, True)), left.send(Stop())])
    sender.start()
    number, (there, places), *_ = right.receive()
    assert number == 7
    assert np.array_equal(there, pixels)
    assert there.flags.writeable  # the engine makes a tensor of it
    assert places.dtype == torch.int64
    assert torch.equal(places, positions)
    assert right.receive() == Stop()
    sender.join()
    left.close()
    with pytest.raises(EOFError):
        right.receive()


def test_half_a_message_is_none():
    left, right = socket.socketpair()
    Wire(left).send("x" * 100)
    whole = right.recv(1 << 16)
    for stop in (3, 10, len(whole) - 1):
        here, there = socket.socketpair()
        here.sendall(whole[:stop])
        here.close()
        with pytest.raises(EOFError):
            Wire(there).receive()


def test_a_message_that_cannot_be_read_is_the_end(make_demo, capfd):
    """Of the engine's side, where requests come in; else whoever asks would wait for ever."""
    ours, theirs = socket.socketpair()
    failed = threading.Event()
    thread = EngineThread(make_demo().engine, Wire(ours), on_failure=failed.set)
    thread.start()
    with theirs:
        theirs.sendall(struct.pack("<QQ", 1, 3) + b"abc")
        assert failed.wait(30)
        thread.join()
    assert thread.failure.startswith("the engine has failed: UnpicklingError")
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.parametrize("what", ["sent", "read"])
def test_nor_can_the_other_side_go_on(monkeypatch, capfd, what):
    ours, theirs = socket.socketpair()
    status: list[int] = []
    monkeypatch.setattr(streams, "_LAST_WORDS", 0)
    monkeypatch.setattr(streams.os, "_exit", status.append)

    async def talk() -> None:
        link = Link(Wire(ours), lambda: None)
        link.start()
        if what == "sent":
            link._outbox.put(lambda: None)
        else:
            theirs.sendall(struct.pack("<QQ", 1, 3) + b"abc")
        while not status:
            await asyncio.sleep(0.01)
        assert link.failed == (what == "read")  # who asks is told as far as there is time

    with theirs:
        asyncio.run(talk())
    assert status == [1]
    if what == "sent":
        until(lambda: status == [1, 1], "the thread that hears goes on")  # which the end of the wire has told
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.parametrize("draining", [False, True], ids=["serving", "draining"])
def test_the_end_of_the_process_that_serves_http_is_that_of_the_server(make_demo, draining):
    llm = make_demo()
    with served(llm) as small:
        connections = [connect(small, LONG | {"stream": True, "max_tokens": 900}) for _ in range(3)]
        until(lambda: len(llm.engine.scheduler.running) == 3, "they never ran")
        if draining:
            small.server.stop()
        small.server._process.kill()
        until(lambda: small.status is not None, "the server goes on")
        for connection in connections:
            connection.close()
    assert small.status == 1
    assert small.said[-1] == "error: the process that serves HTTP was killed (SIGKILL)"
    assert llm.engine.cache.num_free == llm.engine.cache.num_blocks
    assert llm.chat(HELLO)[0].outputs[0].text  # and the model is somebody else's


def test_a_signal_while_the_other_process_begins_is_none_of_its_business(capfd):
    """Ctrl-C in a terminal strikes both. It ends with the wire, without a word."""
    ours, theirs = socket.socketpair()
    with bind("127.0.0.1", 0) as bound, theirs:
        process = _started(theirs, bound)
    for number in (signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
    ours.close()
    assert process.wait(60) == 0
    assert capfd.readouterr().err == ""


def test_a_killed_engine_takes_all_with_it_and_clients_are_told(program):
    """Signals, which a terminal sends to all processes, are the first one's: the other leaves them alone."""
    process, url = program
    [front] = children_of(process.pid)
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(front, number)
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=LONG | {"stream": True}, timeout=60) as reply:
        lines = reply.iter_lines()
        next(lines)
        process.kill()
        rest = [line for line in lines if line]
    assert "the engine has failed" in rest[-1]
    assert process.wait(60) == -signal.SIGKILL
    said = process.stderr.read()  # to its end, which is that of both processes
    assert said.splitlines() == ["error: the engine's process has ended"]
    until(lambda: not alive(front), "a process is left")


def test_a_grammar_that_is_given_up_while_it_is_compiled_leaves_nothing(server):
    """The next steps do not wait for it either, and the same form is right afterwards."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [f"a{n}" for n in range(500)]}}}
    connections = [connect(server, LONG | {"response_format": form}) for _ in range(3)]
    for connection in connections:
        connection.close()
    server.settles()
    assert not server.server.thread._compiling
    reply = server.chat(response_format=form, max_tokens=12).json()
    assert reply["choices"][0]["message"]["content"].startswith('"a')
