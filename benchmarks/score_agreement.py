"""Which token score can replace class attention in a model without a class token? ViT-Ti/16, real weights and images.

    python benchmarks/score_agreement.py --data FOLDER [--images 200]

FOLDER contains `vit-tiny-patch16-224/` (ViTForImageClassification) and `cifar10-test-1000.parquet` (column `image`). A
candidate does not use the query and key of the class token, unless its name says "with class"; the tokens themselves
have attended to it in earlier blocks. Blocks are counted from 0. Each table is printed with a description of its
columns.

Shapes: B images, H heads, N tokens (class token first), M = N - 1 patches, d head width, D width.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
import transformers
from datasets import load_dataset
from torch import Tensor, nn
from transformers import ViTForImageClassification

from peft_bsr.core.reduction import num_kept, reduce_tokens, select_tokens

BLOCKS = (3, 6, 9)
KEEP_RATE = 0.5
SCHEDULES = {"3": (3,), "6": (6,), "9": (9,), "3+6+9": (3, 6, 9)}


class State(NamedTuple):
    """Inputs of one block's attention: hidden [B, N, D] (block input), query, key and value [B, H, N, d]."""

    hidden: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float


def received(state: State, first: int = 1) -> Tensor:
    """Attention that each patch receives, mean over queries: [B, H, M], N x N softmax. `first=0`: with class token."""
    logits = state.query[:, :, first:] @ state.key[:, :, first:].mT * state.scaling
    return logits.softmax(dim=-1).mean(dim=-2)[..., 1 - first :]


def mean_query(state: State, first: int = 1) -> Tensor:
    """Attention that each patch receives from the mean query: [B, H, M], linear in N. `first=0`: with class token."""
    query = state.query[:, :, first:].mean(dim=-2, keepdim=True)
    return (query @ state.key[:, :, first:].mT * state.scaling).softmax(dim=-1)[..., 0, 1 - first :]


def norm(tensor: Tensor) -> Tensor:
    """L2 norm of every patch: [B, H, N, d] -> [B, H, M]."""
    return tensor[:, :, 1:].norm(dim=-1)


# each returns [B, H, M] (or H = 1); the mean over heads is taken by the caller
Score = Callable[[State], Tensor]
SCORES: dict[str, Score] = {
    "class attention (BSR)": lambda s: (s.query[:, :, :1] @ s.key.mT * s.scaling).softmax(dim=-1)[:, :, 0, 1:],
    "received": received,
    "mean_query": mean_query,
    "received x |value|": lambda s: received(s) * norm(s.value),
    "mean_query x |value|": lambda s: mean_query(s) * norm(s.value),
    "+key_norm": lambda s: norm(s.key),
    "-key_norm": lambda s: -norm(s.key),
    "token_norm": lambda s: norm(s.hidden[:, None]),
    "received, with class": lambda s: received(s, first=0),
    "mean_query, with class": lambda s: mean_query(s, first=0),
    "random": lambda s: torch.rand(len(s.hidden), 1, s.hidden.shape[1] - 1),
}


def block_state(block: nn.Module, hidden: Tensor) -> State:
    """Query, key and value that the block's attention uses for hidden [B, N, D]."""
    attention, normed = block.attention, block.layernorm_before(hidden)
    heads = (*hidden.shape[:2], attention.num_attention_heads, attention.head_dim)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    return State(hidden, *(proj(normed).view(heads).transpose(1, 2) for proj in projections), attention.scaling)


def run(
    model: nn.Module, hidden: Tensor, start: int = 0, drops: tuple[int, ...] = (), score: Score = received
) -> tuple[Tensor, Tensor, list[State]]:
    """Forward from the input of block `start`; drops patches in the blocks `drops`, between attention and MLP.

    Args:
        model: A ViTForImageClassification.
        hidden: [B, N, D], input of block `start`.
        start: First block to run.
        drops: Blocks that keep `ceil(KEEP_RATE * M)` of the M patches present; nothing is fused.
        score: Ranks the patches; one of `SCORES`.

    Returns:
        logits [B, classes], mean of the final-norm patches [B, D], states of the blocks that ran.
    """
    states = []
    for index, block in enumerate(model.vit.layers[start:], start):
        state = block_state(block, hidden)
        states.append(state)
        mixed = F.scaled_dot_product_attention(state.query, state.key, state.value, scale=state.scaling)
        hidden = hidden + block.attention.o_proj(mixed.transpose(1, 2).flatten(2))
        if index in drops:
            scores = score(state).mean(dim=1)
            origins, keep = torch.zeros_like(scores, dtype=torch.int64), num_kept(KEEP_RATE, scores.shape[1])
            hidden, _ = reduce_tokens(hidden, origins, F.pad(scores, (1, 0)), 1, keep, None)
        hidden = hidden + block.mlp(block.layernorm_after(hidden))
    final = model.vit.layernorm(hidden)
    return model.classifier(final[:, 0]), final[:, 1:].mean(dim=1), states


