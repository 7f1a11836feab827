"""The command line: real flags, real help, and one exit code for each kind of ending."""

import inspect
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from heads.metrics import Interval
from pipeline import batch, cli, doctor, localisation, mapping, output, probing, training
from pipeline import comparison as comparing
from pipeline.comparison import Comparison
from pipeline.config import Config
from pipeline.errors import BrokenBag, RunStopped, UsageError
from pipeline.localisation import Evaluated, Row, evaluate
from pipeline.meter import Meter
from pipeline.outcome import Outcome, Report
from pipeline.saving import Saving
from pipeline.training import Trained

COMMANDS = (
    "run",
    "pretrain",
    "train",
    "compare",
    "probe",
    "predict",
    "evaluate",
    "stitch",
    "status",
    "verify",
    "doctor",
    "demo",
)
JUDGED = {
    "--labels",
    "--encoder",
    "-e",
    "--target",
    "--group",
    "--site",
    "--unit",
    "--cv",
    "--splits",
    "--split-by",
    "--seeds",
    "--seed",
}
TRAINED = {"--task", "--recipe", "--epochs", "--patience", "--lr", "--weight-decay", "--keep"}
OWN_FLAGS = {
    "pretrain": {"--arch", "--pretext", "--name", "--labels", "--fold", "--cv", "--splits", "--task", "--target",
                 "--group", "--site", "--level", "--tiles-per-epoch", "--epochs", "--batch-size", "--lr", "--patience",
                 "--seed", "--device"},
    "run": {"--out", "-o", "--mpp-csv", "--workers", "--devices", "--cluster", "--scheduler", "--redo", "--config",
            "--preset", "-e"},
    "train": {"--head", "--name", "--level", "--option", "--augment", "--mix", *JUDGED, *TRAINED},
    "compare": {"--heads", "--name", *JUDGED, *TRAINED},
    "probe": {"--knn", "--linear", "--pooling", "--model", "-m", "--level", *JUDGED},
    "predict": {"--model", "-m", "--out", "-o", "--folds", "--vote", "--zoom", "--labels", "--target", "--group",
                "--weights", "--mpp-csv", "--workers", "--devices", "--cluster", "--scheduler"},
    "evaluate": {"--model", "-m", "--annotations", "-a", "--folds", "--threshold", "--score", "--patients"},
    "stitch": {"--model", "-m", "--stride", "--gamma", "--within-tiles", "--unweighted", "--slide"},
    "status": set(),
    "verify": {"--deep"},
    "doctor": {"--encoder", "-e", "--weights"},
    "demo": {"--slides", "--seed"},
}  # fmt: skip


