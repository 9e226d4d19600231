"""How many threads a step takes: affinity, cgroups, environment, launchers."""

import logging
import os
import subprocess
import sys
import time

import pytest

import fastopt
from fastopt import _threads

CHOOSING = ("FASTOPT_NUM_THREADS", "OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID", _threads.SLURM_RANKS, *_threads.RANKS)


@pytest.fixture
def forget_threads(monkeypatch):
    before = fastopt.get_num_threads()
    for variable in CHOOSING:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(_threads, "_n_threads", None)
    yield monkeypatch
    fastopt.set_num_threads(before)


def test_the_number_of_threads_is_the_one_set(forget_threads):
    fastopt.set_num_threads(3)
    assert fastopt.get_num_threads() == 3


def test_threads_follow_affinity(forget_threads):
    if hasattr(os, "sched_getaffinity"):
        forget_threads.setattr(os, "sched_getaffinity", lambda pid: {0, 5, 7})
        forget_threads.setattr(_threads, "_cgroup_quota", lambda: None)
        assert fastopt.get_num_threads() == 3


def test_threads_follow_the_cgroup_quota(forget_threads):
    forget_threads.setattr(_threads, "_cgroup_quota", lambda: 1)
    assert fastopt.get_num_threads() == 1


def test_omp_num_threads_lowers_the_number(forget_threads):
    forget_threads.setenv("OMP_NUM_THREADS", "1,2")
    assert fastopt.get_num_threads() == 1


def test_fastopt_num_threads_overrides_all(forget_threads):
    forget_threads.setenv("OMP_NUM_THREADS", "1")
    forget_threads.setenv("FASTOPT_NUM_THREADS", "5")
    assert fastopt.get_num_threads() == 5


@pytest.mark.parametrize("text", ["none", "0", "-1", "1.5"])
def test_a_number_of_threads_that_is_none_is_refused(forget_threads, text):
    forget_threads.setenv("FASTOPT_NUM_THREADS", text)
    with pytest.raises(ValueError, match="FASTOPT_NUM_THREADS must be a number of threads"):
        fastopt.get_num_threads()


@pytest.mark.parametrize(
    ("files", "membership", "quota"),
    [
        ({"cpu.max": "max 100000"}, "0::/", None),
        ({"cpu.max": "150000 100000"}, "0::/", 2),
        ({"a/cpu.max": "max 100000", "cpu.max": "100000 100000"}, "0::/a", 1),
        ({"a/b/cpu.max": "400000 100000", "a/cpu.max": "300000 100000"}, "0::/a/b", 3),
        ({"cpu/a/cpu.cfs_quota_us": "200000", "cpu/a/cpu.cfs_period_us": "100000"}, "4:cpu,cpuacct:/a", 2),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu:/", None),
        ({}, "0::/", None),
    ],
)
def test_the_cgroup_quota_is_read_in_both_versions(tmp_path, files, membership, quota):
    for name, text in files.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    (tmp_path / "self").write_text(membership + "\n")
    assert _threads._cgroup_quota(tmp_path / "fs", tmp_path / "self") == quota


# --- Launchers


@pytest.fixture
def launched(forget_threads):
    """Of 16 CPUs that the launcher has, this process may run on 8, or on as many as the test says."""
    cpus = {"own": 16}
    forget_threads.setattr(_threads, "_cgroup_quota", lambda: None)
    forget_threads.setattr(_threads, "_cpus", lambda pid=0: cpus["own"] if pid == 0 else 16)
    return forget_threads, cpus


@pytest.mark.parametrize("variable", _threads.RANKS)
def test_a_launchers_processes_share_its_cpus(launched, variable):
    launched[0].setenv(variable, "4")
    assert (fastopt.get_num_threads(), fastopt.info()["n_threads_from"]) == (4, variable)


@pytest.mark.parametrize(("own", "ranks", "threads"), [(4, 4, 4), (8, 4, 4), (2, 4, 2), (16, 64, 1), (16, 1, 16)])
def test_bound_processes_share_no_more_than_their_own_cpus(launched, own, ranks, threads):
    monkeypatch, cpus = launched
    cpus["own"] = own
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert fastopt.get_num_threads() == threads


def test_a_launchers_processes_share_the_quota_of_their_cgroup(launched):
    launched[0].setattr(_threads, "_cgroup_quota", lambda: 8)
    launched[0].setenv("LOCAL_WORLD_SIZE", "4")
    assert fastopt.get_num_threads() == 2


