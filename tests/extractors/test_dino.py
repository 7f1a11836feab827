"""DINO: schedules, the loop against a plain one, resume bit for bit, files, several processes."""

import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from extractors import EncoderError, dino, load_encoder
from extractors.dino import (
    RECIPES,
    Pretraining,
    about_weights,
    network,
    read_checkpoint,
    save_checkpoint,
    save_weights,
)
from extractors.views import view

SMALL = replace(
    RECIPES["vit_tiny_scorenet"],
    wide_px=32, small_px=16, small_views=2, hidden=16, bottleneck=8, prototypes=24, epochs=4, batch_size=8, lr=0.02,
)  # fmt: skip
STEPS = 3


def make(recipe: Any = SMALL, steps: int = STEPS) -> Pretraining:
    return Pretraining(network("vit_tiny_scorenet", recipe), load_encoder("vit_tiny_scorenet").facts, recipe, steps)


def batches(epoch: int, steps: int = STEPS, size: int = 8) -> list[torch.Tensor]:
    numbers = torch.Generator().manual_seed(100 + epoch)
    return [torch.randint(0, 256, (size, 32, 32, 3), dtype=torch.uint8, generator=numbers) for _ in range(steps)]


def run(training: Pretraining, until: int) -> Pretraining:
    while training.epochs_done < until:
        training.epoch(batches(training.epochs_done))
    return training


def same(a: Pretraining, b: Pretraining) -> bool:
    pairs = zip(a.student.state_dict().values(), b.student.state_dict().values(), strict=True)
    teachers = zip(a.backbone().values(), b.backbone().values(), strict=True)
    return all(torch.equal(x, y) for x, y in (*pairs, *teachers)) and torch.equal(a.loss.center, b.loss.center)


# -- one step, written out --


def test_the_loss_of_the_first_step_is_the_papers() -> None:
    """Views from the same numbers, both networks still equal, the centre still zero."""
    training, tiles = make(steps=1), batches(0)[0]
    other = make(steps=1)
    other._half = training._half = False
    from extractors.dino import _seed

    numbers = torch.Generator().manual_seed(_seed(SMALL.seed, 0))
    images = tiles.permute(0, 3, 1, 2) / 255
    seen = [(view(images, look, numbers) - other._mean) / other._std for look in other._looks]
    with torch.no_grad():
        said = [other.student.head(other.student.backbone(v)) for v in seen]
        told = [(other.teacher.head(other.teacher.backbone(v)) / 0.04).softmax(1) for v in seen[:2]]
    terms = [
        -(t * F.log_softmax(s / 0.1, dim=1)).sum(1).mean()
        for i, t in enumerate(told)
        for j, s in enumerate(said)
        if i != j
    ]
    assert len(terms) == 2 * 3
    assert training.epoch([tiles]) == pytest.approx(float(torch.stack(terms).mean()), rel=1e-4)
    centre = torch.stack([other.teacher.head(other.teacher.backbone(v)) for v in seen[:2]]).mean((0, 1))
    torch.testing.assert_close(training.loss.center[0, 0], 0.1 * centre, rtol=1e-3, atol=1e-5)


def test_the_teacher_is_the_moving_mean_of_the_student() -> None:
    training = make(replace(SMALL, momentum=0.9), steps=1)
    before = {k: v.clone() for k, v in training.teacher.state_dict().items()}
    training.epoch(batches(0, 1))
    for key, value in training.teacher.state_dict().items():
        torch.testing.assert_close(value, 0.9 * before[key] + 0.1 * training.student.state_dict()[key])
    moved = [k for k, v in training.student.state_dict().items() if not torch.equal(v, before[k])]
    assert any(k.startswith("backbone.blocks.0") for k in moved)


def test_schedules() -> None:
    """Up to lr · batch / 256 within a tenth, down along a cosine; decay up; biases and norms never decay."""
    training = make(replace(SMALL, epochs=100, batch_size=64, lr=1e-3), steps=10)
    rates, decays = [], []
    for step in range(1000):
        training._set_rates(step)
        rates.append(training.optimizer.param_groups[0]["lr"])
        decays.append(training.optimizer.param_groups[0]["weight_decay"])
    top = 1e-3 * 64 / 256
    assert rates[0] == pytest.approx(top / 100)
    assert max(rates) == rates[99] == pytest.approx(top)
    assert rates[100 + 450] == pytest.approx((top + 1e-6) / 2, rel=0.01)
    assert rates[-1] == pytest.approx(1e-6)
    assert (decays[0], decays[-1]) == pytest.approx((0.04, 0.4))
    assert decays[500] == pytest.approx(0.22, rel=0.01)
    spared = {id(p) for p in training.optimizer.param_groups[1]["params"]}
    assert training.optimizer.param_groups[1]["weight_decay"] == 0
    named = dict(training.student.named_parameters())
    assert {k for k, p in named.items() if id(p) in spared} == {k for k in named if k.endswith("bias") or ".norm" in k}