def help_of(*command: str) -> str:
    result = CliRunner().invoke(cli.app, [*command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    return result.output


def main(monkeypatch, *arguments: str) -> int:
    """The console command in this process."""
    monkeypatch.setattr(sys, "argv", ["slidestream", *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for stream in ("stdout", "stderr"):  # pytest's streams cannot always be set to another way with bad letters
        if not hasattr(getattr(sys, stream), "reconfigure"):
            monkeypatch.setattr(getattr(sys, stream), "reconfigure", lambda **_: None, raising=False)


# --- help ------------------------------------------------------------------------------------------------------------


def test_every_command_stands_in_the_help():
    text = help_of()
    assert {name for name in COMMANDS if re.search(rf"^\W*{name}\s", text, re.MULTILINE)} == set(COMMANDS)
    assert {command.callback.__name__ for command in cli.app.registered_commands} == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_flag(command):
    words = set(re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*", help_of(command)))
    settings = {"--" + name.replace("_", "-") for name in Config.model_fields} if command == "run" else set()
    assert OWN_FLAGS[command] | settings <= words
    named = {"--" + name[5:] for name in words if name.startswith("--no-")}
    assert {w for w in words if w.startswith("--") and not w.startswith("--no-")} - {"--help"} == (
        {flag for flag in OWN_FLAGS[command] if flag.startswith("--")} | settings
    ), "no flag in a text that is none"
    assert named <= settings | OWN_FLAGS[command]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_in_the_help_parse(command, monkeypatch):
    lines = [line.strip() for line in help_of(command).splitlines() if line.strip().startswith("slidestream ")]
    assert lines
    click_command = cli.typer.main.get_command(cli.app)
    for line in lines:
        words = [word.strip("'") for word in line.split()[1:]]
        assert words[0] == command
        click_command.commands[command].make_context(command, words[1:])  # raises where a flag does not exist


# --- what the commands are given -------------------------------------------------------------------------------------


def test_run_hands_everything_on(monkeypatch, tmp_path, capsys):
    seen = {}

    def run(slides, out, **options):
        seen.update(options, slides=slides, out=out)
        return Report((Outcome("a", "done"), Outcome("b", "empty")), Meter(tiles=120, seconds=2.5, encoding=2.4), 3.0)

    monkeypatch.setattr(batch, "run", run)
    (tmp_path / "c.toml").write_text("mpp = 1.0\nmin_tissue = 0.3\n")
    flags = "-o out --config c.toml --mpp 2 --origin 3 4.5 --no-remove-pen --mpp-csv m.csv --workers 3 --redo"
    code = main(monkeypatch, "run", "slides/*.svs", *flags.split(), "--scheduler", "tcp://x")
    assert code == 0
    assert (seen["slides"], seen["out"], seen["mpp_csv"]) == ("slides/*.svs", Path("out"), Path("m.csv"))
    assert (seen["workers"], seen["scheduler"], seen["redo"]) == (3, "tcp://x", True)
    assert seen["config"] == Config(mpp=2.0, min_tissue=0.3, origin=(3.0, 4.5), remove_pen=False)
    assert "1 done, 1 empty; 120 tiles encoded; 3.0 s; out" in capsys.readouterr().out


def test_presets_and_no_settings_at_all(monkeypatch):
    configs = []
    monkeypatch.setattr(batch, "run", lambda *_, config, **__: configs.append(config) or Report(()))
    main(monkeypatch, "run", "s", "-o", "o")
    main(monkeypatch, "run", "s", "-o", "o", "--preset", "hvit", "--min-tissue", "0.2")
    assert configs[0] == Config()
    assert (configs[1].levels, configs[1].min_tissue, configs[1].keep_background) == (4, 0.2, True)


def test_train_hands_everything_on(monkeypatch, capsys):
    seen = {}

    def train(out, labels, **options):
        seen.update(options, out=out, labels=labels)
        return Trained(Path("out/models/m"), {"val": {"auc": 0.87654}}, 4, 7, ("1 rows name no slide",))

    monkeypatch.setattr(training, "train", train)
    flags = "--labels l.csv --head mean --name m --level 1 -e uni --epochs 3 --patience 2 --lr 0.01 --weight-decay 0"
    options = "--recipe paper --option gated=false --option hidden-size=12 --option way=long --option x='7'"
    options += " --no-augment --mix scoremix"
    judged = "--task ordinal --target t --group g --site s --unit patient --cv 3 --splits f --split-by tiles --seeds 2"
    code = main(monkeypatch, "train", "out", *flags.split(), "--seed", "9", *options.split(), *judged.split())
    assert code == 0
    assert seen == {
        "out": Path("out"), "labels": Path("l.csv"), "head": "mean", "name": "m", "level": 1.0, "encoder": "uni",
        "recipe": "paper", "epochs": 3, "patience": 2, "lr": 0.01, "weight_decay": 0.0, "seed": 9,
        "gated": False, "hidden_size": 12, "way": "long", "x": "7", "task": "ordinal", "target": "t", "group": "g",
        "site": "s", "unit": "patient", "cv": 3, "splits": Path("f"), "split_by": "tiles", "seeds": 2, "keep": None,
        "augment": False, "mix": "scoremix",
    }  # fmt: skip
    text = capsys.readouterr().out
    assert "note: 1 rows name no slide" in text
    assert "auc 0.8765" in text
    assert "best epoch 5" in text


ROW = {"head": "a", "pooled": {}, "parameters": 1}


@pytest.mark.parametrize(
    ("module", "name", "answer", "flags"),
    [
        (training, "train", Trained(Path("m"), {}, 0, 0, ()), ""),
        (comparing, "compare", Comparison(Path("c"), "auc", [ROW], [], ()), ""),
        (probing, "probe", {"warnings": []}, "--knn --linear"),
    ],
)
def test_flags_have_the_defaults_of_the_function(monkeypatch, module, name, answer, flags):
    real = {key: p.default for key, p in inspect.signature(getattr(module, name)).parameters.items()}
    shared = {key: p.default for key, p in inspect.signature(training.train).parameters.items()}
    seen = {}
    monkeypatch.setattr(module, name, lambda *_, **given: seen.update(given) or answer)
    heads = ["--heads", "a,b"] if name == "compare" else []
    assert main(monkeypatch, name, "out", "--labels", "l.csv", *flags.split(), *heads) == 0
    seen = {key: value for key, value in seen.items() if key not in ("heads", "on_head")}
    assert seen == {key: real.get(key, shared.get(key)) for key in seen}


# --- heads and features, for real ------------------------------------------------------------------------------------


def call(monkeypatch, capsys, *arguments) -> tuple[int, list[str], list[str]]:
    """(code, lines on the terminal, lines of errors)."""
    capsys.readouterr()
    code = main(monkeypatch, *map(str, arguments))
    out, err = capsys.readouterr()
    return code, out.splitlines(), err.splitlines()


@pytest.mark.usefixtures("_few_draws")
def test_train_on_a_folder_of_features(labelled, monkeypatch, capsys):
    flags = ["--head", "mean", "--cv", "2", "--epochs", "1"]
    code, lines, err = call(monkeypatch, capsys, "train", labelled.root, "--labels", labelled.labels, *flags)
    assert (code, err) == (0, [])
    assert re.fullmatch(r"out of fold +pooled +95 % interval +mean of folds ± sd", lines[0])
    auc = next(line for line in lines if line.startswith("auc "))
    assert re.fullmatch(r"auc +\d\.\d{3}  \d\.\d{3} to \d\.\d{3} +\d\.\d{3} ± \d\.\d{3}", auc)
    assert any(re.match(r"val +slides 4 ", line) or re.match(r"val +slides 5 ", line) for line in lines)
    assert lines[-1] == f"best epoch 1; the model is in {labelled.root / 'models/mean'}"
    assert max(map(len, lines[:-1])) < 130
    assert "nan" not in "".join(lines[:-1])


@pytest.mark.usefixtures("_few_draws")
def test_compare_heads(labelled, monkeypatch, capsys):
    labelled.table([*[("neg", "pos")[i % 2] for i in range(24)], "neg"])
    flags = ["--heads", "mean, max,", "--cv", "2", "--epochs", "1"]
    code, lines, err = call(monkeypatch, capsys, "compare", labelled.root, "--labels", labelled.labels, *flags)
    assert (code, err) == (0, [])
    assert lines[0] == f"mean: {labelled.root / 'models/compare/mean'}"
    assert lines[2] == "note: 1 rows name no slide of this store: s24."
    assert lines[3].split()[:2] == ["head", "parameters"]
    assert lines[-1] == str(labelled.root / "models/compare/comparison.json")
    assert any(re.match(r"mean - max +[+-]\d\.\d{3} \([+-]\d\.\d{3} to [+-]\d\.\d{3}\)  p ", line) for line in lines)


@pytest.mark.usefixtures("_few_draws")
@pytest.mark.parametrize(
    ("flags", "kinds"), [([], ["knn", "linear"]), (["--knn"], ["knn"]), (["--linear", "--pooling", "max"], ["linear"])]
)
def test_probe_features(labelled, monkeypatch, capsys, flags, kinds):
    code, lines, err = call(
        monkeypatch, capsys, "probe", labelled.root, "--labels", labelled.labels, "--cv", "2", *flags
    )
    assert (code, err) == (0, [])
    assert [line for line in lines if line in ("knn", "linear")] == kinds
    assert sum(line.startswith("auc ") for line in lines) == len(kinds)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train {root} --labels nowhere.csv", "nowhere.csv: No such file"),
        ("train {root} --labels {labels} --head abmill", "did you mean 'abmil'"),
        ("train {root} --labels {labels} --task regresion", "Did you mean 'regression'"),
        ("train {root} --labels {labels} --task regression", "label of 's00' is 'neg', which is not a number"),
        ("train {root} --labels {labels} --unit case", "--unit must be one of slide, patient, not 'case'"),
        ("train {root} --labels {labels} --cv 2 --split-by tiles", "--cv and --split-by: only one of them"),
        ("train {root} --labels {labels} --keep first", "keep must be one of best, last, average5"),
        ("train {root} --labels {labels} --head longmil", "has no grid"),
        ("train {root} --labels {labels} --seeds 3", "--seeds: say with --cv"),
        ("train {root}/s00.npy --labels {labels}", "no output folder"),
        ("compare {root} --labels {labels} --heads mean", "two different heads at least"),
        ("compare {root} --labels {labels} --heads mean,maxx --epochs 1", "did you mean 'max'"),
        ("compare {root} --labels {labels} --heads mean,max@x --epochs 1", "is no number of µm/px"),
        ("probe {root} --labels {labels} --pooling median", "--pooling must be one of mean, max"),
        ("probe {root} --labels {labels} --model abmil", "no model at"),
        ("probe {root} --labels {labels} --cv 25", "only 24 patients"),
    ],
)
@pytest.mark.usefixtures("_few_draws")
def test_what_is_wrong_is_one_line(labelled, monkeypatch, capsys, command, words):
    filled = command.format(root=labelled.root, labels=labelled.labels).split()
    code, _, err = call(monkeypatch, capsys, *filled)
    assert code == 1
    assert len(err) == 1
    assert words in err[0]


@pytest.mark.parametrize(
    "command", ["train x --labels l.csv --cv 1", "compare x --labels l.csv", "probe x", "train x --labels l.csv --x 1"]
)
def test_flags_that_are_missing_or_out_of_range(monkeypatch, capsys, command):
    code, _, err = call(monkeypatch, capsys, *command.split())
    assert code == 1
    assert err


def test_predict_hands_on_only_what_was_given(monkeypatch):
    calls = []
    monkeypatch.setattr(batch, "predict", lambda *given, **options: calls.append((given, options)) or Report(()))
    assert main(monkeypatch, "predict", "out", "--model", "m") == 0
    main(monkeypatch, "predict", "slides", "-o", "new", "-m", "m", "--weights", "w.pt", "--workers", "2")
    assert calls[0] == (("out", ["m"], None), {})
    assert calls[1][0] == ("slides", ["m"], Path("new"))
    assert {k: v for k, v in calls[1][1].items() if k != "progress"} == {"weights": "w.pt", "workers": 2}
    main(monkeypatch, "predict", "slides", "-o", "new", "-m", "m", "--zoom")
    assert {k: v for k, v in calls[2][1].items() if k != "progress"} == {"zoom": True}


def test_evaluate_hands_everything_on(monkeypatch, capsys):
    seen = []
    rows = (
        Row(Outcome("a", "done"), "a.xml", {"tiles": 4, "looked_at": 3, "positive": 2}),
        Row(Outcome("b", "failed")),
    )
    means = {"auc_raw": Interval(0.5, 0.25, 0.75), "dice_20": Interval(0.125, np.nan, np.nan)}
    answer = Evaluated(Path("f"), rows, means, {"auc_raw": 7, "dice_10": 0, "dice_20": 1}, ("odd",))
    monkeypatch.setattr(localisation, "evaluate", lambda *given, **options: seen.append((given, options)) or answer)
    flags = "-m m -m n -a masks --folds --threshold 0.25 --score raw --patients p.csv"
    assert main(monkeypatch, "evaluate", "out", *flags.split()) == 3
    main(monkeypatch, "evaluate", "out", "--model", "m", "--annotations", "masks")
    real = inspect.signature(evaluate).parameters
    assert seen[0] == (
        (Path("out"), ["m", "n"], Path("masks")),
        {"folds": True, "threshold": 0.25, "score": "raw", "patients": Path("p.csv")},
    )
    assert seen[1][1] == {name: real[name].default for name in seen[1][1]}
    text = capsys.readouterr().out
    assert "note: odd" in text
    assert "1 slides with annotations, 0 without; 2 of 4 tiles are positive, 3 were looked at" in text
    assert re.search(r"^auc_raw +0\.500  0\.250 to 0\.750 +7$", text, re.MULTILINE)
    assert re.search(r"^dice +- +0\.125 +- +- +- +- +0$", text, re.MULTILINE)


def test_predict_tells_what_zooming_saved(monkeypatch, capsys):
    report = Report((Outcome("a", "done"),), saving=Saving(0.25, 100, 30, 0.1, 2.0))
    monkeypatch.setattr(batch, "predict", lambda *_, **__: report)
    main(monkeypatch, "predict", "slides", "-o", "new", "-m", "m", "--zoom")
    assert "k = 0.25: 30 of 100 tiles encoded (30%); the encoder was spared about 7.0 s" in capsys.readouterr().out


def test_stitch_hands_on_what_was_given(monkeypatch, capsys):
    calls = []
    report = Report((Outcome("a", "done"), Outcome("b", "failed", "open", message="it is gone")))
    monkeypatch.setattr(mapping, "stitch", lambda *given, **options: calls.append((given, options)) or report)
    assert main(monkeypatch, "stitch", "out", "--model", "m") == 3
    assert "open: it is gone" in capsys.readouterr().out
    words = "out -m m --stride 0.5 --gamma 0.2 --within-tiles --unweighted --slide a --slide b/c"
    main(monkeypatch, "stitch", *words.split())
    plain = {"stride": None, "gamma": 0.5, "within_tiles": False, "unweighted": False, "slides": ()}
    said = {"stride": 0.5, "gamma": 0.2, "within_tiles": True, "unweighted": True, "slides": ["a", "b/c"]}
    for (given, options), wanted in zip(calls, (plain, said), strict=True):
        assert given == (Path("out"), "m")
        assert {name: value for name, value in options.items() if name != "progress"} == wanted
    assert main(monkeypatch, "stitch", "out", "-m", "m", "--gamma", "2") == 1


@pytest.mark.parametrize(
    ("command", "module", "name"), [("status", output, "status_lines"), ("doctor", doctor, "examine")]
)
def test_lines_and_their_code(monkeypatch, capsys, command, module, name):
    monkeypatch.setattr(module, name, lambda *_: (["one", "two"], 3))
    assert main(monkeypatch, command, *(["out"] if command == "status" else [])) == 3
    assert capsys.readouterr().out == "one\ntwo\n"


# --- exit codes ------------------------------------------------------------------------------------------------------


def ending(monkeypatch, error: BaseException, *arguments: str) -> int:
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(batch, "run", fails)
    return main(monkeypatch, "run", "slides", "-o", *(arguments or ("out",)))


def one_line(text: str) -> str:
    assert text.count("\n") == 1, text
    assert "Traceback" not in text
    return text


@pytest.mark.parametrize(
    ("states", "interrupted", "code"),
    [("done empty", False, 0), ("failed", False, 2), ("done failed", False, 3), ("done", True, 130)],
)
def test_reports(monkeypatch, capsys, states, interrupted, code):
    rows = tuple(Outcome(f"s{i}", state, "open", message="why") for i, state in enumerate(states.split()))
    monkeypatch.setattr(batch, "run", lambda *_, **__: Report(rows, interrupted=interrupted))
    assert main(monkeypatch, "run", "slides", "-o", "out") == code
    text = capsys.readouterr().out
    assert ("open: why" in text) == ("failed" in states)
    assert ("the same command resumes" in text) == interrupted


def test_usage_errors_are_1(monkeypatch, capsys):
    assert ending(monkeypatch, UsageError("no such folder")) == 1
    assert one_line(capsys.readouterr().err) == "error: no such folder\n"
    assert not list(Path.cwd().iterdir())


def test_a_stop_is_4(monkeypatch, capsys):
    assert ending(monkeypatch, RunStopped("no space left")) == 4
    said = one_line(capsys.readouterr().err)
    assert said.startswith("stopped: no space left")
    assert "the same command resumes" in said


def test_ctrl_c_is_130(monkeypatch, capsys):
    assert ending(monkeypatch, KeyboardInterrupt()) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["run", "slides"],
        ["run", "slides", "-o", "out", "--levels", "many"],
        ["run", "slides", "-o", "out", "--levelz", "3"],
        ["run", "slides", "-o", "out", "--workers", "0"],
        ["run", "slides", "-o", "out", "--levels", "99"],
        ["run", "slides", "-o", "out", "--preset", "hvitt"],
        ["run", "slides", "-o", "out", "--config", "none.toml"],
        ["train", "out"],
        ["train", "out", "--labels", "l.csv", "--option", "gated"],
        ["nothing"],
        ["status", "nowhere"],
    ],
)
def test_a_request_at_fault_is_1_and_writes_nothing(monkeypatch, capsys, arguments):
    monkeypatch.setattr(batch, "run", lambda *_, **__: pytest.fail("it ran"))
    assert main(monkeypatch, *arguments) == 1
    said = capsys.readouterr().err
    assert said
    assert "Traceback" not in said
    assert not list(Path.cwd().iterdir())


# --- faults of ours --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("by zero"), OSError(5, "Input/output error"), BrokenBag("a", "store", "x")]
)
def test_a_fault_of_ours_is_4_with_its_traceback_in_a_log(monkeypatch, capsys, error):
    Path("out/logs").mkdir(parents=True)
    assert ending(monkeypatch, error) == 4
    said = one_line(capsys.readouterr().err)
    (log,) = Path("out/logs").iterdir()
    assert str(error) in said
    assert str(log) in said
    text = log.read_text()
    assert text.startswith("slidestream run slides -o out\n")
    assert "Traceback" in text
    assert type(error).__name__ in text


