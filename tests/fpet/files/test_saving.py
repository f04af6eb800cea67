"""fpet.save and fpet.load; import of the two published formats."""

import copy
import json
import os
import struct

import pytest
import safetensors.torch
import timm
import torch
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer

import fpet
from fpet.adapters import METHODS, PETModule
from fpet.files.saving import backbone_hash
from fpet.layers.quantize import QuantizedLinear, levels, packed_size


def backbone(seed=0, **options):
    torch.manual_seed(seed)
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 7}
    return VisionTransformer(**{**arguments, **options}).eval()


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def tuned(method, merge=(0, 2), num_classes=5, shake=0.1, **options):
    """A backbone that was tuned: everything trainable moved, the rest as backbone() made it."""
    model = backbone()
    model.reset_classifier(num_classes)
    small = {"hidden_dim": 3} if method.startswith("vpt") else {}
    fpet.add_adapters(model, method, **{**small, **options})
    if merge:
        fpet.apply(model, merge, refinement={"hidden_dim": 8, "scale": 0.5}, similarity="dot", proportional_attention="mask")
    fpet.freeze(model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * shake)
    return model.eval()


def snapshot(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return [type(m) for m in model.modules()], state, sorted(model.__dict__)


def assert_unchanged(model, before):
    types, state, attributes = snapshot(model)
    assert (types, attributes) == (before[0], before[2])
    assert state.keys() == before[1].keys()
    for name, value in state.items():
        assert torch.equal(value, before[1][name]), name


def header(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["fpet"])


def rewrite(path, change, **more):
    """The file with another header, its own tensors."""
    tensors = safetensors.torch.load_file(path)
    content = header(path)
    change(content)
    safetensors.torch.save_file({**tensors, **more}, path, metadata={"fpet": json.dumps(content)})


# --- our own files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", [(), (0, 2)])
@pytest.mark.parametrize("method", METHODS)
def test_round_trip(method, merge, tmp_path):
    model = tuned(method, merge)
    fpet.save(model, tmp_path / "tuned")
    loaded = fpet.load(backbone(), tmp_path / "tuned")
    assert loaded.adapter_config == model.adapter_config
    assert getattr(loaded, "fpet_config", None) == getattr(model, "fpet_config", None)
    assert not loaded.training
    torch.testing.assert_close(loaded(images()), model(images()), rtol=1e-5, atol=1e-5)
    quantized = {f"{n}.weight" for n, m in loaded.named_modules() if isinstance(m, QuantizedLinear)}
    theirs = model.state_dict()
    for name, value in loaded.state_dict().items():
        if name not in quantized:
            assert torch.equal(value, theirs[name]), name
    roles = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in fpet.freeze(loaded).named_parameters()} == roles


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_quantised_weights_are_packed_and_training_can_go_on(bits, tmp_path):
    model = tuned("lora", bits=bits, hidden_dim=5)  # 5 · 24 codes of one bit fill whole bytes, the next line's do not
    model.blocks[0].refinement = fpet.KeyRefinement(9, 3, bits=bits)
    model.blocks[0].refinement.requires_grad_(True)
    fpet.apply(model, None)
    fpet.save(model, tmp_path / "tuned")
    stored = safetensors.torch.load_file(tmp_path / "tuned")
    name = "blocks.0.attn.lora_q.adapter_down.weight"
    assert stored[name].dtype == torch.uint8
    assert stored[name].numel() == packed_size(5 * 24, bits) == 5 * 24 * bits // 8 + 8
    assert stored["blocks.0.refinement.adapter_down.weight"].numel() == -(-27 * bits // 8) + 8
    loaded = fpet.freeze(fpet.load(backbone(), tmp_path / "tuned"))
    weights = dict(loaded.named_parameters())
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            twin = loaded.get_submodule(path)
            torch.testing.assert_close(twin.quantized_weight(), module.quantized_weight(), rtol=1e-5, atol=1e-6)
    loaded(images()).square().sum().backward()
    assert weights[name].grad.abs().max() > 0
    fpet.save(loaded, tmp_path / "again")
    again = safetensors.torch.load_file(tmp_path / "again")
    for key, value in stored.items():
        assert torch.equal(again[key][:-8], value[:-8]) if value.dtype == torch.uint8 else torch.equal(again[key], value)


def test_a_weight_whose_codes_cannot_be_trained_on_is_stored_as_it_is(tmp_path):
    model = tuned("bi-lora", merge=())
    with torch.no_grad():
        model.blocks[0].attn.lora_q.adapter_down.weight.copy_(torch.tensor(1e-8).expand(32, 24))
        model.blocks[0].attn.lora_q.adapter_down.weight[0, 0] = -1e-8  # every code of one kind, but a std above zero
    before = model(images())
    fpet.save(model, tmp_path / "tuned")
    torch.testing.assert_close(fpet.load(backbone(), tmp_path / "tuned")(images()), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype, tmp_path):
    model = tuned("bi-lora").to(dtype)
    fpet.save(model, tmp_path / "tuned")
    loaded = fpet.load(backbone().to(dtype), tmp_path / "tuned")
    torch.testing.assert_close(loaded(images().to(dtype)), model(images().to(dtype)), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="was tuned on the backbone"):
        fpet.load(backbone(), tmp_path / "tuned")


def test_file_is_small_and_says_what_it_is(tmp_path):
    model = tuned("bi-adaptformer")
    fpet.save(model, tmp_path / "tuned")
    content = header(tmp_path / "tuned")
    assert content["adapter"] == {"method": "bi-adaptformer", "hidden_dim": 32, "scale": 1.0, "bits": 1, "dropout": 0.1}
    assert content["merge"]["layers"] == [0, 2]
    assert content["merge"]["similarity"] == "dot"
    assert content["num_classes"] == 5
    described = {k: v for k, v in content["backbone"].items() if k != "tensors"}
    assert described == {
        "name": "VisionTransformer", "tag": None, "image_size": [32, 32], "patch_size": [8, 8], "channels": 3, "width": 24,
        "depth": 3, "global_pool": "token", "dtype": "float32", "sha256": backbone_hash(backbone(), "bi-adaptformer"),
    }  # fmt: skip
    assert len(content["backbone"]["tensors"]) == len(dict(backbone().named_parameters())) - 2  # the head's
    count = fpet.count_parameters(model)
    stored = safetensors.torch.load_file(tmp_path / "tuned")
    assert sum(t.numel() * t.element_size() for t in stored.values()) == count.adapter_bytes + 4 * count.head


def test_named_backbone_and_distillation(tmp_path):
    def small(seed):
        torch.manual_seed(seed)
        return timm.create_model("deit_tiny_distilled_patch16_224", depth=2, embed_dim=24, num_heads=2, img_size=32).eval()

    model = fpet.apply(fpet.add_adapters(small(0), "lora"), 0)
    model.head_dist.weight.data.add_(1.0)
    fpet.save(model, tmp_path / "tuned")
    assert header(tmp_path / "tuned")["backbone"]["name"] == "deit_tiny_distilled_patch16_224"
    assert torch.equal(fpet.load(small(0), tmp_path / "tuned")(images()), model(images()))


@pytest.mark.parametrize("other", [backbone(seed=1), backbone(embed_dim=48), backbone(qk_norm=True)])
def test_refuses_another_backbone(other, tmp_path):
    fpet.save(tuned("lora"), tmp_path / "tuned")
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"model: .* was tuned on the backbone VisionTransformer with frozen weights"):
        fpet.load(other, tmp_path / "tuned")
    assert_unchanged(other, before)