def spearman(first: Tensor, second: Tensor) -> Tensor:
    """Rank correlation of each row: [B, M], [B, M] -> [B]."""
    ranks = [scores.argsort(dim=1).argsort(dim=1).double() for scores in (first, second)]
    return F.cosine_similarity(*(rank - rank.mean(dim=1, keepdim=True) for rank in ranks), dim=1)


def overlap(first: Tensor, second: Tensor) -> Tensor:
    """Share of the best patches that two scores have in common: [B, M], [B, M] -> [B]; by chance KEEP_RATE."""
    keep = num_kept(KEEP_RATE, first.shape[1])
    kept = [torch.zeros_like(s).scatter(1, select_tokens(s, keep)[0], 1.0) for s in (first, second)]
    return (kept[0] * kept[1]).sum(dim=1) / keep


def measure(model: ViTForImageClassification, pixel_values: Tensor, results: dict[tuple, list[Tensor]]) -> None:
    """Append the figures of one batch, one [B] tensor each, under (score, reference or schedule, figure, block)."""
    logits, pooled, states = run(model, model.vit.embeddings(pixel_values).requires_grad_())
    torch.testing.assert_close(logits, model(pixel_values).logits, rtol=0, atol=1e-3)  # `run` is the model's forward
    inputs = [states[index].hidden for index in BLOCKS]
    gradients = torch.autograd.grad(logits.max(dim=1).values.sum(), inputs)
    with torch.no_grad():
        class_scores = SCORES["class attention (BSR)"]
        log_probs, top = logits.log_softmax(dim=1), logits.argmax(dim=1)
        for index, block_input, gradient in zip(BLOCKS, inputs, gradients, strict=True):
            references = {
                "a": class_scores(states[index]).mean(dim=1),
                "b": class_scores(states[-1]).mean(dim=1),
                "c": (gradient * block_input)[:, 1:].sum(dim=-1).abs(),
            }
            for name, score in SCORES.items():
                scores = score(states[index]).mean(dim=1)
                for key, reference in references.items():
                    results[name, key, "rho", index].append(spearman(scores, reference))
                    results[name, key, "overlap", index].append(overlap(scores, reference))
        results["unreduced", "pooled"].append(pooled.detach())
        for name, score in SCORES.items():
            for schedule, drops in SCHEDULES.items():
                reduced, reduced_pooled, _ = run(model, states[drops[0]].hidden, drops[0], drops, score)
                kl = F.kl_div(reduced.log_softmax(dim=1), log_probs, reduction="none", log_target=True).sum(dim=1)
                results[name, schedule, "agree"].append((reduced.argmax(dim=1) == top).double())
                results[name, schedule, "kl"].append(kl)
                results[name, schedule, "pooled"].append(reduced_pooled)


def median_seconds(function: Callable[[], object], repeats: int = 15) -> float:
    """Median wall time of a call, after two calls to warm up."""
    seconds = []
    for _ in range(repeats + 2):
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[2:])


@torch.no_grad()
def score_cost(model: ViTForImageClassification, num_tokens: int) -> dict[str, float]:
    """Time of each score in % of block 6's forward (batch 8, query and key given)."""
    block, hidden = model.vit.layers[6], torch.randn(8, num_tokens, model.config.hidden_size)
    state, block_seconds = block_state(block, hidden), median_seconds(lambda: block(hidden))
    seconds = {name: median_seconds(lambda score=score: score(state).mean(dim=1)) for name, score in SCORES.items()}
    return {name: 100 * score_seconds / block_seconds for name, score_seconds in seconds.items()}


