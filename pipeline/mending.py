"""What is wrong in an output folder, and the commands that mend it.

`run` finds by itself what attributes and the size of chunks show, and with --redo what checksums show. Everything else
(numbers that are wrong and have the right checksum) has to be deleted first, so that it is missing.
"""

import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .places import is_remote

# From bad to harmless. outdated: whole, but of another slide file or recipe; note: no fault.
KINDS = ("damaged", "unfinished", "outdated", "failed", "note")
REDO = (" --redo", " with redo=True")
UNKNOWN = "slidestream run SLIDES -o {out} … (as it was first given: run.json, which tells it, cannot be read)"


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be. slide: "" for what belongs to the whole folder; part: a path in the
    slide's group, or in the output folder; kind: one of KINDS; mend: commands, in their order."""

    slide: str
    part: str
    kind: str
    message: str
    mend: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind:10} {' '.join(filter(None, [self.slide, self.part]))}: {self.message}"


class Commands:
    """How an output folder was made, and so how it is mended. `about`: its run.json."""

    def __init__(self, out: Path, about: dict[str, Any]) -> None:
        self._out, self._made = out, list(about.get("commands", []))

    def again(self, encoder: str | None = None) -> tuple[str, ...]:
        """The command that made the features of this encoder (else the last one), which resumes."""
        return (self._in_words(self._words(encoder)),)

    def redo(self, place: Path, encoder: str | None = None) -> tuple[str, ...]:
        """The same, and what is stored is read again before it is believed. Where the command cannot be asked to, what
        is at `place` is deleted."""
        words = self._words(encoder)
        command = self._in_words([word for word in words if word != "--redo"])
        if command.startswith("slidestream run "):
            return (command + REDO[0],)
        if command.startswith("slidestream "):  # demo, or predict with slides: they know no --redo
            return self.anew(place, encoder)
        return (command + REDO[1],)

    def anew(self, place: Path, encoder: str | None = None) -> tuple[str, ...]:
        """What is at `place`, whole or not, is made once more."""
        return (removed(place), *self.again(encoder))

    def predict(self, model: str) -> tuple[str, ...]:
        """The predictions of a model (or of an average, whose name says what it is of) from stored features."""
        name, folds, vote = model.removesuffix("-vote"), "", " --vote" if model.endswith("-vote") else ""
        if all(part.endswith("-folds") for part in name.split("+")):
            name, folds = "+".join(part.removesuffix("-folds") for part in name.split("+")), " --folds"
        models = " ".join(f"--model {shlex.quote(part)}" for part in name.split("+"))
        return (f"slidestream predict {self._quoted_out} {models}{folds}{vote}",)

    def zoom(self, place: Path, model: str) -> tuple[str, ...]:
        """A prediction that was made by zooming into slides, at `place`."""
        made = [words for words in self._commands() if "--zoom" in words]
        own = [words for words in made if any(Path(word).name == model for word in words)]
        return (removed(place), self._in_words((own or made or [[]])[-1]))

    def stitch(self, place: Path, model: str, slide: str, attrs: dict[str, Any]) -> tuple[str, ...]:
        """Stitched maps of a slide, at `place`, with the settings that their attributes tell."""
        words = f"slidestream stitch {self._quoted_out} --model {shlex.quote(model)} --slide {shlex.quote(slide)}"
        if "shifts_tiles" in attrs:
            steps = [*attrs["shifts_tiles"], attrs["region_tiles"]]
            words += f" --stride {steps[1]:g} --gamma {attrs['gamma']:g}"
            words += " --within-tiles" if "tile" in attrs["scales"] else ""
            words += "" if attrs["times_foreground"] else " --unweighted"
        return (removed(place), words)

    @property
    def _quoted_out(self) -> str:
        return shlex.quote(str(self._out))

    def _commands(self, encoder: str | None = None) -> list[list[str]]:
        return [shlex.split(made["command"]) for made in self._made if encoder in (None, made.get("encoder"))]

    def _words(self, encoder: str | None) -> list[str]:
        """One that makes features; a zoom does not keep them."""
        kept = [words for words in self._commands(encoder) or self._commands() if "--zoom" not in words]
        return kept[-1] if kept else []

    def _in_words(self, words: Sequence[str]) -> str:
        if not words:
            return UNKNOWN.format(out=self._quoted_out)
        if os.path.basename(words[0]) == "slidestream":
            return shlex.join(["slidestream", *words[1:]])
        return f"call run() as {words[0]} did, here: {self._quoted_out}"


def removed(place: Path) -> str:
    return f"{'aws s3 rm --recursive' if is_remote(place) else 'rm -r'} {shlex.quote(str(place))}"


def merged(mends: Iterable[Sequence[str]]) -> list[str]:
    """The commands of several findings, each once: what is deleted, then `run`, then what is made of its features."""
    once = dict.fromkeys(command for mend in mends for command in mend)
    redone = {command.removesuffix(redo) for command in once for redo in REDO if command.endswith(redo)}
    made = ("slidestream predict", "slidestream stitch")
    return sorted(
        (command for command in once if command not in redone),
        key=lambda command: 0 if command.startswith(("rm ", "aws s3 rm ")) else 2 if command.startswith(made) else 1,
    )
