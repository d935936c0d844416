"""lm-eval's local-chat-completions on a task that generates; the second argument is the folder of tasks."""

from __future__ import annotations

import sys
from importlib.metadata import version

import lm_eval
from fruit import MODEL, base_url, report
from lm_eval.tasks import TaskManager

url = f"{base_url()}/chat/completions"
answer = lm_eval.simple_evaluate(
    model="local-chat-completions",
    model_args={"base_url": url, "model": MODEL, "num_concurrent": 2, "max_retries": 1},
    tasks=["logitserve_chats"],
    task_manager=TaskManager(include_path=sys.argv[2], include_defaults=False),
    apply_chat_template=True,
    bootstrap_iters=0,
)
samples = answer["samples"]["logitserve_answers"]
report(
    {
        "version": version("lm_eval"),
        "answers": [sample["resps"][0][0] for sample in sorted(samples, key=lambda sample: sample["doc_id"])],
        "score": answer["results"]["logitserve_answers"]["exact_match,none"],
    }
)
