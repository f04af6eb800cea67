"""The interpreter itself, on programs of a few lines: what it computes, what it finds, what it counts."""

from __future__ import annotations

import numpy as np
import pytest

from .emulate import INSTRUCTION_MODULES
from .machine import GLOBAL_BASE, Machine
from .memory import Fault, Memory
from .program import parse

assert INSTRUCTION_MODULES


def machine_of(
    body: str, data: np.ndarray, threads: int = 64, programs: int = 1, written: bool = True
) -> tuple[Machine, np.ndarray]:
    """Runs ``body`` with %rd0 the address of ``data``, %rd1 that of the thread's element, %r1 the thread."""
    ptx = f"""
    .visible .entry kernel(.param .u64 kernel_param_0) .reqntid {threads}
    {{
        .reg .b32 %r<9>;
        ld.param.b64 %rd0, [kernel_param_0];
        mov.u32 %r1, %tid.x;
        mul.wide.u32 %rd2, %r1, 4;
        add.s64 %rd1, %rd0, %rd2;
        shl.b32 %r2, %r1, 2;
        add.s32 %r3, %r2, global_smem;
        {body}
        ret;
    }}
    """
    machine = Machine(parse(ptx))
    memory = Memory("global", data.nbytes + 4096, GLOBAL_BASE, machine.clock, machine.findings)
    address = memory.place(data.view(np.uint8).reshape(-1), written)
    machine.launch(memory, {"kernel_param_0": address}, (programs, 1, 1), 4 * threads)
    start = address - GLOBAL_BASE
    return machine, memory.bytes[start : start + data.nbytes].view(data.dtype)


def found(body: str, **options) -> list[str]:
    return list(machine_of(body, np.arange(64, dtype=np.float32), **options)[0].findings.counts)


def test_nan_of_maximum():
    """max drops NaN; max.NaN keeps it; a select by ≤ keeps it."""
    data = np.full(64, np.nan, np.float32)
    for line, nan in (
        ("max.f32 %r5, %r4, 0f00000000;", False),
        ("max.NaN.f32 %r5, %r4, 0f00000000;", True),
        ("setp.le.f32 %p1, %r4, 0f00000000; selp.f32 %r5, 0f00000000, %r4, %p1;", True),
        ("setp.gtu.f32 %p1, %r4, 0f00000000; selp.f32 %r5, %r4, 0f00000000, %p1;", True),
        ("setp.gt.f32 %p1, %r4, 0f00000000; selp.f32 %r5, %r4, 0f00000000, %p1;", False),
    ):
        _, out = machine_of(f"ld.global.b32 %r4, [%rd1]; {line} st.global.b32 [%rd1], %r5;", data.copy())
        assert np.isnan(out).all() == nan, line


def test_numbers():
    rng = np.random.default_rng(0)
    data = rng.standard_normal(64).astype(np.float32)
    body = """
        ld.global.b32 %r4, [%rd1];
        cvt.rn.bf16x2.f32 %r5, %r4, %r4;
        mov.b32 {%rs1, %rs2}, %r5;
        cvt.f32.bf16 %r6, %rs2;
        sub.f32 %r7, %r4, %r6;
        shfl.sync.bfly.b32 %r8, %r7, 1, 31, -1;
        st.global.b32 [%rd1], %r8;
    """
    _, out = machine_of(body, data.copy())
    import torch

    rest = data - torch.from_numpy(data).bfloat16().float().numpy()
    assert np.array_equal(out, rest.reshape(-1, 2)[:, ::-1].reshape(-1))


SHARE = "st.shared.b32 [%r3], %r1; {barrier} xor.b32 %r4, %r2, 128; add.s32 %r4, %r4, global_smem; ld.shared.b32 %r5, [%r4];"
COPY = "mov.b32 %r5, global_smem; cp.async.ca.shared.global [%r3], [%rd1], 0x4; cp.async.commit_group; {wait} ld.shared.b32 %r4, [%r3];"


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (SHARE.format(barrier="bar.sync 0;"), None),
        (SHARE.format(barrier=""), "race: read after another warp's write"),
        ("st.shared.b32 [global_smem], %r1;", "one store writes different values to one address"),
        (COPY.format(wait="cp.async.wait_group 0;"), None),
        (COPY.format(wait="cp.async.wait_group 1;"), "read of a copy under way"),
        ("ld.shared.b32 %r4, [%r3];", "read of what nothing wrote"),
        ("ld.global.b32 %r4, [%rd1 + 256];", "read outside of any tensor"),
    ],
)
def test_findings(body, what):
    notes = found(body)
    assert (not notes) if what is None else any(what in note for note in notes), notes


def test_findings_between_programs():
    assert not found("st.global.b32 [%rd1], %r1;")
    same = "mov.u32 %r4, 7; st.global.b32 [%rd1], %r4;"
    assert any("the same value" in note for note in found(same, programs=2))
    other = "mov.u32 %r4, %ctaid.x; st.global.b32 [%rd1], %r4;"
    assert any("reads or writes" in note for note in found(other, programs=2))
    handed_on = "ld.global.b32 %r4, [%rd1]; add.s32 %r4, %r4, 1; st.global.b32 [%rd1], %r4;"
    assert any("another program" in note for note in found(handed_on, programs=2))


def test_uninitialised_memory():
    assert any("nothing wrote" in note for note in found("ld.global.b32 %r4, [%rd1];", written=False))


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("st.global.b32 [%rd1 + 256], %r1;", "outside of any tensor"),
        ("ld.global.b32 %r4, [%rd1 + 2];", "misaligned"),
        ("setp.lt.u32 %p1, %r1, 5; @%p1 bra $end; $end: ;", "not all threads"),
        ("setp.lt.u32 %p1, %r1, 5; @%p1 bar.sync 0;", "not all threads"),
        ("add.s32 %r4, %r7, 1;", "before it is written"),
        ("tanh.approx.f32 %r4, %r1;", "unknown instruction"),
    ],
)
def test_faults(body, why):
    with pytest.raises(Fault, match=why):
        found(body)


def test_counts():
    """Two loads asked for together are one round trip; a load whose address was loaded is another."""
    together = "ld.global.b32 %r4, [%rd1]; ld.global.b32 %r5, [%rd0]; add.s32 %r4, %r4, %r5; st.global.b32 [%rd1], %r4;"
    machine, _ = machine_of(together, np.arange(64, dtype=np.int32))
    assert machine.counts["round trips"] == 1
    assert (machine.counts["bytes loaded"], machine.counts["bytes stored"]) == (512, 256)
    chained = "ld.global.b32 %r4, [%rd0]; mul.wide.u32 %rd3, %r4, 4; add.s64 %rd3, %rd3, %rd0; ld.global.b32 %r5, [%rd3]; add.s32 %r5, %r5, 1;"
    machine, _ = machine_of(chained, np.arange(64, dtype=np.int32))
    assert machine.counts["round trips"] == 2
    machine, _ = machine_of("bar.sync 0; bar.sync 0;", np.arange(64, dtype=np.int32), programs=3)
    assert (machine.counts["barriers"], machine.counts["programs"]) == (6, 3)
