"""llama-index's OpenAILike: structured predictions, and plain chats and completions."""

from __future__ import annotations

from fruit import MAX_TOKENS, MODEL, QUESTION, Fruit, base_url, report
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.llms.openai_like import OpenAILike

common = {"model": MODEL, "api_base": base_url(), "api_key": "none", "temperature": 0, "max_retries": 0}
chat = OpenAILike(
    **common,
    max_tokens=MAX_TOKENS,
    is_chat_model=True,
    should_use_structured_outputs=True,
    context_window=8192,
)
short = OpenAILike(**common, max_tokens=4, is_chat_model=True)
completions = OpenAILike(**common, max_tokens=4)

OPENING = "The capital of France is"
prompt = PromptTemplate(QUESTION)
predicted = chat.structured_predict(Fruit, prompt)
*_, streamed = chat.stream_structured_predict(Fruit, prompt)
as_llm = chat.as_structured_llm(Fruit).complete(QUESTION).raw
message = [ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content=QUESTION)]

report(
    {
        "fruits": [predicted.model_dump(), streamed.model_dump(), as_llm.model_dump()],
        "texts": {
            "chat": short.chat(message).message.content,
            "chat stream": [part.message.content for part in short.stream_chat(message)][-1],
            "completion": completions.complete(OPENING).text,
            "completion stream": [part.text for part in completions.stream_complete(OPENING)][-1],
        },
    }
)
