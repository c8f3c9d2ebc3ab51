"""What one image costs, and the resources that pay for it: the input of causes and predictions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median

from pipeline.diagnosis.accounting import LoaderThroughput, StallAccount
from pipeline.host import Host
from pipeline.loader.augment import CROP, STORED
from pipeline.loader.settings import LoaderSettings
from pipeline.profiling.stages import StageThroughput
from pipeline.profiling.windows import WindowMeasurements
from pipeline.shards.reader import ShardSet

STORAGE_WAIT_SHARE = 0.5  # of the time of reading: with more time off the CPU than this, reading waits for storage
BETWEEN_STEPS_SHARE = 0.02  # of the run's time: less than this between steps is noise
TRANSFER_SHARE = 0.05  # of the loader's time: less than this for swapping halves is noise
IDLE_TRAINER_CORES = 0.05  # a trainer that uses fewer, as one that sleeps, leaves all cores to the loader
BUSY_TRAINER_CORES = 0.3  # a trainer that uses fewer hardly slows the loader down
FASTER_FROM_MEMORY_RATIO = 2.0  # times the throughput of the disk: from here on the page cache is what is missing
NEIGHBOURS_SHARE = 0.25  # of the cores: from here on other processes are a cause
THROTTLED_SHARE = 0.1  # of the quota's periods: from here on the quota is a cause
BANDWIDTH_SHARE = 0.6  # of the time of reading: with less, the bytes a second are not what limits it
MACHINE_MEMORY_SHARE = 0.8  # of a machine's memory: a set below it would fit without a limit
SWAPPED_BYTES_S = 2**20  # bytes a second from swap: less is noise
FAIR_SHARE = 0.5  # of the cores: what a job gets beside neighbours when it needs it
MIN_FREE_CORES = 0.1  # however much neighbours use, the system gives a process some time


@dataclass(frozen=True)
class LoaderSetup:
    """What the loaders of a job work with. Hosts are assumed to be equal and to make as many images each.

    Attributes:
        threads: DALI threads of one rank's loader.
        queue_depth: batches in the queue of one rank's loader.
        cores: cores of this host that the job may use; a quota may make it a fraction.
        affinity_cores: cores of this host on which the job may run, which it may share with others; 0 for `cores`.
        stored_area_ratio: mean area of the stored images over that of a stored square.
        host: cores and memory of this host that the job may use.
        decode_area_ratio: what must be entropy decoded for a crop, over the same for a stored square of 256, on
            average over the set.
        ranks: number of ranks.
        hosts: number of hosts.
    """

    threads: int
    queue_depth: int
    cores: float
    decode_area_ratio: float
    host: Host
    ranks: int = 1
    hosts: float = 1.0
    affinity_cores: int = 0
    stored_area_ratio: float = 1.0


def setup_of(shards: ShardSet, settings: LoaderSettings, host: Host, ranks: int = 1, hosts: float = 1.0) -> LoaderSetup:
    """The setup of loaders of `shards`, on hosts like this one."""
    # A crop of a JPEG requires entropy decoding of all rows down to the crop's end: on average half of what is left
    # below the crop, over the full width.
    width, height = shards.index["width"].astype(float), shards.index["height"].astype(float)
    stored_area = float((width * height).mean()) / STORED**2
    ratio = float((width * (height + CROP) / 2).mean()) / (STORED * (STORED + CROP) / 2)
    return LoaderSetup(
        settings.threads, settings.queue_depth, host.cores, ratio, host, ranks, hosts, host.affinity_cores, stored_area
    )


@dataclass(frozen=True)
class Workload:
    """Costs of an image, and what there is to pay them with, over the whole job: all ranks, all hosts.

    Attributes:
        threads: threads of all loaders.
        cores: cores of all hosts.
        neighbour_cores: cores that processes outside the job use.
        storage_s: seconds that reading an image takes; 0 if reading does not wait for storage.
        read_cpu_s: CPU seconds of reading an image.
        decode_cpu_s: CPU seconds of decoding it.
        augment_cpu_s: CPU seconds of everything else in the loader.
        trainer_cpu_s: CPU seconds of the training step per image; 0 if the trainer is idle on the CPU.
        demand: img/s of the trainer on replayed batches.
        supply: img/s of the loader alone.
        together: img/s of the real run.
        decode_area_ratio: see `LoaderSetup`.
        queue_depth: batches in the queue of a loader.
        memory_read_s: seconds that reading an image from memory takes.
        fits_in_memory: whether the set fits in the memory that is available.
        between_s: seconds per image that pass between steps.
        uneven_wait_s: seconds per image that are waited although the loader is fast enough on average.
        transfer_s: seconds per image that swapping halves between ranks adds to the loader.
        rank_supplies: img/s of each rank's own loader; empty for one rank.
        ranks: number of ranks.
        hosts: number of hosts.
        asynchronous: whether the trainer only launches its steps on a device.
        slower_step_s: seconds per image by which a step takes longer beside the loader than on replayed batches.
        affinity_cores: cores of all hosts on which the job may run; more than `cores` with a CPU quota; 0 for `cores`.
        throttled_share: share of the quota's periods in which it was used up; 0 without a quota.
        bandwidth_s: seconds that the bytes of an image take by themselves, with several reads at a time; 0 if unknown.
        remote: whether the set is on a network or FUSE folder.
        square_bytes_ratio: bytes of a stored square over those of a whole image.
        limit_hides_memory: whether the set would fit in the machine's memory, and the job's limit is too small for it.
        launch_s: seconds per image that the host takes to launch a step on an asynchronous device.
        swapping: whether memory was read from swap.
    """

    threads: int
    cores: float
    neighbour_cores: float
    storage_s: float
    read_cpu_s: float
    decode_cpu_s: float
    augment_cpu_s: float
    trainer_cpu_s: float
    demand: float
    supply: float
    together: float
    decode_area_ratio: float = 1.0
    queue_depth: int = 2
    memory_read_s: float = 0.0
    fits_in_memory: bool = True
    between_s: float = 0.0
    uneven_wait_s: float = 0.0
    transfer_s: float = 0.0
    rank_supplies: tuple[float, ...] = ()
    ranks: int = 1
    hosts: float = 1.0
    asynchronous: bool = False
    slower_step_s: float = 0.0
    affinity_cores: float = 0.0
    throttled_share: float = 0.0
    bandwidth_s: float = 0.0
    remote: bool = False
    square_bytes_ratio: float = 1.0
    limit_hides_memory: bool = False
    launch_s: float = 0.0
    swapping: bool = False

    @property
    def loader_cpu_s(self) -> float:
        """CPU seconds of the loader per image."""
        return self.read_cpu_s + self.decode_cpu_s + self.augment_cpu_s

    @property
    def faster_from_memory(self) -> bool:
        """Whether reading would be much faster from memory."""
        return self.storage_s > FASTER_FROM_MEMORY_RATIO * self.memory_read_s

    @property
    def free_cores(self) -> float:
        """Cores that neighbours leave, within the quota."""
        return max(MIN_FREE_CORES, min(self.cores, self.shared_cores - self.neighbour_cores))

    @property
    def shared_cores(self) -> float:
        """Cores that the job shares with its neighbours."""
        return max(self.cores, self.affinity_cores)

    @property
    def throttled(self) -> bool:
        """Whether the CPU quota stops the job often."""
        return self.throttled_share > THROTTLED_SHARE

    @property
    def crowded(self) -> bool:
        """Whether neighbours use a large share of the cores."""
        return self.neighbour_cores > NEIGHBOURS_SHARE * self.shared_cores

    @property
    def reads_wait_to_begin(self) -> bool:
        """Whether reads take most of their time before the first byte: several at once would bring more."""
        return 0 < self.bandwidth_s < BANDWIDTH_SHARE * self.storage_s

    @property
    def trainer_cores(self) -> float:
        """Cores that the trainer uses on replayed batches."""
        return self.trainer_cpu_s * self.demand

    @property
    def trainer_slows_loader(self) -> bool:
        """Whether the trainer computes on the loader's cores, so that it causes uneven waits itself.

        The thread that launches steps on a GPU may use a core all the time, even while it waits for a place in the
        queue. It slows the loader down only if both together need more cores than there are.
        """
        needed_cores = self.trainer_cores + self.loader_cpu_s * self.demand
        lacks_cores = not self.asynchronous or needed_cores > self.free_cores
        return lacks_cores and self.trainer_cores > BUSY_TRAINER_CORES

    @property
    def slowest_rank(self) -> int:
        """The rank whose loader is the slowest; 0 for one rank."""
        return min(range(len(self.rank_supplies)), key=lambda rank: self.rank_supplies[rank], default=0)

    @property
    def other_ranks_supply(self) -> float:
        """Median img/s of the loaders of all ranks but the slowest."""
        return median(img_s for rank, img_s in enumerate(self.rank_supplies) if rank != self.slowest_rank)

    @property
    def slowest_rank_ratio(self) -> float:
        """Supply of the slowest rank's loader over the median of the others; 1 for one rank."""
        return self.rank_supplies[self.slowest_rank] / self.other_ranks_supply if self.rank_supplies else 1.0


