"""What a run will need: memory for each way of sharing the state, time, and cost.

Parameters and activations are counted on the model itself, built without storage (fake tensors);
time follows a stated model with a few measured rates. Nothing here touches a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from kernels import st_rope
from lightning_modules.models import DualEncoder, DualEncoderConfig, VideoClassifier
from lightning_modules.models.config import resolve_config
from lightning_modules.training.monitor.flops import (
    known_gpu,
    pair_flops,
    peak_tflops,
    text_flops,
    video_flops,
)
from lightning_modules.training.run.private import fake_tensors, storage_identity
from lightning_modules.training.run.strategies import bucket_elements

GIB = 2**30
_CONTEXT_BYTES = 1.0 * GIB  # CUDA context, libraries' workspaces
_FRAGMENTATION = 1.05  # of the caching allocator


@dataclass
class ClusterConfig:
    """The machines of a run.

    Attributes:
        gpu: Name, as the driver gives it.
        gpu_memory_gib: Memory of a GPU; by default that of the name, of the smaller one where two
            are sold (A100: 40).
        gpu_tflops: Dense bf16 peak of a GPU; by default that of the name.
        gpus_per_node: GPUs of a node.
        nodes: Nodes.
        intra_node_gb_s: Bandwidth between the GPUs of a node, GB/s and GPU, one direction.
        inter_node_gb_s: Bandwidth of a node's whole network, GB/s, one direction: what crosses
            between nodes in a ring crosses once, however many GPUs a node has.
        cores_per_gpu: CPU cores that may decode for a GPU; no more than the recipe has workers do.
        decode_clips_per_s: Clips a core decodes and crops in a second: 20 from 15 s chunks
            (GOP 30), 90 from what `shards build --recipe pretrain` stores (docs/performance.md).
        efficiency: Share of the peak that a step's matrix products reach.
        price_per_gpu_hour: For the cost, in any currency.
    """

    gpu: str = "H100"
    gpu_memory_gib: float | None = None
    gpu_tflops: float | None = None
    gpus_per_node: int = 8
    nodes: int = 1
    intra_node_gb_s: float = 400.0
    inter_node_gb_s: float = 50.0
    cores_per_gpu: float = 8
    decode_clips_per_s: float = 90.0
    efficiency: float = 0.35
    price_per_gpu_hour: float = 0.0

    def __post_init__(self) -> None:
        if known_gpu(self.gpu) is None and None in (self.gpu_tflops, self.gpu_memory_gib):
            raise ValueError(
                f"the peak and the memory of a {self.gpu!r} are not known; give "
                "cluster.gpu_tflops (dense bf16) and cluster.gpu_memory_gib"
            )
        for name, value in vars(self).items():
            if isinstance(value, (int, float)) and name != "price_per_gpu_hour" and value <= 0:
                raise ValueError(f"cluster.{name} is {value}; it must be above 0")

    @property
    def tflops(self) -> float:
        """Dense bf16 peak of a GPU."""
        return self.gpu_tflops or peak_tflops(self.gpu) or 0.0

    @property
    def memory_gib(self) -> float:
        """Memory of a GPU."""
        known = known_gpu(self.gpu)
        return self.gpu_memory_gib or (known.memory_gib if known else 0.0)

    @property
    def ranks(self) -> int:
        """GPUs in all."""
        return self.nodes * self.gpus_per_node

    @property
    def gb_s_per_rank(self) -> float:
        """Bandwidth that a rank has for collectives over all ranks."""
        if self.nodes == 1:
            return self.intra_node_gb_s
        return min(self.intra_node_gb_s, self.inter_node_gb_s)


@dataclass(frozen=True)
class ModelCosts:
    """What one model costs, whatever the cluster.

    Attributes:
        parameters: Trainable parameters.
        flops: Forward FLOPs of a pair.
        activation_bytes: Saved for the backward pass of a pair, in the recipe's precision.
        checkpointed_bytes: The same with activation checkpointing: the blocks' inputs.
        block_bytes: Of these, what one block of the video tower saves.
    """

    parameters: int
    flops: float
    activation_bytes: float
    checkpointed_bytes: float
    block_bytes: float


@dataclass(frozen=True)
class Option:
    """One way of running: a row of the plan's table; bytes are of one rank."""

    strategy: str
    checkpointing: bool
    state_bytes: float
    activation_bytes: float
    total_bytes: float
    fits: bool
    micro_batch: int | None
    compute_s: float
    communication_s: float
    data_s: float
    step_s: float