def test_an_error_without_words_is_named(monkeypatch, capsys):
    ending(monkeypatch, AssertionError())
    assert "AssertionError" in one_line(capsys.readouterr().err)
    ending(monkeypatch, ValueError("two\nlines"))
    assert "two lines" in one_line(capsys.readouterr().err)


def test_without_an_output_folder_the_log_stands_here(monkeypatch, capsys):
    assert ending(monkeypatch, ValueError("odd")) == 4
    (log,) = Path.cwd().iterdir()
    assert str(log) in capsys.readouterr().err


def test_the_log_of_a_command_on_an_output_folder(monkeypatch):
    Path("out/logs").mkdir(parents=True)
    Path("out/run.json").write_text("{}")
    monkeypatch.setattr(output, "status_lines", lambda _: 1 / 0)
    assert main(monkeypatch, "status", "out") == 4
    assert len(list(Path("out/logs").iterdir())) == 1


@pytest.mark.parametrize("places", [1, 2, 99])
def test_where_no_log_can_be_written_it_is_still_4(monkeypatch, capsys, tmp_path, places):
    Path("out/logs").mkdir(parents=True)
    left = [places]

    def full(self, *given, original=Path.write_text, **options):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(28, "No space left on device")
        return original(self, *given, **options)

    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr(cli.tempfile, "gettempdir", lambda: str(tmp_path / "out"))
    assert ending(monkeypatch, OSError(28, "No space left on device")) == 4
    said = capsys.readouterr().err
    assert said.startswith("stopped by a fault of slidestream: [Errno 28] No space left")
    where = {1: Path.cwd(), 2: Path("out")}.get(places)
    if where is None:
        assert "Traceback" in said
    else:
        assert list(where.glob("slidestream-*.log"))


