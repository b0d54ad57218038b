"""What contrastive methods do on one process or, called by each of two ranks, on two."""

from typing import Any

import torch


def batches(count: int, rows: int = 8) -> list[Any]:
    """Batches of images of four patients, ids drawn from more."""
    from sslmed.data.loading import Batch

    found = []
    for number in range(count):
        views = list(torch.randn(2, rows, 1, 32, 32, generator=torch.Generator().manual_seed(number)).double())
        ids = torch.arange(rows) + rows * number
        found.append(Batch(views=views, target=ids, ids=ids, groups=ids % 4, seed=3, epoch=number // 2))
    return found


def moco_after(steps: int, rate: float, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """MoCo v2's whole state after some steps of SGD on this process's rows, gradients averaged as DDP does."""
    import ranks

    from sslmed import distributed
    from sslmed.methods.method import Progress
    from sslmed.methods.moco_v2 import MoCoV2, MoCoV2Config
    from sslmed.models.backbones import BackboneConfig, build

    torch.manual_seed(0)
    backbone = build(BackboneConfig(name="test_resnet"), 32, 0)
    method = MoCoV2(MoCoV2Config(**settings), backbone).double().train()
    optimizer = torch.optim.SGD(method.parameters(), lr=rate)
    for step, batch in enumerate(batches(steps)):
        whole = len(batch.ids)
        if distributed.world_size() > 1:
            batch = ranks.half(batch, distributed.rank())
        optimizer.zero_grad()
        method.loss(batch)["loss"].backward()
        for parameter in method.parameters():
            if parameter.grad is not None:
                parameter.grad.copy_(distributed.mean(parameter.grad))
        optimizer.step()
        method.after_step(Progress(step + 1, steps, 0, whole))
    own = ("running_mean", "running_var", "num_batches_tracked")  # of each process, as with the reference
    return {name: value for name, value in method.state_dict().items() if not name.endswith(own)}
