"""What the two public benchmark clients send, written down by hand; and themselves, where they are installed."""

import importlib.util
import json
import subprocess
import sys

import pytest

from tests.pictures import encoded, noise
from tests.server.conftest import DEMO, data_url

JPEG = data_url(encoded(noise(56, 56), "JPEG"), "image/jpeg")
# Pictures first, no stream_options; a token is a chunk with content.
SGLANG = {
    "model": "demo",
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": JPEG}},
                {"type": "image_url", "image_url": {"url": JPEG}},
                {"type": "text", "text": "the a of and"},
            ],
        }
    ],
    "temperature": 0.0,
    "max_completion_tokens": 9,
    "stream": True,
    "ignore_eos": True,
}
# Text first, and counts asked for.
VLLM = {
    "model": "demo",
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "the a of and"},
                {"type": "image_url", "image_url": {"url": JPEG}},
            ],
        }
    ],
    "max_completion_tokens": 9,
    "stream": True,
    "stream_options": {"include_usage": True},
    "temperature": 0.0,
    "repetition_penalty": 1.0,
    "ignore_eos": True,
}


def lines(server, body):
    headers = {"Content-Type": "application/json", "Authorization": "Bearer None"}
    with server.http.stream("POST", "/v1/chat/completions", content=json.dumps(body), headers=headers) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        return [line for line in response.iter_lines() if line]


def test_as_sglang_reads_it(server):
    """Every line is data, a chunk is one line and has a choice; counts may come with any of them."""
    found = lines(server, SGLANG)
    assert all(line.startswith("data: ") for line in found)
    assert found[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in found[:-1]]
    assert all(chunk["choices"] for chunk in chunks)
    # A token without a text (end-of-text, which is passed over here) is no chunk.
    assert 0 < sum(bool(chunk["choices"][0]["delta"].get("content")) for chunk in chunks) <= 9
    assert chunks[-1]["usage"]["completion_tokens"] == 9
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_as_vllm_reads_it(server):
    """The last chunk has no choice and the counts; nothing without a role has empty content."""
    found = lines(server, VLLM)
    chunks = [json.loads(line.removeprefix("data: ")) for line in found[:-1]]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 9
    assert not any("usage" in chunk for chunk in chunks[:-1])
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert 0 < sum(delta.get("content") is not None and "role" not in delta for delta in deltas) <= 9
    assert not any(delta.get("content") == "" and "role" not in delta for delta in deltas)


def test_what_they_ask_before(server):
    [model] = server.http.get("/v1/models").json()["data"]
    assert model["id"] == model["root"] == "demo"
    assert server.http.get("/server_info").status_code == 404
    assert server.http.get("/metrics").status_code == 200
    assert server.http.post("/flush_cache").status_code == 200


@pytest.mark.parametrize("module", ["sglang", "vllm"])
def test_themselves(server, module):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    address = ["--host", "127.0.0.1", "--port", server.url.rpartition(":")[2]]
    image = ["--num-prompts", "8", "--model", "demo", "--tokenizer", str(DEMO)]
    if module == "sglang":
        command = ["-m", "sglang.bench_serving", "--backend", "sglang-oai-chat", "--dataset-name", "image", *address]
        command += [*image, "--image-count", "1", "--image-resolution", "56x56", "--random-output-len", "8"]
    else:
        command = ["-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", "openai-chat", *address, *image]
        command += ["--endpoint", "/v1/chat/completions", "--dataset-name", "random-mm", "--random-output-len", "8"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "8" in next(line for line in done.stdout.splitlines() if line.startswith("Successful requests"))
