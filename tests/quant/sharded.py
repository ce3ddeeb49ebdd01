"""Two processes share a quantized model (FSDP2 over gloo) and find the loss and gradients of one that has it whole.

python tests/quant/sharded.py RENDEZVOUS_FILE
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parents[1]))
RANKS = 2


def run(rank: int, rendezvous: str) -> None:
    from conftest import build_llama

    import deltaw

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    base = build_llama()
    deltaw.quantize_(base, deltaw.NF4Config(bnb_4bit_use_double_quant=True))
    model = deltaw.get_peft_model(base, deltaw.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(1))
    whole = model(ids, labels=ids).loss
    whole.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert torch.equal(loss, whole), (loss, whole)
    found = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)
    weight = base.model.layers[0].mlp.up_proj.base_layer.weight
    assert weight.dtype == torch.uint8
    assert weight.to_local().numel() * RANKS == weight.numel(), "the bytes are not sharded"
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(run, args=(sys.argv[1],), nprocs=RANKS)
