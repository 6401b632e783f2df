#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Nodes of Slurm as hosts of a fleet: sbatch slurm.sh HOST:PORT, where `kvmpy fleet serve` runs. fleet.pem is its
# certificate, in this folder, which all nodes see; `kvmpy fleet run` on the serving machine uses whoever has joined.
#SBATCH --job-name=kvmpy-fleet
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --output=kvmpy-%j-%N.out
set -euo pipefail
address=${1:?the address of kvmpy fleet serve}
kvmpy pack build -o "suite-$SLURM_JOB_ID.pack"
# A node that dies takes no other one with it, and a task that ends is not started again: join does that itself.
srun --kill-on-bad-exit=0 --no-kill sh -c 'exec kvmpy fleet join "$0" --certificate fleet.pem --pack "$1" --name "$SLURMD_NODENAME"' \
	"$address" "suite-$SLURM_JOB_ID.pack"
