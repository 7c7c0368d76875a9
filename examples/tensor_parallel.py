"""Trace a model that is spread over processes. Each writes the heads that it has; `hookattn merge` makes one trace.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py
    hookattn merge run.rank*.safetensors -o run.safetensors

On GPUs it is the same with "nccl" and "cuda". A checkpoint takes `from_pretrained(NAME, tp_plan="auto")` in the place
of the model and the plan below.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

import hookattn

PLAN = {
    "self_attn.q_proj": ColwiseParallel(),
    "self_attn.k_proj": ColwiseParallel(),
    "self_attn.v_proj": ColwiseParallel(),
    "self_attn.o_proj": RowwiseParallel(),
}


def model() -> LlamaForCausalLM:
    """A small Llama with random weights, the same in every process."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=64)
    return LlamaForCausalLM(config).eval()


def main() -> None:
    """One rank."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    llama = model()
    for layer in llama.model.layers:
        parallelize_module(layer, mesh, PLAN)
    inputs = {"input_ids": torch.arange(12).unsqueeze(0)}
    trace = hookattn.trace(llama, inputs, to="run.safetensors")
    print(f"{trace.path}: {trace[0].shard}, heads {trace[0].heads}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
