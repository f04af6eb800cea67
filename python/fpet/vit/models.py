"""timm's vision transformers with a forward that merges tokens on the way through the blocks.

Each class below takes over from the timm class it derives from on an existing model. Token sizes, matches and tables of
positions are local variables of one forward: nothing is left behind on a module, so gradient checkpointing recomputes the same
values, two threads may share a model, and no call sees what an earlier one did.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from timm.layers import AttentionPoolLatent
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from fpet_kernels import Split

from ..layers.swapping import ClassSwap, Foreign
from .config import MergeConfig
from .merging import MergeStep, SizeBias, kept_positions, merge_splits, pool_by_size, unmerge

__all__ = ["TIMM_MODELS", "Encoded", "MergedFeatures", "MergingModel", "merged_features"]


class MergedFeatures(NamedTuple):
    """What :func:`merged_features` returns.

    Attributes:
        tokens: (B, M, D), the last block's output after the model's final norm: prefix tokens, then merged patches.
        size: (B, M, 1) how many of the original tokens each one stands for; ones where nothing is merged.
        source: (B, N) int64: for every original token, prefix tokens first, the index in ``tokens`` that stands for it.
    """

    tokens: Tensor
    size: Tensor
    source: Tensor


class _Embedded(NamedTuple):
    """Tokens (B, N, D) on their way into the blocks, the patch grid, and per block what else it is called with."""

    x: Tensor
    grid: tuple[int, int]
    rope: Callable[[int], Tensor] | None = None
    rel_pos: tuple[str, Tensor | None] | None = None


class Encoded(NamedTuple):
    """Output of the blocks: (B, M, D), its sizes (None where nothing is merged) and how to undo the merging."""

    x: Tensor
    size: Tensor | None
    splits: tuple[Split, ...]
    matches: list[Tensor]
    num_prefix_tokens: int
    intermediates: list[Tensor]

    def unmerge(self, x: Tensor) -> Tensor:
        """(B, N, ...) from (B, M, ...)."""
        return unmerge(x, self.splits, self.matches, self.num_prefix_tokens)


class MergingModel(Foreign):
    """The loop over the blocks, and what becomes of merged tokens after it."""

    fpet_config: MergeConfig

    def _embed(self, images: Tensor) -> _Embedded:
        """timm's own steps up to the first block."""
        raise NotImplementedError

    def _patches(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Embedded patches and their grid, which with dynamic_img_size is the image's."""
        x = self.patch_embed(images)
        if x.dim() == 4:  # NHWC where the image size is dynamic
            return x, (x.shape[1], x.shape[2])
        return x, self.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))

    def _encode(
        self, images: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, *,
        take: tuple[int, ...] | list[int] = (), normed: bool = False, depth: int | None = None,
    ) -> Encoded:  # fmt: skip
        """Runs the blocks; those in ``take`` leave their output, normed and unmerged, in ``intermediates``."""
        config, blocks = self.fpet_config, list(self.blocks)[:depth]
        embedded = self._embed(images)
        x, (height, width) = embedded.x, (int(embedded.grid[0]), int(embedded.grid[1]))
        prefix = x.shape[1] - height * width
        merging = [i for i in config.layers if i < len(blocks)]
        splits = merge_splits(height, width, len(merging))

        size: Tensor | None = None
        matches: list[Tensor] = []
        intermediates: list[Tensor] = []
        sizes = kept = patches = mask = None
        for i, block in enumerate(blocks):
            attention: dict[str, Any] = {}
            if self._masks:
                attention = {"attn_mask": attn_mask if mask is None else mask, "is_causal": is_causal}
            if embedded.rope is not None:
                rope = embedded.rope(i)
                attention["rope"] = rope if patches is None else rope.index_select(-2, patches)
            if embedded.rel_pos is not None:
                attention[embedded.rel_pos[0]] = embedded.rel_pos[1]
            split = splits[len(matches)] if i in merging else None
            out = self._call(block, x, attention, sizes, kept, split, size)
            if split is None:
                x = out
            else:
                x, size, match = out
                matches.append(match)
                kept = kept_positions(height, width, len(matches), prefix, x.device)
                patches = kept_positions(height, width, len(matches), 0, x.device)
                if config.proportional_attention is not None:
                    sizes = SizeBias(size.squeeze(-1).log(), config.proportional_attention)
                if attn_mask is not None:
                    mask = _select(attn_mask, kept)
            if i in take:
                intermediates.append(unmerge(self.norm(x) if normed else x, splits, matches, prefix))
        return Encoded(x, size, splits, matches, prefix, intermediates)

    def _call(
        self, block: nn.Module, x: Tensor, attention: dict[str, Any], sizes: SizeBias | None, kept: Tensor | None,
        split: Split | None, size: Tensor | None,
    ) -> Any:  # fmt: skip
        """One block, under gradient checkpointing where the model asks for it."""
        config = self.fpet_config

        def run(x: Tensor, log_size: Tensor | None, size: Tensor | None) -> Any:
            step = None if split is None else MergeStep(split, size, config.similarity, config.backend)
            bias = None if sizes is None or log_size is None else SizeBias(log_size, sizes.form)
            return block(x, **attention, sizes=bias, kept=kept, merge=step)

        log_size = None if sizes is None else sizes.log_size
        if self.grad_checkpointing:
            # Whatever needs a gradient is an argument, so that re-entrant checkpointing sees it.
            return checkpoint(run, x, log_size, size)
        return run(x, log_size, size)

    def _classify(self, encoded: Encoded) -> Any:
        """timm's head on merged tokens, each counted as often as it stands for an original one."""
        x, size, pool = self.norm(encoded.x), encoded.size, self.global_pool
        attn_pool = getattr(self, "attn_pool", None)
        if size is None or (pool == "token" and attn_pool is None):
            return self.forward_head(x)
        first = 0 if getattr(self, "pool_include_prefix", False) else encoded.num_prefix_tokens
        if isinstance(attn_pool, AttentionPoolLatent) and attn_pool.pos_embed is None:
            if isinstance(self, Eva):  # which pools its prefix tokens too
                first = 0
            log_size = size[:, first:, 0].log()[:, None, None, :]
            x = attn_pool(x[:, first:], attn_mask=log_size.to(x.dtype))
        elif attn_pool is None and pool in ("avg", "max", "avgmax"):
            x = pool_by_size(x[:, first:], size[:, first:], pool)
        else:  # a head that looks at every token gets every token
            return self.forward_head(encoded.unmerge(x))
        return self.head(self.head_drop(self.fc_norm(x)))

    def _features(self, encoded: Encoded) -> Tensor:
        """(B, N, D) as timm's forward_features returns them: pooling over these weighs merged tokens by their size."""
        return encoded.unmerge(self.norm(encoded.x))

    def _intermediates(
        self, x: Tensor, indices: int | list[int] | None, return_prefix_tokens: bool, norm: bool, stop_early: bool,
        output_fmt: str, intermediates_only: bool, output_dict: bool = False, attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:  # fmt: skip
        """timm's forward_intermediates; every feature map is unmerged, and so has the shape it has in timm."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt: expected 'NCHW' or 'NLC', got {output_fmt!r}")
        take, last = feature_take_indices(len(self.blocks), indices)
        depth = last + 1 if stop_early else None
        encoded = self._encode(x, attn_mask, is_causal, take=list(take), normed=norm, depth=depth)
        p = encoded.num_prefix_tokens
        prefixes, maps = [y[:, :p] for y in encoded.intermediates], [y[:, p:] for y in encoded.intermediates]
        if output_fmt == "NCHW":
            height, width = self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
            maps = [y.reshape(y.shape[0], height, width, -1).permute(0, 3, 1, 2).contiguous() for y in maps]
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": maps}
            if return_prefix_tokens and p:
                result["image_intermediates_prefix"] = prefixes
            if not intermediates_only:
                result["image_features"] = self._features(encoded)
            return result
        found: list[Any] = list(zip(maps, prefixes, strict=True)) if return_prefix_tokens and p else maps
        return found if intermediates_only else (self._features(encoded), found)


class _MaskedModel(MergingModel):
    """Models whose methods take an attention mask, (…, N, N) over the tokens as they come into the first block.

    After a merge a token keeps the row and the column of the destination it was merged into.
    """

    _masks = True

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return self._features(self._encode(x, attn_mask, is_causal))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Any:
        return self._classify(self._encode(x, attn_mask, is_causal))


class _PlainModel(MergingModel):
    _masks = False

    def forward_features(self, x: Tensor) -> Tensor:
        return self._features(self._encode(x))

    def forward(self, x: Tensor) -> Any:
        return self._classify(self._encode(x))

    def forward_intermediates(
        self, x: Tensor, indices: int | list[int] | None = None, return_prefix_tokens: bool = False, norm: bool = False,
        stop_early: bool = False, output_fmt: str = "NCHW", intermediates_only: bool = False,
    ) -> Any:  # fmt: skip
        return self._intermediates(x, indices, return_prefix_tokens, norm, stop_early, output_fmt, intermediates_only)


class FPETVisionTransformer(_MaskedModel, VisionTransformer):
    """timm's VisionTransformer."""

    def _embed(self, images: Tensor) -> _Embedded:
        x, grid = self._patches(images)
        return _Embedded(self.norm_pre(self.patch_drop(self._pos_embed(x))), grid)

    def forward_intermediates(
        self, x: Tensor, indices: int | list[int] | None = None, return_prefix_tokens: bool = False, norm: bool = False,
        stop_early: bool = False, output_fmt: str = "NCHW", intermediates_only: bool = False, output_dict: bool = False,
        attn_mask: Tensor | None = None, is_causal: bool = False,
    ) -> Any:  # fmt: skip
        return self._intermediates(
            x, indices, return_prefix_tokens, norm, stop_early, output_fmt, intermediates_only, output_dict, attn_mask,
            is_causal,
        )  # fmt: skip


class FPETVisionTransformerDistilled(FPETVisionTransformer, VisionTransformerDistilled):
    """timm's VisionTransformerDistilled: class and distillation token are both prefix tokens."""

    def _classify(self, encoded: Encoded) -> Any:
        return self.forward_head(self.norm(encoded.x))  # reads the two prefix tokens


class FPETEva(_MaskedModel, Eva):
    """timm's Eva: EVA, EVA02, DINOv3, PE and the other rotary models. The rotary table keeps the rows of what is left."""

    def _embed(self, images: Tensor) -> _Embedded:
        x, grid = self._patches(images)
        x, table = self._pos_embed(x)
        if table is None:
            rope = None
        elif getattr(self, "rope_mixed", False):  # a table per block

            def rope(i: int) -> Tensor:
                return table[i]
        else:

            def rope(i: int) -> Tensor:
                return table

        return _Embedded(self.norm_pre(x), grid, rope=rope)

    def forward_intermediates(
        self, x: Tensor, indices: int | list[int] | None = None, return_prefix_tokens: bool = False, norm: bool = False,
        stop_early: bool = False, output_fmt: str = "NCHW", intermediates_only: bool = False,
        attn_mask: Tensor | None = None, is_causal: bool = False,
    ) -> Any:  # fmt: skip
        return self._intermediates(
            x, indices, return_prefix_tokens, norm, stop_early, output_fmt, intermediates_only, False, attn_mask, is_causal
        )


class FPETBeit(_PlainModel, Beit):
    """timm's Beit: relative position biases keep the rows and columns of what is left."""

    def _embed(self, images: Tensor) -> _Embedded:
        x, grid = self._patches(images)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        shared = None if self.rel_pos_bias is None else self.rel_pos_bias()
        return _Embedded(self.pos_drop(x), grid, rel_pos=("shared_rel_pos_bias", shared))


class FPETVisionTransformerRelPos(_PlainModel, VisionTransformerRelPos):
    """timm's VisionTransformerRelPos: relative position biases keep the rows and columns of what is left."""

    def _embed(self, images: Tensor) -> _Embedded:
        x, grid = self._patches(images)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        shared = None if self.shared_rel_pos is None else self.shared_rel_pos.get_bias()
        return _Embedded(x, grid, rel_pos=("shared_rel_pos", shared))


TIMM_MODELS = ClassSwap(FPETVisionTransformer, FPETVisionTransformerDistilled, FPETEva, FPETBeit, FPETVisionTransformerRelPos)
"""timm's models and the classes that take over."""


def _select(attn_mask: Tensor, kept: Tensor) -> Tensor:
    """Rows and columns of the tokens that are left; a dimension of 1 is broadcast, and stays."""
    for dim in (-2, -1):
        if attn_mask.dim() >= -dim and attn_mask.shape[dim] != 1:
            attn_mask = attn_mask.index_select(dim, kept)
    return attn_mask


def merged_features(model: nn.Module, images: Tensor) -> MergedFeatures:
    """Runs a patched model up to its final norm and returns the tokens that are left, with what each stands for.

    Args:
        model: what :func:`fpet.apply` returned, or a wrapper of it.
        images: (B, C, H, W).

    Raises:
        TypeError: the model is not patched.
    """
    inner = next((m for m in model.modules() if isinstance(m, MergingModel)), None)
    if inner is None:
        raise TypeError(f"model: expected a model patched by fpet.apply, got {type(model).__name__}")
    encoded = inner._encode(images)
    tokens = inner.norm(encoded.x)
    batch, left = tokens.shape[:2]
    size = tokens.new_ones(batch, left, 1, dtype=torch.float32) if encoded.size is None else encoded.size
    # Unmerging the indices themselves, as float64 so that every one of them is exact.
    index = torch.arange(left, device=tokens.device, dtype=torch.float64)[None, :, None].expand(batch, -1, 1)
    return MergedFeatures(tokens, size, encoded.unmerge(index).squeeze(-1).long())
