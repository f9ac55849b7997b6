#!/bin/bash
# Install what tests/cluster needs for its two-node SLURM cluster; does nothing where it is there.
set -euo pipefail
if command -v slurmctld slurmd munged sbatch >/dev/null; then
    exit 0
fi
# The packages' services must not start: the tests start their own, and stop only those.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge
