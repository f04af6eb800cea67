"""The layers of transformers' vision encoders with a place to merge, and the loop over them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.blip import modeling_blip
from transformers.models.clip import modeling_clip
from transformers.models.siglip import modeling_siglip
from transformers.models.vit import modeling_vit

from fpet_kernels import Merged

from ..layers.swapping import Foreign
from ..vit.config import MergeConfig
from ..vit.foreign import check_forward
from ..vit.merging import (
    MergeStep,
    SizeBias,
    kept_positions,
    merge_splits,
    refuse_fx,
    select_rows_and_columns,
    token_count,
    unmerge,
)
from ..vit.models import Encoded

__all__ = ["MergedOutput", "VisionMergeConfig", "vision_layers"]


@dataclass(frozen=True)
class VisionMergeConfig(MergeConfig):
    """Where and how an encoder merges; on a patched one as ``encoder.fpet_config``.

    Attributes:
        attention: "eager" or "sdpa" for all its layers; None follows the model's own setting.
    """

    attention: str | None = None


@dataclass
class MergedOutput(BaseModelOutputWithPooling):
    """An encoder's output with its tokens left merged (``keep_merged=True``).

    Attributes, besides those of transformers' output, in which ``last_hidden_state`` is (B, M, D) here:
        size: (B, M, 1) how many of the original tokens each one stands for.
        source: (B, N) int64: for every original token the index of the one that stands for it.
    """

    size: Tensor | None = None
    source: Tensor | None = None


# --- layers -----------------------------------------------------------------------------------------------------------


class LayerCall:
    """One call of a layer: what it is asked for besides its tokens, and what it leaves besides them.

    Attributes:
        config: how to attend and to merge. step: what to merge by, None where nothing is.
        log_size: (B, N) of the tokens that come in. mask: as transformers makes it of an attention_mask.
        merged: of the tokens that were merged, None where none were. weights: of attention, in eager form.
    """

    def __init__(
        self,
        config: VisionMergeConfig,
        step: MergeStep | None = None,
        log_size: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        self.config, self.step, self.log_size, self.mask = config, step, log_size, mask
        self.merged: Merged | None = None
        self.weights: Tensor | None = None


class MergingLayer(Foreign):
    """A pre-norm layer that merges between its attention's residual and its MLP.

    With ``call``, a :class:`LayerCall`, it does what that asks for and leaves there what it found; without, and without an
    adapter, transformers' own forward runs. Either way it returns what transformers' layer returns.

    It honours two slots that others set: ``refinement``, a KeyRefinement that corrects the key; ``adapter``, a pair of a
    module and a word, called as ``module(x, word)`` with the un-normed tokens after merging, its output joining the MLP's.
    """

    adapter: tuple[nn.Module, str] | None = None
    fpet_layer: int | None = None  # the number of a layer that merges, by which it knows that a call lacks ``call``
    returns_tuple = False
    required: tuple[None, ...] = ()

    # transformers wraps a layer's forward, or its __call__, in gradient checkpointing. Here the layer does that inside, so that
    # everything that needs a gradient is an argument and a result of what is checkpointed, and hooks see the tokens alone.
    def __init_subclass__(cls, **kwargs: Any) -> None:
        theirs: Any = cls.__bases__[-1]
        if issubclass(theirs, MergingLayer):  # fully_shard's subclass of one of ours
            return
        own = inspect.signature(theirs.forward).parameters
        cls.returns_tuple = "output_attentions" in own  # CLIP in transformers 4
        masks = [p for p in list(own.values())[2:] if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        cls.required = (None,) * len(masks)  # what transformers' layers want to be given though it is nothing

    __call__ = nn.Module.__call__

    def forward(self, hidden_states: Tensor, *args: Any, call: LayerCall | None = None, **kwargs: Any) -> Any:
        """(B, N, D) → (B, M, D)."""
        if call is None:
            if self.fpet_layer is not None:
                raise RuntimeError(
                    f"layer {self.fpet_layer}: it merges tokens, and was called outside of its encoder, which keeps account "
                    f"of them; call the encoder, or switch merging off: fpet.huggingface.apply(model, layer=None)"
                )
            if self.adapter is None:
                own = super().forward
                return self._checkpointed(partial(own, **kwargs) if kwargs else own, hidden_states, *args)
            call = LayerCall(VisionMergeConfig())
        run = partial(self._run, call.config, call.step, call.mask)
        size = None if call.step is None else call.step.size
        out, call.weights, *merged = self._checkpointed(run, hidden_states, call.log_size, size)
        if call.step is not None:
            call.merged = Merged(out, *merged)
        if not self.returns_tuple:
            return out
        return (out, call.weights) if kwargs.get("output_attentions") else (out,)

    def _checkpointed(self, function: Any, *args: Any) -> Any:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(function, *args)
        return function(*args)

    def _run(
        self, config: VisionMergeConfig, step: MergeStep | None, mask: Tensor | None, x: Tensor, log_size: Tensor | None,
        size: Tensor | None,
    ) -> tuple[Any, ...]:  # fmt: skip
        """Tokens (B, M, D), attention weights where eager; with ``step`` their sizes and matches."""
        given: dict[str, Any] = {} if config.attention is None else {"attention": config.attention}
        if log_size is not None:
            given["sizes"] = SizeBias(log_size, config.proportional_attention or "auto")
        if mask is not None:
            given["mask"] = mask
        if step is not None:
            given["with_key"] = True
        branch, weights, *key = self._attention_branch(x, given)
        x = x + branch
        found: tuple[Tensor, ...] = ()
        if step is not None:
            x, *found = step._replace(size=size).merge(x, key[0], getattr(self, "refinement", None))  # type: ignore[assignment]
        out = x + self._mlp_branch(x)
        if self.adapter is not None:
            module, word = self.adapter
            out = out + module(x, word)
        return (out, weights, *found)

    def _attention_branch(self, x: Tensor, given: dict[str, Any]) -> tuple[Any, ...]:
        """What attention adds to x; its weights, None where it has none; and the key, where ``given`` asks for it."""
        return self.self_attn(self.layer_norm1(x), **given)

    def _mlp_branch(self, x: Tensor) -> Tensor:
        return self.mlp(self.layer_norm2(x))


class FPETBlipEncoderLayer(MergingLayer, modeling_blip.BlipEncoderLayer):
    """BLIP's vision layer."""


