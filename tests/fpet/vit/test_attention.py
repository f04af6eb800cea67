"""Proportional attention: a token of size n counts as n equal tokens, in every form, dtype and derivative."""

from __future__ import annotations

import pytest
import torch
from timm.layers import Attention, AttentionRope
from timm.models.eva import EvaAttention
from torch import nn

from fpet.vit.attention import TIMM_ATTENTIONS, _with_size_column, attend
from fpet.vit.merging import SizeBias

FORMS = {"mask": {}, "column": {}, "auto": {}, "unfused": {"fused": False}}


def problem(channels: int = 16, n: int = 12, dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple:
    generator = torch.Generator().manual_seed(channels)
    q, k, v = (torch.randn(2, 3, n, channels, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(3))
    size = torch.randint(1, 30, (2, n), generator=generator).double().to(device)
    return q, k, v, size


def run(form: str, *args: torch.Tensor, size: torch.Tensor, **options: object) -> torch.Tensor:
    q = args[0]
    name = "mask" if form == "unfused" else form
    return attend(*args, scale=q.shape[-1] ** -0.5, sizes=SizeBias(size.log(), name), **FORMS[form], **options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("channels", [8, 12, 16, 22])
def test_a_token_of_size_n_counts_as_n_tokens(form: str, channels: int, device: str) -> None:
    q, k, v, size = problem(channels, device=device)
    got = run(form, q, k, v, size=size)
    for b in range(2):
        times = size[b].long()
        k_all, v_all = k[b].repeat_interleave(times, dim=1), v[b].repeat_interleave(times, dim=1)
        torch.testing.assert_close(got[b], nn.functional.scaled_dot_product_attention(q[b], k_all, v_all))


@pytest.mark.parametrize("form", FORMS)
def test_masks_of_the_caller_are_added(form: str, device: str) -> None:
    q, k, v, size = problem(device=device)
    boolean = torch.rand(12, 12, device=device) > 0.4
    boolean.fill_diagonal_(True)
    additive = torch.zeros(12, 12, dtype=q.dtype, device=device).masked_fill(~boolean, float("-inf"))
    explicit = attend(q, k, v, scale=0.25, attn_mask=additive + size.log()[:, None, None], fused=False)
    for mask in (boolean, additive, additive[None, None].expand(2, 3, 12, 12)):
        torch.testing.assert_close(run(form, q, k, v, size=size, attn_mask=mask), explicit)
    causal = torch.ones(12, 12, dtype=torch.bool, device=device).tril()
    torch.testing.assert_close(
        run(form, q, k, v, size=size, is_causal=True), run("unfused", q, k, v, size=size, attn_mask=causal)
    )


def test_gradients_are_the_same_in_every_form(device: str) -> None:
    found = {}
    for form in FORMS:
        leaves = [t.requires_grad_() for t in problem(device=device)]
        out = run(form, *leaves[:3], size=leaves[3])
        found[form] = torch.autograd.grad((out * torch.linspace(-1, 1, out.numel(), device=device).view_as(out)).sum(), leaves)
    for form in FORMS:
        torch.testing.assert_close(found[form], found["unfused"])
    assert found["mask"][3].abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [64, 80, 88])
def test_column_loses_nothing_in_reduced_precision(dtype: torch.dtype, channels: int, device: str) -> None:
    """At most twice the error that the mask makes, whose log(size) is rounded to the same dtype once."""
    q, k, v, size = problem(channels, n=48, dtype=dtype, device=device)
    exact = run("unfused", *(t.double() for t in (q, k, v)), size=size)
    error = {form: (run(form, q, k, v, size=size.float()).double() - exact).abs().max() for form in ("mask", "column")}
    assert error["column"] <= 2 * error["mask"]
    # What the two columns add to the scores is log(size) to float16's precision, though each is rounded to dtype.
    q_wide, k_wide, v_wide = _with_size_column(q, k, v, size.float().log(), channels**-0.5)
    added = (q_wide[..., :1, channels:].double() @ k_wide[..., channels:].double().mT) * channels**-0.5
    torch.testing.assert_close(added, size.log()[:, None, None].expand_as(added), rtol=2e-5, atol=2e-5)
    assert q_wide.shape == k_wide.shape == v_wide.shape and q_wide.shape[-1] % 8 == 0


def test_attention_dropout_still_drops(device: str) -> None:
    q, k, v, size = problem(device=device)
    dropout = nn.Dropout(0.5).train()
    for form in FORMS:
        torch.manual_seed(0)
        assert not torch.allclose(run(form, q, k, v, size=size, dropout=dropout), run(form, q, k, v, size=size))
        torch.testing.assert_close(run(form, q, k, v, size=size, dropout=dropout.eval()), run(form, q, k, v, size=size))
        dropout.train()


MODULES = {
    "plain": lambda: Attention(32, 4, qkv_bias=True),
    "normed": lambda: Attention(32, 4, qkv_bias=True, qk_norm=True, scale_norm=True, norm_layer=nn.LayerNorm),
    "gated": lambda: Attention(32, 4, gated=True),
    "wide heads": lambda: Attention(32, 4, attn_head_dim=12, dim_out=20),
    "rope": lambda: AttentionRope(32, 4, qkv_fused=False, num_prefix_tokens=2),
    "grouped": lambda: AttentionRope(32, 4, qkv_fused=False, num_kv_heads=2, gated=True),
    "eva": lambda: EvaAttention(32, 4, qkv_bias=True, scale_norm=True, norm_layer=nn.LayerNorm),
    "eva, bias apart": lambda: EvaAttention(32, 4, qkv_bias=True, qkv_bias_separate=True, scale_norm=False),
    "eva, split": lambda: EvaAttention(32, 4, qkv_fused=False, scale_norm=False),
}


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("sdpa", [True, False])
@torch.no_grad()
def test_modules_compute_what_timm_computes(kind: str, sdpa: bool) -> None:
    torch.manual_seed(0)
    module = MODULES[kind]().double().eval()
    for p in module.parameters():
        p.copy_(torch.randn_like(p) * 0.3)
    module.fused_attn = sdpa
    x = torch.randn(2, 10, 32, dtype=torch.float64)
    rope = {"rope": torch.randn(9 if kind != "rope" else 8, 16, dtype=torch.float64)} if hasattr(module, "rotate_half") else {}
    log_size = torch.rand(2, 10, dtype=torch.float64)
    expected = module(x, **rope), module(x, **rope, attn_mask=log_size[:, None, None])
    TIMM_ATTENTIONS.swap(module)
    torch.testing.assert_close(module(x, **rope), expected[0])
    torch.testing.assert_close(module(x, **rope, sizes=SizeBias(log_size, "column")), expected[1])
    out, key = module(x, **rope, with_key=True)
    torch.testing.assert_close(out, expected[0])
    # the key that merging sees: normed, and not rotated
    assert torch.equal(key, module(x, with_key=True)[1])
    if kind == "normed":
        weight, bias = module.qkv.weight[32:64], module.qkv.bias[32:64]
        torch.testing.assert_close(key, module.k_norm((x @ weight.mT + bias).unflatten(-1, (4, 8)).transpose(1, 2)))


@pytest.mark.parametrize("kind", MODULES)
@torch.no_grad()
def test_lora_slots_act_as_if_folded_into_the_weights(kind: str) -> None:
    torch.manual_seed(0)
    module = MODULES[kind]().double().eval()
    TIMM_ATTENTIONS.swap(module)
    q, v = module.num_heads * module.head_dim, getattr(module, "num_kv_heads", module.num_heads) * module.head_dim
    x = torch.randn(2, 10, 32, dtype=torch.float64)
    for slot, width in (("lora_q", q), ("lora_v", v)):
        setattr(module, slot, nn.Linear(32, width, bias=False).double())
    with_slots, delta_q, delta_v = module(x), module.lora_q.weight, module.lora_v.weight
    del module.lora_q, module.lora_v
    assert not torch.allclose(module(x), with_slots)
    if module.qkv is not None:
        module.qkv.weight[:q] += delta_q
        module.qkv.weight[-v:] += delta_v
    else:
        module.q_proj.weight += delta_q
        module.v_proj.weight += delta_v
    torch.testing.assert_close(module(x), with_slots)


@torch.no_grad()
def test_a_layer_put_in_the_place_of_evas_qkv_is_called() -> None:
    """As the peft library does; timm itself reads the weight and would pass such a layer over."""

    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner, self.weight = inner, inner.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) + 1

    module = EvaAttention(32, 4, qkv_bias=True, scale_norm=False).eval()
    TIMM_ATTENTIONS.swap(module)
    x = torch.randn(2, 10, 32)
    before = module(x)
    module.qkv = Wrapped(module.qkv)
    assert not torch.allclose(module(x), before)
