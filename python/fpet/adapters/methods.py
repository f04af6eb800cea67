"""Where each method puts its modules, and how it folds into the backbone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.modules import BottleneckAdapter, FacT, FacTFactors, PETModule, Prompts, RepAdapter, ScaleShift
from ..vit import block as fpet_block
from .config import AdapterConfig

__all__ = ["add_adapters", "fold", "remove_adapters", "transformer_blocks"]

_Update = tuple[Any, Tensor, Tensor | None]  # a layer, its new weight, its new bias, in float64


def add_adapters(
    model: nn.Module,
    method: str,
    *,
    hidden_dim: int | None = None,
    scale: float | None = None,
    bits: int | None = None,
    dropout: float | None = None,
) -> nn.Module:
    """Puts a parameter-efficient tuning method's modules into a timm vision transformer, in place.

    The backbone's parameters keep their names and values. :func:`fpet.freeze` then leaves only the method's parameters
    and the head trainable. Works before and after :func:`fpet.apply`.

    ===================  ==========  ====  ======================================================================
    method               hidden_dim  bits  what it adds or trains
    ===================  ==========  ====  ======================================================================
    adaptformer          8           32    s · up(dropout(ReLU(down x))) beside the MLP, x un-normed, after merging
    bi-adaptformer       32          1     the same with quantised weights
    lora, bi-lora        8, 32       32,1  s · up(dropout(down x)) on q and on v
    repadapter           8           –     x + s · B(dropout(A x)) on the input of attention and of MLP
    ssf                  –           –     scale and shift after embedding, norms and linear layers
    vpt-shallow, -deep   50          –     prompts as prefix tokens, once or anew for each layer
    fact-tt              16          –     s · V Σ Uᵀ on every matrix, U and V shared by all
    bitfit, linear,      –           –     biases; only the head; everything; only the refinement of the keys (and
    full, none                             the head)
    ===================  ==========  ====  ======================================================================

    Args:
        model: with ``blocks``. Adapters take its first block's device and floating dtype.
        method: see above. hidden_dim: bottleneck width, rank, or number of prompts. scale: s, 1 by default.
        bits: 1, 2, 4, 8 or 32, for adaptformer, lora and their bi- forms. dropout: 0.1 by default where there is one.

    Returns:
        model.

    Raises:
        ValueError: an argument out of range or not of this method, or the model has adapters already.
        TypeError: the model has no place for the method; it is left as it was.
    """
    config = AdapterConfig.resolve(method, hidden_dim, scale, bits, dropout)
    present = getattr(model, "adapter_config", None)
    if present is not None:
        raise ValueError(f"model: has {present.method!r} adapters already: fpet.remove_adapters(model) first")
    blocks = transformer_blocks(model)
    model.adapter_config = config  # type: ignore[assignment]
    try:
        _INSTALL.get(config.method, _install_nothing)(model, blocks, config)
    except Exception:
        remove_adapters(model)
        raise
    return model


def remove_adapters(model: nn.Module) -> nn.Module:
    """Takes out what :func:`add_adapters` put in, in place; merging and its refinement stay. Returns model."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, PETModule) and name not in ("refinement", "thresholds"):
                _remove(model, parent, name)
    for block in transformer_blocks(model):
        fpet_block.restore(block)
    if hasattr(model, "adapter_config"):
        del model.adapter_config
    return model


@torch.no_grad()
def fold(model: nn.Module) -> nn.Module:
    """Folds LoRA (quantised too), RepAdapter, SSF or FacT-TT into the backbone's weights, in place: no cost at inference.

    What is computed in evaluation mode stays the same up to rounding; the sums are made in float64. Save before folding:
    the backbone is another one afterwards.

    Returns:
        model, without adapters.

    Raises:
        ValueError: no adapters, or the method is not linear. TypeError: a layer that can't take it up. The model is then
            as it was.
    """
    config = getattr(model, "adapter_config", None)
    if config is None or config.method not in _FOLD:
        got = "no adapters" if config is None else repr(config.method)
        raise ValueError(f"model: expected adapters of one of {', '.join(_FOLD)}, which are linear, got {got}")
    updates: list[_Update] = []
    for block in transformer_blocks(model):
        updates += _FOLD[config.method](block)
    if config.method == "ssf":
        updates += [_folded_scale_shift(layer) for layer in _outer_layers(model) if hasattr(layer, "ssf")]
    for layer, weight, bias in updates:
        reference = layer.weight if layer.weight is not None else next(model.parameters())
        for name, value in (("weight", weight), ("bias", bias)):
            if value is None:
                continue
            old = getattr(layer, name)
            if old is not None:
                old.copy_(value)
            else:
                value = value.to(reference.device, reference.dtype)
                setattr(layer, name, nn.Parameter(value, requires_grad=reference.requires_grad))
    return remove_adapters(model)


