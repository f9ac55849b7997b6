# What a job needs before `eva02-at` can start on a node. Sourced by train.sbatch and array.sbatch.
# Copy it, fit it to your site (docs/cluster.md), and name the copy: EVA02_AT_ENV=my-env.sh.

# module load cuda/12.8                                  # where the site has modules
# source .venv/bin/activate                              # where `make install` put the environment

# A container instead: words put in front of every command.
# EVA02_AT_RUN=(apptainer exec --nv --bind /data eva02-at.sif)
EVA02_AT_RUN=()

# export NCCL_SOCKET_IFNAME=ib0                          # the interface between the nodes
# export GLOO_SOCKET_IFNAME=ib0                          # the same, for what the ranks agree on
# export NCCL_IB_HCA=mlx5_0,mlx5_1
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1                 # a dead peer ends the others
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"           # loader workers do the CPU work
export PYTHONUNBUFFERED=1
