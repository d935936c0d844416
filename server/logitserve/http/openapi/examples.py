"""Examples of request bodies. SmolLM2, served with a value head called helpful, answers each of them."""

from __future__ import annotations

from typing import Any

Examples = dict[str, dict[str, Any]]

_QUESTION = [{"role": "user", "content": "Name three colours."}]
_SENTENCE = "The capital of France is Paris."

_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}

CHAT: Examples = {
    "answer": {"messages": _QUESTION, "max_tokens": 16},
    "stream_with_logits": {
        "messages": _QUESTION,
        "max_tokens": 4,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_logits": {"top_k": 3},
    },
    "logprobs": {"messages": _QUESTION, "max_tokens": 4, "logprobs": True, "top_logprobs": 5},
    "tool": {
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "tools": [_TOOL],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_tokens": 64,
    },
}

COMPLETION: Examples = {
    "answer": {"prompt": "The capital of France is", "max_tokens": 2, "temperature": 0},
    "top_logits": {"prompt": "The capital of France is", "max_tokens": 2, "return_logits": {"top_k": 3}},
    "scored_prompt": {
        "prompt": "yes or no?",
        "max_tokens": 0,
        "echo": True,
        "logprobs": 1,
        "return_logits": {"positions": "prompt", "token_ids": [9891, 2822]},
    },
}

LOGITS: Examples = {
    "prompt_rows": {"input": _SENTENCE, "top_k": 5},
    "generated_rows": {
        "input": [[504, 3575, 282]],
        "max_tokens": 2,
        "positions": "generated",
        "dtype": "float16",
    },
}

PERPLEXITY: Examples = {
    "text": {"input": _SENTENCE},
    "texts": {"input": [_SENTENCE, "Paris is the capital."]},
}

REWARDS: Examples = {
    "text": {"input": _SENTENCE, "head": "helpful"},
    "conversation": {
        "messages": [*_QUESTION, {"role": "assistant", "content": "Red, green and blue."}],
        "head": "helpful",
        "return_values": True,
    },
}

EMBEDDINGS: Examples = {
    "texts": {"input": [_SENTENCE, "Paris is the capital."]},
    "short_vectors": {"input": _SENTENCE, "dimensions": 32, "encoding_format": "base64"},
}

POOLING: Examples = {"text": {"input": _SENTENCE, "head": "helpful"}}

TOKENIZE: Examples = {
    "text": {"prompt": "Hello!", "return_token_strs": True},
    "conversation": {"messages": _QUESTION},
}

DETOKENIZE: Examples = {"tokens": {"tokens": [19556, 17]}}
