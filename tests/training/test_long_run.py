"""A long pretraining takes no more memory than a short one, and leaves no file open."""

import os
from pathlib import Path

import numpy as np
import pytest

from sslmed.commands.pretrain import pretrain
from sslmed.data.loading import PREFETCH
from sslmed.data.store import Store
from sslmed.run import Run

STEPS, WARM = 2000, 500  # caches, the embeddings that rankme looks at and malloc's own areas fill up before
MOST = 1.0  # MB a thousand steps
TENSORS = 5  # of a batch: two views, target, ids, groups


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("workers", [0, 2])
def test_memory_and_open_files_stay_as_they_are(
    workers: int, phantom_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of this process; each line of metrics is a look at it. Checkpoints come between the lines."""
    looks: list[tuple[int, float, int]] = []
    log = Run.log

    def looked_at(self: Run, step: int, **values: float | int | str | None) -> None:
        looks.append((step, resident(), sum(1 for _ in Path("/proc/self/fd").iterdir())))
        log(self, step, **values)

    monkeypatch.setattr(Run, "log", looked_at)
    settings = ("backbone.name=test_resnet", "data.size=32", f"data.workers={workers}", "monitor.knn_every=0")
    length = (f"train.max_steps={STEPS}", "train.batch_size=8", "train.save_every_steps=200", "monitor.log_every=10")
    overrides = (*settings, *length, "train.precision=32", "monitor.collapse=off")
    pretrain("xray/simclr_resnet18", phantom_store.path, tmp_path / "run", overrides=overrides)
    steps, megabytes, files = np.array(looks).T
    late = steps >= WARM
    assert late.sum() == (STEPS - WARM) // 10 + 1
    slope = np.polyfit(steps[late] / 1000, megabytes[late], 1)[0]
    assert slope < MOST, (
        f"{slope:.2f} MB more a thousand steps, {megabytes[late][0]:.0f} to {megabytes[late][-1]:.0f} MB"
    )
    early, later = np.array_split(files[late], 2)
    assert np.median(early) == np.median(later), f"open files: {early} and then {later}"
    on_their_way = workers * PREFETCH * TENSORS  # of batches that lie in shared memory
    assert np.ptp(files[late]) <= on_their_way, f"open files: {sorted(set(files[late]))}"


def resident() -> float:
    """MB of this process that lie in memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
