"""The package's face. A name here is a promise."""

import subprocess
import sys

import logitclient

NAMES = """
APIError AsyncClient AsyncStream AuthenticationError BadRequestError Choice Chunk Client Completion DecodeError
Embedding HiddenStates HiddenStatesSpec LogitClientError Logits LogitsBatch LogitsSpec MissingDependencyError Model
NotFoundError PayloadTooLargeError Perplexity Pooling RateLimitError RequestTimeoutError Results Reward Rows
SequenceLogits ServerError ServiceUnavailableError Stream StreamError TokenLogprob Tokens TransportError Usage
decode_logits
"""


def test_exactly_these_names_are_exported() -> None:
    assert sorted(logitclient.__all__) == sorted(NAMES.split())
    assert all(hasattr(logitclient, name) for name in NAMES.split())


def test_nothing_optional_is_imported() -> None:
    code = "import sys, logitclient; sys.exit(bool({'torch', 'pyarrow', 'openai'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
