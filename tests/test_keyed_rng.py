import itertools
import subprocess
import sys

import numpy as np

from sslmed.keyed_rng import key, rng


def test_a_stream_is_the_same_in_every_process() -> None:
    code = "from sslmed.keyed_rng import rng; print(rng(3, 1, 7, 'view0').integers(2**63, size=4).tolist())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == str(rng(3, 1, 7, "view0").integers(2**63, size=4).tolist())


def test_streams_never_change_between_versions() -> None:
    """A published run can be repeated only while these numbers stand."""
    assert key(0) == (15360738500304110091, 4119532726668073745)
    assert key(0, "backbone") == (8071638420575258943, 9694244623951951770)
    assert rng(0, 1, 2, "view0").integers(1000, size=5).tolist() == [390, 15, 163, 875, 565]


def test_neighbouring_keys_give_unrelated_streams() -> None:
    drawn = {
        parts: rng(*parts).standard_normal(256)
        for parts in itertools.product((0, 1), (0, 1, 2), (0, 1, 2, 3), ("view0", "view1", "order"))
    }
    assert len({values.tobytes() for values in drawn.values()}) == len(drawn) == 72
    correlation = np.corrcoef(np.stack(list(drawn.values())))
    # 2556 pairs of 256 draws: the largest of their correlations is below 5.5 / sqrt(256) unless streams overlap
    assert np.abs(correlation[~np.eye(len(drawn), dtype=bool)]).max() < 5.5 / 16


def test_every_part_and_the_order_of_parts_count() -> None:
    keys = [
        key(1, 2, 3),
        key(1, 3, 2),
        key(2, 1, 3),
        key(1, 23),
        key(12, 3),
        key(1, "2", 3),
        key(1, 2),
        key(1, 2, 3, 0),
    ]
    assert len(set(keys)) == len(keys)
    assert key(1, 2, "a") == key(1, 2, "a")
    assert all(0 <= word < 2**64 for word in key(2**62, "x"))


def test_numpy_integers_are_integers() -> None:
    ordinary = rng(0, 3, 4, "view0").random(3)
    np.testing.assert_array_equal(rng(0, np.int32(3), np.uint8(4), "view0").random(3), ordinary)  # type: ignore[arg-type]