@pytest.mark.parametrize("method", ["full", "linear", "bitfit"])
def test_what_was_tuned_does_not_count_as_backbone(method, tmp_path):
    fpet.save(tuned(method), tmp_path / "tuned")
    moved = backbone()
    with torch.no_grad():
        moved.head.bias.add_(1.0)
    assert fpet.load(moved, tmp_path / "tuned").adapter_config.method == method


def test_refuses_a_model_that_is_tuned_already(tmp_path):
    fpet.save(tuned("lora"), tmp_path / "tuned")
    for model in (fpet.add_adapters(backbone(), "none"), fpet.apply(backbone(), 0)):
        before = snapshot(model)
        with pytest.raises(ValueError, match="expected a bare backbone"):
            fpet.load(model, tmp_path / "tuned")
        assert_unchanged(model, before)


def every_way_to_damage():
    def truncate(path):
        path.write_bytes(path.read_bytes()[:-5])

    def flip(path):
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)

    def flip_length(path):
        data = bytearray(path.read_bytes())
        data[6] ^= 0xFF
        path.write_bytes(data)

    def foreign(path):
        safetensors.torch.save_file({"a": torch.ones(2)}, path)

    yield "empty", lambda path: path.write_bytes(b""), "damaged or not safetensors"
    yield "text", lambda path: path.write_text("not a model\n" * 20), "damaged or not safetensors"
    yield "truncated", truncate, "damaged or not safetensors"
    yield "bit flipped", flip, "its tensors are not those that were written"
    yield "length flipped", flip_length, "damaged or not safetensors"
    yield "foreign", foreign, "safetensors of another kind"
    yield "later version", lambda path: rewrite(path, lambda h: h.update(version=3)), "expected format version 1 or 2, got 3"
    yield "no version", lambda path: rewrite(path, lambda h: h.pop("version")), "the header of .* is damaged"
    yield "no merge", lambda path: rewrite(path, lambda h: h.pop("merge")), "the header of .* is damaged"
    yield "odd field", lambda path: rewrite(path, lambda h: h["adapter"].update(rank=3)), "the header of .* is damaged"
    yield "other layer", lambda path: rewrite(path, lambda h: h["merge"].update(layers=[1, 7])), "layer: expected block indices"
    yield "lost refinement", lambda path: rewrite(path, lambda h: h["merge"].update(refinement={})), "has .*refinement"
    yield "other rank", lambda path: rewrite(path, lambda h: h["adapter"].update(hidden_dim=4)), "of shape"
    yield "other method", lambda path: rewrite(path, lambda h: h["adapter"].update(method="ssf")), "the method 'ssf' has none"
    yield "shape", lambda path: rewrite(path, lambda h: h["packed"].popitem()), "of shape"


