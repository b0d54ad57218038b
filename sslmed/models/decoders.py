"""Small transformers that turn tokens back into what was hidden."""

from functools import partial
from typing import Any

import torch
from torch import nn

from sslmed.config import UsageError
from sslmed.models.backbones import Block
from sslmed.models.recomputation import called, recomputed

EPSILON = 1e-6  # of LayerNorm, as in MAE's reference


class MAEDecoder(nn.Module):
    """Visible tokens to the pixels of all patches (MAE, arXiv 2111.06377, section 3, "MAE decoder").

    Tensor names and shapes are the reference's, so that its weights can be loaded.

    Args:
        encoder_width: of the tokens that come in.
        grid: rows and columns of patches.
        prefix: class and register tokens before the patches; they pass through, without a position.
        values: that one patch has.
        width: of the decoder; a multiple of 4 and of ``heads``.
    """

    def __init__(
        self, encoder_width: int, grid: tuple[int, int], prefix: int, values: int, width: int, depth: int, heads: int
    ) -> None:
        super().__init__()
        self.prefix = prefix
        self.decoder_embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        positions = nn.functional.pad(sine_cosine_positions(width, grid), (0, 0, prefix, 0))
        self.decoder_pos_embed: torch.Tensor
        self.register_buffer("decoder_pos_embed", positions[None].to(torch.get_default_dtype()))
        norm: Any = partial(nn.LayerNorm, eps=EPSILON)
        self.decoder_blocks = nn.ModuleList(
            [Block(width, heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=norm) for _ in range(depth)]
        )
        self.decoder_norm = norm(width)
        self.decoder_pred = nn.Linear(width, values)
        xavier(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: torch.Tensor, keep_ids: torch.Tensor, checkpoints: bool = False) -> torch.Tensor:
        """Values (N, L, values) of all patches, from the prefix and visible tokens (N, prefix + K, encoder_width).

        Args:
            tokens: those of the encoder.
            keep_ids: (N, K), where the visible ones were.
            checkpoints: compute the inside of blocks once more in the backward pass, to save memory.
        """
        embedded = self.decoder_embed(tokens)
        prefix, visible = embedded[:, : self.prefix], embedded[:, self.prefix :]
        places = self.decoder_pos_embed.shape[1] - self.prefix
        everywhere = self.mask_token.to(embedded.dtype).expand(len(tokens), places, -1)
        patches = everywhere.scatter(1, keep_ids[..., None].expand_as(visible), visible)
        decoded = torch.cat([prefix, patches], dim=1) + self.decoder_pos_embed
        run = recomputed if checkpoints else called
        for block in self.decoder_blocks:
            decoded = run(block, decoded)
        pixels: torch.Tensor = self.decoder_pred(self.decoder_norm(decoded))
        return pixels[:, self.prefix :]


def sine_cosine_positions(width: int, grid: tuple[int, int]) -> torch.Tensor:
    """Fixed positions (L, width) in float64, row by row.

    The first half of the channels tells the column, the second the row. Each half is sin(m w_k) for all k, then
    cos(m w_k), with w_k = 10000^(-k / (width / 4)): arXiv 1706.03762, section 3.5, once for each axis. The order of the
    axes is that of MAE's reference.

    Raises:
        UsageError: the width is not a multiple of 4.
    """
    if width % 4:
        raise UsageError(f"tokens are {width} wide; sine-cosine positions need a multiple of 4")
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))

    def axis(places: torch.Tensor) -> torch.Tensor:
        angles = places.flatten()[:, None].double() * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    return torch.cat([axis(columns), axis(rows)], dim=1)


def xavier(module: nn.Module) -> None:
    """MAE's initial weights: linear layers xavier-uniform (fused q, k, v as one), biases 0, LayerNorm 1 and 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
        elif isinstance(layer, nn.LayerNorm) and layer.elementwise_affine:
            nn.init.ones_(layer.weight)
        if isinstance(layer, nn.Linear | nn.LayerNorm) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
