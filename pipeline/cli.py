"""The command line: arguments in, one function call, words out. Heavy libraries are imported by the commands."""

import inspect
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .config import Config, EncodeConfig, TileConfig, TissueConfig, make_config, read_toml
from .errors import RunStopped, UsageError
from .places import on_disk, typed
from .worker import importing

app = typer.Typer(
    name="slidestream",
    help="A folder of whole slides in; tissue, tiles, features and slide predictions out.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

PANELS = ((TissueConfig, "Tissue"), (TileConfig, "Tiles"), (EncodeConfig, "Encoder"), (Config, "Reading"))
SHORT = {"encoder": ["-e"]}


def _flags() -> list[inspect.Parameter]:
    """One flag for every field of Config, so that flags, TOML keys and Python keywords cannot drift apart."""
    flags, seen = [], set()
    for part, panel in PANELS:
        for name, field in part.model_fields.items():
            if name in seen:
                continue
            seen.add(name)
            text = f"{field.description} [default: {_shown(field.default)}]"
            dashed = name.replace("_", "-")
            names = f"--{dashed}/--no-{dashed}" if isinstance(field.default, bool) else f"--{dashed}"
            option = typer.Option(names, *SHORT.get(name, []), help=text, rich_help_panel=panel)
            flags.append(
                inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=None,
                    annotation=Annotated[_kind(field.default, name), option],
                )
            )
    return flags


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:g}" if isinstance(value, float | int) else str(value)


