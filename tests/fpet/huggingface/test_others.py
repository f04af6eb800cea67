"""What others do to a transformers model that merges: hooks, loops, recorders, Trainer, checkpointing, masks, tracers."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

transformers = pytest.importorskip("transformers", reason="fpet.huggingface needs transformers")

import fpet  # noqa: E402
from fpet import huggingface as hf  # noqa: E402

SIZES = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8)
FAMILIES = {
    "blip": lambda: transformers.BlipVisionModel(transformers.BlipVisionConfig(**SIZES)),
    "clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES)),
    "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZES)),
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**SIZES)),
}
HAS_MASK = "attention_mask" in inspect.signature(transformers.ViTModel.forward).parameters
SELECTS = int(transformers.__version__.split(".")[0]) >= 5
"""Whether transformers returns the hidden states whose numbers are asked for."""


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    made = FAMILIES[request.param]().eval()
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn_like(p) * (0.5 if p.dim() == 1 else 0.2))
    return made


def images(batch: int = 2, side: int = 32) -> torch.Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def same(a: Any, b: Any) -> bool:
    a, b = ([t for t in o.to_tuple() if torch.is_tensor(t)] for o in (a, b))
    return len(a) == len(b) > 0 and all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def loop(model: Any) -> Any:
    encoder = hf.find_vision_encoder(model)
    x = encoder.embeddings(images())
    for layer in hf.vision_layers(encoder):
        required = getattr(type(layer), "required", None)
        x = layer(x, *(((None,) * 2 if "CLIP" in type(layer).__name__ else (None,)) if required is None else required))
        x = first(x)
    return x


@torch.no_grad()
def test_layers_return_what_they_returned(model: Any) -> None:
    layers = hf.vision_layers(hf.find_vision_encoder(model))
    kinds: list[type] = []
    for layer in layers:
        layer.register_forward_hook(lambda _m, _a, out: kinds.append(type(out)))
    model(images())
    stock = list(kinds)
    for layer in (None, 1, (0, 2)):
        kinds.clear()
        hf.apply(model, layer)(images())
        assert kinds == stock


@torch.no_grad()
def test_a_loop_over_layers_is_transformers_or_says_that_it_would_not_merge(model: Any) -> None:
    hf.apply(model, None)
    before = loop(model)
    hf.apply(model, 1)
    with pytest.raises(RuntimeError, match="layer 1: it merges tokens, and was called outside of its encoder"):
        loop(model)
    assert torch.equal(loop(hf.apply(model, None)), before)
    hf.remove(hf.apply(model, 2))
    hf.apply(model, None)
    assert torch.equal(loop(model), before)


@torch.no_grad()
def test_a_hook_changes_what_the_next_layer_sees(model: Any) -> None:
    hf.apply(model, 1)
    before = model(images()).last_hidden_state
    layer = hf.vision_layers(hf.find_vision_encoder(model))[1]

    def steer(_module: nn.Module, _args: Any, out: Any) -> Any:
        moved = first(out) + torch.linspace(0, 1, 32)
        return (moved, *out[1:]) if isinstance(out, tuple) else moved

    layer.register_forward_hook(steer)
    assert not torch.equal(model(images()).last_hidden_state, before)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("layer", [1, None])
def test_checkpointing_gives_the_same_gradients(model: Any, reentrant: bool, layer: int | None) -> None:
    hf.apply(model.train().double(), layer, refinement=None if layer is None else {"dropout": 0.0})
    encoder = hf.find_vision_encoder(model)
    runs: list[int] = []
    layer_one = hf.vision_layers(encoder)[1]
    norm = getattr(layer_one, "layer_norm2", None) or layer_one.layernorm_after
    norm.register_forward_pre_hook(lambda *_: runs.append(1))

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        runs.clear()
        model(images().double()).last_hidden_state.square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    assert len(runs) == 1 and (layer is None or any("refinement" in name for name in plain))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(gradients(), plain)
    assert len(runs) == 2 and model.is_gradient_checkpointing
    model.gradient_checkpointing_disable()
    torch.testing.assert_close(gradients(), plain)
    assert len(runs) == 1


def test_checkpointing_by_hand() -> None:
    """The gradient that reaches the refinement through the sizes alone."""
    model = FAMILIES["vit"]().train()
    hf.apply(model, 1, refinement={"dropout": 0.0})
    whole = functools.partial(checkpoint, model, use_reentrant=False)
    for run in (model, whole):
        model.zero_grad()
        run(images()).last_hidden_state[:, 0].square().sum().backward()
        assert all(p.grad is not None for p in model.layers[1].refinement.parameters()) if hasattr(model, "layers") else True


@torch.no_grad()
def test_without_merging_every_argument_is_transformers_own(model: Any) -> None:
    import copy

    stock = copy.deepcopy(model)
    hf.apply(model, None)
    cases: list[dict[str, Any]] = [
        {},
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"interpolate_pos_encoding": True},
        {"num_items_in_batch": 3} if not isinstance(model, transformers.CLIPVisionModel) or SELECTS else {},
    ]
    if SELECTS:
        cases += [{"output_hidden_states": [0, 2]}, {"output_hidden_states": -1}, {"output_hidden_states": []}]
    if isinstance(model, transformers.ViTModel):
        mask = torch.ones(2, 17, dtype=torch.long)
        mask[:, 5:9] = 0
        cases += [{"attention_mask": mask}] if HAS_MASK else [{"head_mask": torch.tensor([1.0, 0.0])}]
    for options in cases:
        if options.get("output_attentions"):
            for m in (stock, model):
                m.set_attn_implementation("eager")
        a, b = stock(images(), **options), model(images(), **options)
        assert same(a, b), options
        for name in ("hidden_states", "attentions"):
            left, right = getattr(a, name, None), getattr(b, name, None)
            assert (left is None) == (right is None)
            assert left is None or len(left) == len(right)
            for p, q in zip(left or (), right or (), strict=True):
                assert p is q is None or torch.equal(p, q), options
    assert len(stock(images(), return_dict=False)) == len(model(images(), return_dict=False))


@torch.no_grad()
def test_selected_hidden_states_of_a_merging_model(model: Any) -> None:
    hf.apply(model, 1)
    every = model(images(), output_hidden_states=True).hidden_states
    assert len(every) == 5
    for chosen, want in (([0, 2], {0, 2}), (-1, {4}), ([2, -5, 99], {0, 2})):
        found = model(images(), output_hidden_states=chosen).hidden_states
        assert [i for i, state in enumerate(found) if state is not None] == sorted(want)
        assert all(torch.equal(found[i], every[i]) for i in want)
    assert model(images(), output_hidden_states=[]).hidden_states is None
    assert model(images()).hidden_states is None


@pytest.mark.skipif(not HAS_MASK, reason="this transformers has no attention_mask there")
@pytest.mark.parametrize("how", ["eager", "sdpa"])
@torch.no_grad()
def test_a_mask_hides_tokens_before_and_after_the_merge(how: str) -> None:
    """Hidden patches are as if they were not there: what they hold changes nothing that the others see."""
    torch.manual_seed(0)
    model = FAMILIES["vit"]().eval()
    hf.apply(model, 1, attention=how)
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[:, 1:5] = 0
    whole = hf.apply(model, None, attention=how)(images(), attention_mask=mask).last_hidden_state
    stock = hf.remove(model)(images(), attention_mask=mask).last_hidden_state
    torch.testing.assert_close(whole, stock)
    hf.apply(model, 3, attention=how)  # nothing attends after the last layer's merge: prefix token as unmerged
    late = model(images(), attention_mask=mask).last_hidden_state
    torch.testing.assert_close(late[:, 0], stock[:, 0])
    hf.apply(model, 1, attention=how)
    seen = model(images(), attention_mask=mask).last_hidden_state
    assert seen.isfinite().all() and not torch.allclose(seen, model(images()).last_hidden_state)
    other = "sdpa" if how == "eager" else "eager"
    torch.testing.assert_close(hf.apply(model, 1, attention=other)(images(), attention_mask=mask).last_hidden_state, seen)


def test_the_trainer_trains_a_patched_model(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    config = transformers.ViTConfig(**SIZES, num_labels=5)
    model = transformers.ViTForImageClassification(config)
    hf.apply(model, 2, refinement=True)

    class Data(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, i: int) -> dict[str, Any]:
            return {"pixel_values": torch.rand(3, 32, 32), "labels": i % 5}

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for checkpointing in (False, True):
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_strategy="no", learning_rate=0.01,
            gradient_checkpointing=checkpointing, gradient_accumulation_steps=2, per_device_train_batch_size=2,
        )  # fmt: skip
        transformers.Trainer(model, arguments, train_dataset=Data()).train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any("refinement" in name for name in changed) and any("classifier" in name for name in changed)


@pytest.mark.filterwarnings("ignore")
def test_jit_trace_serves_other_batch_sizes(model: Any) -> None:
    hf.apply(model, (1, 2), refinement=True)
    model.config.return_dict = False
    traced = torch.jit.trace(model, images(1), strict=False)
    torch.testing.assert_close(traced(images(3))[0], model(images(3))[0])


@torch.no_grad()
def test_tokens_off_the_grid_are_refused_with_both_numbers(model: Any) -> None:
    encoder = hf.find_vision_encoder(model)
    prefix = 0 if isinstance(model, transformers.SiglipVisionModel) else 1
    encoder.embeddings.register_forward_hook(lambda _m, _a, out: torch.cat((out, out[:, :3]), dim=1))
    assert hf.apply(model, None)(images()).last_hidden_state.shape[1] == prefix + 19
    with pytest.raises(ValueError, match=rf"{prefix + 16} tokens in all, got {prefix + 19}"):
        hf.apply(model, 1)(images())


def test_wrapped_models_are_refused_wherever_the_wrapper_is() -> None:
    class Engine(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

    for wrapped in (nn.DataParallel(FAMILIES["vit"]()), Engine(nn.DataParallel(FAMILIES["vit"]()))):
        with pytest.raises(TypeError, match=r"DataParallel; call fpet\.huggingface\.apply before wrapping"):
            hf.apply(wrapped, 1, refinement=True)


@pytest.mark.parametrize("hooked_first", [True, False])
@torch.no_grad()
def test_accelerates_hooks(model: Any, hooked_first: bool) -> None:
    accelerate = pytest.importorskip("accelerate")
    if isinstance(model, transformers.SiglipVisionModel):
        pytest.skip("accelerate can't offload SigLIP's head, patched or not")
    hf.apply(model, 1, refinement={"bits": 32})
    expected = model(images()).last_hidden_state
    if hooked_first:
        refinement = hf.vision_layers(hf.find_vision_encoder(model))[1].refinement
        hf.remove(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    if hooked_first:
        hf.apply(model, 1, refinement=refinement)
    torch.testing.assert_close(model(images()).last_hidden_state, expected)


@torch.no_grad()
def test_the_order_of_things_with_fpet() -> None:
    """fpet's own doors say where transformers' models go."""
    model = FAMILIES["vit"]().eval()
    with pytest.raises(TypeError, match=r"call fpet\.huggingface\.apply"):
        fpet.apply(model, 1)
    classes = [type(m) for m in model.modules()]
    fpet.remove(hf.apply(model, 1))
    assert [type(m) for m in model.modules()] == classes
