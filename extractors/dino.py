"""DINO: a network learns from tiles without labels, to say of a small view what its slower self says of a wide one.

Caron et al., Emerging Properties in Self-Supervised Vision Transformers, ICCV 2021 (arXiv 2104.14294).

    training = Pretraining(network("vit_tiny_scorenet", recipe), facts, recipe, steps=100)
    for epoch in range(recipe.epochs):
        loss = training.epoch(batches)              # 100 batches of uint8 tiles (B, H, W, 3)
    save_weights("mine.safetensors", training.backbone(), {"slides": …})  # load_encoder(…, weights="mine.safetensors")

Two wide views of a tile go through student and teacher, small ones through the student only. The loss is the cross
entropy of the student's softmax over prototypes against the teacher's, centred and sharpened, over all pairs of other
views. The teacher is the moving mean of the student. Loss, projection head and schedules are those of lightly.

An epoch draws its numbers from (seed, epoch, process) alone, so a training that goes on from a checkpoint is the one
that was not interrupted: bit for bit on the same CPU, while kernels of a GPU may differ in last bits. Under
torch.distributed each process has its own batches, and gradients and the centre are means over all.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import RANDOM, EncoderError, EncoderFacts, load_encoder
from .network import precision_on, usable_device
from .timm import timm_network
from .views import looks, view
from .weights import read_torch

if TYPE_CHECKING:
    from lightly.loss.dino_loss import DINOLoss

ABOUT = "slidestream"  # of the metadata of a weights file


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides what is learned from given tiles. Where DINO's authors have a public default, it is that."""

    wide_px: int | None  # None: tiles as they lie, in two other colourings
    small_px: int = 0  # a multiple of 16 near 96/224 of the wide ones
    hidden: int = 2048  # of the head; the next two as well
    bottleneck: int = 256
    prototypes: int = 65_536
    normed_last: bool = True  # weights of the prototypes have norm 1
    normed_head: bool = False  # batch norms in the head, which take out what all tiles share
    drop_path: float = 0.0
    small_views: int = 8
    wide_area: tuple[float, float] = (0.4, 1.0)
    small_area: tuple[float, float] = (0.05, 0.4)
    epochs: int = 100
    batch_size: int = 128  # of all processes together
    lr: float = 5e-4  # for a batch of 256, and in proportion
    final_lr: float = 1e-6
    warmup: float = 0.1  # share of the epochs
    weight_decay: tuple[float, float] = (0.04, 0.4)  # along a cosine; not of biases and norms
    momentum: float = 0.996  # of the teacher; to 1 along a cosine
    student_temperature: float = 0.1
    teacher_temperature: float = 0.04
    centre_momentum: float = 0.9
    frozen_epochs: int = 1  # at the beginning, of the prototypes
    clip: float = 3.0  # largest norm of the gradient
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values as JSON and checkpoints give them back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


RECIPES = {
    # the head's widths: Grisi et al. (masked hierarchical ViT), DINO's own but for the prototypes that are not normed
    "vit_small_dino": Recipe(wide_px=224, small_px=96, normed_last=False, drop_path=0.1),
    # Stegmüller et al. (ScoreNet); small views of 48 px: 96/224 of 128 lies between 48 and 64, and 9 tokens are cheaper
    "vit_tiny_scorenet": Recipe(wide_px=128, small_px=48, hidden=1024, bottleneck=128, prototypes=1024),
}


def network(arch: str, recipe: Recipe) -> Callable[[], nn.Module]:
    """What makes the network of an encoder, as it is trained: with keys as `load_encoder(arch)` wants them."""
    if arch not in RECIPES:
        raise EncoderError(f"{arch!r} cannot be pre-trained here. Known: {', '.join(RECIPES)}")
    if arch == "vit_small_dino":
        options = {"dynamic_img_size": True, "drop_path_rate": recipe.drop_path}
        return lambda: timm_network("vit_small_patch16_224", **options)
    encoder = load_encoder(arch, RANDOM)
    made: Callable[[], nn.Module] = encoder.make  # type: ignore[attr-defined]
    return made


