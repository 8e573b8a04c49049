"""A client of OpenAI's completions API: many streaming requests at once, greedy, of a fixed number of tokens.

    PYTHON serving_client.py JOB.json RESULT.json

job:    {"url": "http://localhost:8000/v1", "model": name, "prompts": [[token ids], ...] or [text, ...],
         "num_tokens": N, "client": "openai" | "stdlib", "extra": {...}}
result: {"seconds": from the first request to the last token, "texts": [...], "num_tokens": [...], "ttft_seconds": [...],
         "gap_seconds": [mean time between two tokens of a request, ...]}

"openai" is the official package. "stdlib" speaks the same HTTP with a few lines of asyncio: on a machine whose cores serve
at the same time, the official client's own work (about a third of a millisecond per token) would be part of what is measured.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any
from urllib.parse import urlsplit


class Answer:
    """One request: its text and the times at which pieces of it came."""

    def __init__(self) -> None:
        self.text, self.num_tokens = "", 0
        self.times: list[float] = []

    def add(self, chunk: dict[str, Any]) -> None:
        if chunk.get("usage"):
            self.num_tokens = chunk["usage"]["completion_tokens"]
        for choice in chunk.get("choices", []):
            self.text += choice["text"]
            self.times.append(time.perf_counter())


def body(job: dict[str, Any], prompt: Any) -> dict[str, Any]:
    return {
        "model": job["model"], "prompt": prompt, "max_tokens": job["num_tokens"], "temperature": 0, "stream": True,
    }  # fmt: skip


async def ask_stdlib(job: dict[str, Any], prompt: Any) -> Answer:
    answer, where = Answer(), urlsplit(job["url"])
    content = {**body(job, prompt), "stream_options": {"include_usage": True}, **job["extra"]}
    data = json.dumps(content).encode()
    reader, writer = await asyncio.open_connection(where.hostname, where.port, limit=2**24)
    head = f"POST {where.path}/completions HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError(f"{status.decode().strip()}: {(await reader.read()).decode()[-500:]}")
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            answer.add(json.loads(line[6:]))
    writer.close()
    return answer


async def ask_openai(client: Any, job: dict[str, Any], prompt: Any) -> Answer:
    answer = Answer()
    options = {"stream_options": {"include_usage": True}, "extra_body": job["extra"]}
    async for chunk in await client.completions.create(**body(job, prompt), **options):
        answer.add(chunk.model_dump())
    return answer


async def ask_all(job: dict[str, Any]) -> dict[str, Any]:
    if job["client"] == "openai":
        from openai import AsyncOpenAI

        client = AsyncOpenAI(base_url=job["url"], api_key="none", timeout=600, max_retries=0)
        asks = [ask_openai(client, job, prompt) for prompt in job["prompts"]]
    else:
        asks = [ask_stdlib(job, prompt) for prompt in job["prompts"]]
    begin = time.perf_counter()
    answers = await asyncio.gather(*asks)
    end = max(answer.times[-1] for answer in answers)
    return {
        "seconds": end - begin,
        "texts": [answer.text for answer in answers],
        "num_tokens": [answer.num_tokens for answer in answers],
        "ttft_seconds": [answer.times[0] - begin for answer in answers],
        "gap_seconds": [(a.times[-1] - a.times[0]) / max(1, job["num_tokens"] - 1) for a in answers],
    }


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as handle:
        given = json.load(handle)
    found = asyncio.run(ask_all(given))
    with open(sys.argv[2], "w", encoding="utf-8") as handle:
        json.dump(found, handle)
