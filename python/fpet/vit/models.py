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
from .foreign import check_forwards, of_transformers
from .merging import (
    MergeRecord,
    MergeStep,
    SizeBias,
    SymbolicGrid,
    kept_positions,
    merge_splits,
    pool_by_size,
    refuse_fx,
    select_rows_and_columns,
    token_count,
    unmerge,
)

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
    splits: tuple[Split | SymbolicGrid, ...]
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

    def _embedded(self, images: Tensor) -> _Embedded:
        """:meth:`_embed`, after which every token is known to be a prefix token or a patch of the grid."""
        refuse_fx(images)
        embedded = self._embed(images)
        return embedded._replace(grid=token_count(embedded.x, embedded.grid, self.num_prefix_tokens))

    def _encode(
        self, images: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, *,
        take: tuple[int, ...] | list[int] = (), normed: bool = False, depth: int | None = None,
    ) -> Encoded:  # fmt: skip
        """Runs the blocks; those in ``take`` leave their output, normed and unmerged, in ``intermediates``."""
        config, blocks = self.fpet_config, list(self.blocks)[:depth]
        merging = [i for i in config.layers if i < len(blocks)]
        form = config.proportional_attention
        embedded = self._embedded(images)
        x, (height, width), prefix = embedded.x, embedded.grid, self.num_prefix_tokens
        if not torch.compiler.is_compiling():
            check_forwards(blocks, merging, ("kept",) * (embedded.rel_pos is not None) + ("sizes",) * (form is not None))
        splits = merge_splits(height, width, len(merging))

        size: Tensor | None = None
        log_size: Tensor | None = None
        matches: list[Tensor] = []
        intermediates: list[Tensor] = []
        kept = patches = mask = None
        for i, block in enumerate(blocks):
            attention: dict[str, Any] = {}
            if attn_mask is not None:
                attention["attn_mask"] = attn_mask if mask is None else mask
            if is_causal:
                attention["is_causal"] = True
            if embedded.rope is not None:
                rope = embedded.rope(i)
                attention["rope"] = rope if patches is None else rope.index_select(-2, patches)
            if embedded.rel_pos is not None and embedded.rel_pos[1] is not None:
                attention[embedded.rel_pos[0]] = embedded.rel_pos[1]
            if embedded.rel_pos is not None and kept is not None:
                attention["kept"] = kept
            if i not in merging:
                x = self._call(block, x, attention, log_size, form)
            else:
                step = MergeStep(splits[len(matches)], size, config.similarity, config.backend, prefix)
                x, size, match = self._call(block, x, attention, log_size, form, step)
                matches.append(match)
                if form is not None:
                    log_size = size.squeeze(-1).log()
                if embedded.rope is not None:
                    patches = kept_positions(height, width, len(matches), 0, x.device)
                if embedded.rel_pos is not None:
                    kept = kept_positions(height, width, len(matches), prefix, x.device)
                if attn_mask is not None:
                    mask = select_rows_and_columns(attn_mask, kept_positions(height, width, len(matches), prefix, x.device))
            if i in take:
                intermediates.append(unmerge(self.norm(x) if normed else x, splits, matches, prefix))
        return Encoded(x, size, splits, matches, prefix, intermediates)

    def _call(
        self, block: nn.Module, x: Tensor, attention: dict[str, Any], log_size: Tensor | None, form: str | None,
        step: MergeStep | None = None,
    ) -> Any:  # fmt: skip
        """One block, under gradient checkpointing where the model asks for it: its tokens; with ``step`` what it merged too."""

        def run(x: Tensor, log_size: Tensor | None, size: Tensor | None) -> Any:
            given = attention if log_size is None else {**attention, "sizes": SizeBias(log_size, form or "auto")}
            if step is None:
                return block(x, **given)
            record = MergeRecord()
            x = block(x, **given, merge=step._replace(size=size), record=record)
            assert record.merged is not None
            return x, record.merged.size, record.merged.match

        size = None if step is None else step.size
        if self.grad_checkpointing:
            # Whatever needs a gradient is an argument and a result, so that re-entrant checkpointing sees it.
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

    def _merges(self) -> bool:
        """Whether anything is to be done that timm's own forward does not do."""
        return bool(self.fpet_config.layers)

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

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if not self._merges():
            return super().forward_features(x, attn_mask, is_causal)  # type: ignore[misc]
        return self._features(self._encode(x, attn_mask, is_causal))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Any:
        if not self._merges():
            return super().forward(x, attn_mask, is_causal)
        return self._classify(self._encode(x, attn_mask, is_causal))


class _PlainModel(MergingModel):
    def forward_features(self, x: Tensor) -> Tensor:
        if not self._merges():
            return super().forward_features(x)  # type: ignore[misc]
        return self._features(self._encode(x))

    def forward(self, x: Tensor) -> Any:
        if not self._merges():
            return super().forward(x)
        return self._classify(self._encode(x))

    def forward_intermediates(
        self, x: Tensor, indices: int | list[int] | None = None, return_prefix_tokens: bool = False, norm: bool = False,
        stop_early: bool = False, output_fmt: str = "NCHW", intermediates_only: bool = False,
    ) -> Any:  # fmt: skip
        options = (x, indices, return_prefix_tokens, norm, stop_early, output_fmt, intermediates_only)
        if not self._merges():
            return super().forward_intermediates(*options)  # type: ignore[misc]
        return self._intermediates(*options)


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
        options = (x, indices, return_prefix_tokens, norm, stop_early, output_fmt, intermediates_only, output_dict)
        if not self._merges():
            return super().forward_intermediates(*options, attn_mask=attn_mask, is_causal=is_causal)
        return self._intermediates(*options, attn_mask, is_causal)


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
        options = (x, indices, return_prefix_tokens, norm, stop_early, output_fmt, intermediates_only)
        if not self._merges():
            return super().forward_intermediates(*options, attn_mask=attn_mask, is_causal=is_causal)
        return self._intermediates(*options, False, attn_mask, is_causal)


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
        other = "; for transformers' models there is fpet.huggingface.merged_features" if of_transformers(model) else ""
        raise TypeError(f"model: expected a model patched by fpet.apply, got {type(model).__name__}{other}")
    encoded = inner._encode(images)
    tokens = inner.norm(encoded.x)
    batch, left = tokens.shape[:2]
    size = tokens.new_ones(batch, left, 1, dtype=torch.float32) if encoded.size is None else encoded.size
    # Unmerging the indices themselves; float32 has each of them exactly, and every device has float32.
    index = torch.arange(left, device=tokens.device, dtype=torch.float32)[None, :, None].expand(batch, -1, 1)
    return MergedFeatures(tokens, size, encoded.unmerge(index).squeeze(-1).long())
