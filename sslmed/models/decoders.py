"""Small transformers that turn tokens back into what was hidden."""

import math
from functools import partial
from typing import Any

import torch
from torch import nn

from sslmed.config import UsageError
from sslmed.models.backbones import Block
from sslmed.models.masking import take_tokens
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


class JEPAPredictor(nn.Module):
    """Tokens of a context to the tokens of blocks elsewhere in the image (I-JEPA, arXiv 2301.08243, section 3).

    Tensor names and shapes are the reference's.

    Args:
        encoder_width: of the tokens that come in and go out.
        grid: rows and columns of patches.
        width: of the predictor; a multiple of 4 and of ``heads``.
    """

    def __init__(self, encoder_width: int, grid: tuple[int, int], width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.predictor_embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        positions = sine_cosine_positions(width, grid)[None].to(torch.get_default_dtype())
        self.predictor_pos_embed: torch.Tensor
        self.register_buffer("predictor_pos_embed", positions)
        norm: Any = partial(nn.LayerNorm, eps=EPSILON)
        self.predictor_blocks = nn.ModuleList(
            [Block(width, heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=norm) for _ in range(depth)]
        )
        self.predictor_norm = norm(width)
        self.predictor_proj = nn.Linear(width, encoder_width)
        truncated(self, self.predictor_blocks)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(
        self, context: torch.Tensor, context_ids: torch.Tensor, target_ids: torch.Tensor, checkpoints: bool = False
    ) -> torch.Tensor:
        """Tokens (N, B, T, encoder_width) of B blocks of T patches, each block predicted by itself.

        Args:
            context: tokens (N, K, encoder_width) of patches that were seen.
            context_ids: where those were, (N, K).
            target_ids: where those of the blocks are, (N, B, T).
            checkpoints: compute the inside of blocks once more in the backward pass, to save memory.
        """
        count, blocks, _ = target_ids.shape
        positions = self.predictor_pos_embed.expand(count, -1, -1)
        seen = self.predictor_embed(context) + take_tokens(positions, context_ids)
        asked = self.mask_token + take_tokens(positions, target_ids.flatten(1))
        asked = asked.unflatten(1, (blocks, -1)).flatten(0, 1)
        tokens = torch.cat([seen.repeat_interleave(blocks, dim=0), asked.to(seen.dtype)], dim=1)
        run = recomputed if checkpoints else called
        for block in self.predictor_blocks:
            tokens = run(block, tokens)
        found = self.predictor_proj(self.predictor_norm(tokens[:, seen.shape[1] :]))
        apart: torch.Tensor = found.unflatten(0, (count, blocks))
        return apart


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


def truncated(module: nn.Module, blocks: nn.ModuleList | nn.Sequential) -> None:
    """I-JEPA's initial weights: normal of deviation 0.02, biases 0, LayerNorm 1 and 0.

    The patch embedding is drawn from 1 / sqrt(values of a patch), so that tokens of standardised pixels vary by about
    1, a little more than their positions: the reference's 0.02, half as much for its patches of 14 x 14 x 3, lets small
    grey patches drown in them, so that features tell places alone. The last layers of attention and MLP of
    block number n, from 1, are divided by sqrt(2 n), so that the sum over blocks does not grow (ijepa,
    src/models/vision_transformer.py).
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
        elif isinstance(layer, nn.Conv2d):
            nn.init.trunc_normal_(layer.weight, std=1 / math.sqrt(layer.weight[0].numel()))
        elif isinstance(layer, nn.LayerNorm) and layer.elementwise_affine:
            nn.init.ones_(layer.weight)
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.LayerNorm) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
    with torch.no_grad():
        for number, block in enumerate(blocks, 1):
            for last in ("attn.proj", "mlp.fc2"):
                block.get_submodule(last).get_parameter("weight").div_(math.sqrt(2 * number))
