"""The diagnosis of made-up figures: each planted cause is named, and everything that the report advises agrees.

tests/soak/planted_stalls.py plants the same causes with real work on real clocks.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pipeline.diagnosis.accounting import PARTS
from pipeline.diagnosis.causes import Evidence, cause_of
from pipeline.diagnosis.findings import build_findings
from pipeline.diagnosis.html import report_html
from pipeline.diagnosis.predict import REMEDIES, effective_cores
from pipeline.diagnosis.screen import format_findings
from pipeline.profiling.clocks import StepClocks
from pipeline.profiling.throughput import lockstep_throughput
from pipeline.profiling.windows import WindowRound
from tests.pipeline.diagnosis.planted_figures import (
    COLD,
    CORES,
    DEMAND,
    HEALTHY,
    MEMORY,
    PLANTED,
    SETUP,
    THROTTLED,
    found_for,
    windows,
)


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_cause_is_named(name: str):
    verdict, cause, *_ = PLANTED[name]
    found = found_for(name)
    assert (found.account.verdict, found.cause.name) == (verdict, cause)


@pytest.mark.parametrize("name", PLANTED)
def test_cause_advice_and_first_action_agree(name: str):
    """Action 1 removes the cause; the line under the verdict names that cause and that action and no other."""
    found = found_for(name)
    if not REMEDIES[found.cause.name]:
        expected = {"none": "only a faster training step", "slow launches": "launch fewer, larger kernels"}
        said = expected.get(found.cause.name, "no change is predicted")
        assert found.actions == () and said in found.advice
        return
    first, *others = found.actions
    assert first.change in REMEDIES[found.cause.name]
    assert found.advice.startswith(f"{found.cause.name}; first change: {first.text}, predicted {first.together:,.0f}")
    assert not any(other.text in found.advice for other in others)
    lines = format_findings(found).splitlines()
    assert " ".join(line.strip() for line in lines[1 : lines.index("")]) == found.advice
    shown = " ".join(line.strip() for line in lines).split()
    assert f"action 1 {first}".split() == shown[shown.index("action") :][: len(str(first).split()) + 2]


def test_without_an_action_that_helps_the_advice_says_why():
    """Uneven waits with a queue that is deep already: nothing is predicted to help."""
    apart, setup = HEALTHY, replace(SETUP, queue_depth=4)
    found = build_findings(apart, windows(apart, wait_ms=0.1), setup, MEMORY, {})
    assert (found.cause.name, found.actions) == ("short queue", ())
    assert found.advice == "short queue; no change is predicted to gain 2% or more, the limit is the training step"


def test_every_planted_cause_has_a_remedy():
    assert {cause for _, cause, *_ in PLANTED.values()} == set(REMEDIES)


@pytest.mark.parametrize("name", PLANTED)
def test_the_record_is_json_and_adds_up(name: str):
    """It has only what JSON has, so no infinity; AU is 1 minus the parts and lies in its confidence interval."""
    found = found_for(name)
    record = json.loads(json.dumps(found.record(), allow_nan=False))
    assert record["au"] == pytest.approx(1 - sum(record["parts"].values()))
    assert record["au_interval"]["low"] <= record["au_interval"]["mean"] <= record["au_interval"]["high"]
    assert list(record["limits_img_s"].values()) == sorted(record["limits_img_s"].values())


def test_the_slowest_of_four_ranks_is_named():
    load = replace(found_for("few cores").workload, rank_supplies=(2000.0, 2010.0, 900.0, 1990.0))
    cause = cause_of(Evidence("input-bound: decode", load))
    assert (cause.name, "rank 2" in cause.because) == ("slow rank", True)


def test_a_slow_rank_that_is_fast_enough_is_no_cause():
    load = replace(found_for("shared cores").workload, rank_supplies=(9000.0, 4500.0))
    assert load.supply > load.demand
    assert cause_of(Evidence("contention", load)).name == "shared cores"


@pytest.mark.parametrize("name", ["few threads", "few cores", "slow storage", "shared cores"])
def test_two_hosts_are_one_twice(name: str):
    """With a rank on each, throughput, threads and cores double, and an image costs the same."""
    _, _, apart, timing, setup, _ = PLANTED[name]
    one, measured_by_one = found_for(name), windows(apart, **timing)
    rounds = [
        WindowRound(2 * r.demand, replace(r.clocks, images=2 * r.clocks.images), 2 * r.supply)
        for r in measured_by_one.rounds
    ]
    two = build_findings(
        apart.each(lambda rank: lockstep_throughput([rank, replace(rank, img_s=2 * rank.img_s)])),
        replace(measured_by_one, rounds=tuple(rounds)),
        replace(SETUP, **setup, ranks=2, hosts=2),
        MEMORY,
        {},
    )
    assert (two.account.verdict, two.cause.name) == (one.account.verdict, one.cause.name)
    assert list(two.limits_img_s.values()) == pytest.approx([2 * img_s for img_s in one.limits_img_s.values()])
    assert two.workload.loader_cpu_s == pytest.approx(one.workload.loader_cpu_s)
    assert two.account.parts == pytest.approx(one.account.parts)
    assert [action.settings for action in two.actions] == [action.settings for action in one.actions]


def test_the_first_action_against_few_threads_is_more_of_them():
    first = found_for("few threads").actions[0]
    assert first.settings == {"threads": CORES + 1}
    assert first.supply == pytest.approx(effective_cores(CORES) * found_for("few threads").account.supply)


def test_a_cold_set_that_fits_is_read_into_memory_first():
    """Storage gave 1,000 img/s. Without that limit the trainer gets the 2,000 img/s that it consumes."""
    cold, large, slow = (found_for(name).actions[0] for name in ("cold cache", "large set", "slow storage"))
    assert [action.change for action in (cold, large, slow)] == ["memory", "disk", "disk"]
    assert [action.together for action in (cold, large, slow)] == pytest.approx([DEMAND] * 3, rel=0.01)
    assert "memory for the set" in large.text


def test_what_each_cure_of_a_network_folder_would_bring():
    """Reading takes 1 ms an image, of which the bytes take 0.25 ms if several reads run at the same time: with more of
    them the loader would be limited by its CPU time. On a network that is limited by its bytes a second, fewer bytes
    help, and more reads do not."""
    found = found_for("network folder")
    assert "a FUSE folder (fuse.remote): 3.0 ms and 40 MB/s a read, 160 MB/s with 8 reads" in found.cause.because
    texts = {action.change: action.text for action in found.actions}
    assert texts["disk"] == "copy the set to a local disk" and "reads at a time" in texts["reads"]
    assert "memory" not in texts
    by_bytes = found_for("network folder that fits in memory")
    assert [action.change for action in by_bytes.actions][:1] == ["memory"]
    assert not {"reads"} & {action.change for action in by_bytes.actions}
    assert replace(by_bytes.workload, storage_s=0.001, bandwidth_s=0.0).reads_wait_to_begin is False


def test_memory_that_a_control_group_limits_is_not_proposed():
    """The machine has 16 times the set; the container may use half of it."""
    found = found_for("memory limit")
    changes = [action.change for action in found.actions]
    assert changes[0] == "memory limit" and "memory" not in changes
    assert "the container may use 0.47 GiB more of its limit of 0.93" in found.cause.because


def test_a_quota_is_named_with_its_evidence_and_is_the_limit_of_predictions():
    found = found_for("CPU quota, loader too slow")
    assert (
        "1 of 4 cores (CPU quota); it was throttled in 95% of the quota's periods, 1.7 s in 2.0 s"
        in found.cause.because
    )
    assert found.actions[0].text == "raise the container's CPU quota from 1 to 4 cores, --threads 5"
    assert not {"cores", "threads", "queue"} & {action.change for action in found.actions}
    crowded = windows(HEALTHY, supply=950.0, pressure=THROTTLED, neighbours=3.0)
    setup = replace(SETUP, cores=1.0, affinity_cores=CORES)
    first = build_findings(HEALTHY, crowded, setup, MEMORY, {}).actions[0]
    assert first.text == "raise the container's CPU quota from 1 to 4 cores, free of other processes, --threads 5"
    assert found.limits_img_s["loader"] == pytest.approx(1000 / HEALTHY.full.cpu_ms_per_img, rel=0.1)
    assert found.record()["host"]["throttled_share"] == 0.95


def test_neighbours_that_use_cores_while_the_loader_waits_for_storage_take_nothing():
    """They use 3.9 of 4 cores, but reading from memory got 2.1 of them: prediction and cause do not change."""
    apart = replace(COLD, reread=replace(COLD.reread, cores_used=2.1))
    alone, beside = (build_findings(apart, windows(apart, neighbours=cores), SETUP, MEMORY, {}) for cores in (0.0, 3.9))
    assert (beside.cause.name, beside.workload.free_cores) == ("cold cache", pytest.approx(2.1))
    assert beside.actions[0].change == alone.actions[0].change == "memory"
    assert "neighbours" not in {action.change for action in beside.actions}
    assert beside.actions[0].together > 1.5 * beside.account.together


def test_uneven_waits_beside_neighbours_are_theirs():
    """One voice: no deeper queue is proposed, and without the neighbours the waits are gone."""
    found = found_for("noisy neighbours with uneven waits")
    assert [action.change for action in found.actions] == ["neighbours"]
    assert found.actions[0].together == pytest.approx(DEMAND, rel=0.01)


def test_a_loader_that_is_as_fast_as_the_trainer_is_not_called_fast():
    """Supply at 0.9 of demand and AU at the threshold contradict each other; at 1.05 a faster step would wait."""
    slow = build_findings(HEALTHY, windows(HEALTHY, supply=0.9 * DEMAND, wait_ms=0.02), SETUP, MEMORY, {})
    assert (
        slow.account.verdict == "not distinguishable from the threshold: AU 96% to 96%, and the loader alone allows 90%"
    )
    assert "only a faster" not in slow.advice and slow.advice.startswith("measure for longer to decide")
    equal = build_findings(HEALTHY, windows(HEALTHY, supply=1.05 * DEMAND), SETUP, MEMORY, {})
    assert equal.account.verdict == "compute-bound"
    assert "both are about equally fast, and a faster step alone would wait for the loader" in equal.advice


def test_a_verdict_is_as_firm_as_the_interval_of_au():
    """Rounds from 85% to 101% do not show on which side of 95% AU is. The advice says what would hold below it."""
    firm = windows(HEALTHY, wait_ms=0.035)
    rounds = []
    for factor, one in zip((0.88, 0.94, 1.0, 1.06, 1.12), firm.rounds, strict=True):
        clocks = replace(one.clocks, elapsed_s=factor * one.clocks.elapsed_s, wait_s=factor * one.clocks.wait_s)
        rounds.append(replace(one, clocks=clocks))
    found = build_findings(HEALTHY, replace(firm, rounds=tuple(rounds)), SETUP, MEMORY, {})
    low, high = found.au.low, found.au.high
    assert low < 0.95 < high
    assert found.account.verdict == f"not distinguishable from the threshold: AU {low:.0%} to {high:.0%}"
    assert found.account.leaning in found.advice and found.advice.startswith(
        "measure for longer to decide; if training"
    )
    assert found.record()["leaning"] == found.account.leaning


def test_the_machine_and_its_pressure_are_shown():
    found = found_for("CPU quota")
    text = format_findings(found)
    assert "throttled in 95% of the quota's periods" in text
    assert "machine    4 of 4 cores; 1.9 GiB of memory available of 3.7" in text
    assert found.record()["host"]["available_bytes"] == 2 * 10**9


def test_there_is_no_action_if_training_does_not_wait():
    assert found_for("none").actions == ()


def test_the_jpeg_engines_of_a_gpu_are_on_the_screen():
    decoding = {"active": "no", "because": "libnvcuvid.so.1 cannot be loaded; check the driver"}
    found = found_for("few threads")
    assert "JPEG engines" not in format_findings(found)
    with_gpu = replace(found, environment={"hardware_decoding": decoding})
    assert "decoder    JPEG engines active: no; libnvcuvid.so.1 cannot" in format_findings(with_gpu)


def test_the_screen_fits():
    """At most 40 lines of 120 columns, with verdict, interval, cause, waits, actions and the next bottleneck."""
    text = format_findings(found_for("few threads"))
    lines = text.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 120
    for words in (
        *PARTS,
        "95% confidence interval",
        "threshold 95%",
        "few threads",
        "p99",
        "--threads 5: predicted",
        "the next bottleneck is",
    ):
        assert words in text


def test_waits_for_first_batches_are_shown_separately():
    clocks = StepClocks()
    for wait_s, edge in ((9.0, True), (0.01, False), (0.5, True), (0.01, False)):
        clocks.add(8, wait_s, 0.1, 0.1 + wait_s, edge)
    _, _, apart, timing, *_ = PLANTED["none"]
    found = build_findings(apart, windows(apart, **timing), SETUP, MEMORY, {}, clocks=clocks)
    assert found.run["first_wait_s"] == 9.0
    assert found.run["edge_waits_s"]["max"] == 0.5
    assert f"{found.run['clocks_share']:.4%}" in format_findings(found)
    assert "500.0 ms" in format_findings(found)
    assert found.run["device_gaps_s"] is None
    assert not any(line.startswith("device ") for line in format_findings(found).splitlines())
    idle_shares = found.run["idle_shares"]
    assert idle_shares == pytest.approx({"input": 0.52 / 0.82, "host": 0.0})  # by the host's clocks


def test_device_gaps_of_a_run_are_shown():
    clocks = StepClocks()
    for n in range(101):
        clocks.add(8, 0.0, 0.1, 0.1)
        clocks.add_device(n / 1000, 0.25)
    _, _, apart, timing, *_ = PLANTED["none"]
    found = build_findings(apart, windows(apart, **timing), SETUP, MEMORY, {}, clocks=clocks)
    (line,) = (line for line in format_findings(found).splitlines() if line.startswith("device "))
    assert "gaps p50 50.0 ms, p95 95.0 ms, p99 99.0 ms" in line and "250.0 ms" in line and len(line) <= 120
    assert "gaps on the device" in report_html(found, "a run")