def test_names_that_are_no_utf8_can_be_logged(monkeypatch, capsys):
    assert ending(monkeypatch, ValueError("caf\udce9"), "out\udce9") == 4
    (log,) = Path.cwd().glob("*.log")
    assert "caf" in log.read_text()


def test_functions_of_the_current_folder_are_found(monkeypatch, tmp_path):
    (tmp_path / "own_tiler_of_mine.py").write_text("def tiles(slide, mask, config): ...\n")
    found = []

    def run(*_, config, **__):
        from pipeline.stages import load_tiler

        found.append(load_tiler(config.tiler).__module__)
        return Report(())

    monkeypatch.setattr(batch, "run", run)
    assert main(monkeypatch, "run", "s", "-o", "o", "--tiler", "own_tiler_of_mine:tiles") == 0
    assert found == ["own_tiler_of_mine"]
    sys.modules.pop("own_tiler_of_mine")


# --- progress --------------------------------------------------------------------------------------------------------


def test_plain_lines_where_there_is_no_terminal(capsys):
    with cli._Terminal() as terminal:
        terminal.start(3, 2)
        terminal.slide(Outcome("a.svs", "done", tiles=12, seconds=1.26))
        terminal.tiles(12, Meter())
        terminal.slide(Outcome("b.svs", "failed", "open", message="it is cut"))
    assert capsys.readouterr().out.splitlines() == [
        "3 slides, 1 finished before, 2 to do",
        "[2/3] done    a.svs  12 tiles  1.3 s",
        "[3/3] failed  b.svs  it is cut  0.0 s",
    ]