def model_costs(
    config: DualEncoderConfig,
    num_classes: int | None = None,
    precision: str = "bf16-true",
    *,
    num_captions: int = 1,
    turned: float = 0.0,
) -> ModelCosts:
    """Count a model's parameters, FLOPs and activations on fake tensors.

    Args:
        config: The dual encoder's.
        num_classes: Of a recogniser, which is the video tower alone; a pair is then a clip.
        precision: Lightning's name of it, see `saved_bytes`.
        num_captions: Sentences of a pair, the false ones of hard negatives included.
        turned: Share of the pairs that stand in the batch backwards too.
    """
    with torch.device("meta"):
        parameters = sum(p.numel() for p in _build(config, num_classes, False).parameters())
    saved = partial(
        saved_bytes,
        config,
        precision=precision,
        num_classes=num_classes,
        num_captions=num_captions,
    )
    kept, recomputed = (
        (1 + turned) * (saved(2, checkpointing=again) - saved(1, checkpointing=again))
        for again in (False, True)
    )
    block = (kept - recomputed) / config.vision.depth
    if num_classes:
        flops = video_flops(config.vision, num_classes)
    else:
        false_captions = (num_captions - 1) * text_flops(config.text, config.embed_dim)
        flops = pair_flops(config) + false_captions
    return ModelCosts(parameters, (1 + turned) * flops, kept, recomputed, block)


def _build(config: DualEncoderConfig, num_classes: int | None, checkpointing: bool) -> nn.Module:
    config = resolve_config(config, activation_checkpointing=checkpointing)
    return VideoClassifier(config, num_classes) if num_classes else DualEncoder(config)


def saved_bytes(
    config: DualEncoderConfig,
    num_pairs: int,
    *,
    checkpointing: bool,
    precision: str = "bf16-true",
    num_classes: int | None = None,
    num_captions: int = 1,
) -> int:
    """Bytes that autograd keeps between the forward and the backward pass; see `model_costs`.

    The real forward pass runs on fake tensors, which have shapes and storages but no memory; each
    storage counts once and parameters do not count.

    Args:
        config: The model's.
        num_pairs: Pairs of a batch.
        checkpointing: Recompute each block.
        precision: "32-true"; "bf16-true" or "16-true", all weights in that type (DeepSpeed's way in
            mixed precision too); "bf16-mixed" or "16-mixed", float32 weights under autocast.
        num_classes: Of a recogniser.
        num_captions: Sentences of a pair.
    """
    low = torch.float16 if precision.startswith("16") else torch.bfloat16
    with torch.device("meta"):
        model = _build(config, num_classes, checkpointing)
        if precision in ("bf16-true", "16-true"):
            model = model.to(low)
    st_rope._cached_tables.cache_clear()  # neither real tables in here nor fake ones afterwards
    mixed = precision.endswith("mixed")
    try:
        with fake_tensors(), torch.autocast("cpu", low, enabled=mixed):
            _give_fake_storage(model)
            size, frames = config.vision.image_size, config.vision.num_frames
            inputs = [torch.zeros(num_pairs, 3, frames, size, size, dtype=torch.uint8)]
            if num_classes is None:
                length = config.text.context_length
                inputs.append(torch.zeros(num_pairs * num_captions, length, dtype=torch.int64))
            return count_saved(model, *inputs)
    finally:
        st_rope._cached_tables.cache_clear()


def count_saved(model: nn.Module, *inputs: Tensor) -> int:
    """Bytes of the storages that a forward pass saves, the parameters' own left out."""
    own = {storage_identity(p) for p in model.parameters()}
    kept: dict[int, Tensor] = {}  # holding the tensors keeps their storages' identities apart

    def pack(tensor: Tensor) -> Tensor:
        identity = storage_identity(tensor)
        if identity not in own:
            kept[identity] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _output = model(*inputs)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _give_fake_storage(model: nn.Module) -> None:
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(torch.empty(old.shape, dtype=old.dtype)))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype))


