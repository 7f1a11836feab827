"""Rows 64, 65, 70 and 71 of the fault matrix: encoders that give nonsense, that may not be had, and no GPU."""

import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

from pipeline.errors import RunStopped

ENCODERS = """
import dataclasses
import numpy as np
import torch
from extractors.lab_lbp import LabLbp, FACTS

class Wrong(LabLbp):
    value = 0.0
    def encode(self, tiles):
        features = super().encode(tiles)
        if self.value:
            features[-1, 3] = self.value  # of one tile of a batch
            return features
        return features * 0

def _made(number):
    def build(weights=None):
        encoder = Wrong(dataclasses.replace(FACTS, name="wrong"))
        encoder.value = number
        return encoder
    return build

zeros, nan, inf, minus, large = map(_made, (0.0, float("nan"), float("inf"), float("-inf"), 1e5))
"""


@pytest.fixture(autouse=True)
def encoders(code):
    (code / "wrong_encoders.py").write_text(ENCODERS)


@pytest.mark.fault(64, "features that are all zero", "D, the chunk exists")
def test_row_64_features_that_are_all_zero(neighbour, line):
    """Zarr leaves out chunks of zeros unless told otherwise, and what is left out would look unfinished."""
    path, _ = neighbour
    files = {path.name: path}
    assert line(files, encoder="wrong_encoders:zeros")[path.name].status == "done"
    bag = line.store.bag(path.name)
    assert all(level.valid.all() and not level.features.any() for level in bag.levels)
    x = line.store.group(path.name).path / "features/wrong/x/c/0/0"
    written = x.stat().st_mtime_ns
    assert line(files, encoder="wrong_encoders:zeros")[path.name].seconds is None, "it is finished"
    assert x.stat().st_mtime_ns == written


@pytest.mark.fault(65, "encoder gives inf, NaN, more than fp16 holds", "X")
@pytest.mark.parametrize(
    ("kind", "words"),
    [("nan", "inf or NaN"), ("inf", "inf or NaN"), ("minus", "inf or NaN"), ("large", "100000, which does not fit")],
)
def test_row_65_features_that_are_no_numbers(kind, words, neighbour, line):
    """It is the encoder, and not the slide: all others would be the same."""
    path, _ = neighbour
    with pytest.raises(RunStopped, match=words) as stopped:
        line({path.name: path}, encoder=f"wrong_encoders:{kind}")
    assert "the encoder wrong gave" in str(stopped.value)
    group = line.store.group(path.name)
    assert group.status == "writing"
    assert not (group.path / "features/wrong/x/c").exists()


@pytest.mark.fault(65)
def test_row_65_what_16_bits_cannot_hold_32_can(neighbour, line):
    path, _ = neighbour
    rows = line({path.name: path}, encoder="wrong_encoders:large", dtype="float32")
    assert rows[path.name].status == "done"
    assert np.frombuffer(line.x(path.name)[0], np.float32).max() == 1e5


@pytest.mark.fault(65)
@pytest.mark.slow
def test_row_65_in_a_real_run(start, whole):
    run = start(0.0, "--encoder=wrong_encoders:nan")
    code, text = run.ends()
    assert code == 4, text
    (line,) = [line for line in text.splitlines() if "stopped" in line]
    assert "svs: encode: the encoder wrong gave inf or NaN; its weights or its inputs are wrong" in line
    assert "Traceback" not in text
    assert "failed" not in text


# --- weights that may not be had --------------------------------------------------------------------------------------


@pytest.fixture
def gated_hub():
    """A hub on this machine that wants a licence accepted; gives its address, and what it was asked for."""
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_response(401)
            self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("X-Error-Message", "Access to this model is restricted")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.mark.fault(70, "gated model without a token", "P, with the page of the licence; asked once")
@pytest.mark.slow
def test_row_70_gated_model_without_a_token(gated_hub, start, whole, tmp_path):
    """The hub is asked once; it is said where the licence is and what to set."""
    address, asked = gated_hub
    place = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hub"), "HF_TOKEN": "", "HF_HUB_OFFLINE": "0"}
    run = start(0.0, "--encoder=uni", "--tile-px=224", **place)
    code, text = run.ends()
    assert code == 1, text
    assert "the model is gated. Accept its licence at https://huggingface.co/MahmoodLab/UNI, then set HF_TOKEN" in text
    assert "Traceback" not in text
    assert len([path for path in asked if "/resolve/" in path]) == 1
    assert not run.out.exists()


@pytest.mark.fault(71, "cuda asked for where there is none", "P")
def test_row_71_cuda_where_there_is_none(neighbour, folder, line, cli):
    torch = pytest.importorskip("torch")
    pytest.importorskip("lightly")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    shutil.copy2(neighbour[0], folder / "a.svs")
    assert line.folder(folder, tile_px=128)["a.svs"].status == "done"
    result = cli("pretrain", line.out, "--arch", "vit_tiny_scorenet", "--batch-size", 2, "--device", "cuda")
    assert result.code == 1, result
    assert "device 'cuda' cannot be used here" in result.err
    assert "Traceback" not in result.err
    assert not (line.out / "pretrained").exists()


@pytest.mark.fault(71)
def test_row_71_a_gpu_by_number_where_there_is_none(neighbour, cli, tmp_path):
    if pytest.importorskip("torch").cuda.is_available():
        pytest.skip("there is a GPU here")
    result = cli("run", neighbour[0], "-o", tmp_path / "out", "-e", "lab_lbp", "--tile-px", 64, "--devices", "0,1")
    assert result.code == 1, result
    assert "--devices 0,1: there is no GPU 0: torch finds none here" in result.err
    assert "Traceback" not in result.err
    assert not (tmp_path / "out").exists()
