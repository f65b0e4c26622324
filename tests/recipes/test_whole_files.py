"""Files are written whole by one door and read with care by another, whoever else is in the folder."""
import os
import stat
import subprocess
import sys
import threading

import pytest

import qcal_nb.recipes.files
from qcal_nb.recipes.files import check_file, draft_beside, json_of, read_text, read_whole, write_text, write_whole


def test_threads_that_save_to_one_path_leave_one_of_their_files(tmp_path):
    contents = [bytes([i]) * 200_000 for i in range(8)]
    def save(data):
        for _ in range(10): write_whole(tmp_path/"x", data)
    threads = [threading.Thread(target=save, args=(data,)) for data in contents]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert (tmp_path/"x").read_bytes() in contents and os.listdir(tmp_path) == ["x"]


def test_a_link_in_the_place_of_a_draft_is_not_followed(tmp_path, monkeypatch):
    (tmp_path/"mine").write_text("mine")
    monkeypatch.setattr(qcal_nb.recipes.files.secrets, "token_hex", lambda n: "00")
    draft = draft_beside(tmp_path/"x")
    draft.symlink_to(tmp_path/"mine")
    with pytest.raises(FileExistsError): write_whole(tmp_path/"x", b"other")
    assert (tmp_path/"mine").read_text() == "mine"


def test_a_link_that_is_replaced_leaves_what_it_led_to(tmp_path):
    (tmp_path/"mine").write_text("mine")
    (tmp_path/"x").symlink_to(tmp_path/"mine")
    write_whole(tmp_path/"x", b"new")
    assert (tmp_path/"mine").read_text() == "mine" and (tmp_path/"x").read_text() == "new"
    assert not (tmp_path/"x").is_symlink()


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_what_is_replaced_keeps_its_permissions(tmp_path, mode):
    write_text(tmp_path/"x", "old")
    os.chmod(tmp_path/"x", mode)
    write_text(tmp_path/"x", "new")
    assert stat.S_IMODE((tmp_path/"x").stat().st_mode) == mode and read_text(tmp_path/"x") == "new"


def test_special_files_are_refused_and_left_alone(tmp_path):
    os.mkfifo(tmp_path/"pipe")
    with pytest.raises(ValueError, match="neither a file nor free"): write_whole(tmp_path/"pipe", b"x")
    for read in (read_whole, read_text, lambda path: check_file(path, 10)):
        with pytest.raises(ValueError, match="not a regular file"): read(tmp_path/"pipe")
        with pytest.raises(ValueError, match="is a folder"): read(tmp_path)
        with pytest.raises(FileNotFoundError, match="there is no file"): read(tmp_path/"none")
    with pytest.raises(ValueError, match="not a regular file"): read_whole("/dev/zero")
    with pytest.raises(FileNotFoundError, match="create it first"): write_whole(tmp_path/"no"/"x", b"x")
    assert os.listdir(tmp_path) == ["pipe"]


DYING = """
import os, signal, sys
import qcal_nb.recipes.files as files
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
files.os.replace = die
files.write_whole(sys.argv[1], b"x")
"""


def test_drafts_of_the_dead_are_removed_and_those_of_the_living_stay(tmp_path):
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path))
    for _ in range(3): subprocess.run([sys.executable, "-c", DYING, tmp_path/"x"], env=env, timeout=300)
    assert len(os.listdir(tmp_path)) >= 1  # each of the three removed those before it
    mine = draft_beside(tmp_path/"x")
    mine.mkdir()
    foreign = tmp_path/".qcal_nb-00000000-1-00.part"  # of another machine, or so it says
    foreign.touch()
    write_whole(tmp_path/"x", b"y")
    assert sorted(os.listdir(tmp_path)) == sorted([mine.name, foreign.name, "x"])


def test_a_byte_order_mark_is_no_text_and_what_is_no_text_is_said(tmp_path):
    (tmp_path/"a").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert read_text(tmp_path/"a") == "one\r\ntwo"
    (tmp_path/"b").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="b is not text"): read_text(tmp_path/"b")
    write_text(tmp_path/"c", "half \ud800 a character")
    assert read_text(tmp_path/"c") == "half ? a character"


@pytest.mark.parametrize("text, why", [('{"a": 1, "a": 2}', "a appears twice"), ("NaN", "NaN is not JSON"),
                                       ('[{"b": {"c": 1, "c": 1}}]', "c appears twice"), ("[-Infinity]", "not JSON")])
def test_json_that_two_readers_would_read_differently(text, why):
    with pytest.raises(ValueError, match=why): json_of(text)
