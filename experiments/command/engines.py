"""What runs the jobs of a sweep side by side: joblib, submitit (here or under Slurm), Ray."""

import logging
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import Queue
from typing import Annotated, Any, ClassVar

from pydantic import Field

from diffusion.checked import checked
from diffusion.files import in_short
from experiments.command.errors import CommandError
from experiments.command.launchers import TAKEN_ALONG, Ended, JobCall, ended_by

log = logging.getLogger(__name__)

Count = Annotated[int, Field(ge=1)]

SECONDS_BETWEEN_LOOKS = 15.0
"""At Slurm's queue; a job that is twice not in it and left no result has died."""


@checked
class Joblib:
    """Processes on this machine, as many as joblib's ``n_jobs`` says.

    joblib's own process pool ends all jobs when one of them is killed; so joblib's threads each start a process a job.

    Attributes:
        n_jobs: Jobs at a time; -1 for as many as there are CPU cores, -2 for one fewer, and so on.
        jobs_per_gpu: So many jobs at a time share a GPU, the only one that they see; None: all jobs see all GPUs.
    """

    n_jobs: int
    jobs_per_gpu: Count | None
    package: ClassVar[str] = "joblib"
    extra: ClassVar[str] = "joblib"
    preload: ClassVar[str] = "experiments.command.launch"  # imported once for all jobs

    def __post_init__(self) -> None:
        if self.n_jobs == 0:
            raise CommandError(
                "hydra.launcher.n_jobs is 0; it must be 1 or more, or -1 for as many jobs as there are CPU cores."
            )
        if self.jobs_per_gpu is not None and not _gpus():
            raise CommandError(
                f"hydra.launcher.jobs_per_gpu is {self.jobs_per_gpu}, but there is no GPU here; leave it out."
            )

    def run(self, calls: Sequence[JobCall]) -> list[Ended]:
        """See :class:`Engine`."""
        import cloudpickle  # noqa: PLC0415
        from joblib import Parallel, delayed, effective_n_jobs  # noqa: PLC0415

        gpus = _gpus() * self.jobs_per_gpu if self.jobs_per_gpu else []
        at_once = min(effective_n_jobs(self.n_jobs), len(gpus) or len(calls), len(calls))
        if gpus and self.n_jobs == -1:
            # A job that computes on a GPU needs no whole core.
            at_once = min(len(gpus), len(calls))
        free: Queue[str] = Queue()
        for gpu in gpus:
            free.put(gpu)
        context = get_context("forkserver")
        context.set_forkserver_preload([self.preload])
        # Closed when this process ends, however it ends; the jobs watch it.
        alive, lifeline = context.Pipe(duplex=False)
        running: dict[int, BaseProcess] = {}

        def run_one(place: int, call: bytes) -> Ended:
            gpu = free.get() if gpus else None
            receiver, sender = context.Pipe(duplex=False)
            try:
                process = context.Process(target=_work, args=(call, sender, alive, gpu))
                process.start()
                running[place] = process
                sender.close()
                process.join()
                if process.exitcode:
                    return Ended(died=ended_by(process.exitcode))
                return Ended(receiver.recv())
            except EOFError:
                return Ended(died="its process ended without a result")
            finally:
                receiver.close()
                running.pop(place, None)
                if gpu is not None:
                    free.put(gpu)

        pickled = [cloudpickle.dumps(call) for call in calls]
        try:
            ends: list[Ended] = Parallel(n_jobs=at_once, backend="threading", batch_size=1)(
                delayed(run_one)(place, call) for place, call in enumerate(pickled)
            )
            return ends
        finally:
            lifeline.close()
            for process in list(running.values()):
                process.terminate()


def _work(call: bytes, value: Connection, alive: Connection, gpu: str | None) -> None:
    """Do one job in a process of its own, which sees one GPU alone if that has a name."""
    import cloudpickle  # noqa: PLC0415

    from experiments.job.processes import end_with  # noqa: PLC0415

    # The main process is told of Ctrl-C, and ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with(alive)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    value.send(cloudpickle.loads(call)())


