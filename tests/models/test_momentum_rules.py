"""What the momentum becomes at another batch size, and what is said of it."""

import pytest

from sslmed.models.momentum_rules import momentum_at, momentum_notes


def test_the_memory_is_one_of_samples_or_of_steps() -> None:
    assert momentum_at(256, 0.99, "scaled") == 0.99
    assert momentum_at(512, 0.99, "scaled") == pytest.approx(0.99**2)
    assert momentum_at(64, 0.99, "scaled") == pytest.approx(0.99**0.25)
    assert momentum_at(64, 0.99, "constant") == 0.99


def test_a_changed_momentum_is_said() -> None:
    (note,) = momentum_notes(64, 0.99, "scaled")
    assert "method.momentum 0.99 is quoted for batch 256; at batch 64 it is 0.997491" in note
    assert not momentum_notes(256, 0.99, "scaled")
    assert not momentum_notes(64, 0.99, "constant")
