"""GPT-2's own tokenizer, for tests that need its vocabulary."""

import pytest

from gpt2c.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def gpt2():
    try:
        return Tokenizer.from_name("gpt2")
    except OSError as error:
        pytest.skip(f"GPT-2's vocabulary is not reachable: {error}")