def workload_of(
    stages: StageThroughput,
    measured: WindowMeasurements,
    setup: LoaderSetup,
    account: StallAccount,
    loader: LoaderThroughput,
    rank_supplies: tuple[float, ...] = (),
) -> Workload:
    """The workload that measurements show. Hosts are equal: CPU time is this host's, times their number.

    Args:
        stages: the loader cut short after each stage.
        measured: the windows.
        setup: threads, cores, ranks and hosts.
        account: the stall account of the windows.
        loader: img/s of the stages, scaled to the windows' supply.
        rank_supplies: img/s of each rank's own loader; empty for one rank.
    """
    read_s, decode_s, augment_s = _loader_cpu_s(stages, setup.hosts * measured.loader_cpu_s)
    trainer_s = setup.hosts * measured.trainer_cpu_s
    between_share, transfer_s = account.parts["unexplained"], loader.part_s()["transfer"]
    load = Workload(
        threads=setup.ranks * setup.threads,
        cores=setup.hosts * setup.cores,
        neighbour_cores=setup.hosts * _neighbour_cores(stages, measured, setup, account),
        storage_s=1 / loader.read if _waits_for_storage(stages, setup, account) else 0.0,
        read_cpu_s=read_s,
        decode_cpu_s=decode_s,
        augment_cpu_s=augment_s,
        trainer_cpu_s=trainer_s if trainer_s * measured.demand > IDLE_TRAINER_CORES else 0.0,
        demand=measured.demand,
        supply=max(measured.supply, account.together),  # what the loader gave to the trainer it can give alone
        together=account.together,
        decode_area_ratio=setup.decode_area_ratio,
        queue_depth=setup.queue_depth,
        memory_read_s=1 / stages.reread.img_s,
        fits_in_memory=stages.set_bytes < setup.host.available_bytes,
        between_s=between_share / account.together if between_share > BETWEEN_STEPS_SHARE else 0.0,
        transfer_s=transfer_s if transfer_s * loader.supply > TRANSFER_SHARE else 0.0,
        rank_supplies=rank_supplies,
        ranks=setup.ranks,
        hosts=setup.hosts,
        asynchronous=measured.asynchronous,
        slower_step_s=_slower_step_s(measured),
    )
    load = _within_limits(load, stages, measured, setup)  # a deeper queue leaves waits that the trainer causes
    return load if load.trainer_slows_loader else replace(load, uneven_wait_s=_uneven_wait_s(measured))


