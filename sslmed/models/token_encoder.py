"""A vision transformer opened for masked prediction: hidden patches enter no block."""

from typing import Any, cast

import torch

from sslmed.config import UsageError
from sslmed.models.backbones import Backbone, Eva, PatchEmbed, VisionTransformer, in_timm
from sslmed.models.masking import take_tokens
from sslmed.models.recomputation import called, recomputed


class TokenEncoder:
    """A backbone's vision transformer, opened between patch embedding and blocks: hidden patches enter no block.

    It takes timm's VisionTransformer and Eva classes, with class and register tokens, absolute and rotary positions. It
    has no weights of its own.

    Attributes:
        grid: rows and columns of patches.
        patch: height and width of a patch, pixels.
        width: of a token.
        prefix: tokens before the patches, which are the class token and registers.
    """

    def __init__(self, backbone: Backbone, method: str) -> None:
        """``method`` is who asks, for the error.

        Raises:
            UsageError: the network is no such transformer, or one patch's token knows of another patch's pixels.
        """
        self.network = cast(Any, backbone.network)
        wrong = _not_openable(self.network)
        if wrong:
            raise UsageError(
                f"{method} needs a vision transformer, such as vit_tiny_patch16_224; {in_timm(self.network)} {wrong}"
            )
        self.grid: tuple[int, int] = self.network.patch_embed.grid_size
        self.patch: tuple[int, int] = self.network.patch_embed.patch_size
        self.width: int = self.network.embed_dim
        self.prefix: int = self.network.num_prefix_tokens

    @property
    def checkpoints(self) -> bool:
        """Whether the backbone was told to checkpoint gradients. Its blocks do so here too."""
        return bool(self.network.grad_checkpointing)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Patches without positions: (N, L, width), or (N, rows, columns, width) of a network with dynamic size."""
        patches: torch.Tensor = self.network.patch_embed(images)
        return patches

    def cover(self, patches: torch.Tensor, hidden: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """What ``embed`` gave, with ``token`` (width,) in place of every hidden patch, which keeps its position.

        Args:
            hidden: (N, L), true where a patch is hidden.
        """
        return torch.where(hidden.view(*patches.shape[:-1], 1), token.to(patches.dtype), patches)

    def encode(self, patches: torch.Tensor, keep_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Normalised tokens (N, prefix + K, width) of what ``embed`` gave.

        Args:
            keep_ids: positions of the K patches that enter, (N, K); by default all in order.
        """
        tokens = self.network._pos_embed(patches)
        tokens, rotary = tokens if isinstance(tokens, tuple) else (tokens, None)
        if keep_ids is not None:
            visible = take_tokens(tokens[:, self.prefix :], keep_ids)
            tokens = torch.cat([tokens[:, : self.prefix], visible], dim=1)
            rotary = _rotary_of(rotary, keep_ids)
        tokens = self.network.norm_pre(tokens)
        run = recomputed if self.checkpoints else called
        for number, block in enumerate(self.network.blocks):
            if rotary is None:
                tokens = run(block, tokens)
            else:
                tokens = run(block, tokens, rope=rotary[number] if self.network.rope_mixed else rotary)
        # where timm averages tokens, its last norm comes after the mean, and norm does nothing
        normalised: torch.Tensor = self.network.fc_norm(self.network.norm(tokens))
        return normalised

    def has_positions(self, positions: torch.Tensor) -> bool:
        """Whether the patches have these positions (L, width), and the prefix zeros."""
        table = self.network.pos_embed
        if table is None:
            return False
        expected = torch.zeros_like(table)
        expected[0, -len(positions) :] = positions
        return torch.allclose(table, expected, atol=1e-6)

    def fix_positions(self, positions: torch.Tensor) -> None:
        """Give the patches these positions (L, width), the prefix zeros, and stop training them.

        A network with rotary positions alone stays as it is.
        """
        if self.network.pos_embed is None:
            return
        with torch.no_grad():
            self.network.pos_embed.zero_()
            self.network.pos_embed[0, -len(positions) :] = positions
        self.network.pos_embed.requires_grad_(False)


def _not_openable(network: Any) -> str | None:
    if not isinstance(network, VisionTransformer | Eva):
        return f"is none ({type(network).__name__}); allowed: timm's classes VisionTransformer and Eva"
    if not isinstance(network.patch_embed, PatchEmbed):
        stem = type(network.patch_embed).__name__
        return f"mixes patches before its blocks ({stem}), so that what is hidden would leak"
    if getattr(network, "attn_pool", None) is not None:
        return "pools by attention, which would stay untrained; set backbone.pool=avg"
    return None


def _rotary_of(rotary: torch.Tensor | None, keep_ids: torch.Tensor) -> torch.Tensor | None:
    """Of chosen patches: (L, E) becomes (N, 1, K, E), and (blocks, heads, L, E) becomes (blocks, N, heads, K, E)."""
    if rotary is None:
        return None
    chosen = rotary[..., keep_ids, :]
    return chosen[:, None] if rotary.ndim == 2 else chosen.transpose(1, 2)