def transformer_blocks(model: nn.Module) -> list[Any]:
    """``model.blocks`` as a list; TypeError where there are none."""
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or len(blocks) == 0:
        raise TypeError(f"model: expected a timm vision transformer with blocks, got {type(model).__name__}")
    return list(blocks)


# --- putting in and taking out ---------------------------------------------------------------------------------------


def _put(parent: nn.Module, name: str, child: PETModule, reference: nn.Module) -> None:
    """child becomes parent.name, on the device and in the dtype of reference's first parameter."""
    weight = next(reference.parameters())
    setattr(parent, name, child.to(weight.device, weight.dtype).train(parent.training))


def hook(model: Any, parent: nn.Module, name: str, child: PETModule, like: PETModule | None = None) -> None:
    """Makes parent.name act on its parent, where the parent's forward does not call it. like: what child stands for."""
    like = child if like is None else like
    if name == "rep_adapter":
        child.handle = parent.register_forward_pre_hook(_replace_input)
    elif name == "ssf":
        child.handle = parent.register_forward_hook(_scale_output)
    elif name == "fact":
        child.handle = parent.register_forward_hook(_add_to_output)
    elif isinstance(like, Prompts) and like.insert:
        child.handle = parent.register_forward_hook(_insert_prompts)
        _shift_prefix(model, like.tokens.shape[1])
        model.set_input_size = _refuse_set_input_size
    elif isinstance(like, Prompts):
        child.handle = parent.register_forward_pre_hook(_replace_prompts)


def _remove(model: nn.Module, parent: nn.Module, name: str) -> None:
    child = getattr(parent, name)
    if child.handle is not None:
        child.handle.remove()
    if isinstance(child, Prompts) and child.insert:
        _shift_prefix(model, -child.tokens.shape[1])
        del model.set_input_size
    delattr(parent, name)


def _shift_prefix(model: Any, by: int) -> None:
    model.num_prefix_tokens += by
    for block in transformer_blocks(model):
        if hasattr(block.attn, "num_prefix_tokens"):  # rotary embeddings leave that many alone
            block.attn.num_prefix_tokens += by


def _refuse_set_input_size(*args: Any, **kwargs: Any) -> None:
    # timm would take the prompts for tokens with a position embedding and resample the wrong ones.
    raise RuntimeError("set_input_size: the model has prompts; call it before fpet.add_adapters")


# Hooks are module-level functions, so that models pickle; each finds its module in its parent.


def _replace_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (module.rep_adapter(args[0]), *args[1:])  # type: ignore[operator]


def _scale_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return module.ssf(output)  # type: ignore[operator]


def _add_to_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output + module.fact(args[0])  # type: ignore[operator]


