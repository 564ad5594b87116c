"""Others are told apart from us."""

import os
import subprocess
import sys
from time import sleep

import pytest

from benchmarks.quiet import Load, allowed_share, load, others_share, wait_until_quiet

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processor time is read from /proc")


def test_the_share_of_others_is_what_we_did_not_use(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    before = Load(at=10.0, everybody=100.0, ours=50.0)
    assert others_share(before, Load(20.0, 115.0, 65.0)) == 0.0
    assert others_share(before, Load(20.0, 120.0, 60.0)) == 0.5
    assert others_share(None, before) == 0.0


def test_the_work_of_a_process_is_ours_only_if_it_is_named():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            named, unnamed = load([busy.pid]), load([])
            sleep(1.0)
            with_it, without_it = load([busy.pid]), load([])
        finally:
            busy.kill()
    assert with_it.ours - named.ours > 0.2
    assert others_share(named, with_it) < others_share(unnamed, without_it)


def test_processors_that_we_do_not_use_are_free_for_others(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert [allowed_share(threads) for threads in (0, 1, 4, 8)] == pytest.approx([0.05, 0.80, 0.05, 0.05])


def test_waiting_for_quiet_ends_and_says_whether_it_is():
    assert wait_until_quiet([os.getpid()], 5.0, allowed=1.1)
    assert not wait_until_quiet([os.getpid()], 0.5, allowed=-1.0)
