"""Figures of a loss: compared with sums by hand, at the limits of a float, and without bytes."""

from __future__ import annotations

import math

import pytest
from conftest import refused

from gpt2c.evaluate.figures import figures, written


def test_figures_by_hand() -> None:
    # 4 tokens of 3 bits each, of 6 bytes in all
    found = figures(12 * math.log(2), tokens=4, size=6)
    assert found == pytest.approx((3 * math.log(2), 8, 3, 2))
    assert found._fields == ("loss", "perplexity", "bits_per_token", "bits_per_byte")


def test_perplexity_that_no_float_holds_is_infinite() -> None:
    loss = 709.78  # exp overflows above 709.7827...
    assert figures(3 * loss, 3, 3).perplexity == pytest.approx(math.exp(loss))
    for loss in (709.79, 15262.697, 1e300):
        found = figures(loss, 1, 2)
        assert found[:2] == (loss, math.inf)
        assert found[2:] == pytest.approx((loss / math.log(2), loss / math.log(2) / 2))


def test_certain_text_has_loss_zero() -> None:
    found = figures(-0.0, 3, 3)
    assert found == (0, 1, 0, 0)
    assert f"{found.loss:.4f} {found.bits_per_byte:.4f}" == "0.0000 0.0000"


def test_tokens_without_bytes_have_a_loss() -> None:
    *known, bits_per_byte = figures(2 * math.log(5), 2, 0)
    assert known == pytest.approx([math.log(5), 5, math.log2(5)])
    assert math.isnan(bits_per_byte)


def test_bad_loss_is_refused() -> None:
    for wrong in (math.nan, math.inf, -math.inf):
        assert refused(figures, wrong, 3).startswith(f"the loss is {wrong}: the model's weights")
    assert "no token was scored" in refused(figures, 0.0, 0)


@pytest.mark.parametrize(
    ("value", "arguments", "expected"),
    [
        (3.14159, (), "3.1416"),
        (0.0, (), "0.0000"),
        (9999.5, (), "9999.5000"),
        (1e4, (), "1.0000e+04"),
        (1234567890.123, (), "1.2346e+09"),
        (-1234567890.123, (), "-1.2346e+09"),
        (50257.125, (2, 1e9), "50257.12"),
        (1e300, (2, 1e9), "1.00e+300"),
        (math.inf, (), "inf"),
        (math.nan, (), "nan"),
    ],
)
def test_large_figures_are_short(value: float, arguments: tuple[float, ...], expected: str) -> None:
    assert written(value, *arguments) == expected  # type: ignore[arg-type]
