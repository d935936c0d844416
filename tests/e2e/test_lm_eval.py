"""EleutherAI's lm-eval, whose results through the server must equal those of its own hf model."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import orjson
import pytest
from logitengine.model.checkpoint.resolve import Checkpoint

pytest.importorskip("lm_eval")

TASKS = Path(__file__).parent / "lm_eval_tasks"
PROGRAM = textwrap.dedent(
    """
    import json, sys
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    asked = json.load(sys.stdin)
    manager = TaskManager(include_path=asked.pop("tasks_path"), include_defaults=False)
    found = {}
    for name, model in asked.pop("models").items():
        answer = simple_evaluate(task_manager=manager, bootstrap_iters=0, **asked, **model)
        found[name] = {
            "results": answer["results"],
            "scores": {
                task: [sample["filtered_resps"] for sample in sorted(samples, key=lambda s: s["doc_id"])]
                for task, samples in answer["samples"].items()
            },
        }
    print(json.dumps(found))
    """
)


@pytest.fixture(scope="module")
def evaluated(
    float32_url: str, smollm2: Checkpoint, smollm2_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """Return lm-eval's results for each model.

    lm-eval runs in a separate process, because it is not made to run with warnings as errors.
    """
    served = {
        "base_url": f"{float32_url}/v1/completions",
        "model": "smollm2",
        "tokenizer": str(smollm2.tokenizer_path),
        "max_length": 2048,
        "num_concurrent": 2,
        "max_retries": 1,
    }
    models = {
        "hf": {
            "model": "hf",
            "model_args": {"pretrained": str(smollm2_directory), "dtype": "float32", "device": "cpu"},
        },
        "tokens": {"model": "local-completions", "model_args": {**served, "tokenized_requests": True}},
        "text": {"model": "local-completions", "model_args": {**served, "tokenized_requests": False}},
    }
    asked = {"tasks_path": str(TASKS), "tasks": ["logitserve_facts", "logitserve_texts"], "batch_size": 4}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=orjson.dumps({**asked, "models": models}),
        cwd=TASKS,
        capture_output=True,
        timeout=240,
        check=False,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "HF_HOME": str(tmp_path_factory.mktemp("huggingface")),
        },
    )
    assert result.returncode == 0, result.stderr.decode()[-4000:]
    return orjson.loads(result.stdout.splitlines()[-1])


def numbers(scores: Any) -> list[float]:
    """Return every log-likelihood in nested lists, in order."""
    if isinstance(scores, list):
        return [number for item in scores for number in numbers(item)]
    return [] if isinstance(scores, bool | str) else [float(scores)]


@pytest.mark.parametrize("served", ["tokens", "text"])
@pytest.mark.parametrize(("task", "count"), [("logitserve_facts", 32), ("logitserve_texts", 5)])
def test_log_likelihoods_are_those_of_lm_evals_own_model(
    evaluated: Any, served: str, task: str, count: int
) -> None:
    expected = numbers(evaluated["hf"]["scores"][task])
    assert len(expected) == count
    assert len(set(expected)) > count // 2
    assert numbers(evaluated[served]["scores"][task]) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("served", ["tokens", "text"])
def test_accuracies_are_the_same(evaluated: Any, served: str) -> None:
    for metric in ("acc,none", "acc_norm,none"):
        assert (
            evaluated[served]["results"]["logitserve_facts"][metric]
            == evaluated["hf"]["results"]["logitserve_facts"][metric]
        )