def test_prototypes_stand_still_in_the_first_epoch() -> None:
    training = make()
    first = training.student.head.last_layer.weight_v.clone()
    run(training, 1)
    assert torch.equal(training.student.head.last_layer.weight_v, first)
    run(training, 2)
    assert not torch.equal(training.student.head.last_layer.weight_v, first)


@pytest.mark.parametrize(("arch", "numbers"), [("vit_tiny_scorenet", 673_248), ("vit_small_dino", 21_665_664)])
def test_networks_are_those_of_the_encoders(arch: str, numbers: int) -> None:
    with torch.device("meta"):
        made = network(arch, RECIPES[arch])()
    assert sum(p.numel() for p in made.parameters()) == numbers
    small = torch.empty(2, 3, RECIPES[arch].small_px, RECIPES[arch].small_px, device="meta")
    assert made(small).shape == (2, load_encoder(arch).facts.dim)


def textures() -> torch.Tensor:
    """64 gratings, each of a direction, a width and two colours of its own."""
    numbers = torch.Generator().manual_seed(0)
    wave = (torch.rand(64, 2, 1, 1, generator=numbers) - 0.5) * 2
    axis = torch.arange(32.0)
    lines = (wave[:, 0] * axis + wave[:, 1] * axis[:, None]).sin()[..., None]
    low, high = torch.rand(2, 64, 1, 1, 3, generator=numbers)
    return (torch.lerp(low, high, (lines + 1) / 2) * 255).to(torch.uint8)


def strangers_before(training: Pretraining, tiles: torch.Tensor) -> float:
    """Share of tiles that the teacher finds more like what the student says of another view of a tile than its own."""
    numbers = torch.Generator().manual_seed(1)
    images = tiles.permute(0, 3, 1, 2) / 255
    one, other = ((view(images, training._looks[1], numbers) - training._mean) / training._std for _ in range(2))
    with torch.no_grad():
        told = ((training.teacher([one])[0] - training.loss.center[0]) / 0.04).softmax(1)
        near = told @ (training.student([other])[0] / 0.1).log_softmax(1).T
    return float((near > near.diag()[:, None]).float().mean())


def test_it_learns_to_know_a_tile_by_another_view() -> None:
    """A network of two convolutions, which is fast enough for 80 steps."""

    def make_small() -> nn.Module:
        first, second = nn.Conv2d(3, 32, 5, 2), nn.Conv2d(32, 32, 3, 2)
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    recipe = replace(
        SMALL,
        epochs=40,
        batch_size=32,
        prototypes=64,
        hidden=64,
        bottleneck=16,
        normed_head=True,
        momentum=0.95,
        lr=0.01,
    )
    facts, tiles = replace(load_encoder("vit_tiny_scorenet").facts, dim=32), textures()
    training = Pretraining(make_small, facts, recipe, steps=2)
    before = strangers_before(training, tiles)
    for epoch in range(40):
        order = torch.randperm(64, generator=torch.Generator().manual_seed(epoch))
        training.epoch(tiles[order].split(32))
    assert training.course.losses[0] > math.log(64) > 4
    assert training.course.losses[-1] < 0.75 * math.log(64)
    assert strangers_before(training, tiles) < before - 0.04


# -- going on --


def test_resumed_is_the_uninterrupted_bit_for_bit(tmp_path: Path) -> None:
    straight = run(make(), 4)
    save_checkpoint(tmp_path / "state.pt", run(make(), 2).state())
    resumed = make()
    resumed.restore(read_checkpoint(tmp_path / "state.pt"))
    run(resumed, 4)
    assert resumed.course == straight.course
    assert len(set(straight.course.losses)) == 4
    assert same(resumed, straight)
    assert list(tmp_path.iterdir()) == [tmp_path / "state.pt"], "nothing half-written stays"


def test_the_callers_random_numbers_stay_his() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(make(), 1)
    assert torch.equal(torch.rand(3), expected)


def test_seeds_differ() -> None:
    assert run(make(), 1).course != run(make(replace(SMALL, seed=1)), 1).course


@pytest.mark.parametrize("other", [{"lr": 0.01}, {"seed": 3}])
def test_another_training_is_not_gone_on_with(other: dict[str, Any]) -> None:
    with pytest.raises(EncoderError, match="another recipe"):
        make(replace(SMALL, **other)).restore(make().state())