def _kind(default: Any, name: str) -> Any:
    if name in ("tile_px", "batch_size", "readers"):
        return int | None
    if name == "origin":
        return tuple[float, float] | None
    return (type(default) if isinstance(default, bool | int | float) else str) | None


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command all settings of Config as flags; it receives those that were set as `settings`."""

    def wrapped(**values: Any) -> None:
        settings = {name: values.pop(name) for name in list(values) if name in Config.model_fields}
        command(settings={k: v for k, v in settings.items() if v is not None}, **values)

    own = [p for p in inspect.signature(command).parameters.values() if p.name != "settings"]
    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    wrapped.__signature__ = inspect.Signature(own + _flags())  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in own + _flags()}
    return wrapped


Slides = Annotated[str, typer.Argument(help="a folder, a glob in quotes, a CSV with a column `slide`, or one file")]
OutOption = Annotated[Path, typer.Option("--out", "-o", parser=typed, metavar="PATH", help="the output folder")]
OutFolder = Annotated[Path, typer.Argument(parser=typed, metavar="OUT", help="an output folder of `slidestream run`")]
OnDisk = Annotated[Path, typer.Argument(parser=on_disk, metavar="OUT", help="an output folder of `slidestream run`")]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        help="processes, jobs or pods [default: one for every four cores; with GPUs one a core; at most 16; one job]",
    ),
]
Scheduler = Annotated[
    str | None, typer.Option("--scheduler", help="tcp://… of a running Dask scheduler, in place of local workers")
]
Devices = Annotated[
    str | None,
    typer.Option("--devices", help="GPUs that encode, such as 0,1; or cpu [default: auto, all there are]"),
]
Cluster = Annotated[
    str | None,
    typer.Option(
        "--cluster", help="slurm: workers are its jobs, as ~/.config/dask/jobqueue.yaml says; kubernetes: its pods"
    ),
]
MppCsv = Annotated[
    Path | None, typer.Option("--mpp-csv", help="a table slide,mpp: µm per pixel where files do not say it")
]


@app.command()
@with_settings
def run(
    slides: Slides,
    out: OutOption,
    mpp_csv: MppCsv = None,
    workers: Workers = None,
    devices: Devices = None,
    cluster: Cluster = None,
    scheduler: Scheduler = None,
    redo: Annotated[
        bool, typer.Option("--redo", help="recompute what depends on a changed recipe, and what is damaged")
    ] = False,
    config: Annotated[
        Path | None, typer.Option("--config", help="a TOML file with settings; flags win over it")
    ] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", help="tiles as a family of heads wants them: hvit, hipt")
    ] = None,
    settings: dict[str, Any] | None = None,
) -> None:
    """Slides to features. The same command again resumes, and does nothing where nothing is missing.

    \b
    slidestream run slides/ -o out/ -e resnet50 --mpp 0.5 --levels 3
    slidestream run 'slides/**/*.svs' -o out/ -e uni --mpp-csv mpp.csv
    slidestream run slides/ -o out/ --config recipe.toml --workers 8
    """
    with importing():
        from .batch import run as run_batch

    values = (read_toml(config) if config else {}) | (settings or {}) | ({"preset": preset} if preset else {})
    where = {"workers": workers, "devices": devices, "cluster": cluster, "scheduler": scheduler}
    options = _run_options(values, mpp_csv=mpp_csv, **where)
    recipe = make_config(**values)
    with _Terminal() as terminal:
        report = run_batch(slides, out, config=recipe, redo=redo, progress=terminal, **options)
    _tell(report, out)
    raise typer.Exit(report.exit_code)


RUN_KEYS = {"workers": int, "devices": str, "cluster": str, "scheduler": str, "mpp_csv": str}


def _run_options(values: dict[str, Any], **flags: Any) -> dict[str, Any]:
    """How the work is done: taken out of `values` (a TOML file's), where a flag does not say it."""
    options = {}
    for name, kind in RUN_KEYS.items():
        given = values.pop(name, None)
        if given is not None and (not isinstance(given, kind) or isinstance(given, bool)):
            raise UsageError(f"{name}: {given!r} in the configuration is no {kind.__name__}")
        if flags[name] is not None or given is not None:
            options[name] = given if flags[name] is None else flags[name]
    return options


LabelsFile = Annotated[
    Path | None,
    typer.Option("--labels", help="a table slide,label[,patient][,site][,split]; not for images in folders of classes"),
]
Level = Annotated[float | None, typer.Option("--level", help="µm/px of the level that is read [default: the finest]")]
WhichEncoder = Annotated[str | None, typer.Option("--encoder", "-e", help="which features, where there are several")]
Task = Annotated[str, typer.Option("--task", help="classification, multilabel, ordinal, regression or survival")]
Target = Annotated[str, typer.Option("--target", help="the column of the table that is asked for")]
Group = Annotated[str, typer.Option("--group", help="the column of slides that are never parted")]
Site = Annotated[str | None, typer.Option("--site", help="a column of sites that are never parted, such as hospitals")]
Unit = Annotated[str, typer.Option("--unit", help="slide, or patient: all slides of one are one bag")]
Folds = Annotated[int | None, typer.Option("--cv", min=2, help="folds of a cross-validation")]
Splits = Annotated[Path | None, typer.Option("--splits", help="fold files as CLAM's: splits_0.csv, or their folder")]
SplitBy = Annotated[str | None, typer.Option("--split-by", help="tiles: the third of slides with most is the test")]
Seeds = Annotated[int, typer.Option("--seeds", min=1, help="how often the folds are drawn and trained anew")]
HowTrained = Annotated[str, typer.Option("--recipe", help="default, or paper: as the head's authors trained it")]
Epochs = Annotated[int | None, typer.Option("--epochs", min=1, help="instead of the recipe's; so the next four")]
Patience = Annotated[int | None, typer.Option("--patience", min=1, help="epochs without a better validation loss")]
LearningRate = Annotated[float | None, typer.Option("--lr", min=0)]
WeightDecay = Annotated[float | None, typer.Option("--weight-decay", min=0)]
Keep = Annotated[str | None, typer.Option("--keep", help="of all epochs the best, the last, or average5")]
Augment = Annotated[bool | None, typer.Option("--augment/--no-augment", help="heads of pixels: mirrored, recoloured …")]
Mix = Annotated[str | None, typer.Option("--mix", help="heads of pixels: cutmix, saliencymix, scoremix …")]
Seed = Annotated[int, typer.Option("--seed")]
Bags = Annotated[
    Path,
    typer.Argument(
        parser=typed, metavar="OUT", help="an output folder of `slidestream run`, or one of .h5, .pt, .npy or images"
    ),
]


@app.command()
def train(
    out: Bags,
    labels: LabelsFile = None,
    head: Annotated[
        str, typer.Option("--head", help="abmil, clam_sb, longmil, … (an unknown name lists all), or module:function")
    ] = "abmil",
    name: Annotated[str | None, typer.Option("--name", help="of the model [default: the head's]")] = None,
    level: Level = None,
    encoder: WhichEncoder = None,
    task: Task = "classification",
    target: Target = "label",
    group: Group = "patient",
    site: Site = None,
    unit: Unit = "slide",
    cv: Folds = None,
    splits: Splits = None,
    split_by: SplitBy = None,
    seeds: Seeds = 1,
    recipe: HowTrained = "default",
    epochs: Epochs = None,
    patience: Patience = None,
    lr: LearningRate = None,
    weight_decay: WeightDecay = None,
    keep: Keep = None,
    augment: Augment = None,
    mix: Mix = None,
    seed: Seed = 0,
    option: Annotated[
        list[str] | None, typer.Option("--option", help="of the head, as name=value; may be repeated")
    ] = None,
) -> None:
    """Train an attention head on features; writes OUT/models/<name>.

    \b
    slidestream train out/ --labels labels.csv --head abmil
    slidestream train out/ --labels labels.csv --head abmil --option gated=false --name plain --level 1.0
    slidestream train out/ --labels labels.csv --head clam_sb --recipe paper --cv 5 --seeds 3 --site hospital
    slidestream train images/ --head scorenet --recipe paper --cv 5
    """
    settings = {k: v for k, v in locals().items() if k not in ("out", "labels", "option")}
    from .evaluation import summary_lines
    from .training import train as train_head

    trained = train_head(out, labels, **settings, **_options(option or []))
    for warning in trained.warnings:
        _say(f"note: {warning}")
    for line in summary_lines(trained.results) if trained.results else ():
        _say(line)
    for part, metrics in trained.metrics.items():
        _say(f"{part:6}" + "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    _say(f"best epoch {trained.best_epoch + 1}; the model is in {trained.folder}")


@app.command()
def compare(
    out: Bags,
    heads: Annotated[str, typer.Option("--heads", help="with commas between; abmil@1.0 reads the level of 1 µm/px")],
    labels: LabelsFile = None,
    name: Annotated[str, typer.Option("--name", help="of the folder of its models and results")] = "compare",
    encoder: WhichEncoder = None,
    task: Task = "classification",
    target: Target = "label",
    group: Group = "patient",
    site: Site = None,
    unit: Unit = "slide",
    cv: Folds = None,
    splits: Splits = None,
    split_by: SplitBy = None,
    seeds: Seeds = 1,
    recipe: HowTrained = "default",
    epochs: Epochs = None,
    patience: Patience = None,
    lr: LearningRate = None,
    weight_decay: WeightDecay = None,
    keep: Keep = None,
    seed: Seed = 0,
) -> None:
    """Train several heads on the same folds, 5 unless told otherwise, and test their differences in pairs.

    \b
    slidestream compare out/ --labels labels.csv --heads mean,abmil,longmil
    slidestream compare out/ --labels labels.csv --heads abmil@0.5,abmil@1.0 --cv 10 --seeds 5
    """
    settings = {k: v for k, v in locals().items() if k not in ("out", "labels", "heads")}
    from .comparison import compare as compare_heads

    found = compare_heads(
        out,
        labels,
        heads=[head.strip() for head in heads.split(",") if head.strip()],
        on_head=lambda head, trained: _say(f"{head}: {trained.folder}"),
        **settings,
    )
    for line in (*(f"note: {warning}" for warning in found.warnings), *found.lines(), str(found.file)):
        _say(line)


@app.command()
def probe(
    out: Bags,
    labels: Annotated[Path, typer.Option("--labels", help="a table slide,label[,patient][,site][,split]")],
    knn: Annotated[bool, typer.Option("--knn", help="the nearest slides vote")] = False,
    linear: Annotated[bool, typer.Option("--linear", help="logistic regression")] = False,
    pooling: Annotated[str, typer.Option("--pooling", help="a slide is the mean or the max of its tiles")] = "mean",
    model: Annotated[str | None, typer.Option("--model", "-m", help="or what this model makes of it")] = None,
    level: Level = None,
    encoder: WhichEncoder = None,
    target: Target = "label",
    group: Group = "patient",
    site: Site = None,
    unit: Unit = "slide",
    cv: Folds = None,
    splits: Splits = None,
    split_by: SplitBy = None,
    seeds: Seeds = 1,
    seed: Seed = 0,
) -> None:
    """What features say by themselves: nearest neighbours and logistic regression on a vector a slide, out of fold.

    \b
    slidestream probe out/ --labels labels.csv
    slidestream probe out/ --labels labels.csv --knn --pooling max --cv 10
    """
    settings = {k: v for k, v in locals().items() if k not in ("out", "labels")}
    if not knn and not linear:
        settings |= {"knn": True, "linear": True}
    from .probing import lines
    from .probing import probe as probe_features

    found = probe_features(out, labels, **settings)
    for line in (*(f"note: {warning}" for warning in found["warnings"]), *lines(found)):
        _say(line)


def _options(pairs: list[str]) -> dict[str, Any]:
    """name=value → keyword arguments; a value is read as TOML (true, 3, 0.5, "text"), else as text."""
    import tomllib

    options: dict[str, Any] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign:
            raise UsageError(f"--option {pair!r}: write name=value")
        try:
            options[name.strip().replace("-", "_")] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            options[name.strip().replace("-", "_")] = value
    return options


@app.command()
def pretrain(
    out: OnDisk,
    arch: Annotated[
        str, typer.Option("--arch", help="vit_small_dino, vit_tiny_scorenet for tiles of 128 px, or scorenet")
    ] = "vit_small_dino",
    pretext: Annotated[
        str, typer.Option("--pretext", help="dino, or unbiased: ScoreNet's own, on large tiles as whole pictures")
    ] = "dino",
    name: Annotated[str | None, typer.Option("--name", help="of the folder in OUT/pretrained [default: arch]")] = None,
    labels: Annotated[
        Path | None, typer.Option("--labels", help="a label table: its training slides only, and classes are watched")
    ] = None,
    fold: Annotated[int | None, typer.Option("--fold", min=0, help="of --cv or --splits: who is trained on")] = None,
    cv: Folds = None,
    splits: Splits = None,
    task: Task = "classification",
    target: Target = "label",
    group: Group = "patient",
    site: Site = None,
    level: Level = None,
    tiles_per_epoch: Annotated[
        int | None, typer.Option("--tiles-per-epoch", min=1, help="drawn anew for each epoch [default: all]")
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", min=1, help="[default: 100]")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=2, help="of all processes together [default: 128]")
    ] = None,
    lr: Annotated[
        float | None, typer.Option("--lr", min=0, help="for a batch of 256, and in proportion [default: 0.0005]")
    ] = None,
    patience: Annotated[
        int | None, typer.Option("--patience", min=1, help="epochs without better neighbours; needs --labels")
    ] = None,
    seed: Seed = 0,
    device: Annotated[str | None, typer.Option("--device", help="[default: cuda where there is one, else cpu]")] = None,
) -> None:
    """Pre-train an encoder on tiles without labels; writes OUT/pretrained/<name>. Several GPUs: start it by torchrun.

    \b
    slidestream pretrain out/ --arch vit_tiny_scorenet --epochs 100
    slidestream pretrain out/ --labels labels.csv --cv 5 --fold 0 --name fold0 --patience 10
    slidestream pretrain out/ --arch scorenet --pretext unbiased
    """
    settings = {k: v for k, v in locals().items() if k != "out"}
    with importing():
        from .pretraining import pretrain as pretrain_encoder

    first = int(os.environ.get("RANK", 0)) == 0
    done = pretrain_encoder(out, **settings, on_epoch=lambda course: _say(course.words()) if first else None)
    if not first:
        return
    for warning in done.warnings:
        _say(f"note: {warning}")
    if done.tiles_per_s is not None:
        _say(f"{done.tiles_per_s:.1f} tiles/s")
    _say(f"weights of epoch {done.epoch}: {done.weights}")
    use = "train … --head scorenet --option weights=" if pretext == "unbiased" else f"run … -e {arch} --weights "
    _say(f"next: slidestream {use}{done.weights}")


@app.command()
def predict(
    source: Annotated[str, typer.Argument(help="an output folder of `slidestream run`, or slides (then give -o)")],
    model: Annotated[
        list[str],
        typer.Option("--model", "-m", help="a model folder, or a name below OUT/models; the mean of several"),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", parser=typed, metavar="PATH", help="where features of slides go")
    ] = None,
    folds: Annotated[bool, typer.Option("--folds", help="the mean of the models of its cross-validation")] = False,
    vote: Annotated[bool, typer.Option("--vote", help="of several models, the class that most of them say")] = False,
    zoom: Annotated[
        bool, typer.Option("--zoom", help="encode only tiles below those that the model (hagmil) chooses")
    ] = False,
    labels: Annotated[
        Path | None, typer.Option("--labels", help="of these slides: how good the predictions are is told as well")
    ] = None,
    target: Target = "label",
    group: Group = "patient",
    weights: Annotated[
        str | None, typer.Option("--weights", help="the encoder's checkpoint, where it has moved")
    ] = None,
    mpp_csv: MppCsv = None,
    workers: Workers = None,
    devices: Devices = None,
    cluster: Cluster = None,
    scheduler: Scheduler = None,
) -> None:
    """Predict slides with a trained model; writes predictions/<model>.csv, attention and heatmaps.

    \b
    slidestream predict out/ --model abmil
    slidestream predict new_slides/ -o new_out/ --model out/models/abmil
    slidestream predict new_slides/ -o new_out/ --model out/models/hagmil --zoom
    slidestream predict new_out/ --model out/models/abmil --folds --labels new_labels.csv
    """
    from .batch import predict as predict_batch

    if labels is not None and zoom:
        raise UsageError("--labels needs the features of all tiles, which --zoom does not make: leave one of them out")
    given = {"weights": weights, "mpp_csv": mpp_csv, "workers": workers, "devices": devices}
    given |= {"cluster": cluster, "scheduler": scheduler}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    options |= {name: True for name, wanted in (("zoom", zoom), ("folds", folds), ("vote", vote)) if wanted}
    place = typed(out or source)
    with _Terminal() as terminal:
        options |= {} if out is None else {"progress": terminal}
        report = predict_batch(source, model, out, **options)
    _tell(report, place)
    if report.saving is not None:
        _say(report.saving.sentence())
    if labels is not None:
        from .external import evaluate_labels

        _tell_metrics(evaluate_labels(place, labels, model, folds=folds, vote=vote, target=target, group=group))
    raise typer.Exit(report.exit_code)


@app.command()
def evaluate(
    out: OnDisk,
    model: Annotated[
        list[str],
        typer.Option("--model", "-m", help="a model folder, or a name below OUT/models; the mean of several"),
    ],
    annotations: Annotated[
        Path,
        typer.Option(
            "--annotations", "-a", help="a folder of GeoJSON, ASAP XML or mask images, named after the slides"
        ),
    ],
    folds: Annotated[bool, typer.Option("--folds", help="the mean of the models of its cross-validation")] = False,
    threshold: Annotated[
        float, typer.Option("--threshold", help="the annotated share of a tile from which on it is positive")
    ] = 0.5,
    score: Annotated[
        str, typer.Option("--score", help="by which tiles are ranked: weight, or raw as in HATNet")
    ] = "weight",
    patients: Annotated[
        Path | None, typer.Option("--patients", help="a table slide,patient: intervals are drawn by patient")
    ] = None,
) -> None:
    """Compare where a model looks with what people annotated; writes OUT/evaluations/<model>, a picture of each slide.

    \b
    slidestream evaluate out/ --model abmil --annotations annotations/
    slidestream evaluate out/ --model hatnet -a masks/ --score raw --threshold 0.1 --patients labels.csv
    """
    from .localisation import evaluate as evaluate_model

    found = evaluate_model(out, model, annotations, folds=folds, threshold=threshold, score=score, patients=patients)
    for line in (*(f"note: {note}" for note in found.notes), *found.lines(), str(found.folder)):
        _say(line)
    raise typer.Exit(found.exit_code)


@app.command()
def stitch(
    out: OnDisk,
    model: Annotated[str, typer.Option("--model", "-m", help="a model of hvit or hipt: its folder, or its name")],
    stride: Annotated[
        float | None,
        typer.Option(
            "--stride",
            help="tiles by which regions are moved: a divisor of their side [default: half of it], or 0.5, 0.25 …, for "
            "which tiles are encoded anew",
        ),
    ] = None,
    gamma: Annotated[
        float, typer.Option("--gamma", min=0, max=1, help="what regions count; 1 - gamma: what counts within tiles")
    ] = 0.5,
    within_tiles: Annotated[
        bool, typer.Option("--within-tiles", help="also the tile encoder's attention, if it is a ViT; encodes anew")
    ] = False,
    unweighted: Annotated[
        bool, typer.Option("--unweighted", help="count a region with few tiles of tissue as much as a full one")
    ] = False,
    slide: Annotated[
        list[str] | None, typer.Option("--slide", help="this slide only; may be repeated [default: all]")
    ] = None,
) -> None:
    """Attention of a hierarchical ViT over whole slides, from overlapping regions; writes heatmaps and arrays.

    \b
    slidestream stitch out/ --model hvit
    slidestream stitch out/ --model hvit --stride 2 --slide case01
    slidestream stitch out/ --model hvit --stride 0.5
    """
    from .mapping import stitch as stitch_slides

    how: dict[str, Any] = {"stride": stride, "gamma": gamma, "within_tiles": within_tiles, "unweighted": unweighted}
    with _Terminal() as terminal:
        report = stitch_slides(out, model, **how, slides=slide or (), progress=terminal)
    _tell(report, out)
    raise typer.Exit(report.exit_code)


@app.command()
def status(out: OutFolder) -> None:
    """What is done, empty, failed and waiting in an output folder, also while a run is going.

    \b
    slidestream status out/
    """
    from .output import status_lines

    lines, code = status_lines(out)
    for line in lines:
        _say(line)
    raise typer.Exit(code)


@app.command()
def verify(
    out: OutFolder,
    deep: Annotated[
        bool, typer.Option("--deep", help="also encode some tiles of each slide anew; needs slides and weights")
    ] = False,
) -> None:
    """Read all of an output folder again: what is damaged or unfinished, and which command mends it; writes nothing.

    \b
    slidestream verify out/
    slidestream verify out/ --deep
    """
    from .verification import verify as verify_folder

    with _Terminal() as terminal:
        found = verify_folder(out, deep, progress=terminal)
    for line in found.lines():
        _say(line)
    raise typer.Exit(found.exit_code)


@app.command()
def doctor(
    encoder: Annotated[str | None, typer.Option("--encoder", "-e", help="try this encoder on one tile")] = None,
    weights: Annotated[str | None, typer.Option("--weights", help="with this checkpoint, or `random`")] = None,
) -> None:
    """What works on this machine: libraries, readers, devices, encoders.

    \b
    slidestream doctor
    slidestream doctor -e lab_lbp
    """
    from .doctor import examine

    lines, code = examine(encoder, weights)
    for line in lines:
        _say(line)
    raise typer.Exit(code)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="where the demo puts its slides and results")] = Path("demo"),
    slides: Annotated[int, typer.Option("--slides", min=12, help="how many slides to make")] = 24,
    seed: Annotated[int, typer.Option("--seed", help="another seed makes other slides")] = 0,
) -> None:
    """Make slides, extract features, train AB-MIL on two thirds, predict the last third. No download, no GPU.

    \b
    slidestream demo
    slidestream demo /tmp/demo --seed 1
    """
    from .demo import run_demo

    with _Terminal() as terminal:
        lines = run_demo(folder, slides, seed, terminal)
    for line in lines:
        _say(line)