def load_images(path: Path, count: int) -> Tensor:
    """`count` evenly spaced images as [count, 3, 224, 224] in [-1, 1], resized with PIL's bicubic filter."""
    data = load_dataset("parquet", data_files=str(path), split="train")
    if not 2 <= count <= len(data):
        sys.exit(f"`--images {count}` must lie between 2 and {len(data)}, the images in {path.name}.")
    rows = (data[i * len(data) // count] for i in range(count))
    images = (row["image"].convert("RGB").resize((224, 224), resample=3) for row in rows)
    pixels = [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(224, 224, 3) for image in images]
    return torch.stack(pixels).permute(0, 3, 1, 2) / 127.5 - 1


def print_agreement(results: dict[tuple, Tensor]) -> None:
    """Table 1: agreement of each score with the three references."""
    print("\nAgreement: Spearman rho/overlap of the best 50 % (chance .00/.50), means over images, at blocks 3, 6, 9")
    print("a: class attention, same block; b: class attention, last block; c: |gradient . input| of the top logit")
    columns = [(reference, index) for reference in "abc" for index in BLOCKS]
    print(" " * 24 + "".join(f"{f'{reference}, block {index}':>12}" for reference, index in columns))
    for name in SCORES:
        cells = ("/".join(f"{results[name, r, f, i].mean():.2f}" for f in ("rho", "overlap")) for r, i in columns)
        print(f"{name:24}" + "".join(f"{cell:>12}" for cell in cells))


def print_reduction(results: dict[tuple, Tensor], costs: list[dict[str, float]]) -> None:
    """Table 2: effect of dropping by each score on the outputs, and cost of the score."""
    print("\nHalf of the patches dropped mid-block, at one block or at all three, none fused; against all patches:")
    print("same top-1 (%), KL (nats), cosine of the mean final patch. For 3+6+9 also KL minus random's (standard error")
    print("of the pairs) and the cosine after subtracting the mean over images. Time: % of a block, batch 8")
    header = "".join(f"{'block ' + schedule:>15}" for schedule in SCHEDULES)
    print(f"{'':24}{header}{'KL - random':>14}{'cos-mean':>9}{'N=197':>7}{'N=785':>7}")
    full = results["unreduced", "pooled"]
    for name in SCORES:
        line = f"{name:24}"
        for schedule in SCHEDULES:
            agree, kl, pooled = (results[name, schedule, figure] for figure in ("agree", "kl", "pooled"))
            line += f"{100 * agree.mean():>5.0f}{kl.mean():>5.2f}{F.cosine_similarity(pooled, full).mean():>5.2f}"
        gain = kl - results["random", schedule, "kl"]
        centred = F.cosine_similarity(pooled - full.mean(dim=0), full - full.mean(dim=0)).mean()
        line += f"{gain.mean():>7.2f} ({gain.std() / len(gain) ** 0.5:.2f}){centred:>9.2f}"
        print(line + "".join(f"{cost[name]:>7.1f}" for cost in costs))


def main() -> None:
    """Measure and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the weights and the parquet file")
    parser.add_argument("--images", type=int, default=200, help="images to measure (default 200)")
    args = parser.parse_args()
    weights, parquet = args.data / "vit-tiny-patch16-224", args.data / "cifar10-test-1000.parquet"
    if missing := [str(path) for path in (weights, parquet) if not path.exists()]:
        sys.exit(f"`--data` needs {weights.name}/ and {parquet.name}; not found: {', '.join(missing)}.")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ViTForImageClassification.from_pretrained(weights, dtype=torch.float32).eval().requires_grad_(False)
    lists: dict[tuple, list[Tensor]] = defaultdict(list)
    for batch in load_images(parquet, args.images).split(25):
        measure(model, batch, lists)
    results = {key: torch.cat(tensors) for key, tensors in lists.items()}
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"ViT-Ti/16 224 (ImageNet-1k), {args.images} images of {parquet.name}, resized to 224, seed 0")
    print(f"CPU ({platform.machine()}), 1 thread, fp32, {versions}\ncommand: python", *sys.argv)
    print_agreement(results)
    print_reduction(results, [score_cost(model, num_tokens) for num_tokens in (197, 785)])


if __name__ == "__main__":
    main()
