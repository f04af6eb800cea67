"""Two gloo processes give the result of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from fpet.files import checkpoint
from retrieval_support import command, tiny
from train_support import assert_same_state, leaves

TWO = """
import json, os, sys
import torch.distributed as dist
from fpet import cli
from fpet.train import loop

commands, store = json.loads(sys.argv[1]), sys.argv[2]
write = loop.Loop._checkpoint


def write_if_all_have_the_same(self):
    tensors = [*self.tuned.values(), *self.task.network.averages().values()]
    tensors += self.task.network.queue.state_dict().values() if self.task.network.queue else ()
    both = [None, None]
    dist.all_gather_object(both, [t.tolist() for t in tensors])
    assert both[0] == both[1]
    write(self)


loop.Loop._checkpoint = write_if_all_have_the_same
assert cli.main(["retrieval", *commands[0]]) == 0  # joins torchrun's group and leaves it
assert not dist.is_initialized()
dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(os.environ["RANK"]), world_size=2)
for command in commands[1:]:
    if command[0] == "rename":
        if dist.get_rank() == 0:
            os.rename(*command[1:])
        dist.barrier()
    else:
        assert cli.main(["retrieval", *command]) == 0
dist.destroy_process_group()
"""


@pytest.mark.alone
def test_two_processes_give_the_result_of_one(folder, tokenizer, tmp_path, capsys):
    torch.manual_seed(4)
    model = tmp_path / "model"
    tiny().save_pretrained(model)
    tokenizer.save_pretrained(model)
    common = ["--data-dir", str(folder), "--model", str(model), "--image-size", "16", "--quiet", "--device", "cpu"]
    drawing = ["train", *common, "--epochs", "2", "--adapter-dim", "4", "--lr", "0.001", "--max-length", "16"]
    # Dropout, augmentation and negatives of its own draw differently in each process, so there is none of them.
    tune = [*drawing, "--batch-size", "4", "--no-refinement", "--no-augment", "--negative-all-rank"]
    runs = {"queue": ["--queue-size", "10", "--momentum", "0.9"], "batch": ["--queue-size", "0"]}
    commands = {
        number: {name: [*tune, *more, "--output", str(tmp_path / number / name)] for name, more in runs.items()}
        for number in ("one", "two")
    }
    score = ["evaluate", *common, "--tuned", str(tmp_path / "one" / "queue" / "model.safetensors"), "--json", "--top-k", "5"]
    for arguments in (*commands["one"].values(), score):
        assert command(arguments) == 0
    expected = json.loads(capsys.readouterr().out.splitlines()[-1])
    (tmp_path / "two.py").write_text(TWO)
    # With all of them, a run that was killed in its second epoch.
    killed, last, kept = tmp_path / "killed", "step-00000002.ckpt", tmp_path / "step-00000002.ckpt"
    again = [*drawing, "--batch-size", "8", "--queue-size", "10", "--output", str(killed)]
    work = [*commands["two"].values(), again, ["rename", str(killed / last), str(kept)], again, score]
    script = [str(tmp_path / "two.py"), json.dumps(work), str(tmp_path / "store")]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        timeout=300,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 2") == 4 and done.stdout.count('contrastive":') == 1, "process 0 alone prints"
    found = json.loads(done.stdout.splitlines()[-1])
    for direction in ("image_to_text", "text_to_image"):
        assert found[direction] == pytest.approx(expected[direction], abs=1.01 / 4), "at most a near tie"

    for name in runs:
        (_, one), (_, two) = (checkpoint.load_newest(tmp_path / number / name) for number in ("one", "two"))
        assert len(one.pop("rng")) == 1 and len(two.pop("rng")) == 2
        del one["sums"], two["sums"]
        one, two = dict(leaves(one)), dict(leaves(two))
        assert one.keys() == two.keys()
        for path, value in one.items():
            if isinstance(value, str):
                assert two[path] == value
            else:
                torch.testing.assert_close(two[path], value, rtol=1e-3, atol=2e-4, msg=f"{name}: {path}")

    one, two = (checkpoint.read(path) for path in (kept, killed / last))
    assert len(one["rng"]) == 2
    assert_same_state(one, two)

    # What two processes began, one may end.
    checkpoint.checkpoints(tmp_path / "two" / "queue")[0].unlink()
    with pytest.warns(RuntimeWarning, match="resumed with 1 processes instead of 2"):
        assert command(commands["two"]["queue"]) == 0
    (_, one), (_, two) = (checkpoint.load_newest(tmp_path / number / "queue") for number in ("one", "two"))
    for before, after in zip(one["history"], two["history"], strict=True):
        assert after["train_contrastive"] == pytest.approx(before["train_contrastive"], rel=1e-4)
        assert after["train_matching"] == pytest.approx(before["train_matching"], rel=1e-4)
