"""A training for tests of what a method says and refuses before it begins."""

from typing import Any

from sslmed.methods.method import Course


def course(batch_size: int = 64, **others: Any) -> Course:
    """A hundred epochs of ten steps on square images of 96 pixels, one process."""
    settings: dict[str, Any] = {"shape": (1, 96, 96), "total": 1000, "steps_per_epoch": 10}
    return Course(batch_size=batch_size, **settings | others)
