"""Results of the benchmark made by hand: small, and every figure known."""

import json


def entry(workload, contestant, times, **info):
    """One contestant's measurement, as pytest-benchmark writes it."""
    section, title, label = workload.split("/")
    usual = {
        "section": section,
        "optimizer": title.split(",")[0].lower(),
        "title": title,
        "label": label,
        "parameters": 1000,
        "states": 2,
        "threads": 2,
        "isa": "x86-64-v3",
        "input": "normal",
        "bytes_per_parameter": 28,
        "version": "1.0",
        "ulp": 1.0,
        "disturbed": False,
    }
    extra = usual | info | {"workload": workload, "contestant": contestant}
    return {"name": f"test_race[{workload}-{contestant}]", "extra_info": extra, "stats": {"data": list(times)}}


def curve(title="Adam"):
    """Three sizes: far ahead of torch, level with the probe, and behind optax at the largest."""
    sizes = {"1e3": (1000, 1e-6), "1e5": (10**5, 20e-6), "1e7": (10**7, 5e-3)}
    made = []
    for label, (n, seconds) in sizes.items():
        workload = f"curves/{title}/{label}"
        times = [seconds, 1.02 * seconds, 0.98 * seconds]
        made.append(entry(workload, "fastopt", times, parameters=n))
        made.append(entry(workload, "probe", [0.9 * t for t in times], parameters=n))
        made.append(entry(workload, "torch-fused", [2 * t for t in times], parameters=n))
        factor = 0.8 if label == "1e7" else 40
        made.append(entry(workload, "optax", [factor * t for t in times], parameters=n))
    return made


def results(benchmarks=None, **run):
    """A whole results.json."""
    usual = {
        "mode": "quick",
        "seconds": 60.0,
        "others": 0.01,
        "peers": {"torch-fused": "torch 9.9", "optax": "optax 8.8"},
        "notes": {"optax": "allocates its own arrays"},
        "missing": {"thinc": "not installed: python -m pip install thinc"},
        "left_out": [{"workload": "curves/Adam/1e7", "contestant": "numpy", "reason": "a step would take about 9 s"}],
    }
    machine = {
        "processor": "A processor",
        "cpus": 2,
        "memory_bytes": 8 << 30,
        "caches": [
            {"level": 1, "bytes": 32 << 10, "shared_by": 1},
            {"level": 2, "bytes": 1 << 20, "shared_by": 1},
            {"level": 3, "bytes": 32 << 20, "shared_by": 2},
        ],
        "system": "Linux",
        "python": "3.12.0",
        "openmp": ["lib/libgomp.so.1"],
        "fastopt": {"version": "0.1.0", "isa": "x86-64-v3", "n_threads": 2},
    }
    return {
        "machine_info": {"fastopt": machine},
        "run": usual | run,
        "benchmarks": curve() if benchmarks is None else benchmarks,
    }


def write(folder, data):
    """Write results.json into a folder; return the folder."""
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(data), encoding="utf-8")
    return folder