@pytest.mark.parametrize(("omp", "threads"), [("1", 4), ("2", 2), ("8", 4)])
def test_the_one_thread_that_torchrun_sets_does_not_count(launched, omp, threads):
    launched[0].setenv("LOCAL_WORLD_SIZE", "4")
    launched[0].setenv("TORCHELASTIC_RUN_ID", "none")
    launched[0].setenv("OMP_NUM_THREADS", omp)
    assert fastopt.get_num_threads() == threads


def test_the_one_thread_that_somebody_else_sets_counts(launched):
    launched[0].setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "4")
    launched[0].setenv("OMP_NUM_THREADS", "1")
    assert (fastopt.get_num_threads(), _threads.source()) == (1, "OMP_NUM_THREADS")


def test_fastopt_num_threads_overrides_a_launcher(launched):
    launched[0].setenv("LOCAL_WORLD_SIZE", "4")
    launched[0].setenv("FASTOPT_NUM_THREADS", "1")
    assert (fastopt.get_num_threads(), _threads.source()) == (1, "FASTOPT_NUM_THREADS")


@pytest.mark.parametrize(
    ("counts", "node", "tasks"),
    [
        ("4", "0", 4),
        ("2(x3),1", "2", 2),
        ("2(x3),1", "3", 1),
        ("2(x3),1", "4", 1),
        ("", "0", 1),
        ("4", "x", 1),
        ("a", "0", 1),
    ],
)
def test_the_tasks_of_a_slurm_step_share_their_node(launched, counts, node, tasks):
    launched[0].setenv("SLURM_STEP_TASKS_PER_NODE", counts)
    launched[0].setenv("SLURM_NODEID", node)
    assert fastopt.get_num_threads() == 16 // tasks


def test_a_launchers_choice_is_logged_once(launched, caplog):
    launched[0].setenv("LOCAL_WORLD_SIZE", "4")
    with caplog.at_level(logging.INFO, "fastopt"):
        fastopt.get_num_threads()
        fastopt.get_num_threads()
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == [
        "4 threads a step, by LOCAL_WORLD_SIZE"
    ]


def test_nothing_is_logged_without_a_launcher(launched, caplog):
    with caplog.at_level(logging.INFO, "fastopt"):
        fastopt.get_num_threads()
    assert not caplog.records


ASK = "import fastopt; print(fastopt.info()['n_threads'], fastopt.info()['n_threads_from'])"


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system binds no processes")
def test_the_launcher_is_the_first_ancestor_without_its_variable():
    """Here it is this process; a shell between, started as a rank and bound to one CPU, is not."""
    asked = "from fastopt import _threads; print(_threads._launchers_cpus('LOCAL_WORLD_SIZE'), _threads._cpus())"
    finished = subprocess.run(
        ["sh", "-c", f'{sys.executable} -c "{asked}"; true'],
        env={**_clean(), "LOCAL_WORLD_SIZE": "2"},
        preexec_fn=lambda: os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert finished.stdout.split() == [str(len(os.sched_getaffinity(0))), "1"], finished.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="names a process by Linux's prctl")
def test_a_launchers_process_may_have_any_name():
    name = "import ctypes; ctypes.CDLL(None).prctl(15, b'caf\\xe9')"
    finished = subprocess.run(
        [sys.executable, "-c", f"{name}; {ASK}"],
        env={**_clean(), "LOCAL_WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize(("counts", "node"), [("4(x9999999)," * 1000, "1" * 5000), ("4(x9999999)," * 1000, "9999999")])
def test_a_hostile_list_of_slurm_tasks_takes_no_time(launched, counts, node):
    launched[0].setenv("SLURM_STEP_TASKS_PER_NODE", counts)
    launched[0].setenv("SLURM_NODEID", node)
    before = time.process_time()
    assert fastopt.get_num_threads() in (4, 16)
    assert time.process_time() - before < 1


def test_torchrun_leaves_its_processes_their_share():
    pytest.importorskip("torch", reason="torchrun comes with torch")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    finished = subprocess.run(
        [*command, sys.executable, "-c", ASK], env=_clean(), capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert finished.stdout.splitlines() == [f"{share} LOCAL_WORLD_SIZE"] * 2


def _clean():
    """The environment without what chooses threads."""
    return {name: value for name, value in os.environ.items() if name not in CHOOSING}
