"""The yardstick: SimCLR as a plain PyTorch loop with albumentations and lightly's NT-Xent, nothing of sslmed but the
store.

Its settings were fixed before sslmed's recipe existed: resnet18 at 96 pixels, batch 128, AdamW 1e-3 with a warm-up
cosine, temperature 0.2, crops from 0.3 of the area, rotation, brightness, contrast, gamma, blur.
"""

import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sslmed import torchvision_ops
from sslmed.data.store import Store

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
torchvision_ops.mend()

SIZE, BATCH, LR, TEMPERATURE = 96, 128, 1e-3, 0.2


def pretrain(store: Store, epochs: int, seed: int, out: Path) -> dict[str, Any]:
    """Train, write the backbone's state dict to ``out``; returns steps, last loss and the loop's CPU seconds."""
    import albumentations as A
    import timm
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    backbone = timm.create_model("resnet18", in_chans=1, num_classes=0)
    head = SimCLRProjectionHead(512, 2048, 128)
    model = nn.Sequential(backbone, head)
    criterion = NTXentLoss(temperature=TEMPERATURE)
    images = [store.pixels(int(row)) for row in store.rows("train", "unlabelled")]
    augment = A.Compose(
        [
            A.RandomResizedCrop((SIZE, SIZE), scale=(0.3, 1.0)),
            A.Rotate(15, p=1),
            A.RandomBrightnessContrast(0.2, 0.2, p=0.8),
            A.RandomGamma((70, 140), p=0.5),
            A.GaussianBlur((3, 5), p=0.3),
        ],
        seed=seed,
    )
    steps = epochs * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=1e-4)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    cpu, loss = time.process_time(), torch.zeros(())
    for epoch in range(epochs):
        order = random.permutation(len(images))
        for start in range(0, len(images) - BATCH + 1, BATCH):
            chosen = [images[index] for index in order[start : start + BATCH]]
            views = [torch.from_numpy(np.stack([augment(image=image)["image"] for image in chosen])) for _ in range(2)]
            both = torch.cat(views)[:, None].float().div(255).sub(0.5).div(0.25)
            first, second = model(both).chunk(2)
            loss = criterion(first, second)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(
            f"plain loop: epoch {epoch + 1}/{epochs}, loss {loss.item():.3f}, CPU {time.process_time() - cpu:.0f} s",
            flush=True,
        )
    torch.save(backbone.state_dict(), out)
    return {"steps": steps, "loss": round(loss.item(), 4), "cpu_seconds": round(time.process_time() - cpu, 1)}