def test_bars_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with cli._Terminal() as terminal:
        terminal.start(3, 2)
        terminal.slide(Outcome("a[b].svs", "failed", message="[red]it is cut[/x]"))
        terminal.tiles(12, Meter(tiles=12, seconds=0.5, encoding=0.4))
        assert terminal.bars.tasks[1].fields["rate"] == "24 tiles/s, encoder busy 80%"
        assert terminal.bars.tasks[0].completed == 2
        assert terminal.bars.tasks[1].completed == 12
    assert "failed a[b].svs: [red]it is cut[/x]" in capsys.readouterr().out, "names are no markup"


def test_the_file_may_say_how_the_work_is_done(tmp_path, monkeypatch):
    seen = {}

    def fake(slides, out, **options):
        seen.update(options)
        return Report(())

    monkeypatch.setattr("pipeline.batch.run", fake)
    file = tmp_path / "c.toml"
    file.write_text('workers = 3\nmpp_csv = "m.csv"\nlevels = 2\n')
    assert main(monkeypatch, "run", "s", "-o", "o", "--config", str(file), "--mpp-csv", "n.csv") == 0
    assert (seen["workers"], str(seen["mpp_csv"]), seen["config"].levels) == (3, "n.csv", 2)
    file.write_text('workers = "many"\n')
    assert main(monkeypatch, "run", "s", "-o", "o", "--config", str(file)) == 1