def state_bytes(parameters: int, strategy: str, ranks: int) -> float:
    """Bytes of weights, gradients and AdamW state that one rank holds, in mixed bf16.

    DDP keeps fp32 weights (4), gradients (4), moments (8) and autocast's bf16 copy (2). ZeRO keeps
    bf16 weights (2) and gradients (2) and shares out fp32 weights and moments (12): from stage 2
    on the gradients too, at stage 3 the weights as well. ZeRO's buckets come on top.
    """
    bucket = 8 * bucket_elements(parameters)  # two in bf16, and one summed in fp32
    return {
        "ddp": 18.0 * parameters,
        "zero1": 4.0 * parameters + 12.0 * parameters / ranks + bucket,
        "zero2": 2.0 * parameters + 14.0 * parameters / ranks + bucket,
        "zero3": 16.0 * parameters / ranks + bucket,
    }[strategy]


def communication_bytes(parameters: int, strategy: str, ranks: int) -> float:
    """Bytes that one rank sends in a step: a ring's (ranks - 1) / ranks for each collective.

    DDP reduces fp32 gradients, which is two passes. ZeRO 1 and 2 scatter fp32 gradients and gather
    bf16 weights; ZeRO 3 gathers the weights twice.
    """
    passes = {"ddp": 2 * 4, "zero1": 4 + 2, "zero2": 4 + 2, "zero3": 4 + 2 + 2}[strategy]
    return passes * parameters * (ranks - 1) / ranks


def plan_option(
    costs: ModelCosts,
    cluster: ClusterConfig,
    *,
    strategy: str,
    checkpointing: bool,
    batch: int,
    pair_input_bytes: float,
    workers: int | None = None,
) -> Option:
    """Predict memory and time of a step for one way of running.

    A step takes as long as its arithmetic and the part of its communication that the backward
    pass (two thirds of the arithmetic) does not hide, or as decoding its clips, whichever is more.
    Where the batch does not fit, the largest micro-batch that does is named; GradCache's second
    forward pass is then counted.

    Args:
        costs: The model's.
        cluster: The machines.
        strategy: `ddp`, `zero1`, `zero2` or `zero3`.
        checkpointing: Recompute each block in the backward pass.
        batch: Pairs of a rank.
        pair_input_bytes: Bytes of a pair's input.
        workers: Loader workers of a rank: no more cores than these decode.
    """
    state = state_bytes(costs.parameters, strategy, cluster.ranks)
    per_pair = _bytes_in_flight(costs, checkpointing)

    def total(pairs: int) -> float:
        held = state + per_pair * pairs + pair_input_bytes * batch
        return held * _FRAGMENTATION + _CONTEXT_BYTES

    memory = cluster.memory_gib * GIB
    fits = total(batch) <= memory
    room = memory - total(0)
    largest = int(room / (per_pair * _FRAGMENTATION)) if room > 0 else 0
    micro_batch = None if fits or largest < 1 else largest
    passes = 3 + checkpointing + (micro_batch is not None)
    compute = batch * costs.flops * passes / (cluster.tflops * 1e12 * cluster.efficiency)
    sent = communication_bytes(costs.parameters, strategy, cluster.ranks)
    communication = sent / (cluster.gb_s_per_rank * 1e9)
    cores = min(cluster.cores_per_gpu, workers or cluster.cores_per_gpu)
    data = batch / (cores * cluster.decode_clips_per_s)
    return Option(
        strategy,
        checkpointing,
        state,
        per_pair * (micro_batch or batch),
        total(micro_batch or batch),
        fits,
        micro_batch,
        compute,
        communication,
        data,
        max(compute + max(0.0, communication - compute * 2 / 3), data),
    )


def _bytes_in_flight(costs: ModelCosts, checkpointing: bool) -> float:
    """Of a pair, at the peak of the backward pass."""
    if checkpointing:
        # one block's activations come to life again, and as many gradients, as it goes backwards
        return costs.checkpointed_bytes + 2 * costs.block_bytes
    return costs.activation_bytes + costs.block_bytes


def largest_batch(config: DualEncoderConfig, memory_gib: float) -> int:
    """Return the largest power of two of pairs that one GPU trains in mixed bf16, 0 for none."""
    costs = model_costs(config, precision="bf16-mixed")
    room = (memory_gib * GIB - _CONTEXT_BYTES) / _FRAGMENTATION
    room -= state_bytes(costs.parameters, "ddp", 1)
    pairs = int(room / _bytes_in_flight(costs, config.activation_checkpointing))
    return 1 << (pairs.bit_length() - 1) if pairs > 0 else 0
