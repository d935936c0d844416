"""Jobs with more prompts than the engine's queue holds."""

from __future__ import annotations

from pathlib import Path

import httpx
from live_server import serving


def test_a_job_larger_than_the_queue_is_answered_whole(tiny_llama: Path, tmp_path: Path) -> None:
    options = ("--dtype=float32", "--num-threads=1", "--max-waiting=2", "--max-num-seqs=2")
    body = {
        "prompt": [[5, 6, 7 + number] for number in range(12)],
        "n": 5,
        "max_tokens": 3,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    with serving(tmp_path / "server.log", str(tiny_llama), *options) as server:
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    choices = answer.json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(60))
    assert [len(choice["token_ids"]) for choice in choices] == [3] * 60