def _gpus() -> list[str]:
    """The GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    import torch  # noqa: PLC0415

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    return [str(number) for number in range(torch.cuda.device_count())]


class _Submitit:
    """What submitit's two clusters share."""

    package: ClassVar[str] = "submitit"
    extra: ClassVar[str] = "slurm"

    @staticmethod
    def executor(cluster: str, folder: str, parameters: dict[str, Any], **options: Any) -> Any:
        """Submitit's executor with its parameters set.

        Raises:
            CommandError: It refuses them.
        """
        import submitit  # noqa: PLC0415

        try:
            executor = submitit.AutoExecutor(folder=folder, cluster=cluster, **options)
            executor.update_parameters(**parameters)
        except (RuntimeError, ValueError, NameError, AssertionError) as error:
            raise CommandError(f"submitit refuses hydra.launcher's settings: {in_short(error)}.") from error
        return executor

    @staticmethod
    def wait(job: Any) -> Ended:
        """Wait for a job and tell how it ended."""
        try:
            return Ended(job.results()[0])
        except Exception:
            log.debug("job %s", job.job_id, exc_info=True)
            return Ended(died=f"submitit's job {job.job_id} left no result (its output is {job.paths.stdout})")


@checked
class SubmititLocal(_Submitit):
    """Processes on this machine that submitit starts, as a rehearsal for Slurm.

    Attributes:
        submitit_folder: Where the jobs' output and submitit's files lie; ``%j`` is the job's id.
        jobs_at_once: Jobs at a time; None for as many as there are CPU cores.
        timeout_min: Minutes after which a job is ended.
        gpus_per_node: GPUs that each job sees, the first ones; None for no GPU.
        stderr_to_stdout: Write both into one file.
    """

    submitit_folder: str
    jobs_at_once: Count | None
    timeout_min: Count
    gpus_per_node: Annotated[int, Field(ge=0)] | None
    stderr_to_stdout: bool

    def run(self, calls: Sequence[JobCall]) -> list[Ended]:
        """See :class:`Engine`."""
        parameters = {
            "timeout_min": self.timeout_min,
            "gpus_per_node": self.gpus_per_node,
            "stderr_to_stdout": self.stderr_to_stdout,
        }
        executor = self.executor("local", self.submitit_folder, parameters)
        submitted: list[Any] = []

        def run_one(call: JobCall) -> Ended:
            submitted.append(job := executor.submit(call))
            return self.wait(job)

        pool = ThreadPoolExecutor(self.jobs_at_once or os.cpu_count() or 1)
        try:
            return list(pool.map(run_one, calls))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for job in submitted:
                job.cancel(check=False)
            raise


