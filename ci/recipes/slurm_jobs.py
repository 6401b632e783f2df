# SPDX-License-Identifier: Apache-2.0
"""Nodes of Slurm as hosts of a fleet, by dask-jobqueue: prints the job, or submits it with --submit.

    python slurm_jobs.py HOST:PORT --certificate fleet.pem --nodes 8 --queue epyc --walltime 04:00:00 --submit

Each job is one node for itself, which runs `kvmpy fleet join` until the fleet ends. dask-jobqueue knows PBS,
SGE, LSF and OAR, too: take their Job in place of SLURMJob.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import sys
from typing import Any

from dask_jobqueue.slurm import SLURMJob


class JoinJob(SLURMJob):  # type: ignore[misc]
    """A job of Slurm whose command is kvmpy's, not dask's own worker."""

    def __init__(self, address: str, certificate: str, pack: str, name: str, **options: Any) -> None:
        super().__init__(
            scheduler=address, name=name, job_name="kvmpy-fleet", cores=1, memory="1GB", **options
        )
        words = ["kvmpy", "fleet", "join", address, "--certificate", certificate, "--name", name]
        self._command_template = shlex.join([*words, *(["--pack", pack] if pack else [])])


def jobs(arguments: argparse.Namespace) -> list[JoinJob]:
    """Return a job for each node."""
    return [
        JoinJob(
            arguments.address,
            arguments.certificate,
            arguments.pack,
            f"slurm-{number + 1}",
            queue=arguments.queue,
            walltime=arguments.walltime,
            job_extra_directives=["--exclusive", "--no-requeue"],
            # A host needs all of its node's memory, and as many CPUs as there are.
            job_directives_skip=["--mem=", "--cpus-per-task="],
        )
        for number in range(arguments.nodes)
    ]


async def submit(wanted: list[JoinJob]) -> None:
    """Hand the jobs to sbatch."""
    for job in wanted:
        await job.start()
        print(f"{job.name}: job {job.job_id}")


def main(words: list[str]) -> None:
    """Print or submit."""
    parser = argparse.ArgumentParser(description="Nodes of Slurm as hosts of a fleet")
    parser.add_argument("address", metavar="HOST:PORT", help="where `kvmpy fleet serve` listens")
    parser.add_argument(
        "--certificate", default="fleet.pem", help="its certificate, in a folder that all nodes see"
    )
    parser.add_argument("--pack", default="", help="guest programs for nodes without a compiler")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--queue", help="the partition")
    parser.add_argument("--walltime", default="04:00:00")
    parser.add_argument("--submit", action="store_true", help="hand the jobs to sbatch")
    arguments = parser.parse_args(words)
    wanted = jobs(arguments)
    if arguments.submit:
        asyncio.run(submit(wanted))
    else:
        print(wanted[0].job_script())


if __name__ == "__main__":
    main(sys.argv[1:])
