"""An S3 server for tests, which survives being killed: `python s3_server.py PORT JOURNAL`.

moto's server (`pip install 'moto[server]'`) keeps everything in memory. What changes something is written to a journal
before it is answered, and done again when the server starts anew.
"""

import io
import logging
import pickle
import sys
from pathlib import Path

import moto.s3.models
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple
from werkzeug.test import Client

KEPT = ("REQUEST_METHOD", "PATH_INFO", "QUERY_STRING", "CONTENT_TYPE", "CONTENT_LENGTH", "REQUEST_URI", "RAW_URI")


class Journal:
    """The server as a WSGI application, with a memory."""

    def __init__(self, path):
        self._app, self._path = DomainDispatcherApplication(create_backend_app), path
        self._replay()
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - as long as the process lives

    def _replay(self):
        if not self._path.exists():
            return
        client, now = Client(self._app), moto.s3.models.utcnow
        with open(self._path, "rb") as file:
            try:
                while True:
                    when, kept, body = pickle.load(file)
                    moto.s3.models.utcnow = lambda when=when: when  # of which an object's time is taken
                    path = kept.get("RAW_URI", kept["PATH_INFO"])
                    headers = {k[5:].replace("_", "-"): v for k, v in kept.items() if k.startswith("HTTP_")}
                    headers |= {"Content-Type": kept["CONTENT_TYPE"]} if kept.get("CONTENT_TYPE") else {}
                    client.open(path, method=kept["REQUEST_METHOD"], headers=headers, data=body)
            except (EOFError, pickle.UnpicklingError):  # killed while it wrote: that was never answered
                pass
        moto.s3.models.utcnow = now

    def __call__(self, environ, start_response):
        if environ["REQUEST_METHOD"] not in ("PUT", "DELETE", "POST"):
            return self._app(environ, start_response)
        length = int(environ.get("CONTENT_LENGTH") or 0)
        body = environ["wsgi.input"].read(length) if length else b""
        if len(body) < length:  # cut on its way: S3 takes it whole or not at all
            start_response("400 IncompleteBody", [("Content-Length", "0")])
            return [b""]
        environ["wsgi.input"] = io.BytesIO(body)
        answered = []

        def start(status, headers, *rest):
            answered.append(status)
            return start_response(status, headers, *rest)

        when = moto.s3.models.utcnow()
        answer = list(self._app(environ, start))
        if answered[0].startswith("2"):
            kept = {k: v for k, v in environ.items() if k in KEPT or k.startswith("HTTP_")}
            self._file.write(pickle.dumps((when, kept, body)))
        return answer


if __name__ == "__main__":
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    run_simple("127.0.0.1", int(sys.argv[1]), Journal(Path(sys.argv[2])), threaded=True)