class FPETCLIPEncoderLayer(MergingLayer, modeling_clip.CLIPEncoderLayer):
    """CLIP's layer."""


class FPETSiglipEncoderLayer(MergingLayer, modeling_siglip.SiglipEncoderLayer):
    """SigLIP's layer."""


class FPETViTLayer(MergingLayer, modeling_vit.ViTLayer):
    """ViT's layer, as transformers 4 and as transformers 5 have it."""

    def _attention_branch(self, x: Tensor, given: dict[str, Any]) -> tuple[Any, ...]:
        attention: Any = attention_of(self)
        out, *rest = attention(self.layernorm_before(x), **given)
        return (self.dropout(out) if attention is self.attention else self.attention.output(out, out), *rest)

    def _mlp_branch(self, x: Tensor) -> Tensor:
        x = self.layernorm_after(x)
        if hasattr(self, "intermediate"):
            return self.output.dropout(self.output.dense(self.intermediate(x)))
        return self.dropout(self.mlp(x))


# --- encoders ---------------------------------------------------------------------------------------------------------


class MergingEncoder(Foreign):
    """The loop over the layers of a vision encoder, and what becomes of merged tokens after it."""

    fpet_config: VisionMergeConfig
    _arguments: tuple[str, ...] = ()  # of transformers' forward
    _takes_any = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        theirs: Any = cls.__bases__[-1]
        if not issubclass(theirs, MergingEncoder):
            own = inspect.signature(theirs.forward).parameters
            cls._arguments = tuple(own)[1:]
            cls._takes_any = any(p.kind is p.VAR_KEYWORD for p in own.values())

    def forward(
        self, pixel_values: Tensor | None = None, *args: Any, output_attentions: bool | None = None,
        output_hidden_states: Any = None, return_dict: bool | None = None, keep_merged: bool = False, **options: Any,
    ) -> Any:  # fmt: skip
        """transformers' forward, and that alone where nothing is merged.

        ``last_hidden_state`` and ``hidden_states`` have every original position, (B, N, D). ``attentions`` are over the
        tokens there were; asking for them takes the eager form. ``keep_merged`` returns a :class:`MergedOutput`.
        """
        if not self.merges() and not keep_merged:
            asked = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
            asked["return_dict"] = return_dict
            options |= {name: value for name, value in asked.items() if value is not None}
            return super().forward(pixel_values, *args, **options)
        options = self._supported(args, options)
        refuse_fx(pixel_values)  # type: ignore[arg-type]
        if pixel_values is None:
            raise ValueError("pixel_values: expected a tensor (B, 3, H, W), got None")
        chosen = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        attentions = asked_for(output_attentions, self.config, "output_attentions")
        encoded, weights = self._encode(pixel_values, _indices(chosen, len(vision_layers(self))), attentions, options)
        tokens = self._final_norm(encoded.x)
        output: Any
        if keep_merged:
            positions = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.float32)
            source = encoded.unmerge(positions.expand(tokens.shape[0], -1)[..., None]).squeeze(-1).long()
            size = encoded.size if encoded.size is not None else tokens.new_ones(*tokens.shape[:2], 1, dtype=_exact(tokens))
            output = MergedOutput(tokens, self._pool(tokens, encoded.size), size=size, source=source)
        else:
            output = BaseModelOutputWithPooling(encoded.unmerge(tokens), self._pool(tokens, encoded.size))
        if chosen:
            output.hidden_states = tuple(encoded.intermediates)
        if attentions:
            output.attentions = tuple(weights)
        return output if asked_for(return_dict, self.config, "return_dict", True) else output.to_tuple()

    def merges(self) -> bool:
        """Whether anything is to be done that transformers' own forward does not do."""
        return bool(self.fpet_config.layers) or self.fpet_config.attention is not None

    def _supported(self, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
        """Those of transformers' arguments that merging heeds, by name. What transformers ignores is ignored here."""
        options |= dict(zip(self._arguments[1:], args, strict=False))
        options = {name: value for name, value in options.items() if value is not None}
        unknown = {name for name in options.keys() - self._heeded if name in self._arguments or not self._takes_any}
        if unknown:
            raise TypeError(f"{type(self).__name__}: merging does not support the arguments {sorted(unknown)}")
        return {name: options[name] for name in self._heeded & options.keys()}

    def _encode(
        self, pixel_values: Tensor, take: frozenset[int], attentions: bool, options: dict[str, Any]
    ) -> tuple[Encoded, list[Tensor | None]]:
        """Runs the layers; in ``intermediates`` are the states before and after each, unmerged, None but for ``take``."""
        config, layers = self.fpet_config, vision_layers(self)
        if attentions:
            config = replace(config, attention="eager")
        attention_mask = options.pop("attention_mask", None)
        x = self._embed(pixel_values, **options)
        prefix = self._num_prefix_tokens
        height, width = token_count(x, self._grid(pixel_values), prefix)
        if not torch.compiler.is_compiling():
            self._check_forwards()
        splits = merge_splits(height, width, len(config.layers))
        mask = None if attention_mask is None else self._mask(x, attention_mask)
        left, size, log_size = mask, None, None
        matches: list[Tensor] = []
        states: list[Any] = [x if 0 in take else None]
        weights: list[Tensor | None] = []
        for i, layer in enumerate(layers):
            step = None
            if i in config.layers:
                step = MergeStep(splits[len(matches)], size, config.similarity, config.backend, prefix)
            if step is None and log_size is None and mask is None and config.attention is None:
                x = _tokens(layer(x, *layer.required))
            else:
                call = LayerCall(config, step, log_size, left)
                x = _tokens(layer(x, call=call))
                weights.append(call.weights)
                if call.merged is not None:
                    size, match = call.merged.size, call.merged.match
                    matches.append(match)
                    if config.proportional_attention is not None:
                        log_size = size.squeeze(-1).log()
                    if mask is not None:
                        left = select_rows_and_columns(mask, kept_positions(height, width, len(matches), prefix, x.device))
            states.append(unmerge(x, splits, matches, prefix) if i + 1 in take else None)
        return Encoded(x, size, splits, matches, prefix, states), weights

    def _mask(self, x: Tensor, attention_mask: Tensor) -> Tensor | None:
        """(B, 1, N, N), boolean or to be added, of what transformers takes as attention_mask."""
        return masking_utils.create_bidirectional_mask(config=self.config, inputs_embeds=x, attention_mask=attention_mask)

    def _check_forwards(self) -> None:
        layers, merging = vision_layers(self), self.fpet_config.layers
        for i in range(min(merging, default=len(layers)), len(layers)):
            weighs = i > merging[0] and self.fpet_config.proportional_attention is not None
            given = (*(("sizes",) * weighs), *(("with_key",) * (i in merging)))
            check_forward(layers[i], f"layer {i}", ("call",) * (weighs or i in merging))
            check_forward(attention_of(layers[i]), f"attention of layer {i}", given)

    _heeded: frozenset[str] = frozenset({"interpolate_pos_encoding"})
    _num_prefix_tokens = 1

    def _embed(self, pixel_values: Tensor, **options: Any) -> Tensor:
        """transformers' own steps up to the first layer: (B, N, D)."""
        return self.embeddings(pixel_values, **options)

    def _patch_convolution(self) -> nn.Conv2d:
        return self.embeddings.patch_embedding

    def _grid(self, pixel_values: Tensor) -> tuple[int, int]:
        """Rows and columns of patches in these images."""
        kernel, stride = (self._patch_convolution().kernel_size, self._patch_convolution().stride)
        height, width = ((side - k) // s + 1 for side, k, s in zip(pixel_values.shape[-2:], kernel, stride, strict=True))
        return height, width

    def _final_norm(self, x: Tensor) -> Tensor:
        return self.post_layernorm(x)

    def _pool(self, tokens: Tensor, size: Tensor | None) -> Tensor | None:
        """transformers' pooled output, each token counted as often as it stands for an original one."""
        raise NotImplementedError


class FPETBlipVisionModel(MergingEncoder, modeling_blip.BlipVisionModel):
    """BLIP's vision encoder."""

    def _pool(self, tokens: Tensor, size: Tensor | None) -> Tensor:
        return self.post_layernorm(tokens[:, 0])  # once more, as transformers does


# In transformers 5 a CLIPVisionModel is the encoder; before, it holds one. So it is with SigLIP.
_CLIP_VISION: Any = getattr(modeling_clip, "CLIPVisionTransformer", modeling_clip.CLIPVisionModel)
_SIGLIP_VISION: Any = getattr(modeling_siglip, "SiglipVisionTransformer", modeling_siglip.SiglipVisionModel)


class FPETCLIPVisionModel(MergingEncoder, _CLIP_VISION):
    """CLIP's vision encoder; ``last_hidden_state`` is not normed, as in transformers."""

    def _embed(self, pixel_values: Tensor, **options: Any) -> Tensor:
        return self.pre_layrnorm(self.embeddings(pixel_values, **options))

    def _final_norm(self, x: Tensor) -> Tensor:
        return x

    def _pool(self, tokens: Tensor, size: Tensor | None) -> Tensor:
        return self.post_layernorm(tokens[:, 0])


class FPETSiglipVisionModel(MergingEncoder, _SIGLIP_VISION):
    """SigLIP's vision encoder: no class token, pooled by attention."""

    _num_prefix_tokens = 0

    def _pool(self, tokens: Tensor, size: Tensor | None) -> Tensor | None:
        if not self.use_head:
            return None
        head = self.head
        if size is None or self.fpet_config.proportional_attention is None:
            return head(tokens)
        mask = size.squeeze(-1).log().to(tokens.dtype)[:, None].repeat_interleave(head.attention.num_heads, dim=0)
        probe = head.probe.expand(tokens.shape[0], -1, -1)
        pooled = head.attention(probe, tokens, tokens, attn_mask=mask)[0]
        return (pooled + head.mlp(head.layernorm(pooled)))[:, 0]


# transformers 5 takes a mask there, 4 does not.
_WITH_MASK = frozenset({"attention_mask"} & inspect.signature(modeling_vit.ViTModel.forward).parameters.keys())


class FPETViTModel(MergingEncoder, modeling_vit.ViTModel):
    """ViT."""

    _heeded = MergingEncoder._heeded | {"bool_masked_pos"} | _WITH_MASK

    def _embed(self, pixel_values: Tensor, **options: Any) -> Tensor:
        return self.embeddings(pixel_values.to(self._patch_convolution().weight.dtype), **options)

    def _patch_convolution(self) -> nn.Conv2d:
        return self.embeddings.patch_embeddings.projection

    def _final_norm(self, x: Tensor) -> Tensor:
        return self.layernorm(x)

    def _pool(self, tokens: Tensor, size: Tensor | None) -> Tensor | None:
        return None if self.pooler is None else self.pooler(tokens)  # reads the class token


if _SIGLIP_VISION is not modeling_siglip.SiglipVisionModel:

    class FPETSiglipVisionShell(modeling_siglip.SiglipVisionModel):
        """transformers 4's model around SigLIP's encoder, without its own recorder, which would record merged tokens."""

        def forward(self, pixel_values: Tensor | None = None, *args: Any, **options: Any) -> Any:
            if not self.vision_model.merges() and not options.get("keep_merged"):
                return super().forward(pixel_values, *args, **options)
            return self.vision_model(pixel_values, *args, **options)


def asked_for(value: Any, config: Any, name: str, default: bool = False) -> bool:
    """What was asked for, or the model's setting; a list of layers, which transformers 5 allows, asks for some."""
    value = getattr(config, name, default) if value is None else value
    return value is not None and value is not False


def _indices(chosen: Any, depth: int) -> frozenset[int]:
    """Which of ``depth`` + 1 states output_hidden_states asks for: all, none, one or several; negative ones from the end."""
    if not chosen or isinstance(chosen, bool):
        return frozenset(range(depth + 1) if chosen else ())
    several = (chosen,) if isinstance(chosen, int) else chosen
    return frozenset(i % (depth + 1) for i in several if -depth - 1 <= i <= depth)


def _tokens(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _exact(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def vision_layers(encoder: Any) -> list[Any]:
    """The layers of a vision encoder."""
    if hasattr(encoder, "layers"):  # ViT in transformers 5
        return list(encoder.layers)
    return list(encoder.encoder.layer if hasattr(encoder.encoder, "layer") else encoder.encoder.layers)


def attention_of(layer: Any) -> Any:
    """The module that has q, k and v."""
    if hasattr(layer, "self_attn"):
        return layer.self_attn
    return getattr(layer.attention, "attention", layer.attention)