class Student(nn.Module):
    """Views (B, 3, px, px) → what the head says of each (B, prototypes). Those of one size go as one batch."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, views: list[Tensor]) -> list[Tensor]:
        sizes = [v.shape[-1] for v in views]
        groups = [[v for v in views if v.shape[-1] == size] for size in dict.fromkeys(sizes)]
        features = torch.cat([self.backbone(torch.cat(group)) for group in groups])
        return list(self.head(features).float().chunk(len(views)))


@dataclass
class Course:
    """What has been, epoch by epoch. `watched`: accuracy of the nearest neighbours, where somebody measures it."""

    losses: list[float] = field(default_factory=list)
    watched: list[float] = field(default_factory=list)

    def words(self) -> str:
        """The last epoch in one line."""
        seen = f"   nearest neighbours {self.watched[-1]:.3f}" if self.watched else ""
        return f"epoch {len(self.losses)}   loss {self.losses[-1]:.4f}{seen}"


class Pretraining:
    """A student, its teacher, and how far they have come. `steps`: batches of an epoch, of each process.

    make_teacher: where the teacher is another network with the same keys.
    """

    def __init__(
        self,
        make: Callable[[], nn.Module],
        facts: EncoderFacts,
        recipe: Recipe,
        steps: int,
        device: str = "cpu",
        make_teacher: Callable[[], nn.Module] | None = None,
    ) -> None:
        if steps < 1:
            raise ValueError("an epoch needs at least one batch")
        try:
            from lightly.loss.dino_loss import DINOLoss
            from lightly.models.utils import get_weight_decay_parameters
        except ImportError as error:
            raise EncoderError(f"pre-training needs lightly ({error}): pip install 'slidestream[pretrain]'") from error

        self.recipe, self.steps, self.device = recipe, steps, usable_device(device)
        self.course = Course()
        self._dim, self._tile_px = facts.dim, facts.tile_px
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.student, self.teacher = (self._with_head(made()) for made in (make, make_teacher or make))
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.teacher.backbone.eval()  # it drops no paths; the head's batch norms are of the batch for both
        decayed, others = get_weight_decay_parameters([self.student])
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0)  # rate and decay are set at each step
        self.loss: DINOLoss = DINOLoss(
            recipe.prototypes,
            warmup_teacher_temp=recipe.teacher_temperature,
            teacher_temp=recipe.teacher_temperature,
            student_temp=recipe.student_temperature,
            center_momentum=recipe.centre_momentum,
        ).to(self.device)
        self._looks = looks(recipe.wide_px, recipe.small_px, recipe.wide_area, recipe.small_area, recipe.small_views)
        mean, std = (torch.tensor(v, device=self.device)[:, None, None] for v in (facts.mean, facts.std))
        self._mean, self._std = mean, std
        self._half = precision_on(self.device, "auto") == "bf16"  # fp16 would need its losses scaled
        self._parallel = nn.parallel.DistributedDataParallel(self.student) if dist.is_initialized() else self.student

    def _with_head(self, backbone: nn.Module) -> Student:
        from lightly.models.modules.heads import DINOProjectionHead

        r = self.recipe
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # lightly's head is made with torch's older weight_norm
            head = DINOProjectionHead(
                self._dim,
                r.hidden,
                r.bottleneck,
                r.prototypes,
                batch_norm=r.normed_head,
                freeze_last_layer=r.frozen_epochs,
                norm_last_layer=r.normed_last,
            )
        return Student(backbone, head).to(self.device)

    @property
    def epochs_done(self) -> int:
        return len(self.course.losses)

    def epoch(self, batches: Iterable[Tensor]) -> float:
        """Over `steps` batches of uint8 tiles (B, H, W, 3); returns the mean loss. EncoderError if it is not finite."""
        total, count = torch.zeros((), device=self.device), 0
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            seed = _seed(self.recipe.seed, self.epochs_done)
            torch.manual_seed(seed)  # for layers that drop paths
            numbers = torch.Generator().manual_seed(seed)
            self.student.train()
            for count, tiles in enumerate(batches, 1):
                total += self._step(tiles, self.epochs_done * self.steps + count - 1, numbers)
        if count != self.steps:
            raise ValueError(f"an epoch has {self.steps} batches, not {count}")
        loss = float(_mean_of_all(total / count))
        if not np.isfinite(loss):
            raise EncoderError(f"the loss of epoch {self.epochs_done + 1} is not finite; a lower rate may help (--lr)")
        self.course.losses.append(loss)
        return loss

    def _step(self, tiles: Tensor, step: int, numbers: torch.Generator) -> Tensor:
        from lightly.models.utils import update_momentum
        from lightly.utils.scheduler import cosine_schedule

        self._set_rates(step)
        images = tiles.to(self.device).permute(0, 3, 1, 2) / 255.0
        views = [(view(images, look, numbers) - self._mean) / self._std for look in self._looks]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._half):
            with torch.no_grad():
                told = self.teacher(views[:2])
            said = self._parallel(views)
        loss: Tensor = self.loss(told, said)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        head: Any = self.student.head
        head.cancel_last_layer_gradients(self.epochs_done)
        nn.utils.clip_grad_norm_(self.student.parameters(), self.recipe.clip)
        self.optimizer.step()
        update_momentum(self.student, self.teacher, cosine_schedule(step, self._all_steps, self.recipe.momentum, 1.0))
        return loss.detach()

    @property
    def _all_steps(self) -> int:
        return self.recipe.epochs * self.steps

    def _set_rates(self, step: int) -> None:
        from lightly.utils.scheduler import cosine_schedule, cosine_warmup_schedule

        r = self.recipe
        lr = cosine_warmup_schedule(
            step, self._all_steps, r.lr * r.batch_size / 256, r.final_lr, round(r.warmup * self._all_steps), 0.0
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.param_groups[0]["weight_decay"] = cosine_schedule(step, self._all_steps, *r.weight_decay)

    @torch.no_grad()
    def embed(self, tiles: Tensor) -> Tensor:
        """What the teacher makes of uint8 tiles (B, H, W, 3): float32 (B, dim), on the CPU.

        Of tiles larger than the encoder's the middle.
        """
        px = self._tile_px
        top, left = (max(0, (size - px) // 2) for size in tiles.shape[1:3])
        images = tiles[:, top : top + px, left : left + px].to(self.device).permute(0, 3, 1, 2) / 255.0
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._half):
            features: Tensor = self.teacher.backbone((images - self._mean) / self._std).float()
        return features.cpu()

    def backbone(self) -> dict[str, Tensor]:
        """The teacher's network, as its encoder loads it."""
        return {key: value.detach().cpu().clone() for key, value in self.teacher.backbone.state_dict().items()}

    def state(self) -> dict[str, Any]:
        """All that the rest of the training depends on."""
        return {
            "recipe": self.recipe.as_dict(),
            "steps": self.steps,
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "centre": self.loss.center,
            "course": asdict(self.course),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from there. EncoderError if it was another training."""
        if (state["recipe"], state["steps"]) != (self.recipe.as_dict(), self.steps):
            raise EncoderError("the checkpoint is of a training with another recipe or other tiles")
        self.student.load_state_dict(state["student"])
        self.teacher.load_state_dict(state["teacher"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.loss.center.data = state["centre"].to(self.device)
        self.course = Course(**state["course"])


def _seed(seed: int, epoch: int) -> int:
    rank = dist.get_rank() if dist.is_initialized() else 0
    return int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1)[0])


def _mean_of_all(value: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


# --- files ------------------------------------------------------------------------------------------------------------


def save_checkpoint(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Written beside and put in place whole."""
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.partial")
    torch.save(dict(content), part)
    os.replace(part, path)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Tensors and plain values only. EncoderError if it is damaged."""
    return dict(read_torch(Path(path)))


def save_weights(path: str | os.PathLike[str], state: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """A safetensors file. `about` stands in its metadata, alone: of several entries the order is left to chance."""
    from safetensors.torch import save  # save_file would let nobody else read it

    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.partial")
    part.write_bytes(save(dict(state), metadata={ABOUT: json.dumps(about, sort_keys=True)}))
    os.replace(part, path)


def about_weights(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `save_weights` was told of this file; {} if it is not there, or another program's."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return dict(json.loads((file.metadata() or {}).get(ABOUT, "{}")))
    except (OSError, SafetensorError):
        return {}
