"""The README's example: one balanced MoE layer in a custom model. Run it with torchrun."""

import torch
import torch.distributed as dist

import feplb

dist.init_process_group("gloo")  # torchrun started one process per rank
config = feplb.MoEConfig(hidden=64, ffn_hidden=128, num_experts=16, top_k=2)
ep_size, tokens = dist.get_world_size(), 256
spec = config.layer_spec(ep_size, max_rows=2 * tokens * config.top_k)

with feplb.Balancer(feplb.BalancerConfig(policy="greedy"), dist.group.WORLD, [spec]) as balancer:
    layer = feplb.MoELayer(config, balancer=balancer, group=dist.group.WORLD)
    optimizer = torch.optim.AdamW(layer.parameters())
    for _ in range(10):
        x = torch.randn(tokens, 64)
        loss = (layer(x) - x).square().mean()
        loss.backward()
        feplb.training.sync_gradients(layer, dist.group.WORLD, dist.group.WORLD)
        balancer.check()  # raises what went wrong, on any rank
        optimizer.step()
        optimizer.zero_grad()
