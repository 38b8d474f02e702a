"""Files of tensors: the checksum inside, what is still understood without one, atomic writing, leftovers."""
from __future__ import annotations

import copy
import os
import random
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from utils.errors import UserError
from utils.files import HOUR, remove_leftovers, write_atomically, write_text
from utils.tensor_files import COMMENT, MARK, load_tensors, save_tensors

CONTENT = OrderedDict([("conv.weight", torch.arange(24.0).reshape(2, 3, 2, 2)), ("bn.count", torch.tensor(3))])


@pytest.fixture
def path(tmp_path) -> Path:
    save_tensors(tmp_path / "a.pth", CONTENT)
    return tmp_path / "a.pth"


class TestChecksum:
    def test_others_read_the_same_tensors(self, path) -> None:
        for mapped in (False, True):
            found = torch.load(path, weights_only=True, mmap=mapped)
            assert list(found) == list(CONTENT) and all(found[k].equal(v) for k, v in CONTENT.items())

    def test_the_same_content_gives_the_same_bytes(self, path, tmp_path) -> None:
        save_tensors(tmp_path / "of another name.pth", CONTENT)
        assert path.read_bytes() == (tmp_path / "of another name.pth").read_bytes()

    def test_a_flipped_bit_is_found_wherever_it_is(self, path) -> None:
        """In front of the checksum; one inside it says that it does not fit, one in its mark that there is none."""
        whole, draw = path.read_bytes(), random.Random(0)
        assert load_tensors(path, "weights file").keys() == CONTENT.keys()
        places = [*range(0, 40), *(draw.randrange(len(whole) - COMMENT) for _ in range(200)), len(whole) - COMMENT - 1,
                  len(whole) - 1]
        for at in places:
            content = bytearray(whole)
            content[at] ^= 1 << draw.randrange(8)
            path.write_bytes(content)
            with pytest.raises(UserError, match=f"{path}: not a weights file that can be loaded: it is damaged"):
                load_tensors(path, "weights file")

    @pytest.mark.parametrize("lost", [1, 10, COMMENT, COMMENT + 1, 200, 2000])
    def test_a_file_that_was_cut_off_is_refused_or_whole(self, path, lost) -> None:
        path.write_bytes(path.read_bytes()[:-lost])
        if lost == COMMENT:  # the archive itself is complete
            assert load_tensors(path, "weights file").keys() == CONTENT.keys()
        else:
            with pytest.raises(UserError, match="damaged|cut off"):
                load_tensors(path, "weights file")

    def test_something_after_the_end_is_refused(self, path) -> None:
        path.write_bytes(path.read_bytes() + b"\0")
        with pytest.raises(UserError, match="damaged"):
            load_tensors(path, "weights file")

    @pytest.mark.parametrize("zipped", [True, False])
    def test_files_without_a_checksum_load(self, tmp_path, zipped) -> None:
        torch.save(CONTENT, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
        assert MARK not in (tmp_path / "a.pth").read_bytes()
        assert load_tensors(tmp_path / "a.pth", "weights file").keys() == CONTENT.keys()

    def test_large_files(self, tmp_path) -> None:
        """Of several blocks of reading."""
        save_tensors(tmp_path / "a.pth", torch.arange(700_000))
        assert load_tensors(tmp_path / "a.pth", "file").equal(torch.arange(700_000))
        content = bytearray((tmp_path / "a.pth").read_bytes())
        content[3_000_000] ^= 1
        (tmp_path / "a.pth").write_bytes(content)
        with pytest.raises(UserError, match="damaged"):
            load_tensors(tmp_path / "a.pth", "file")


class TestWriting:
    def test_what_was_there_is_kept(self, path, tmp_path) -> None:
        first = path.read_bytes()
        save_tensors(path, {"w": torch.ones(1)}, keep=tmp_path / "before.pth")
        assert (tmp_path / "before.pth").read_bytes() == first
        assert list(torch.load(path, weights_only=True)) == ["w"]

    def test_a_failed_write_keeps_both(self, path, tmp_path) -> None:
        before = path.read_bytes()
        write_text(tmp_path / "older", "older")

        def failing(temporary: Path) -> None:
            temporary.write_text("half")
            raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            write_atomically(path, failing, keep=tmp_path / "older")
        assert path.read_bytes() == before and (tmp_path / "older").read_text() == "older"
        assert not list(tmp_path.glob(".*"))

    def test_leftovers_are_removed(self, tmp_path) -> None:
        mine, other, old = (tmp_path / name for name in (".kd_a.pth.12.tmp", ".tokens.pth.13.tmp", ".x.pth.14.tmp"))
        for path in (mine, other, old, tmp_path / "kd_a.pth", tmp_path / ".kd_a.mine.tmp", tmp_path / ".kd_a.lock"):
            path.touch()
        os.utime(old, (old.stat().st_mtime - HOUR - 10,) * 2)
        assert sorted(remove_leftovers(tmp_path, "kd_a")) == [mine, old]
        assert {p.name for p in tmp_path.iterdir()} == {other.name, "kd_a.pth", ".kd_a.mine.tmp", ".kd_a.lock"}
        assert remove_leftovers(tmp_path / "nowhere", "kd_a") == []


class TestBombs:
    """Archives that unpack to far more than they are."""

    def repacked(self, source: Path, target: Path, *, inflate: int = 0) -> Path:
        """A compressed copy; inflate: so many zeros in place of the content of every tensor."""
        with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
            for part in old.namelist():
                new.writestr(part, bytes(inflate) if inflate and "/data/" in part else old.read(part))
        return target

    def test_a_bomb_is_refused_before_it_is_unpacked(self, path, tmp_path, monkeypatch) -> None:
        bomb = self.repacked(path, tmp_path / "bomb.pth", inflate=20_000_000)
        assert bomb.stat().st_size < 100_000
        monkeypatch.setattr(torch, "load", None)
        with pytest.raises(UserError, match=r"bomb.pth: not a file that can be loaded: its \d+ bytes unpack to \d{8}"):
            load_tensors(bomb, "file")

    def test_parts_that_share_their_bytes_are_counted(self, path, tmp_path, monkeypatch) -> None:
        """Every entry of the directory says the truth; together they do not fit into the file."""
        with zipfile.ZipFile(tmp_path / "bomb.pth", "w") as archive:
            archive.writestr("a/data/0", bytes(100_000))
            for i in range(1, 20):
                entry = copy.copy(archive.filelist[0])
                entry.filename = f"a/data/{i}"
                archive.filelist.append(entry)
        monkeypatch.setattr(torch, "load", None)
        with pytest.raises(UserError, match="unpack to 2000000"):
            load_tensors(tmp_path / "bomb.pth", "file")

    def test_a_compressed_file_is_read(self, path, tmp_path) -> None:
        save_tensors(path, {"w": torch.rand(1000)})
        (got,) = load_tensors(self.repacked(path, tmp_path / "small.pth"), "file").values()
        assert got.equal(torch.load(path)["w"])

    def test_an_archive_that_cannot_be_listed_is_refused(self, tmp_path) -> None:
        (tmp_path / "a.pth").write_bytes(b"PK\3\4" + bytes(100))
        with pytest.raises(UserError, match="cut off, or not a PyTorch file"):
            load_tensors(tmp_path / "a.pth", "file")