def test_a_cut_checkpoint_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "state.pt", make().state())
    whole = (tmp_path / "state.pt").read_bytes()
    (tmp_path / "state.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EncoderError, match="damaged"):
        read_checkpoint(tmp_path / "state.pt")


def test_an_epoch_has_its_number_of_batches() -> None:
    with pytest.raises(ValueError, match="3 batches, not 2"):
        make().epoch(batches(0)[:2])
    with pytest.raises(ValueError, match="at least one batch"):
        make(steps=0)


def test_a_loss_that_is_not_finite_ends_it() -> None:
    training = make()
    next(training.student.backbone.parameters()).data.fill_(math.nan)
    with pytest.raises(EncoderError, match="epoch 1 is not finite"):
        run(training, 1)
    assert training.epochs_done == 0


def test_unknown_networks() -> None:
    with pytest.raises(EncoderError, match="Known: vit_small_dino, vit_tiny_scorenet"):
        network("resnet50", SMALL)


def test_its_weights_serve_the_encoder(tmp_path: Path) -> None:
    recipe = replace(SMALL, wide_px=128, small_px=48)
    training = Pretraining(
        network("vit_tiny_scorenet", recipe), load_encoder("vit_tiny_scorenet").facts, recipe, steps=1
    )
    tiles = torch.randint(0, 256, (4, 128, 128, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    training.epoch([tiles])
    file = tmp_path / "w.safetensors"
    save_weights(file, training.backbone(), {"slides": {"a.svs": "12"}})
    encoder = load_encoder("vit_tiny_scorenet", file).load(precision="fp32")
    training._half = False
    torch.testing.assert_close(encoder.encode(tiles), training.embed(tiles), rtol=1e-4, atol=1e-5)
    assert about_weights(file) == {"slides": {"a.svs": "12"}}
    save_weights(tmp_path / "again.safetensors", training.backbone(), {"slides": {"a.svs": "12"}})
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_other_files_say_nothing_of_slides(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    (tmp_path / "text.pt").write_text("no weights")
    for name in ("plain.safetensors", "text.pt", "missing.pt"):
        assert about_weights(tmp_path / name) == {}


# -- killed, and several processes --

SCRIPT = """
import os, sys, time
sys.path[:0] = {path!r}
import torch
import torch.distributed as dist
from test_dino import batches, make, read_checkpoint, save_checkpoint
from extractors import dino
from extractors.dino import save_weights
torch.set_num_threads(1)
place, slow, alike = sys.argv[1], float(sys.argv[2]), "alike" in sys.argv
rank = int(os.environ.get("RANK", -1))
if rank >= 0:
    dist.init_process_group("gloo")
if alike:
    dino._seed = lambda seed, epoch: epoch
training = make()
if os.path.exists(place):
    training.restore(read_checkpoint(place))
while training.epochs_done < 4:
    mine = batches(training.epochs_done)
    training.epoch([b[0 if alike else rank :: 2] for b in mine] if rank >= 0 else mine)
    if rank <= 0:
        save_checkpoint(place, training.state())
    print(training.epochs_done, flush=True)
    time.sleep(slow)
if rank >= 0:
    save_weights(f"{{place}}.{{rank}}", training.backbone(), {{}})
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    here = Path(__file__).parent
    (tmp_path / "script.py").write_text(SCRIPT.format(path=[str(here), str(here.parents[1])]))
    return tmp_path / "script.py"


@pytest.mark.slow
def test_killed_and_started_again_it_is_the_same_curve(script: Path, tmp_path: Path) -> None:
    place = tmp_path / "state.pt"
    first = subprocess.Popen([sys.executable, script, place, "60"], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "1\n"
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = subprocess.run([sys.executable, script, place, "0"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "3", "4"]
    resumed, straight = make(), run(make(), 4)
    resumed.restore(read_checkpoint(place))
    assert resumed.course == straight.course
    assert same(resumed, straight)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["halves", "alike"])
def test_two_processes(mode: str, script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With halves of a batch both end with the same weights. With the same tiles and crops in both, the means over them
    are what one of them has, so one process alone has the same curve."""
    place = tmp_path / "state.pt"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*launch, script, place, "0", mode], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert Path(f"{place}.0").read_bytes() == Path(f"{place}.1").read_bytes()
    both, alone = make(), make()
    both.restore(read_checkpoint(place))
    monkeypatch.setattr(dino, "_seed", lambda seed, epoch: epoch)
    for epoch in range(4):
        alone.epoch([tiles[0::2] for tiles in batches(epoch)])
    assert (both.course.losses == pytest.approx(alone.course.losses, rel=1e-3)) == (mode == "alike")
