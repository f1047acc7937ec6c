"""Cost of token reductions: time relative to a stock ViT-B block, forward and backward, 197 tokens.

    python benchmarks/reductions.py [--batch 8] [--device cpu]

Minimum of `--repeats` processor times (CPU, one thread) or wall times (GPU), alternating over all rows. Dropping also
needs the scores. The last row is the attention of a later block (99 tokens) with a mask of log sizes, as in token
merging; compare it with the row before it.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable

import torch
import transformers
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import ViTConfig, ViTModel

from peft_bsr.core import num_kept
from peft_bsr.ops import merge_tokens, reduce_tokens, token_scores

NUM_PATCHES, WIDTH, HEADS = 196, 768, 12


def rows(batch: int, device: str, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """Name -> function that runs forward and backward."""
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(num_hidden_layers=1), add_pooling_layer=False).to(device, dtype)
    block = model.layers[0]
    tokens = torch.randn(batch, 1 + NUM_PATCHES, WIDTH, device=device, dtype=dtype, requires_grad=True)
    patches = torch.arange(NUM_PATCHES, device=device).expand(batch, -1)
    scores = torch.rand(batch, 1 + NUM_PATCHES, device=device, dtype=dtype)
    heads = [_heads(batch, 1 + NUM_PATCHES, device, dtype) for _ in range(2)]
    fewer = [_heads(batch, 99, device, dtype) for _ in range(3)]
    sizes = torch.randint(1, 4, (batch, 1, 1, 99), device=device).to(dtype).log()

    def stock() -> Tensor:
        output = block(tokens)
        return output[0] if isinstance(output, tuple) else output

    found: dict[str, Callable[[], Tensor]] = {"stock block": stock}
    for rate in (0.5, 0.7):
        keep = num_kept(rate, NUM_PATCHES)
        found[f"drop, keep {rate}"] = lambda k=keep: reduce_tokens(tokens, None, scores, 1, k, None)[0]
        found[f"fuse, keep {rate}"] = lambda k=keep: reduce_tokens(tokens, None, scores, 1, k, NUM_PATCHES)[0]
        found[f"merge, keep {rate}"] = lambda k=keep: merge_tokens(tokens, patches, patches, 1, k)[0]
    found["class scores, for drop and fuse"] = lambda: token_scores("class", *heads, 0.125)
    found["attention of 99 tokens"] = lambda: scaled_dot_product_attention(*fewer)
    found["attention of 99 tokens, log sizes"] = lambda: scaled_dot_product_attention(*fewer, attn_mask=sizes)
    return {name: _with_backward(run) for name, run in found.items()}


def seconds(run: Callable[[], None], device: str) -> float:
    """Seconds of one call."""
    if device == "cpu":
        begin = time.process_time()
        run()
        return time.process_time() - begin
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin_event.record()
    run()
    end_event.record()
    torch.cuda.synchronize()
    return begin_event.elapsed_time(end_event) / 1000


def _heads(batch: int, num_tokens: int, device: str, dtype: torch.dtype) -> Tensor:
    return torch.randn(batch, HEADS, num_tokens, WIDTH // HEADS, device=device, dtype=dtype, requires_grad=True)


def _with_backward(run: Callable[[], Tensor]) -> Callable[[], None]:
    gradient = torch.ones_like(run())
    return lambda: run().backward(gradient)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="images (default 8)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16 (default float32)")
    parser.add_argument("--repeats", type=int, default=15, help="of each row (default 15)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = rows(args.batch, args.device, getattr(torch, args.dtype))
    for run in runs.values():
        run()
    taken = {name: min(times) for name, times in _rounds(runs, args.device, args.repeats).items()}
    where = platform.machine() if args.device == "cpu" else torch.cuda.get_device_name()
    print(
        f"{where}, {args.dtype}, batch {args.batch}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    print("\n| forward and backward | ms | % of the block |\n|---|---|---|")
    for name, time_taken in taken.items():
        print(f"| {name} | {1000 * time_taken:.2f} | {100 * time_taken / taken['stock block']:.1f} |")


def _rounds(runs: dict[str, Callable[[], None]], device: str, repeats: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            found[name].append(seconds(run, device))
    return found


if __name__ == "__main__":
    main()