def _neighbour_cores(
    stages: StageThroughput, measured: WindowMeasurements, setup: LoaderSetup, account: StallAccount
) -> float:
    """Cores of this host that neighbours take from the job.

    While the loader waits for storage, neighbours may use all cores and take nothing from it. Reading from memory shows
    how many cores it gets when it needs them; half of them are assumed to be its own in any case.
    """
    used = measured.loader_cpu.cores()["neighbours"]
    if account.leaning != "input-bound: storage":
        return used
    cores = max(setup.affinity_cores, setup.cores)
    got = max(stages.reread.cores_used / setup.hosts, FAIR_SHARE * cores)
    return min(used, max(0.0, cores - got))


def _within_limits(
    load: Workload, stages: StageThroughput, measured: WindowMeasurements, setup: LoaderSetup
) -> Workload:
    """The workload with what limits the job from outside: quota, memory, storage, launches."""
    pressure = measured.real_cpu.pressure
    return replace(
        load,
        affinity_cores=setup.hosts * max(setup.affinity_cores, setup.cores),
        throttled_share=(measured.loader_cpu.pressure + pressure).throttled_share,
        square_bytes_ratio=min(1.0, 1 / setup.stored_area_ratio),
        limit_hides_memory=_limit_hides_memory(stages.set_bytes, setup.host),
        launch_s=_launch_s(measured),
        swapping=pressure.swapped_in_bytes > SWAPPED_BYTES_S * pressure.wall_s,
        remote=stages.probe is not None and stages.probe.remote,
        bandwidth_s=_bandwidth_s(stages),
    )


