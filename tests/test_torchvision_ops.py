"""In processes of their own: operators can be declared only once in each."""

import json
import subprocess
import sys
from typing import Any

BROKEN_OR_WHOLE = """
import json
report = {}
try:
    import torchvision
    report["works_by_itself"] = True
except RuntimeError as error:
    report["works_by_itself"], report["error"] = False, str(error)
from sslmed import torchvision_ops
torchvision_ops.mend()
torchvision_ops.mend()
report["declared"] = len(torchvision_ops._declared)
import lightly.loss, pytorch_lightning, timm, torchmetrics, torchvision.ops, torchvision.transforms.v2
print(json.dumps(report))
"""

# The index's wheel of torchvision may or may not fit the installed torch; a compiled library that loads is played here.
COMPILED = """
import json
import torch
kept, loaded = [], []
def load_library(path):
    loaded.append(path)
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl("nms", lambda dets, scores, iou_threshold: torch.arange(3), "CPU")
    kept.append(library)
torch.ops.load_library = load_library
from sslmed import torchvision_ops
torchvision_ops.mend()
first = len(loaded)
torchvision_ops.mend()
answer = torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5).tolist()
print(json.dumps({"loaded": loaded, "first": first, "declared": len(torchvision_ops._declared), "answer": answer}))
"""


def run(script: str) -> Any:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_what_needs_torchvision_imports() -> None:
    report = run(BROKEN_OR_WHOLE)
    if report["works_by_itself"]:
        assert report["declared"] == 0
    else:
        assert "torchvision::nms does not exist" in report["error"]
        assert report["declared"] == 1


def test_a_compiled_library_that_loads_stays_untouched() -> None:
    report = run(COMPILED)
    assert report["first"] == len(report["loaded"]) == 1
    assert "torchvision" in report["loaded"][0]
    assert report["declared"] == 0
    assert report["answer"] == [0, 1, 2]
