"""Several tasks in one batch: each image gets what its own task's model alone gives it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import fpet
from fpet import comparators
from fpet.serving import MultiTask

SIZES = dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2)
METHODS = {
    "none": {}, "adaptformer": {}, "bi-adaptformer": {"hidden_dim": 8}, "lora": {}, "bi-lora": {"hidden_dim": 8},
    "repadapter": {"hidden_dim": 4}, "ssf": {}, "fact-tt": {"hidden_dim": 4},
}  # fmt: skip


def bare(classes: int = 3, **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=classes, **(SIZES | arguments)).eval()


def tuned(method: str, seed: int, classes: int = 3, layer: Any = 1, arguments: Any = None, **more: Any) -> nn.Module:
    """A model whose tuned parameters are far from where they start."""
    model = bare(**(more | {"classes": 3}))
    model.reset_classifier(classes)
    fpet.add_adapters(model, method, **(METHODS.get(method, {}) if arguments is None else arguments))
    fpet.apply(model, layer, refinement=None if layer is None else True)
    fpet.freeze(model).eval()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=g), alpha=0.3)
    return model


def images(n: int) -> Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(n))


def assert_each_is_its_own(multi: MultiTask, single: dict[str, nn.Module], names: list[str]) -> None:
    x = images(len(names))
    with torch.no_grad():
        found = multi(x, names)
        assert len(found) == len(names)
        for i, name in enumerate(names):
            torch.testing.assert_close(found[i], single[name](x[i : i + 1])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [None, 1, (0, 2)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_mixed_batch_is_what_each_model_alone_computes(method: str, layer: Any, tmp_path: Path) -> None:
    single = {
        name: tuned(method, seed, classes, layer) for seed, (name, classes) in enumerate({"a": 3, "b": 5, "c.d": 3}.items())
    }
    for name, model in single.items():
        fpet.save(model, tmp_path / name)
    loaded = {name: fpet.load(bare(), tmp_path / name).eval() for name in single}  # quantised weights are stored rounded
    multi = MultiTask(bare(), {name: tmp_path / name for name in single})
    assert_each_is_its_own(multi, loaded, ["b", "a", "c.d", "b", "a", "a"])
    assert_each_is_its_own(multi, loaded, ["c.d"])
    assert [len(s) for s in multi(images(2), ["b", "c.d"])] == [5, 3]
    a, b = (multi(images(1), [name])[0] for name in ("a", "c.d"))
    assert not torch.allclose(a, b, atol=1e-2), "tasks that differ"


@pytest.mark.parametrize("method", ["vpt-shallow", "vpt-deep"])
def test_prompts(method: str) -> None:
    single = {name: tuned(method, seed, arguments={"hidden_dim": 2}) for seed, name in enumerate("ab")}
    multi = MultiTask(bare(), single)
    assert_each_is_its_own(multi, single, ["b", "a", "b"])
    assert multi.model.num_prefix_tokens == 3
    with pytest.raises(ValueError, match="expected the same number of prompts"):
        MultiTask(bare(), single | {"c": tuned("lora", 3)})


def test_methods_may_differ() -> None:
    single = {method: tuned(method, seed, 2 + seed) for seed, method in enumerate(METHODS)}
    multi = MultiTask(bare(), single)
    names = list(METHODS)
    assert_each_is_its_own(multi, single, names[::-1] + names[:3])
    for name in names:
        assert_each_is_its_own(multi, single, [name, name])


def test_a_group_of_one_task_is_bitwise_the_single_model() -> None:
    single = {"a": tuned("lora", 1), "b": tuned("adaptformer", 2)}
    multi = MultiTask(bare(), single)
    with torch.no_grad():
        for name, model in single.items():
            assert torch.equal(torch.stack(multi(images(4), [name] * 4)), model(images(4)))


def test_the_refinement_is_each_tasks_own() -> None:
    single = {name: tuned("none", 1) for name in "ab"}
    single["b"].head.load_state_dict(single["a"].head.state_dict())
    for p in single["b"].blocks[1].refinement.parameters():
        p.data.normal_(generator=torch.Generator().manual_seed(7))
    assert not torch.equal(single["a"](images(1)), single["b"](images(1))), "the refinement decides"
    assert_each_is_its_own(MultiTask(bare(), single), single, ["a", "b", "a"])
    fpet.apply(single["b"], 1, refinement=False)
    assert_each_is_its_own(MultiTask(bare(), single), single, ["a", "b", "a"])


def test_the_backbone_is_shared_and_runs_once() -> None:
    model = bare()
    before, own = copy.deepcopy(model.state_dict()), {p.data_ptr() for p in model.parameters()}
    multi = MultiTask(model, {name: tuned("lora", seed) for seed, name in enumerate("abc")})
    backbone = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("head"))
    assert sum(p.numel() for p in multi.parameters() if p.data_ptr() in own) == backbone
    each = fpet.count_parameters(tuned("lora", 0))
    assert sum(p.numel() for p in multi.parameters()) == backbone + 3 * each.trainable
    calls: list[int] = []
    multi.model.blocks[0].attn.qkv.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    multi(images(6), list("abcabc"))
    assert calls == [6]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(model) is type(bare()) and not hasattr(model, "adapter_config")


def test_average_pooling_counts_each_images_sizes() -> None:
    arguments = dict(class_token=False, global_pool="avg")
    single = {name: tuned("adaptformer", seed, **arguments) for seed, name in enumerate("ab")}
    assert_each_is_its_own(MultiTask(bare(**arguments), single), single, ["b", "a", "b"])


def test_threads_share_a_model() -> None:
    single = {name: tuned("lora", seed) for seed, name in enumerate("ab")}
    multi = MultiTask(bare(), single)
    batches = [[("ab"[(i + j) % 2]) for j in range(1 + i % 5)] for i in range(24)]
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        expected = [multi(images(len(names)), names) for names in batches]

        def call(names: list[str]) -> list[Tensor]:
            with torch.no_grad():
                return multi(images(len(names)), names)

        for found, wanted in zip(pool.map(call, batches), expected, strict=True):
            assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))


def test_moves_and_is_copied() -> None:
    multi = MultiTask(bare(), {"a": tuned("fact-tt", 1), "b": tuned("bi-lora", 2)})
    expected = multi(images(2), ["a", "b"])
    twin = copy.deepcopy(multi)
    assert all(torch.equal(a, b) for a, b in zip(twin(images(2), ["a", "b"]), expected, strict=True))
    double = multi.double()(images(2).double(), ["a", "b"])
    for found, wanted in zip(double, expected, strict=True):
        torch.testing.assert_close(found.float(), wanted, rtol=1e-3, atol=1e-4)
    assert multi(images(0), []) == []


# --- refusals ------------------------------------------------------------------------------------------------------------


def folded() -> nn.Module:
    return fpet.fold(tuned("lora", 1))


def other_backbone() -> nn.Module:
    model = tuned("lora", 1)
    model.blocks[0].mlp.fc1.weight.data.add_(1)
    return model


def comparator() -> nn.Module:
    return comparators.apply_reduction(tuned("lora", 1, layer=None), "avg-pool")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (folded, "'b' has another backbone, or weights folded into it"),
        (other_backbone, "'b' has another backbone, or weights folded into it"),
        (comparator, "'b' reduces its tokens by a comparator"),
        (lambda: tuned("full", 1), "'b' was tuned by 'full', which changes the backbone"),
        (lambda: tuned("bitfit", 1), "'b' was tuned by 'bitfit', which changes the backbone"),
        (lambda: tuned("lora", 1, layer=2), r"'a' and 'b' merge differently: .*\(1,\).*\(2,\)"),
        (lambda: tuned("lora", 1, layer=None), "'a' and 'b' merge differently"),
    ],
)
def test_what_can_not_share_a_backbone_is_refused(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=f"tasks: {message}"):
        MultiTask(bare(), {"a": tuned("lora", 0), "b": make()})


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    fpet.save(other_backbone(), tmp_path / "other")
    fpet.save(tuned("full", 1), tmp_path / "full")
    with pytest.raises(ValueError, match=r"tasks: 'x' does not fit: model: .* was tuned on the backbone"):
        MultiTask(bare(), {"x": tmp_path / "other"})
    with pytest.raises(ValueError, match="tasks: 'x' was tuned by 'full'"):
        MultiTask(bare(), {"x": tmp_path / "full"})
    with pytest.raises(OSError, match="nowhere"):
        MultiTask(bare(), {"x": tmp_path / "nowhere"})


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="tasks: expected at least one"):
        MultiTask(bare(), {})
    with pytest.raises(ValueError, match="model: expected a bare backbone"):
        MultiTask(folded_and_merged(), {"a": tuned("lora", 0)})
    with pytest.raises(TypeError, match="one head, got VisionTransformerDistilled with 2"):
        MultiTask(timm.create_model("deit_tiny_distilled_patch16_224", depth=1), {"a": tuned("lora", 0)})
    multi = MultiTask(bare(), {"a": tuned("lora", 0)})
    with pytest.raises(ValueError, match="tasks: expected a name for each of 2 images, got 1"):
        multi(images(2), ["a"])
    with pytest.raises(ValueError, match="tasks: expected some of a, got 'b', 'c'"):
        multi(images(2), ["c", "b"])


def folded_and_merged() -> nn.Module:
    return fpet.apply(folded(), 1)