@pytest.mark.parametrize(("damage", "message"), [pytest.param(d, m, id=name) for name, d, m in every_way_to_damage()])
def test_refuses_damaged_files_and_leaves_the_model_alone(damage, message, tmp_path):
    path = tmp_path / "tuned"
    fpet.save(tuned("bi-lora"), path)
    damage(path)
    model = backbone()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        fpet.load(model, path)
    assert_unchanged(model, before)


def test_missing_file_and_wrong_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fpet.load(backbone(), tmp_path / "nowhere")
    with pytest.raises(TypeError, match="ResNet"):
        fpet.save(timm.create_model("resnet10t"), tmp_path / "tuned")


def test_writing_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "tuned"
    fpet.save(tuned("lora"), path)
    before = path.read_bytes()

    def crash(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="disk full"):
        fpet.save(tuned("ssf"), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["tuned"]


def test_saving_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        fpet.save(tuned("lora"), tmp_path / "tuned")
    finally:
        os.umask(before)
    assert (tmp_path / "tuned").stat().st_mode & 0o777 == 0o640


# --- published formats -----------------------------------------------------------------------------------------------
# Written here byte by byte from the formats' description, independently of fpet.layers.quantize.pack.


def published_layer(layer, generator, bits=1):
    """Codes of a random weight, and any mean and std, for one layer: its bytes, and the weight that they stand for."""
    numel = layer.weight.numel()
    z = torch.randn(numel, generator=generator)
    z = (z - z.mean()) / z.std()
    codes = (z[:, None] - torch.tensor(levels(bits))).abs().argmin(1).tolist()
    mean, std = torch.randn(2, generator=generator).mul(0.02).tolist()
    std = abs(std) + 0.01
    data = bytearray()
    for start in range(0, numel, 8 // bits):
        byte = 0
        for j, code in enumerate(codes[start : start + 8 // bits]):
            byte += code * (2**bits) ** j
        data.append(byte)
    weight = torch.tensor([levels(bits)[code] for code in codes]).view(layer.weight.shape) * std + mean
    return bytes(data) + struct.pack("<ff", mean, std), weight


def published_model(method, bits=1, merge=None, classes=5):
    model = backbone(num_classes=classes)
    if merge is not None:  # before the adapters: the order of the bytes must not depend on it
        fpet.apply(model, merge, refinement=True)
    return fpet.add_adapters(model, method, hidden_dim=8, bits=bits)


def layers_in_order(model):
    slots = ("attn.lora_q", "attn.lora_v", "adapter_mlp", "refinement")
    names = [f"blocks.{i}.{slot}.adapter_{end}" for i in range(3) for slot in slots for end in ("down", "up")]
    modules = dict(model.named_modules())
    return {name: modules[name] for name in names if isinstance(modules.get(name), QuantizedLinear)}


def published_file(model, head):
    generator = torch.Generator().manual_seed(3)
    data, weights = b"", {}
    for name, layer in layers_in_order(model).items():
        part, weights[name] = published_layer(layer, generator, layer.bits)
        data += part
    if head == "plain":
        weight, bias = torch.randn(5, 24, generator=generator), torch.randn(5, generator=generator)
        data += struct.pack("<120f", *weight.flatten().tolist()) + struct.pack("<5f", *bias.tolist())
    elif head == "binary":
        part, weight = published_layer(model.head, generator)
        data, bias = data + part, torch.zeros(5)
    else:
        return data, weights, None, None
    return data, weights, weight, bias


@pytest.mark.parametrize("head", ["plain", "binary"])
@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("method", ["bi-adaptformer", "bi-lora"])
def test_import_petl_vit(method, bits, head, tmp_path):
    model = published_model(method, bits)
    data, weights, weight, bias = published_file(model, head)
    (tmp_path / "x.bin").write_bytes(data)
    assert fpet.import_petl_vit(model, tmp_path / "x.bin") is model
    assert len(weights) == {"bi-adaptformer": 6, "bi-lora": 12}[method]
    for name, expected in weights.items():
        torch.testing.assert_close(model.get_submodule(name).quantized_weight(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(model.head.weight, weight, rtol=1e-6, atol=1e-7)
    assert torch.equal(model.head.bias, bias)


@pytest.mark.parametrize("bits", [1, 32])
@pytest.mark.parametrize("method", ["adaptformer", "lora"])
def test_import_authors(method, bits, tmp_path):
    model = published_model(method, bits, merge=1)
    data, weights, _, _ = published_file(model, None)
    assert "blocks.1.refinement.adapter_up" in weights
    (tmp_path / "cifar.bin").write_bytes(data)
    names = [n for n, p in model.named_parameters() if n.startswith("head.") or ("adapter" in n and n[:-7] not in weights)]
    state = {name: torch.randn(model.state_dict()[name].shape) for name in names}
    torch.save(state, tmp_path / "cifar.pth")
    assert len(state) == 2 + (0 if bits == 1 else {"adaptformer": 6, "lora": 12}[method])
    fpet.import_authors(model, tmp_path / "cifar")
    for name, expected in weights.items():
        torch.testing.assert_close(model.get_submodule(name).quantized_weight(), expected, rtol=1e-5, atol=1e-7)
    for name, expected in state.items():
        assert torch.equal(model.state_dict()[name], expected)


def test_imports_refuse_and_leave_the_model_alone(tmp_path):
    model = published_model("bi-lora", merge=1)
    data, _, _, _ = published_file(model, None)
    good = {name: p.detach().clone() for name, p in model.named_parameters() if name.startswith("head.")}
    stem = tmp_path / "x"

    def attempt(message, data=data, state=good, error=ValueError):
        for suffix, write in ((".bin", lambda p: p.write_bytes(data)), (".pth", lambda p: torch.save(state, p))):
            path = stem.with_suffix(suffix)
            path.unlink(missing_ok=True)
            if (data if suffix == ".bin" else state) is not None:
                write(path)
        before = snapshot(model)
        with pytest.raises(error, match=message):
            fpet.import_authors(model, stem)
        assert_unchanged(model, before)

    attempt(r"expected \d+ bytes of 14 quantised layers, got", data=data[:-1])
    attempt(r"expected \d+ bytes of 14 quantised layers, got", data=data + b"\0")
    attempt("is empty", data=b"")
    attempt("x.bin", data=None, error=FileNotFoundError)
    attempt("x.pth", state=None, error=FileNotFoundError)
    attempt("damaged at blocks.0.attn.lora_q.adapter_down", data=data.replace(data[24:32], b"\xff" * 8, 1))
    attempt("lacks .*head.bias", state={"head.weight": good["head.weight"]})
    attempt("has .*head.scale", state={**good, "head.scale": torch.ones(1)})
    attempt("expected head.weight of shape", state={**good, "head.weight": torch.ones(5, 23)})
    attempt("expected finite numbers", state={**good, "head.bias": torch.full((5,), float("nan"))})
    attempt("expected a state_dict", state=[1, 2])
    stem.with_suffix(".pth").write_bytes(b"no pickle")
    with pytest.raises(ValueError, match="damaged or no state_dict"):
        fpet.import_authors(model, stem)


def test_import_petl_vit_refuses(tmp_path):
    model = published_model("bi-lora")
    data, _, _, _ = published_file(model, "plain")
    path = tmp_path / "x.bin"
    path.write_bytes(data[:-4])
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"bytes of adapters and 500 of head \(or 23 of a one-bit head\) for 5 classes, got"):
        fpet.import_petl_vit(model, path)
    path.write_bytes(data[:-4] + struct.pack("<f", float("inf")))
    with pytest.raises(ValueError, match="expected finite numbers"):
        fpet.import_petl_vit(model, path)
    assert_unchanged(model, before)
    for other, message in (
        (backbone(), "expected quantised adapters"),
        (published_model("lora", bits=8), "expected 1, 2 or 4 bits"),
        (fpet.add_adapters(backbone(), "bi-lora", hidden_dim=1, bits=1), "expected .* bytes of adapters"),
        (fpet.add_adapters(backbone(embed_dim=20), "bi-lora", hidden_dim=1), "does not fill whole bytes"),
        (fpet.add_adapters(backbone(num_classes=0), "bi-lora", hidden_dim=1), "expected a linear head, got Identity"),
    ):
        with pytest.raises(ValueError, match=message):
            fpet.import_petl_vit(other, path)


def test_loading_needs_no_second_copy_of_the_backbone(tmp_path):
    # What is checked before the model is touched has no memory: the rehearsal's parameters are on the meta device.
    fpet.save(tuned("lora"), tmp_path / "tuned")
    model = backbone()
    twin = fpet.files.saving._meta_copy(model)
    assert {p.device.type for p in twin.parameters()} == {"meta"}
    assert twin.state_dict().keys() == model.state_dict().keys()
    kept = copy.deepcopy(model.state_dict())
    fpet.load(model, tmp_path / "tuned")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in kept.items() if not name.startswith("head."))
    assert any(isinstance(m, PETModule) for m in model.modules())
