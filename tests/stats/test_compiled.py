"Work shared out over threads: everything is done once, in order, and an error comes out when nothing runs any more."
import threading
import time

import pytest
import torch

from qcal_nb.stats import shared_out


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("jobs", [0, 1, 2, 3, 40])
def test_every_job_once_and_results_in_order(threads, jobs):
    done = []
    def job(i, sign):
        time.sleep(0.001 * (i % 3))
        done.append(i)
        return sign * i
    assert shared_out(job, range(jobs), [-1] * jobs) == [-i for i in range(jobs)]
    assert sorted(done) == list(range(jobs))


def test_this_thread_works_too_and_no_more_than_are_allowed(threads):
    seen = set()
    def job(_):
        time.sleep(0.002)
        seen.add(threading.get_ident())
    shared_out(job, range(30))
    assert threading.get_ident() in seen and len(seen) == threads


@pytest.mark.parametrize("bad", [0, 7, 19])
def test_an_error_comes_out_and_nothing_goes_on(threads, bad):
    running = []
    def job(i):
        running.append(i)
        try:
            time.sleep(0.002)
            if i == bad: raise ValueError(f"job {i}")
        finally: running.remove(i)
    with pytest.raises(ValueError, match=f"^job {bad}$"): shared_out(job, range(20))
    assert running == []
    assert shared_out(lambda i: i, [1, 2]) == [1, 2]  # the threads are as good as before
