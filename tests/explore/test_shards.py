"""A search in pieces finds what it finds in one, wherever the pieces run."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from tests.run.command import inside
from xipvm.explore.shards import SHARD_RUNS, Shard, explore_shards, local_executor, run_shard, shards_of

SCENARIO = "fault-against-munmap"


@pytest.mark.parametrize("preemptions", [0, 1])
@pytest.mark.parametrize("reduce", [False, True])
def test_an_exhaustive_search_is_cut_into_pieces_that_miss_nothing(preemptions: int, reduce: bool) -> None:
    whole = Shard(SCENARIO, "exhaustive", "0", 100_000, preemptions, reduce=reduce)
    pieces = shards_of(whole, pieces=20)
    assert len(pieces) > 1
    alone, together = explore_shards([whole], None), explore_shards(pieces, None)
    assert alone.complete
    assert together.complete
    assert together.fingerprints == alone.fingerprints
    if reduce:  # the pieces do not know what the others have made
        assert together.runs >= alone.runs >= alone.distinct
    else:
        assert together.runs == alone.runs


def test_pieces_by_chance_have_seeds_of_their_own() -> None:
    whole = Shard(SCENARIO, "random", "3", 2 * SHARD_RUNS + 10)
    pieces = shards_of(whole, pieces=8)
    assert [piece.runs for piece in pieces] == [SHARD_RUNS, SHARD_RUNS, 10]
    assert len({piece.seed for piece in pieces}) == 3
    again = run_shard(pieces[2])
    assert again.fingerprints == run_shard(pieces[2]).fingerprints


def test_the_first_shard_that_is_wrong_counts() -> None:
    wrong = Shard(SCENARIO, "random", "0", 5, mutants=("nothing-removed",))
    shards = [replace(wrong, mutants=()), wrong, replace(wrong, seed="1")]
    search = explore_shards(shards, None)
    assert search.failing is not None
    assert search.failing_shard == 1


@pytest.mark.slow
def test_processes_find_the_same() -> None:
    whole = Shard(SCENARIO, "exhaustive", "0", 100_000, 1)
    pieces = shards_of(whole, pieces=8)
    seen: list[int] = []
    with local_executor(2) as executor:
        search = explore_shards(pieces, executor, progress=seen.append)
        wrong = explore_shards([replace(piece, mutants=("nothing-removed",)) for piece in pieces], executor)
    assert search.fingerprints == explore_shards(pieces, None).fingerprints
    assert seen == sorted(seen)
    assert seen[-1] == search.runs
    assert wrong.failing is not None
    assert wrong.failing.failure is not None
    assert wrong.failing_shard == 0


def test_one_worker_that_answers_out_of_order() -> None:
    """Mutants are planted in the process, so threads cannot hunt several; one thread can stand for any executor."""
    wrong = Shard(SCENARIO, "random", "0", 5, mutants=("nothing-removed",))
    with ThreadPoolExecutor(1) as executor:
        search = explore_shards([replace(wrong, mutants=()), wrong, wrong], executor)
    assert search.failing_shard == 1


@pytest.mark.slow
def test_a_dask_cluster_runs_the_same_shards(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed", reason="needs Dask: pip install 'xipvm[dask]'")
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None, protocol="tcp"
    ) as cluster:
        outcome = inside(
            "explore", SCENARIO, "--runs", 30, "--executor", "dask", "--scheduler", cluster.scheduler_address,
            cwd=tmp_path,
        )  # fmt: skip
    assert outcome.status == 0, outcome
    assert "30 runs" in outcome.out


def test_jobs_on_the_command_line(tmp_path: Path) -> None:
    outcome = inside("explore", SCENARIO, "--runs", 20, "--mutant", "nothing-removed", cwd=tmp_path)
    assert outcome.status == 1
    assert inside("replay", f"{SCENARIO}.xipvm.json", cwd=tmp_path).status == 1
    old = inside("explore", "fault-against-cow", "--runs", 20, "--protocol", "2008", cwd=tmp_path)
    assert old.status == 0, old
    unknown = inside("explore", SCENARIO, "--mutant", "gremlin", cwd=tmp_path)
    assert unknown.status == 2
    assert "no mutant is called 'gremlin'" in unknown.err
