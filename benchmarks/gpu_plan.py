"""What to do with a GPU that is there for minutes: ``make gpu-prepare``, then gpu-correct, gpu-tables, gpu-model, gpu-tune.

prepare  where nvcc is, without a GPU: the operators' libraries and the C++ tests for one architecture, with the commit and the
         photograph, into build/gpu. Carry that folder along: the others install from it; where it is missing they build it.
correct  the doctor; the C++ tests; four tools of compute-sanitizer over some of their cases, beside the operators' tests.
tables   times of bdm_merge as graph replays, cuda and triton, then eager and compiled PyTorch beside them; a profile of the two
         kernels of short grids.
model    whole models, inference and training; the memory of fpet tables as PyTorch's allocator counts it.
tune     launch configurations of the Triton kernels.

Steps are ordered by what is wanted first. Each has a limit, the whole ends in --minutes, and then it says what was done and
what was not. Two files come out: gpu-TARGET.txt, all output, and gpu-TARGET.jsonl, rows.

--rehearse runs the same steps without a GPU, on a small case, with emulated CUDA kernels (FPET_EMULATED_CUDA) if there are any.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
PREPARED = ROOT / "build" / "gpu"
PACKAGE = ROOT / "fpet_kernels"
LIBRARIES = ("libfpet_ops.so", "libfpet_cuda_ops.so")
TESTS = ("test_cuda_forward", "test_cuda_backward", "example_merge")
PHOTOGRAPH = "china.jpg"
ARCHITECTURE = os.environ.get("FPET_GPU_ARCH", "90a-real")
LEAST = 8.0  # seconds: what is left when nothing more is begun
GRACE = 10.0  # between asking a step to stop and ending it

# Cases of the C++ tests that the sanitizers see, the most telling first: one of them takes some seconds there.
SANITIZED = (
    ("test_cuda_backward", "everything"), ("test_cuda_forward", "everything"), ("test_cuda_backward", "autocast"),
    ("test_cuda_forward", "float32, refined, heads"), ("test_cuda_backward", "16 × 16"), ("test_cuda_forward", "bf16"),
    ("test_cuda_backward", "tiles of sources"), ("test_cuda_backward", "float64"),
)  # fmt: skip
OPERATOR_TESTS = (
    "cuda", "golden", "gradients", "conservation", "heads", "properties", "split", "errors", "unmerge", "determinism", "poison",
    "memory", "triton_launch", "compile",
)  # fmt: skip


@dataclass
class Step:
    """Commands that run one after another, in ``seconds`` at most; done when all of them have ended with status 0."""

    what: str
    commands: Sequence[Sequence[str | Path]]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    not_checked: str = ""  # what it prints where it can't work; then it is no failure


@dataclass
class Outcome:
    """How a step ended."""

    what: str
    verdict: str
    failed: bool
    seconds: float


class Plan:
    """Runs groups of steps, those of a group at the same time, within a time; keeps all output."""

    def __init__(self, log: Path, minutes: float) -> None:
        self.began = time.monotonic()
        self.end = self.began + 60 * minutes
        self.outcomes: list[Outcome] = []
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log.open("w", encoding="utf-8")
        self.lock = threading.Lock()

    def say(self, text: str) -> None:
        with self.lock:
            print(text, flush=True)
            print(text, file=self.log, flush=True)

    def run(self, *group: Step) -> None:
        workers = [threading.Thread(target=self._one, args=(step,)) for step in group]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    def _one(self, step: Step) -> None:
        begin = time.monotonic()
        end = min(begin + step.seconds, self.end)
        if end - begin < LEAST:
            self.outcomes.append(Outcome(step.what, "NOT DONE: no time was left", False, 0))
            return
        verdict, failed = "done", False
        for number, command in enumerate(step.commands):
            text, status = self._command(list(map(str, command)), step.environment, end)
            seconds = time.monotonic() - begin
            self.say(f"=== {step.what}: {' '.join(map(str, command))}\n{text.rstrip()}\n=== status {status}, {seconds:.0f} s\n")
            so_far = (
                f"{number} of {len(step.commands)} commands ended"
                if len(step.commands) > 1
                else "what it had printed is in the log"
            )
            if step.not_checked and step.not_checked in text:
                verdict = f"NOT CHECKED: {step.not_checked}"
                break
            if status is None:
                verdict = f"NOT FINISHED in {end - begin:.0f} s: {so_far}"
                break
            if status:
                verdict, failed = f"FAILED with status {status}", True
        self.outcomes.append(Outcome(step.what, verdict, failed, time.monotonic() - begin))

    def _command(self, command: list[str], environment: dict[str, str], end: float) -> tuple[str, int | None]:
        """Output and status; None where it was stopped: first as by Ctrl-C, so that it can say how far it came."""
        try:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT, env={**os.environ, **environment},
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return str(error), 127
        try:
            out, _ = process.communicate(timeout=max(0.1, end - time.monotonic()))
            return out.decode(errors="replace"), process.returncode
        except subprocess.TimeoutExpired:
            for sent, wait in ((signal.SIGINT, GRACE), (signal.SIGKILL, 5.0)):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, sent)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    out, _ = process.communicate(timeout=wait)
                    return out.decode(errors="replace"), None
            return "", None

    def finish(self, not_tried: Sequence[str]) -> int:
        """Says what became of every step, and what no step was for; the exit status."""
        self.say(f"--- {time.monotonic() - self.began:.0f} s in all")
        for outcome in self.outcomes:
            self.say(f"{outcome.seconds:5.0f} s  {outcome.what}: {outcome.verdict}")
        for line in not_tried:
            self.say(f"         not part of this: {line}")
        self.log.close()
        return int(any(outcome.failed for outcome in self.outcomes))


# --- before ------------------------------------------------------------------------------------------------------------------


def revision() -> dict[str, object]:
    """Commit of the checkout, and whether it has changes; nothing outside of one."""

    def git(*command: str) -> str | None:
        done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    if not (ROOT / ".git").exists() or not shutil.which("git") or not (commit := git("rev-parse", "HEAD")):
        return {}
    return {"commit": commit, "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}


def record(torch: Path, nvcc: str, architecture: str) -> dict[str, object]:
    """What the doctor and the rows say of a build, as setup.py would record it."""
    from build_backend import find_compiler, torch_version

    version = subprocess.run([*(find_compiler() or ["c++"]), "--version"], capture_output=True, text=True, check=True).stdout
    cuda = {"built": True, "nvcc": nvcc, "architectures": architecture}
    built = {"native": True, "compiler": version.partition("\n")[0], "torch": torch_version(torch), "introspection": False}
    return {**built, **revision(), "cuda": cuda}


def prepare(architecture: str) -> None:
    """Fills build/gpu; raises SystemExit where something is missing, CalledProcessError where it doesn't compile."""
    from build_backend import find_nvcc, find_torch

    torch, nvcc = find_torch(), find_nvcc()
    if torch is None or nvcc is None:
        raise SystemExit(f"gpu-prepare needs {'torch >= 2.10 (or FPET_TORCH_DIR)' if torch is None else 'nvcc (or CUDACXX)'}")
    work = ROOT / "build" / "gpu-work"
    configure = [
        "cmake", "-G", "Ninja", "-S", ROOT, "-B", work, "-DCMAKE_BUILD_TYPE=Release", "-DFPET_CUDA=ON", "-DFPET_BUILD_OPS=ON",
        "-DFPET_BUILD_TESTS=ON", f"-DFPET_CUDA_ARCHITECTURES={architecture}", f"-DFPET_TORCH_DIR={torch}",
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
    ]  # fmt: skip
    targets = [library.removeprefix("lib").removesuffix(".so") for library in LIBRARIES]
    jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
    subprocess.run(configure, check=True)
    subprocess.run(["cmake", "--build", work, "--parallel", jobs, "--target", *targets, *TESTS], check=True)
    PREPARED.mkdir(parents=True, exist_ok=True)
    for name in (*LIBRARIES, *TESTS):
        (PREPARED / name).unlink(missing_ok=True)
        shutil.copy2(work / name, PREPARED / name)
    with contextlib.suppress(ImportError, SystemExit):
        from harness.cases import photograph_file

        shutil.copy2(photograph_file(), PREPARED / PHOTOGRAPH)
    info = record(torch, nvcc, architecture)
    (PREPARED / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n")
    size = sum(file.stat().st_size for file in PREPARED.iterdir())
    made_with = f"{architecture}, headers of torch {info['torch']}, commit {info.get('commit')}"
    print(f"{PREPARED.relative_to(ROOT)}: {size / 2**20:.1f} MiB for {made_with}")


def install(architecture: str) -> None:
    """Puts what was prepared beside the package; prepares it where it was not."""
    if not all((PREPARED / name).exists() for name in (*LIBRARIES, *TESTS)):
        print("build/gpu was not carried along: building it here", flush=True)
        prepare(architecture)
    for name in (*LIBRARIES, "_build_info.json"):
        new, old = PREPARED / name, PACKAGE / name
        if old.exists() and old.read_bytes() == new.read_bytes():
            continue
        old.unlink(missing_ok=True)  # a process that has it mapped keeps it, whole
        shutil.copy2(new, old)
    for name in TESTS:
        (PREPARED / name).chmod(0o755)


# --- the four targets --------------------------------------------------------------------------------------------------------


@dataclass
class Here:
    """Where and on what a plan runs. rehearse: without a GPU, emulated where there is something to emulate."""

    python: str
    out: Path
    rows: Path
    minutes: float
    rehearse: bool

    @property
    def emulated(self) -> Path | None:
        given = os.environ.get("FPET_EMULATED_CUDA")
        return Path(given).resolve() if given else None

    def benchmark(self, script: str, *options: str) -> list[str]:
        return [self.python, f"benchmarks/{script}.py", "--out", str(self.rows), *options]


def correct(here: Here, plan: Plan) -> list[str]:
    binaries = here.emulated.parent if here.rehearse and here.emulated else PREPARED
    suffix = "_emulated" if here.rehearse else ""
    doctor = Step("doctor", [[here.python, "-m", "fpet_kernels"]], 60)
    cpp = [Step(f"C++: {name}", [[binaries / f"{name}{suffix}"]], 180) for name in TESTS[:2]]
    example = Step("C++: example", [[binaries / TESTS[2]]], 60)
    plan.run(doctor, *([] if here.rehearse else cpp), example)

    device = "cpu" if here.rehearse else "cuda"
    files = [f"tests/test_{name}.py" for name in OPERATOR_TESTS]
    chosen = f"cuda-{device}" if here.rehearse else ""
    environment = {"OMP_NUM_THREADS": "1", "FPET_REQUIRE_BACKENDS": "cuda,cpu" if here.rehearse else "cuda,triton,cpu"}
    if not here.rehearse:
        environment["FPET_ONLY_ON"] = device
    pytest = [here.python, "-m", "pytest", "-q", "-rfE", *parallel(here), *(["-k", chosen] if chosen else []), *files]
    what = f"operators on {device}: pytest of {', '.join(OPERATOR_TESTS)}"
    operators = Step(what, [pytest], 60 * here.minutes, environment)
    sanitizer = shutil.which("compute-sanitizer") or next(map(str, Path("/usr/local/cuda/bin").glob("compute-sanitizer")), None)
    tools = []
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        what = f"compute-sanitizer {tool}"
        if sanitizer is None or here.rehearse:
            why = "there is no GPU" if here.rehearse else "it is not installed here"
            plan.outcomes.append(Outcome(what, f"NOT CHECKED: {why}", False, 0))
            continue
        runs = [[sanitizer, "--tool", tool, "--error-exitcode", "9", PREPARED / name, case] for name, case in SANITIZED]
        tools.append(Step(what, runs, 300, not_checked="Device not supported"))
    plan.run(operators, *tools)
    return ["the other tests of the suite, which need no GPU", "cases of the C++ tests that the sanitizers did not get to see"]


def parallel(here: Here) -> list[str]:
    """pytest-xdist's option where it is installed: Triton compiles hundreds of kernels."""
    found = subprocess.run([here.python, "-c", "import xdist"], capture_output=True, check=False).returncode == 0
    return ["-n", "2" if here.rehearse else "8"] if found else []


def tables(here: Here, plan: Plan) -> list[str]:
    device = ["--device", "cpu" if here.rehearse else "cuda"]
    every = ["--batch", "2,1"] if here.rehearse else ["--batch", "64,256,1,16"]
    case = ["--cases", "tiny" if here.rehearse else "vitb16_224"]
    only = ["--backends", "cpu" if here.rehearse else "cuda,triton", "--baselines", "none"]
    replays = [] if here.rehearse else ["--timing", "graph"]
    single = ["--mode", "forward" if here.rehearse else "forward,backward"]
    low, wide = ["--dtype", "bfloat16"], ["--dtype", "float32"]

    def timed(what: str, seconds: float, *options: str) -> Step:
        limits = ["--minutes", f"{seconds / 60 - 0.1:.2f}", "--budget", f"{seconds / 4:.0f}"]
        return Step(what, [here.benchmark("kernel_vs_ref", *device, *case, *options, *limits)], seconds + GRACE)

    refined, plain = "refined keys of 12 heads", "plain keys of 12 heads"
    both = ["--mode", "forward,forward+backward"]
    overhead = [] if here.rehearse else ["--device", "cuda"]
    plan.run(timed(f"bfloat16, {refined}", 90, *only, *every, *low, *single, *replays))
    plan.run(Step("host's share of a call", [here.benchmark("kernel_vs_ref", *overhead, "--overhead", "--budget", "6")], 40))
    if not here.rehearse:
        plan.run(profile(here))
    plan.run(timed(f"bfloat16, {plain}", 70, *only, *every, *low, *single, *replays, "--no-refinement"))
    plan.run(timed(f"bfloat16, {refined}, with eager and compiled PyTorch", 150, *every, *low, *both, *replays))
    plan.run(timed(f"float32, {refined}", 60, *only, *every, *wide, *single, *replays))
    plan.run(timed(f"float32, {plain}", 50, *only, *every, *wide, *single, *replays, "--no-refinement"))
    plan.run(
        timed(
            "bfloat16, averaged keys, plain", 40, *only, *every, *low, *single, *replays, "--no-refinement", "--key", "averaged"
        )
    )
    plan.run(timed(f"bfloat16, {plain}, with eager and compiled PyTorch", 90, *every, *low, *both, *replays, "--no-refinement"))
    plan.run(timed(f"float32, {refined}, with eager and compiled PyTorch", 120, *every, *wide, *both, *replays))
    return ["long grids (--cases dinov2_vitb14_reg_518,vitl16_1024), float16, float64"]


def profile(here: Here) -> Step:
    """Nsight Compute on the kernels of short grids; what it writes is in the log."""
    ncu = shutil.which("ncu") or next(map(str, Path("/usr/local/cuda/bin").glob("ncu")), "ncu")
    sections = ["SpeedOfLight", "LaunchStats", "Occupancy", "SchedulerStats", "WarpStateStats", "MemoryWorkloadAnalysis"]
    options = [ncu, "--clock-control", "none", "-k", "regex:merge_short|image_gradient", "--launch-skip", "2", "-c", "4"]
    options += [word for section in sections for word in ("--section", section)]
    return Step("profile of the kernels of short grids", [[*options, here.python, __file__, "profiled"]], 60)


def profiled() -> None:
    """Forward and backward of ViT-B/16's merge at batch 64, for the profiler."""
    import torch

    from fpet_kernels import KeyRefinement, bdm_merge

    for _ in range(3):
        x = torch.randn(64, 197, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        qkv = torch.randn(64, 197, 3, 12, 64, device="cuda", dtype=torch.bfloat16)
        down = (torch.randn(32, 64, device="cuda", dtype=torch.bfloat16) / 8).requires_grad_()
        up = (torch.randn(64, 32, device="cuda", dtype=torch.bfloat16) / 6).requires_grad_()
        merged = bdm_merge(
            x, qkv.permute(2, 0, 3, 1, 4)[1], grid_size=(14, 14), refinement=KeyRefinement(down, up), backend="cuda"
        )
        merged.tokens.backward(torch.randn_like(merged.tokens))
    torch.cuda.synchronize()


def model(here: Here, plan: Plan) -> list[str]:
    device = ["--device", "cpu" if here.rehearse else "cuda"]

    def timed(what: str, seconds: float, *options: str) -> Step:
        command = here.benchmark("model_latency", *device, *options, "--budget", f"{seconds / 5:.0f}")
        return Step(what, [command], seconds)

    names = ("tiny", "tiny") if here.rehearse else ("vitb16", "vitl16")
    batch = "2" if here.rehearse else "256"
    train = "2" if here.rehearse else "64"
    execution = ["--execution", "eager" if here.rehearse else "compiled", "--implementations", "timm,fpet"]
    shape = [*execution, "--dtype", "float32" if here.rehearse else "bfloat16"]
    plan.run(timed(f"{names[0]}, inference", 150, "--models", names[0], "--batch", batch, "--mode", "inference", *shape))
    plan.run(
        timed(f"{names[0]}, a step of training", 150, "--models", names[0], "--batch", train, "--mode", "training", *shape)
    )
    memory = [
        here.python, "-m", "fpet", "tables", "--tables", "4", "--models", "tiny" if here.rehearse else "vitb16",
        "--measure", "memory", "--methods", "adaptformer", *device, "--out", str(here.rows),
    ]  # fmt: skip
    plan.run(Step("memory of tuning, by the allocator", [memory], 90))
    if not here.rehearse:
        plan.run(timed(f"{names[1]}, inference", 150, "--models", names[1], "--batch", "64", "--mode", "inference", *shape))
        eager = ["--execution", "eager", "--implementations", "timm,fpet,tome", "--dtype", "bfloat16"]
        plan.run(
            timed(
                "vitb16, inference, eager, ToMe beside",
                60,
                "--models",
                "vitb16",
                "--batch",
                "256",
                "--mode",
                "inference",
                *eager,
            )
        )
    return ["other methods and tables of fpet tables", "accuracies"]


def tune(here: Here, plan: Plan) -> list[str]:
    minutes = max(0.5, here.minutes - 0.6)
    command = [here.python, "benchmarks/tune.py", "--minutes", f"{minutes:.2f}"]
    command += (
        ["--dry-run", "--slot", "forward (2, False, 128)", "--candidates", "2"] if here.rehearse else ["--device", "cuda"]
    )
    plan.run(Step("Triton's launch configurations", [command], 60 * here.minutes))
    return ["compute capabilities other than this GPU's"]


TARGETS: dict[str, Callable[[Here, Plan], list[str]]] = {"correct": correct, "tables": tables, "model": model, "tune": tune}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=("prepare", *TARGETS, "profiled"))
    parser.add_argument("--minutes", type=float, default=9.0, help="in all; default 9. What is not reached is named")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the two files")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, to see that every step begins and ends")
    options = parser.parse_args(argv)
    if options.minutes <= 0:
        parser.error(f"--minutes: expected a positive number, got {options.minutes}")
    if options.target == "prepare":
        prepare(ARCHITECTURE)
        return 0
    if options.target == "profiled":
        profiled()
        return 0
    begin = time.monotonic()
    install(ARCHITECTURE)
    out = options.out.resolve()
    minutes = options.minutes - (time.monotonic() - begin) / 60
    here = Here(sys.executable, out, out / f"gpu-{options.target}.jsonl", minutes, options.rehearse)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH"))))
    os.environ["PYTHONUNBUFFERED"] = "1"
    plan = Plan(out / f"gpu-{options.target}.txt", minutes)
    return plan.finish(TARGETS[options.target](here, plan))


if __name__ == "__main__":
    sys.exit(main())
