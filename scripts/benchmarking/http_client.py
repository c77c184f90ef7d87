"""The closed loop over HTTP, in a process of its own: its work must not slow the server down.

    python -m benchmarking.http_client http://127.0.0.1:8000 32 2 < bodies.jsonl > records.json

A line of stdin is the body of a streamed chat request; the first ones, here 2, are sent one by one before the clock
runs. It does what bench_serving's client does, with the same library (aiohttp): so many requests at a time, each one's
clock running from its submission to its last chunk with text.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import aiohttp


async def ask(session: aiohttp.ClientSession, body: bytes, gate: asyncio.Semaphore) -> dict[str, Any]:
    """One request: when it began, when its pieces of text came (seconds on one clock), and the counts of tokens."""
    async with gate:
        start, times, usage = time.perf_counter(), [], {}
        async with session.post(
            "/v1/chat/completions", data=body, headers={"content-type": "application/json"}
        ) as reply:
            if reply.status != 200:
                raise SystemExit(f"error: {reply.status} {(await reply.text())[:300]}")
            async for line in reply.content:
                if not line.startswith(b"data: {"):
                    continue
                now, chunk = time.perf_counter(), json.loads(line[6:])
                if "error" in chunk:
                    raise SystemExit(f"error: {chunk['error']['message']}")
                usage = chunk.get("usage") or usage
                if chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                    times.append(now)
        return {"start": start, "times": times or [time.perf_counter()], "usage": usage}


async def main(url: str, concurrency: int, first: int, bodies: list[bytes]) -> dict[str, Any]:
    gate, timeout = asyncio.Semaphore(concurrency), aiohttp.ClientTimeout(total=3600)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, timeout=timeout, connector=connector, read_bufsize=10 << 20) as session:
        for body in bodies[:first]:
            await ask(session, body, gate)
        began = time.perf_counter()
        records = await asyncio.gather(*(ask(session, body, gate) for body in bodies[first:]))
        return {"records": records, "duration": time.perf_counter() - began}


if __name__ == "__main__":
    lines = sys.stdin.buffer.read().splitlines()
    json.dump(asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), lines)), sys.stdout)