def _replace_prompts(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (module.prompts(args[0]), *args[1:])  # type: ignore[operator]


def _insert_prompts(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return module.prompts(output)  # type: ignore[operator]


# --- the layers of a block -------------------------------------------------------------------------------------------


def _attention(block: nn.Module) -> Any:
    attention = getattr(block, "attn", None)
    if not isinstance(attention, nn.Module):
        raise TypeError(f"model: expected blocks with an attention module `attn`, got {type(block).__name__}")
    return attention


def _attentions(block: nn.Module) -> list[Any]:
    """The attention module, or those of a block with several in parallel."""
    return [branch.attn for branch in block.attns] if hasattr(block, "attns") else [_attention(block)]  # type: ignore[union-attr]


def _mlp(block: nn.Module) -> Any:
    mlp = getattr(block, "mlp", None)
    if not isinstance(mlp, nn.Module):
        raise TypeError(f"model: expected blocks with a module `mlp`, got {type(block).__name__}")
    return mlp


def _qkv(attention: Any) -> list[nn.Linear]:
    """[qkv], or [q_proj, k_proj, v_proj]."""
    fused = getattr(attention, "qkv", None)
    layers: list[Any] = [fused] if fused is not None else [getattr(attention, f"{n}_proj", None) for n in "qkv"]
    if any(not hasattr(layer, "out_features") for layer in layers):
        raise TypeError(f"model: expected attention with qkv, or q_proj, k_proj and v_proj, got {type(attention).__name__}")
    return layers


def _linear(layer: Any, where: str) -> nn.Linear:
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"model: expected {where} to be an nn.Linear, got {type(layer).__name__}")
    return layer


def _module_qkv(attention: Any) -> list[nn.Linear]:
    """As :func:`_qkv`, where they are called as modules; EVA adds q_bias and v_bias around the layer's weight instead."""
    if getattr(attention, "q_bias", None) is not None:
        raise TypeError(f"model: expected attention with its biases in qkv, got {type(attention).__name__} with q_bias")
    return [_linear(layer, "qkv") for layer in _qkv(attention)]


def _fc1(mlp: Any) -> list[nn.Linear]:
    """The layers that read the MLP's input: fc1, or the two halves of a SwiGLU."""
    layers = [getattr(mlp, name) for name in ("fc1", "fc1_g", "fc1_x") if hasattr(mlp, name)]
    if not layers:
        raise TypeError(f"model: expected an MLP with fc1, got {type(mlp).__name__}")
    return [_linear(layer, "mlp.fc1") for layer in layers]


def _outer_layers(model: Any) -> Iterator[nn.Module]:
    """Embedding and norms outside the blocks."""
    yield model.patch_embed.proj
    for layer in (getattr(model.patch_embed, "norm", None), model.norm, getattr(model, "fc_norm", None)):
        if layer is not None and not isinstance(layer, nn.Identity):
            yield layer


def _ssf_layers(block: nn.Module) -> Iterator[nn.Module]:
    attention, mlp = _attention(block), _mlp(block)
    yield from _module_qkv(attention)
    yield _linear(getattr(attention, "proj", None), "attn.proj")
    yield from _fc1(mlp)
    yield _linear(getattr(mlp, "fc2", None), "mlp.fc2")
    for name in ("norm1", "norm2"):
        layer = getattr(block, name, None)
        if not isinstance(layer, nn.Module) or getattr(layer, "normalized_shape", None) is None:
            raise TypeError(f"model: expected {name} to be a layer norm, got {type(layer).__name__}")
        yield layer


# --- methods ---------------------------------------------------------------------------------------------------------


def _install_nothing(model: nn.Module, blocks: list[nn.Module], config: AdapterConfig) -> None:
    """none, linear, full and bitfit differ in what fpet.freeze leaves trainable."""


def _install_adaptformer(model: Any, blocks: list[nn.Module], config: AdapterConfig) -> None:
    width = model.embed_dim
    for block in blocks:
        fpet_block.convert(block)
        adapter = BottleneckAdapter(
            width, width, config.hidden_dim, activation="relu", bits=config.bits, dropout=config.dropout, scale=config.scale
        )
        _put(block, "adapter_mlp", adapter, block)


def _install_lora(model: nn.Module, blocks: list[nn.Module], config: AdapterConfig) -> None:
    for block in blocks:
        fpet_block.convert(block)
    for attention in (a for block in blocks for a in _attentions(block)):
        layers = _qkv(attention)
        widths = [layers[0].out_features // 3] * 2 if len(layers) == 1 else [layers[0].out_features, layers[2].out_features]
        for name, width in zip(("lora_q", "lora_v"), widths, strict=True):
            adapter = BottleneckAdapter(
                layers[0].in_features, width, config.hidden_dim, activation="identity", bits=config.bits,
                dropout=config.dropout, scale=config.scale,
            )  # fmt: skip
            _put(attention, name, adapter, attention)


def _install_repadapter(model: nn.Module, blocks: list[nn.Module], config: AdapterConfig) -> None:
    for block in blocks:
        for parent, width in (
            (_attention(block), _qkv(_attention(block))[0].in_features),
            (_mlp(block), _fc1(_mlp(block))[0].in_features),
        ):
            adapter = RepAdapter(width, config.hidden_dim, dropout=config.dropout, scale=config.scale)
            _put(parent, "rep_adapter", adapter, parent)
            hook(model, parent, "rep_adapter", adapter)


def _install_ssf(model: nn.Module, blocks: list[nn.Module], config: AdapterConfig) -> None:
    layers: list[Any] = [*_outer_layers(model), *(layer for block in blocks for layer in _ssf_layers(block))]
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            ssf = ScaleShift(layer.out_channels, channel_dim=1)
        else:
            ssf = ScaleShift(layer.out_features if isinstance(layer, nn.Linear) else layer.normalized_shape[-1])
        _put(layer, "ssf", ssf, model.blocks)  # type: ignore[arg-type]
        hook(model, layer, "ssf", ssf)


def _install_vpt(model: Any, blocks: list[nn.Module], config: AdapterConfig) -> None:
    if not hasattr(model, "norm_pre") or not hasattr(model, "num_prefix_tokens"):
        raise TypeError(f"model: expected norm_pre and num_prefix_tokens, behind which prompts go, got {type(model).__name__}")
    if getattr(model, "dynamic_img_size", False):
        raise TypeError(
            "model: prompts need a fixed image size: timm takes them for position-embedded tokens, got dynamic_img_size"
        )
    position, width = model.num_prefix_tokens, model.embed_dim
    bound = math.sqrt(6.0 / (3 * math.prod(model.patch_embed.patch_size) + width))
    options: dict[str, Any] = {"bound": bound, "dropout": config.dropout}
    prompts = Prompts(config.hidden_dim, width, position, insert=True, **options)
    _put(model.norm_pre, "prompts", prompts, model.blocks)
    hook(model, model.norm_pre, "prompts", prompts)
    if config.method == "vpt-deep":
        for block in blocks[1:]:
            fresh = Prompts(config.hidden_dim, width, position, insert=False, **options)
            _put(block, "prompts", fresh, block)
            hook(model, block, "prompts", fresh)


def _install_fact(model: Any, blocks: list[nn.Module], config: AdapterConfig) -> None:
    width = model.embed_dim
    factors = FacTFactors(width, config.hidden_dim)
    _put(model, "fact_factors", factors, model.blocks)
    for block in blocks:
        attention, mlp = _attention(block), _mlp(block)
        proj, fc2 = _linear(getattr(attention, "proj", None), "attn.proj"), _linear(getattr(mlp, "fc2", None), "mlp.fc2")
        for layer in (*_module_qkv(attention), proj, *_fc1(mlp), fc2):
            if layer.in_features % width or layer.out_features % width:
                expected = f"expected layers whose widths are multiples of {width}"
                raise TypeError(f"model: {expected}, got {layer.in_features} → {layer.out_features}")
            fact = FacT(
                factors, layer.in_features // width, layer.out_features // width, dropout=config.dropout, scale=config.scale
            )
            _put(layer, "fact", fact, layer)
            hook(model, layer, "fact", fact)


_INSTALL = {
    "adaptformer": _install_adaptformer,
    "bi-adaptformer": _install_adaptformer,
    "lora": _install_lora,
    "bi-lora": _install_lora,
    "repadapter": _install_repadapter,
    "ssf": _install_ssf,
    "vpt-shallow": _install_vpt,
    "vpt-deep": _install_vpt,
    "fact-tt": _install_fact,
}


# --- folding ---------------------------------------------------------------------------------------------------------


def _fold_lora(block: nn.Module) -> list[_Update]:
    updates: list[_Update] = []
    for attention in _attentions(block):
        layers = [_linear(layer, "qkv") for layer in _qkv(attention)]
        q, v = (a.up_weight().double() @ a.down_weight().double() * a.scale for a in (attention.lora_q, attention.lora_v))
        if len(layers) == 1:
            weight = layers[0].weight.double()
            none = weight.new_zeros(weight.shape[0] - q.shape[0] - v.shape[0], weight.shape[1])
            updates.append((layers[0], weight + torch.cat([q, none, v]), None))
        else:
            updates += [(layers[0], layers[0].weight.double() + q, None), (layers[2], layers[2].weight.double() + v, None)]
    return updates


def _fold_repadapter(block: nn.Module) -> list[_Update]:
    attention, mlp = _attention(block), _mlp(block)
    gate = getattr(attention, "gate", None)
    readers = [*_module_qkv(attention), *([] if gate is None else [_linear(gate, "attn.gate")])]
    return [
        _folded_reader(layer, parent.rep_adapter)
        for parent, group in ((attention, readers), (mlp, _fc1(mlp)))
        for layer in group
    ]


def _folded_reader(layer: nn.Linear, a: RepAdapter) -> _Update:
    # W (x + s B (A x + b_A) + s b_B) + b = W (I + s B A) x + b + s W (B b_A + b_B)
    weight, up = layer.weight.double(), a.dense_up().double()
    bias = weight @ (up @ a.down.bias.double() + a.up_bias.double()) * a.scale
    if layer.bias is not None:
        bias = bias + layer.bias.double()
    return layer, weight + (weight @ up) @ a.down.weight.double() * a.scale, bias


def _fold_ssf(block: nn.Module) -> list[_Update]:
    return [_folded_scale_shift(layer) for layer in _ssf_layers(block)]


def _folded_scale_shift(layer: Any) -> _Update:
    if not isinstance(layer, (nn.Linear, nn.Conv2d, nn.LayerNorm)):
        raise TypeError(f"model: expected nn.Linear, nn.Conv2d or nn.LayerNorm to fold into, got {type(layer).__name__}")
    ssf: Any = layer.ssf
    scale, shift = ssf.scale.double(), ssf.shift.double()
    if layer.weight is None:
        return layer, scale, shift
    weight = layer.weight.double() * scale.view(-1, *[1] * (layer.weight.dim() - 1))
    bias: Tensor | None = layer.bias
    return layer, weight, shift if bias is None else bias.double() * scale + shift


def _fold_fact(block: nn.Module) -> list[_Update]:
    attention, mlp = _attention(block), _mlp(block)
    layers: list[Any] = [*_module_qkv(attention), attention.proj, *_fc1(mlp), mlp.fc2]
    return [(layer, layer.weight.double() + layer.fact.delta().double(), None) for layer in layers]


_FOLD = {
    "lora": _fold_lora,
    "bi-lora": _fold_lora,
    "repadapter": _fold_repadapter,
    "ssf": _fold_ssf,
    "fact-tt": _fold_fact,
}