def _say(text: str) -> None:
    print(text, flush=True)


class _Terminal:
    """Progress: two bars on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self.bars: Any = None
        self.count: Any = None  # the bar of tiles, once there are any
        self.total = self.seen = 0

    def __enter__(self) -> "_Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bars is not None:
            self.bars.stop()

    def start(self, total: int, todo: int) -> None:
        self.total, self.seen = total, total - todo
        self.note(f"{total} slides, {total - todo} finished before, {todo} to do")
        if not sys.stdout.isatty() or not todo:
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description:6}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[rate]}"),
        )
        self.bars = Progress(*columns)
        self.slides = self.bars.add_task("slides", total=total, completed=self.seen, rate="")
        self.bars.start()

    def slide(self, outcome: Any) -> None:
        self.seen += 1
        if self.bars is None:
            detail = outcome.message if outcome.status == "failed" else f"{outcome.tiles or 0} tiles"
            _say(
                f"[{self.seen}/{self.total}] {outcome.status:7} {outcome.slide}  {detail}  {outcome.seconds or 0:.1f} s"
            )
        else:
            self.bars.update(self.slides, advance=1)
            if outcome.status == "failed":
                self.bars.console.print(
                    f"failed {outcome.slide}: {outcome.message}", markup=False, highlight=False, style="red"
                )

    def tiles(self, count: int, so_far: Any) -> None:
        if self.bars is not None:
            if self.count is None:
                self.count = self.bars.add_task("tiles", total=None, rate="")
            rates = so_far.rates()
            words = f"{rates['tiles_per_s']:.0f} tiles/s, encoder busy {rates['encoder_busy']:.0%}"
            self.bars.update(self.count, advance=count, rate=words)

    def note(self, text: str) -> None:
        _say(text)


def _tell(report: Any, out: Path) -> None:
    """The failures as a table, then one line of totals."""
    for outcome in report.failures:
        _say(f"failed  {outcome.slide}\n        {outcome.stage}: {outcome.message}")
    counts = ", ".join(f"{number} {status}" for status, number in sorted(report.counts.items()))
    encoded = f"; {report.tiles_encoded} tiles encoded" if report.tiles_encoded else ""
    _say(f"{counts or 'no slide is finished'}{encoded}; {report.seconds:.1f} s; {out}")
    if report.tiles_encoded:
        _say(f"{report.meter.rates()['tiles_per_s']:.0f} tiles/s; {report.meter.sentence()}")
    if report.interrupted:
        _say("interrupted; the same command resumes")


def _tell_metrics(results: dict[str, Any]) -> None:
    from .evaluation import summary_lines

    for line in (*(f"note: {warning}" for warning in results["warnings"]), *summary_lines(results)):
        _say(line)


def _log_fault(error: BaseException) -> str:
    """Where the traceback of a fault was written: the output folder's logs, else here, else the temporary folder."""
    given = [sys.argv[i + 1] for i, arg in enumerate(sys.argv[:-1]) if arg in ("-o", "--out")]
    folders = (
        [Path(given[0]) / "logs"]
        if given
        else [Path(a) / "logs" for a in sys.argv[1:] if (Path(a) / "run.json").is_file()]
    )
    name = f"slidestream-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    text = " ".join(sys.argv) + "\n" + "".join(traceback.format_exception(error))
    for folder in (*(f for f in folders if f.is_dir()), Path.cwd(), Path(tempfile.gettempdir())):
        try:
            (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
            return str(folder / name)
        except OSError:
            continue  # read-only, or full: which may be the very fault
    return f"the traceback, which no log could take:\n{text}"


def main() -> None:
    """The console command. Exits 0, 1 usage, 2 nothing succeeded, 3 some failed, 4 had to stop, 130 interrupted."""
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # names that are not UTF-8
    sys.stderr.reconfigure(errors="replace")  # type: ignore[union-attr]
    # On a shared machine threads that spin double the time of a training.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.path.insert(0, os.getcwd())  # so that module:function finds what stands in the current folder
    try:
        code = app(standalone_mode=False)
    except typer.Abort:
        code = 130
    except typer.TyperException as error:
        error.show()  # type: ignore[attr-defined]
        code = 1
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except RunStopped as error:
        print(f"stopped: {error}. What is complete stays; the same command resumes", file=sys.stderr)
        code = 4
    except KeyboardInterrupt:
        code = 130
    except Exception as error:  # noqa: BLE001 - a fault of ours: one line here, the rest in a log
        words = " ".join(str(error).split()) or type(error).__name__
        print(f"stopped by a fault of slidestream: {words}; see {_log_fault(error)}", file=sys.stderr)
        code = 4
    sys.exit(code if isinstance(code, int) else 0)
