"""Three training steps with DDP; rank 0 prints whether weights and gradients are equal on all ranks.

    python train_ddp.py [gloo | nccl]    # gloo (the default) runs on CPUs, nccl on GPUs
"""
import json
import os
import sys

import timm
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

backend = sys.argv[1] if len(sys.argv) > 1 else 'gloo'
device = torch.device('cuda', int(os.environ['LOCAL_RANK'])) if backend == 'nccl' else torch.device('cpu')
if device.type == 'cuda':
    torch.cuda.set_device(device)
dist.init_process_group(backend)
rank = dist.get_rank()
torch.manual_seed(rank)  # different weights and images on each rank; DDP must synchronize the weights
model = DistributedDataParallel(timm.create_model('test_spikformer_v2', num_classes=10, depth=1).to(device))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for _ in range(3):
    logits = model(torch.randn(8, 3, 32, 32, device=device))
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(8, device=device))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def gathered(tensors):
    flat = torch.cat([t.detach().float().flatten() for t in tensors])
    out = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(out, flat)
    return out


weights = gathered(model.parameters())
grads = gathered(p.grad for p in model.parameters())
if rank == 0:
    print(json.dumps(dict(
        world_size=dist.get_world_size(), equal=all(torch.equal(weights[0], w) for w in weights),
        grads_equal=all(torch.equal(grads[0], g) for g in grads), grad_norm=grads[0].norm().item())), flush=True)
dist.barrier()
del model  # before the process group, because DDP's reducer uses its threads
dist.destroy_process_group()
