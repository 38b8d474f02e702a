"""``get:NAME`` and tools/get_weights.py, against a server in this process; the real table is only read."""
from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import models.published
from engine.settings import parse_settings
from models import read_state_dict
from models.published import Published, fetch, published
from tools.get_weights import main
from utils.cli import run_main
from utils.download import download
from utils.errors import UserError

CONTENT = bytes(range(256)) * 40
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """content: of every file but ``/missing``. cuts: after how many bytes of an answer the connection breaks, once
    each. asked: the Range header of every request. ranges: whether it honors them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.content, self.kind, self.ranges = CONTENT, "application/octet-stream", True
        self.cuts: list[int] = []
        self.asked: list[str | None] = []

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"


class Answer(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers["Range"]
        server.asked.append(wanted)
        if self.path == "/missing":
            self.send_error(404)
            return
        version = f'"{hashlib.sha256(server.content).hexdigest()[:8]}"'
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and server.ranges else 0
        if self.headers["If-Range"] not in (None, version):
            start = 0
        if start >= len(server.content):
            self.send_error(416)
            return
        part = server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", server.kind)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", version)
        self.end_headers()
        self.wfile.write(part[:server.cuts.pop(0)] if server.cuts else part)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def table(server, monkeypatch, tmp_path) -> dict[str, Published]:
    """A table of three files of the server, in place of the real one; files go to ``tmp_path``."""
    page = "https://example.org/page"
    files = [Published("open", "x", page, "open.pth", server.url("open.pth")),
             Published("sealed", "x", page, "sealed.pth", server.url("sealed.pth"), DIGEST[:8]),
             Published("missing", "x", page, "missing.pth", server.url("missing")),
             Published("manual", "x", page, "manual.pth")]
    entries = {one.name: one for one in files}
    monkeypatch.setattr(models.published, "published", lambda: entries)
    monkeypatch.setenv("CKPT", str(tmp_path))
    return entries


def test_a_download(table, tmp_path):
    assert fetch("sealed").read_bytes() == CONTENT
    assert (tmp_path / "sealed.pth.sha256").read_text() == f"{DIGEST}  sealed.pth\n"
    assert not [path for path in tmp_path.iterdir() if ".part" in path.name]


def test_an_interrupted_download_goes_on(server, tmp_path):
    server.cuts = [3000, 4000]
    assert download(server.url("a"), tmp_path / "a", "page", DIGEST) == DIGEST
    assert server.asked == [None, "bytes=3000-", "bytes=7000-"]


def test_a_later_call_goes_on(server, tmp_path):
    server.cuts = [3000, 0, 0, 0]  # nothing comes any more
    with pytest.raises(UserError, match="again, which goes on behind the 3000 bytes that are here; or see page"):
        download(server.url("a"), tmp_path / "a", "page")
    assert not (tmp_path / "a").exists() and (tmp_path / "a.part").stat().st_size == 3000
    server.asked.clear()
    assert download(server.url("a"), tmp_path / "a", "page") == DIGEST and server.asked == ["bytes=3000-"]


@pytest.mark.parametrize("change", ["another version", "no ranges", "shorter"])
def test_a_part_that_does_not_fit_is_fetched_anew(server, tmp_path, change):
    (tmp_path / "a.part").write_bytes(b"old" * 1000)
    (tmp_path / "a.part.version").write_text('"old"')
    if change == "no ranges":
        server.ranges = False
        (tmp_path / "a.part.version").unlink()
    if change == "shorter":
        (tmp_path / "a.part.version").unlink()
        server.content = CONTENT[:1000]
    got = download(server.url("a"), tmp_path / "a", "page")
    assert (tmp_path / "a").read_bytes() == server.content and got == hashlib.sha256(server.content).hexdigest()


def test_a_wrong_file_is_not_kept(server, table, tmp_path):
    server.content = b"something else"
    with pytest.raises(UserError, match=rf"has the SHA-256 \w+, expected {DIGEST[:8]}….*see https://example.org/page"):
        fetch("sealed")
    assert not list(tmp_path.glob("sealed*"))
    server.kind = "text/html"
    with pytest.raises(UserError, match="sends a page, not a file; see https://example.org/page"):
        fetch("sealed")


@pytest.mark.parametrize(("name", "message"), [
    ("missing", r"answers 404 \(Not Found\); see https://example.org/page, and put the file to .*missing.pth"),
    ("manual", "get:manual: has no link that a program could follow; see https://example.org/page"),
    ("seled", r"no published file of that name \(did you mean sealed")])
def test_what_cannot_be_fetched(table, name, message):
    with pytest.raises(UserError, match=message):
        fetch(name)


@pytest.mark.parametrize(("path", "end"), [
    ("{ckpt}/open.pth", "; python tools/get_weights.py open downloads it"),
    ("{ckpt}/below/open.pth", "; python tools/get_weights.py open --to {ckpt}/below downloads it"),
    ("{ckpt}/manual.pth", "; only a browser gets it, from https://example.org/page"), ("{ckpt}/mine.pth", "")])
def test_a_file_of_the_table_that_is_not_there(table, tmp_path, path, end):
    path, end = (text.format(ckpt=tmp_path) for text in (path, end))
    with pytest.raises(UserError, match=f"^{re.escape(f'{path}: no such weights file{end}')}$"):
        read_state_dict(path)


def test_an_unreachable_server(server, tmp_path):
    url = server.url("a").replace("127.0.0.1", "no-such-host.invalid")
    with pytest.raises(UserError, match="the connection fails .* command again; or see page, and put the file to"):
        download(url, tmp_path / "a", "page")


def test_several_processes_download_once(server, table):
    threads = [threading.Thread(target=fetch, args=("open",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.asked == [None]


def test_a_name_in_place_of_a_path(server, table, tmp_path):
    torch.save({"w": torch.ones(3)}, tmp_path / "made.pth")
    server.content = (tmp_path / "made.pth").read_bytes()
    assert torch.equal(read_state_dict("get:open")["w"], torch.ones(3))
    networks = parse_settings(["--method", "kd", "--teacher-pretrained", "get:open"]).networks
    assert networks.teacher_pretrained == str(tmp_path / "open.pth") and len(server.asked) == 1


def test_the_tool(table, tmp_path, capsys):
    assert run_main(main, ["sealed", "--to", str(tmp_path / "there")]) == 0
    said = capsys.readouterr().out
    assert f"SHA-256 {DIGEST}" in said and said.endswith(f"\n{tmp_path / 'there' / 'sealed.pth'}\n")
    (tmp_path / "there" / "sealed.pth").write_bytes(b"changed since")
    assert run_main(main, ["sealed", "--to", str(tmp_path / "there")]) == 2
    assert "remove it, and fetch it again" in capsys.readouterr().err
    assert run_main(main, ["--list"]) == 0 and "| cirkdv2_deeplabv3_resnet101_citys " in capsys.readouterr().out
    assert run_main(main, []) == 2


def test_the_real_table():
    entries = published().values()
    assert len(entries) > 40 and len({(one.folder, one.file) for one in entries}) == len(entries)
    for name in ("resnet18-imagenet", "mit_b0-imagenet", "mit_b4-imagenet", "CamVid", "VOCAug",
                 "cirkdv2_deeplabv3_resnet101_citys", "cirkdv2_deeplabv3_resnet18_citys",
                 "cirkdv2_segformer_MiT_B4_citys",
                 "cirkdv2_segformer_MiT_B4_segformer_MiT_B0_citys"):
        assert published()[name].url.startswith("https://github.com/winycg/CIRKD/releases/download/"), name
    for one in entries:
        assert one.page.startswith("https://") and one.about and re.fullmatch(r"[\w.-]+", one.file), one
        assert one.url is None or one.url.startswith("https://") and " " not in one.url, one
        assert re.fullmatch("[0-9a-f]{8}|[0-9a-f]{64}|", one.digest), one
        stem = Path(one.file).stem
        assert len(one.digest) != 8 or stem.endswith(one.digest), one  # where the publisher says it