def _limit_hides_memory(set_bytes: int, host: Host) -> bool:
    """Whether the set fits in this machine and not within the memory limit of the job's control groups."""
    limited = host.limit_bytes is not None and set_bytes >= host.available_bytes
    return limited and set_bytes < MACHINE_MEMORY_SHARE * host.machine_bytes


def _launch_s(measured: WindowMeasurements) -> float:
    """Host seconds per image to launch a step; 0 on a synchronous device, whose step returns when it is done."""
    if not measured.asynchronous or not measured.images_of_step:
        return 0.0
    return measured.launch_s / measured.images_of_step


def _bandwidth_s(stages: StageThroughput) -> float:
    """Seconds per image that its bytes take by themselves; 0 if that was not measured."""
    probe = stages.probe
    return stages.image_bytes / probe.parallel_bytes_s if probe is not None and probe.parallel_bytes_s else 0.0


def _loader_cpu_s(stages: StageThroughput, loader_s: float) -> tuple[float, float, float]:
    """CPU seconds of reading, decoding and augmenting an image, of `loader_s` in all."""
    read_ms, decoded_ms, full_ms = (stage.cpu_ms_per_img for stage in (stages.read, stages.decode, stages.full))
    scale = loader_s / max(full_ms, 1e-9)
    read_s = scale * min(read_ms, full_ms)
    decode_s = scale * max(0.0, min(decoded_ms, full_ms) - read_ms)
    return read_s, decode_s, max(0.0, loader_s - read_s - decode_s)


def _slower_step_s(measured: WindowMeasurements) -> float:
    """Seconds per image by which real steps took longer than replayed ones."""
    return max(0.0, measured.clocks.step_s / measured.clocks.images - 1 / measured.demand)


def _uneven_wait_s(measured: WindowMeasurements) -> float:
    """Seconds per image that were waited beyond what the loader's mean throughput explains."""
    inherent_s = max(0.0, 1 / measured.supply - 1 / measured.demand)
    return max(0.0, measured.clocks.wait_s / measured.clocks.images - inherent_s)


def _waits_for_storage(stages: StageThroughput, setup: LoaderSetup, account: StallAccount) -> bool:
    """Whether reading waits for storage: it is the verdict, or reading spends most of its time off the CPU."""
    off_cpu = 1 - stages.read.img_s / setup.ranks * stages.read.cpu_ms_per_img / 1000
    return account.verdict == "input-bound: storage" or off_cpu > STORAGE_WAIT_SHARE
