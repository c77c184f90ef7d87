"""scripts/serve.py itself: from its first line to its end, by signals and by mistakes."""

import json
import signal
import socket
import threading
from types import SimpleNamespace

import httpx
import pytest
from typer.testing import CliRunner

import serve
from qwen3vl_moe.errors import OptionError
from qwen3vl_moe.server.run import Server, bind
from tests.server.conftest import HELLO, alive, children_of

LONG = {"messages": HELLO, "max_tokens": 200, "ignore_eos": True, "temperature": 0}


@pytest.mark.parametrize(("signals", "status"), [(1, 0), (2, 130)])
def test_ctrl_c_finishes_and_a_second_one_does_not(program, signals, status):
    process, url = program
    children = children_of(process.pid)
    lines, begun = [], threading.Event()

    def ask() -> None:
        try:
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=LONG | {"stream": True}, timeout=60) as reply:
                for line in reply.iter_lines():
                    lines.append(line)
                    if len(lines) > 3:
                        begun.set()
        except httpx.HTTPError:
            lines.append("broken off")

    asking = threading.Thread(target=ask)
    asking.start()
    assert begun.wait(60)
    for _ in range(signals):
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline()
    asking.join(60)
    assert process.wait(60) == status
    assert len(children) == 1
    assert not any(map(alive, children))
    if signals == 1:
        assert "data: [DONE]" in lines
        assert json.loads(next(line for line in reversed(lines) if "usage" in line)[6:])["usage"]
    else:
        assert "data: [DONE]" not in lines
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
        (["--port", "99999"], "--port 99999"),
        (["--port", "TAKEN"], "Address already in use; choose another port"),
        (["--max-body-mib", "0"], "--max-body-mib 0"),
        (["--max-videos", "-1"], "--max-videos -1"),
        (["--max-video-frames", "0"], "--max-video-frames 0"),
        (["--data-parallel-size", "2"], "--data-parallel-size 2: this program drives one engine; start one server"),
        (["--allow-hosts", "x.org"], "--allow-hosts needs --allow-remote-images"),
        (["--allow-remote-images", "--allow-hosts", "http://x"], "allow_hosts has 'http://x'"),
        (["--api-key", ""], "--api-key"),
        (["--api-key", "secret\n"], "--api-key has to be"),  # it could never be given
        (["--origins", "https://x.org"], "--origins https://x.org: the host of a page is needed"),
        (["--port", "0", "--model", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_mistakes_are_one_line_and_status_2(options, said):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        options = [str(listening.getsockname()[1]) if option == "TAKEN" else option for option in options]
        result = CliRunner().invoke(serve.app, options)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert said in result.stderr


def test_several_engines_are_refused_in_python_too():
    with bind("127.0.0.1", 0) as bound, pytest.raises(OptionError, match="data_parallel_size=2: a server drives one"):
        Server(SimpleNamespace(settings={"data_parallel_size": 2}), bound, "demo")


def test_a_port_is_taken_before_weights_are_loaded():
    """By another server that is still loading its own, too; and it can be had again as soon as one has ended."""
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(OptionError, match="choose another port"):
            bind("127.0.0.1", port)
    with bind("127.0.0.1", port) as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the process does that serves HTTP
        again.listen()
        client = socket.create_connection(again.getsockname())
        accepted, _ = again.accept()
        accepted.close()  # this side first: the address stays in use for a while
        client.recv(1)
        client.close()
        with pytest.raises(OptionError, match="choose another port"):
            bind("127.0.0.1", port)
    with bind("127.0.0.1", port) as later:
        later.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        later.listen()