@checked
class SubmititSlurm(_Submitit):
    """One array job of Slurm; see submitit's and sbatch's manuals for what the fields mean.

    Attributes:
        submitit_folder: Where the jobs' output and submitit's files lie, on a file system that all nodes share; ``%j``
            is the job's id.
        name: Of the jobs.
        timeout_min: Minutes that a job may take.
        cpus_per_task: CPU cores of a job.
        gpus_per_node: GPUs of a job.
        mem_gb: Memory of a job, GB.
        partition: Where they run.
        qos: Quality of service.
        account: Who pays.
        constraint: Features that a node must have.
        exclude: Nodes to avoid.
        gres: Other resources, as ``shard:1`` for a share of a GPU.
        array_parallelism: Jobs at a time.
        max_num_timeout: How often a job that ran out of time is started again, which continues from the store.
        signal_delay_s: Seconds before its end at which a job is told.
        stderr_to_stdout: Write both into one file.
        setup: Lines of shell before each job, as those that activate an environment.
        additional_parameters: Other options of sbatch by name.
    """

    submitit_folder: str
    name: str
    timeout_min: Count
    cpus_per_task: Count | None
    gpus_per_node: Annotated[int, Field(ge=0)] | None
    mem_gb: Annotated[float, Field(gt=0)] | None
    partition: str | None
    qos: str | None
    account: str | None
    constraint: str | None
    exclude: str | None
    gres: str | None
    array_parallelism: Count
    max_num_timeout: Annotated[int, Field(ge=0)]
    signal_delay_s: Count
    stderr_to_stdout: bool
    setup: list[str] | None
    additional_parameters: dict[str, Any]

    def run(self, calls: Sequence[JobCall]) -> list[Ended]:
        """See :class:`Engine`."""
        shared = ("name", "timeout_min", "cpus_per_task", "gpus_per_node", "mem_gb", "stderr_to_stdout")
        own = [
            field.name for field in fields(self) if field.name not in {*shared, "submitit_folder", "max_num_timeout"}
        ]
        parameters = {name: getattr(self, name) for name in shared}
        parameters |= {f"slurm_{name}": getattr(self, name) for name in own}
        executor = self.executor("slurm", self.submitit_folder, parameters, slurm_max_num_timeout=self.max_num_timeout)
        jobs = executor.map_array(_call, calls)
        log.info("Slurm has %s; the output of each is in %s", jobs[0].job_id.partition("_")[0], self.submitit_folder)
        try:
            return [self._ended(job) for job in jobs]
        except BaseException:
            log.warning("The jobs go on under Slurm; scancel %s ends them.", jobs[0].job_id.partition("_")[0])
            raise

    def _ended(self, job: Any) -> Ended:
        """Wait for a job, also where the cluster keeps no accounts from which submitit could learn that it died."""
        gone = 0
        while not job.done() and gone < 2:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            gone = 0 if _in_queue(job.job_id) else gone + 1
        if not job.done():
            return Ended(died=f"job {job.job_id} left Slurm's queue (its output is {job.paths.stdout})")
        return self.wait(job)


def _in_queue(job: str) -> bool:
    """Whether Slurm has a job that waits or runs; so it is taken to where Slurm cannot be asked."""
    try:
        asked = subprocess.run(["squeue", "-h", "-j", job], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return True
    return bool(asked.stdout.strip()) or (asked.returncode != 0 and "Invalid job id" not in asked.stderr)


@checked
class Ray:
    """Tasks of a Ray cluster: one that runs, or one that is started on this machine for them.

    Attributes:
        init: Arguments of ``ray.init``, as ``address``.
        remote: Arguments of ``ray.remote`` for each job, as ``num_gpus``.
    """

    init: dict[str, Any]
    remote: dict[str, Any]
    package: ClassVar[str] = "ray"
    extra: ClassVar[str] = "ray"

    def run(self, calls: Sequence[JobCall]) -> list[Ended]:
        """See :class:`Engine`."""
        # Ray would tell its makers of each start.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray  # noqa: PLC0415

        environment = {name: os.environ[name] for name in TAKEN_ALONG if name in os.environ}
        runtime = self.init.get("runtime_env") or {}
        runtime = {**runtime, "env_vars": {**environment, **runtime.get("env_vars", {})}}
        try:
            ray.init(**{**self.init, "runtime_env": runtime})
        except Exception as error:  # some that Ray raises are nothing more special
            raise CommandError(
                f"Ray cannot be started with hydra.launcher.init={self.init}: {in_short(error)}."
            ) from error
        try:
            work = ray.remote(**self.remote)(_call) if self.remote else ray.remote(_call)
            return [_got(ray, reference) for reference in [work.remote(call) for call in calls]]
        finally:
            ray.shutdown()


def _call(call: JobCall) -> str | None:
    return call()


def _got(ray: Any, reference: Any) -> Ended:
    """Wait for a task of Ray and tell how it ended."""
    try:
        return Ended(ray.get(reference))
    except ray.exceptions.RayError as error:
        return Ended(died=f"Ray says: {in_short(error)}")
