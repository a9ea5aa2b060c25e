"""Records of the hub, downloaded: a server of this machine that answers as the hub does."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

RECORD = {"input": "Where is it?", "outputs": ["here"]}
FILES = {"/datasets/owner/data/resolve/main/4k/vt.jsonl": json.dumps(RECORD).encode() + b"\n"}

# In a process of its own: the hub's library reads its settings when it is imported.
SCRIPT = """
import sys
from claa_ops.evaluate.tasks import TaskSettings, examples
from claa_ops.huggingface.models import InputError

for source in sys.argv[1:]:
    try:
        for example in examples([f"ruler:hf://datasets/{source}"], TaskSettings(), len, print):
            print(example.task, example.name, example.prompt, example.grade("here"))
    except InputError as error:
        print(error)
"""


class Hub(BaseHTTPRequestHandler):
    def do_HEAD(self):
        content = FILES.get(self.path)
        self.send_response(404 if content is None else 200)
        if content is None:
            known = self.path.startswith("/datasets/owner/data/")
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
        else:
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", '"1"')
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        self.wfile.write(FILES.get(self.path, b""))

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def read(*sources, **environment) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *sources],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_records_are_downloaded_once_and_refusals_are_sentences(hub, tmp_path):
    settings = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path)}
    record = "ruler/vt vt.jsonl, line 1 Where is it? 1.0"
    files = ("owner/data/4k/vt.jsonl", "owner/data/4k/no.jsonl", "nobody/data/vt.jsonl")
    found, no_file, no_data = read(*files, **settings)
    assert found == record
    begin = "cannot get hf://datasets/"
    assert no_file == f"{begin}{files[1]}: the data set owner/data has no file 4k/no.jsonl"
    assert no_data == f"{begin}{files[2]}: the hub has no data set nobody/data, or hides it"

    found, no_file, _ = read(*files, HF_HUB_OFFLINE="1", **settings)
    assert found == record
    told = f"{begin}{files[1]}: the hub does not answer, and it was not fetched before"
    assert no_file == told
